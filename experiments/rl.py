"""
rl.py - Prefix-RFT and its relatives on the toy, each tuned, each on five seeds.

Every arm gets the same training problems and the same budget (function `budget`): as many sequences
in as many optimizer steps. A policy arm learns from a batch of batch * n rollouts in two steps of
half of them; so a supervised arm takes two steps of as many demonstrations, and SFT-then-RFT takes
the supervised ones first. Rates are tuned as sweep.py says; SFT-then-RFT has a rate for each stage,
and the share of the first is tuned, too.

An arm is a dict:
    supervised    share of the batches that reads demonstrations, first; with "loss"
    two_stages    the share and both rates are tuned
    weighting     arguments of idft.token_weight
    distill       who teaches, see distill.py
    method        the row of METHODS for the other batches; "flags" on top of it
    variant       the row of VARIANTS, if it is not that of the method
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
from hinted_decode import contexts
from experiments import distill, experts, hpt, relatives
from experiments.sweep import SPLITS, Flags, learning_curve, measure, results_file, sweep
from experiments.weights import weight_of

METHODS = {**prefix_rft.METHODS, **relatives.METHODS}


def own_decisions(adv, prefix, entropy, keep, how, generator):
    """In the place of entropy_clip: of what the model wrote, only the share `keep` of the highest
    entropy keeps its advantage."""
    return prefix_rft.entropy_clip(adv, ~prefix, entropy, keep, "top")


def finishable_window(step, total_steps, low_end, schedule):
    """In the place of prefix_window: half to three quarters of the demonstration. Behind that the
    base is right in 0.15 to 0.9 of its answers, behind 0.8 always."""
    return 0.5, 0.75


# Functions in the place of some of prefix_rft.py, as in relatives.py.
VARIANTS = {**relatives.VARIANTS, "own decisions": {"learning": {"entropy_clip": own_decisions}},
            "finishable": {"starting": {"prefix_window": finishable_window}},
            "hpt": hpt.VARIANT}

MAIN = {
    "base": {"lr": 0.0, "steps": 0, "samples": 64},
    "sft": {"supervised": 1.0, "loss": "sft"},
    "dft": {"supervised": 1.0, "loss": "dft"},
    "idft": {"supervised": 1.0, "loss": "idft"},
    "idft, gamma_max 1": {"supervised": 1.0, "loss": "idft", "weighting": {"gamma_max": 1.0}},
    "idft, gamma_max 0.5": {"supervised": 1.0, "loss": "idft", "weighting": {"gamma_max": 0.5}},
    "rft": {"method": "rft", "samples": 64},
    # Is it the clipping alone? That of prefix_rft, without a prefix.
    "rft, own top 20 %": {"method": "rft", "variant": "own decisions"},
    "sft_rft": {"two_stages": True, "loss": "sft", "method": "rft", "samples": 64},
    "luffy": {"method": "luffy", "samples": 64},
    "luffy code": {"method": "luffy", "flags": {"advantage": "code"}},
    "uft": {"method": "uft"},
    "prefix_rl": {"method": "prefix_rl"},
    # Prefixes behind which the base finds the end now and then, or always.
    "prefix_rl, long prefixes": {"method": "prefix_rl", "variant": "finishable"},
    "prefix_rl, longest prefixes": {"method": "prefix_rl", "flags": {"low_end": 0.8}},
    "dr_po": {"method": "dr_po"},
    "hpt": {"method": "rft", "variant": "hpt"},
    "frozen": {"method": "frozen"},
    "static": {"method": "static"},
    "prefix_rft": {"method": "prefix_rft", "samples": 64},
    "prefix_rft code": {"method": "prefix_rft", "flags": {"advantage": "code"}},
    "sdft": {"distill": "now"},
    "sdft, base teaches": {"distill": "base"},
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

N = prefix_rft.Flags().n                         # rollouts a problem
COLUMNS = {split: split for split in SPLITS}
COLUMNS |= {"pass@1": "pass@1", "pass@8": "pass@8", "area under curve": "auc",
            "easy when hard is 0.3": "easy_at_0.3", "optimizer steps": "optimizer_steps",
            "tokens sampled": "tokens_sampled", "tokens trained": "tokens_trained"}


def budget(arm):
    """What an arm may spend -> its batches of demonstrations, its batches of rollouts, and how many
    sequences an optimizer step learns from. The one place where this is decided: whatever the arm,
    steps * batch * n sequences in steps * mini_batches optimizer steps."""
    reading = round(arm.get("supervised", 0) * arm["steps"])
    sequences = arm["batch"] * arm.get("n", N) // arm["mini_batches"]
    return reading, arm["steps"] - reading, sequences


def new_world(seed, max_new_tokens, demo_share=1.0, **data):
    """The toy of a seed: model, tokenizer, training problems (as from prepare_problems), a sampler
    with room for them and for every test, and that room. Problems also have "hinted", the context
    in which the demonstration is seen. data: arguments of experts.problems."""
    model, tokenizer = load_model("toy", torch.device("cpu"), seed)
    told = experts.problems("train", seed=seed, **data)
    problems = prefix_rft.prepare_problems(tokenizer, told, max_new_tokens)
    for problem, row in zip(problems, told):
        problem["hinted"], _ = contexts(tokenizer, row)
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
    trained, the tokens sampled and the optimizer steps."""
    optimizer = idft.new_optimizer(model)
    rows = []
    for problem in problems:
        for demo in problem["demos"]:
            rows.append((problem["prompt"], demo))

    def learn(step):
        batch = idft.draw_batch(rows, flags.batch, step, flags.seed)
        lr = idft.learning_rate(step, flags.steps, flags.lr, flags.warmup)
        row = idft.supervised_step(model, optimizer, batch, lr, flags, weigh=weigh)
        return row["tokens"], 0, 1
    return learn


