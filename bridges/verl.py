"""
verl.py - Prefix-RFT in verl, without patching it (verl 0.9.1, its trainer "v1").

verl imports this file in every process if VERL_USE_EXTERNAL_MODULES=bridges.verl stands in the
environment. What it registers under the name prefix_rft:

    agent loop     makes the last of a problem's n rollouts hybrid: the prefix joins the prompt
                   while the model writes, and moves to the head of the response afterwards
    trainer        the synchronous one, and entropy clipping over the whole batch
    loss           PPO's clip without verl's dual clip

The advantage is verl's own: grpo, not divided by the standard deviation. compute_score is the
reward. bridges/verl_data.py writes the data.

What was tested: these pieces, with a server and a queue that are stand-ins, and the whole of verl
on a CPU for two steps (bridges/check.py). The command line stands in bridges/README.md.
"""

import numpy as np
import torch

from bridges.packages import VERL, need

need(["verl", "transfer_queue", "tensordict"], VERL)

import transfer_queue as tq
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_to_nested

from eval import demo_ids
from prefix_rft import entropy_clip, policy_loss, prefix_length, prefix_window
from reward import reward


# ---- rollouts -----------------------------------------------------------------------------------

class PrefixOutput(AgentLoopOutput):
    """A rollout whose first prefix_length response tokens come from a demonstration."""
    prefix_length: int = 0

    def as_dict(self):
        output = super().as_dict()
        length = output.pop("prefix_length")
        output["prefix_mask"] = (torch.arange(len(output["responses"])) < length).long()    # (T,)
        return output


@register("prefix_rft")
class PrefixAgentLoop(SingleTurnAgentLoop):
    """verl makes one of these for every rollout."""

    def draw_prefix(self, row):
        """Token ids; [] unless the rollout is the last of its group and its row has a solution.
        Drawn by the row's number and the step, so every process would draw the same."""
        solutions = row["extra_info"]["solutions"]
        if row["session_id"] != self.rollout_config.n - 1 or len(solutions) == 0:
            return []
        step = row["global_steps"] - 1                               # verl counts from 1
        rng = np.random.default_rng((row["extra_info"]["index"], step))
        demo = demo_ids(self.tokenizer, solutions[rng.integers(len(solutions))])
        if len(demo) > self.response_length:                         # it could not end in time
            return []
        total_steps = self.config.actor_rollout_ref.actor.optim.total_training_steps
        low, high = prefix_window(step, total_steps)
        return demo[:prefix_length(len(demo), low, high, rng)]

    async def ct_build_initial_tokens(self, messages, **kwargs):
        return await super().ct_build_initial_tokens(messages, **kwargs) + self.prefix

    async def run(self, sampling_params, **row):
        self.prefix = self.draw_prefix(row)
        output = await super().run(sampling_params, **row)

        # The prefix leaves the prompt for the response, which is cut where it would be too long.
        # Its log-probabilities are not the server's: the trainer computes them, 0 holds the place.
        L, room = len(self.prefix), self.response_length
        fields = dict(output)
        fields["prompt_ids"] = output.prompt_ids[:len(output.prompt_ids) - L]
        fields["response_ids"] = (self.prefix + output.response_ids)[:room]
        fields["response_mask"] = ([1] * L + output.response_mask)[:room]
        if output.response_logprobs is not None:
            fields["response_logprobs"] = ([0.0] * L + output.response_logprobs)[:room]

        # A response that fills all its room has not ended by itself, unless with its last token.
        ids = fields["response_ids"]
        finished = len(ids) < room or ids[-1] == self.tokenizer.eos_token_id
        output.extra_fields["finished"] = finished                   # for compute_score
        return PrefixOutput(prefix_length=L, **fields)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """1.0 if the response ended and its last \\boxed{} means the same as the ground truth."""
    if extra_info and not extra_info.get("finished", True):
        return 0.0
    return reward(solution_str, ground_truth)


# ---- the update ---------------------------------------------------------------------------------

@register_trainer("prefix_rft")
class PrefixRFTTrainer(PPOTrainerSync):
    keep = 0.2                          # share of prefix tokens that keep their advantage [P]

    def __init__(self, config):
        # The name has done its work; for verl any other than "sync" means an asynchronous trainer.
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _compute_advantage(self, batch, metrics):
        batch = super()._compute_advantage(batch, metrics)
        fields = ["advantages", "prefix_mask", "response_mask", "entropy"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id,
                               select_fields=fields)
        ragged = data["response_mask"]
        data = data.to_padded_tensor()                                                   # (B, T)
        # verl fills a batch up with rows of response_mask 0, whose prefix_mask is another row's.
        prefix = data["prefix_mask"].bool() & data["response_mask"].bool()
        adv = entropy_clip(data["advantages"], prefix, data["entropy"], self.keep)
        fields = TensorDict({"advantages": response_to_nested(adv, ragged)}, len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


@register_policy_loss("prefix_rft")
def prefix_rft_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
                    rollout_is_weights=None):
    """PPO's clipped surrogate -> scalar, metrics. With loss_agg_mode seq-mean-token-sum-norm it is
    divided by sequences * loss_scale_factor of the whole mini-batch, on all GPUs."""
    loss = policy_loss(log_prob, old_log_prob, advantages, config.clip_ratio)            # (B, T)
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights
    loss = loss.masked_fill(~response_mask.bool(), 0.0)
    return agg_loss(loss, response_mask, loss_agg_mode, **config.global_batch_info), {}
