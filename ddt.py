"""Distribution discriminant theory: could this model have written this text?

Paper: Towards On-Policy SFT (Zhang et al., https://arxiv.org/abs/2602.12222), section 2 and appendix A.
A token of probability 0.01 is no surprise where the model hesitates between a hundred words, and a great one
where it is sure. So phi compares the log-probability of a token with the one the model expects of its own,
minus the entropy. Where the model itself wrote the text, phi is zero on average; elsewhere it need not be.

    code             paper and meaning
    logp, entropy    log p(y_t) and H[p_t] = -sum_v p_t(v) log p_t(v) under the model that reads, in nats
    phi              centered log-likelihood (CLL): log p(y_t) + H[p_t]
    varentropy       V_t = sum_v p_t(v) (log p_t(v) + H[p_t])^2: the variance of phi in own text       (ours)
    z, p             sum phi / sqrt(sum V), about standard normal in own text, and its p-value     (ours)

What phi does not say: in text drawn from q it is H(p) - H(q) - KL(q||p) on average. That is negative for most
foreign text, but positive for text more typical than the model's own (greedy, low temperature): phi < 0 means
"out of distribution" only at equal entropy.

Left out: the paper's derivation of phi as the statistic with the best signal-to-noise ratio.

    python ddt.py                                    the theory on the toy, under a minute
    python ddt.py --html phi.html --out runs/ddt     also a page of coloured texts, and numbers for every text
    python ddt.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --problems 32 --n 4
"""
import html
import inspect
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import toy
from eval import (InputError, demo_ids, flag, load_model, load_problems, new_sampler, pick_device, prompt_ids,
                  run, stop_ids)

# How many logits token_stats computes at once: 64 or 128 MB in float32. Fewer make a GPU wait for its memory;
# on a CPU the C library, which hands only blocks above 32 MB back to the system, fragments what it keeps.
CHUNK = {"cpu": 2 ** 24, "cuda": 2 ** 25}


# ---- the mathematics ---------------------------------------------------------------------------------------

def logp_entropy(logits, targets):
    """log p(y) and H[p] of every token: logits (..., V), targets (...) int64 -> two (...) float32, in nats.

    Exact at any logit scale, -inf logits included. Differentiable once: the gradients are dlogp = 1_y - p and
    dH = -p (log p + H), but a second derivative would be wrong, see below.
    """
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    logp = log_p.gather(-1, targets[..., None]).squeeze(-1)
    # H = -sum p log p, where xlogy knows that 0 log 0 = 0. No gradient needs to flow through the logarithm,
    # because sum p d(log p) = sum dp = 0; if it did flow, words of probability 0 would give 0/0.
    entropy = -torch.xlogy(p, p.detach()).sum(-1)
    return logp, entropy


def cll(logp, entropy):
    """Centered log-likelihood phi = log p(y) + H[p] (paper, section 2); mean 0 if y was drawn from p."""
    return logp + entropy


def varentropy(logits):
    """V = sum_v p(v) (log p(v) + H)^2, the variance of phi if y ~ p: logits (..., V) -> (...) float32."""
    log_p = logits.log_softmax(-1, dtype=torch.float32).clamp(min=-200)  # exp(-200) = 0; 0 * inf is NaN
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return (p * (log_p + entropy) ** 2).sum(-1)


logits_varentropy = varentropy  # for token_stats, which has an argument of that name


def sequence_test(phi, varentropy, mask):
    """Could the model have written this sequence? z = sum phi / sqrt(sum V), two-sided p-value.   (ours)

    phi, varentropy (B, T); mask (B, T), True on the tokens to test -> z (B,), p (B,). If the model drew the
    tokens, sum phi is a martingale with variance sum V, so z is about standard normal for long texts.
    A sequence without surprise and without uncertainty (or without tokens) has z = 0, p = 1.
    """
    total = torch.where(mask.bool(), phi, 0).sum(-1)
    variance = torch.where(mask.bool(), varentropy, 0).sum(-1)
    z = torch.where(total == 0, 0, total / variance.sqrt())
    return z, torch.erfc(z.abs() / 2 ** 0.5)


# ---- the statistics of a text under a model ----------------------------------------------------------------

