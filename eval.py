"""
eval.py - how good is a model, and the border where flags, problems and models come in.

A model answers every problem n times, and reward.py says which answers are right. Their mean is
avg@n, the measure of Prefix-RFT (https://arxiv.org/abs/2507.01679: temperature 0.6, top-p 0.95);
pass@k is the chance that one of k answers is right (2107.03374). The 95 % interval draws the
*problems* anew: n answers to one problem are not n independent facts.

Read `evaluate` and, for what a model is shown and where its answer ends, `prompt_ids` to `encode`.
The rest may be skipped: what a user can get wrong - a flag, a line of a file, a checkpoint, a
second run in --out - is met there, by an InputError: one sentence that says where, what, and how
to mend it. `blame` makes such a sentence of a library's error; `at` and `writing` are two uses of
it.

Left out: few-shot prompts, judges other than reward.py, several GPUs.

    python eval.py                                            the toy's base model, greedily
    python eval.py --model runs/prefix_rft/checkpoint --out runs/after
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --data math500 my.jsonl --n 8 --temperature 0.6
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import textwrap
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.utils import find_adapter_config_file

import toy
from reward import extract_answer, rewards
from sampler import Sampler
from toy import INSTRUCTION

# Benchmarks with a JSONL file on the Hub. Most others are parquet, which needs one more package.
BENCHMARKS = {"gsm8k": "hf://DaertML/gsm8k-jsonl/test.jsonl",
              "math500": "hf://HuggingFaceH4/MATH-500/test.jsonl",
              "aime25": "hf://math-ai/aime25/test.jsonl",
              "minerva": "hf://math-ai/minervamath/test.jsonl"}

# The keys of a row: the first that holds something wins.
ALIASES = {"problem": ("problem", "question", "prompt"),
           "solution": ("solution", "demo", "demonstration", "completion", "response"),
           "answer": ("answer", "final_answer", "ground_truth")}
FORMS = {"problem": 'a text or a chat [{"role": "user", "content": "..."}]',
         "solution": "a text or a list of texts", "answer": "a text or a number"}

# Advice of libraries that would not help here, or do harm; and how they say that memory is full
ADVICE = re.compile(r"This file can still|In PyTorch 2.6|Please pass the arg|If this is a private")
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED")


class InputError(ValueError):
    """Something the user gave is wrong. One sentence: the flag or file, the fault, the mend."""


@contextlib.contextmanager
def blame(cause, mend="", errors=Exception):
    """An error inside becomes an InputError on one line: the cause, the error's words, the mend."""
    try:
        yield
    except errors as error:
        words = printable(str(error)) or type(error).__name__
        if not isinstance(error, InputError):
            if memory_is_full(error):
                raise                                    # Not the cause; run_script has the mend
            words = ADVICE.split(words)[0][:200].rstrip()
        raise InputError(f"{cause}: {words}{mend}") from None


def memory_is_full(error):
    """Of the host or of a GPU; libraries have many words for it."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))


def printable(text):
    """A text for the terminal: one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


# ---- flags --------------------------------------------------------------------------------------

class InRange(argparse.Action):
    """Stores a number, or a list of them; const is (lowest, highest)."""

    def __call__(self, parser, namespace, values, option):
        low, high = self.const
        if not low <= np.min(values) <= np.max(values) <= high:      # So nan is in no range
            refuse(f"{option} {values} is out of range: {low} to {high}")
        setattr(namespace, self.dest, values)


def flag(default, help, low=None, high=10**9):
    """A field of a Flags dataclass; a number lies in low to high, both included."""
    metadata = {"help": help.replace("%", "%%")}         # Argparse expands % in it
    if low is not None:
        metadata.update(action=InRange, const=(low, high))
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse(message):
    """For argparse, whose own way is to print the usage and exit."""
    raise InputError(f"{message} (--help lists all flags)")


