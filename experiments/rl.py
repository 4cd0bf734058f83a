"""
rl.py - Prefix-RFT and its relatives on the toy, each tuned, each on five seeds.

Every arm gets the same training problems, the same number of optimizer batches and the same number
of sequences in each: a supervised arm reads batch * n demonstrations where a policy arm learns from
batch * n rollouts, and SFT-then-RFT spends half of the steps on each. Rates are tuned as sweep.py
says; SFT-then-RFT has one rate for both halves.

An arm is a dict:
    supervised    share of the steps that learns from demonstrations, first; with "loss"
    method        the row of prefix_rft.METHODS for the other steps; "flags" on top of it
    data          arguments of toy.problems: wrong demonstrations, weaker experts
    demo_share    share of the problems that keep their demonstration
    samples       answers a problem for pass@k, if not 8

    python -m experiments.rl                                   everything
    python -m experiments.rl --arms base sft rft prefix_rft    some arms
    python -m experiments.rl --table                           the table of what has been run
"""

import numpy as np
import torch

import idft
import prefix_rft
import toy
from eval import load_model, new_sampler, prompt_ids, run_script, stop_ids
from experiments.sweep import (SPLITS, Flags, compare, learning_curve, measure, results_file)

MAIN = {
    "base": {"lr": 0.0, "samples": 64},
    "sft": {"supervised": 1.0, "loss": "sft"},
    "dft": {"supervised": 1.0, "loss": "dft"},
    "idft": {"supervised": 1.0, "loss": "idft"},
    "rft": {"method": "rft", "samples": 64},
    "sft_rft": {"supervised": 0.5, "loss": "sft", "method": "rft", "samples": 64},
    "luffy": {"method": "luffy", "samples": 64},
    "luffy code": {"method": "luffy", "flags": {"advantage": "code"}},
    "uft": {"method": "uft"},
    "prefix_rl": {"method": "prefix_rl"},
    "frozen": {"method": "frozen"},
    "static": {"method": "static"},
    "prefix_rft": {"method": "prefix_rft", "samples": 64},
    "prefix_rft code": {"method": "prefix_rft", "flags": {"advantage": "code"}},
}

ABLATIONS = {
    "keep 50 %": {"keep": 0.5},
    "keep 80 %": {"keep": 0.8},
    "keep all": {"prefix_loss": "all"},
    "keep random": {"prefix_loss": "random"},
    "keep bottom": {"prefix_loss": "bottom"},
    "linear": {"schedule": "linear"},
    "uniform": {"schedule": "uniform"},
    "2 hybrids": {"hybrids": 2},
    "4 hybrids": {"hybrids": 4},
}

DATA = {
    "10 % demos": {"demo_share": 0.1},
    "1 % demos": {"demo_share": 0.01},
    "30 % wrong": {"data": {"wrong": 0.3}},
    "60 % wrong": {"data": {"wrong": 0.6}},
    "terse expert": {"data": {"expert": "terse"}},
    "erring expert": {"data": {"expert": "errs"}},
    "detours": {"data": {"expert": "detours"}},
}

# Ablations and changes of the data inherit the rate of the arm that they change.
ARMS = dict(MAIN)
for name, flags in ABLATIONS.items():
    ARMS[name] = {"method": "prefix_rft", "flags": flags, "tune_like": "prefix_rft"}
for name, change in DATA.items():
    for method in ("prefix_rft", "sft_rft"):
        ARMS[f"{method}, {name}"] = {**MAIN[method], **change, "samples": 8, "tune_like": method}

COLUMNS = {split: split for split in SPLITS}
COLUMNS |= {"pass@1": "pass@1", "pass@8": "pass@8", "pass@64": "pass@64",
            "area under curve": "auc", "steps to 0.5": "steps_to_half", "seconds": "seconds"}


def keep_demonstrations(problems, share, seed):
    """Problems (as from prefix_rft.prepare_problems) of which only a random share, at least one,
    keeps "demos"."""
    order = np.random.default_rng((seed, 1)).permutation(len(problems))
    keep = max(1, round(share * len(problems)))
    for i in order[keep:]:
        problems[i] = {**problems[i], "demos": []}
    return problems


