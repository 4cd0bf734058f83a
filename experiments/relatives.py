"""
relatives.py - relatives of Prefix-RFT that need code of their own: LUFFY, UFT, a static weight.

The loop is that of prefix_rft.py; a relative replaces some of its functions (VARIANTS):

    starting    arguments of sample_rollouts: prefix_window, prefix_length
    learning    arguments of update: entropy_clip, and prefix_loss(logp, adv) -> the loss of prefix
                tokens; all other tokens keep policy_loss

    static     -0.001 log p is the loss of a prefix token, whatever the reward (2507.01679, Table 8)
    luffy      https://arxiv.org/abs/2504.14945: one of the n rollouts is a whole demonstration. Its
               tokens get p / (p + 0.1) in place of the ratio. Nothing is clipped. LUFFY's code
               takes its baseline from the plain rollouts alone: --advantage code
    uft        https://arxiv.org/abs/2505.16984: all n rollouts start from one hint, whose loss is
               that of static. UFT's code averages this loss over the tokens of a hint; here it is
               divided like the loss of all other tokens

    python -m experiments.relatives --method luffy
    python -m experiments.relatives --method uft --data train.jsonl --model Qwen/Qwen2.5-0.5B
"""

import math
from dataclasses import dataclass
from typing import Literal

import prefix_rft
from eval import InputError, flag, run_script
from prefix_rft import TOY

# The flags that each method sets. "all": no entropy clipping. "none": a schedule of its own.
METHODS = {
    "static": {"schedule": "cosine", "hybrids": 1, "prefix_loss": "all"},
    "luffy": {"schedule": "none", "hybrids": 1, "prefix_loss": "all", "clip_ratio": 1e9},
    "uft": {"schedule": "none", "hybrids": -1, "prefix_loss": "all"},
}
STATIC_WEIGHT = 0.001                   # of -log p, in static and uft


# ---- how a rollout starts -----------------------------------------------------------------------

def whole_length(demo_length, low, high, rng):
    """For prefix_length. LUFFY: the whole demonstration is the prefix; nothing is left to write."""
    return demo_length


def hint_window(step, total_steps, high=0.95, low_end=0.05, schedule="none"):
    """For prefix_window. UFT: low = high = p, the probability of each fifth of a hint. p falls from
    high to low_end along a cosine over the first 60 % of the steps; then it is 0."""
    progress = step / total_steps
    if progress > 0.6:
        return 0.0, 0.0
    p = low_end + (high - low_end) * 0.5 * (1 + math.cos(math.pi * progress / 0.6))
    return p, p


def hint_length(demo_length, low, high, rng):
    """For prefix_length. UFT: toss five coins, each heads with probability low. The hint has one
    fifth of the demonstration per head, but leaves at least one token to write."""
    fifths = rng.binomial(5, low)
    return min(round(fifths / 5 * demo_length), demo_length - 1)


# ---- what the prefix teaches --------------------------------------------------------------------

def static_advantage(adv, prefix, entropy, keep, how, generator):
    """For entropy_clip: every prefix token has advantage STATIC_WEIGHT, whatever the reward."""
    return adv.masked_fill(prefix, STATIC_WEIGHT)


def static_loss(logp, adv):
    """-A log p. This is the loss of SFT, weighted by A."""
    return -adv * logp


def shaped_loss(logp, adv):
    """LUFFY: -A p / (p + 0.1), without an importance ratio."""
    p = logp.exp()
    return -adv * p / (p + 0.1)


VARIANTS = {
    "static": {"learning": {"entropy_clip": static_advantage, "prefix_loss": static_loss}},
    "luffy": {"starting": {"prefix_length": whole_length},
              "learning": {"prefix_loss": shaped_loss}},
    "uft": {"starting": {"prefix_window": hint_window, "prefix_length": hint_length},
            "learning": {"entropy_clip": static_advantage, "prefix_loss": static_loss}},
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
            raise InputError(f"--{name}: --method {flags.method} has its own; remove the flag")
    if flags.method == "luffy" and flags.hybrids in (-1, flags.n):
        raise InputError("--method luffy needs a rollout without a demonstration: lower --hybrids "
                         f"{flags.hybrids}")
    prefix_rft.main(flags, **VARIANTS[flags.method])


if __name__ == "__main__":
    run_script(main, Flags, TOY, METHODS)