def parse_flags(Flags, argv=None, toy_defaults={}, methods={}):
    """The command line -> Flags(...). InputError for an unknown flag or a value not allowed. Flags
    holds the defaults for real models; toy_defaults {flag: default} replace them when --data is
    toy, methods[--method] {flag: default} replace both, and what is typed wins."""
    title = sys.modules[Flags.__module__].__doc__.strip().split("\n")[0]
    marks = "[P], [D]: the value of the Prefix-RFT and On-Policy SFT paper, [code]: of its code"
    parser = HfArgumentParser(Flags, description=title, epilog=marks, allow_abbrev=False)
    parser.error = refuse
    for action in parser._actions:                       # The parser itself adds "(default: ...)"
        for name, others in {"toy": toy_defaults, **methods}.items():
            if others.get(action.dest, action.default) != action.default:
                action.help += f"; {name}: {others[action.dest]}"
    # Whose defaults hold depends on --data and --method, so the line is read twice
    flags = parser.parse_args(argv)
    if toy_defaults and flags.data == "toy":
        parser.set_defaults(**toy_defaults)
    if methods:
        parser.set_defaults(**methods[flags.method])
    return Flags(**vars(parser.parse_args(argv)))


def run_script(main, Flags, toy_defaults={}, methods={}):
    """The last line of every script."""
    transformers.logging.set_verbosity_error()
    # At every new shape cuDNN's attention takes a good part of a second; micro-batches have many
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()

    def run():
        flags = parse_flags(Flags, None, toy_defaults, methods)
        has = vars(flags)
        if has.get("model", "toy") == "toy":
            torch.set_num_threads(1)     # Sums depend on how many; for the toy more are no faster
        try:
            main(flags)
        except (MemoryError, RuntimeError) as error:
            if not memory_is_full(error):
                raise
            names = [name for name in ("micro_tokens", "rows", "max_new_tokens") if name in has]
            mend = f"lower --{' or --'.join(names)}"
            if "offload" in has:
                mend += ", or add --offload"
            raise InputError(f"out of memory: {mend}; {str(error)[:100]}")

    exit_on_mistake(run)


