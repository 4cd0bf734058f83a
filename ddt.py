"""
ddt.py - Distribution discriminant theory: could this model have written this text?

Paper: Towards On-Policy SFT, Zhang et al., https://arxiv.org/abs/2602.12222

A token of probability 0.01 is no surprise where the model hesitates between a hundred words, and a
great one where it is sure. So phi compares the log-probability of a token with the log-probability
that the model expects of its own token, which is minus the entropy. In text that the model itself
wrote phi is zero on average; in other text it need not be.

    code          paper
    logp          log p(y_t), of the token that stands there, in nats
    entropy       H[p_t] = -sum_v p_t(v) log p_t(v), in nats
    phi           centered log-likelihood (CLL): log p(y_t) + H[p_t]
    varentropy    V_t = sum_v p_t(v) (log p_t(v) + H[p_t])^2, variance of phi in own text    [ours]
    z, p          sum phi / sqrt(sum V), normal in long own text, and its p-value          [ours]

What phi does not say: in text drawn from q its mean is H(p) - H(q) - KL(q||p). That is negative for
most foreign text, but positive for text more typical than the model's own (greedy, cold). "phi < 0
means out of distribution" holds only at equal entropy.

Left out: the paper's derivation. Part (c) of the output looks at what it claims.

    python ddt.py                        the theory on the toy, in a minute
    python ddt.py --out runs/ddt         also the numbers of every text, in runs/ddt/texts.jsonl
    python ddt.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --problems 32 --n 4
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from eval import (demo_ids, demonstrations, flag, load_model, load_problems, new_run, new_sampler,
                  pick_device, printable, prompt_ids, run_script, stop_ids, write_rows)

# How many logits token_stats computes at once: 64 MB on a CPU, whose C library fragments what is
# larger. On a GPU 1 GB: every chunk adds to the head's bf16 gradient, and every addition rounds.
CHUNK = {"cpu": 2 ** 24, "cuda": 2 ** 28}


# ---- the mathematics ----------------------------------------------------------------------------

def logp_entropy(logits, targets):
    """log p(y) and H[p] of every token, in nats.

    logits (..., V), targets (...) int64 -> logp (...), entropy (...), both float32 and
    differentiable (once). Exact at any scale of the logits, -inf among them included.
    """
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    logp = log_p.gather(-1, targets[..., None]).squeeze(-1)
    # H = -sum p log p, and xlogy knows that 0 log 0 = 0. The gradient goes through p alone:
    # sum p d(log p) = sum dp = 0, and through the logarithm a word of probability 0 gives 0/0.
    p = log_p.exp()
    entropy = -torch.xlogy(p, p.detach()).sum(-1)
    return logp, entropy


def cll(logp, entropy):
    """Centered log-likelihood, phi = log p(y) + H[p]; mean zero where y was drawn from p."""
    return logp + entropy


def varentropy(logits):
    """V = sum_v p(v) (log p(v) + H)^2, the variance of phi if y ~ p: logits (..., V) -> (...)."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    log_p = log_p.clamp(min=-200)                        # exp(-200) is 0, but 0 * -inf is NaN
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return (p * (log_p + entropy) ** 2).sum(-1)


def sequence_test(phi, varentropy, mask):
    """Could the model have written this sequence? z = sum phi / sqrt(sum V), two-sided p.    [ours]

    phi, varentropy (B, T); mask (B, T), True on the tokens to test -> z (B,), p (B,). If the model
    drew the tokens, sum phi is a martingale whose variance is sum V: z tends to a standard normal.
    A sequence without surprise and without uncertainty has z = 0, p = 1.
    """
    total = torch.where(mask.bool(), phi, 0).sum(-1)
    variance = torch.where(mask.bool(), varentropy, 0).sum(-1)
    z = torch.where(total == 0, 0, total / variance.sqrt())
    p = torch.erfc(z.abs() / 2 ** 0.5)
    return z, p


# ---- the statistics of a text under a model -----------------------------------------------------