def token_stats(model, ids, mask, temperature=1.0, want=None, varentropy=False):
    """log p(y) and H[p] of every token of a batch, without ever holding its (B, T, V) logits.

    ids (B, T) int64; mask (B, T), True on real tokens (padding left or right); want (B, T), True on those to
    compute (default: all) -> logp, entropy (and varentropy if asked), each (B, T-1) float32. Column t is
    about token t+1; it is exactly 0 where that token is masked, unwanted or has no real token before it.
    Gradients are exact. ValueError if the model has no output head.

    The backbone runs once. The output head then runs on a few tokens at a time, each piece checkpointed: the
    backward pass computes its logits again instead of keeping them.
    """
    mask = mask.bool()
    backbone = find_backbone(model)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False, "return_dict": True}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    output = backbone(**inputs)

    def chunk_stats(hidden, targets):  # (n, D), (n,) -> two or three of (n,)
        logits = head(model, backbone, type(output), hidden).float() / temperature
        stats = logp_entropy(logits, targets)
        return (*stats, logits_varentropy(logits)) if varentropy else stats

    wanted = mask[:, 1:] & mask[:, :-1]  # (B, T-1)
    if want is not None:
        wanted = wanted & want[:, 1:].bool()
    hidden, targets = output.last_hidden_state[:, :-1][wanted], ids[:, 1:][wanted]  # (N, D), (N,)
    fit = CHUNK.get(ids.device.type, 2 ** 24) // model.config.get_text_config().vocab_size
    size = max(1, min(fit, math.ceil(len(targets) / 4)))  # also in a small batch never all logits at once
    chunks = zip(hidden.split(size), targets.split(size))
    if torch.is_grad_enabled():
        parts = [checkpoint(chunk_stats, *chunk, use_reentrant=False, preserve_rng_state=False)
                 for chunk in chunks]
    else:
        parts = [chunk_stats(*chunk) for chunk in chunks]
    zeros = torch.zeros(wanted.shape, device=ids.device)
    return tuple(zeros.masked_scatter(wanted, torch.cat(values)) for values in zip(*parts))


def find_backbone(model):
    """The part of a causal language model below its output head. ValueError if there is none."""
    backbone = model.get_decoder()
    if backbone is model:  # transformers does not know it for every architecture: it is the innermost model
        backbone = [module for module in model.modules() if isinstance(module, PreTrainedModel)][-1]
    if backbone is model or model.get_output_embeddings() is None:
        raise ValueError(f"token_stats needs a causal language model, {type(model).__name__} has no head")
    return backbone


def head(model, backbone, output_type, hidden):
    """Final hidden states (n, D) -> logits (n, V).

    What follows the backbone differs between architectures (bias, soft-capping, scaling, ...). So this runs
    the model's own forward, with a stand-in for the backbone that returns the hidden states already known.
    """
    known = mock.Mock(return_value=output_type(last_hidden_state=hidden[None]))
    with mock.patch.object(backbone, "forward", known):
        logits = model(input_ids=hidden.new_zeros(1, len(hidden), dtype=torch.long), use_cache=False).logits
    if not known.called:
        raise ValueError(f"token_stats cannot tell backbone and output head of {type(model).__name__} apart")
    return logits[0]


# ---- reading texts -----------------------------------------------------------------------------------------

def read(model, prompts, responses, temperature=1.0, rows=32):
    """token_stats of R responses to R prompts (lists of ids), `rows` at a time.

    -> logp, entropy, varentropy (R, T) float32, zero behind the end of a response, and mask (R, T) bool."""
    stats = []
    for i in range(0, len(prompts), rows):
        pairs = list(zip(prompts[i:i + rows], responses[i:i + rows]))
        ids, mask, want = (pad(lists).to(model.device) for lists in (
            [p + r for p, r in pairs], [[1] * len(p + r) for p, r in pairs],
            [[0] * len(p) + [1] * len(r) for p, r in pairs]))
        with torch.no_grad():
            batch = torch.stack(token_stats(model, ids, mask, temperature, want, varentropy=True), -1)
        stats += [row[wanted[1:] > 0].cpu() for row, wanted in zip(batch, want)]  # (tokens, 3) each
    mask = pad([1] * len(row) for row in stats).bool()
    return (*pad_sequence(stats, batch_first=True).unbind(-1), mask)


def pad(lists):
    """Ragged lists of integers -> (B, T) int64, zeros on the right."""
    return pad_sequence([torch.tensor(row) for row in lists], batch_first=True)


def tempered_divergence(logp, log_q, entropy_q, temperature):
    """KL(q||p) of q = p^(1/temperature) / Z, exactly, from log p(y), log q(y) of any one token y, and H(q).

    log Z = log p(y) / temperature - log q(y) for whichever y, and E_q[log p] = temperature (log Z - H(q))."""
    return -entropy_q - (logp - temperature * (log_q + entropy_q))  # -H(q) - E_q[log p]