def exit_on_mistake(main, *args):
    """main(*args), in which a user's mistake becomes one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):               # Not every terminal has every character
            stream.reconfigure(errors="replace")
    try:
        main(*args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        words = printable(str(error))
        if isinstance(error, OSError) and error.filename is None:
            words = f"standard output cannot be written: {words}"
            # Nothing more to it: Python would complain once more when it ends
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):           # As in `| head`
            sys.exit(141)
        print(f"error: {words}", file=sys.stderr)
        sys.exit(2)


def pick_device(name):
    """"auto" (the GPU if there is one), "cpu" or "cuda" -> torch.device."""
    gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not gpu):
        raise InputError(f"--device {name}: PyTorch finds none here, choose auto or cpu")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


# ---- runs: who may write to --out, and what --resume must find again ----------------------------

# Flags that --resume may change, since they belong to the machine: these change the last bits of
# the numbers, those nothing. All others decide where a run ends.
ROUNDING = ("device", "rows", "micro_tokens", "keep_activations", "offload")
MACHINE = (*ROUNDING, "save_every")
OPTIMISATION = ("steps", "epochs", "batch", "mini_batches", "lr", "warmup")


def check_run(flags, claim=False):
    """--out and --resume -> (Path, what flags.json says of the run to go on with, or None). A
    resumed run gets back its number of threads. Only with `claim` --out is made."""
    out, resume = Path(flags.out), vars(flags).get("resume", False)
    with blame(f"--out {flags.out}", "; name another directory", OSError):
        place = next(p for p in [out, *out.absolute().parents] if os.path.lexists(p))
        if not flags.out or not place.is_dir() or not os.access(place, os.W_OK):
            raise InputError(f"--out {flags.out!r}: {place} is no directory that can be written to")
        if claim:
            out.mkdir(parents=True, exist_ok=True)
        # A kill in the first moments leaves no more than a lock and half a file.
        files = out.iterdir() if out.is_dir() else []
        begun = any(file.suffix != ".tmp" and file.name != ".lock" for file in files)
    if resume and not out.is_dir():
        raise InputError(f"--resume: there is no run in {out}, leave it out")
    if begun and not resume:
        raise InputError(f"--out {out} already holds a run: add --resume or name another --out")
    if begun or claim:
        lock(out)
    if not begun:
        return out, None

    file = out / "flags.json"
    with blame(f"--resume: {file} is damaged", "; name another --out"):
        before = json.loads(file.read_text(encoding="utf-8"))
        settings, threads, _ = dict(before["flags"]), before["threads"], dict(before["checksum"])
        if threads not in range(1, 1025):
            raise InputError(f"threads {threads} is no number from 1 to 1024")
    for name, value in settings.items():
        if name not in MACHINE and vars(flags).get(name) != value:
            raise InputError(f"--resume: this run has --{name} {value}, repeat its flags")
    torch.set_num_threads(threads)
    return out, before


def open_run(flags, **inputs):
    """Claim --out as soon as nothing can be refused any more -> (Path, what its flags.json holds).
    inputs: all that the run reads, by the flag that names it; --resume must find it unchanged."""
    out, before = check_run(flags, claim=True)           # Another run may have begun since
    settings = {**asdict(flags), "device": pick_device(flags.device).type}
    for name in ("out", "resume"):
        settings.pop(name, None)
    checksum = {}
    for name, value in inputs.items():
        checksum[name] = zlib.crc32(json.dumps(value).encode())
    record = {"flags": settings, "threads": torch.get_num_threads(), "checksum": checksum}
    print_settings(settings, record["threads"])
    if before is None:
        write_file(out / "flags.json", json.dumps(record, indent=2) + "\n")
        return out, record

    for name, value in checksum.items():
        if before["checksum"].get(name) != value:
            raise InputError(f"--resume: --{name} {settings[name]} is not what this run began with:"
                             " bring that back or name another --out")
    # What may change nothing but the last bits.
    changed = [name for name in ROUNDING if before["flags"].get(name) != settings.get(name)]
    if before["threads"] > os.cpu_count() or before["threads"] != torch.get_num_threads():
        changed.append(f"its {before['threads']} threads")
    if changed:
        print(f"resumed with other {', '.join(changed)}: the last bits may differ")
    return out, before


def lock(out):
    """Keep other processes out of --out until this one ends, even by SIGKILL. Windows and some file
    systems have no such lock."""
    try:
        import fcntl
        file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {out}: another run is at work there, name another") from None
    except (ImportError, OSError):
        pass


def print_settings(settings, threads):
    """The flags of a run in three groups."""
    groups = {"method": [], "optimisation": [], "machine": [f"threads {threads}"]}
    for name, value in settings.items():
        group = "machine" if name in MACHINE else "method"
        if name in OPTIMISATION:
            group = "optimisation"
        groups[group].append(f"{name} {value}")
    for group, words in groups.items():
        print(textwrap.fill(f"{group:13} {', '.join(words)}", 100, subsequent_indent=" " * 14,
                            break_long_words=False, break_on_hyphens=False))


# ---- files and problems -------------------------------------------------------------------------

def writing(path):
    """An error inside says which file could not be written; a full disk has many names."""
    return blame(f"{path} cannot be written", "; make room or name another --out")


def write_file(path, text):
    """Replace path in one move: a kill leaves the old file or the new one."""
    beside = Path(f"{path}.tmp")
    with writing(path):
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write_rows(path, rows):
    """The same with one JSON object a line."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_log(path):
    """The rows of a JSONL file or []. Half a line at its end, left by a kill, is cut off."""
    if not Path(path).exists():
        return []
    os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)
    return [row for _, row in read_rows(path)]


