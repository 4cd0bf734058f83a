"""Distribution discriminant theory: did this model write this text?   (Zhang et al., arXiv 2602.12222)

A fair reader is not surprised by a token of probability 0.01 where the model was unsure, only where it was sure.
So compare each token's log-probability with the one the model expects of its own tokens, minus its entropy:
the difference phi is zero on average exactly when the model itself wrote the text.
"""
import inspect
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK = {"cpu": 2 ** 22, "cuda": 2 ** 25}  # logits token_stats holds at once: 16 or 128 MB in float32


# ---- the mathematics ------------------------------------------------------------------------------------------------

def logp_entropy(logits, targets):
    """log p(y) and H[p] of every token: logits (..., V), targets (...) int64 -> two (...) float32, in nats.

    Exact at any logit scale, -inf logits included. Differentiable once: the gradients are dlogp = 1_y - p and
    dH = -p (log p + H), but a second derivative would be wrong, see below.
    """
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    logp = log_p.gather(-1, targets[..., None]).squeeze(-1)
    # H = -sum p log p, where xlogy knows that 0 log 0 = 0. Nothing needs to flow back through the logarithm, because
    # sum p d(log p) = sum dp = 0; letting it flow would give 0/0 for the words of probability 0.
    entropy = -torch.xlogy(p, p.detach()).sum(-1)
    return logp, entropy


def cll(logp, entropy):
    """Centered log-likelihood phi = log p(y) + H[p] (section 3 of the paper); mean 0 if y was drawn from p."""
    return logp + entropy


def varentropy(logits):
    """V = sum_v p(v) (log p(v) + H)^2, the variance of phi if y was drawn from p: (..., V) -> (...) float32."""
    log_p = logits.log_softmax(-1, dtype=torch.float32).clamp(min=-200)  # exp(-200) is 0 in float32; 0 * inf is NaN
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return (p * (log_p + entropy) ** 2).sum(-1)


def sequence_test(phi, varentropy, mask):
    """Could the model have written this sequence? z = sum phi / sqrt(sum V), two-sided p-value.   (ours)

    phi, varentropy (B, T) and mask (B, T), True on the tokens to test -> z (B,), p (B,). If every token was drawn
    from the model, sum phi is a martingale of variance sum V, so z is about standard normal for long texts.
    A sequence without surprise and without uncertainty (or without tokens) has z = 0, p = 1.
    """
    total = torch.where(mask.bool(), phi, 0).sum(-1)
    variance = torch.where(mask.bool(), varentropy, 0).sum(-1)
    z = torch.where(total == 0, 0, total / variance.sqrt())
    return z, torch.erfc(z.abs() / 2 ** 0.5)


# ---- the statistics of a text under a model -------------------------------------------------------------------------

def token_stats(model, ids, mask, temperature=1.0, want=None, varentropy=False):
    """log p(y) and H[p] for each token of a batch, without ever holding its (B, T, V) logits.

    ids (B, T) int64; mask (B, T), True on real tokens (padding left or right); want (B, T) bool, the tokens to compute
    (default: all). -> logp, entropy (and varentropy if asked), each (B, T-1) float32; column t is about token t+1 and
    is exactly 0 where that token is masked, unwanted or has no real token before it. Gradients are exact.

    The backbone runs once. The output head then runs on a few tokens at a time, and under autograd each piece is
    checkpointed: the backward pass computes its logits again instead of keeping them.
    """
    mask = mask.bool()
    backbone = find_backbone(model)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False, "return_dict": True}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    output = backbone(**inputs)

    def chunk_stats(hidden, targets):  # (n, D), (n,) -> 2 or 3 times (n,)
        logits = head(model, backbone, type(output), hidden) / temperature
        stats = logp_entropy(logits, targets)
        return (*stats, logits_varentropy(logits)) if varentropy else stats

    wanted = mask[:, 1:] & mask[:, :-1]  # (B, T-1)
    if want is not None:
        wanted = wanted & want[:, 1:].bool()
    size = max(1, CHUNK.get(ids.device.type, 2 ** 22) // model.config.get_text_config().vocab_size)
    pieces = zip(output.last_hidden_state[:, :-1][wanted].split(size), ids[:, 1:][wanted].split(size))
    if torch.is_grad_enabled():
        chunks = [checkpoint(chunk_stats, *piece, use_reentrant=False) for piece in pieces]
    else:
        chunks = [chunk_stats(*piece) for piece in pieces]
    zeros = torch.zeros(wanted.shape, device=ids.device)
    return tuple(zeros.masked_scatter(wanted, torch.cat(values)) for values in zip(*chunks))


logits_varentropy = varentropy  # token_stats has an argument of that name


def find_backbone(model):
    """The part of a causal language model below its output head. ValueError if there is no such part."""
    backbone = model.get_decoder()
    if backbone is model:  # transformers does not know it for every architecture; it is the innermost model
        backbone = [module for module in model.modules() if isinstance(module, PreTrainedModel)][-1]
    if backbone is model or model.get_output_embeddings() is None:
        raise ValueError(f"token_stats cannot tell the backbone of {type(model).__name__} from its output head")
    return backbone


def head(model, backbone, Output, hidden):
    """Final hidden states (n, D) -> logits (n, V), by the model's own forward over a backbone that already knows them.

    What follows the backbone differs between architectures (bias, soft-capping, scaling, ...): ask the model
    rather than repeat it here.
    """
    known = mock.Mock(return_value=Output(last_hidden_state=hidden[None]))
    with mock.patch.object(backbone, "forward", known):
        logits = model(input_ids=hidden.new_zeros(1, len(hidden), dtype=torch.long), use_cache=False).logits
    if not known.called:
        raise ValueError(f"token_stats cannot tell the backbone of {type(model).__name__} from its output head")
    return logits[0]