def sequence_statistics(logp, entropy, variance, mask):
    """What --out reports of a text: all arguments (R, T) -> {name: (R,)}."""
    phi, tokens = cll(logp, entropy), mask.sum(-1)
    z, p = sequence_test(phi, variance, mask)
    share = {f"phi{sign}": (chosen & mask).sum(-1) / tokens for sign, chosen in
             (("<-1", phi < -1), ("<-3", phi < -3), ("<-5", phi < -5), (">0", phi > 0))}
    return {"tokens": tokens, "mean_logp": logp.sum(-1) / tokens, "mean_entropy": entropy.sum(-1) / tokens,
            "total_phi": phi.sum(-1), "mean_phi": phi.sum(-1) / tokens, **share, "z": z, "p": p}


def auroc(own, foreign):
    """(N,), (M,) -> the chance that an own text scores higher than a foreign one; 0.5 tells nothing."""
    own, foreign = own[:, None], foreign[None]
    return ((own > foreign).float() + 0.5 * (own == foreign)).mean().item()


def snr(own, foreign):
    """Distance of the means in units of the spread, |m1 - m2| / sqrt((s1^2 + s2^2) / 2)."""
    spread = ((own.var(correction=0) + foreign.var(correction=0)) / 2).sqrt()
    return ((own.mean() - foreign.mean()).abs() / spread).item()


# ---- showing texts -----------------------------------------------------------------------------------------

def pieces(tokenizer, ids):
    """The text of every token; joined they are the whole. A character of two tokens comes with the second."""
    decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip("\ufffd")
    texts = [decode(ids[:t]) for t in range(len(ids) + 1)]
    return [after[len(before):] for before, after in zip(texts, texts[1:])]


SHADES = [(-5, 203, "below -5"), (-3, 216, "-5 to -3"), (-1, 223, "-3 to -1"), (1, None, "-1 to 1"),
          (99, 153, "above 1")]  # phi below this: terminal colour, legend


def paint(word, phi, colour):
    """A token for the terminal: on a coloured ground or, without colours, followed by phi if far from 0."""
    word = "".join(c if c.isprintable() or c == "\n" else "?" for c in word)  # a model may write escape codes
    shade = next((shade for limit, shade, _ in SHADES if phi < limit), None)
    if shade is None:
        return word
    return f"\033[38;5;16;48;5;{shade}m{word}\033[0m" if colour else f"{word}<{phi:+.1f}>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Could the model have written this?</title>
<style>
:root { color-scheme: light dark; --low: 225 60 40; --high: 40 125 230;
  --ink: #1f2328; --soft: #59636e; --paper: #fff; --card: #f6f8fa; --line: #d8dee4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --paper: #13161a; --card: #1c2128; --line: #363e48 } }
body { max-width: 50rem; margin: 3rem auto; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
  font: 17px/1.6 system-ui, sans-serif }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1rem; margin: 2.5rem 0 .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: .8rem 0; padding: .8rem 1.1rem 1rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card) }
figcaption, .small { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: center; font-size: .85rem;
  color: var(--soft) }
figcaption b { color: var(--ink); margin-right: auto }
pre { margin: .5rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/2 monospace }
pre span { padding: .2em 0; border-radius: .2em; background: rgb(var(--hue) / var(--alpha)) }
i { width: 14rem; height: 1rem; border-radius: .3rem;
  background: linear-gradient(to right, rgb(var(--low) / .75), transparent, rgb(var(--high) / .75)) }