def read_rows(path):
    """A JSONL file or a JSON array, here or on the Hub -> list of ("my.jsonl line 3", row)."""
    path = file = str(path)
    with blame(f"{path} cannot be read", "; give JSON(L) in UTF-8 or hf://owner/name/file.jsonl"):
        if path.startswith("hf://"):
            owner, name, inside = path.removeprefix("hf://").split("/", 2)
            file = huggingface_hub.hf_hub_download(f"{owner}/{name}", inside, repo_type="dataset")
        text = Path(file).read_text(encoding="utf-8-sig")

    rows = []
    if text.lstrip().startswith("["):
        with blame(f"{path} is not valid JSON"):
            for number, row in enumerate(json.loads(text, object_pairs_hook=unique), 1):
                rows.append((f"{path} item {number}", row))
    else:
        # Not splitlines: a text may hold U+2028
        for number, line in enumerate(text.split("\n"), 1):
            place = f"{path} line {number}"
            with blame(f"{place} is not valid JSON by itself"):
                if line.strip():
                    rows.append((place, json.loads(line, object_pairs_hook=unique)))
    for place, row in rows:
        with blame(f"{place} is not valid JSON by itself"):
            json.dumps(row, ensure_ascii=False).encode()        # Fails on half a character, \ud800
        if not isinstance(row, dict):
            raise InputError(f'{place} is no object like {{"problem": ..., "answer": ...}}')
    return rows


