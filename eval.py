"""eval.py - how good is a model, and the border where flags, problems and models come in.

A model answers every problem n times, and reward.py says which answers are right. The mean over all answers
is avg@n, the measure of Prefix-RFT (https://arxiv.org/abs/2507.01679: temperature 0.6, top-p 0.95); pass@k is
the chance that at least one of k answers is right (https://arxiv.org/abs/2107.03374). The 95 % interval draws
the *problems* anew: n answers to one problem are not n independent pieces of evidence.

The file is also the project's border. What a user can get wrong - a flag, a line of a data file, a checkpoint -
is met here with an InputError: one sentence that says where, what, and how to mend it. Behind the border nothing
is checked twice.

    n         answers sampled a problem
    c         how many of them are right
    k         answers one would be allowed
    row       one line of a data file; `problem`: the same, in the form every script uses

Left out: few-shot prompts, judges other than reward.py, several GPUs.

    python eval.py                                                       the toy's base model, greedily
    python eval.py --model runs/prefix_rft/checkpoint --out runs/after   a trained one
    python eval.py --compare runs/eval runs/after                        their difference, problem by problem
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --data math500 aime25 my.jsonl --n 8 --temperature 0.6 --ks 1 8
"""

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import toy
from reward import extract_answer, rewards
from sampler import Sampler

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}"  # Prefix-RFT's

# Benchmarks with a JSONL file on the Hub. Many others are parquet only, which would need one more package.
BENCHMARKS = {"gsm8k": "hf://DaertML/gsm8k-jsonl/test.jsonl",
              "math500": "hf://HuggingFaceH4/MATH-500/test.jsonl",
              "aime25": "hf://math-ai/aime25/test.jsonl",
              "minerva": "hf://math-ai/minervamath/test.jsonl"}

KEYS = {"problem": ("problem", "question", "prompt"),
        "solution": ("solution", "demo", "demonstration", "completion", "response"),
        "answer": ("answer", "final_answer", "ground_truth")}


# ---- flags -------------------------------------------------------------------------------------------------

