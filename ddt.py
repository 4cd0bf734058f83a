"""
ddt.py - Distribution discriminant theory: could this model have written this text?

Paper: Towards On-Policy SFT, Zhang et al., https://arxiv.org/abs/2602.12222

A token of probability 0.01 is no surprise where the model hesitates between a hundred words, but a
great surprise where it is sure. So phi is the log-probability of a token minus its expected value,
which is -H[p_t] if the model draws the token. In the model's own text phi is zero on average.

    logp          log p(y_t), the log-probability of the token in the text, in nats
    entropy       H[p_t] = -sum_v p_t(v) log p_t(v), in nats
    phi           centered log-likelihood (CLL): log p(y_t) + H[p_t]
    varentropy    V_t = sum_v p_t(v) (log p_t(v) + H[p_t])^2, the variance of phi in own text [ours]
    z, p          z = sum phi / sqrt(sum V), standard normal in long own text; its p-value    [ours]

Own text is text that the model has written; [ours] marks what the paper lacks. In text drawn from q
the mean of phi is H(p) - H(q) - KL(q||p). That is negative for most foreign text, but positive for
text more typical than the model's own (greedy or at a low temperature). So "phi < 0 means out of
distribution" holds only at equal entropy. Left out: the paper's derivation.

    python ddt.py                        the theory on the toy, in a minute
    python ddt.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --problems 128
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from eval import (InputError, context_length, encode, flag, load_model, load_problems, new_sampler,
                  pick_device, printable, run_script, stop_ids)

# How many logits token_stats computes at once. A CPU gets 64 MB, because larger blocks fragment its
# memory. A GPU gets 1 GB: every chunk is one more rounded addition to the head's bf16 gradient.
CHUNK = {"cpu": 2 ** 24, "cuda": 2 ** 28}


# ---- the mathematics ----------------------------------------------------------------------------

class LogpEntropy(torch.autograd.Function):
    """logp_entropy with its gradients written out. It keeps one tensor of the logits' size, and the
    backward pass frees it even if the loss uses only one of the two results."""

    @staticmethod
    def forward(ctx, logits, targets):
        log_p = logits.log_softmax(-1, dtype=torch.float32)                # (..., V)
        logp = log_p.gather(-1, targets[..., None]).squeeze(-1)
        log_p.clamp_(min=-200)                           # exp(-200) is 0, but 0 * -inf is NaN
        entropy = -log_p.exp().mul_(log_p).sum(-1)       # H = -sum p log p
        ctx.save_for_backward(log_p, entropy, targets)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, logp_grad, entropy_grad):
        log_p, entropy, targets = ctx.saved_tensors
        # dlogp / dlogit_v = [v = y] - p_v               dH / dlogit_v = -p_v (log p_v + H)
        factor = torch.zeros_like(entropy)[..., None]
        if logp_grad is not None:
            factor = factor - logp_grad[..., None]
        if entropy_grad is not None:
            factor = factor - entropy_grad[..., None] * (log_p + entropy[..., None])
        grad = log_p.exp().mul_(factor)                                    # (..., V)
        if logp_grad is not None:
            grad.scatter_add_(-1, targets[..., None], logp_grad[..., None])
        return grad, None


def logp_entropy(logits, targets):
    """logits (..., V), targets (...) int64 -> log p(y) and H[p] in nats, each (...), float32 and
    differentiable (once). Exact at any scale of the logits, even with -inf among them."""
    return LogpEntropy.apply(logits, targets)


def cll(logp, entropy):
    """Centered log-likelihood, phi = log p(y) + H[p]; its mean is zero if y is drawn from p."""
    return logp + entropy


def varentropy(logits):
    """logits (..., V) -> V = sum_v p(v) (log p(v) + H)^2 (...), the variance of phi if y ~ p."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    log_p = log_p.clamp(min=-200)                        # exp(-200) is 0, but 0 * -inf is NaN
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return (p * (log_p + entropy) ** 2).sum(-1)