def unique(pairs):
    """Keys and values of a JSON object -> dict. A key that is there twice would lose a value."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f'the key "{key}" stands there twice')
        found[key] = value
    return found


class Problem(dict):
    """{"problem", "solution", "answer"}; .place is where it stands: "my.jsonl line 3"."""


def at(problem):
    """A mistake inside is blamed on the line of this problem."""
    return blame(getattr(problem, "place", "a problem"), errors=InputError)


def load_problems(path, require=("answer",), seed=0):
    """Problems of a .jsonl or .json file, of the Hub (hf://owner/name/path/to/file.jsonl), or of
    the toy's training split ("toy", which alone has a seed) -> list of {"problem": str or chat
    turns, "solution": str, list of str or None, "answer": str or None}; the keys in `require` are
    never empty. No line is skipped: InputError names it."""
    if path == "toy":
        return toy.problems("train", seed=seed)
    problems = []
    for place, row in read_rows(path):
        keys = ", ".join(row) or "none"
        with blame(place, f"; its keys are: {keys}; other formats: bridges/convert.py", InputError):
            problems.append(Problem(to_problem(row, require)))
            problems[-1].place = place
    if not problems:
        raise InputError(f"{path} is empty: give one JSON object with problem and answer a line")
    return problems


def to_problem(row, require=()):
    """A row with our keys or their aliases, or of GSM8K -> a problem. InputError if a value has not
    its form, if one in `require` is missing, or if something of another format would be lost."""
    problem, solution, answer = [first_alias(row, key) for key in ALIASES]
    lost = ["choices", "options"]
    if solution is None:
        lost += ["target", "chosen", "messages"]
    for key in lost:
        if row.get(key):
            raise InputError(f"its {key} would be lost")
    if type(answer) is int or type(answer) is float and math.isfinite(answer):
        answer = str(answer)

    # GSM8K keeps both in its answer: "48/2 = <<48/2=24>>24 ... #### 1,042"
    if is_text(answer) and "####" in answer:
        worked, _, answer = answer.rpartition("####")
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.strip())
        worked = re.sub("<<[^<>]*>>", "", worked).strip()          # Marks meant for a calculator
        solution = solution or f"{worked}\nThe answer is \\boxed{{{answer}}}."
    solutions = solution if isinstance(solution, list) else [solution]
    if answer is None and is_text(solutions[0]) and "\\boxed" in solutions[0]:
        answer = extract_answer(solutions[0])

    fits = {"problem": is_text(problem) or is_chat(problem),
            "solution": all(map(is_text, solutions)), "answer": is_text(answer)}
    found = {"problem": problem, "solution": solution, "answer": answer}
    for key, value in found.items():
        optional = key not in ("problem", *require)
        if not fits[key] and not (optional and value is None):
            raise InputError(f"{key} ({'|'.join(ALIASES[key])}) must be {FORMS[key]}")
    return found


def first_alias(row, key):
    """The first value that is not empty under the aliases of key, or None."""
    for alias in ALIASES[key]:
        if row.get(alias) not in (None, "", []):
            return row[alias]


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def is_chat(value):
    """Whether value is [{"role": text, "content": text}, ...]; only a system may say nothing."""
    if not isinstance(value, list) or value == []:
        return False
    for turn in value:
        if not isinstance(turn, dict) or not is_text(turn.get("role")):
            return False
        silent_system = turn["role"] == "system" and turn.get("content") == ""
        if not is_text(turn.get("content")) and not silent_system:
            return False
    return True


def demonstrations(problem):
    """The solutions of a problem as a list, which may be empty."""
    solution = problem["solution"] or []
    return [solution] if isinstance(solution, str) else solution


def load_benchmarks(names):
    """["toy", "math500", "my.jsonl"] -> {title: problems}. The toy is three: hard, longer, easy."""
    benchmarks = {}
    for name in filter(None, names):
        if name == "toy":
            found = {f"toy-{split}": toy.problems(split) for split in ("hard", "longer", "easy")}
        else:
            found = {Path(name).stem: load_problems(BENCHMARKS.get(name, name))}
        for title, problems in found.items():
            while title in benchmarks:                   # Two files of one name in two folders
                title += "-2"
            benchmarks[title] = problems
    return benchmarks


# ---- models -------------------------------------------------------------------------------------

def load_model(name, device, seed=0):
    """"toy" (pre-trained with this seed), a directory or a Hub id -> (model in float32 and eval
    mode on device, tokenizer). InputError if it is no whole decoder with a tokenizer."""
    if name == "toy":
        model, tokenizer = toy.base_model(seed)
        return model.to(device).eval(), tokenizer
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not os.path.isdir(Path(name).parent)
    if not os.path.isdir(name) and not hub_id:
        raise InputError(f"--model {name} is no directory: give one, a Hub id or toy")
    with blame(f"--model {name} cannot be loaded"):
        if find_adapter_config_file(name):
            raise InputError("it is an adapter: merge it into its model first (merge_and_unload)")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True)
        model = model.to(device).eval()
        if info["missing_keys"] or info["mismatched_keys"]:
            raise InputError("it lacks weights or has them in another shape: give a whole model")
        size = model.get_input_embeddings().num_embeddings
        text = tokenizer("1 + 1", add_special_tokens=False).input_ids
        if text == [] or tokenizer.eos_token_id is None or len(tokenizer) > size:
            raise InputError("it has no tokenizer that fits: save one (tokenizer.save_pretrained) "
                             "with an eos_token and no more tokens than the model")
        # In a decoder the second token cannot change what is said after the first
        with torch.no_grad():
            ids = torch.tensor([[0, 0], [0, 1]], device=device)
            one, other = model(ids).logits[:, 0].float()
        if not (one - other).abs().max() <= 1e-4 * one.abs().max():                  # Or nan
            raise InputError("it computes nan or looks ahead, as encoders do: give a sound decoder")
    # A checkpoint of this model will say where its responses end
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)
    return model, tokenizer


def fingerprint(model, tokenizer):
    """A checksum of what a run reads of a model: weights, vocabulary, chat template, stop ids."""
    words = [tokenizer.get_vocab(), tokenizer.chat_template, stop_ids(model, tokenizer)]
    checksum = zlib.crc32(json.dumps(words, sort_keys=True).encode())
    for weight in model.state_dict().values():
        data = weight.flatten().contiguous().cpu().view(torch.uint8)
        checksum = zlib.crc32(data.numpy(), checksum)
    return checksum


def chat_turns(problem):
    """A problem (a text, or chat turns as they stand) -> chat turns."""
    if isinstance(problem, str):
        return [{"role": "user", "content": problem + INSTRUCTION}]
    return problem


def prompt_ids(tokenizer, problem):
    """A problem (a text, or chat turns as they stand) -> ids up to where the response begins.
    Control tokens spelled out in it are plain text. InputError if it is not for the model to speak,
    or if the chat template loses what the user says."""
    turns = chat_turns(problem)
    if not tokenizer.chat_template:
        # A base model reads the text and a line's end
        text = "".join(turn["content"] + "\n" for turn in turns)
        ids = tokenizer(text, split_special_tokens=True).input_ids
        if ids[-1] == tokenizer.eos_token_id:            # Some tokenizers close every text
            ids = ids[:-1]
        return ids

    if turns[-1]["role"] == "assistant":
        raise InputError("the chat ends with an assistant's turn: end it with a user's")
    text = render(tokenizer, turns)
    ids = []
    for turn in turns:
        content = turn["content"].strip()                # Many templates strip it
        if turn["role"] == "user" and content not in text:
            raise InputError("the chat template does not print what the user says: mend it")
        if text_ids(tokenizer, content) != tokenizer(content, add_special_tokens=False).input_ids:
            # A control token is spelled out: only those that the template writes are meant
            before, content, text = text.partition(content)
            ids += tokenizer(before, add_special_tokens=False).input_ids
            ids += text_ids(tokenizer, content)
    return ids + tokenizer(text, add_special_tokens=False).input_ids


def render(tokenizer, turns, add_generation_prompt=True):
    """Chat turns -> the text that the chat template makes of them."""
    with blame("the chat template refuses a chat"):
        return tokenizer.apply_chat_template(turns, tokenize=False,
                                             add_generation_prompt=add_generation_prompt)


def text_ids(tokenizer, text):
    """Ids of a text in which control tokens that are spelled out are plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def turn_end(tokenizer):
    """The token that ends a response: the first control token that the chat template writes behind
    an assistant's text, often not EOS. Without such a token, or without a template, it is EOS."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "Two."}]
        text = render(tokenizer, turns, add_generation_prompt=False)
        _, _, behind = text.rpartition("Two.")
        plain = text_ids(tokenizer, behind)
        for token in tokenizer(behind, add_special_tokens=False).input_ids:
            if token not in plain:
                return token
    return tokenizer.eos_token_id


def demo_ids(tokenizer, solution):
    """A demonstration -> its ids and the token that ends it: a model that is never shown the end
    never stops. InputError if the chat template opens <think> and the demonstration does not close
    it: it must go on behind <think>, with the thoughts, </think> and the answer."""
    end = turn_end(tokenizer)
    # Some data sets spell the end out: it is not taught twice
    for token in (tokenizer.decode([end]), tokenizer.eos_token):
        if solution.rstrip().endswith(token):
            solution = solution.rstrip().removesuffix(token)
    if tokenizer.chat_template:
        opening = render(tokenizer, [{"role": "user", "content": "2?"}]).rstrip()
        thinks = opening.endswith("<think>")
        if thinks and (solution.lstrip().startswith("<think>") or "</think>" not in solution):
            raise InputError("the chat template opens <think>: a solution must go on behind it, as "
                             "thoughts, </think> and the answer")
    return text_ids(tokenizer, solution) + [end]


def stop_ids(model, tokenizer):
    """The ids that end a response: the end of a turn, EOS, and those of the generation_config."""
    eos = model.generation_config.eos_token_id
    ids = {turn_end(tokenizer), tokenizer.eos_token_id}
    ids.update(eos if isinstance(eos, list) else [eos])
    ids.discard(None)
    if not all(isinstance(token, int) for token in ids):
        raise InputError(f"--model: eos_token_id {eos!r} in its generation_config.json must be an "
                         "id or a list of ids")
    return sorted(ids)


def context_length(model):
    """The tokens that a model reads at most."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def encode(tokenizer, problems, limit=math.inf, demos=True):
    """Problems -> a list of {"prompt": ids, "demos": lists of ids, "answer"}. InputError, naming
    the line, if a prompt leaves no room within `limit` tokens."""
    rows = []
    for problem in problems:
        with at(problem):
            row = {"prompt": prompt_ids(tokenizer, problem["problem"]), "demos": []}
            if len(row["prompt"]) >= limit:
                raise InputError(f"a prompt has {len(row['prompt'])} tokens, the model reads "
                                 f"{limit}: shorten it")
            if demos:
                row["demos"] = [demo_ids(tokenizer, text) for text in demonstrations(problem)]
        rows.append({**row, "answer": problem.get("answer")})
    return rows


