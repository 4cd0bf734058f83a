"""
prefix_rft.py - reinforcement learning in which one rollout per problem starts from a demonstration.

Paper [P]: Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling (Prefix-RFT),
Huang et al., https://arxiv.org/abs/2507.01679; [code]: its code; [ours]: in neither

RL from verified answers (RFT) only reinforces what the model already finds; supervised learning
copies text that the model cannot follow. Here one of the N rollouts of a problem is hybrid: its
first L tokens come from a demonstration, and the model writes the rest. A right answer pushes both
up, a wrong one pushes both down. In the prefix only the 20 % of tokens at which the model was least
sure are pushed: these are the decisions. If you know GRPO, these lines change:

    sample_rollouts    the last of the n = N rollouts of a problem starts from a demonstration y*
    prefix_length      the prefix is its first L = floor(l |y*|) tokens, with l ~ U(low_t, high)
    prefix_window      low_t falls, so prefixes become shorter as training goes on
    advantages         A = reward minus the mean of all N, not divided (Dr.GRPO), for every token
    entropy_clip       but in prefixes only the 20 % of tokens with the highest entropy keep their A
    update             old_logp is computed here, for prefix tokens as for all others

The released code differs: it has other advantages (--advantage code), it clips each micro-batch by
the entropy of the current policy, and it has a dual clip of 3, an entropy bonus of 0.001 and a
minimum prefix length. Left out: KL terms, critics, several GPUs (bridges/), ReLIFT. LUFFY, UFT and
the static weight are in experiments/relatives.py.

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

from ddt import batch_stats, micro_batches, token_texts
from eval import InputError, encode, flag, printable, run_script
from idft import draw_batch, end_step, optimizer_step, start_run
from reward import rewards

# Relatives that are only settings: --method sets these flags.
METHODS = {
    "rft": {"schedule": "none", "hybrids": 0, "prefix_loss": "none"},         # Dr.GRPO, 2503.20783
    "prefix_rft": {"schedule": "cosine", "hybrids": 1, "prefix_loss": "top"},
    "frozen": {"schedule": "cosine", "hybrids": 1, "prefix_loss": "none"},    # [P] Table 8
    "dr_po": {"schedule": "uniform", "hybrids": -1, "prefix_loss": "none"},   # 2404.08495
    "prefix_rl": {"schedule": "uniform", "hybrids": -1, "prefix_loss": "none",
                  "hybrid_problems": 0.5},                                    # 2601.18795
}


# ---- the mathematics ----------------------------------------------------------------------------

def prefix_window(step, total_steps, high=0.95, low=0.95, low_end=0.05, schedule="cosine"):
    """The interval (low_t, high) from which the share l of the prefix is drawn at `step`: low_t
    falls from low to low_end [P]. ValueError on an unknown schedule."""
    progress = min(step / total_steps, 1.0)
    fall = 0.5 * (1 + math.cos(math.pi * progress))             # from 1 to 0
    windows = {"cosine": (low_end + (low - low_end) * fall, high),
               "linear": (low + (low_end - low) * progress, high),
               "uniform": (low_end, high),
               "none": (0.0, 0.0)}
    if schedule not in windows:
        raise ValueError(f"no schedule {schedule!r}, there are {', '.join(windows)}")
    return windows[schedule]


def prefix_length(demo_length, low, high, rng):
    """L = floor(l |y*|), l ~ U(low, high), but at most |y*| - 1. rng has .uniform(a, b)."""
    length = math.floor(rng.uniform(low, high) * demo_length)
    return max(0, min(length, demo_length - 1))


def advantages(rewards, hybrid, kind="paper"):
    """rewards (G, N) float, hybrid (G, N) bool -> the advantages of what the model wrote and of the
    prefix, both (G, N). ValueError on any other kind.

    paper: reward minus the mean of all N [P]. code: reward minus the mean of the plain rollouts,
    but what the model wrote after a prefix gets its raw reward [code]."""
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
    """Zero the advantage of all but a share `keep` of the prefix tokens, rounded up [P]. All prefix
    tokens of a mini-batch are ranked, even those whose advantage is 0.

    adv, entropy (float) and prefix (bool) are tensors of one shape -> adv, clipped. how: top (the
    highest entropy, the paper), bottom, random, all or none; ValueError on any other."""
    if how == "all":
        return adv
    if how == "none":
        return adv.masked_fill(prefix, 0.0)
    prefix_adv = adv[prefix]                                    # (prefix tokens,)
    if how == "random":
        order = torch.randperm(len(prefix_adv), generator=generator).to(adv.device)
    elif how in ("top", "bottom"):
        order = entropy[prefix].argsort(descending=how == "top", stable=True)
    else:
        raise ValueError(f"how must be top, bottom, random, all or none, not {how!r}")
    kept = math.ceil(keep * len(prefix_adv) - 1e-6)             # 0.07 * 100 is a little above 7
    prefix_adv[order[kept:]] = 0.0
    return adv.masked_scatter(prefix, prefix_adv)


def policy_loss(logp, old_logp, adv, clip=0.2):
    """PPO's clipped surrogate of every token: -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A).

    logp, old_logp, adv have one shape -> the losses, in that shape. Sum them and divide once, by
    sequences * max_new_tokens of the whole step (Dr.GRPO). Then neither length nor micro-batching
    changes the weight of a token. Where adv is 0, loss and gradient are 0, whatever the ratio."""
    log_ratio = logp - old_logp
    # exp() must not overflow where the ratio does not count, because 0 * inf is NaN. So the ratio
    # is 1 where A is 0, and where A > 0 at most e times the limit, far above the clip.
    log_ratio = log_ratio.masked_fill(adv == 0, 0.0)
    log_ratio = torch.where(adv > 0, log_ratio.clamp(max=math.log(1 + clip) + 1), log_ratio)
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)


# ---- the loop, and its step: rollouts, then the update ------------------------------------------

@dataclass
class Rollout:
    prompt: list                        # token ids
    response: list                      # token ids: the prefix, then what the model wrote
    answer: str                         # the right one
    prefix_length: int = 0              # L
    demo_length: int = 0                # |y*|; 0 if the rollout is not hybrid
    finished: bool = True
    reward: float = 0.0
    mean_entropy: float = 0.0           # of the tokens that the model wrote, nats
    # update() adds these, one number for every token of the response, (T,) each:
    prefix: torch.Tensor = None         # bool, does the token belong to the prefix?
    adv: torch.Tensor = None            # its advantage
    old_logp: torch.Tensor = None       # under the policy that sampled
    entropy: torch.Tensor = None        # under the policy that sampled, nats


def sample_rollouts(sampler, tokenizer, problems, flags, step, stop=None,
                    prefix_window=prefix_window, prefix_length=prefix_length):
    """G problems -> G * n Rollouts, scored. The last --hybrids of every n start from a prefix.
    stop: ids of the tokens that end a response; None: those of the model."""
    rng = np.random.default_rng((flags.seed, step))
    low, high = prefix_window(step, flags.steps, low_end=flags.low_end, schedule=flags.schedule)
    hybrids = flags.n if flags.hybrids == -1 else flags.hybrids
    rollouts = []
    for problem in problems:
        # One prefix per problem: the baseline must not compare rollouts that start differently.
        demo, L = [], 0
        if problem["demos"] and rng.random() < flags.hybrid_problems:
            demo = problem["demos"][rng.integers(len(problem["demos"]))]
            L = prefix_length(len(demo), low, high, rng)
        for i in range(flags.n):
            r = Rollout(problem["prompt"], [], problem["answer"])
            if i >= flags.n - hybrids:
                r.response = demo[:L]
                r.prefix_length = L
                r.demo_length = len(demo)
            rollouts.append(r)

    # The model writes the rest. After a whole demonstration nothing is left to write.
    unfinished = [r for r in rollouts if r.demo_length == 0 or r.prefix_length < r.demo_length]
    contexts = [r.prompt + r.response for r in unfinished]
    budgets = [flags.max_new_tokens - r.prefix_length for r in unfinished]
    samples = sampler(contexts, 1, budgets, stop, flags.temperature,
                      seed=flags.seed * 1_000_003 + step)
    for r, sample in zip(unfinished, samples):
        r.response = r.response + sample.tokens
        r.finished = sample.finished
        r.mean_entropy = sum(sample.entropy) / len(sample.entropy)

    # The reward: 1 if the final answer is right. A response that did not end by itself earns 0.
    texts = tokenizer.batch_decode([r.response for r in rollouts], skip_special_tokens=True)
    scores = rewards(texts, [r.answer for r in rollouts])
    for r, score in zip(rollouts, scores):
        r.reward = score * r.finished
    return rollouts


def flat(rollouts, name):
    """The field `name` of several rollouts as one tensor: (tokens,)."""
    return torch.cat([getattr(r, name) for r in rollouts])


def spread(rollouts, name, values):
    """The inverse of flat: every rollout gets its part of `values` (tokens,) as field `name`."""
    lengths = [len(r.response) for r in rollouts]
    for r, part in zip(rollouts, values.split(lengths)):
        setattr(r, name, part)


def read_rollouts(model, rollouts, flags):
    """Yield micro-batches: rollouts, logp (tokens,) and entropy (tokens,) of their responses."""
    rows = [(r.prompt, r.response) for r in rollouts]
    for group in micro_batches(rows, flags.micro_tokens):
        logp, entropy = batch_stats(model, [rows[i] for i in group], flags.temperature)
        yield [rollouts[i] for i in group], logp, entropy


def update(model, optimizer, rollouts, flags, generator=None, entropy_clip=entropy_clip,
           prefix_loss=None):
    """Learn from a batch of rollouts in --mini_batches optimizer steps -> metrics."""
    # 1. Every token gets its advantage: by its rollout, and by whether it belongs to the prefix.
    reward = torch.tensor([r.reward for r in rollouts]).view(-1, flags.n)        # (G, N)
    hybrid = torch.tensor([r.demo_length > 0 for r in rollouts]).view(-1, flags.n)
    own_adv, prefix_adv = advantages(reward, hybrid, flags.advantage)            # (G, N)
    for r, own, given in zip(rollouts, own_adv.flatten(), prefix_adv.flatten()):
        r.prefix = torch.arange(len(r.response), device=model.device) < r.prefix_length
        r.adv = torch.where(r.prefix, given, own)                                # (T,)

    # 2. One pass without gradient, before any step, computes old_logp and entropy. The sampler's
    # numbers will not do: it never scored a prefix, its twin on a GPU computes in bf16, and an
    # engine that truncates (top-k, top-p) may report a distribution other than the policy's.
    with torch.no_grad():
        for part, logp, entropy in read_rollouts(model, rollouts, flags):
            spread(part, "old_logp", logp)
            spread(part, "entropy", entropy)

    metrics = dict.fromkeys(["updates", "loss", "grad_norm", "prefix_kept", "update_tokens",
                             "clipped_tokens"], 0)
    indices = torch.arange(len(rollouts)).view(-1, flags.n)                      # (G, N)
    for chosen in indices.tensor_split(flags.mini_batches):
        # 3. A mini-batch is an equal share of whole groups. Its prefixes keep only their decisions.
        mini_batch = [rollouts[i] for i in chosen.flatten()]
        adv = flat(mini_batch, "adv")                                            # (tokens,)
        prefix = flat(mini_batch, "prefix")
        entropy = flat(mini_batch, "entropy")
        adv = entropy_clip(adv, prefix, entropy, flags.keep, flags.prefix_loss, generator)
        metrics["prefix_kept"] += adv[prefix].count_nonzero().item()
        spread(mini_batch, "adv", adv)

        # 4. Gradients add up over micro-batches. Each loss is divided by the mini-batch's size.
        teaching = [r for r in mini_batch if r.adv.any()]       # equal rewards teach nothing
        if not teaching:
            continue
        step_loss = 0.0
        for part, logp, _ in read_rollouts(model, teaching, flags):
            old_logp = flat(part, "old_logp")                                    # (tokens,)
            adv = flat(part, "adv")
            loss = policy_loss(logp, old_logp, adv, flags.clip_ratio)
            ratio = torch.exp(logp.detach() - old_logp)
            clipped = loss > -ratio * adv                       # where the clip acts
            if prefix_loss:
                loss = torch.where(flat(part, "prefix"), prefix_loss(logp, adv), loss)
            loss = loss.sum() / (len(mini_batch) * flags.max_new_tokens)
            loss.backward()
            step_loss += loss.item()
            metrics["clipped_tokens"] += clipped.sum().item()
            metrics["update_tokens"] += len(adv)

        # 5. One optimizer step per mini-batch.
        metrics["grad_norm"] += optimizer_step(model, optimizer, flags.lr, step_loss)
        metrics["loss"] += step_loss
        metrics["updates"] += 1
    for name in ("loss", "grad_norm"):
        metrics[name] /= metrics["updates"] or 1
    return metrics


def prepare_problems(tokenizer, problems, max_new_tokens):
    """Problems -> dicts with "prompt" (ids), "demos" (lists of ids), "answer". Demonstrations of
    over max_new_tokens are left out: they could not end, would earn 0 and be taught as wrong."""
    prepared, left_out = [], 0
    for row in encode(tokenizer, problems):
        fitting = [demo for demo in row["demos"] if len(demo) <= max_new_tokens]
        left_out += len(row["demos"]) - len(fitting)
        prepared.append({**row, "demos": fitting})
    if left_out:
        print(f"{left_out} demonstrations are longer than --max_new_tokens {max_new_tokens} and "
              "are left out; a problem without any other trains as plain RFT")
    return prepared


def describe(rollouts):
    """Metrics of a batch of rollouts, mostly means; the mean of nothing is nan."""
    rows = []
    for r in rollouts:
        rows.append([r.reward, r.demo_length, r.prefix_length, len(r.response), r.finished,
                     r.mean_entropy])
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


def show_rollouts(tokenizer, rollouts, when):
    """Print one hybrid rollout that succeeded and one that failed, if they teach something."""
    hybrid = [r for r in rollouts if 0 < r.prefix_length < len(r.response) and r.adv.any()]
    succeeded = [r for r in hybrid if r.reward > 0]
    failed = [r for r in hybrid if r.reward == 0]
    for r in succeeded[:1] + failed[:1]:
        texts = token_texts(tokenizer, r.response)
        for i in range(r.prefix_length):
            if r.adv[i] != 0:
                word = texts[i].lstrip()
                texts[i] = texts[i].removesuffix(word) + f"[{word}]"
        texts.insert(r.prefix_length, " |")
        tqdm.write(f"A hybrid rollout {when}: prefix with its [kept] tokens | what the model wrote"
                   f"; reward {r.reward:.0f}, advantage {r.adv[-1]:+.2f}")
        tqdm.write("    " + printable("".join(texts)))


def train_policy(run, problems, starting={}, learning={}):
    """The loop, from the step where `run` is to --steps. A step's number seeds all that is random
    in it. A relative passes functions to sample_rollouts (starting) and to update (learning)."""
    flags = run.flags
    bar = tqdm(range(run.state["step"], flags.steps), leave=False)
    for step in bar:
        start = time.perf_counter()
        run.sampler.sync(run.model)
        batch = draw_batch(problems, flags.batch, step, flags.seed)
        rollouts = sample_rollouts(run.sampler, run.tokenizer, batch, flags, step, **starting)
        row = describe(rollouts)
        row["low"], _ = prefix_window(step, flags.steps, low_end=flags.low_end,
                                      schedule=flags.schedule)
        row["rollout_s"] = time.perf_counter() - start
        row["rollout_tokens_per_s"] = row["tokens"] / row["rollout_s"]
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(flags.seed * 1_000_003 + step)
        row |= update(run.model, run.optimizer, rollouts, flags, generator, **learning)
        row["update_s"] = time.perf_counter() - start
        row["update_tokens_per_s"] = row["update_tokens"] / row["update_s"]
        bar.set_postfix(reward=row["reward"], refresh=False)
        if run.out and step in (0, flags.steps - 1):
            show_rollouts(run.tokenizer, rollouts, f"of step {step + 1}")
        if flags.eval_every and (step + 1) % flags.eval_every == 0:
            row["accuracy"] = run.accuracy()
        end_step(run.out, run.model, run.tokenizer, run.optimizer, run.state, row, flags)


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory (of idft.py: SFT-then-RFT) or a Hub id")
    data: str = flag("toy", "problems with demonstrations: toy, a JSON(L) file or hf://...")
    eval_data: str = flag("", "evaluated before and after training: toy, JSON(L) file or hf://...")
    out: str = flag("runs/prefix_rft", "directory for metrics.jsonl and checkpoint/")
    method: Literal[tuple(METHODS)] = flag("prefix_rft", "sets the flags in its row of METHODS")
    schedule: Literal["cosine", "linear", "uniform", "none"] = flag("cosine", "how low_t moves [P]")
    hybrids: int = flag(1, "how many of the n rollouts have a prefix; -1: all [P]", -1)
    hybrid_problems: float = flag(1.0, "share of problems that have hybrid rollouts [ours]", 0, 1)
    prefix_loss: Literal["top", "all", "none", "random", "bottom"] = flag(
        "top", "which prefix tokens keep their advantage [P]")
    keep: float = flag(0.2, "share of prefix tokens that top, bottom and random keep [P]", 0, 1)
    low_end: float = flag(0.05, "where low_t ends; it starts at 0.95 [P]", 0, 0.95)
    advantage: Literal["paper", "code"] = flag("paper", "the baseline, see advantages() [P]")
    steps: int = flag(500, "batches of rollouts [P]", 1)
    batch: int = flag(128, "problems in a batch [P]", 1, 10**5)
    n: int = flag(8, "rollouts per problem; one alone has no baseline [P]", 2, 10**4)
    mini_batches: int = flag(2, "optimizer steps per batch; with 1 the clip cannot act", 1)
    lr: float = flag(1e-6, "learning rate, constant [P]", 0, 10)
    clip_ratio: float = flag(0.2, "PPO clip [P]", 1e-6)
    temperature: float = flag(1.0, "for sampling rollouts [P]", 1e-3, 100)
    max_new_tokens: int = flag(8192, "longest response, prefix included [P]", 2)
    rows: int = flag(64, "responses sampled side by side: more is faster but needs memory", 1)
    micro_tokens: int = flag(16384, "padded tokens in one pass: fewer need less memory", 1)
    keep_activations: bool = flag(False, "keep them even above 4 GB: faster, more memory")
    offload: bool = flag(False, "only bf16 weights on the card, float32 and AdamW in main memory")
    eval_every: int = flag(0, "steps between evaluations; 0: only before and after", 0)
    save_every: int = flag(50, "steps between checkpoints", 1)
    seed: int = flag(0, "seed of everything: toy, order, prefixes, rollouts", 0)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the run in --out")


TOY = {"eval_data": "toy", "lr": 1e-3, "steps": 40, "batch": 16, "max_new_tokens": 64,
       "rows": 128}


def check(flags, problems):
    """InputError for flags that contradict each other or the data."""
    if flags.hybrids > flags.n:
        raise InputError(f"--hybrids {flags.hybrids} is more than --n {flags.n}: take at most n")
    if flags.mini_batches > flags.batch:
        raise InputError(f"--mini_batches {flags.mini_batches} is more than --batch {flags.batch}")
    if (flags.hybrids == 0) != (flags.schedule == "none") and flags.method in METHODS:
        raise InputError(f"--hybrids {flags.hybrids} contradicts --schedule {flags.schedule}: "
                         "plain RFT has 0 and none (--method rft), anything else has neither")
    if flags.hybrids in (-1, flags.n) and flags.advantage == "code":
        raise InputError(f"--advantage code needs a plain rollout: lower --hybrids {flags.hybrids}")
    if flags.hybrids and not any(problem["solution"] for problem in problems):
        raise InputError(f"--data {flags.data} has no solution for a rollout to start from: add "
                         "solutions, or take --method rft")


def main(flags, starting={}, learning={}):
    run = start_run(flags, check=check, sampling=True)
    problems = prepare_problems(run.tokenizer, run.inputs["data"], run.room)
    run.begin()
    train_policy(run, problems, starting, learning)
    run.end()


if __name__ == "__main__":
    run_script(main, Flags, TOY, METHODS)