def sequence_test(phi, varentropy, mask):
    """Could the model have written this sequence? phi, varentropy (B, T); mask (B, T), True on the
    tokens to test -> z (B,), two-sided p (B,). If the model drew the tokens, sum phi is a
    martingale of variance sum V, and z tends to a standard normal. If every token was certain, z
    is 0. [ours]"""
    total = torch.where(mask.bool(), phi, 0).sum(-1)
    variance = torch.where(mask.bool(), varentropy, 0).sum(-1)
    z = torch.where(total == 0, 0, total / variance.sqrt())
    p = torch.erfc(z.abs() / 2 ** 0.5)
    return z, p


def all_stats(logits, targets):
    """logp, entropy and varentropy, for token_stats(stats=...)."""
    return *logp_entropy(logits, targets), varentropy(logits)


# ---- the statistics of a text under a model -----------------------------------------------------

def token_stats(model, ids, mask, temperature=1.0, want=None, stats=logp_entropy):
    """log p(y) and H[p] of every token of a batch, without ever holding its (B, T, V) logits: the
    head runs on a chunk of tokens at a time, and again in the backward pass. Gradients are exact.

    ids (B, T) int64; mask (B, T), True on real tokens, padding left or right; want (B, T), True on
    the tokens to compute (default: all) -> logp, entropy, each (B, T-1) float32. Column t describes
    token t+1; it is 0 if that token is not wanted or no real token precedes it. stats: the function
    of (logits, targets) to compute instead. ValueError if the model has no output head."""
    mask = mask.bool()
    backbone = find_backbone(model)
    inputs = {"input_ids": ids, "use_cache": False}
    # Padding on the right needs no mask, since no token looks ahead. Without a mask attention uses
    # its fastest kernel. Padding on the left needs the mask, and positions that skip the padding.
    if (mask[:, :-1] < mask[:, 1:]).any():
        inputs["attention_mask"] = mask.long()
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    output = backbone(**inputs)

    wanted = mask[:, 1:] & mask[:, :-1]                                    # (B, T-1)
    if want is not None:
        wanted &= want[:, 1:].bool()
    hidden = output.last_hidden_state[:, :-1][wanted]                      # (N, D)
    targets = ids[:, 1:][wanted]                                           # (N,)

    def chunk_stats(hidden, targets):
        logits = head(model, backbone, hidden, type(output)).float()       # (n, V)
        if temperature != 1:
            logits = logits / temperature
        return stats(logits, targets)                                      # each (n,)

    # A chunk has at most CHUNK logits, and at most a quarter of the batch.
    vocabulary = model.config.get_text_config().vocab_size
    fit = CHUNK["cuda" if ids.is_cuda else "cpu"] // vocabulary
    size = max(1, min(fit, math.ceil(len(targets) / 4)))
    parts = []
    for chunk in zip(hidden.split(size), targets.split(size)):
        parts.append(checkpoint(chunk_stats, *chunk, use_reentrant=False, preserve_rng_state=False))

    # The statistics are not stacked, so that one that is not used costs nothing in the backward
    # pass. In a stack it would send back zeros.
    zeros = torch.zeros(wanted.shape, device=ids.device)
    columns = [torch.cat(values) for values in zip(*parts)]                # each (N,)
    return tuple(zeros.masked_scatter(wanted, column) for column in columns)


def find_backbone(model):
    """The part of a causal language model below its output head. ValueError if there is none."""
    backbone = model.get_decoder()
    if backbone is model or not isinstance(backbone, PreTrainedModel):     # else the innermost
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                backbone = part
    if backbone is model or model.get_output_embeddings() is None:
        raise ValueError(f"token_stats: {type(model).__name__} has no backbone below a head")
    return backbone


def head(model, backbone, hidden, Output):
    """Final hidden states (n, D) -> logits (n, V), with all that the model does to them (bias,
    scaling, ...): its own forward runs, with its backbone patched to return `hidden`."""
    outputs = [Output(last_hidden_state=hidden[None])]
    own_forward = backbone.__dict__.get("forward")       # some libraries set one on the instance
    backbone.forward = lambda *args, **kwargs: outputs.pop()
    try:
        ids = hidden.new_zeros(1, len(hidden), dtype=torch.long)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        del backbone.forward
        if own_forward:
            backbone.forward = own_forward
    if outputs:
        raise ValueError(f"token_stats: {type(model).__name__} does not call its own backbone")
    return logits[0]


