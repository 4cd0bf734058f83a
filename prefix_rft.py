"""
prefix_rft.py - reinforcement learning in which one rollout per problem starts from a demonstration.

Paper: Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling (Prefix-RFT),
Huang et al., https://arxiv.org/abs/2507.01679

RL from verified answers (RFT) only reinforces what the model already finds; supervised learning
copies text that the model cannot follow. Here one of N rollouts of a problem is hybrid: its first L
tokens come from a demonstration, the model writes the rest. If that succeeds, both are reinforced,
but of the prefix only the 20 % of tokens at which the model was least sure: the decisions.

    prompts -> prefixes -> rollouts -> rewards -> advantages -> entropy clipping -> loss -> update

    code                 paper
    demo                 y*, a demonstration
    prefix, L            its first L = floor(l |y*|) tokens, l ~ U(low_t, high)
    n                    N, rollouts of a problem
    hybrid               the rollout that starts from a prefix
    adv                  A, the Dr.GRPO advantage: reward minus the group's mean, no division
    keep                 the share of prefix tokens that keep their advantage (entropy clipping)

Differences from the release, beside --advantage: its entropy clipping looks at a micro-batch and at
the current policy, ours at the mini-batch and the policy that sampled; no dual clip of 3, no
entropy bonus of 0.001, no shortest prefix. LUFFY's code takes its baseline from the plain rollouts,
here --advantage code. UFT's code averages over a hint's tokens; here they are divided like all.
Left out: KL terms, critics, several GPUs (bridges/), ReLIFT and DR-PO (not three lines away).

    python prefix_rft.py                              the toy on a CPU, in two minutes
    python prefix_rft.py --method rft --out runs/rft  what happens without demonstrations
    python prefix_rft.py --model Qwen/Qwen2.5-Math-1.5B --data train.jsonl --eval_data math500
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from ddt import micro_batches, response_stats
from eval import (InputError, demo_ids, demonstrations, flag, greedy_accuracy, load_benchmarks,
                  load_problems, new_sampler, printable, prompt_ids, run_script, stop_ids)
from idft import draw_batch, end_step, optimizer_step, report_accuracy, start_run
from reward import rewards

# The relatives are settings of the same loop, --method sets these flags: how much prefix, on how
# many of the n rollouts (of which share of the problems), which gradient.
METHODS = {
    # https://arxiv.org/abs/2503.20783: no prefix at all
    "rft": {"schedule": "none", "hybrids": 0, "prefix_loss": "none"},
    "prefix_rft": {"schedule": "cosine", "hybrids": 1, "prefix_loss": "top"},
    # [P]'s ablations: a prefix without gradient, and one with 0.001 on -log p
    "frozen": {"schedule": "cosine", "hybrids": 1, "prefix_loss": "none"},
    "static": {"schedule": "cosine", "hybrids": 1, "prefix_loss": "sft"},
    # https://arxiv.org/abs/2504.14945: the demonstration is a rollout with p / (p + 0.1), no clip
    "luffy": {"schedule": "full", "hybrids": 1, "prefix_loss": "luffy", "clip_ratio": 1e9},
    # https://arxiv.org/abs/2505.16984: every rollout starts from a hint, learnt by SFT
    "uft": {"schedule": "binomial", "hybrids": -1, "prefix_loss": "sft"},
    # https://arxiv.org/abs/2601.18795: on half of the problems every rollout starts from a prefix
    "prefix_rl": {"schedule": "uniform", "hybrids": -1, "prefix_loss": "none",
                  "hybrid_problems": 0.5},
}
STATIC_WEIGHT = 0.001        # of -log p, in static [P] and uft


# ---- how much prefix ----------------------------------------------------------------------------

def prefix_window(step, total_steps, high=0.95, low=0.95, low_end=0.05, schedule="cosine"):
    """The interval (low_t, high) from which the share l of the prefix is drawn at `step`: low_t
    falls from low to low_end [P]. binomial (UFT): both ends are the probability of a hint, which
    falls from high to low_end in 60 % of the steps, then is 0. ValueError on another schedule."""
    progress = min(max(step / total_steps, 0.0), 1.0)
    fall = 0.5 * (1 + math.cos(math.pi * progress))                # from 1 to 0
    p = 0.0
    if progress <= 0.6:
        p = low_end + (high - low_end) * 0.5 * (1 + math.cos(math.pi * progress / 0.6))
    windows = {"cosine": (low_end + (low - low_end) * fall, high),
               "linear": (low + (low_end - low) * progress, high),
               "uniform": (low_end, high),
               "full": (1.0, 1.0),                              # the whole demonstration
               "none": (0.0, 0.0),
               "binomial": (p, p)}
    if schedule not in windows:
        raise ValueError(f"no schedule {schedule!r}, there are {', '.join(windows)}")
    return windows[schedule]


def prefix_length(demo_length, low, high, rng):
    """L = floor(l |y*|), l ~ U(low, high), at most |y*| - 1: something is left to write.
    rng has .uniform(a, b)."""
    length = math.floor(rng.uniform(low, high) * demo_length)
    return max(0, min(length, demo_length - 1))


def window_at(step, flags):
    """prefix_window with the numbers of the flags; low_t starts at 0.95 [P]."""
    return prefix_window(step, flags.steps, low_end=flags.low_end, schedule=flags.schedule)


# ---- what it is worth ---------------------------------------------------------------------------

def advantages(rewards, hybrid, kind="paper"):
    """rewards (G, N) float, hybrid (G, N) bool -> the advantages of what the model wrote and of the
    prefix, both (G, N). ValueError on another kind.

    paper: reward minus the mean of all N [P]. code: reward minus the mean of the plain rollouts,
    but what the model wrote behind a prefix gets its raw reward [code]."""
    if kind == "paper":
        adv = rewards - rewards.mean(-1, keepdim=True)
        return adv, adv
    if kind == "code":
        plain = ~hybrid
        plain_sum = (rewards * plain).sum(-1, keepdim=True)
        plain_mean = plain_sum / plain.sum(-1, keepdim=True).clamp(min=1)
        centred = rewards - plain_mean
        return torch.where(hybrid, rewards, centred), centred
    raise ValueError(f"kind must be paper or code, not {kind!r}")


def entropy_clip(adv, prefix, entropy, keep=0.2, how="top", generator=None):
    """Zero the advantage of all but a share `keep` of the prefix tokens, rounded up [P].

    adv, entropy float and prefix bool, tensors of any one shape -> adv. how: top (the highest
    entropy, the paper), bottom, random, all or none; ValueError on another. Ranked are all prefix
    tokens, also those of advantage 0: give it the whole optimizer batch, then the choice does not
    depend on micro-batching."""
    if how == "all":
        return adv
    if how == "none":
        return adv.masked_fill(prefix, 0.0)
    worth = adv[prefix]                                         # (prefix tokens,)
    if how == "random":
        order = torch.randperm(len(worth), generator=generator).to(adv.device)
    elif how in ("top", "bottom"):
        order = entropy[prefix].argsort(descending=how == "top", stable=True)
    else:
        raise ValueError(f"how must be top, bottom, random, all or none, not {how!r}")
    kept = math.ceil(keep * len(worth) - 1e-6)                  # 0.07 * 100 is a little above 7
    worth[order[kept:]] = 0.0
    return adv.masked_scatter(prefix, worth)


def policy_loss(logp, old_logp, adv, clip=0.2):
    """PPO's clipped surrogate of every token: -min(r A, clamp(r, 1 - clip, 1 + clip) A).

    logp, old_logp, adv: any one shape -> that shape. Sum it and divide once, by sequences *
    max_new_tokens of the whole step (Dr.GRPO): then neither length nor micro-batching changes what
    a token weighs."""
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * adv, clipped * adv)


def token_loss(logp, old_logp, adv, prefix, how="top", clip=0.2):
    """The loss of every token, and whether the clip holds it back: tensors of any one shape.

    Two relatives have another loss for the prefix. sft: -A log p, where A is STATIC_WEIGHT. luffy:
    -A p / (p + 0.1), without importance ratio."""
    loss = policy_loss(logp, old_logp, adv, clip)
    held = loss > -torch.exp(logp - old_logp) * adv
    if how == "sft":
        loss = torch.where(prefix, -adv * logp, loss)
    if how == "luffy":
        p = logp.exp()
        loss = torch.where(prefix, -adv * p / (p + 0.1), loss)
    if how in ("sft", "luffy"):
        held = held & ~prefix
    return loss, held


# ---- one step: rollouts, then the update --------------------------------------------------------

@dataclass
class Rollout:
    prompt: list                        # token ids
    response: list                      # token ids: the prefix, then what the model wrote
    answer: str                         # the right one
    prefix_length: int = 0              # L
    demo_length: int = 0                # |y*|; 0 if it is not hybrid
    finished: bool = True
    entropy: float = 0.0                # mean over the tokens the model wrote, nats
    reward: float = 0.0
    # What update() finds out about every token of the response, each (T,):
    prefix: torch.Tensor = None         # was it given?
    adv: torch.Tensor = None            # what it is worth
    old_logp: torch.Tensor = None       # under the policy that sampled
    token_entropy: torch.Tensor = None  # under the policy that sampled, nats


def sample_rollouts(sampler, tokenizer, problems, flags, step, stop):
    """n rollouts of every problem, the last --hybrids of them from a prefix of a demonstration,
    scored -> list of G * n Rollouts."""
    rng = np.random.default_rng((flags.seed, step))
    low, high = window_at(step, flags)
    hybrids = flags.n if flags.hybrids == -1 else flags.hybrids
    rollouts = []
    for problem in problems:
        # One prefix a problem: with several, the baseline would compare unlike starts.
        demo, L = [], 0
        if problem["demos"] and rng.random() < flags.hybrid_problems:
            demo = problem["demos"][rng.integers(len(problem["demos"]))]
            if flags.schedule == "full":
                L = len(demo)
            elif flags.schedule == "binomial":
                # UFT: as many fifths as five coins of probability low say.
                fifths = rng.binomial(5, low)
                L = min(round(fifths / 5 * len(demo)), len(demo) - 1)
            else:
                L = prefix_length(len(demo), low, high, rng)
        for i in range(flags.n):
            r = Rollout(problem["prompt"], [], problem["answer"])
            if i >= flags.n - hybrids:
                r.response = demo[:L]
                r.prefix_length = L
                r.demo_length = len(demo)
            rollouts.append(r)

    # The model goes on from where each stands. Behind a whole demonstration nothing is left.
    opened = [r for r in rollouts if r.demo_length == 0 or r.prefix_length < r.demo_length]
    contexts = [r.prompt + r.response for r in opened]
    budgets = [flags.max_new_tokens - r.prefix_length for r in opened]
    samples = sampler(contexts, 1, budgets, stop, flags.temperature,
                      seed=flags.seed * 1_000_003 + step)
    for r, sample in zip(opened, samples):
        r.response = r.response + sample.tokens
        r.finished = sample.finished
        r.entropy = sum(sample.entropy) / len(sample.entropy)

    # The reward: 1 if the final answer is right. What did not end by itself earns nothing.
    texts = tokenizer.batch_decode([r.response for r in rollouts], skip_special_tokens=True)
    scores = rewards(texts, [r.answer for r in rollouts])
    for r, score in zip(rollouts, scores):
        r.reward = score * r.finished
    return rollouts


def read_rollouts(model, rollouts, flags):
    """logp and entropy of all tokens of the responses, (tokens,) each, under the model as it is."""
    rows = [(r.prompt, r.response) for r in rollouts]
    return response_stats(model, rows, flags.temperature, micro_tokens=flags.micro_tokens)


def flat(rollouts, name):
    """One tensor of several rollouts, end to end: (tokens,)."""
    return torch.cat([getattr(r, name) for r in rollouts])


def spread(rollouts, name, values):
    """The other way: every rollout gets its part of `values` (tokens,)."""
    for r in rollouts:
        part, values = values.tensor_split([len(r.response)])
        setattr(r, name, part)


def update(model, optimizer, rollouts, flags, generator=None):
    """Learn from a batch of rollouts in --mini_batches optimizer steps -> metrics. The same for
    every --micro_tokens, up to rounding."""
    # 1. What every token is worth: a prefix may have another worth than what the model wrote.
    reward = torch.tensor([r.reward for r in rollouts]).view(-1, flags.n)              # (G, N)
    hybrid = torch.tensor([r.demo_length > 0 for r in rollouts]).view(-1, flags.n)     # (G, N)
    own_adv, prefix_adv = advantages(reward, hybrid, flags.advantage)                  # (G, N)
    if flags.prefix_loss == "sft":
        prefix_adv = torch.full_like(own_adv, STATIC_WEIGHT)           # whatever the reward
    for r, own, given in zip(rollouts, own_adv.flatten(), prefix_adv.flatten()):
        r.prefix = torch.arange(len(r.response), device=model.device) < r.prefix_length
        r.adv = torch.where(r.prefix, given, own)
        r.token_entropy = torch.zeros_like(r.adv)

    # 2. How sure the model was when it sampled: one pass without gradients, before any update.
    look = [r for r in rollouts if r.prefix_length > 0 or (flags.mini_batches > 1 and r.adv.any())]
    if look:
        with torch.no_grad():
            logp, entropy = read_rollouts(model, look, flags)
        spread(look, "old_logp", logp)
        spread(look, "token_entropy", entropy)

    metrics = dict.fromkeys(["updates", "loss", "grad_norm", "prefix_kept", "update_tokens",
                             "clipped_tokens"], 0)
    size = flags.n * math.ceil(len(reward) / flags.mini_batches)                 # whole groups
    for first in range(0, len(rollouts), size):
        mini_batch = rollouts[first:first + size]

        # 3. Entropy clipping over the mini-batch: only the decisions of a prefix keep their worth.
        if flags.prefix_loss not in ("sft", "luffy"):
            prefix = flat(mini_batch, "prefix")
            entropy = flat(mini_batch, "token_entropy")
            adv = flat(mini_batch, "adv")
            adv = entropy_clip(adv, prefix, entropy, flags.keep, flags.prefix_loss, generator)
            spread(mini_batch, "adv", adv)
            metrics["prefix_kept"] += adv[prefix].count_nonzero().item()

        # 4. Gradients add up over micro-batches; each is divided by the size of the whole step.
        learn = [r for r in mini_batch if r.adv.any()]
        if not learn:
            continue                                                   # every group is of one mind
        step_loss = 0.0
        for group in micro_batches([(r.prompt, r.response) for r in learn], flags.micro_tokens):
            part = [learn[i] for i in group]
            logp, _ = read_rollouts(model, part, flags)
            old_logp = logp.detach()             # one update a batch: the ratio is 1 without a look
            if flags.mini_batches > 1:
                old_logp = flat(part, "old_logp")
            loss, held = token_loss(logp, old_logp, flat(part, "adv"), flat(part, "prefix"),
                                    flags.prefix_loss, flags.clip_ratio)
            loss = loss.sum() / (len(mini_batch) * flags.max_new_tokens)
            loss.backward()
            step_loss += loss.item()
            metrics["clipped_tokens"] += held.sum().item()
            metrics["update_tokens"] += len(held)

        # 5. One optimizer step a mini-batch.
        metrics["grad_norm"] += optimizer_step(model, optimizer, flags.lr, step_loss)
        metrics["loss"] += step_loss
        metrics["updates"] += 1
    for name in ("loss", "grad_norm"):
        metrics[name] /= max(1, metrics["updates"])
    return metrics


# ---- the loop -----------------------------------------------------------------------------------

def prepare_problems(tokenizer, problems, max_new_tokens):
    """Problems with "prompt" (token ids) and "demos" (lists of them). A demonstration longer than a
    response may be is left out: it could not end, would earn 0, and would be taught as wrong."""
    prepared, left_out = [], 0
    for problem in problems:
        demos = [demo_ids(tokenizer, solution) for solution in demonstrations(problem)]
        fitting = [demo for demo in demos if len(demo) <= max_new_tokens]
        left_out += len(demos) - len(fitting)
        prompt = prompt_ids(tokenizer, problem["problem"])
        prepared.append({"prompt": prompt, "demos": fitting, "answer": problem["answer"]})
    if left_out:
        print(f"{left_out} demonstrations are longer than --max_new_tokens {max_new_tokens} and "
              "left out; a problem without any trains as plain RFT")
    return prepared


def describe(rollouts):
    """What a batch of rollouts looked like, in means; nan is the mean of nothing."""
    rows = []
    for r in rollouts:
        rows.append([r.reward, r.demo_length, r.prefix_length, len(r.response), r.finished,
                     r.entropy])
    reward, demo, prefix, length, finished, entropy = torch.tensor(rows, dtype=torch.double).T
    hybrid = demo > 0
    row = {"reward": reward[~hybrid].mean(),
           "reward_hybrid": reward[hybrid].mean(),
           "prefix_share": (prefix / demo)[hybrid].mean(),
           "entropy": entropy[prefix < length].mean(),
           "length": length.mean(),
           "overlong": 1 - finished.mean(),
           "tokens": (length - prefix).sum(),                           # the model's own
           "prefix_tokens": prefix.sum()}
    return {name: value.item() for name, value in row.items()}


def show_rollout(tokenizer, rollouts, when):
    """Print a hybrid rollout, one that taught something and succeeded if there is one."""
    hybrid = [r for r in rollouts if 0 < r.prefix_length < len(r.response)]
    if not hybrid:
        return
    r = max(hybrid, key=lambda r: (r.adv.any().item(), r.reward))
    words = [tokenizer.decode([token]) for token in r.response]
    for i in range(r.prefix_length):
        if r.adv[i] != 0:
            words[i] = f"[{words[i]}]"
    words.insert(r.prefix_length, "|")
    tqdm.write(f"A hybrid rollout {when}: prefix with its [kept] tokens | what the model wrote; "
               f"reward {r.reward:.0f}, advantage {r.adv[-1]:+.2f}")
    tqdm.write("    " + printable(" ".join(words)))


def train_policy(model, tokenizer, problems, flags, sampler, optimizer, state, out=None,
                 benchmarks=None):
    """The loop, from state["step"] to flags.steps. With `out` it shows, logs and saves."""
    stop = stop_ids(model, tokenizer)
    bar = tqdm(range(state["step"], flags.steps), leave=False)
    for step in bar:
        # All that is random follows from the step's number.
        start = time.perf_counter()
        sampler.sync(model)
        batch = draw_batch(problems, flags.batch, step, flags.seed)
        rollouts = sample_rollouts(sampler, tokenizer, batch, flags, step, stop)
        row = describe(rollouts)
        row["low"], _ = window_at(step, flags)
        row["rollout_s"] = time.perf_counter() - start
        row["rollout_tokens_per_s"] = row["tokens"] / row["rollout_s"]
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(flags.seed * 1_000_003 + step)
        row |= update(model, optimizer, rollouts, flags, generator)
        row["update_s"] = time.perf_counter() - start
        row["update_tokens_per_s"] = row["update_tokens"] / row["update_s"]

        bar.set_postfix(reward=row["reward"], refresh=False)
        if out and step in (0, flags.steps - 1):
            show_rollout(tokenizer, rollouts, f"of step {step + 1}")
        if flags.eval_every and (step + 1) % flags.eval_every == 0:
            row["accuracy"] = greedy_accuracy(model, tokenizer, benchmarks, flags.max_new_tokens,
                                              sampler=sampler)
        end_step(out, model, tokenizer, optimizer, state, row, flags)


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory (of idft.py: SFT-then-RFT) or a Hub id")
    data: str = flag("toy", "problems with demonstrations: toy, a JSON(L) file or hf://...")
    eval_data: str = flag("", "evaluated before and after: toy, a JSON(L) file or hf://...")
    out: str = flag("runs/prefix_rft", "directory for metrics.jsonl and checkpoint/")
    method: Literal[tuple(METHODS)] = flag("prefix_rft", "sets the flags in its row of METHODS")
    schedule: Literal["cosine", "linear", "uniform", "full", "binomial", "none"] = flag(
        "cosine", "how much prefix [P]")
    hybrids: int = flag(1, "how many of the n rollouts have a prefix; -1: all [P]", -1)
    hybrid_problems: float = flag(1.0, "on which share of the problems [ours]", 0, 1)
    prefix_loss: Literal["top", "all", "none", "random", "bottom", "sft", "luffy"] = flag(
        "top", "what gradient the prefix gets [P]")
    keep: float = flag(0.2, "share of prefix tokens kept by top, bottom and random [P]", 0, 1)
    low_end: float = flag(0.05, "where low_t ends; it starts at 0.95 [P]", 0, 0.95)
    advantage: Literal["paper", "code"] = flag("paper", "the baseline, see advantages() [P]")
    steps: int = flag(500, "batches of rollouts [P]", 1)
    batch: int = flag(128, "problems in a batch [P]", 1)
    n: int = flag(8, "rollouts a problem; one alone has no baseline [P]", 2)
    mini_batches: int = flag(2, "optimizer steps a batch; with 1 the clip cannot act", 1)
    lr: float = flag(1e-6, "learning rate, constant [P]", 0, 10)
    clip_ratio: float = flag(0.2, "PPO clip [P]", 1e-6)
    temperature: float = flag(1.0, "of the rollouts [P]", 1e-3, 100)
    max_new_tokens: int = flag(8192, "longest response, prefix included [P]", 2)
    rows: int = flag(64, "responses sampled side by side: more, faster, more memory", 1)
    micro_tokens: int = flag(16384, "padded tokens in one pass: fewer, less memory", 1)
    keep_activations: bool = flag(False, "on a GPU: do not recompute them; faster, 10x the memory")
    eval_every: int = flag(0, "steps between evaluations; 0: before and after", 0)
    save_every: int = flag(50, "steps between checkpoints", 1)
    seed: int = flag(0, "of everything: toy, order, prefixes, rollouts", 0)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the run in --out")


TOY = {"eval_data": "toy", "lr": 1e-3, "steps": 40, "batch": 16, "max_new_tokens": 64, "rows": 128}


def check(flags, problems):
    """InputError for flags that contradict each other or the data."""
    if flags.hybrids > flags.n:
        raise InputError(f"--hybrids {flags.hybrids} is more than --n {flags.n}: take at most n")
    if (flags.hybrids == 0) != (flags.schedule == "none"):
        raise InputError(f"--hybrids {flags.hybrids} contradicts --schedule {flags.schedule}: for "
                         "plain RFT take --method rft")
    all_hybrid = flags.hybrids in (-1, flags.n)
    if all_hybrid and (flags.schedule == "full" or flags.advantage == "code"):
        raise InputError("--schedule full and --advantage code need a rollout without a prefix: "
                         f"lower --hybrids {flags.hybrids}")
    if flags.hybrids and not any(problem["solution"] for problem in problems):
        raise InputError(f"--data {flags.data} has no solution for a rollout to start from: add "
                         "some, or take --method rft")


def main(flags):
    problems = load_problems(flags.data, seed=flags.seed)
    check(flags, problems)
    benchmarks = load_benchmarks([flags.eval_data] if flags.eval_data else [])
    out, model, tokenizer, optimizer, state = start_run(flags)

    # One sampler for rollouts and evaluations, with room for a whole response to every prompt.
    everything = sum(benchmarks.values(), problems)
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in everything]
    sampler, room = new_sampler(model, prompts, flags.max_new_tokens, flags.rows)
    if room < flags.max_new_tokens:
        raise InputError(f"--max_new_tokens {flags.max_new_tokens}: beside the longest prompt the "
                         f"model reads {room}")

    problems = prepare_problems(tokenizer, problems, flags.max_new_tokens)
    report_accuracy("before", out, model, tokenizer, benchmarks, flags, state, sampler)
    train_policy(model, tokenizer, problems, flags, sampler, optimizer, state, out, benchmarks)
    report_accuracy("after", out, model, tokenizer, benchmarks, flags, state, sampler)


if __name__ == "__main__":
    run_script(main, Flags, TOY, METHODS)