def token_stats(model, ids, mask, temperature=1.0, want=None, stats=logp_entropy):
    """log p(y) and H[p] of every token of a batch, without ever holding its (B, T, V) logits.

    ids (B, T) int64; mask (B, T), True on real tokens, padding left or right; want (B, T), True on
    the tokens to compute (default: all) -> logp, entropy, each (B, T-1) float32. Column t is about
    token t+1; it is 0 where that token is masked, unwanted, or has no real token before it.
    stats: what to compute from (logits, targets), a tuple of as many values as come back.
    Gradients are exact. ValueError if the model has no output head.

    The backbone runs once. The head runs on a few tokens at a time, each chunk checkpointed: the
    backward pass computes its logits again instead of keeping them.
    """
    mask = mask.bool()
    backbone = find_backbone(model)
    inputs = {"input_ids": ids, "use_cache": False, "return_dict": True}
    # Padding on the right needs no mask, since no token looks ahead, and without one attention
    # takes its fastest kernel. Padding on the left needs the mask, and positions that skip it.
    padded_left = (mask[:, :-1] < mask[:, 1:]).any()
    if padded_left:
        inputs["attention_mask"] = mask.long()
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    output = backbone(**inputs)

    wanted = mask[:, 1:] & mask[:, :-1]                                    # (B, T-1)
    if want is not None:
        wanted = wanted & want[:, 1:].bool()
    hidden = output.last_hidden_state[:, :-1][wanted]                      # (N, D)
    targets = ids[:, 1:][wanted]                                           # (N,)

    def chunk_stats(hidden, targets):
        logits = head(model, backbone, type(output), hidden)               # (n, V)
        return stats(logits.float() / temperature, targets)

    # At most CHUNK logits at once, and of a small batch at most a quarter.
    vocabulary = model.config.get_text_config().vocab_size
    fit = CHUNK.get(ids.device.type, CHUNK["cpu"]) // vocabulary
    size = max(1, min(fit, math.ceil(len(targets) / 4)))
    parts = []
    for chunk in zip(hidden.split(size), targets.split(size)):
        if torch.is_grad_enabled():
            part = checkpoint(chunk_stats, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            part = chunk_stats(*chunk)
        parts.append(part)

    columns = []
    for values in zip(*parts):
        zeros = torch.zeros(wanted.shape, device=ids.device)
        columns.append(zeros.masked_scatter(wanted, torch.cat(values)))    # (B, T-1)
    return tuple(columns)


def find_backbone(model):
    """The part of a causal language model below its output head. ValueError if there is none."""
    backbone = model.get_decoder()
    if backbone is model:       # not known for this architecture: then it is the innermost model
        inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        backbone = inner[-1]
    if backbone is model or model.get_output_embeddings() is None:
        raise ValueError(f"token_stats needs a causal language model with an output head, "
                         f"{type(model).__name__} has none")
    return backbone


def head(model, backbone, output_type, hidden):
    """Final hidden states (n, D) -> logits (n, V).

    What follows the backbone differs between families (bias, soft-capping, scaling, ...). So this
    is the model's own forward, in which the backbone answers with the states it has computed.
    """
    calls = []

    def answer(*args, **kwargs):
        calls.append(kwargs)
        return output_type(last_hidden_state=hidden[None])

    forward = backbone.__dict__.get("forward")           # some libraries hang one on the instance
    backbone.forward = answer
    try:
        ids = hidden.new_zeros(1, len(hidden), dtype=torch.long)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        del backbone.forward
        if forward is not None:
            backbone.forward = forward
    if not calls:
        raise ValueError(f"token_stats: {type(model).__name__} does not call its own backbone")
    return logits[0]


# ---- the same for ragged rows, which is what the training steps read ----------------------------

def precision(device):
    """bf16 arithmetic on a GPU, float32 on a CPU. Weights stay float32: at learning rate 1e-6 the
    8 bits of bf16 lose the update."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def micro_batches(rows, micro_tokens):
    """Lists of row numbers that hold every row once: rows of like length side by side, padded at
    most micro_tokens together, or a single row. rows: (prompt ids, response ids) pairs."""
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    shortest_first = sorted(range(len(rows)), key=lengths.__getitem__)
    groups = []
    for i in shortest_first:
        if not groups or (len(groups[-1]) + 1) * lengths[i] > micro_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def pad_rows(rows, device):
    """(prompt ids, response ids) pairs -> ids, mask, response, each (B, T): the tokens, padded on
    the right; which of them are real; which of those are the response."""
    T = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    response_mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        mask[i, :end] = True
        response_mask[i, len(prompt):end] = True
    return ids.to(device), mask.to(device), response_mask.to(device)


def response_stats(model, rows, temperature=1.0, stats=logp_entropy, micro_tokens=16384):
    """token_stats of the response tokens of ragged rows, cut into micro-batches.

    rows: (prompt ids, response ids) pairs of lists -> logp (N,), entropy (N,) float32, the tokens
    of the first response, then those of the second, and so on. Differentiable if gradients are on.
    ValueError if a prompt is empty.
    """
    if not all(prompt for prompt, _ in rows):
        raise ValueError("response_stats: a prompt is empty, so nothing foretells its first token")
    of_row = [None] * len(rows)
    for group in micro_batches(rows, micro_tokens):
        ids, mask, response = pad_rows([rows[i] for i in group], model.device)
        with precision(model.device):
            columns = token_stats(model, ids, mask, temperature, want=response, stats=stats)
        found = torch.stack(columns)                                       # (stats, B, T-1)
        for row, i in enumerate(group):
            of_row[i] = found[:, row, response[row, 1:]]                   # (stats, tokens)
    return torch.cat(of_row, dim=1).unbind(0)


def all_stats(logits, targets):
    """logp, entropy and varentropy, for token_stats(stats=...)."""
    return *logp_entropy(logits, targets), varentropy(logits)


# ---- comparing texts ----------------------------------------------------------------------------

def text_statistics(logp, entropy, varentropy):
    """The numbers of one text: all arguments (tokens,) -> {name: float}."""
    phi = cll(logp, entropy)
    z, p = sequence_test(phi, varentropy, torch.ones_like(phi))
    numbers = {"tokens": len(phi), "mean_logp": logp.mean(), "mean_entropy": entropy.mean()}
    numbers["total_phi"] = phi.sum()
    numbers["mean_phi"] = phi.mean()
    for limit in (-1, -3, -5):
        numbers[f"phi<{limit}"] = (phi < limit).float().mean()
    numbers["phi>0"] = (phi > 0).float().mean()
    numbers["z"] = z
    numbers["p"] = p
    return {name: float(value) for name, value in numbers.items()}


def auroc(own, foreign):
    """(N,), (M,) -> the chance that an own text scores higher than a foreign one; 0.5 says nothing.
    A tie counts half."""
    foreign = foreign.sort().values
    below = torch.searchsorted(foreign, own)
    below_or_equal = torch.searchsorted(foreign, own, right=True)
    won = (below + below_or_equal) / 2                                     # (N,)
    return won.double().mean().item() / len(foreign)


def signal_to_noise(own, foreign):
    """Scores (N,), (M,) -> the distance of their means in standard deviations of own text."""
    distance = own.mean() - foreign.mean()
    return (distance / own.std()).item()


def show_tokens(tokenizer, ids, phi):
    """One text, with <phi> behind the tokens where it is below -1 or above 1."""
    words = []
    for token, value in zip(ids, phi.tolist()):
        word = tokenizer.decode([token])
        words.append(word if abs(value) < 1 else f"{word}<{value:+.1f}>")
    print("    " + printable(" ".join(words)))


# ---- flags and main -----------------------------------------------------------------------------

OWN, FOREIGN = "T = 1", "demonstrations"


@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "demonstrations: toy, a JSON(L) file or hf://owner/name/file.jsonl")
    problems: int = flag(256, "how many of its problems to use", 1, 10**6)
    n: int = flag(8, "texts sampled a problem and temperature", 1, 10**4)
    max_new_tokens: int = flag(128, "longest text; demonstrations are cut there too", 1, 10**6)
    rows: int = flag(64, "texts sampled side by side", 1, 10**5)
    seed: int = flag(0, "of the toy and of sampling", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    out: str = flag("", "a new directory for texts.jsonl, the numbers of every text")


@torch.no_grad()
def read_texts(model, prompts, responses):
    """As many responses a prompt -> logp, entropy and varentropy of all their tokens, (3, N)."""
    copies = len(responses) // len(prompts)
    rows = []
    for i, response in enumerate(responses):
        rows.append((prompts[i // copies], response))
    columns = response_stats(model, rows, stats=all_stats)
    return torch.stack(columns).cpu()


def main(flags):
    out = new_run(flags.out, resume=False) if flags.out else None
    problems = load_problems(flags.data, ("solution",), flags.seed)[:flags.problems]
    model, tokenizer = load_model(flags.model, pick_device(flags.device), flags.seed)

    # The texts: what the model writes at three temperatures, and the demonstrations.
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    sampler, room = new_sampler(model, prompts, flags.max_new_tokens, flags.rows)
    stop = stop_ids(model, tokenizer)
    texts = {}                                                       # kind -> list of token ids
    for temperature in (0.5, 1, 1.5):
        samples = sampler(prompts, flags.n, room, stop, temperature, seed=flags.seed)
        texts[f"T = {temperature}"] = [sample.tokens for sample in samples]
    texts[FOREIGN] = []
    for problem in problems:
        demo = demo_ids(tokenizer, demonstrations(problem)[0])
        texts[FOREIGN].append(demo[:room])

    # Every text is read once, at temperature 1.
    stats, numbers = {}, {}
    for kind, responses in texts.items():
        stats[kind] = read_texts(model, prompts, responses)                # (3, N)
        lengths = [len(response) for response in responses]
        numbers[kind] = [text_statistics(*text) for text in stats[kind].split(lengths, dim=1)]

    print("""(a) Means over texts. In the model's own text (T = 1) phi is zero on average, in colder
    text positive, in hotter and most foreign text negative; z is normal where texts are long.
""")
    print(" " * 16 + "".join(f"{kind:>16}" for kind in numbers))
    for name in numbers[OWN][0]:
        line = f"    {name:12}"
        for texts_of_kind in numbers.values():
            mean = sum(text[name] for text in texts_of_kind) / len(texts_of_kind)
            line += f"{mean:16.3f}"
        print(line)

    print("\n(b) Own texts against demonstrations, told apart by one number a text: AUROC\n")
    for name in ("mean_logp", "mean_phi", "z"):
        own = torch.tensor([text[name] for text in numbers[OWN]])
        foreign = torch.tensor([text[name] for text in numbers[FOREIGN]])
        print(f"    {name:12}{auroc(own, foreign):16.3f}")

    print("""
(c) Why c = 1? The score log p + c H of single tokens: how far the means of own text and of
    demonstrations lie apart in units of the spread of own text (SNR), that spread, AUROC.
""")
    for c in (0, 0.5, 0.75, 1, 1.25, 1.5, 2):
        own = stats[OWN][0] + c * stats[OWN][1]
        foreign = stats[FOREIGN][0] + c * stats[FOREIGN][1]
        print(f"    c = {c:<8}{signal_to_noise(own, foreign):16.2f}{own.std():16.3f}"
              f"{auroc(own, foreign):16.3f}")
    print("""
    Own text spreads least near c = 1, where nothing of the score can be foretold. What this does
    not show: that phi is the best score of whole texts, or by the spread of both kinds.

(d) Token by token, <phi> where it is below -1 or above 1: an own text, and a demonstration.""")
    for kind in (OWN, FOREIGN):
        logp, entropy, _ = stats[kind]
        show_tokens(tokenizer, texts[kind][0], cll(logp, entropy))

    if out:
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        for kind, responses in texts.items():
            for response, row in zip(responses, numbers[kind]):
                text = tokenizer.decode(response, skip_special_tokens=True)
                rows.append({"source": kind, **row, "text": text})
        write_rows(out / "texts.jsonl", rows)


if __name__ == "__main__":
    run_script(main, Flags)