def policy_steps(model, tokenizer, problems, flags, sampler, name):
    """-> learn(batch), a step of prefix_rft.train_policy with the row `name` of VARIANTS, if there
    is one; it returns the same."""
    optimizer = idft.new_optimizer(model)
    stop = stop_ids(model, tokenizer)
    variant = VARIANTS.get(name, {})

    def learn(step):
        # Roll out with the policy as it is, score, update: in --mini_batches optimizer steps.
        sampler.sync(model)
        batch = idft.draw_batch(problems, flags.batch, step, flags.seed)
        rollouts = prefix_rft.sample_rollouts(sampler, tokenizer, batch, flags, step, stop,
                                              **variant.get("starting", {}))
        sampled = prefix_rft.describe(rollouts)["tokens"]
        if name == "hpt":
            rollouts = hpt.demonstrate_failures(rollouts, batch, flags.n)
        generator = torch.Generator().manual_seed(flags.seed * 1_000_003 + step)
        row = prefix_rft.update(model, optimizer, rollouts, flags, generator,
                                **variant.get("learning", {}))
        return row["update_tokens"], sampled, row["updates"]
    return learn


def policy_flags(arm, steps, lr, seed):
    """prefix_rft.Flags of an arm: the toy's defaults, its method's, its own."""
    # What stands later wins.
    settings = {**prefix_rft.TOY}
    if "method" in arm:
        settings |= {"method": arm["method"], **METHODS[arm["method"]]}
    settings |= arm.get("flags", {})
    settings |= {"steps": steps, "lr": lr, "seed": seed, "mini_batches": arm["mini_batches"]}
    return prefix_rft.Flags(**settings)


def run(arm, lr, seed, stage):
    """Train one arm on the toy of a seed -> its figures."""
    reading, exploring, sequences = budget(arm)
    updates = arm["mini_batches"]                              # optimizer steps a batch
    flags = policy_flags(arm, exploring, lr, seed)

    # The world of this seed; the same for every arm but for its demonstrations.
    model, tokenizer, problems, sampler, room = new_world(
        seed, flags.max_new_tokens, arm.get("demo_share", 1.0), **arm.get("data", {}))

    # Most arms have one of these two stages. Each has an optimizer of its own.
    if reading:
        book = idft.Flags(steps=reading * updates, batch=sequences, lr=arm.get("sft_lr", lr),
                          seed=seed, **arm.get("weighting", {}))
        if arm["loss"] in ("sft", "dft", "idft"):
            book.loss = arm["loss"]
        imitate = supervised_steps(model, problems, book, weight_of(arm, len(tokenizer)))
    if "distill" in arm:
        explore = distill.distill_steps(model, tokenizer, problems, flags, sampler, arm["distill"])
    else:
        variant = arm.get("variant", arm.get("method"))
        explore = policy_steps(model, tokenizer, problems, flags, sampler, variant)
    spent = {"tokens_trained": 0, "tokens_sampled": 0, "optimizer_steps": 0}

    def count(figures):
        for name, amount in zip(spent, figures):
            spent[name] += amount

    def learn(batch):
        if batch >= reading:
            count(explore(batch - reading))
        else:
            for i in range(updates):
                count(imitate(batch * updates + i))

    # Tuning needs no curve.
    curve = {}
    if stage == "report":
        curve = learning_curve(model, tokenizer, arm["steps"], learn, room, sampler)
    else:
        for batch in range(arm["steps"]):
            learn(batch)
    row = measure(model, tokenizer, stage, room, sampler, arm.get("samples", 8))
    return {**row, **curve, **spent}


def common_settings():
    """What all arms share."""
    common = {name: prefix_rft.TOY[name] for name in ("steps", "batch", "max_new_tokens")}
    return {**common, "mini_batches": prefix_rft.Flags().mini_batches}


def main(flags):
    sweep(results_file(flags, "rl"), run, ARMS, common_settings(), flags, COLUMNS)


if __name__ == "__main__":
    run_script(main, Flags)
