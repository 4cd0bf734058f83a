"""
trl_watch.py - `python -m bridges.trl_prefix_rft ...` on a CPU, with vLLM in the same process, and
every batch of rollouts left for bridges/check.py as OUTPUT_DIR/rollouts1.pt, rollouts2.pt, ...
"""

from pathlib import Path

import torch
import trl.generation.vllm_generation as generation

import bridges.trl_prefix_rft as bridge
from bridges.trainer import run_bridge

LLM = generation.LLM
Trainer = bridge.PrefixRFTTrainer


def plain_llm(**settings):
    """vLLM without compilation, and in float32 as the trainer; by itself it would take bf16."""
    return LLM(**settings | {"enforce_eager": True, "dtype": "float32"})


class WatchedTrainer(Trainer):

    def _calculate_rewards(self, *args):
        reward = super()._calculate_rewards(*args)
        self.reward = reward[:, 0]                                 # (B,), of one reward function
        return reward

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        rollouts = []
        for i, prefix in enumerate(self.prefixes):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            written = batch["completion_mask"][i].bool()                                 # (T,)
            rollouts.append({
                "prompt": prompt.tolist(),
                "response": batch["completion_ids"][i][written].tolist(),
                "prefix": len(prefix),
                "reward": self.reward[i].item(),
                "adv": batch["advantages"][i][written],
                "ratio": batch["importance_sampling_ratio"][i][written]})
        path = Path(self.args.output_dir) / f"rollouts{self.state.global_step + 1}.pt"
        torch.save(rollouts, path)
        return batch


if __name__ == "__main__":
    generation.LLM = plain_llm
    bridge.PrefixRFTTrainer = WatchedTrainer
    run_bridge(bridge.main, bridge.PrefixRFTConfig, require=("answer",))
