"""
rl.py - Prefix-RFT and its relatives on the toy, each tuned, each on five seeds.

Every arm gets the same training problems, the same number of optimizer batches and the same number
of sequences in each: a supervised arm reads batch * n demonstrations where a policy arm learns from
batch * n rollouts, and SFT-then-RFT spends half of the steps on each. Rates are tuned as sweep.py
says; SFT-then-RFT has one rate for both halves.

An arm is a dict:
    supervised    share of the steps that learns from demonstrations, first; with "loss"
    method        the row of METHODS for the other steps; "flags" on top of it
    data          arguments of experts.problems: wrong demonstrations, weaker experts
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
from experiments import experts, relatives
from experiments.sweep import SPLITS, Flags, learning_curve, measure, results_file, sweep

METHODS = {**prefix_rft.METHODS, **relatives.METHODS}

MAIN = {
    "base": {"lr": 0.0, "steps": 0, "samples": 64},
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

# Ablations, changes of the data and longer runs inherit the rate of the arm that they change.
ARMS = dict(MAIN)
for name, flags in ABLATIONS.items():
    ARMS[name] = {"method": "prefix_rft", "flags": flags, "tune_like": "prefix_rft"}
for name, change in DATA.items():
    for method in ("prefix_rft", "sft_rft"):
        ARMS[f"{method}, {name}"] = {**MAIN[method], **change, "samples": 8, "tune_like": method}

for name in ("prefix_rft", "luffy", "sft_rft", "sft", "rft"):
    ARMS[f"{name}, 80 batches"] = {**MAIN[name], "steps": 80, "samples": 8, "tune_like": name}

COLUMNS = {split: split for split in SPLITS}
COLUMNS |= {"pass@1": "pass@1", "pass@8": "pass@8", "pass@64": "pass@64",
            "area under curve": "auc", "steps to 0.5": "steps_to_half", "seconds": "seconds"}


def new_world(seed, max_new_tokens, demo_share=1.0, **data):
    """The toy of a seed: model, tokenizer, training problems (as from prepare_problems), a sampler
    with room for them and for every test, and that room. data: arguments of experts.problems."""
    model, tokenizer = load_model("toy", torch.device("cpu"), seed)
    problems = experts.problems("train", seed=seed, **data)
    problems = prefix_rft.prepare_problems(tokenizer, problems, max_new_tokens)
    keep_demonstrations(problems, demo_share, seed)
    prompts = [problem["prompt"] for problem in problems]
    for problem in toy.problems("longer"):
        prompts.append(prompt_ids(tokenizer, problem["problem"]))
    # One sampler serves rollouts, curves and tests.
    sampler, room = new_sampler(model, prompts, max_new_tokens, prefix_rft.TOY["rows"])
    return model, tokenizer, problems, sampler, room


def keep_demonstrations(problems, share, seed):
    """Take the demonstrations away from all but a random share of the problems, at least one."""
    order = np.random.default_rng((seed, 1)).permutation(len(problems))
    count = max(1, round(share * len(problems)))
    for i in order[count:]:
        problems[i]["demos"] = []


def supervised_steps(model, problems, flags, weigh=idft.token_weight):
    """-> learn(step), a step of idft.train_supervised on the demonstrations; it returns the tokens
    trained and the tokens sampled."""
    optimizer = idft.new_optimizer(model)
    rows = []
    for problem in problems:
        for demo in problem["demos"]:
            rows.append((problem["prompt"], demo))

    def learn(step):
        batch = idft.draw_batch(rows, flags.batch, step, flags.seed)
        lr = idft.learning_rate(step, flags.steps, flags.lr, flags.warmup)
        row = idft.supervised_step(model, optimizer, batch, lr, flags, weigh=weigh)
        return row["tokens"], 0
    return learn


def policy_steps(model, tokenizer, problems, flags, sampler):
    """-> learn(step), a step of prefix_rft.train_policy; it returns the same."""
    optimizer = idft.new_optimizer(model)
    stop = stop_ids(model, tokenizer)
    variant = relatives.VARIANTS.get(flags.method, {})

    def learn(step):
        # Roll out with the policy as it is, score, update: in --mini_batches optimizer steps.
        sampler.sync(model)
        batch = idft.draw_batch(problems, flags.batch, step, flags.seed)
        rollouts = prefix_rft.sample_rollouts(sampler, tokenizer, batch, flags, step, stop,
                                              **variant.get("starting", {}))
        generator = torch.Generator().manual_seed(flags.seed * 1_000_003 + step)
        row = prefix_rft.update(model, optimizer, rollouts, flags, generator,
                                **variant.get("learning", {}))
        return row["update_tokens"], prefix_rft.describe(rollouts)["tokens"]
    return learn


def policy_flags(arm, steps, lr, seed):
    """prefix_rft.Flags of an arm: the toy's defaults, its method's, its own."""
    # What stands later wins.
    settings = {**prefix_rft.TOY}
    if "method" in arm:
        settings |= {"method": arm["method"], **METHODS[arm["method"]]}
    settings |= arm.get("flags", {})
    settings |= {"steps": steps, "lr": lr, "seed": seed}
    return prefix_rft.Flags(**settings)


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    steps = arm["steps"]
    first = round(arm.get("supervised", 0) * steps)                # supervised steps
    flags = policy_flags(arm, steps - first, lr, seed)

    # The world of this seed; the same for every arm but for its demonstrations.
    model, tokenizer, problems, sampler, room = new_world(
        seed, flags.max_new_tokens, arm.get("demo_share", 1.0), **arm.get("data", {}))

    # Most arms have one of these two halves. Each has an optimizer of its own.
    if first:
        reading = idft.Flags(loss=arm["loss"], steps=first, batch=flags.batch * flags.n, lr=lr,
                             seed=seed)
        imitate = supervised_steps(model, problems, reading)
    explore = policy_steps(model, tokenizer, problems, flags, sampler)
    spent = {"tokens_trained": 0, "tokens_sampled": 0}

    def learn(step):
        if step < first:
            trained, sampled = imitate(step)
        else:
            trained, sampled = explore(step - first)
        spent["tokens_trained"] += trained
        spent["tokens_sampled"] += sampled

    # Tuning needs no curve.
    curve = {}
    if stage == "report":
        curve = learning_curve(model, tokenizer, steps, learn, room, sampler)
    else:
        for step in range(steps):
            learn(step)
    row = measure(model, tokenizer, stage, room, sampler, arm.get("samples", 8))
    return {**row, **curve, **spent}


def main(flags):
    common = {name: prefix_rft.TOY[name] for name in ("steps", "batch", "max_new_tokens")}
    sweep(results_file(flags, "rl"), run, ARMS, common, flags, COLUMNS)


if __name__ == "__main__":
    run_script(main, Flags)
