"""Evaluation, and the border of the project: problems, models and flags come in here, and what is wrong with them is said here.

Papers: Prefix-RFT (arXiv 2507.01679) scores with avg@k at temperature 0.6 and top-p 0.95, so does this file.
A model answers every problem n times, reward.py says which answers are right. The mean over everything is avg@n; pass@k is
the chance that at least one of k answers is right, estimated from all n without bias; the interval resamples problems, because
it is the choice of problems, not of samples, that the next benchmark would change.

Glossary: n = answers sampled a problem, c = how many are right, k = answers a user would be allowed (pass@k).
"""
import argparse
import json
import logging
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import toy
from reward import extract_answer, rewards
from sampler import Sampler

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}"  # Prefix-RFT, appendix


# ---------------------------------------------------------------- flags

class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence that names the flag or file and the mend."""


def flag(default, help, low=-math.inf, high=math.inf):
    """A dataclass field that HfArgumentParser reads: its help, and for numbers the inclusive range it must lie in."""

    class InRange(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
                    parser.error(f"{option_string} {value} is out of range: it must be {range_text(low, high)}")
            setattr(namespace, self.dest, values)

    metadata = {"help": help.replace("%", "%%"), "action": InRange}
    return field(default_factory=lambda: list(default), metadata=metadata) if isinstance(default, (list, tuple)) \
        else field(default=default, metadata=metadata)


def range_text(low, high):
    if high == math.inf:
        return f"at least {low}" if low > -math.inf else "a finite number"
    return f"between {low} and {high}" if low > -math.inf else f"at most {high}"


def parse_flags(Flags, argv=None):
    """argv -> Flags(...). Every mistake argparse finds becomes an InputError."""
    def error(message):
        raise InputError(f"{message} (--help lists the flags)")

    description = (sys.modules[Flags.__module__].__doc__ or "").strip().split("\n")[0]
    parser = HfArgumentParser(Flags, description=description.replace("%", "%%"), allow_abbrev=False)
    parser.error = error
    flags, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        error(f"unknown flag {unknown[0]}")
    return flags


def run(main, Flags, argv=None):
    """What every script ends with: flags in, main(flags), and a user's mistake is one sentence and exit code 2."""
    try:
        main(parse_flags(Flags, argv))
    except (InputError, OSError) as error:  # OSError: no permission, disk full; its own sentence names the file
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name):
    """'auto' | 'cpu' | 'cuda' -> torch.device; auto takes the GPU when there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name} is unknown: it must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def new_run(out, resume):
    """May a run start (or, with resume, go on) in this directory? Path(out) if so. Creates nothing: the first write does."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a directory")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out} already holds a run: add --resume to go on with it, or name another --out")
    parent = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"--out {out}: {parent} cannot be written to; name another --out")
    return out


# ---------------------------------------------------------------- problems

KEYS = {"problem": ("problem", "question", "prompt"),
        "solution": ("solution", "demo", "demonstration", "completion", "response"),
        "answer": ("answer", "final_answer", "ground_truth")}


def load_problems(path, require=("answer",)):
    """Read problems from a .jsonl or .json file, or from a dataset on the Hub (hf://owner/name/path/to/file.jsonl).

    Returns a list of {"problem": str or chat messages, "solution": str, list of str or None, "answer": str or None}.
    `require` names the keys that may not be None. Nothing is skipped: a bad row raises InputError with file and line.
    Row formats understood: our own and its aliases (KEYS), GSM8K as published, TRL's {"prompt", "completion"} and
    {"messages"}, alpaca's {"instruction", "input", "output"}, and multiple choice ({"choices": [...]}).
    """
    problems = []
    for where, row in read_rows(path):
        try:
            problem = normalise(row)
            missing = [key for key in ("problem", *require) if not problem[key]]
            if missing:
                raise InputError(f"no {missing[0]} (one of {'|'.join(KEYS[missing[0]])}); it has the keys {', '.join(row)}")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        problems.append(problem)
    if not problems:
        raise InputError(f"{path} holds no problem: give one JSON object a line")
    return problems


def read_rows(path):
    """Yield (where it stands, dict) for every row of a JSONL file or a JSON array."""
    path = str(path)
    file = fetch(path) if path.startswith("hf://") else path
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8 JSON lines") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a .jsonl or .json file") from None
    whole = text.lstrip().startswith("[")
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = f" line {getattr(error, 'lineno', 1) if whole else number}"
            raise InputError(f"{path}{at} is not valid JSON: {getattr(error, 'msg', error)}") from None
        for item, row in enumerate(value if whole else [value], 1):
            where = f"{path} item {item}" if whole else f"{path} line {number}"
            if not isinstance(row, dict):
                raise InputError(f"{where} is {type(row).__name__}, not a JSON object with problem and answer")
            yield where, row


