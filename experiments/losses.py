"""
losses.py - what to do with a demonstration: eight supervised losses and two preference losses.

All learn from the same demonstrations in the same number of steps and about the same number of
tokens: a supervised step reads `batch` demonstrations, a step of DPO or SimPO batch / 2 pairs.
Beside the accuracy stands the cost, so that "at the cost of SFT" is a number: what was sampled (and,
for DPO's reference, read) before training, and what was trained.

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
import toy
from ddt import cll
from eval import load_model, new_sampler, prompt_ids, run_script
from experiments.preference import make_pairs, preference_step, reference_logp
from experiments.rl import supervised_steps
from experiments.sweep import SPLITS, Flags, compare, measure, results_file
from prefix_rft import prepare_problems

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
    optimizer = idft.new_optimizer(model, flags.weight_decay)

    def learn(step):
        chosen = idft.draw_batch(len(pairs), flags.batch // 2, step, flags.seed)
        known = [reference[i] for i in chosen] if reference else None
        lr = idft.learning_rate(step, flags.steps, flags.lr, flags.warmup)
        batch = [pairs[i] for i in chosen]
        row = preference_step(model, optimizer, batch, known, lr, flags, loss)
        return {"tokens_trained": row["tokens"]}
    return learn


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    settings = {key: arm[key] for key in ("steps", "batch", "max_new_tokens")}
    loss = arm["loss"] if arm["loss"] in ("sft", "dft", "idft") else "sft"
    flags = idft.Flags(**settings, loss=loss, lr=lr, seed=seed)
    model, tokenizer = load_model("toy", torch.device("cpu"), seed)
    problems = toy.problems("train", seed=seed)
    problems = prepare_problems(tokenizer, problems, flags.max_new_tokens)
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in toy.problems("longer")]
    prompts += [problem["prompt"] for problem in problems]
    sampler, room = new_sampler(model, prompts, flags.max_new_tokens, 128)

    # Before training: preferences need answers of the model's own, DPO also its reference.
    start = time.process_time()
    before = 0
    if arm["loss"] in ("dpo", "simpo"):
        pairs, before = make_pairs(sampler, model, tokenizer, problems, SAMPLES, room, seed)
        reference = None
        if arm["loss"] == "dpo":
            reference = reference_logp(model, pairs, flags.micro_tokens)
            before += sum(len(right) + len(wrong) for _, right, wrong in pairs)
        learn = preference_steps(model, pairs, reference, flags, arm["loss"])
    else:
        rows = [(problem["prompt"], problem["demos"][0]) for problem in problems]
        learn = supervised_steps(model, rows, flags, weight_of(arm))

    middle = time.process_time()
    trained = 0
    for step in range(flags.steps):
        trained += learn(step)["tokens_trained"]
    spent = {"seconds_before": middle - start, "tokens_before": before,
             "seconds_trained": time.process_time() - middle, "tokens_trained": trained}
    return {**measure(model, tokenizer, stage, room, sampler), **spent}


def main(flags):
    common = {name: idft.TOY[name] for name in ("steps", "batch", "max_new_tokens")}
    compare(results_file(flags, "losses"), run, ARMS, common, flags, COLUMNS, GRID)


if __name__ == "__main__":
    run_script(main, Flags)
