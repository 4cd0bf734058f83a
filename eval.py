"""
eval.py - how good is a model, and the border where flags, problems and models come in.

A model answers every problem n times, and reward.py says which answers are right. Their mean is
avg@n, the measure of Prefix-RFT (https://arxiv.org/abs/2507.01679: temperature 0.6, top-p 0.95);
pass@k is the chance that one of k answers is right (2107.03374). The 95 % interval draws the
*problems* anew: n answers to one problem are not n independent facts.

What a user can get wrong - a flag, a line of a file, a checkpoint - is met here with an InputError:
one sentence that says where, what, and how to mend it. The other files do not check it again.

    n, c, k   answers sampled a problem, how many of them are right, how many one is allowed
    problem   {"problem", "solution", "answer"}, which load_problems makes of a line

Left out: few-shot prompts, judges other than reward.py, several GPUs.

    python eval.py                                            the toy's base model, greedily
    python eval.py --model runs/prefix_rft/checkpoint --out runs/after
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --data math500 my.jsonl --n 8 --temperature 0.6
"""

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import toy
from reward import extract_answer, rewards
from sampler import Sampler

INSTRUCTION = toy.INSTRUCTION    # "\nPlease reason step by step, ... \boxed{}": Prefix-RFT's words

# Benchmarks with a JSONL file on the Hub. Most others are parquet, which needs one more package.
BENCHMARKS = {"gsm8k": "hf://DaertML/gsm8k-jsonl/test.jsonl",
              "math500": "hf://HuggingFaceH4/MATH-500/test.jsonl",
              "aime25": "hf://math-ai/aime25/test.jsonl",
              "minerva": "hf://math-ai/minervamath/test.jsonl"}

# The keys of a row: the first that holds something wins.
ALIASES = {"problem": ("problem", "question", "prompt"),
           "solution": ("solution", "demo", "demonstration", "completion", "response"),
           "answer": ("answer", "final_answer", "ground_truth")}


class InputError(ValueError):
    """Something the user gave is wrong. One sentence: the flag or file, the fault, the mend."""


def one_line(error):
    """A library's error on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- flags --------------------------------------------------------------------------------------

class InRange(argparse.Action):
    """Stores a number, or a list of them; const is (lowest, highest), and nan is in no range."""

    def __call__(self, parser, namespace, values, option):
        low, high = self.const
        for number in values if isinstance(values, list) else [values]:
            if not low <= number <= high:
                refuse(f"{option} {number} is out of range: {low} to {high}")
        setattr(namespace, self.dest, values)


def flag(default, help, low=None, high=10**9):
    """A field of a Flags dataclass; a number has an inclusive range from low to high."""
    metadata = {"help": help.replace("%", "%%")}         # argparse formats help with %
    if low is not None:
        metadata.update(action=InRange, const=(low, high))
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse(message):
    """For argparse, whose own way is to print the usage and exit."""
    raise InputError(f"{message} (--help lists all flags)")


def parse_flags(Flags, argv=None, toy_defaults={}, methods={}):
    """The command line -> Flags(...); InputError for an unknown flag or a value not allowed.

    The dataclass holds the defaults for real models. toy_defaults {flag: default} replace them when
    --data is toy, methods[--method] {flag: default} replace both; what is typed wins over all."""
    title = sys.modules[Flags.__module__].__doc__.strip().split("\n")[0]
    parser = HfArgumentParser(Flags, description=title, allow_abbrev=False)
    parser.error = refuse
    for action in parser._actions[1:]:                   # the first is --help
        action.help += " (default: %(default)s"
        for name, others in {"toy": toy_defaults, **methods}.items():
            if others.get(action.dest, action.default) != action.default:
                action.help += f", {name}: {others[action.dest]}"
        action.help += ")"
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
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    exit_on_mistake(lambda: main(parse_flags(Flags, None, toy_defaults, methods)))


def exit_on_mistake(main, *args):
    """main(*args), in which a user's mistake becomes one sentence and exit code 2."""
    try:
        main(*args)
    except (InputError, OSError) as error:               # OSError: disk full, no permission, ...
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def printable(text):
    """Text of a model for the terminal: one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def pick_device(name):
    """"auto" (the GPU if there is one), "cpu" or "cuda" -> torch.device."""
    gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not gpu):
        raise InputError(f"--device {name}: PyTorch finds none here, choose auto or cpu")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


# ---- files --------------------------------------------------------------------------------------

def new_run(out, resume):
    """Path(out), if a run may start or go on there. Not made yet: a refused run leaves nothing."""
    out = Path(out)
    if resume and not out.is_dir():
        raise InputError(f"--resume: there is no run in {out}")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out} already holds a run: add --resume or name another --out")
    place = next(place for place in [out, *out.absolute().parents] if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--out {out}: {place} is no directory that can be written to")
    return out


def write_file(path, text):
    """Replace path in one move: a kill leaves the old file or the new one."""
    beside = Path(f"{path}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_rows(path, rows):
    """The same with one JSON object a line."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def repeat_flags(before, now):
    """InputError if a resumed run lacks a flag of its start: it would end elsewhere."""
    for name, value in before.items():
        if now.get(name) != value:
            raise InputError(f"--resume: this run has --{name} {value}, repeat its flags")


