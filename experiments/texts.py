"""
texts.py - which text to learn from: demonstrations, or the model's own telling of them.

Four kinds of text for the same problems, each with SFT and with IDFT, tuned as sweep.py says. A
step learns from the same number of tokens whatever the length of the texts (online.py).

    raw               the demonstrations as they are
    self-distilled    retold with beta 0: the hinted stream alone
    hinted            retold by hinted decoding, beta 3
    online            hinted, in four rounds: each retells a quarter of the problems with the model
                      as it then is

What the model answers rightly by itself is kept, and what comes out wrong is dropped, as in
hinted_decode.py. Beside the accuracy stands the cost: seconds of writing the texts and tokens of
what was written in the end, right or wrong; seconds and tokens of training.

    python -m experiments.texts
"""

import time

import torch

import hinted_decode
import idft
import toy
from eval import load_model, run_script
from experiments import online
from experiments.sweep import SPLITS, Flags, measure, results_file, sweep

KINDS = {
    "raw": {"rounds": 0},
    "self-distilled": {"rounds": 1, "beta": 0.0},
    "hinted": {"rounds": 1, "beta": 3.0},
    "online": {"rounds": 4, "beta": 3.0},
}
ARMS = {}
for kind, settings in KINDS.items():
    for loss in ("sft", "idft"):
        ARMS[f"{kind}, {loss}"] = {**settings, "loss": loss}

COLUMNS = {split: split for split in SPLITS}
COLUMNS |= {"texts": "texts", "s writing": "seconds_before", "tokens written": "tokens_before",
            "s trained": "seconds_trained", "tokens trained": "tokens_trained"}


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    steps, rounds = arm["steps"], max(1, arm["rounds"])
    training = online.Flags(steps=steps, batch_tokens=arm["batch_tokens"], loss=arm["loss"], lr=lr,
                            seed=seed)
    writing = hinted_decode.Flags(beta=arm.get("beta", 0.0), analysis=False, seed=seed,
                                  max_new_tokens=arm["max_new_tokens"])
    model, tokenizer = load_model("toy", torch.device("cpu"), seed)
    writer = hinted_decode.Writer(model, tokenizer, toy.problems("train", seed=seed), writing)
    optimizer = idft.new_optimizer(model)
    spent = {"texts": 0, "seconds_before": 0.0, "tokens_before": 0,
             "seconds_trained": 0.0, "tokens_trained": 0}

    for number in range(rounds):
        # Write: this round's share of the problems, with the model as it now is.
        start = time.process_time()
        texts = writer.problems[number::rounds]
        if arm["rounds"]:
            rows = writer.rewrite(texts)
            texts = hinted_decode.kept(rows)
            spent["tokens_before"] += sum(row["tokens"] for row in rows)
        spent["texts"] += len(texts)
        middle = time.process_time()
        spent["seconds_before"] += middle - start

        # Train: this round's share of the steps. Without a right text they are lost.
        part = range(number * steps // rounds, (number + 1) * steps // rounds)
        if texts:
            spent["tokens_trained"] += online.train_on_texts(model, tokenizer, texts, optimizer,
                                                             part, training)
        spent["seconds_trained"] += time.process_time() - middle
    return {**measure(model, tokenizer, stage, arm["max_new_tokens"]), **spent}


def main(flags):
    common = {name: online.TOY[name] for name in ("steps", "batch_tokens", "max_new_tokens")}
    sweep(results_file(flags, "texts"), run, ARMS, common, flags, COLUMNS)


if __name__ == "__main__":
    run_script(main, Flags)
