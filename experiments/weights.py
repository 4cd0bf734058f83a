"""
weights.py - other weights of a token than those of idft.py, each a function like idft.token_weight.

    reversed     gamma = exp(+phi): loud where IDFT is quiet
    mask         1 where phi is above a limit, else 0
    eaft         H / log|V|, Entropy-Adaptive Fine-Tuning, https://arxiv.org/abs/2601.02151: only
                 where the model hesitates is anything learnt, however improbable the token
"""

import math

import torch

import idft
from ddt import cll


def reversed_weight(logp, entropy, loss, beta, gamma_min, gamma_max, strength):
    """w = p^gamma with gamma = exp(+phi / beta): the other sign. Arguments of idft.token_weight."""
    logp, entropy = logp.detach(), entropy.detach()
    gamma = torch.exp(cll(logp, entropy) / beta).clamp(gamma_min, gamma_max)
    return torch.exp((1 + strength * (gamma - 1)) * logp)


def mask_weight(limit):
    """-> the weight 1 where phi > limit and 0 elsewhere, with the arguments of token_weight."""
    def weigh(logp, entropy, loss, beta, gamma_min, gamma_max, strength):
        return (cll(logp, entropy).detach() > limit).float()
    return weigh


def entropy_weight(vocabulary):
    """-> the weight H / log|V| of EAFT, with the arguments of token_weight."""
    def weigh(logp, entropy, loss, beta, gamma_min, gamma_max, strength):
        return entropy.detach() / math.log(vocabulary)
    return weigh


def weight_of(arm, vocabulary):
    """The function that weighs the tokens of a supervised arm. vocabulary: its size."""
    if arm["loss"] == "reversed":
        return reversed_weight
    if arm["loss"] == "mask":
        return mask_weight(arm["limit"])
    if arm["loss"] == "eaft":
        return entropy_weight(vocabulary)
    return idft.token_weight