def precision(device):
    """bf16 arithmetic on a GPU. Weights stay float32, because bf16 rounds away a step of 1e-6."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def micro_batches(rows, micro_tokens):
    """(prompt ids, response ids) pairs -> lists of row numbers. A list has rows of similar length,
    at most micro_tokens tokens with their padding, or a single row."""
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    shortest_first = sorted(range(len(rows)), key=lengths.__getitem__)
    groups = []
    for i in shortest_first:
        if not groups or (len(groups[-1]) + 1) * lengths[i] > micro_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def pad_rows(rows, device):
    """(prompt ids, response ids) pairs -> ids, mask (True on real tokens), response (True on tokens
    of the response), each (B, T), padded on the right."""
    ids, mask, response = [], [], []
    for prompt, text in rows:
        ids.append(torch.tensor(prompt + text))
        mask.append(torch.ones_like(ids[-1], dtype=torch.bool))
        response.append(mask[-1].cumsum(0) > len(prompt))
    padded = [pad_sequence(column, batch_first=True) for column in (ids, mask, response)]
    return [column.to(device) for column in padded]


def batch_stats(model, rows, temperature=1.0, stats=logp_entropy):
    """token_stats of the response tokens of ragged rows, in one forward pass.

    rows: (prompt ids, response ids) pairs of lists -> logp (N,), entropy (N,) float32: the tokens
    of the first response, then those of the second, ... ValueError if a prompt is empty."""
    if not all(prompt for prompt, _ in rows):
        raise ValueError("response_stats: a prompt is empty, so nothing predicts what follows")
    ids, mask, response = pad_rows(rows, model.device)                     # each (B, T)
    with precision(model.device):
        columns = token_stats(model, ids, mask, temperature, want=response, stats=stats)
    return tuple(column[response[:, 1:]] for column in columns)            # each (N,)


def response_stats(model, rows, temperature=1.0, stats=logp_entropy, micro_tokens=16384):
    """batch_stats of any number of rows, in micro-batches of at most micro_tokens padded tokens.
    The result is in the order of the rows."""
    of_row = [None] * len(rows)
    for group in micro_batches(rows, micro_tokens):
        columns = batch_stats(model, [rows[i] for i in group], temperature, stats)
        lengths = [len(rows[i][1]) for i in group]
        parts = zip(*[column.split(lengths) for column in columns])        # a tuple for every row
        for i, part in zip(group, parts):
            of_row[i] = part
    return tuple(torch.cat(column) for column in zip(*of_row))             # each (N,)


# ---- comparing texts ----------------------------------------------------------------------------

def text_statistics(logp, entropy, varentropy):
    """Three statistics of a text, each (tokens,) -> {name: number}: its length, means, z and p."""
    phi = cll(logp, entropy)
    numbers = {"tokens": float(len(phi))}
    numbers["logp"] = logp.mean()
    numbers["entropy"] = entropy.mean()
    numbers["phi"] = phi.mean()
    for limit in (-5, -3, -1, 0):
        numbers[f"phi < {limit}"] = (phi < limit).float().mean()
    numbers["z"], numbers["p"] = sequence_test(phi, varentropy, torch.ones_like(phi))
    return numbers


def auroc(own, foreign):
    """Scores (N,), (M,) -> the probability that own exceeds foreign; a tie counts half."""
    foreign = foreign.sort().values
    below = torch.searchsorted(foreign, own)                               # (N,)
    below_or_equal = torch.searchsorted(foreign, own, right=True)
    won = (below + below_or_equal) / 2
    return won.double().mean().item() / len(foreign)


def signal_to_noise(own, foreign):
    """Scores (N,), (M,) -> the distance of their means, in standard deviations of own scores."""
    distance = own.mean() - foreign.mean()
    return (distance / own.std()).item()


def token_texts(tokenizer, ids):
    """The string that every token adds to the text. A character may be spread over several tokens;
    then the last of them adds it and the others add nothing."""
    texts = []
    for end in range(1, len(ids) + 1):
        # Sixteen tokens are enough to see what one more adds. U+FFFD is an unfinished character.
        start = max(0, end - 16)
        before = tokenizer.decode(ids[start:end - 1]).rstrip("\ufffd")
        text = tokenizer.decode(ids[start:end]).rstrip("\ufffd")
        texts.append(text[len(before):])
    return texts


def show_tokens(tokenizer, ids, phi):
    """Print a text, with <phi> after every token whose phi is below -1 or above 1."""
    line = ""
    for text, value in zip(token_texts(tokenizer, ids), phi.tolist()):
        line += text
        if abs(value) > 1:
            line += f"<{value:+.1f}>"
    print("    " + printable(line))


# ---- flags and main -----------------------------------------------------------------------------

OWN, FOREIGN = "T = 1", "demonstrations"
SCORES = """
(b) Why c = 1? The score is log p + c H, of a token or as a mean over a text. Spread: its standard
    deviation in own text. SNR: own mean minus mean of the demonstrations, in spreads. AUROC: how
    often own text scores higher. Own tokens spread least near c = 1. By SNR or AUROC another
    score may be better.

                       of tokens                       of texts
                   SNR    spread     AUROC         SNR    spread     AUROC"""


@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "demonstrations: toy, a JSON(L) file or hf://owner/name/file.jsonl")
    problems: int = flag(256, "how many problems of --data to use", 2)
    max_new_tokens: int = flag(128, "longest text in tokens; longer demonstrations are cut", 1)
    seed: int = flag(0, "seed of the toy and of sampling", 0)
    device: str = flag("auto", "auto, cpu or cuda")


def main(flags):
    problems = load_problems(flags.data, ("solution",), flags.seed)[:flags.problems]
    if len(problems) < 2:
        raise InputError(f"--data {flags.data} has a single problem: a spread needs two or more")
    model, tokenizer = load_model(flags.model, pick_device(flags.device), flags.seed)

    # The texts: what the model writes at three temperatures, and the demonstrations.
    rows = encode(tokenizer, problems, context_length(model))
    prompts = [row["prompt"] for row in rows]
    sampler, room = new_sampler(model, prompts, flags.max_new_tokens)
    stop = stop_ids(model, tokenizer)
    responses = {}                                                   # kind of text -> lists of ids
    for temperature in (0.5, 1, 1.5):
        samples = sampler(prompts, 1, room, stop, temperature, seed=flags.seed)
        responses[f"T = {temperature}"] = [sample.tokens for sample in samples]
    responses[FOREIGN] = [row["demos"][0][:room] for row in rows]

    # The model reads every text once, at temperature 1.
    tokens, texts = {}, {}                                           # kind -> name -> values
    for kind, token_lists in responses.items():
        with torch.no_grad():
            stats = response_stats(model, list(zip(prompts, token_lists)), stats=all_stats)
        tokens[kind] = {"logp": stats[0], "entropy": stats[1]}
        lengths = [len(response) for response in token_lists]
        split = torch.stack(stats).split(lengths, dim=1)                   # (3, tokens) each
        texts[kind] = default_collate([text_statistics(*text) for text in split])

    print("(a) Means over texts ± standard errors. phi is 0 in own text (T = 1), higher in colder "
          "text, lower in hotter and most foreign text.\n")
    print(" " * 15, *[f"{kind:>16}" for kind in texts])
    for name in texts[OWN]:
        line = f"    {name:11}"
        for numbers in texts.values():
            values = numbers[name]
            error = values.std() / len(values) ** 0.5
            line += f"{values.mean():10.3f} ± {error:.3f}".rjust(17)
        print(line)

    print(SCORES)
    for c in (0, 0.5, 0.75, 1, 1.25, 1.5, 2):
        line = f"    c = {c:<4}"
        for stats in (tokens, texts):
            own = stats[OWN]["logp"] + c * stats[OWN]["entropy"]
            foreign = stats[FOREIGN]["logp"] + c * stats[FOREIGN]["entropy"]
            line += f"{signal_to_noise(own, foreign):12.2f}{own.std():10.3f}"
            line += f"{auroc(own, foreign):10.3f}"
        print(line)
    print(f"    z {auroc(texts[OWN]['z'], texts[FOREIGN]['z']):70.3f}")

    print("\n(c) An own text, and a demonstration, with every <phi> that is below -1 or above 1.")
    for kind in (OWN, FOREIGN):
        show_tokens(tokenizer, responses[kind][0], cll(**tokens[kind]))


if __name__ == "__main__":
    run_script(main, Flags)
