"""
verl_watch.py - leaves every batch of rollouts of bridges/verl.py for bridges/check.py, as
rollouts1.pt, rollouts2.pt, ... in the directory that BRIDGES_CHECK names. verl imports it in every
process, after bridges.verl.
"""

import os
from pathlib import Path

import torch
import transfer_queue as tq
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

import bridges.verl as bridge

FOLDER = Path(os.environ["BRIDGES_CHECK"])
FIELDS = ["prompts", "responses", "prefix_mask", "rm_scores", "advantages"]

compute_advantage = bridge.PrefixRFTTrainer._compute_advantage
policy_loss = POLICY_LOSS_REGISTRY["prefix_rft"]


def watched_advantage(self, batch, metrics):
    batch = compute_advantage(self, batch, metrics)
    keys = sorted(batch.keys)                       # UID_SESSION_0: a problem's rollouts in a row
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=FIELDS)
    rollouts = []
    for prompt, response, prefix, reward, adv in zip(*(data[name].unbind() for name in FIELDS)):
        rollouts.append({"prompt": prompt.tolist(),
                         "response": response.tolist(),
                         "prefix": prefix.sum().item(),
                         "reward": reward.sum().item(),
                         "adv": adv.clone()})
    torch.save(rollouts, FOLDER / f"rollouts{self.global_steps}.pt")
    return batch


def watched_loss(old_log_prob, log_prob, advantages, response_mask, *args, **kwargs):
    ratio = (log_prob - old_log_prob)[response_mask.bool()].exp()
    with open(FOLDER / "ratios.txt", "a") as file:
        print(ratio.min().item(), ratio.max().item(), file=file)
    return policy_loss(old_log_prob, log_prob, advantages, response_mask, *args, **kwargs)


bridge.PrefixRFTTrainer._compute_advantage = watched_advantage
POLICY_LOSS_REGISTRY["prefix_rft"] = watched_loss
