"""
online.py - on-policy SFT in rounds: retell with the model as it now is, train, retell again.

Texts that a model retold before training are its own no longer once it has learnt. Here every round
takes its share of the problems, rewrites them as hinted_decode.py does, and learns from what is
right for its share of the steps; every problem is rewritten once. --rounds 1 is the offline method.
The authors of Towards On-Policy SFT (https://arxiv.org/abs/2602.12222) once planned such a loop;
it left their plan in March 2026 without a release, and all numbers here are ours.

A step learns from a fixed number of tokens, since texts get shorter or longer from round to round.
Left out: --resume. A run leaves its texts and a checkpoint a round.

    python -m experiments.online
    python -m experiments.online --rounds 1 --out runs/offline
    python -m experiments.online --model Qwen/Qwen2.5-1.5B-Instruct --data train.jsonl --lr 1e-5
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

import hinted_decode
import idft
from eval import (InputError, check_run, fingerprint, flag, load_benchmarks, load_model,
                  load_problems, open_run, pick_device, run_script, write_rows)


def token_batch(rows, tokens, step, seed):
    """Random rows (prompt ids, response ids) until their responses hold `tokens` tokens."""
    rng = np.random.default_rng((seed, step))
    batch = []
    while tokens > 0:
        batch.append(rows[rng.integers(len(rows))])
        tokens -= len(batch[-1][1])
    return batch


def train_on_texts(model, tokenizer, texts, optimizer, steps, flags, out=None):
    """The optimizer steps `steps`, a range out of flags.steps, on the solutions of `texts` -> the
    number of tokens learnt from. flags: those of below. With `out` the metrics are logged there."""
    rows = idft.demonstration_rows(model, tokenizer, texts, 10**9)
    learning = idft.Flags(loss=flags.loss, lr=flags.lr)
    tokens = 0
    for step in tqdm(steps, desc=flags.loss, leave=False):
        lr = idft.learning_rate(step, flags.steps, flags.lr, learning.warmup)
        batch = token_batch(rows, flags.batch_tokens, step, flags.seed)
        row = idft.supervised_step(model, optimizer, batch, lr, learning)
        tokens += row["tokens"]
        if out:
            idft.log_row(out, {"step": step + 1, **row})
    return tokens


@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "problems and demonstrations: toy, a JSON(L) file or hf://...")
    eval_data: str = flag("", "evaluated before and after: toy, a JSON(L) file or hf://...")
    out: str = flag("runs/online", "directory for round-1.jsonl, ..., metrics and checkpoint/")
    rounds: int = flag(4, "of rewriting and training; 1 is offline [ours]", 1)
    steps: int = flag(200, "optimizer steps in all [ours]", 1)
    batch_tokens: int = flag(65536, "response tokens an optimizer step [ours]", 1)
    loss: Literal["idft", "dft", "sft"] = flag("idft", "see idft.py")
    lr: float = flag(6e-5, "peak learning rate, for a 7B instruct model [code]", 0, 10)
    beta: float = flag(3.0, "of the retelling, see hinted_decode.py [code]", 0)
    analysis: bool = flag(True, "analyse the reference first, see hinted_decode.py [code]")
    max_new_tokens: int = flag(8192, "longest text [code]", 1)
    rows: int = flag(64, "texts written side by side", 1)
    seed: int = flag(0, "of everything: toy, sampling, order", 0)
    device: str = flag("auto", "auto, cpu or cuda")


TOY = {"eval_data": "toy", "steps": 100, "batch_tokens": 1024, "lr": 1e-3, "analysis": False,
       "max_new_tokens": 96}


def main(flags):
    check_run(flags)
    problems = load_problems(flags.data, seed=flags.seed)
    benchmarks = load_benchmarks([flags.eval_data])
    if flags.rounds > min(len(problems), flags.steps):
        raise InputError(f"--rounds {flags.rounds}: every round needs a problem and a step, there "
                         f"are {len(problems)} and {flags.steps}")
    retelling = hinted_decode.Flags(beta=flags.beta, analysis=flags.analysis, seed=flags.seed,
                                    max_new_tokens=flags.max_new_tokens, rows=flags.rows)
    model, tokenizer = load_model(flags.model, pick_device(flags.device), flags.seed)
    idft.checkpoint_activations(model, above=idft.KEEP)
    writer = hinted_decode.Writer(model, tokenizer, problems, retelling)
    optimizer = idft.new_optimizer(model)
    out, _ = open_run(flags, data=problems, eval_data=benchmarks,
                      model=fingerprint(model, tokenizer))
    run = idft.Run(flags, model, tokenizer, optimizer, None, benchmarks, {"step": 0}, out)
    run.measure("before")

    for number in range(flags.rounds):
        part = writer.problems[number::flags.rounds]
        texts = hinted_decode.kept(writer.rewrite(part))
        own = sum(text["source"] == "own" for text in texts)
        print(f"round {number + 1}: {len(part)} problems, {own} answered rightly, "
              f"{len(texts) - own} retold rightly")
        first = number * flags.steps // flags.rounds
        run.state["step"] = (number + 1) * flags.steps // flags.rounds
        if texts:                                      # a round without a text loses its steps
            train_on_texts(model, tokenizer, texts, optimizer, range(first, run.state["step"]),
                           flags, out)
        write_rows(out / f"round-{number + 1}.jsonl", texts)
        idft.save_checkpoint(out, model, tokenizer, optimizer, run.state)
    run.end()


if __name__ == "__main__":
    run_script(main, Flags, TOY)
