"""
losses.py - what to do with a demonstration: supervised losses and two preference losses.

All learn from the same demonstrations in the same number of steps and about the same number of
tokens: a supervised step reads `batch` demonstrations, a step of DPO or SimPO batch / 2 pairs.
Beside the accuracy stands the cost, so that "at the cost of SFT" is a number: what was sampled
(and, for DPO's reference, read) before training, and what was trained.

    sft, dft, idft      weight 1, p, p^gamma with gamma = exp(-phi), at most 2
    gamma_max 1, 0.5    IDFT whose gamma is at most that
    clip 5              IDFT with the paper's clip, gamma = exp(-clip(phi, -5, 5))
    reversed gamma      IDFT with gamma = exp(+phi): loud where IDFT is quiet
    eaft                weight H / log|V|
    phi > -1 ... -10    SFT that leaves out the tokens whose phi is lower
    dpo, simpo          preference.py, from the base, which is next to never right
    sft, then dpo       half of the steps are SFT; the pairs come from the model that this made

    python -m experiments.losses
    python -m experiments.losses --arms sft dpo --table
"""

import math
import time

import idft
import toy
from eval import greedy_accuracy, run_script
from experiments.preference import make_pairs, pair_tokens, preference_step, reference_logp
from experiments.rl import new_world, supervised_steps
from experiments.sweep import SPLITS, Flags, measure, results_file, sweep
from experiments.weights import weight_of

CLIP_5 = (math.exp(-5), math.exp(5))
ARMS = {
    "sft": {"loss": "sft"},
    "dft": {"loss": "dft"},
    "idft": {"loss": "idft"},
    "idft, gamma_max 1": {"loss": "idft", "weighting": {"gamma_max": 1.0}},
    "idft, gamma_max 0.5": {"loss": "idft", "weighting": {"gamma_max": 0.5}},
    "idft, clip 5": {"loss": "idft", "weighting": {"gamma_min": CLIP_5[0], "gamma_max": CLIP_5[1]}},
    "reversed gamma": {"loss": "reversed"},
    "eaft": {"loss": "eaft"},
    "phi > -1": {"loss": "mask", "limit": -1},
    "phi > -3": {"loss": "mask", "limit": -3},
    "phi > -5": {"loss": "mask", "limit": -5},
    "phi > -10": {"loss": "mask", "limit": -10},
    "dpo": {"loss": "dpo"},
    "simpo": {"loss": "simpo"},
    # From a model that is sometimes right; the first half at the rate that is best for sft.
    "sft, then dpo": {"loss": "dpo", "first": "sft", "sft_lr": 3e-4},
    "sft, then simpo": {"loss": "simpo", "first": "sft", "sft_lr": 3e-4},
}
SAMPLES = 8                                      # own answers a problem, of which pairs are made

COLUMNS = {split: split for split in SPLITS}
COLUMNS |= {"hard after SFT": "hard_before", "tokens before": "tokens_before",
            "tokens trained": "tokens_trained"}


def preference_steps(model, pairs, reference, flags, loss):
    """-> learn(step), on batch / 2 pairs: as many sequences as a supervised step reads."""
    optimizer = idft.new_optimizer(model)

    def learn(step):
        numbers = idft.draw_batch(range(len(pairs)), flags.batch // 2, step, flags.seed)
        batch = [pairs[i] for i in numbers]
        known = [reference[i] for i in numbers]
        lr = idft.learning_rate(step, flags.steps, flags.lr, flags.warmup)
        row = preference_step(model, optimizer, batch, known, lr, flags.micro_tokens, loss)
        return row["tokens"], 0, 1
    return learn


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    flags = idft.Flags(steps=arm["steps"], batch=arm["batch"], lr=lr, seed=seed,
                       **arm.get("weighting", {}))
    model, tokenizer, problems, sampler, room = new_world(seed, arm["max_new_tokens"])
    spent = {"hard_before": None, "tokens_before": 0, "tokens_trained": 0, "optimizer_steps": 0}
    start = time.process_time()
    seconds = 0.0

    # The first half of an arm of two stages.
    if "first" in arm:
        flags.steps = arm["steps"] // 2
        book = idft.Flags(loss="sft", steps=arm["steps"] - flags.steps, batch=arm["batch"],
                          lr=arm["sft_lr"], seed=seed)
        imitate = supervised_steps(model, problems, book)
        for step in range(book.steps):
            spent["tokens_trained"] += imitate(step)[0]
            spent["optimizer_steps"] += 1
        seconds += time.process_time() - start
        if stage == "report":
            test = {"hard": toy.problems("hard")}
            spent["hard_before"] = greedy_accuracy(model, tokenizer, test, room,
                                                   sampler=sampler)["hard"]

    # Before training: preferences need answers of the model's own, DPO also reads its reference.
    start = time.process_time()
    if arm["loss"] in ("dpo", "simpo"):
        pairs, tokens = make_pairs(sampler, model, tokenizer, problems, SAMPLES, room, seed)
        spent["tokens_before"] = tokens
        reference = [(0.0, 0.0)] * len(pairs)
        if arm["loss"] == "dpo":
            reference = reference_logp(model, pairs, flags.micro_tokens)
            spent["tokens_before"] += pair_tokens(pairs)
        learn = preference_steps(model, pairs, reference, flags, arm["loss"])
    else:
        if arm["loss"] in ("sft", "dft", "idft"):
            flags.loss = arm["loss"]
        learn = supervised_steps(model, problems, flags, weight_of(arm, len(tokenizer)))

    # Training, the same number of steps for all.
    middle = time.process_time()
    for step in range(flags.steps):
        spent["tokens_trained"] += learn(step)[0]
        spent["optimizer_steps"] += 1
    spent["seconds_before"] = middle - start
    spent["seconds_trained"] = seconds + time.process_time() - middle
    return {**measure(model, tokenizer, stage, room, sampler), **spent}


def main(flags):
    common = {name: idft.TOY[name] for name in ("steps", "batch", "max_new_tokens")}
    sweep(results_file(flags, "losses"), run, ARMS, common, flags, COLUMNS)


if __name__ == "__main__":
    run_script(main, Flags)