class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence: the flag or file, the fault, the mend."""


def flag(default, help, low=-1e18, high=1e18):
    """A field of flags for HfArgumentParser: default, help and, for numbers, their inclusive range."""

    class InRange(argparse.Action):
        def __call__(self, parser, namespace, values, option=None):
            for value in values if isinstance(values, list) else [values]:
                if not isinstance(value, str) and not low <= value <= high:        # nor nan nor inf
                    parser.error(f"{option} {value} is out of range, it must be {low} to {high}")
            setattr(namespace, self.dest, values)

    metadata = {"help": help.replace("%", "%%")}
    if not isinstance(default, (bool, str)):
        metadata["action"] = InRange
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_flags(Flags, argv=None, toy_defaults=None):
    """The command line -> Flags(...). Where argparse would print its usage and exit, an InputError.

    toy_defaults: {flag: default} for when --data is toy; those in the dataclass are for real models."""
    def error(message):
        raise InputError(f"{message} (--help lists all flags)")

    title = (sys.modules[Flags.__module__].__doc__ or "").strip().split("\n")[0]
    parser = HfArgumentParser(Flags, description=title.replace("%", "%%"), allow_abbrev=False)
    parser.error = error
    how = dict(return_remaining_strings=True, look_for_args_file=False)
    flags, unknown = parser.parse_args_into_dataclasses(argv, **how)
    if toy_defaults and flags.data == "toy":
        parser.set_defaults(**toy_defaults)                  # what was given by hand still wins
        flags, unknown = parser.parse_args_into_dataclasses(argv, **how)
    if unknown:
        error(f"unknown flag {unknown[0]}")
    return flags


def run(main, Flags, argv=None, toy_defaults=None):
    """The last line of every script. A user's mistake becomes one sentence and exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        main(parse_flags(Flags, argv, toy_defaults))
    except (InputError, OSError) as error:                   # OSError: disk full, no permission, ...
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name):
    """"auto" (the GPU if there is one), "cpu" or "cuda" -> torch.device."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name} is unknown: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here, choose auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def new_run(out, resume):
    """Path(out), if a run may start or, with resume, go on there. Makes no directory: the first result does."""
    out = Path(out)
    if not resume and out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out} already holds a run: add --resume or name another --out")
    nearest = next(p for p in [out, *out.absolute().parents] if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"--out {out}: {nearest} is no directory that can be written to, name another --out")
    return out


# ---- problems ----------------------------------------------------------------------------------------------

def load_problems(path, require=("answer",)):
    """Problems from a .jsonl or .json file, or from the Hub (hf://owner/name/path/to/file.jsonl).

    Returns a list of {"problem": str or chat messages, "solution": str, list of str or None, "answer": str or
    None}; the keys in `require` are never empty. Understood are our own keys and their aliases (KEYS), GSM8K
    as published, TRL's prompt/completion and messages, alpaca's instruction/input/output, and multiple choice (a
    list under "choices"). InputError names the file, the line and what is wrong with it: no line is skipped."""
    problems = []
    for where, row in read_rows(path):
        try:
            problem = normalise(row)
            for key in ("problem", *require):
                if not problem[key]:
                    raise InputError(f"{key} ({'|'.join(KEYS[key])}) is missing or empty, the keys are "
                                     f"{', '.join(row) or 'none'}")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        problems.append(problem)
    if not problems:
        raise InputError(f"{path} is empty: give one JSON object with problem and answer a line")
    return problems


def read_rows(path):
    """Yields (where, row): every object of a JSONL file or of a JSON array, and how to name its place."""
    path = str(path)
    try:
        text = Path(download(path) if path.startswith("hf://") else path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, give a .jsonl or .json file") from None
    array = text.lstrip().startswith("[")
    for number, line in enumerate([text] if array else text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            number, why = getattr(error, "lineno", 1) if array else number, getattr(error, "msg", error)
            raise InputError(f"{path} line {number} is not valid JSON: {why}") from None
        for item, row in enumerate(value if array else [value], 1):
            where = f"{path} item {item}" if array else f"{path} line {number}"
            if not isinstance(row, dict):
                raise InputError(f"{where} is no JSON object: write {{\"problem\": ..., \"answer\": ...}}")
            yield where, row


def download(path):
    """hf://owner/name/path/to/file -> where the file lies in the local Hub cache."""
    owner, name, file = (path.removeprefix("hf://").split("/", 2) + ["", ""])[:3]
    if not (owner and name and file):
        raise InputError(f"{path} is incomplete: write hf://owner/name/path/to/file.jsonl")
    try:
        return huggingface_hub.hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    except Exception as error:                               # offline, gated, renamed, ...
        raise InputError(f"{path} could not be downloaded: {one_line(error)}") from None


def normalise(row):
    """A row in any format -> {"problem", "solution", "answer"}; what is missing or empty is None."""
    if "messages" in row:                                    # TRL: the last assistant turn is the demonstration
        turns = chat(row["messages"])
        last = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
        row = {"problem": turns, "solution": last, **row}
    elif "instruction" in row:                               # alpaca
        parts = [string(row.get(key), key) for key in ("instruction", "input")]
        row = {"problem": "\n".join(filter(None, parts)), "solution": row.get("output"), **row}
    problem, solution, answer = (next((row[k] for k in aliases if row.get(k) not in (None, "")), None)
                                 for aliases in KEYS.values())

    problem = chat(problem) if isinstance(problem, list) else string(problem, "problem")
    if isinstance(solution, list) and solution and isinstance(solution[0], dict):
        solution = chat(solution)[-1]["content"]             # TRL: the completion as a conversation
    elif isinstance(solution, list):
        solution = [text for text in (string(s, "solution") for s in solution) if text] or None
    else:
        solution = string(solution, "solution")

    if problem and row.get("choices") is not None:
        problem, answer = lettered(problem, row["choices"], answer)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    answer = string(answer, "answer")
    first = solution[0] if isinstance(solution, list) and solution else solution
    if answer and "####" in answer:
        worked, answer = gsm8k(answer)
        solution = solution or worked
    elif answer is None and first and "\\boxed" in first:
        answer = extract_answer(first)
    return {"problem": problem, "solution": solution, "answer": answer}


def string(value, key):
    """value, if it is a text that can be written as UTF-8; None for None and for blank text."""
    if not isinstance(value, str | None):
        raise InputError(f"{key} must be a text, not {str(value)[:40]}")
    if re.search("[\ud800-\udfff]", value or ""):
        raise InputError(f"{key} holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value if value and value.strip() else None


def chat(turns):
    """A fresh copy of turns, if they are a chat: a list of {"role", "content"}."""
    if not (isinstance(turns, list) and turns and all(isinstance(t, dict) for t in turns) and all(
            isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns)):
        raise InputError('a chat must be a list of {"role": "user", "content": "..."}')
    return [{"role": t["role"], "content": string(t["content"], "content") or ""} for t in turns]


def gsm8k(answer):
    """GSM8K's "48/2 = <<48/2=24>>24 ... #### 1,042" -> (a demonstration that earns its reward, "1042")."""
    worked, _, final = answer.rpartition("####")
    final = re.sub(r"(?<=\d),(?=\d{3})", "", final.strip())
    worked = re.sub(r"<<[^<>]*>>", "", worked).strip()       # marks meant for a calculator
    return f"{worked}\nThe answer is \\boxed{{{final}}}.", final


def lettered(problem, choices, answer):
    """Multiple choice -> (problem with lettered options, answer as a letter). The answer may come as an option,
    an index from 0 or a letter; what could be two of these is read in this order."""
    if not isinstance(problem, str) or not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise InputError("choices must be a list of 2 to 26 options, and the problem a text")
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(choices)])
    if answer in choices:
        answer = letters[choices.index(answer)]
    elif str(answer).isdecimal() and int(answer) < len(choices):
        answer = letters[int(answer)]
    elif answer is not None:
        answer = str(answer).strip(" ().").upper()
        if answer not in letters:
            raise InputError(f"answer {answer} is no option, no index and no letter A to {letters[-1]}")
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices))
    return f"{problem}\n\n{options}\n\nAnswer with the letter of the right option.", answer


