"""
eval.py - how good is a model, and the border where flags, problems and models come in.

A model answers every problem n times, and reward.py says which answers are right. The mean over
all answers is avg@n, the measure of Prefix-RFT (https://arxiv.org/abs/2507.01679: temperature 0.6,
top-p 0.95); pass@k is the chance that at least one of k answers is right (2107.03374, eq. 1). The
95 % interval draws the *problems* anew: n answers to one problem are not n independent facts.

The file is also the project's border. What a user can get wrong - a flag, a line of a data file,
a checkpoint - is met here with an InputError: one sentence that says where, what, and how to mend
it. Behind the border nothing is checked twice.

    n         answers sampled a problem
    c         how many of them are right
    k         answers one would be allowed
    row       one line of a file
    problem   {"problem", "solution", "answer"}, what load_problems makes of a row

Left out: few-shot prompts, judges other than reward.py, several GPUs. On a GPU answers are sampled
in bfloat16, from a copy of the float32 model.

    python eval.py                                             the toy's base model, greedily
    python eval.py --model runs/prefix_rft/checkpoint --out runs/after
    python eval.py --compare runs/eval runs/after              their difference, problem by problem
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --data math500 aime25 my.jsonl \\
        --n 8 --temperature 0.6 --ks 1 8
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

INSTRUCTION = toy.INSTRUCTION    # "\nPlease reason step by step, ... \boxed{}": Prefix-RFT's words

# Benchmarks with a JSONL file on the Hub. Most others are parquet, which needs one more package.
BENCHMARKS = {
    "gsm8k": "hf://DaertML/gsm8k-jsonl/test.jsonl",
    "math500": "hf://HuggingFaceH4/MATH-500/test.jsonl",
    "aime25": "hf://math-ai/aime25/test.jsonl",
    "minerva": "hf://math-ai/minervamath/test.jsonl",
}

# The keys of a row: the first alias that holds something wins.
ALIASES = {
    "problem": ("problem", "question", "prompt"),
    "solution": ("solution", "demo", "demonstration", "completion", "response"),
    "answer": ("answer", "final_answer", "ground_truth"),
}


class InputError(ValueError):
    """Something the user gave is wrong. One sentence: the flag or file, the fault, the mend."""


def one_line(error):
    """A library's error on one line of at most 200 characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    if len(line) > 200:
        line = line[:200].rsplit(" ", 1)[0] + " ..."
    return line


# ---- flags --------------------------------------------------------------------------------------

class InRange(argparse.Action):
    """Stores a number, or a list of them, if low <= number <= high; nan is in no range."""

    def __init__(self, low, high, **kwargs):
        super().__init__(**kwargs)
        self.low, self.high = low, high

    def __call__(self, parser, namespace, values, option):
        numbers = values if isinstance(values, list) else [values]
        for number in numbers:
            if not self.low <= number <= self.high:
                parser.error(f"{option} {number} is out of range: {self.low} to {self.high}")
        setattr(namespace, self.dest, values)


def flag(default, help, low=None, high=None):
    """A field of a Flags dataclass; numbers have an inclusive range."""
    metadata = {"help": help.replace("%", "%%")}         # argparse formats help with %
    if low is not None:
        metadata.update(action=InRange, low=low, high=high)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse(message):
    """What argparse calls on a mistake; its own version prints the usage and exits."""
    raise InputError(f"{message} (--help lists all flags)")


def parse_flags(Flags, argv=None, toy_defaults={}, methods={}):
    """The command line -> Flags(...). InputError for an unknown flag or a value that is not allowed.

    The dataclass holds the defaults for real models. toy_defaults {flag: default} replace them when
    --data is toy, methods[--method] {flag: default} replace both; what is typed wins over all."""
    title = sys.modules[Flags.__module__].__doc__.strip().split("\n")[0]
    parser = HfArgumentParser(Flags, description=title.replace("%", "%%"), allow_abbrev=False)
    parser.error = refuse

    # --help names every default that may be used, not only the dataclass's
    for action in parser._actions:
        others = ""
        for name, defaults in {"toy": toy_defaults, **methods}.items():
            if action.dest in defaults:
                others += f", {name}: {defaults[action.dest]}"
        if others:
            action.help += f" (default: %(default)s{others})"

    # twice: which defaults hold is known after the first reading
    options = {"return_remaining_strings": True, "look_for_args_file": False}
    flags, unknown = parser.parse_args_into_dataclasses(argv, **options)
    if unknown:
        refuse(f"unknown flag {unknown[0]}")
    if toy_defaults and flags.data == "toy":
        parser.set_defaults(**toy_defaults)
    if methods:
        parser.set_defaults(**methods[flags.method])
    return parser.parse_args_into_dataclasses(argv, **options)[0]


