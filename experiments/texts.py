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
from experiments.sweep import SPLITS, Flags, measure, results_file, sweep

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


def write_texts(model, tokenizer, problems, beta, seed):
    """Retell problems -> those whose text is right, with it as their solution; tokens written."""
    flags = hinted_decode.Flags(**{**hinted_decode.TOY, "beta": beta, "seed": seed})
    sampler, table, problems = hinted_decode.two_streams(model, tokenizer, problems, flags)
    rows = hinted_decode.rewrite(model, tokenizer, sampler, table, problems, flags)
    return hinted_decode.kept(rows), sum(row["tokens"] for row in rows)


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    steps, rounds = arm["steps"], max(1, arm["rounds"])
    model, tokenizer = load_model("toy", torch.device("cpu"), seed)
    problems = toy.problems("train", seed=seed)
    flags = idft.Flags(loss=arm["loss"])
    optimizer = idft.new_optimizer(model)
    spent = {"texts": 0, "seconds_before": 0.0, "tokens_before": 0,
             "seconds_trained": 0.0, "tokens_trained": 0}

    for number in range(rounds):
        # Write: the share of this round, with the model as it is now.
        start = time.process_time()
        texts = problems[number::rounds]
        if arm["rounds"]:
            texts, tokens = write_texts(model, tokenizer, texts, arm["beta"], seed)
            spent["tokens_before"] += tokens
        rows = []
        for text in texts:
            demo = demo_ids(tokenizer, text["solution"])
            rows.append((prompt_ids(tokenizer, text["problem"]), demo))
        spent["texts"] += len(rows)
        spent["seconds_before"] += time.process_time() - start

        # Train: the share of the steps. Without a right text there is nothing to learn.
        start = time.process_time()
        for step in range(number * steps // rounds, (number + 1) * steps // rounds):
            if rows:
                rate = idft.learning_rate(step, steps, lr)
                batch = token_batch(rows, BATCH_TOKENS, step, seed)
                row = idft.supervised_step(model, optimizer, batch, rate, flags)
                spent["tokens_trained"] += row["tokens"]
        spent["seconds_trained"] += time.process_time() - start
    return {**measure(model, tokenizer, stage, arm["max_new_tokens"]), **spent}


def main(flags):
    common = {name: idft.TOY[name] for name in ("steps", "max_new_tokens")}
    sweep(results_file(flags, "texts"), run, ARMS, common, flags, COLUMNS)


if __name__ == "__main__":
    run_script(main, Flags)
