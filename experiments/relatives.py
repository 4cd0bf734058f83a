"""
relatives.py - relatives of Prefix-RFT that need code of their own: LUFFY, UFT, a static weight.

The loop is that of prefix_rft.py. Three of its functions may be replaced, and a relative replaces
one or two of them:

    draw_length(demo, step, flags, rng) -> L                    how much of it a rollout starts from
    entropy_clip(adv, prefix, entropy, keep, how, generator) -> adv     of a mini-batch
    token_loss(logp, old_logp, adv, prefix, flags) -> loss      of every token, (tokens,) each

    static     0.001 on -log p of the whole prefix, whatever the reward (2507.01679, Table 8)
    luffy      https://arxiv.org/abs/2504.14945: one of the n rollouts is a whole demonstration, whose
               tokens get p / (p + 0.1) in the place of the ratio; nothing is clipped. LUFFY's code
               takes its baseline from the plain rollouts alone: --advantage code
    uft        https://arxiv.org/abs/2505.16984: all n rollouts start from one hint, which learns by
               the static weight. UFT's code averages over the tokens of a hint; here they are
               divided like all others

    python -m experiments.relatives --method luffy
    python -m experiments.relatives --method uft --data train.jsonl --model Qwen/Qwen2.5-0.5B
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

import prefix_rft
from eval import InputError, flag, run_script
from prefix_rft import TOY, policy_loss

# The flags of each. prefix_loss "all": no entropy clipping. schedule "none": the start is its own.
METHODS = {
    "static": {"schedule": "cosine", "hybrids": 1, "prefix_loss": "all"},
    "luffy": {"schedule": "none", "hybrids": 1, "prefix_loss": "all", "clip_ratio": 1e9},
    "uft": {"schedule": "none", "hybrids": -1, "prefix_loss": "all"},
}
STATIC_WEIGHT = 0.001                   # of -log p, in static and uft


# ---- how a rollout starts -----------------------------------------------------------------------

def whole_demonstration(demo, step, flags, rng):
    """LUFFY: the demonstration is the rollout, and nothing is left to write."""
    return len(demo)


def hint_probability(step, total_steps, high=0.95, low=0.05):
    """UFT: falls from high to low along a cosine in 60 % of the steps, then is 0."""
    progress = step / total_steps
    if progress > 0.6:
        return 0.0
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress / 0.6))


def binomial_hint(demo, step, flags, rng):
    """UFT: as many fifths of the demonstration as five coins say; something is left to write."""
    fifths = rng.binomial(5, hint_probability(step, flags.steps, low=flags.low_end))
    return min(round(fifths / 5 * len(demo)), len(demo) - 1)


# ---- what the prefix teaches --------------------------------------------------------------------

def static_advantage(adv, prefix, entropy, keep, how, generator):
    """The advantage of a prefix token is STATIC_WEIGHT, whatever the reward. As entropy_clip."""
    return adv.masked_fill(prefix, STATIC_WEIGHT)


def static_loss(logp, old_logp, adv, prefix, flags):
    """-A log p of the prefix, so A is the weight of SFT's loss; the rest is PPO's."""
    loss = policy_loss(logp, old_logp, adv, flags.clip_ratio)
    return torch.where(prefix, -adv * logp, loss)


def shaped_loss(logp, old_logp, adv, prefix, flags):
    """LUFFY: -A p / (p + 0.1) of the demonstration, without importance ratio; the rest is PPO's."""
    p = logp.exp()
    loss = policy_loss(logp, old_logp, adv, flags.clip_ratio)
    return torch.where(prefix, -adv * p / (p + 0.1), loss)


VARIANTS = {
    "static": {"entropy_clip": static_advantage, "token_loss": static_loss},
    "luffy": {"draw_length": whole_demonstration, "token_loss": shaped_loss},
    "uft": {"draw_length": binomial_hint, "entropy_clip": static_advantage,
            "token_loss": static_loss},
}


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags(prefix_rft.Flags):
    out: str = flag("runs/relatives", "directory for metrics.jsonl and checkpoint/")
    method: Literal[tuple(METHODS)] = flag("luffy", "which relative")


def main(flags):
    for name in ("schedule", "prefix_loss"):
        own = METHODS[flags.method][name]
        if getattr(flags, name) != own:
            raise InputError(f"--{name}: --method {flags.method} has its own, leave the flag away")
    if flags.method == "luffy" and flags.hybrids in (-1, flags.n):
        raise InputError("--method luffy needs a rollout without a demonstration: lower --hybrids "
                         f"{flags.hybrids}")
    prefix_rft.main(flags, **VARIANTS[flags.method])


if __name__ == "__main__":
    run_script(main, Flags, TOY, METHODS)