def run_script(main, Flags, toy_defaults={}, methods={}):
    """The last line of every script. A user's mistake becomes one sentence and exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        main(parse_flags(Flags, None, toy_defaults, methods))
    except (InputError, OSError) as error:               # OSError: disk full, no permission, ...
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
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    return torch.device(name if name != "auto" else "cpu")


# ---- files --------------------------------------------------------------------------------------

def new_run(out, resume):
    """Path(out), if a run may start there or, with resume, go on. The first result makes it."""
    out = Path(out)
    if not resume and out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out} already holds a run: add --resume or name another --out")
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--out {out}: {place} is no directory that can be written to")
    return out


def write_file(path, text):
    """Replace path in one move: a kill leaves the old file or the new one."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read_log(path):
    """The rows of a JSONL file that a script wrote, [] if there is none. Half a line at its end,
    left by a kill, is cut off."""
    path = Path(path)
    if not path.exists():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return [row for _, row in read_rows(path)]


def read_rows(path):
    """A JSONL file, or one JSON array -> list of (place, row): "my.jsonl line 3" and a dict."""
    path = str(path)
    file = download(path) if path.startswith("hf://") else path
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as such") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, give a .jsonl or .json file") from None

    rows = []
    if text.lstrip().startswith("["):
        for number, row in enumerate(parse_json(text, path, 1), 1):
            rows.append((f"{path} item {number}", row))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((f"{path} line {number}", parse_json(line, path, number)))
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f'{place} is no JSON object: write {{"problem": ..., "answer": ...}}')
    return rows


def parse_json(text, path, first_line):
    """json.loads(text); InputError with the line of the file if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        why = str(error).split(":")[0]
        raise InputError(f"{path} line {line} is not valid JSON: {why}") from None


def download(path):
    """hf://owner/name/path/to/file -> where the file lies in the local Hub cache."""
    match = re.fullmatch("hf://([^/]+/[^/]+)/(.+)", path)
    if not match:
        raise InputError(f"{path} is incomplete: write hf://owner/name/path/to/file.jsonl")
    repo, file = match.groups()
    try:
        return huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")
    except Exception as error:                           # offline, gated, renamed, ...
        raise InputError(f"{path} could not be downloaded: {one_line(error)}") from None


# ---- problems -----------------------------------------------------------------------------------

def load_problems(path, require=("answer",)):
    """Problems from a .jsonl or .json file, or from the Hub (hf://owner/name/path/to/file.jsonl).

    Returns a list of {"problem": str or chat turns, "solution": str, list of str or None, "answer":
    str or None}; the keys in `require` are never empty. InputError names the file, the line and
    what is wrong with it: no line is skipped."""
    problems = []
    for place, row in read_rows(path):
        try:
            problem = to_problem(row)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        for key in ("problem", *require):
            if not problem[key]:
                names, keys = "|".join(ALIASES[key]), ", ".join(row) or "none"
                raise InputError(f"{place}: {key} ({names}) is missing or empty, its keys: {keys}")
        problems.append(problem)
    if not problems:
        raise InputError(f"{path} is empty: give one JSON object with problem and answer a line")
    return problems


def to_problem(row):
    """A row with our keys or their aliases, or of GSM8K -> a problem; what is missing is None."""
    problem = first_alias(row, "problem")
    solution = first_alias(row, "solution")
    answer = first_alias(row, "answer")
    refuse_other_formats(row, problem, solution)

    problem = to_chat(problem) if isinstance(problem, list) else to_text(problem, "problem")
    if isinstance(solution, list):
        solution = [to_text(text, "solution") for text in solution]
        if None in solution:
            raise InputError("one of the solutions is empty")
        first_solution = solution[0]
    else:
        solution = first_solution = to_text(solution, "solution")
    if type(answer) in (int, float):
        answer = str(answer)
    answer = to_text(answer, "answer")

    # GSM8K keeps both in its answer; else the solution's box may say the answer
    if answer and "####" in answer:
        worked, answer = split_gsm8k(answer)
        solution = solution or worked
    elif answer is None and first_solution and "\\boxed" in first_solution:
        answer = extract_answer(first_solution)
    return {"problem": problem, "solution": solution, "answer": answer}


