"""
prefix_rft.py - reinforcement learning in which one rollout per problem starts from a prefix of a demonstration.

Paper: "Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling" (Prefix-RFT), arXiv 2507.01679. RL
from verified answers (RFT) only reinforces what the model already finds; supervised learning copies text that the
model cannot follow. Prefix-RFT lets the model find more: of N rollouts of a problem one is *hybrid*, its first L tokens
are taken from a demonstration and the model writes the rest. If the rest succeeds, prefix and rest are reinforced
together, but of the prefix only the 20 % of tokens at which the model was least sure: the decisions, not the spelling.

One step:  prompts -> hybrid prefixes -> rollouts -> rewards -> advantages -> entropy clipping -> loss -> update -> log

Glossary (code = paper): prompt = x; demo = demonstration y*; L = prefix length, floor(l |y*|) with l ~ U(low_t, high)
(sec. 3.2); n = N rollouts; hybrid = the rollout that starts from a prefix; adv = A, the Dr.GRPO advantage: reward
minus the group's mean, no division; keep = share of the prefix tokens that keep their advantage (entropy clipping,
sec. 3.3); old_logp = log-probability under the policy that sampled; own = tokens that the model wrote, prefix = those
it was given.

The relatives are settings of two flags, --schedule (which prefix) and --prefix_loss (what gradient it gets). --method
is a shorthand that sets the two and nothing else:

    rft          none     none    Dr.GRPO on the model's own rollouts, arXiv 2503.20783
    sft_rft      none     none    the same, started from an SFT checkpoint: --model runs/sft/checkpoint
    prefix_rft   cosine   top     the paper
    prefix_rl    cosine   none    the prefix is only a place to start from, arXiv 2601.18795
    uft          cosine   sft     static weight 0.001 on -log p of the prefix, arXiv 2505.16984
    luffy        full     luffy   the whole demonstration is a rollout; p / (p + 0.1); plain baseline, arXiv 2504.14945
    ablations    cosine, linear or uniform with all, random, bottom or top

Left out: KL terms, critics, reward models, asynchronous rollouts, several GPUs (bridges/ has the lines for TRL and
verl).

    python prefix_rft.py                                        the toy on a CPU: pre-trains its base once, then learns
    python prefix_rft.py --method rft --out runs/rft            what happens without demonstrations
    python prefix_rft.py --compare all --out runs/compare       the honest table
    python prefix_rft.py --model Qwen/Qwen2.5-Math-1.5B --data train.jsonl --eval_data math500 --max_new_tokens 3000
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import idft
import toy
from ddt import token_stats
from eval import (InputError, demo_ids, evaluate, flag, load_benchmarks, load_model, load_problems, new_sampler,
                  pick_device, prompt_ids, run, stop_ids)
from idft import (apply_gradients, assess, before_and_after, checkpoint_activations, count_bad, draw_batch, log_row,
                  mean_std, micro_batches, new_optimizer, pad, precision, save_checkpoint, start_run, sweep)
from reward import rewards
from sampler import Sampler

METHODS = {"rft": ("none", "none"), "sft_rft": ("none", "none"), "prefix_rft": ("cosine", "top"),
           "prefix_rl": ("cosine", "none"), "uft": ("cosine", "sft"), "luffy": ("full", "luffy")}


# ---- which prefix --------------------------------------------------------------------------------------------------

def prefix_window(step, total_steps, high=0.95, low=0.95, low_end=0.05, schedule="cosine"):
    """The interval (low_t, high) from which the prefix share is drawn at `step` (sec. 3.2).

    cosine: low_t falls from low to low_end along half a cosine; linear: along a line; uniform: low_end throughout;
    full: the whole demonstration; none: no prefix. ValueError on another schedule."""
    progress = min(max(step / total_steps, 0.0), 1.0)
    if schedule == "cosine":
        return low_end + (low - low_end) * 0.5 * (1 + math.cos(math.pi * progress)), high
    if schedule == "linear":
        return low + (low_end - low) * progress, high
    if schedule in ("uniform", "full", "none"):
        return {"uniform": (low_end, high), "full": (1.0, 1.0), "none": (0.0, 0.0)}[schedule]
    raise ValueError(f"schedule must be cosine, linear, uniform, full or none, not {schedule!r}")


def prefix_length(demo_length, low, high, rng):
    """L = floor(l |y*|) with l ~ U(low, high), at most |y*| - 1: something is left to write. rng has .uniform(a, b)."""
    return max(0, min(math.floor(rng.uniform(low, high) * demo_length), demo_length - 1))


# ---- what it is worth ----------------------------------------------------------------------------------------------

def advantages(rewards, hybrid, kind="paper"):
    """rewards (G, N) float and hybrid (G, N) bool, True on rollouts that start from a prefix -> advantages of what the
    model wrote (G, N) and of the prefix (G, N).

    paper (sec. 3.1): reward minus the mean of all N, for both. code (the official release): plain rollouts are centred
    by the mean of the plain ones; the hybrid's continuation gets its raw reward, its prefix reward minus the plain
    mean. ValueError on another kind."""
    if kind == "paper":
        adv = rewards - rewards.mean(-1, keepdim=True)
        return adv, adv
    if kind == "code":
        plain = ~hybrid
        centred = rewards - (rewards * plain).sum(-1, keepdim=True) / plain.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(hybrid, rewards, centred), centred
    raise ValueError(f"kind must be paper or code, not {kind!r}")


def entropy_clip(adv, prefix_mask, entropy, keep=0.2, how="top", generator=None):
    """Zero the advantage of all but a share `keep` of the prefix tokens (sec. 3.3); other tokens are left alone.

    adv, entropy (B, T) float and prefix_mask (B, T) bool -> adv (B, T). how: "top" (highest entropy, the paper),
    "bottom", "random", "all", "none"; ValueError on another. The choice is made among all prefix tokens of the
    optimizer batch, also those of advantage 0, so give it the whole batch: then it does not depend on micro-batching.
    A broken number is rounded up."""
    chosen = entropy[prefix_mask]                                                       # (prefix tokens,)
    if how in ("all", "none"):
        count = len(chosen) if how == "all" else 0
    elif how in ("top", "bottom", "random"):
        count = math.ceil(keep * len(chosen) - 1e-6)
    else:
        raise ValueError(f"how must be top, bottom, random, all or none, not {how!r}")
    if how == "random":
        order = torch.randperm(len(chosen), generator=generator).to(chosen.device)
    else:
        order = chosen.argsort(descending=how != "bottom", stable=True)
    kept = torch.zeros_like(chosen, dtype=torch.bool)
    kept[order[:count]] = True
    return adv.masked_fill(prefix_mask.masked_scatter(prefix_mask, ~kept), 0.0)


def policy_loss(logp, old_logp, adv, mask, denom, clip=0.2):
    """PPO's clipped surrogate, summed over tokens, divided once: -sum min(r A, clamp(r, 1 - clip, 1 + clip) A) / denom.

    logp (with gradient), old_logp, adv (B, T) float; mask (B, T) bool; denom: sequences * max_new_tokens of the whole
    optimizer step (Dr.GRPO), so that neither length nor micro-batching changes what a token weighs. -> scalar,
    {"clip_share": share of tokens held back by the clip, "ratio": mean r}."""
    logp, old_logp, adv = logp[mask], old_logp[mask], adv[mask]                     # (tokens,), nothing that is masked
    ratio = torch.exp(logp - old_logp)
    surrogate, clipped = ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv
    loss = -torch.minimum(surrogate, clipped).sum() / denom
    count = max(1, len(logp))
    clip_share = (clipped < surrogate).sum() / count
    return loss, {"clip_share": clip_share.item(), "ratio": (ratio.detach().sum() / count).item()}


def prefix_term(logp, adv, prefix_mask, denom, how):
    """The loss of the relatives that do not treat the prefix as a rollout, 0 for others. Arguments as in policy_loss.

    sft (UFT): 0.001 (-log p). luffy: -A p / (p + 0.1), without importance weight or clip."""
    logp, adv = logp[prefix_mask], adv[prefix_mask]
    if how == "sft":
        return -0.001 * logp.sum() / denom
    if how == "luffy":
        p = logp.exp()
        return -(adv * p / (p + 0.1)).sum() / denom
    return 0.0


# ---- one step ------------------------------------------------------------------------------------------------------

def rollout(sampler, tokenizer, problems, flags, step, stop):
    """Sample n responses to every problem, the last of them from a prefix, and score them all.

    Returns a list of G * n rows: {"prompt", "response" (ids, with the prefix), "L", "hybrid", "finished", "reward",
    "entropy" (summed over the sampled tokens), "demo" (its length)}. Without a demonstration all n are plain."""
    rng = np.random.default_rng((flags.seed, step))
    low, high = prefix_window(step, flags.steps, flags.high, flags.low, flags.low_end, flags.schedule)
    rows = []
    for problem in problems:
        for i in range(flags.n):
            row = {"prompt": problem["prompt"], "response": [], "L": 0, "hybrid": False, "finished": True,
                   "entropy": 0.0, "demo": 0, "answer": problem["answer"]}
            if i == flags.n - 1 and flags.schedule != "none" and problem["demos"]:
                demo = problem["demos"][rng.integers(len(problem["demos"]))]
                L = len(demo) if flags.schedule == "full" else prefix_length(len(demo), low, high, rng)
                room = flags.max_new_tokens - (flags.schedule != "full")        # at least one token is the model's own
                prefix = demo[:min(L, room)]
                row |= {"response": prefix, "L": len(prefix), "hybrid": True, "demo": len(demo), "finished": L <= room}
            rows.append(row)
    open_rows = [row for row in rows if not (row["hybrid"] and flags.schedule == "full")]
    samples = sampler([row["prompt"] + row["response"] for row in open_rows], stop=stop, temperature=flags.temperature,
                      max_new_tokens=[flags.max_new_tokens - row["L"] for row in open_rows],
                      seed=flags.seed * 1_000_003 + step)
    found = zip(open_rows, samples.lists(), samples.finished.tolist(), samples.entropy.sum(1).tolist())
    for row, tokens, finished, entropy in found:
        row |= {"response": row["response"] + tokens, "finished": finished, "entropy": entropy}
    texts = tokenizer.batch_decode([row["response"] for row in rows], skip_special_tokens=True)
    for row, score in zip(rows, rewards(texts, [row["answer"] for row in rows])):
        row["reward"] = float(score) if row["finished"] else 0.0                        # overlong: no reward
    return rows


def to_tensors(rows, flags, device):
    """Rollouts -> what the update needs: ids, mask, response (B, T); lengths, a list; and, where column t is about
    token t + 1, own and prefix (B, T-1) bool, who wrote the token, and adv (B, T-1)."""
    reward = torch.tensor([row["reward"] for row in rows]).view(-1, flags.n)                            # (G, N)
    hybrid = torch.tensor([row["hybrid"] for row in rows]).view(-1, flags.n)
    kind = "code" if flags.prefix_loss == "luffy" else flags.advantage                  # LUFFY has a plain baseline
    own_adv, prefix_adv = (a.flatten()[:, None].to(device) for a in advantages(reward, hybrid, kind))   # (B, 1)
    ids, mask, response = pad([(row["prompt"], row["response"]) for row in rows], device)               # (B, T)
    prefix_end = torch.tensor([len(row["prompt"]) + row["L"] for row in rows], device=device)[:, None]
    learn = response[:, 1:]
    if flags.mask_overlong:
        learn = learn & torch.tensor([row["finished"] for row in rows], device=device)[:, None]
    prefix = learn & (torch.arange(1, ids.shape[1], device=device) < prefix_end)
    return {"ids": ids, "mask": mask, "response": response, "prefix": prefix, "own": learn & ~prefix,
            "adv": torch.where(prefix, prefix_adv, own_adv) * learn, "lengths": mask.sum(1).tolist()}


def pieces(b, indices, flags):
    """Micro-batches of the rows in `indices`: (row indices, length of the longest)."""
    for group in micro_batches([b["lengths"][i] for i in indices], flags.micro_tokens):
        yield [indices[i] for i in group], max(b["lengths"][indices[i]] for i in group)


def policy_stats(model, b, group, T, flags):
    """logp and entropy (rows of the group, T-1) of the responses under the model as it is now."""
    ids, mask, response = (b[key][group, :T] for key in ("ids", "mask", "response"))
    with precision(ids.device):
        return token_stats(model, ids, mask, flags.temperature, want=response)


def backward(model, b, indices, tokens, adv, old_logp, denom, flags):
    """Add up the gradients of the loss over `tokens` (B, T-1) bool, piece by piece -> loss, clipped tokens, tokens."""
    total = np.zeros(3)
    for group, T in pieces(b, indices, flags):
        at = lambda x: x[group, :T - 1]
        logp, _ = policy_stats(model, b, group, T, flags)
        loss, metrics = policy_loss(logp, at(old_logp), at(adv), at(tokens), denom, flags.clip_ratio)
        loss = loss + prefix_term(logp, at(b["adv"]), at(tokens & b["prefix"]), denom, flags.prefix_loss)
        loss.backward()
        count = at(tokens).sum().item()
        total += loss.item(), metrics["clip_share"] * count, count
    return total


def update(model, optimizer, rows, flags, generator):
    """--epochs passes of --mini_batches optimizer steps over a batch of rollouts; the same for every --micro_tokens."""
    b = to_tensors(rows, flags, model.device)
    has_loss = ((b["adv"] != 0) | (b["prefix"] & (flags.prefix_loss == "sft"))).any(1)
    ranked = (b["prefix"] | (b["own"] & (flags.own_keep < 1))).any(1)               # by entropy, also at advantage 0
    live, idle = (which.nonzero()[:, 0].tolist() for which in (has_loss, ranked & ~has_loss))
    old_logp, entropy = torch.zeros_like(b["adv"]), torch.zeros_like(b["adv"])
    with torch.no_grad():                                                           # the policy that sampled
        for group, T in [*pieces(b, live, flags), *pieces(b, idle, flags)]:         # live ones as below: ratio 1
            old_logp[group, :T - 1], entropy[group, :T - 1] = policy_stats(model, b, group, T, flags)

    how = "none" if flags.prefix_loss in ("sft", "luffy") else flags.prefix_loss
    size = flags.n * math.ceil(len(rows) / flags.n / flags.mini_batches)            # whole groups
    totals, norms, prefix_norms, kept = np.zeros(3), [], [], 0
    for first in list(range(0, len(rows), size)) * flags.epochs:
        part, indices = slice(first, first + size), [i for i in live if first <= i < first + size]
        if not indices:
            continue                                                                # nothing to learn: no update
        denom = len(rows[part]) * flags.max_new_tokens                              # counted before micro-batching
        adv = torch.zeros_like(b["adv"])
        adv[part] = entropy_clip(b["adv"][part], b["prefix"][part], entropy[part], flags.keep, how, generator)
        adv[part] = entropy_clip(adv[part], b["own"][part], entropy[part], flags.own_keep)
        kept += (adv[part] != 0)[b["prefix"][part]].sum().item()
        if flags.prefix_grad:                                                       # a pass over the prefixes alone
            backward(model, b, indices, b["prefix"], adv, old_logp, denom, flags)
            prefix_norms.append(apply_gradients(model, optimizer, lr=None, clip=math.inf))
        part_totals = backward(model, b, indices, b["prefix"] | b["own"], adv, old_logp, denom, flags)
        lr = flags.lr if math.isfinite(part_totals[0]) else None                    # a broken loss updates nothing
        norms.append(apply_gradients(model, optimizer, lr, flags.clip))
        totals += part_totals
    loss, clipped, tokens = totals.tolist()
    shares = {"prefix_grad": sum(prefix_norms) / max(sum(norms), 1e-12)} if prefix_norms else {}
    return {"loss": loss / max(1, len(norms)), "grad_norm": mean(norms) or 0.0, "updates": len(norms),
            "update_tokens": int(tokens), "clip_share": clipped / max(1, tokens),
            "prefix_kept": kept / flags.epochs, **shares}


def mean(values):
    """The mean, or None of nothing (JSON's null)."""
    values = list(values)
    return sum(values) / len(values) if values else None


def describe(rows, flags, step):
    """What one batch of rollouts looked like, for metrics.jsonl."""
    plain, hybrid = [r for r in rows if not r["hybrid"]], [r for r in rows if r["hybrid"]]
    tokens = sum(len(r["response"]) - r["L"] for r in rows)
    return {"reward": mean(r["reward"] for r in plain), "reward_hybrid": mean(r["reward"] for r in hybrid),
            "low": prefix_window(step, flags.steps, flags.high, flags.low, flags.low_end, flags.schedule)[0],
            "prefix_share": mean(r["L"] / r["demo"] for r in hybrid), "prefix_tokens": sum(r["L"] for r in rows),
            "tokens": tokens, "entropy": sum(r["entropy"] for r in rows) / max(1, tokens),
            "length": mean(len(r["response"]) for r in rows), "overlong": mean(not r["finished"] for r in rows)}


# ---- the loop ------------------------------------------------------------------------------------------------------

def prepare(tokenizer, problems, demo_share, seed):
    """Problems with "prompt" (ids) and "demos" (lists of ids); all but a random share of the problems lose theirs."""
    order = np.random.default_rng((seed, 0xDE30)).permutation(len(problems))
    count = math.ceil(demo_share * len(problems) - 1e-6)                            # above 0: at least one
    with_demos, ready = set(order[:count].tolist()), []
    for i, problem in enumerate(problems):
        solution = problem["solution"] if i in with_demos else None
        texts = solution if isinstance(solution, list) else [solution] if solution else []
        ready.append({**problem, "prompt": prompt_ids(tokenizer, problem["problem"]),
                      "demos": [demo_ids(tokenizer, text) for text in texts]})
    return ready


def rollout_sampler(model, tokenizer, problems, benchmarks, flags):
    """A sampler with room for a whole response to every prompt. On a GPU it reads a bf16 twin of the float32 model,
    which sync() brings up to date: half the memory traffic. InputError if the model cannot read that much."""
    prompts = [p["prompt"] for p in problems]
    prompts += [prompt_ids(tokenizer, p["problem"]) for benchmark in benchmarks.values() for p in benchmark]
    sampler, room = new_sampler(model, prompts, flags.max_new_tokens, flags.rows)
    if room < flags.max_new_tokens:
        raise InputError(f"--max_new_tokens {flags.max_new_tokens}: beside the longest prompt the model reads {room}")
    if model.device.type == "cuda":
        sampler = Sampler(model, flags.rows, sampler.length, dtype=torch.bfloat16)
    return sampler


def train(model, tokenizer, problems, benchmarks, flags, sampler, optimizer, state, out=None):
    """The loop, from state["step"] to flags.steps. With `out` it leaves metrics.jsonl and checkpoints."""
    if flags.checkpoint_activations:
        checkpoint_activations(model)
    stop = stop_ids(model, tokenizer)
    bar = tqdm(range(state["step"], flags.steps), initial=state["step"], total=flags.steps, leave=False)
    for step in bar:
        t0 = time.perf_counter()
        sampler.sync(model)
        batch = [problems[i] for i in draw_batch(len(problems), flags.batch, step, flags.seed)]
        rows = rollout(sampler, tokenizer, batch, flags, step, stop)
        t1 = time.perf_counter()
        generator = torch.Generator().manual_seed(flags.seed * 1_000_003 + step)    # for --prefix_loss random
        row = {"step": step + 1, **describe(rows, flags, step), **update(model, optimizer, rows, flags, generator)}
        t2 = time.perf_counter()
        row |= {"rollout_s": t1 - t0, "update_s": t2 - t1, "rollout_tokens_per_s": row["tokens"] / (t1 - t0),
                "update_tokens_per_s": row["update_tokens"] / (t2 - t1)}
        state["step"] = step + 1
        count_bad(state, row)
        shown = {key: f"{row[key]:.2f}" for key in ("reward", "reward_hybrid", "prefix_share") if row[key] is not None}
        bar.set_postfix(shown, refresh=False)
        if flags.eval_every and state["step"] % flags.eval_every == 0 and state["step"] < flags.steps:
            sampler.sync(model)
            row["accuracy"] = assess(model, tokenizer, benchmarks, flags.max_new_tokens, sampler)
        if out:
            log_row(out, row)
            if state["step"] % flags.save_every == 0 or state["step"] == flags.steps:
                save_checkpoint(out, model, tokenizer, optimizer, state)
    return model


# ---- flags and main ------------------------------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory (for example of idft.py: SFT-then-RFT) or a Hub id")
    data: str = flag("toy", "problems with demonstrations: toy, a JSON(L) file or hf://owner/name/file.jsonl")
    eval_data: str = flag("", "evaluated before and after: toy, a JSON(L) file or hf://...; default: toy if --data is")
    out: str = flag("runs/prefix_rft", "directory for metrics.jsonl and checkpoint/")
    method: Literal[("", *METHODS)] = flag("", "shorthand that sets --schedule and --prefix_loss, see above")
    schedule: Literal["cosine", "linear", "uniform", "full", "none"] = flag("cosine", "which prefix [P]")
    prefix_loss: Literal["top", "all", "none", "random", "bottom", "sft", "luffy"] = flag("top", "its gradient [P]")
    advantage: Literal["paper", "code"] = flag("paper", "baseline: mean of all n [P], or as in their code [code]")
    steps: int = flag(500, "batches of rollouts [P]", 1, 10**9)
    batch: int = flag(128, "problems in a batch [P]", 1, 10**6)
    n: int = flag(8, "rollouts a problem, one of them hybrid [P]", 1, 10**4)
    lr: float = flag(1e-6, "learning rate, constant [P]", 0, 10)
    max_new_tokens: int = flag(8192, "longest response, prefix included [P]", 1, 10**6)
    temperature: float = flag(1.0, "of the rollouts [P]", 1e-3, 100)
    high: float = flag(0.95, "largest prefix share [P]", 0, 1)
    low: float = flag(0.95, "smallest prefix share at the start [P]", 0, 1)
    low_end: float = flag(0.05, "smallest prefix share at the end [P]", 0, 1)
    keep: float = flag(0.2, "share of the prefix tokens that keep their advantage [P]", 0, 1)
    own_keep: float = flag(1.0, "the same for tokens that the model wrote [P]", 0, 1)
    clip_ratio: float = flag(0.2, "PPO clip [P]", 0, 1e9)
    mini_batches: int = flag(1, "optimizer steps a pass over the rollouts [ours]", 1, 10**6)
    epochs: int = flag(1, "passes over the rollouts [ours]", 1, 100)
    mask_overlong: bool = flag(False, "no loss on responses that did not end by themselves (reward 0 anyway) [ours]")
    demo_share: float = flag(1.0, "share of problems that keep their demonstrations [P: 1, 0.1, 0.01]", 0, 1)
    weight_decay: float = flag(0.01, "AdamW [ours]", 0, 10)
    clip: float = flag(1.0, "largest gradient norm [ours]", 0, 1e9)
    rows: int = flag(64, "responses sampled side by side: more is faster until memory is full", 1, 10**5)
    micro_tokens: int = flag(16384, "padded tokens in one forward and backward pass: less needs less memory", 1, 10**9)
    checkpoint_activations: bool = flag(False, "recompute activations: a third more time, far less memory")
    prefix_grad: bool = flag(False, "log the prefix tokens' share of the gradient norm (one more backward pass)")
    problems: int = flag(256, "toy: how many training problems", 1, 10**5)
    wrong: float = flag(0.0, "toy: share of demonstrations with a false answer", 0, 1)
    eval_every: int = flag(0, "steps between evaluations; 0: only before and after", 0, 10**9)
    save_every: int = flag(50, "steps between checkpoints", 1, 10**9)
    seed: int = flag(0, "of everything: toy, order, prefixes, rollouts", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the run in --out")
    compare: Literal["", "main", "ablations", "all"] = flag("", "the honest table on the toy instead of one run")


TOY = {"eval_data": "toy", "lr": 3e-4, "steps": 100, "batch": 16, "mini_batches": 2, "max_new_tokens": 48, "rows": 128}


# ---- the honest table ----------------------------------------------------------------------------------------------

GRID, TUNING_SEED, SEEDS = (3e-5, 1e-4, 3e-4, 1e-3), 5, (0, 1, 2, 3, 4)
SUPERVISED = ("sft", "dft", "idft")                           # arms that train on the demonstrations alone
MAIN = {**{loss: {} for loss in SUPERVISED}, "rft": {"method": "rft"}, "sft_rft": {"method": "sft_rft"},
        "luffy": {"method": "luffy"}, "uft": {"method": "uft"}, "prefix_rl": {"method": "prefix_rl"},
        "prefix_rft": {}, "prefix_rft code": {"advantage": "code"}}
ABLATIONS = {"keep 50 %": {"keep": 0.5}, "keep all": {"prefix_loss": "all"}, "keep random": {"prefix_loss": "random"},
             "keep bottom": {"prefix_loss": "bottom"},
             "linear": {"schedule": "linear"}, "uniform": {"schedule": "uniform"},
             "rft clipped": {"method": "rft", "own_keep": 0.2}}
CHANGES = {"10 % demos": {"demo_share": 0.1}, "1 % demos": {"demo_share": 0.01},
           "30 % wrong": {"wrong": 0.3}, "60 % wrong": {"wrong": 0.6}}
DATA = {f"{arm}, {name}": {**MAIN[arm], **change}
        for name, change in CHANGES.items() for arm in ("prefix_rft", "sft_rft")}
ARMS = {**MAIN, **ABLATIONS, **DATA}                          # DATA keeps the learning rate of the arm before the comma


def run_arm(flags, arm, lr, seed):
    """Train one arm on the toy and evaluate it. Every arm has the same problems, number of steps and sequences a step;
    sft_rft spends half of its steps on each half."""
    start, two_stages = time.perf_counter(), arm.startswith("sft_rft")
    job = Flags(**{**asdict(flags), **ARMS[arm], "lr": lr, "seed": seed})
    job.schedule, job.prefix_loss = METHODS.get(job.method, (job.schedule, job.prefix_loss))
    job.steps = job.steps // 2 if two_stages else job.steps
    model, tokenizer = load_model("toy", pick_device(flags.device), seed)
    problems = prepare(tokenizer, toy.problems("train", job.problems, seed, job.wrong), job.demo_share, seed)
    if two_stages or arm in SUPERVISED:
        rows = [(p["prompt"], demo) for p in problems for demo in p["demos"]]
        loss = arm if arm in SUPERVISED else "sft"
        supervised = idft.Flags(loss=loss, lr=lr, steps=job.steps, batch=job.batch * job.n, seed=seed)
        idft.train(model, tokenizer, rows, supervised, new_optimizer(model), {"step": 0, "bad": 0})
    if arm not in SUPERVISED:
        sampler = rollout_sampler(model, tokenizer, problems, {}, job)
        optimizer, state = new_optimizer(model, job.weight_decay), {"step": 0, "bad": 0}
        train(model, tokenizer, problems, {}, job, sampler, optimizer, state)
    if seed == TUNING_SEED:
        return assess(model, tokenizer, {"valid": toy.problems("hard", seed=1)}, job.max_new_tokens)
    result = assess(model, tokenizer, load_benchmarks(["toy"]), job.max_new_tokens)
    sampled = evaluate(model, tokenizer, toy.problems("hard"), 8, 0.6, 0.95, job.max_new_tokens, ks=(1, 8))["pass@k"]
    return {**result, "pass@1": sampled[1], "pass@8": sampled[8], "seconds": time.perf_counter() - start}


def compare(flags):
    """The table: every arm's learning rate is tuned over the same grid on one seed and on problems of its own, then the
    arm is reported on five other seeds. Results stand in <out>/compare.jsonl; a stopped comparison goes on there."""
    arms = {"main": MAIN, "ablations": {**ABLATIONS, **DATA}, "all": ARMS}[flags.compare]
    file, columns = Path(flags.out) / "compare.jsonl", ("toy-hard", "toy-longer", "toy-easy", "pass@1", "pass@8")
    results = lambda arm, jobs: sweep(file, [{"arm": arm, **job} for job in jobs], lambda **job: run_arm(flags, **job),
                                      steps=flags.steps)
    print(f"{'arm':24}    lr   " + "".join(f"{name:14}" for name in columns))
    for arm in arms:
        tuning = results(arm.split(",")[0], [{"lr": lr, "seed": TUNING_SEED} for lr in GRID])
        lr = max(tuning, key=lambda row: row["valid"])["lr"]
        rows = results(arm, [{"lr": lr, "seed": seed} for seed in SEEDS])
        scores = "".join(f"{mean_std([row[key] for row in rows]):14}" for key in columns)
        print(f"{arm:24} {lr:5.0e}   {scores}", flush=True)


def main(flags):
    if flags.compare:
        return compare(flags)
    if flags.method:
        flags.schedule, flags.prefix_loss = METHODS[flags.method]
    if flags.low > flags.high or flags.low_end > flags.high:
        raise InputError(f"--high {flags.high} must be at least --low {flags.low} and --low_end {flags.low_end}")
    if flags.schedule == "full" and flags.n == 1:
        raise InputError("--n 1: the demonstration is the only rollout, give the model at least one of its own")
    if flags.data == "toy":
        problems = toy.problems("train", flags.problems, flags.seed, flags.wrong)
    else:
        problems = load_problems(flags.data)
    benchmarks = load_benchmarks([flags.eval_data] if flags.eval_data else [])
    out, model, tokenizer, optimizer, state = start_run(flags)
    problems = prepare(tokenizer, problems, flags.demo_share, flags.seed)
    sampler = rollout_sampler(model, tokenizer, problems, benchmarks, flags)
    if "before" not in state:
        state["before"] = assess(model, tokenizer, benchmarks, flags.max_new_tokens)
    out.mkdir(parents=True, exist_ok=True)
    if state["step"] == 0:
        log_row(out, {"step": 0, "accuracy": state["before"]})
    train(model, tokenizer, problems, benchmarks, flags, sampler, optimizer, state, out)
    after = assess(model, tokenizer, benchmarks, flags.max_new_tokens)
    log_row(out, {"step": flags.steps, "accuracy": after})
    print(before_and_after(state["before"], after))


if __name__ == "__main__":
    run(main, Flags, toy_defaults=TOY)