def read_log(path):
    """The rows of a JSONL file or []. Half a line at its end, left by a kill, is cut off."""
    if not Path(path).exists():
        return []
    os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)
    return [row for _, row in read_rows(path)]


def read_rows(path):
    """A JSONL file or one JSON array, here or on the Hub -> list of (place, row), place being
    "my.jsonl line 3"."""
    path = file = str(path)
    try:
        if path.startswith("hf://"):
            owner, name, inside = path.removeprefix("hf://").split("/", 2)
            file = huggingface_hub.hf_hub_download(f"{owner}/{name}", inside, repo_type="dataset")
        text = Path(file).read_text(encoding="utf-8-sig")
    except Exception as error:                           # absent, offline, gated, no text, ...
        raise InputError(f"{path} cannot be read: {one_line(error)}; give a .jsonl or .json file "
                         "in UTF-8 or hf://owner/name/path/to/file.jsonl") from None

    rows = []
    if text.lstrip().startswith("["):
        for number, row in enumerate(parse_json(text, path), 1):
            rows.append((f"{path} item {number}", row))
    else:
        # Not splitlines: a text may hold U+2028, which ends no line of JSON
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((f"{path} line {number}", parse_json(line, path, number)))
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f'{place} is no JSON object: write {{"problem": ..., "answer": ...}}')
    return rows