def first_alias(row, key):
    """The first value that a row holds under an alias of key, or None."""
    for alias in ALIASES[key]:
        if row.get(alias) not in (None, "", []):
            return row[alias]


def refuse_other_formats(row, problem, solution):
    """Multiple choice, alpaca and TRL's conversations would lose something if read as ours."""
    found = None
    for key in ("choices", "options", "Correct Answer"):
        if row.get(key):
            found = key
    for key in ("instruction", "messages"):
        if row.get(key) and not problem:
            found = key
    if isinstance(solution, list) and isinstance(solution[0], dict):
        found = "completion"
    if found:
        raise InputError(f"{found} is another format's key, convert the file first: "
                         "python bridges/convert.py in.jsonl out.jsonl")


def to_text(value, key):
    """value, if it is a text that can be written as UTF-8; None for None and for blank text."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{key} must be a text, not {str(value)[:40]}")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{key} holds half a character (\\ud800 to \\udfff): mend the encoding")
    return value if value.strip() else None


def to_chat(turns):
    """A fresh copy of turns, if they are a chat: a list of {"role": text, "content": text}."""
    copy = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise InputError('a chat must be a list of {"role": "user", "content": "..."}')
        content = to_text(turn.get("content"), "content") or ""
        copy.append({"role": turn["role"], "content": content})
    return copy


def split_gsm8k(answer):
    """GSM8K's "48/2 = <<48/2=24>>24 ... #### 1,042" -> (demonstration with a box, "1042")."""
    worked, _, final = answer.rpartition("####")
    final = re.sub(r"(?<=\d),(?=\d{3})", "", final.strip())
    worked = re.sub("<<[^<>]*>>", "", worked).strip()    # marks meant for a calculator
    return f"{worked}\nThe answer is \\boxed{{{final}}}.", final


def load_benchmarks(names):
    """["toy", "math500", "my.jsonl"] -> {title: problems}. The toy is three: hard, longer, easy."""
    benchmarks = {}
    for name in names:
        if name == "toy":
            for split in ("hard", "longer", "easy"):
                benchmarks[f"toy-{split}"] = toy.problems(split)
        else:
            title = name if name in BENCHMARKS else Path(name).stem
            while title in benchmarks:                   # two files of one name in two folders
                title += "-2"
            benchmarks[title] = load_problems(BENCHMARKS.get(name, name))
    return benchmarks


# ---- models -------------------------------------------------------------------------------------