def supervised_steps(model, rows, flags, weigh=idft.token_weight):
    """-> learn(step), a step of idft.train_supervised on rows of (prompt ids, response ids)."""
    optimizer = idft.new_optimizer(model, flags.weight_decay)

    def learn(step):
        chosen = idft.draw_batch(len(rows), flags.batch, step, flags.seed)
        lr = idft.learning_rate(step, flags.steps, flags.lr, flags.warmup)
        batch = [rows[i] for i in chosen]
        row = idft.supervised_step(model, optimizer, batch, lr, flags, weigh=weigh)
        return {"tokens_trained": row["tokens"], "tokens_sampled": 0}
    return learn


def policy_steps(model, tokenizer, problems, flags, sampler):
    """-> learn(step), a step of prefix_rft.train_policy."""
    optimizer = idft.new_optimizer(model, flags.weight_decay)
    stop = stop_ids(model, tokenizer)

    def learn(step):
        sampler.sync(model)
        chosen = idft.draw_batch(len(problems), flags.batch, step, flags.seed)
        rollouts = prefix_rft.sample_rollouts(sampler, tokenizer, [problems[i] for i in chosen],
                                              flags, step, stop)
        generator = torch.Generator().manual_seed(flags.seed * 1_000_003 + step)
        row = prefix_rft.update(model, optimizer, rollouts, flags, generator)
        written = sum(len(r.response) - r.prefix_length for r in rollouts)
        return {"tokens_trained": row["update_tokens"], "tokens_sampled": written}
    return learn


def policy_flags(arm, steps, lr, seed):
    """prefix_rft.Flags of an arm: the toy's defaults, its method's, its own."""
    method = arm.get("method", "rft")
    settings = {**prefix_rft.TOY, **prefix_rft.METHODS[method], "method": method}
    settings |= {**arm.get("flags", {}), "steps": steps, "lr": lr, "seed": seed}
    return prefix_rft.Flags(**settings)


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    steps = 0 if lr == 0 else arm["steps"]
    first = round(arm.get("supervised", 0.0) * steps)              # supervised steps
    flags = policy_flags(arm, steps - first, lr, seed)

    # The world: a base of this seed, its training problems, a sampler that fits every prompt.
    model, tokenizer = load_model("toy", torch.device("cpu"), seed)
    problems = toy.problems("train", seed=seed, **arm.get("data", {}))
    problems = prefix_rft.prepare_problems(tokenizer, problems, flags.max_new_tokens)
    problems = keep_demonstrations(problems, arm.get("demo_share", 1.0), seed)
    prompts = [problem["prompt"] for problem in problems]
    prompts += [prompt_ids(tokenizer, problem["problem"]) for problem in toy.problems("longer")]
    sampler, room = new_sampler(model, prompts, flags.max_new_tokens, flags.rows)

    # The two halves; most arms have one. Both keep their own optimizer.
    if first:
        rows = [(problem["prompt"], demo) for problem in problems for demo in problem["demos"]]
        reading = idft.Flags(loss=arm["loss"], lr=lr, steps=first, batch=flags.batch * flags.n,
                             seed=seed)
        imitate = supervised_steps(model, rows, reading)
    explore = policy_steps(model, tokenizer, problems, flags, sampler)
    spent = {"tokens_trained": 0, "tokens_sampled": 0}

    def learn(step):
        cost = imitate(step) if step < first else explore(step - first)
        for key, tokens in cost.items():
            spent[key] += tokens

    curve = learning_curve(model, tokenizer, steps, learn, room, sampler, look=stage == "report")
    samples = arm.get("samples", 8)
    row = measure(model, tokenizer, stage, room, sampler, samples, 64 if samples == 64 else 128)
    return {**row, **curve, **spent}


def main(flags):
    common = {name: prefix_rft.TOY[name] for name in ("steps", "batch", "max_new_tokens")}
    compare(results_file(flags, "rl"), run, ARMS, common, flags, COLUMNS)


if __name__ == "__main__":
    run_script(main, Flags)