def new_sampler(model, prompts, max_new_tokens, rows=64, streams=1):
    """A Sampler with room for the longest prompt (ids; with two streams pairs of them) and
    max_new_tokens more, or as many as the model reads -> (sampler, max_new_tokens). On a GPU it
    samples from a bfloat16 copy: half the memory traffic."""
    if streams == 2:
        prompts = [ids for pair in prompts for ids in pair]
    longest = max(map(len, prompts))
    context = context_length(model)
    if longest >= context:
        raise InputError(f"a prompt has {longest} tokens, the model reads {context}: shorten it")
    if longest + max_new_tokens > context:
        print(f"--max_new_tokens {max_new_tokens} becomes {context - longest}: the model reads "
              f"{context} tokens, and the longest prompt has {longest}")
        max_new_tokens = context - longest
    dtype = torch.bfloat16 if model.device.type == "cuda" else None
    with blame("--model", errors=ValueError):
        return Sampler(model, rows, longest + max_new_tokens, streams, dtype), max_new_tokens


# ---- evaluation ---------------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n answers, c of which are right, hold a right one; unbiased (2107.03374,
    eq. 1). ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    # 1 - C(n - c, k) / C(n, k), subtracted in whole numbers: only the division rounds
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def interval(values, seed=0, resamples=2000):
    """95 % bootstrap interval of the mean of values, one value a problem -> (low, high)."""
    drawn = np.random.default_rng(seed).choice(values, (resamples, len(values)))
    return tuple(np.quantile(drawn.mean(1), [0.025, 0.975]).tolist())