def fetch(path):
    """hf://owner/name/path/to/file -> the file's place in the local Hub cache."""
    owner, _, rest = path.removeprefix("hf://").partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise InputError(f"{path} is incomplete: write hf://owner/name/path/to/file.jsonl")
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    except Exception as error:
        raise InputError(f"{path} could not be downloaded: {one_line(error)}") from None


def normalise(row):
    """One row in any understood format -> {"problem", "solution", "answer"}; what is absent is None."""
    if "messages" in row:
        turns = messages(row["messages"])
        solution = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
        row = {**row, "problem": turns, "solution": solution}
    elif "instruction" in row:
        problem = "\n".join(text(row[key], key) for key in ("instruction", "input") if row.get(key))
        row = {**row, "problem": problem, "solution": row.get("output")}
    problem, solution, answer = (next((row[k] for k in KEYS[key] if row.get(k) is not None), None) for key in KEYS)

    if isinstance(solution, list) and solution and isinstance(solution[0], dict):
        solution = messages(solution)[-1]["content"]  # TRL: the completion as a conversation
    if row.get("choices") is not None:
        problem, answer = lettered(text(problem, "problem"), row["choices"], answer)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str) and "####" in answer:
        worked, answer = gsm8k(answer)
        solution = solution or worked

    problem = messages(problem) if isinstance(problem, list) else text(problem, "problem")
    solution = [text(s, "solution") for s in solution] if isinstance(solution, list) else text(solution, "solution")
    answer = text(answer, "answer")
    first = solution[0] if isinstance(solution, list) and solution else solution
    if answer is None and first and "\\boxed" in first:
        answer = extract_answer(first)
    return {"problem": problem, "solution": solution, "answer": answer}


def text(value, key):
    """value if it is a text (or None), stripped of nothing; otherwise InputError."""
    if value is not None and not isinstance(value, str):
        raise InputError(f"{key} is {type(value).__name__}, and must be a string")
    if value is not None and not value.strip():
        raise InputError(f"{key} is empty")
    try:
        (value or "").encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{key} holds half of a surrogate pair, which is no character") from None
    return value


def messages(value):
    """A chat: a non-empty list of {"role", "content"}, as a fresh list."""
    good = isinstance(value, list) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    if not good:
        raise InputError('a chat must be a list of {"role": "user", "content": "..."}')
    return [{"role": m["role"], "content": text(m["content"], "content")} for m in value]


def gsm8k(answer):
    """GSM8K's published answer, "... <<48/2=24>>24 clips ... #### 1,042" -> a demonstration that earns its reward, "1042"."""
    worked, _, final = answer.rpartition("####")
    final = re.sub(r"(?<=\d),(?=\d{3})", "", final.strip())
    worked = re.sub(r"<<[^<>]*>>", "", worked).strip()  # the calculator marks
    return f"{worked}\nThe answer is \\boxed{{{final}}}.", final


def lettered(problem, choices, answer):
    """Multiple choice: the options written under the problem, and the answer (option, index or letter) as a letter."""
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise InputError("choices must be a list of 2 to 26 options")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(choices)]
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices))
    if answer in choices:
        answer = letters[choices.index(answer)]
    elif str(answer).isdecimal() and int(answer) < len(choices):
        answer = letters[int(answer)]
    elif answer is not None:
        letter = str(answer).strip(" ().").upper()
        if len(letter) != 1 or letter not in letters:
            raise InputError(f"answer {answer!r} is neither one of the choices nor a letter A-{letters[-1]} nor an index")
        answer = letter
    return f"{problem}\n\n{options}\n\nAnswer with the letter of the right option.", answer


# ---------------------------------------------------------------- models

