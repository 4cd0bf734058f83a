"""
texts.py - which text to learn from: demonstrations, or the model's own telling of them.

Four kinds of text for the same problems, each with SFT and with IDFT, tuned as sweep.py says. A step
learns from the same number of tokens whatever the length of the texts.

    raw               the demonstrations as they are
    self-distilled    retold with beta 0: the hinted stream alone
    hinted            retold by hinted decoding, beta 3
    online            hinted, in four rounds: each retells a quarter of the problems with the model
                      as it then is

What the model answers rightly by itself is kept as it is, and what comes out wrong is dropped, as in
hinted_decode.py. Beside the accuracy stands the cost: seconds and tokens of writing the texts, right
or wrong, and of training on them.

    python -m experiments.texts
"""

import time

import numpy as np
import torch

import hinted_decode
import idft
import toy
from eval import demo_ids, load_model, prompt_ids, run_script
from experiments.sweep import SPLITS, Flags, compare, measure, results_file

KINDS = {"raw": {"rounds": 0}, "self-distilled": {"rounds": 1, "beta": 0.0},
         "hinted": {"rounds": 1, "beta": 3.0}, "online": {"rounds": 4, "beta": 3.0}}
ARMS = {}
for kind, settings in KINDS.items():
    for loss in ("sft", "idft"):
        ARMS[f"{kind}, {loss}"] = {**settings, "loss": loss}
BATCH_TOKENS = 1024                                    # of one optimizer step

COLUMNS = {split: split for split in SPLITS}
COLUMNS |= {"texts": "texts", "s writing": "seconds_before", "tokens written": "tokens_before",
            "s trained": "seconds_trained", "tokens trained": "tokens_trained"}


def token_batch(rows, tokens, step, seed):
    """Random rows (prompt ids, response ids) until their responses hold `tokens` tokens."""
    rng = np.random.default_rng((seed, step))
    batch = []
    while tokens > 0:
        batch.append(rows[rng.integers(len(rows))])
        tokens -= len(batch[-1][1])
    return batch


def write_texts(model, tokenizer, problems, arm, seed):
    """Retell problems -> those whose text is right, with it as their solution; tokens written."""
    settings = {**hinted_decode.TOY, "beta": arm["beta"], "seed": seed}
    flags = hinted_decode.Flags(**settings)
    sampler, table, problems = hinted_decode.two_streams(model, tokenizer, problems, flags)
    rows = hinted_decode.rewrite(model, tokenizer, sampler, table, problems, flags)
    return hinted_decode.kept(rows), sum(row["tokens"] for row in rows)


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    steps, rounds = arm["steps"], arm["rounds"]
    model, tokenizer = load_model("toy", torch.device("cpu"), seed)
    problems = toy.problems("train", seed=seed)
    flags = idft.Flags(loss=arm["loss"], lr=lr, seed=seed)
    optimizer = idft.new_optimizer(model, flags.weight_decay)
    spent = {"texts": 0, "seconds_before": 0.0, "tokens_before": 0,
             "seconds_trained": 0.0, "tokens_trained": 0}
    for number in range(max(1, rounds)):
        start = time.process_time()
        texts = problems[number::max(1, rounds)]
        if rounds:
            texts, tokens = write_texts(model, tokenizer, texts, arm, seed)
            spent["tokens_before"] += tokens
        rows = []
        for text in texts:
            rows.append((prompt_ids(tokenizer, text["problem"]),
                         demo_ids(tokenizer, text["solution"])))
        spent["texts"] += len(rows)
        middle = time.process_time()
        # A round without a right text has nothing to teach: its steps are lost.
        first = number * steps // max(1, rounds)
        last = (number + 1) * steps // max(1, rounds)
        for step in range(first, last if rows else first):
            rate = idft.learning_rate(step, steps, lr, flags.warmup)
            batch = token_batch(rows, BATCH_TOKENS, step, seed)
            row = idft.supervised_step(model, optimizer, batch, rate, flags)
            spent["tokens_trained"] += row["tokens"]
        spent["seconds_before"] += middle - start
        spent["seconds_trained"] += time.process_time() - middle
    return {**measure(model, tokenizer, stage, arm["max_new_tokens"]), **spent}


def main(flags):
    common = {name: idft.TOY[name] for name in ("steps", "max_new_tokens")}
    compare(results_file(flags, "texts"), run, ARMS, common, flags, COLUMNS)


if __name__ == "__main__":
    run_script(main, Flags)