def load_benchmarks(names):
    """["toy", "math500", "my.jsonl", ...] -> {title: problems}. "toy" is three: hard, longer and easy."""
    benchmarks = {}
    for name in names:
        if name == "toy":
            benchmarks |= {f"toy-{split}": toy.problems(split) for split in ("hard", "longer", "easy")}
        else:
            title = name if name in BENCHMARKS else Path(name).stem
            while title in benchmarks:                       # two files of one name in two folders
                title += "-2"
            benchmarks[title] = load_problems(BENCHMARKS.get(name, name))
    return benchmarks


# ---- models ------------------------------------------------------------------------------------------------

def load_model(name, device, seed=0):
    """"toy", a checkpoint directory or a Hub id -> (model in float32 and eval mode on `device`, tokenizer).

    seed: of the toy's pre-training. InputError if it is no complete decoder with a tokenizer and an EOS."""
    if name == "toy":
        model, tokenizer = toy.base_model(seed)
        return model.to(device).eval(), tokenizer
    if not os.path.isdir(name) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"--model {name} is no directory: give one, a Hub id (owner/name) or toy")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True)                    # so that they come back in info, to be named below
    except Exception as error:                               # the libraries raise a dozen kinds
        raise InputError(f"--model {name} cannot be loaded: {one_line(error)}") from None
    model = model.to(device).eval()
    fault = model_fault(model, tokenizer, [*sorted(info["missing_keys"]), *info["mismatched_keys"]])
    if fault:
        raise InputError(f"--model {name} {fault}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token            # we use masks, but other libraries ask
    return model, tokenizer


@torch.no_grad()
def model_fault(model, tokenizer, absent):
    """Why what was loaded is no model to sample from, or None. absent: weights that were not in its files."""
    if absent:
        return f"lacks weights or has them in another shape ({absent[0]}): give a complete language model"
    if not tokenizer("1 + 1", add_special_tokens=False).input_ids:
        return "comes without a tokenizer: save one into the same directory (tokenizer.save_pretrained)"
    if tokenizer.eos_token_id is None:
        return "has a tokenizer without eos_token, so no response ends: name one in tokenizer_config.json"
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        return "has a tokenizer with more tokens than the model: the two do not belong together"
    one, other = model(torch.tensor([[0, 0], [0, 1]], device=model.device)).logits[:, 0].float()
    if not one.isfinite().all():
        return "computes nan or inf: its weights are damaged"
    if (one - other).abs().max() > 1e-4 * one.abs().max():   # the second token changed what the first says
        return "looks ahead, as an encoder does: give a decoder-only language model"


def one_line(error):
    """A library's error on one line of at most 200 characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:200].rsplit(" ", 1)[0] + " ..."


def prompt_ids(tokenizer, problem):
    """A problem (text, or chat messages as they stand) -> token ids up to where the response begins."""
    turns = problem if isinstance(problem, list) else [{"role": "user", "content": problem + INSTRUCTION}]
    if tokenizer.chat_template:
        try:
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:                           # a template may refuse, say, a system turn
            raise InputError(f"the tokenizer's chat template refuses a prompt: {one_line(error)}") from None
        return tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer("\n".join(turn["content"] for turn in turns) + "\n").input_ids
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids    # some tokenizers close every text


def demo_ids(tokenizer, solution):
    """A demonstration -> its token ids and the EOS: a model that is never shown the end never stops."""
    return tokenizer(solution, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def stop_ids(model, tokenizer):
    """The token ids that end a response: the tokenizer's EOS and those of the model's generation_config."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = eos if isinstance(eos, (list, tuple)) else [eos]
    return tuple(sorted({tokenizer.eos_token_id, *eos} - {None}))


def new_sampler(model, prompts, max_new_tokens, rows=64):
    """A Sampler with room for the longest of `prompts` (lists of ids) and max_new_tokens more, or as many as the
    model can read -> (sampler, max_new_tokens). InputError if a prompt does not fit or the sampler refuses."""
    longest = max(map(len, prompts))
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    if longest >= context:
        raise InputError(f"a prompt has {longest} tokens and the model reads {context}: shorten the problem")
    max_new_tokens = min(max_new_tokens, context - longest)
    try:
        return Sampler(model, rows=rows, length=longest + max_new_tokens), max_new_tokens
    except ValueError as error:
        raise InputError(f"--model: {one_line(error)}") from None


# ---- evaluation --------------------------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n answers, c of which are right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased (2107.03374, eq. 1). Subtracted in whole numbers, so nothing cancels and only the division rounds.
    ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def interval(values, seed=0, resamples=2000):
    """95 % bootstrap interval of the mean of values, one value a problem -> (low, high)."""
    rng, values = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def summarise(responses, ks, seconds, seed=0):
    """A list of n responses for every problem -> the numbers evaluate() returns."""
    n, every = len(responses[0]), [response for row in responses for response in row]
    right = [sum(r["reward"] for r in row) for row in responses]                       # c of every problem
    tokens = sum(r["length"] for r in every)
    return {"problems": len(responses), "n": n,
            "avg@n": sum(right) / len(every), "ci95": interval(np.array(right) / n, seed),
            "pass@k": {k: float(np.mean([pass_at_k(n, int(c), k) for c in right])) for k in ks},
            "length": tokens / len(every), "finished": sum(r["finished"] for r in every) / len(every),
            "seconds": seconds, "tokens_per_s": tokens / seconds}


def evaluate(model, tokenizer, problems, n=1, temperature=0.0, top_p=1.0, max_new_tokens=256, seed=0, ks=(1,),
             sampler=None, keep=False):
    """Answer every problem (as from load_problems) n times and score the answers; temperature 0 is greedy.

    Returns {"problems": count, "n", "avg@n": mean reward, "ci95": (low, high), "pass@k": {k: share}, "length":
    mean tokens, "finished": share that stopped by themselves, "seconds" of sampling, "tokens_per_s"}; keep=True
    adds "responses", n {"text", "reward", "length", "finished"} a problem. sampler: one to use again, with room
    enough. InputError if some k > n or a prompt is longer than the model can read."""
    if not all(1 <= k <= n for k in ks):
        raise InputError(f"--ks {' '.join(map(str, ks))}: pass@k needs 1 <= k <= n, and n is {n}")
    prompts = [prompt_ids(tokenizer, p["problem"]) for p in problems]
    if sampler is None:
        sampler, max_new_tokens = new_sampler(model, prompts, max_new_tokens)
    start = time.perf_counter()
    samples = sampler(prompts, n=n, max_new_tokens=max_new_tokens, stop=stop_ids(model, tokenizer),
                      temperature=temperature, top_p=top_p, seed=seed)
    seconds = time.perf_counter() - start
    texts = tokenizer.batch_decode(samples.lists(), skip_special_tokens=True)
    scores = rewards(texts, [p["answer"] for p in problems for _ in range(n)])
    measured = zip(texts, scores, samples.mask.sum(1).tolist(), samples.finished.tolist())
    every = [{"text": t, "reward": float(r), "length": length, "finished": f} for t, r, length, f in measured]
    responses = [every[i:i + n] for i in range(0, len(every), n)]
    result = summarise(responses, ks, seconds, seed)
    return {**result, "responses": responses} if keep else result


# ---- a run: one file of responses a benchmark, results.json, a table ---------------------------------------

def table(results):
    """{title: summary} -> the lines that the terminal shows."""
    first = next(iter(results.values()))
    head = "".join(f"{name:9}" for name in (f"avg@{first['n']}", *(f"pass@{k}" for k in first["pass@k"])))
    lines = [f"{'':16} problems  {head}95 % interval   tokens  finished  tokens/s"]
    for title, r in results.items():
        shares = "".join(f"{share:<9.3f}" for share in (r["avg@n"], *r["pass@k"].values()))
        lines.append(f"{title[:16]:16} {r['problems']:8}  {shares}{r['ci95'][0]:.3f} - {r['ci95'][1]:.3f} "
                     f"{r['length']:8.1f}  {r['finished']:8.3f}  {r['tokens_per_s']:8.0f}")
    return "\n".join(lines)


def finished_rows(path, problems, chunk):
    """What a killed run had answered, in whole chunks. A sample's randomness belongs to its prompt and not to its
    batch (sampler.py), and with the same batches the rounding is the same, too: a resumed run ends exactly as an
    undisturbed one."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:                                   # half-written
            break
    if [row["problem"] for row in rows] != [p["problem"] for p in problems[:len(rows)]]:
        raise InputError(f"--resume: {path} answers other problems, name another --out")
    return rows if len(rows) == len(problems) else rows[:len(rows) // chunk * chunk]


def compare(first, second):
    """Print, for two files of responses or all of two runs, the mean rewards and their paired difference."""
    pairs = [(Path(first), Path(second))]
    if Path(first).is_dir():
        pairs = [(file, Path(second) / file.name) for file in sorted(Path(first).glob("*.jsonl"))]
    if not pairs:
        raise InputError(f"--compare {first}: no file of responses (*.jsonl) in this directory")
    for a, b in pairs:
        rows = [[row for _, row in read_rows(file)] for file in (a, b)]
        try:
            before, after = ([row["problem"] for row in side] for side in rows)
            a_mean, b_mean = (np.array([np.mean([r["reward"] for r in row["responses"]]) for row in side])
                              for side in rows)
        except (KeyError, TypeError):
            raise InputError(f"--compare: {a} or {b} was not written by eval.py") from None
        if before != after:
            raise InputError(f"--compare: {a} and {b} do not answer the same problems in the same order")
        difference = b_mean - a_mean                         # paired: what makes a problem hard cancels
        low, high = interval(difference)
        print(f"{a.stem[:16]:16} {len(difference):5} problems   {a_mean.mean():.3f} -> {b_mean.mean():.3f}   "
              f"difference {difference.mean():+.3f}   95 % interval {low:+.3f} to {high:+.3f}")


def write(path, text):
    """Replace path in one move: a kill leaves the old file or the new one."""
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: list[str] = flag(["toy"], f"any of toy, {', '.join(BENCHMARKS)}, JSON(L) files, hf://...")
    n: int = flag(1, "responses a problem", 1, 10000)
    temperature: float = flag(0.0, "0 is greedy; Prefix-RFT samples at 0.6 [P]", 0, 100)
    top_p: float = flag(0.95, "nucleus of the sampling distribution [P]", 1e-6, 1)
    ks: list[int] = flag([1], "pass@k for these k", 1, 10000)
    max_new_tokens: int = flag(512, "longest response, cut to what the model can read; 8192 tokens [P]", 1, 10**6)
    rows: int = flag(64, "responses sampled side by side: more is faster until memory is full", 1, 10**5)
    seed: int = flag(0, "of sampling and of the intervals", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    out: str = flag("runs/eval", "directory for results.json and, a benchmark, one JSONL with every response")
    resume: bool = flag(False, "continue the killed run in --out")
    compare: list[str] = flag([], "two runs or files of responses: print their difference, evaluate nothing")


def main(flags):
    if flags.compare:
        if len(flags.compare) != 2:
            raise InputError("--compare needs two runs or two files of responses")
        return compare(*flags.compare)
    if flags.temperature == 0 and flags.n > 1:
        raise InputError(f"--n {flags.n} at temperature 0 are {flags.n} equal responses: add --temperature 0.6")
    if max(flags.ks) > flags.n:
        raise InputError(f"--ks {max(flags.ks)} is more than --n {flags.n}: pass@k needs k <= n")
    out = new_run(flags.out, flags.resume)
    settings = {"model": flags.model, "n": flags.n, "temperature": flags.temperature, "top_p": flags.top_p,
                "max_new_tokens": flags.max_new_tokens, "seed": flags.seed}
    if flags.resume and (out / "results.json").exists():
        try:
            before = json.loads((out / "results.json").read_text(encoding="utf-8"))["flags"]
        except (ValueError, KeyError):
            raise InputError(f"--resume: {out / 'results.json'} is damaged, name another --out") from None
        if before != settings:
            raise InputError(f"--resume: the run in {out} had {before}, repeat these flags or name another --out")

    benchmarks = load_benchmarks(flags.data)
    model, tokenizer = load_model(flags.model, pick_device(flags.device))
    prompts = [prompt_ids(tokenizer, p["problem"]) for problems in benchmarks.values() for p in problems]
    sampler, max_new_tokens = new_sampler(model, prompts, flags.max_new_tokens, flags.rows)

    out.mkdir(parents=True, exist_ok=True)
    results, chunk = {}, max(1, 4 * flags.rows // flags.n)   # chunk: problems between two writes
    for title, problems in benchmarks.items():
        file = out / f"{title}.jsonl"
        rows = finished_rows(file, problems, chunk)
        write(out / "results.json", json.dumps({"flags": settings, "results": results}, indent=1))
        write(file, "".join(json.dumps(row) + "\n" for row in rows))
        for i in tqdm(range(len(rows), len(problems), chunk), desc=title, leave=False):
            part = problems[i:i + chunk]
            result = evaluate(model, tokenizer, part, flags.n, flags.temperature, flags.top_p, max_new_tokens,
                              flags.seed, sampler=sampler, keep=True)
            seconds = result["seconds"] / len(part)
            rows += [{"problem": p["problem"], "answer": p["answer"], "responses": responses, "seconds": seconds}
                     for p, responses in zip(part, result["responses"])]
            with open(file, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows[i:])
        seconds = sum(row["seconds"] for row in rows)
        results[title] = summarise([row["responses"] for row in rows], flags.ks, seconds, flags.seed)
    write(out / "results.json", json.dumps({"flags": settings, "results": results}, indent=1))
    print(table(results))


if __name__ == "__main__":
    run(main, Flags)
