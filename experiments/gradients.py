"""
gradients.py - how much of the gradient comes from prefixes: norms during one run on the toy.

The gradient of the prefixes is what is left when the same update, with frozen prefixes, is taken
away: once with the top 20 % of their tokens, as in Prefix-RFT, once with all of them.

    python -m experiments.gradients
    python -m experiments.gradients --steps 20 --every 4
"""

import copy
from dataclasses import dataclass, replace

import torch

import idft
import prefix_rft
from eval import flag, run_script, stop_ids
from experiments.rl import new_world


def gradient(model, rollouts, flags, prefix_loss):
    """The gradient of one update on all rollouts, before it is clipped, as one vector; the model
    stays as it is."""
    twin, rollouts = copy.deepcopy(model), copy.deepcopy(rollouts)
    flags = replace(flags, prefix_loss=prefix_loss, mini_batches=1, lr=1.0)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    metrics = prefix_rft.update(twin, optimizer, rollouts, flags)
    step = []
    for before, after in zip(model.parameters(), twin.parameters()):
        step.append((before - after).detach().flatten())
    return torch.cat(step) * max(1.0, metrics["grad_norm"])        # it was clipped to norm 1


@dataclass
class Flags:
    steps: int = flag(prefix_rft.TOY["steps"], "batches of rollouts", 1)
    every: int = flag(5, "steps between two looks", 1)
    seed: int = flag(0, "of everything", 0)


def main(flags):
    training = prefix_rft.Flags(**{**prefix_rft.TOY, "steps": flags.steps, "seed": flags.seed})
    model, tokenizer, problems, sampler, _ = new_world(flags.seed, training.max_new_tokens)
    optimizer, stop = idft.new_optimizer(model), stop_ids(model, tokenizer)
    print("step     all   of prefixes: top 20 %   all tokens")
    for step in range(flags.steps):
        sampler.sync(model)
        batch = idft.draw_batch(problems, training.batch, step, flags.seed)
        rollouts = prefix_rft.sample_rollouts(sampler, tokenizer, batch, training, step, stop)
        if step % flags.every == 0:
            frozen = gradient(model, rollouts, training, "none")
            top = gradient(model, rollouts, training, "top")
            everything = gradient(model, rollouts, training, "all")
            print(f"{step + 1:4}{top.norm():8.3f}{(top - frozen).norm():22.3f}"
                  f"{(everything - frozen).norm():13.3f}", flush=True)
        prefix_rft.update(model, optimizer, rollouts, training)


if __name__ == "__main__":
    run_script(main, Flags)