</style>
<h1>Could the model have written this?</h1>
<p>A token's colour is &phi; = log p + H: how much likelier it was than what the model would have drawn in its
place, on average. Rest the pointer on a token for its numbers.</p>
<p class="small">&phi; &le; &minus;5, surprising <i></i> &phi; &ge; 5, more typical than its own</p>
BODY
<p class="small">Read by the model MODEL at temperature 1. In its own text &phi; is zero on average, and
z = &Sigma;&phi; / &radic;&Sigma;V of a long text is about standard normal; shown are its longest texts.
Negative &phi; means out of distribution only at equal entropy: greedy text is blue.</p>
</html>
"""


def figure(title, verdict, words, logp, entropy):
    """One text as HTML, a <span> a token."""
    spans, phi = "", cll(logp, entropy)
    for word, x, l, h in zip(words, phi.tolist(), logp.tolist(), entropy.tolist()):
        hue, alpha = "low" if x < 0 else "high", min(abs(x), 5) / 5 * 0.75
        spans += (f'<span title="phi {x:+.2f} = log p {l:.2f} + H {h:.2f}" '
                  f'style="--hue:var(--{hue});--alpha:{alpha:.2f}">{html.escape(word)}</span>')
    return f"<figure><figcaption><b>{title}</b>{verdict}</figcaption><pre>{spans}</pre></figure>\n"


# ---- the chapter -------------------------------------------------------------------------------------------

OWN, FOREIGN = "sampled at T = 1", "demonstrations"


def show_own_text(logp, entropy, variance, mask):
    """(a) Mean phi of the model's own text, and the z-test on single texts and on several joined to one."""
    phi = cll(logp, entropy)
    print(f"""
(a) In the model's own text (T = 1) phi is zero on average, and z = sum phi / sqrt(sum V) is standard normal.
    {mask.sum():,} tokens: mean phi {phi.sum() / mask.sum():+.4f}, \
expected 0 +- {1.96 * variance.sum().sqrt() / mask.sum():.4f} (95 %)
    z needs many tokens to be normal, so short texts are also tested together, as if they were one:

    texts a test   tokens a test   tests   mean z   std of z   p < 0.05
          theory                              0.00       1.00      5.0 %""")
    for size in (1, 4, 16, 64):
        tests = len(phi) // size
        if size == 1 or tests >= 50:
            z, p = sequence_test(*(x[:tests * size].reshape(tests, -1) for x in (phi, variance, mask)))
            print(f"    {size:12}{size * mask.sum() / len(mask):16.1f}{tests:8}"
                  f"{z.mean():9.2f}{z.std(correction=0):11.2f}{100 * (p < 0.05).float().mean():9.1f} %")


def show_other_text(stats, drawn):
    """(b) Mean phi of all texts, and the formula where q is known: drawn[name] = T, log q(y), H(q)."""
    print("""
(b) In other text it is not: drawn from q, phi is H(p) - H(q) - KL(q||p) on average. Means over all tokens:

    text                    tokens   log p    H(p)    H(q)  KL(q||p)   phi: formula   measured   +- (95 %)""")
    for name, (logp, entropy, _, mask) in stats.items():
        mean = lambda x: (x * mask).sum() / mask.sum()
        phi = cll(logp, entropy)
        print(f"    {name:22}{mask.sum():8,}{mean(logp):8.3f}{mean(entropy):8.3f}", end="")
        if name not in drawn:
            print(f"{'unknown':>18}{mean(phi):+26.3f}")
            continue
        t, log_q, entropy_q = drawn[name]
        divergence = tempered_divergence(logp, log_q, entropy_q, t)
        formula = entropy - entropy_q - divergence
        error = 1.96 * ((phi - formula) * mask).sum(-1).norm() / mask.sum()  # different texts are independent
        print(f"{mean(entropy_q):8.3f}{mean(divergence):10.3f}{mean(formula):+15.3f}{mean(phi):+11.3f}"
              f"{error:12.3f}")
    print("""
    Cold text is more typical than the model's own, phi > 0; hot and foreign text are less, phi < 0. So
    phi < 0 means "out of distribution" only at equal entropy: H(p) - H(q) can outweigh the divergence.""")


def show_discriminants(own, foreign):
    """(c) How well one number a text tells the two kinds apart."""
    print(f"""
(c) Telling the model's own texts (T = 1) from the demonstrations by one number a text:

                   own mean   foreign mean   AUROC     SNR""")
    for name in ("mean_logp", "mean_phi", "z"):
        a, b = own[name], foreign[name]
        print(f"    {name:12}{a.mean():11.2f}{b.mean():15.2f}{auroc(a, b):8.3f}{snr(a, b):8.2f}")
    print("""
    AUROC: chance that an own text scores higher than a demonstration; 0.5 tells nothing, 1 everything.
    SNR: distance of the two means in units of their spread.""")


