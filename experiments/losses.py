"""
losses.py - what to do with a demonstration: eight supervised losses and two preference losses.

All learn from the same demonstrations in the same number of steps and about the same number of
tokens: a supervised step reads `batch` demonstrations, a step of DPO or SimPO batch / 2 pairs.
Beside the accuracy stands the cost, so that "at the cost of SFT" is a number: what was sampled
(and, for DPO's reference, read) before training, and what was trained.

    sft, dft, idft      weight 1, p, p^gamma with gamma = exp(-phi)
    reversed gamma      IDFT with gamma = exp(+phi): loud where IDFT is quiet
    phi > -1 ... -10    SFT that leaves out the tokens whose phi is lower
    dpo, simpo          preference.py

    python -m experiments.losses
    python -m experiments.losses --arms sft dpo --table
"""

import time

import torch

import idft
from ddt import cll
from eval import run_script
from experiments.preference import make_pairs, pair_tokens, preference_step, reference_logp
from experiments.rl import new_world, supervised_steps
from experiments.sweep import SPLITS, Flags, measure, results_file, sweep

ARMS = {
    "sft": {"loss": "sft"},
    "dft": {"loss": "dft"},
    "idft": {"loss": "idft"},
    "reversed gamma": {"loss": "reversed"},
    "phi > -1": {"loss": "mask", "limit": -1},
    "phi > -3": {"loss": "mask", "limit": -3},
    "phi > -5": {"loss": "mask", "limit": -5},
    "phi > -10": {"loss": "mask", "limit": -10},
    "dpo": {"loss": "dpo"},
    "simpo": {"loss": "simpo"},
}
GRID = (1e-4, 3e-4, 1e-3, 3e-3)                  # preferences want smaller rates
SAMPLES = 8                                      # own answers a problem, of which pairs are made

COLUMNS = {split: split for split in SPLITS}
COLUMNS |= {"s before": "seconds_before", "tokens before": "tokens_before",
            "s trained": "seconds_trained", "tokens trained": "tokens_trained"}


def reversed_weight(logp, entropy, loss, beta, gamma_min, gamma_max, strength):
    """w = p^gamma with gamma = exp(+phi / beta): the other sign. Arguments of idft.token_weight."""
    logp, entropy = logp.detach(), entropy.detach()
    gamma = torch.exp(cll(logp, entropy) / beta).clamp(gamma_min, gamma_max)
    return torch.exp((1 + strength * (gamma - 1)) * logp)


def mask_weight(limit):
    """-> the weight 1 where phi > limit and 0 elsewhere, with the arguments of token_weight."""
    def weigh(logp, entropy, loss, beta, gamma_min, gamma_max, strength):
        return (cll(logp, entropy).detach() > limit).float()
    return weigh


def weight_of(arm):
    """The function that weighs the tokens of a supervised arm."""
    if arm["loss"] == "reversed":
        return reversed_weight
    if arm["loss"] == "mask":
        return mask_weight(arm["limit"])
    return idft.token_weight


def preference_steps(model, pairs, reference, flags, loss):
    """-> learn(step), on batch / 2 pairs: as many sequences as a supervised step reads."""
    optimizer = idft.new_optimizer(model)

    def learn(step):
        numbers = idft.draw_batch(range(len(pairs)), flags.batch // 2, step, flags.seed)
        batch = [pairs[i] for i in numbers]
        known = [reference[i] for i in numbers]
        lr = idft.learning_rate(step, flags.steps, flags.lr, flags.warmup)
        row = preference_step(model, optimizer, batch, known, lr, flags.micro_tokens, loss)
        return row["tokens"], 0
    return learn


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    flags = idft.Flags(steps=arm["steps"], batch=arm["batch"], lr=lr, seed=seed)
    model, tokenizer, problems, sampler, room = new_world(seed, arm["max_new_tokens"])

    # Before training: preferences need answers of the model's own, DPO also reads its reference.
    start = time.process_time()
    before = 0
    if arm["loss"] in ("dpo", "simpo"):
        pairs, before = make_pairs(sampler, model, tokenizer, problems, SAMPLES, room, seed)
        reference = [(0.0, 0.0)] * len(pairs)
        if arm["loss"] == "dpo":
            reference = reference_logp(model, pairs, flags.micro_tokens)
            before += pair_tokens(pairs)
        learn = preference_steps(model, pairs, reference, flags, arm["loss"])
    else:
        if arm["loss"] in ("sft", "dft", "idft"):
            flags.loss = arm["loss"]
        learn = supervised_steps(model, problems, flags, weight_of(arm))

    # Training, the same number of steps for all.
    middle = time.process_time()
    trained = 0
    for step in range(flags.steps):
        trained += learn(step)[0]
    spent = {"seconds_before": middle - start, "tokens_before": before,
             "seconds_trained": time.process_time() - middle, "tokens_trained": trained}
    return {**measure(model, tokenizer, stage, room, sampler), **spent}


def main(flags):
    common = {name: idft.TOY[name] for name in ("steps", "batch", "max_new_tokens")}
    sweep(results_file(flags, "losses"), run, ARMS, common, flags, COLUMNS, GRID)


if __name__ == "__main__":
    run_script(main, Flags)
