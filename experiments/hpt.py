"""
hpt.py - Hybrid Post-Training: imitate where all rollouts of a problem fail, reinforce elsewhere.

Paper: Towards a Unified View of Large Language Model Post-Training,
https://arxiv.org/abs/2509.04419

In a group without a right answer every advantage is 0. There the demonstration takes the place of
one rollout and is learnt with weight 1 on -log p, which is SFT; the other groups stay as they are.
The loop is that of prefix_rft.py with method rft; `python -m experiments.rl --arms hpt` trains with
it, this file has no command. Ours: the weight 1, divided like all else.
"""

from experiments.relatives import static_loss
from prefix_rft import Rollout


def demonstrate_failures(rollouts, problems, n):
    """In every group of n rollouts that all fail, the first becomes the first demonstration of its
    problem, if there is one. problems: one a group, with "demos"."""
    rollouts = list(rollouts)
    for i, problem in enumerate(problems):
        group = rollouts[i * n:(i + 1) * n]
        failed = not any(r.reward for r in group)
        if failed and problem["demos"]:
            demo = problem["demos"][0]
            length = len(demo)
            rollouts[i * n] = Rollout(problem["prompt"], demo, problem["answer"], length, length)
    return rollouts


def full_weight(adv, prefix, entropy, keep, how, generator):
    """In the place of entropy_clip: a demonstration's tokens have the advantage 1."""
    return adv.masked_fill(prefix, 1.0)


VARIANT = {"learning": {"entropy_clip": full_weight, "prefix_loss": static_loss}}
