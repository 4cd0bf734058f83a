"""Prefix-RFT's advantage, entropy clipping and loss in verl's registries, and the reward as verl wants one (verl 0.9.1).

verl imports this file in every process if VERL_USE_EXTERNAL_MODULES=bridges.verl is set in the environment; then
adv_estimator=prefix_rft and loss_mode=prefix_rft find it. verl 0.9.1 hands an estimator rewards, mask and uid only:
until an agent loop makes hybrid rollouts and prefix_mask and entropy are passed on, this is Dr.GRPO (see the README).
"""

import torch
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

from prefix_rft import advantages, entropy_clip, policy_loss
from reward import reward


@register_adv_est("prefix_rft")
def prefix_rft_advantage(token_level_rewards, response_mask, index, config=None, prefix_mask=None, entropy=None, **_):
    """Advantage and return of every token, both (B, T). index (B,): rows of one uid are one group; prefix_mask (B, T):
    tokens of the demonstration; entropy (B, T): of the policy that sampled, nats."""
    tokens = response_mask.bool()
    prefix = torch.zeros_like(tokens) if prefix_mask is None else prefix_mask.bool() & tokens
    score, hybrid = token_level_rewards.sum(-1), prefix.any(-1)                     # (B,)
    own_adv, prefix_adv = torch.zeros_like(score), torch.zeros_like(score)
    for uid in set(index):
        group = [i for i, other in enumerate(index) if other == uid]                # groups need not be of one size
        own_adv[group], prefix_adv[group] = (a[0] for a in advantages(score[None, group], hybrid[None, group]))
    adv = torch.where(prefix, prefix_adv[:, None], own_adv[:, None]) * tokens
    adv = adv if prefix_mask is None else entropy_clip(adv, prefix, entropy)
    return adv, adv


@register_policy_loss("prefix_rft")
def prefix_rft_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="", config=None, rollout_is_weights=None):
    """PPO's clipped sum over (sequences of the step * loss_scale_factor), whatever loss_agg_mode. -> scalar, metrics."""
    adv = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    step = config.global_batch_info                                                 # counted before micro-batching
    denom = step["global_batch_size"] * config.loss_scale_factor / step["dp_size"]  # GPUs average their gradients
    loss, metrics = policy_loss(log_prob, old_log_prob, adv, response_mask.bool(), denom, config.clip_ratio)
    return loss, {"actor/pg_clipfrac": metrics["clip_share"], "actor/ratio": metrics["ratio"]}


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """1.0 if the last \\boxed{} of the response means the same as the ground truth, else 0.0."""
    return reward(solution_str, ground_truth)