def evaluate(model, tokenizer, problems, n=1, temperature=0.0, top_p=1.0, max_new_tokens=256,
             seed=0, ks=(1,), rows=64, sampler=None):
    """Answer every problem (as from load_problems) n times and score; temperature 0 is greedy.
    sampler: one to use again, with room enough; it is given the model's present weights first.

    Returns {"problems": count, "n", "avg@n": mean reward, "ci95": (low, high), "pass@k": {k:
    share}, "length": mean tokens, "finished": share that ended by themselves, "answered": share
    with a \\boxed answer, "tokens_per_s" of sampling, "responses": for every problem a list of n
    {"text", "reward", "length", "finished"}}.
    InputError if a prompt is too long, ValueError if some k > n."""
    encoded = encode(tokenizer, problems, context_length(model), demos=False)
    prompts = [row["prompt"] for row in encoded]
    if sampler is None:
        sampler, max_new_tokens = new_sampler(model, prompts, max_new_tokens, rows)
    sampler.sync(model)
    start = time.perf_counter()
    samples = sampler(prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                      top_p=top_p, seed=seed, stop=stop_ids(model, tokenizer))
    seconds = time.perf_counter() - start

    # Score: n samples answer a problem
    texts = tokenizer.batch_decode([s.tokens for s in samples], skip_special_tokens=True)
    scores = rewards(texts, [problem["answer"] for problem in problems for _ in range(n)])
    lengths = [len(sample.tokens) for sample in samples]
    finished = [sample.finished for sample in samples]
    answered = ["\\boxed" in text for text in texts]
    responses = []
    for text, score, length, ended in zip(texts, scores, lengths, finished):
        responses.append({"text": text, "reward": score, "length": length, "finished": ended})
    right = np.reshape(scores, (-1, n)).sum(1).astype(int).tolist()        # The c of every problem
    pass_k = {}
    for k in ks:
        pass_k[k] = float(np.mean([pass_at_k(n, c, k) for c in right]))
    return {"problems": len(problems), "n": n, "avg@n": float(np.mean(scores)),
            "ci95": interval(np.array(right) / n, seed), "pass@k": pass_k,
            "length": float(np.mean(lengths)), "finished": float(np.mean(finished)),
            "answered": float(np.mean(answered)), "tokens_per_s": sum(lengths) / seconds,
            "responses": [responses[i:i + n] for i in range(0, len(responses), n)]}