def show_tokens(problems, texts, stats, table, tokenizer, count=3):
    """(d) Own text and demonstration of the problems where the model wrote most: prints one pair, returns
    `count` pairs as HTML."""
    n = len(texts[OWN]) // len(problems)
    longest = [max(range(i * n, i * n + n), key=lambda r: len(texts[OWN][r])) for i in range(len(problems))]
    chosen = sorted(range(len(problems)), key=lambda i: -len(texts[OWN][longest[i]]))[:count]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    legend = "phi: " + " ".join(paint(f" {label} ", limit - 0.5, True) for limit, _, label in SHADES)
    if not colour:
        legend = "<phi> follows tokens where it is below -1 or above 1."
    print(f"\n(d) Token by token, for the longest text the model wrote. {legend}")
    body = ""
    for problem in chosen:
        question = problems[problem]["problem"]
        question = question if isinstance(question, str) else question[-1]["content"]
        body += f"<h2>{html.escape(question)}</h2>\n"
        for title, name, i in (("the model's", OWN, longest[problem]), ("demonstration", FOREIGN, problem)):
            logp, entropy, mask = (stats[name][k][i] for k in (0, 1, 3))
            z, p, words = table[name]["z"][i], table[name]["p"][i], pieces(tokenizer, texts[name][i])
            verdict = f"z = {z:+.1f}, p " + (f"= {p:.2g}" if p > 1e-6 else "< 1e-6")
            body += figure(title, html.escape(verdict), words, logp[mask], entropy[mask])
            if problem == chosen[0]:
                phi = cll(logp, entropy).tolist()
                painted = "".join(paint(word, x, colour) for word, x in zip(words, phi))
                print(f"\n    {title} ({verdict}):\n    " + painted.replace("\n", "\n    "))
    return body


@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "toy, a JSON(L) file with demonstrations, or hf://owner/name/file.jsonl")
    problems: int = flag(256, "how many of its problems to use", 1, 10**6)
    n: int = flag(16, "texts sampled a problem and temperature", 1, 10**4)
    temperatures: list[float] = flag([0.5, 1.5], "temperatures to sample at, besides 1", 0.05, 20)
    max_new_tokens: int = flag(128, "longest text in tokens; demonstrations are cut there too", 1, 10**6)
    seed: int = flag(0, "of the toy's problems and of sampling", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    html: str = flag("", "file for a page of coloured texts")
    out: str = flag("", "file (.jsonl) for the statistics of every text, or a directory for texts.jsonl")


def main(flags):
    out = Path(flags.out)
    out = out / "texts.jsonl" if out.is_dir() or not out.suffix else out
    for name, path in (("--html", Path(flags.html)), ("--out", out)):
        nearest = next(p for p in path.absolute().parents if p.exists())
        writable = nearest.is_dir() and os.access(nearest, os.W_OK) and not path.is_dir()
        if getattr(flags, name[2:]) and not writable:
            raise InputError(f"{name} {path} cannot be written: name a file in a directory of yours")
    problems = toy.problems("train", flags.problems, flags.seed) if flags.data == "toy" else \
        load_problems(flags.data, require=("solution",))[:flags.problems]
    model, tokenizer = load_model(flags.model, pick_device(flags.device))
    print(f"The model {flags.model} reads its answers to {len(problems)} problems, and their demonstrations.")

    # The texts: what the model writes at several temperatures, and the demonstrations.
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    sampler, max_new_tokens = new_sampler(model, prompts, flags.max_new_tokens)
    temperatures = {f"sampled at T = {t:g}": t for t in sorted({1.0, *flags.temperatures})}
    texts = {name: sampler(prompts, n=flags.n, max_new_tokens=max_new_tokens, stop=stop_ids(model, tokenizer),
                           temperature=t, seed=flags.seed).lists() for name, t in temperatures.items()}
    solutions = [p["solution"] if isinstance(p["solution"], str) else p["solution"][0] for p in problems]
    texts[FOREIGN] = [demo_ids(tokenizer, solution)[:max_new_tokens] for solution in solutions]

    # All are read by the model at temperature 1; its own once more at the temperature they were drawn at.
    contexts = {name: [p for p in prompts for _ in range(len(ids) // len(prompts))]
                for name, ids in texts.items()}
    stats = {name: read(model, contexts[name], texts[name]) for name in texts}
    drawn = {name: (t, *read(model, contexts[name], texts[name], t)[:2]) for name, t in temperatures.items()}
    table = {name: sequence_statistics(*stats[name]) for name in texts}

    show_own_text(*stats[OWN])
    show_other_text(stats, drawn)
    show_discriminants(table[OWN], table[FOREIGN])
    body = show_tokens(problems, texts, stats, table, tokenizer)

    if flags.html:
        Path(flags.html).parent.mkdir(parents=True, exist_ok=True)
        page = PAGE.replace("MODEL", html.escape(flags.model)).replace("BODY", body)
        Path(flags.html).write_text(page, encoding="utf-8")
    if flags.out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", encoding="utf-8") as file:
            for name, columns in table.items():
                columns = {key: column.nan_to_num().tolist() for key, column in columns.items()}
                for i, ids in enumerate(texts[name]):
                    row = {"source": name, "problem": i * len(problems) // len(texts[name])}
                    row |= {key: column[i] for key, column in columns.items()}
                    row["text"] = tokenizer.decode(ids, skip_special_tokens=True)
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    run(main, Flags)