def parse_json(text, path, line=1):
    """The value of a text that begins at this line of path."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()   # fails on half a character, "\ud800"
        return value
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        why = getattr(error, "msg", one_line(error))
        raise InputError(f"{path} line {line} is not valid JSON: {why}") from None


# ---- problems -----------------------------------------------------------------------------------

def load_problems(path, require=("answer",), seed=0):
    """Problems from a .jsonl or .json file, from the Hub (hf://owner/name/path/to/file.jsonl), or
    of the toy's training split ("toy", which alone has a seed).

    Returns a list of {"problem": str or chat turns, "solution": str, list of str or None, "answer":
    str or None}; the keys in `require` are never empty. No line is skipped: InputError names it."""
    if path == "toy":
        return toy.problems("train", seed=seed)
    problems = []
    for place, row in read_rows(path):
        try:
            problems.append(to_problem(row))
            for key in require:
                if problems[-1][key] is None:
                    raise InputError(f"{key} ({'|'.join(ALIASES[key])}) is missing or empty")
        except InputError as error:
            raise InputError(f"{place}: {error}; its keys are: {', '.join(row) or 'none'}; other "
                             "formats: python bridges/convert.py in.jsonl out.jsonl") from None
    if not problems:
        raise InputError(f"{path} is empty: give one JSON object with problem and answer a line")
    return problems


def demonstrations(problem):
    """The solutions of a problem as a list, which may be empty."""
    solution = problem["solution"] or []
    return [solution] if isinstance(solution, str) else solution


def to_problem(row):
    """A row with our keys or their aliases, or of GSM8K -> a problem; solution and answer may be
    None. InputError if a value is no text, or if the row is multiple choice."""
    for key in ("choices", "options"):
        if row.get(key):
            raise InputError(f"the problem would lose its {key}")
    problem = first_alias(row, "problem")
    solution = first_alias(row, "solution")
    answer = first_alias(row, "answer")

    # All are texts, but a problem may be a chat, a solution a list of texts, an answer a number
    if not is_text(problem) and not is_chat(problem):
        raise InputError(f"problem ({'|'.join(ALIASES['problem'])}) must be a text or a chat "
                         f'[{{"role": "user", "content": "..."}}], not {str(problem)[:40]}')
    solutions = solution if isinstance(solution, list) else [solution]
    if solution is not None and not all(map(is_text, solutions)):
        raise InputError(f"solution must be a text or a list of texts, not {str(solution)[:40]}")
    if type(answer) in (int, float):
        answer = str(answer)
    if answer is not None and not is_text(answer):
        raise InputError(f"answer must be a text or a number, not {str(answer)[:40]}")

    # GSM8K keeps both in its answer: "48/2 = <<48/2=24>>24 ... #### 1,042"
    if answer and "####" in answer:
        worked, _, answer = answer.rpartition("####")
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.strip())
        worked = re.sub("<<[^<>]*>>", "", worked).strip()          # marks meant for a calculator
        solution = solution or f"{worked}\nThe answer is \\boxed{{{answer}}}."
    elif not answer and solution and "\\boxed" in solutions[0]:
        answer = extract_answer(solutions[0])
    return {"problem": problem, "solution": solution, "answer": answer}


def first_alias(row, key):
    """The first value that is not empty under the aliases of key, or None."""
    for alias in ALIASES[key]:
        if row.get(alias) not in (None, "", []):
            return row[alias]


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def is_chat(value):
    """Whether value is a list of {"role": text, "content": text}."""
    if not isinstance(value, list) or value == []:
        return False
    for turn in value:
        texts = [turn.get("role"), turn.get("content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            return False
    return True


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
            output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:                           # the libraries raise a dozen kinds
        raise InputError(f"--model {name} cannot be loaded: {one_line(error)}") from None
    model = model.to(device).eval()
    # In a decoder the second token cannot change what is said after the first
    with torch.no_grad():
        one, other = model(torch.tensor([[0, 0], [0, 1]], device=device)).logits[:, 0].float()
    fault = ""
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        fault = f"lacks weights, or has them in another shape ({absent[0]}): give a complete model"
    elif not tokenizer("1 + 1", add_special_tokens=False).input_ids:
        fault = "has no tokenizer: save one beside it (tokenizer.save_pretrained)"
    elif tokenizer.eos_token_id is None:
        fault = "has a tokenizer without eos_token: name one in tokenizer_config.json"
    elif len(tokenizer) > model.get_input_embeddings().num_embeddings:
        fault = "has a tokenizer with more tokens than the model: they do not belong together"
    elif not one.isfinite().all():
        fault = "computes nan or inf: its weights are damaged"
    elif (one - other).abs().max() > 1e-4 * one.abs().max():
        fault = "looks ahead, as an encoder does: give a decoder-only language model"
    if fault:
        raise InputError(f"--model {name} {fault}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token        # we use masks, but other libraries ask
    return model, tokenizer


def chat_turns(problem):
    """A problem (a text, or chat turns as they stand) -> chat turns."""
    if isinstance(problem, str):
        return [{"role": "user", "content": problem + INSTRUCTION}]
    return problem


def prompt_ids(tokenizer, problem):
    """A problem (a text, or chat turns as they stand) -> ids up to where the response begins."""
    turns = chat_turns(problem)
    if tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:                       # a template may refuse, say, a system turn
            raise InputError(f"the chat template refuses a prompt: {one_line(error)}") from None
        return tokenizer(text, add_special_tokens=False).input_ids
    # A base model: the text and a line's end
    ids = tokenizer("".join(turn["content"] + "\n" for turn in turns)).input_ids
    if ids[-1] == tokenizer.eos_token_id:                # some tokenizers close every text
        ids = ids[:-1]
    return ids


def demo_ids(tokenizer, solution):
    """A demonstration -> its ids and the EOS: a model that is never shown the end never stops."""
    return tokenizer(solution, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def stop_ids(model, tokenizer):
    """The ids that end a response: the tokenizer's EOS and those of the generation_config."""
    eos = model.generation_config.eos_token_id
    if not isinstance(eos, list):
        eos = [eos]
    return sorted({tokenizer.eos_token_id, *eos} - {None})


def new_sampler(model, prompts, max_new_tokens, rows=64, streams=1):
    """A Sampler with room for the longest of `prompts` (lists of ids; with two streams pairs of
    them) and max_new_tokens more, or as many as the model reads -> (sampler, max_new_tokens).

    On a GPU it samples from a bfloat16 copy of the model, half the memory traffic, as of the last
    sampler.sync(model). InputError if a prompt does not fit or the sampler cannot serve the model.
    """
    if streams == 2:
        prompts = [ids for pair in prompts for ids in pair]
    longest = max(map(len, prompts))
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    if longest >= context:
        raise InputError(f"a prompt has {longest} tokens, the model reads {context}: shorten it")
    max_new_tokens = min(max_new_tokens, context - longest)
    dtype = torch.bfloat16 if model.device.type == "cuda" else None
    try:
        return Sampler(model, rows, longest + max_new_tokens, streams, dtype), max_new_tokens
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
             seed=0, ks=(1,), rows=64, sampler=None):
    """Answer every problem (as from load_problems) n times and score; temperature 0 is greedy.

    sampler: one to use again, with room enough; it is given the model's present weights first.
    Returns {"problems": count, "n", "avg@n": mean reward, "ci95": (low, high), "pass@k": {k:
    share}, "length": mean tokens, "finished": share that ended by themselves, "tokens_per_s" of
    sampling, "responses": for every problem a list of n {"text", "reward", "length", "finished"}}.
    InputError if some k > n or a prompt is too long."""
    if max(ks) > n:
        raise InputError(f"--ks {max(ks)} is more than --n {n}: pass@k needs k <= n")
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
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
    responses = []
    for sample, text, score in zip(samples, texts, scores):
        responses.append({"text": text, "reward": score, "length": len(sample.tokens),
                          "finished": sample.finished})
    lengths = [response["length"] for response in responses]
    finished = [response["finished"] for response in responses]
    right = np.reshape(scores, (-1, n)).sum(1).astype(int).tolist()        # c of every problem
    pass_k = {}
    for k in ks:
        pass_k[k] = float(np.mean([pass_at_k(n, c, k) for c in right]))
    return {"problems": len(problems), "n": n, "avg@n": float(np.mean(scores)),
            "ci95": interval(np.array(right) / n, seed), "pass@k": pass_k,
            "length": float(np.mean(lengths)), "finished": float(np.mean(finished)),
            "tokens_per_s": sum(lengths) / seconds,
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
    n: int = flag(1, "responses a problem", 1)
    temperature: float = flag(0.0, "0 is greedy; Prefix-RFT samples at 0.6 [P]", 0, 100)
    top_p: float = flag(0.95, "nucleus of the sampling distribution [P]", 1e-6, 1)
    ks: list[int] = flag([1], "pass@k for these k", 1)
    max_new_tokens: int = flag(512, "longest response, cut to what the model reads", 1)
    rows: int = flag(64, "responses sampled side by side: more is faster", 1)
    seed: int = flag(0, "of sampling and of the intervals", 0)
    device: str = flag("auto", "auto, cpu or cuda")
    out: str = flag("runs/eval", "directory for results.json and all responses")
    resume: bool = flag(False, "continue the killed run in --out")


def main(flags):
    if flags.temperature == 0 and flags.n > 1:
        raise InputError(f"--n {flags.n} greedy responses are all the same: add --temperature 0.6")
    if max(flags.ks) > flags.n:
        raise InputError(f"--ks {max(flags.ks)} is more than --n {flags.n}: pass@k needs k <= n")
    out = new_run(flags.out, flags.resume)
    benchmarks = load_benchmarks(flags.data)
    settings = asdict(flags)
    for name in ("out", "resume", "device"):
        del settings[name]

    # A killed run keeps the benchmarks that it has finished, if they are still the same problems
    report = {"flags": settings, "results": {}}
    if flags.resume:
        report = parse_json((out / "results.json").read_text(), out / "results.json")
        repeat_flags(report["flags"], settings)
    for title in report["results"]:
        file = out / f"{title}.jsonl"
        answered = [(row["problem"], row["answer"]) for _, row in read_rows(file)]
        if answered != [(p["problem"], p["answer"]) for p in benchmarks[title]]:
            raise InputError(f"--resume: {file} answers other problems, name another --out")

    # One sampler for all benchmarks
    model, tokenizer = load_model(flags.model, pick_device(flags.device))
    prompts = []
    for problems in benchmarks.values():
        prompts += [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    sampler, max_new_tokens = new_sampler(model, prompts, flags.max_new_tokens, flags.rows)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "results.json", json.dumps(report, indent=1))

    print(f"{'':16} problems  avg@n   95 % interval   tokens  finished  tokens/s  pass@k")
    for title, problems in benchmarks.items():
        if title not in report["results"]:
            result = evaluate(model, tokenizer, problems, flags.n, flags.temperature, flags.top_p,
                              max_new_tokens, flags.seed, flags.ks, sampler=sampler)
            rows = []
            for problem, responses in zip(problems, result.pop("responses")):
                rows.append({"problem": problem["problem"], "answer": problem["answer"],
                             "responses": responses})
            write_rows(out / f"{title}.jsonl", rows)
            report["results"][title] = result
            write_file(out / "results.json", json.dumps(report, indent=1))
        r = report["results"][title]
        low, high = r["ci95"]
        pass_k = "  ".join(f"{k}: {share:.3f}" for k, share in r["pass@k"].items())
        print(f"{title[:16]:16} {r['problems']:8}  {r['avg@n']:.3f}   {low:.3f} - {high:.3f} "
              f"{r['length']:8.1f} {r['finished']:9.3f} {r['tokens_per_s']:9.0f}  {pass_k}")


if __name__ == "__main__":
    run_script(main, Flags)