def greedy_accuracy(model, tokenizer, benchmarks, max_new_tokens, rows=64, sampler=None):
    """{title: problems} -> {title: share answered rightly, greedily}."""
    accuracy = {}
    for title, problems in benchmarks.items():
        accuracy[title] = evaluate(model, tokenizer, problems, max_new_tokens=max_new_tokens,
                                   rows=rows, sampler=sampler)["avg@n"]
    return accuracy


# ---- the script: a file of responses a benchmark, results.json, a table -------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: list[str] = flag(["toy"], f"any of toy, {', '.join(BENCHMARKS)}, JSON(L) files, hf://...")
    n: int = flag(1, "responses a problem", 1, 10**5)
    temperature: float = flag(0.0, "0 is greedy; Prefix-RFT samples at 0.6 [P]", 0, 100)
    top_p: float = flag(0.95, "nucleus of the sampling distribution [P]", 1e-6, 1)
    ks: list[int] = flag([1], "pass@k for these k", 1)
    max_new_tokens: int = flag(512, "longest response, cut to what the model reads", 1)
    rows: int = flag(64, "responses sampled side by side: more is faster", 1)
    seed: int = flag(0, "of sampling and of the intervals", 0)
    device: str = flag("auto", "auto, cpu or cuda")
    out: str = flag("runs/eval", "directory for results.json and all responses")
    resume: bool = flag(False, "continue the killed run in --out")


def table_line(title, r):
    """A result of evaluate() as a line of the table."""
    low, high = r["ci95"]
    pass_k = "  ".join(f"{k}: {share:.3f}" for k, share in r["pass@k"].items())
    return (f"{title[:16]:16} {r['problems']:8}  {r['avg@n']:.3f}   {low:.3f} - {high:.3f} "
            f"{r['length']:8.1f} {r['finished']:9.3f} {r['answered']:9.3f} "
            f"{r['tokens_per_s']:9.0f}  {pass_k}")


def main(flags):
    if flags.temperature == 0 and flags.n > 1:
        raise InputError(f"--n {flags.n} greedy responses are all the same: add --temperature 0.6")
    if max(flags.ks) > flags.n:
        raise InputError(f"--ks {max(flags.ks)} is more than --n {flags.n}: pass@k needs k <= n")
    check_run(flags)
    benchmarks = load_benchmarks(flags.data)

    # One sampler for all benchmarks: a prompt that is too long for it is met before the first
    model, tokenizer = load_model(flags.model, pick_device(flags.device))
    problems = sum(benchmarks.values(), [])
    rows = encode(tokenizer, problems, context_length(model), demos=False)
    prompts = [row["prompt"] for row in rows]
    sampler, room = new_sampler(model, prompts, flags.max_new_tokens, flags.rows)

    # A killed run keeps the benchmarks that it has finished
    out, record = open_run(flags, data=benchmarks, model=fingerprint(model, tokenizer))
    report = {**record, "results": {}}
    file = out / "results.json"
    if file.exists():
        with blame(f"--resume: {file} is damaged", "; name another --out"):
            report = json.loads(file.read_text(encoding="utf-8"))
            if {**report, "results": {}} != {**record, "results": {}}:
                raise InputError("it is of another run")
            for title, result in report["results"].items():
                table_line(title, result)
    print(f"{'':16} problems  avg@n   95 % interval   tokens  finished  answered  tokens/s"
          "  pass@k")
    for title, problems in benchmarks.items():
        if title not in report["results"]:
            result = evaluate(model, tokenizer, problems, flags.n, flags.temperature, flags.top_p,
                              room, flags.seed, flags.ks, sampler=sampler)
            responses = result.pop("responses")
            rows = [{**problem, "responses": r} for problem, r in zip(problems, responses)]
            write_rows(out / f"{title}.jsonl", rows)
            report["results"][title] = result
            write_rows(file, [report])
        print(table_line(title, report["results"][title]))


if __name__ == "__main__":
    run_script(main, Flags)