def load_model(name, device, seed=0):
    """'toy', a checkpoint directory or a Hub id -> (model, tokenizer): float32, evaluation mode, on device.

    InputError when it is not a decoder-only language model with its tokenizer and an end-of-sequence token."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if name == "toy":
        model, tokenizer = toy.base_model(seed)
        return model.to(device).eval(), tokenizer
    if not os.path.isdir(name) and (os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise InputError(f"--model {name}: no such directory; give toy, a checkpoint directory or a Hub id (owner/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # the libraries raise a dozen kinds; for the user they are one
        raise InputError(f"--model {name} cannot be loaded: {one_line(error)}") from None
    model = model.to(device).eval()
    check_model(name, model, tokenizer, info)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@torch.no_grad()
def check_model(name, model, tokenizer, info):
    """The ways in which something loads and yet is no model that can answer."""
    if info["missing_keys"]:
        raise InputError(f"--model {name}: the weights lack {sorted(info['missing_keys'])[0]}; it is no complete causal model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no eos_token, so no answer could end; set one in tokenizer_config.json")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise InputError(f"--model {name}: its tokenizer knows more tokens than the model; the two do not belong together")
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    first, second = model(ids).logits[:, 0].float()
    if not torch.allclose(first, second, atol=1e-3):  # the future changes the past
        raise InputError(f"--model {name} looks ahead (an encoder such as BERT?); a decoder-only model is needed")


def one_line(error):
    """The first sentence of a library's error, without its advice and its line breaks."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:200].rsplit(" ", 1)[0] + " ..."


def prompt_ids(tokenizer, problem):
    """problem (text or chat messages) -> token ids up to where the answer starts."""
    chat = problem if isinstance(problem, list) else [{"role": "user", "content": problem + INSTRUCTION}]
    if tokenizer.chat_template:
        try:
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may refuse, e.g. a system turn
            raise InputError(f"the chat template refuses a prompt: {one_line(error)}") from None
        return tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer("\n".join(turn["content"] for turn in chat) + "\n").input_ids
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text


def demo_ids(tokenizer, solution):
    """A demonstration -> its token ids and the EOS that ends a response: a model never shown the end never stops."""
    return tokenizer(solution, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def stop_ids(model, tokenizer):
    """Token ids that end a response: the tokenizer's EOS and those of the model's generation config."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, (list, tuple)) else [eos])} - {None}
    return tuple(sorted(ids))


# ---------------------------------------------------------------- evaluation

def pass_at_k(n, c, k):
    """Chance that k of n answers, c of them right, drawn without replacement hold a right one: 1 - C(n-c,k) / C(n,k).

    Unbiased (arXiv 2107.03374, equation 1). Subtracted in whole numbers, so nothing cancels and one division rounds."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def bootstrap(values, seed=0, resamples=2000):
    """95 % interval of the mean of values (one a problem): the 2.5 % and 97.5 % points of resampled means."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, dtype=np.float64)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def evaluate(model, tokenizer, problems, n=1, temperature=0.0, top_p=1.0, max_new_tokens=256, seed=0, ks=(1,),
             sampler=None, keep=False):
    """Answer every problem n times and score the answers.

    Returns {"avg@n", "ci95" (lo, hi), "pass@k" {k: share}, "length" (mean tokens), "finished" (share that stopped by
    itself), "problems", "seconds", "tokens_per_s"}; keep=True adds "responses", for every problem a list of n
    {"text", "reward", "length", "finished"}. temperature 0 is greedy."""
    if not all(1 <= k <= n for k in ks):
        raise InputError(f"pass@k needs 1 <= k <= n, got k = {', '.join(map(str, ks))} and n = {n}")
    prompts = [prompt_ids(tokenizer, p["problem"]) for p in problems]
    sampler = sampler or Sampler(model, length=max(map(len, prompts)) + max_new_tokens)
    start = time.perf_counter()
    samples = sampler(prompts, n=n, max_new_tokens=max_new_tokens, stop=stop_ids(model, tokenizer),
                      temperature=temperature, top_p=top_p, seed=seed)
    seconds = time.perf_counter() - start
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in samples.lists()]
    scores = np.array(rewards(texts, [p["answer"] for p in problems for _ in range(n)])).reshape(-1, n)
    lengths = samples.mask.sum(1).tolist()
    finished = samples.finished.tolist()
    result = {"avg@n": float(scores.mean()), "ci95": bootstrap(scores.mean(1), seed),
              "pass@k": {k: float(np.mean([pass_at_k(n, int(c), k) for c in scores.sum(1)])) for k in ks},
              "length": float(np.mean(lengths)), "finished": float(np.mean(finished)), "problems": len(problems),
              "seconds": seconds, "tokens_per_s": sum(lengths) / seconds}
    if keep:
        rows = [{"text": t, "reward": float(r), "length": l, "finished": f}
                for t, r, l, f in zip(texts, scores.ravel(), lengths, finished)]
        result["responses"] = [rows[i:i + n] for i in range(0, len(rows), n)]
    return result
