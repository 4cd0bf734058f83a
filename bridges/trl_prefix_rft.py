"""
trl_prefix_rft.py - Prefix-RFT in TRL's GRPOTrainer, on any number of GPUs (TRL 1.16: the three
methods overridden here are private, and another version may call them otherwise).

TRL keeps the rollouts of a problem side by side, num_generations of them, perhaps split between two
processes. In training the last one starts from a prefix of a demonstration: the prefix is appended
to the prompt while the model writes, and then counted to the completion, so reward, length and loss
see it as part of the response. TRL's advantage, reward minus the group's mean, is the paper's; it
gets a column for every token, and entropy clipping looks at the whole batch of rollouts, on all
GPUs. With mini-batches (--steps_per_generation above --gradient_accumulation_steps) prefix_rft.py
clips each mini-batch for itself.

Why not otherwise: TRL's rollout_func does not see the demonstrations, and its env_mask would take
the gradient of the prefix away.

The command line stands in bridges/README.md.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from bridges.trl_grpo import RFTTrainer, dataset, train      # first: it says what is not installed
from bridges.trainer import run_bridge
from trl import GRPOConfig

from eval import flag
from prefix_rft import entropy_clip, prefix_length, prefix_window, prepare_problems


@dataclass
class PrefixRFTConfig(GRPOConfig):
    keep: float = flag(0.2, "share of prefix tokens that keep their advantage [P]", 0, 1)


class PrefixRFTTrainer(RFTTrainer):
    """args: a PrefixRFTConfig. The dataset has a column "demos": of every problem a list of
    demonstrations, each at most max_completion_length token ids."""

    def draw_prefixes(self, inputs):
        """The prefix (token ids) of every rollout of this process; [] for those that have none."""
        prefixes = []
        low, high = prefix_window(self.state.global_step, self.state.max_steps)
        first = self.accelerator.process_index * len(inputs)
        for number, row in enumerate(inputs, first):                 # counted over all processes
            prefix = []
            last_of_group = (number + 1) % self.num_generations == 0
            if self.model.training and last_of_group and row["demos"]:
                rng = np.random.default_rng((self.args.seed, self.state.global_step, number))
                demo = row["demos"][rng.integers(len(row["demos"]))]
                prefix = demo[:prefix_length(len(demo), low, high, rng)]
            prefixes.append(prefix)
        return prefixes

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        # Every row is a prompt of its own now, so the generator is told 1.
        starts = [prompt + prefix for prompt, prefix in zip(prompt_ids, self.prefixes)]
        written, logps = super()._generate_single_turn(starts, images, multimodal_fields, 1)
        for i, prefix in enumerate(self.prefixes):
            written[i] = (prefix + written[i])[:self.max_completion_length]
            if logps is not None:                                    # vLLM; nan: ratio exactly 1
                logps[i] = ([math.nan] * len(prefix) + logps[i])[:self.max_completion_length]
        return written, logps

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        self.prefixes = self.draw_prefixes(inputs)
        batch = super()._generate_and_score_completions(inputs)

        # How sure the model was of every token of a prefix.
        B, T = batch["completion_ids"].shape
        prefix = torch.zeros_like(batch["completion_ids"])                               # (B, T)
        for row, ids in zip(prefix, self.prefixes):
            row[:len(ids)] = 1
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], prefix], dim=1)
        _, entropy, _ = self._get_per_token_logps_and_entropies(
            self.model, ids, mask, T, self.args.per_device_train_batch_size, compute_entropy=True)

        # Entropy clipping over the rollouts of all processes; each takes its own rows back.
        adv = batch["advantages"][:, None].expand(B, T)
        rows = torch.stack([adv, prefix.float(), entropy.float()], dim=-1)               # (B, T, 3)
        rows = self.accelerator.gather(self.accelerator.pad_across_processes(rows, dim=1))
        adv, prefix, entropy = rows.unbind(-1)                         # (processes * B, longest T)
        adv = entropy_clip(adv, prefix.bool(), entropy, self.args.keep)
        batch["advantages"] = adv.split(B)[self.accelerator.process_index][:, :T]
        return batch


def main(model, tokenizer, problems, args):
    prepared = prepare_problems(tokenizer, problems, args.max_completion_length)
    rows = dataset(tokenizer, problems)
    rows = rows.add_column("demos", [problem["demos"] for problem in prepared])
    train(PrefixRFTTrainer, model, tokenizer, rows, args)


if __name__ == "__main__":
    run_bridge(main, PrefixRFTConfig, require=("answer",))