def load_model(name, device, seed=0):
    """"toy", a directory or a Hub id -> (model in float32 and eval mode on device, tokenizer).

    seed: of the toy's pre-training. InputError if it is no whole decoder with a tokenizer."""
    if name == "toy":
        model, tokenizer = toy.base_model(seed)
        return model.to(device).eval(), tokenizer
    if not os.path.isdir(name) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"--model {name} is no directory: give one, a Hub id or toy")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False,
            # weights that are absent or of another shape come back in info, to be named below
            output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:                           # the libraries raise a dozen kinds
        raise InputError(f"--model {name} cannot be loaded: {one_line(error)}") from None
    model = model.to(device).eval()
    fault = find_fault(model, tokenizer, [*info["missing_keys"], *info["mismatched_keys"]])
    if fault:
        raise InputError(f"--model {name} {fault}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token        # we use masks, but other libraries ask
    return model, tokenizer


@torch.no_grad()
def find_fault(model, tokenizer, absent):
    """Why what was loaded is no model to sample from, or None. absent: weights not in its files."""
    if absent:
        return f"lacks weights, or has them in another shape ({absent[0]}): give a complete model"
    if not tokenizer("1 + 1", add_special_tokens=False).input_ids:
        return "has no tokenizer: save one beside it (tokenizer.save_pretrained)"
    if tokenizer.eos_token_id is None:
        return "has a tokenizer without eos_token: name one in tokenizer_config.json"
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        return "has a tokenizer with more tokens than the model: they do not belong together"
    # in a decoder the second token cannot change what is said after the first
    pair = torch.tensor([[0, 0], [0, 1]], device=model.device)
    one, other = model(pair).logits[:, 0].float()        # (V,) each
    if not one.isfinite().all():
        return "computes nan or inf: its weights are damaged"
    if (one - other).abs().max() > 1e-4 * one.abs().max():
        return "looks ahead, as an encoder does: give a decoder-only language model"


def prompt_ids(tokenizer, problem):
    """A problem (text, or chat turns as they stand) -> token ids up to where the response begins."""
    turns = problem
    if isinstance(problem, str):
        turns = [{"role": "user", "content": problem + INSTRUCTION}]
    if tokenizer.chat_template:
        try:
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:                       # a template may refuse, say, a system turn
            why = one_line(error)
            raise InputError(f"the tokenizer's chat template refuses a prompt: {why}") from None
        return tokenizer(prompt, add_special_tokens=False).input_ids
    prompt = "".join(turn["content"] + "\n" for turn in turns)
    ids = tokenizer(prompt).input_ids
    if ids[-1] == tokenizer.eos_token_id:                # some tokenizers close every text
        ids = ids[:-1]
    return ids


def demo_ids(tokenizer, solution):
    """A demonstration -> its ids and the EOS: a model that is never shown the end never stops."""
    return tokenizer(solution, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def stop_ids(model, tokenizer):
    """The ids that end a response: the tokenizer's EOS and those of the generation_config."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    if not isinstance(eos, list):
        eos = [eos]
    return sorted({tokenizer.eos_token_id, *eos} - {None})


def new_sampler(model, prompts, max_new_tokens, rows=64, streams=1):
    """A Sampler with room for the longest of `prompts` (lists of ids; with two streams pairs of
    lists) and max_new_tokens more, or as many as the model reads -> (sampler, max_new_tokens).

    On a GPU it samples from a bfloat16 copy of the model, half the memory traffic, as of the last
    sampler.sync(model). InputError if a prompt does not fit or the sampler cannot serve the model.
    """
    if streams == 2:
        prompts = [ids for pair in prompts for ids in pair]
    longest = max(len(ids) for ids in prompts)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    if longest >= context:
        raise InputError(f"a prompt has {longest} tokens, the model reads {context}: shorten it")
    max_new_tokens = min(max_new_tokens, context - longest)
    length = longest + max_new_tokens
    dtype = torch.bfloat16 if model.device.type == "cuda" else None
    try:
        return Sampler(model, rows, length, streams, dtype), max_new_tokens
    except ValueError as error:
        raise InputError(f"--model: {one_line(error)}") from None


# ---- evaluation ---------------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n answers, c of which are right, hold a right one (2107.03374, eq. 1).

    Unbiased. ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    # 1 - C(n - c, k) / C(n, k), subtracted in whole numbers: only the division rounds
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def interval(values, seed=0, resamples=2000):
    """95 % bootstrap interval of the mean of values, one value a problem -> (low, high)."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, dtype=np.float64)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def evaluate(model, tokenizer, problems, n=1, temperature=0.0, top_p=1.0, max_new_tokens=256,
             seed=0, ks=(1,), sampler=None, keep=False):
    """Answer every problem (as from load_problems) n times and score; temperature 0 is greedy.

    sampler: one to use again, with room enough; it is given the model's present weights first.
    Returns what summarise() does; keep=True adds "responses", for every problem a list of n
    {"text", "reward", "length", "finished"}. InputError if some k > n or a prompt is too long."""
    if max(ks) > n:
        raise InputError(f"--ks {max(ks)} is more than --n {n}: pass@k needs k <= n")
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    if sampler is None:
        sampler, max_new_tokens = new_sampler(model, prompts, max_new_tokens)

    start = time.perf_counter()
    sampler.sync(model)
    samples = sampler(prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                      top_p=top_p, seed=seed, stop=stop_ids(model, tokenizer))
    seconds = time.perf_counter() - start

    # sample i answers problem i // n
    texts = tokenizer.batch_decode([s.tokens for s in samples], skip_special_tokens=True)
    answers = [problems[i // n]["answer"] for i in range(len(samples))]
    scores = rewards(texts, answers)
    responses = [[] for _ in problems]
    for i, sample in enumerate(samples):
        responses[i // n].append({"text": texts[i], "reward": float(scores[i]),
                                  "length": len(sample.tokens), "finished": sample.finished})
    result = summarise(responses, ks, seconds, seed)
    if keep:
        result["responses"] = responses
    return result


def summarise(responses, ks, seconds, seed=0):
    """A list of n responses for every problem -> {"problems": count, "n", "avg@n": mean reward,
    "ci95": (low, high), "pass@k": {k: share}, "length": mean tokens, "finished": share that ended
    by themselves, "seconds" of sampling, "tokens_per_s"}."""
    n = len(responses[0])
    rewards_of = np.array([[r["reward"] for r in row] for row in responses])         # (P, n)
    lengths = np.array([[r["length"] for r in row] for row in responses])
    finished = np.array([[r["finished"] for r in row] for row in responses])
    right = rewards_of.sum(1)                                                        # (P,), c
    pass_k = {}
    for k in ks:
        pass_k[k] = float(np.mean([pass_at_k(n, int(c), k) for c in right]))
    return {
        "problems": len(responses), "n": n,
        "avg@n": float(rewards_of.mean()),
        "ci95": interval(right / n, seed),
        "pass@k": pass_k,
        "length": float(lengths.mean()),
        "finished": float(finished.mean()),
        "seconds": seconds,
        "tokens_per_s": float(lengths.sum() / seconds),
    }


def greedy_accuracy(model, tokenizer, benchmarks, max_new_tokens, sampler=None):
    """{title: problems} -> {title: share answered rightly, greedily}."""
    accuracy = {}
    for title, problems in benchmarks.items():
        result = evaluate(model, tokenizer, problems, max_new_tokens=max_new_tokens,
                          sampler=sampler)
        accuracy[title] = result["avg@n"]
    return accuracy


# ---- the script: a file of responses a benchmark, results.json, a table -------------------------

def print_table(results):
    """{title: summary} -> a line a benchmark."""
    first = next(iter(results.values()))
    names = [f"avg@{first['n']}", *(f"pass@{k}" for k in first["pass@k"])]
    heads = "".join(f"{name:9}" for name in names)
    print(f"{'':16} problems  {heads}95 % interval   tokens  finished  tokens/s")
    for title, r in results.items():
        shares = "".join(f"{share:<9.3f}" for share in (r["avg@n"], *r["pass@k"].values()))
        low, high = r["ci95"]
        print(f"{title[:16]:16} {r['problems']:8}  {shares}{low:.3f} - {high:.3f} "
              f"{r['length']:8.1f}  {r['finished']:8.3f}  {r['tokens_per_s']:8.0f}")


def compare_runs(first, second):
    """Print the mean rewards of two runs and their paired difference, benchmark by benchmark."""
    files = sorted(Path(first).glob("*.jsonl"))
    if not files:
        raise InputError(f"--compare {first}: no file of responses (*.jsonl) in this directory")
    for file in files:
        problems, before = mean_rewards(file)
        same_problems, after = mean_rewards(Path(second) / file.name)
        if problems != same_problems:
            raise InputError(f"--compare: {file.name} of the two runs holds different problems")
        difference = after - before                      # paired: what makes a problem hard cancels
        low, high = interval(difference)
        print(f"{file.stem[:16]:16} {len(difference):5} problems   "
              f"{before.mean():.3f} -> {after.mean():.3f}   difference {difference.mean():+.3f}   "
              f"95 % interval {low:+.3f} to {high:+.3f}")


def mean_rewards(path):
    """A file of responses -> its problems, and the mean reward of each (P,)."""
    problems, means = [], []
    for place, row in read_rows(path):
        try:
            means.append(np.mean([r["reward"] for r in row["responses"]]))
            problems.append(row["problem"])
        except (KeyError, TypeError):
            raise InputError(f"--compare: {place} was not written by eval.py") from None
    return problems, np.array(means)


def check_settings(out, settings):
    """InputError unless the run in out can go on with these settings."""
    file = out / "results.json"
    if not file.exists():
        raise InputError(f"--resume: there is no run in {out}")
    before = parse_json(file.read_text(encoding="utf-8"), file, 1).get("flags")
    if before != settings:
        raise InputError(f"--resume: the run in {out} had {before}, repeat its flags")


@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: list[str] = flag(["toy"], f"any of toy, {', '.join(BENCHMARKS)}, JSON(L) files, hf://...")
    n: int = flag(1, "responses a problem", 1, 10000)
    temperature: float = flag(0.0, "0 is greedy; Prefix-RFT samples at 0.6 [P]", 0, 100)
    top_p: float = flag(0.95, "nucleus of the sampling distribution [P]", 1e-6, 1)
    ks: list[int] = flag([1], "pass@k for these k", 1, 10000)
    max_new_tokens: int = flag(512, "longest response, cut to what the model reads", 1, 10**6)
    rows: int = flag(64, "responses sampled side by side: more is faster", 1, 10**5)
    seed: int = flag(0, "of sampling and of the intervals", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    out: str = flag("runs/eval", "directory for results.json and all responses")
    resume: bool = flag(False, "continue the killed run in --out")
    compare: list[str] = flag([], "two runs: print their difference, evaluate nothing")


def main(flags):
    if flags.compare:
        if len(flags.compare) != 2:
            raise InputError("--compare needs two runs")
        return compare_runs(*flags.compare)
    if flags.temperature == 0 and flags.n > 1:
        raise InputError(f"--n {flags.n} at temperature 0 are equal responses: add --temperature 0.6")
    if max(flags.ks) > flags.n:
        raise InputError(f"--ks {max(flags.ks)} is more than --n {flags.n}: pass@k needs k <= n")
    out = new_run(flags.out, flags.resume)
    settings = {}
    for name in ("model", "n", "temperature", "top_p", "max_new_tokens", "seed", "rows"):
        settings[name] = getattr(flags, name)
    if flags.resume:
        check_settings(out, settings)

    # one sampler for all benchmarks
    benchmarks = load_benchmarks(flags.data)
    model, tokenizer = load_model(flags.model, pick_device(flags.device))
    prompts = []
    for problems in benchmarks.values():
        prompts += [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    sampler, max_new_tokens = new_sampler(model, prompts, flags.max_new_tokens, flags.rows)

    out.mkdir(parents=True, exist_ok=True)
    results = {}
    chunk = max(1, 4 * flags.rows // flags.n)            # problems between two writes
    for title, problems in benchmarks.items():
        write_file(out / "results.json", json.dumps({"flags": settings, "results": results}))

        # What a killed run had answered, in whole chunks: the same batches round the same way, so
        # a resumed run ends exactly as an undisturbed one.
        file = out / f"{title}.jsonl"
        rows = read_log(file)
        for row, problem in zip(rows, problems):
            if (row.get("problem"), row.get("answer")) != (problem["problem"], problem["answer"]):
                raise InputError(f"--resume: {file} answers other problems, name another --out")
        if len(rows) < len(problems):
            rows = rows[:len(rows) // chunk * chunk]
        write_file(file, "".join(json.dumps(row) + "\n" for row in rows))

        for i in tqdm(range(len(rows), len(problems), chunk), desc=title, leave=False):
            part = problems[i:i + chunk]
            result = evaluate(model, tokenizer, part, flags.n, flags.temperature, flags.top_p,
                              max_new_tokens, flags.seed, sampler=sampler, keep=True)
            with open(file, "a", encoding="utf-8") as stream:
                for problem, responses in zip(part, result["responses"]):
                    row = {"problem": problem["problem"], "answer": problem["answer"],
                           "responses": responses, "seconds": result["seconds"] / len(part)}
                    stream.write(json.dumps(row) + "\n")
                    rows.append(row)
        responses = [row["responses"] for row in rows]
        seconds = sum(row["seconds"] for row in rows)
        results[title] = summarise(responses, flags.ks, seconds, flags.seed)
    write_file(out / "results.json", json.dumps({"flags": settings, "results": results}, indent=1))
    print_table(results)


if __name__ == "__main__":
    run_script(main, Flags)
