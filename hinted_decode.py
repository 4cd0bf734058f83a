r"""
hinted_decode.py - demonstrations retold in the model's own voice.

Paper [D]: Towards On-Policy SFT, Zhang et al., https://arxiv.org/abs/2602.12222; its code: [code]

A demonstration is right but foreign. The model's own answer is familiar but often wrong. Hinted
decoding lets one model read two contexts, and only one of them holds the reference solution. Where
this hinted stream is sure of the next token, it leads. Where it hesitates, the model speaks as it
would without the hint:

    log m_t = (1 - lam_t) log p_t + lam_t log q_t       lam_t = clamp(beta H[p_t] / log|V|, 0, 1)

The first token comes from p alone, because it decides how the text goes on. After \boxed{ all
tokens come from q alone, so that the answer follows from the text and is not copied.

    log_p           p, the hinted stream: problem and reference
    log_q           q, the plain stream: the problem alone (in ddt.py this model is called p)
    lam             lambda_t, the share of the plain stream
    beta            how soon the plain stream has a say; 0 is self-distillation, p alone
    phi             log q(y_t) + H[q_t] (ddt.py): how foreign a token is to the model to be trained

How to choose beta: a weak model ignores the reference when the plain stream has too much say. So
compare a few values by phi and by the share of right answers (experiments/voices.py), and take the
one with phi near 0 among those that keep most answers right.

Unlike the authors' code, ours uses one model instead of two, caches both streams, writes many texts
at once, applies top-p after the temperature, looks for repetitions at every token, and words the
hint differently.

    python hinted_decode.py                         retell the toy's demonstrations
    python hinted_decode.py --model Qwen/Qwen2.5-7B-Instruct --data train.jsonl --out runs/retold
    python idft.py --model Qwen/Qwen2.5-7B-Instruct --data runs/retold/data.jsonl
    python -m experiments.voices --model DIR --data train.jsonl      phi and right answers by beta
    python -m experiments.online                    retell, train, retell with what was trained, ...
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from ddt import cll, response_stats
from eval import (InputError, at, blame, chat_turns, check_run, demo_ids, demonstrations,
                  fingerprint, flag, load_model, load_problems, new_sampler, open_run, pick_device,
                  printable, prompt_ids, read_log, run_script, stop_ids, write_rows)
from reward import rewards
from sampler import Sample
from toy import INSTRUCTION

MARKER = "\\boxed{"


# ---- the method ---------------------------------------------------------------------------------

def mix(log_p, log_q, beta, mode="linear"):
    """Mix the two streams. log_p (hinted) and log_q (plain), both (..., V), are logits or log-
    probabilities at temperature 1 -> log_m (..., V), not normalised, and lam (...), the share of
    the plain stream. mode: linear [D], sigmoid or piecewise [code]. ValueError for any other."""
    # Logits differ from log p by a constant. It changes neither this softmax nor samples of log m.
    entropy = torch.special.entr(log_p.softmax(-1)).sum(-1)
    h = entropy / math.log(log_p.shape[-1])                    # 0: certain, 1: uniform
    if mode == "linear":
        lam = (beta * h).clamp(0, 1)
    elif mode == "sigmoid":
        lam = torch.sigmoid(beta * (h - 0.5))
    elif mode == "piecewise":
        lam = ((h - 0.3) / (0.7 - 0.3)).clamp(0, 1)
    else:
        raise ValueError(f"mode must be linear, sigmoid or piecewise, not {mode!r}")
    # A stream whose share is 0 is left out, because 0 * -inf is NaN.
    p_share, q_share = (1 - lam)[..., None], lam[..., None]
    from_p = torch.where(p_share > 0, p_share * log_p, 0)
    from_q = torch.where(q_share > 0, q_share * log_q, 0)
    return from_p + from_q, lam


def next_token(log_p, log_q, beta, first, boxed, mode="linear"):
    """`mix` with its two exceptions -> log_m (..., V), from which the next token is drawn.
    first (...) bool: the text is still empty; boxed (...) bool: it holds the marker already."""
    log_m, _ = mix(log_p, log_q, beta, mode)
    log_m = torch.where(first[..., None], log_p, log_m)
    return torch.where(boxed[..., None], log_q, log_m)


@torch.no_grad()
def uncached(model, tokenizer, hinted, plain, beta, max_new_tokens, stop=()):
    """Greedy hinted decoding of one problem: the ids of its two contexts -> the ids of its text. As
    in the authors' code, the model reads both contexts again for every token."""
    ids = []
    while len(ids) < max_new_tokens and not (ids and ids[-1] in stop):
        p_ids = torch.tensor([hinted + ids], device=model.device)
        q_ids = torch.tensor([plain + ids], device=model.device)
        p_logits = model(p_ids).logits[0, -1]                              # (V,)
        q_logits = model(q_ids).logits[0, -1]                              # (V,)
        first = torch.tensor(ids == [], device=model.device)
        boxed = torch.tensor(MARKER in tokenizer.decode(ids), device=model.device)
        log_m = next_token(p_logits, q_logits, beta, first, boxed)         # (V,)
        ids.append(log_m.argmax().item())
    return ids


# ---- the same, batched and cached: what the sampler calls at every token ------------------------

def marker_progress(text):
    """How many characters of the marker a text ends with; all of them once it holds the marker."""
    length = len(MARKER)
    while MARKER not in text and not text.endswith(MARKER[:length]):
        length -= 1
    return length


def marker_table(tokenizer, size):
    """How each of `size` tokens changes marker_progress: table[old, token] is the new progress,
    int64 (8, size). A look-up on the device instead of decoding every text at every token."""
    # Decode a token after another one, because at the start of a text it may lose its space.
    before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    skip = len(tokenizer.decode(before))
    columns = []
    for token in range(size):
        text = tokenizer.decode(before + [token])[skip:]
        columns.append([marker_progress(MARKER[:old] + text) for old in range(len(MARKER) + 1)])
    return torch.tensor(columns).T.contiguous()


def hinted_combine(table, beta, mode="linear"):
    """`combine` for a sampler with the streams (hinted, plain). table: marker_table's, on the
    model's device. The state of a row is the marker_progress of its text."""
    def combine(logits, last, step, progress):
        # At step 0 `last` is the last token of the prompt, which does not count.
        first = step == 0
        progress = torch.where(first, 0, table[progress, last])
        boxed = progress == len(MARKER)
        log_p, log_q = logits.log_softmax(-1).unbind(1)                    # (R, V)
        return next_token(log_p, log_q, beta, first, boxed, mode), progress
    return combine


def repetition(tokens, size=30, times=5, fresh=32):
    """`halt` for the sampler: the length at which a `size`-gram occurs for the `times`-th time, or
    None [code]. Only `size`-grams that end in the last `fresh` tokens are checked."""
    if len(tokens) < size:
        return None
    grams = np.lib.stride_tricks.sliding_window_view(tokens, size)         # (N, size)
    for i in range(max(0, len(grams) - fresh), len(grams)):
        # Comparing all of them is slow, so compare only those that begin with the same token.
        alike = grams[:i + 1][grams[:i + 1, 0] == grams[i, 0]]
        if (alike == grams[i]).all(1).sum() >= times:
            return i + size


# ---- the pipeline -------------------------------------------------------------------------------

HINT = """Below are a problem and a reference solution that is known to be right. Solve the \
problem the way you would if you had found the solution yourself: in your own words, one small \
step after the other. Let the reference guide you, but never mention that there is one."""
HEADING = "# CoT"
ANALYSIS = f"""
Answer in two parts. Under the heading `# Analysis`, go through the reference line by line: what \
is done there, why, and what it leaves out. Then, under the heading `{HEADING}`, solve the \
problem from the start."""


def contexts(tokenizer, problem, analysis=False):
    """The contexts of a problem -> hinted ids, plain ids. The model's text or analysis comes next.
    The first demonstration is the reference; without any, both contexts are the plain one."""
    plain = prompt_ids(tokenizer, problem["problem"])
    demos = demonstrations(problem)
    if not demos:
        return plain, plain
    *before, last = chat_turns(problem["problem"])
    if "<hint>" in tokenizer.get_vocab():                      # the toy writes a hint its own way
        text = f"<user> {last['content']} <hint> {demos[0]} <assistant>"
        return tokenizer(text).input_ids, plain
    text = HINT
    if analysis:
        text += ANALYSIS
    text += f"\n\n# Problem\n{last['content']}\n\n# Reference solution\n{demos[0]}"
    return prompt_ids(tokenizer, [*before, {"role": "user", "content": text}]), plain


class Writer:
    """Answers problems, retells their demonstrations, and judges the texts. Problems are left out
    if the model has no room for --max_new_tokens after them. flags: Flags.

    A trajectory is a copy of the problem with the text as its solution and some more keys: source,
    finish (stop, length or repetition), dropped (why nobody should learn from it, else ""), tokens,
    mean_phi and the shares phi>-1, phi>-3, phi>-5."""

    def __init__(self, model, tokenizer, problems, flags):
        self.model, self.tokenizer, self.flags = model, tokenizer, flags
        context = getattr(model.config, "max_position_embeddings", None) or math.inf
        room = flags.max_new_tokens * (1 + flags.analysis)     # an analysis needs as much again
        self.problems, pairs = [], []
        for problem in problems:
            with at(problem):
                hinted, plain = contexts(tokenizer, problem, flags.analysis)
            if len(hinted) + room <= context:
                self.problems.append(problem)
                pairs.append((hinted, plain))
        if len(pairs) < len(problems):
            print(f"{len(problems) - len(pairs)} of {len(problems)} problems are left out: with "
                  f"--max_new_tokens they need more than the {context} tokens the model reads")
        if not pairs:
            raise InputError(f"--max_new_tokens {flags.max_new_tokens} fits no problem: lower it "
                             "or shorten the texts")

        # Two samplers. On a GPU they share one bf16 twin. The memory of a call is freed at its end.
        self.mixed, _ = new_sampler(model, pairs, room, flags.rows, streams=2)
        prompts = [hinted for hinted, _ in pairs]
        self.alone, _ = new_sampler(self.mixed.model, prompts, room, flags.rows)
        size = model.get_input_embeddings().num_embeddings
        self.table = marker_table(tokenizer, size).to(model.device)

    def write(self, sampler, prompts, temperature, top_p=1.0, combine=None, halt=repetition):
        """Sample one text per prompt. For self.mixed a prompt is a pair of contexts."""
        sampler.sync(self.model)
        return sampler(prompts, max_new_tokens=self.flags.max_new_tokens, temperature=temperature,
                       top_p=top_p, seed=self.flags.seed, combine=combine, halt=halt,
                       stop=stop_ids(self.model, self.tokenizer))

    def judge(self, problems, samples, source):
        """One sample per problem -> its trajectory. phi is computed in the plain context."""
        texts = self.tokenizer.batch_decode([s.tokens for s in samples], skip_special_tokens=True)
        right = rewards(texts, [problem["answer"] for problem in problems])
        pairs = []
        for problem, sample in zip(problems, samples):
            pairs.append((prompt_ids(self.tokenizer, problem["problem"]), sample.tokens))
        with torch.no_grad():
            phis = cll(*response_stats(self.model, pairs))                 # (tokens of all,)
        phis = phis.split([len(sample.tokens) for sample in samples])

        rows = []
        for problem, sample, text, correct, phi in zip(problems, samples, texts, right, phis):
            finish, dropped = "stop", ""
            if not sample.finished:
                finish = dropped = "repetition" if repetition(sample.tokens) else "length"
            elif not correct:
                dropped = "wrong answer"
            row = {**problem, "solution": text, "source": source, "finish": finish,
                   "dropped": dropped, "tokens": len(phi), "mean_phi": phi.mean().item()}
            for limit in (-1, -3, -5):
                row[f"phi>{limit}"] = (phi > limit).float().mean().item()
            rows.append(row)
        return rows

    def heading_end(self, tokens):
        """`halt` for an analysis: its length with the heading, after which the retelling begins."""
        for end in range(max(0, len(tokens) - 32), len(tokens) + 1):
            if self.has_heading(tokens[:end]):
                return end
        return repetition(tokens)

    def has_heading(self, tokens):
        """Whether an analysis ends with the heading of the retelling."""
        return HEADING in self.tokenizer.decode(tokens[-16:])

    def analyse(self, problems, pairs):
        """Let the model analyse every reference, greedily [code]. Add each analysis to its hinted
        context in `pairs` -> for every problem None, or a dropped trajectory if the model never
        reached the heading (the authors drop it, too)."""
        analyses = self.write(self.alone, [hinted for hinted, _ in pairs], 0, halt=self.heading_end)
        rows = [None] * len(problems)
        for i, analysis in enumerate(analyses):
            hinted, plain = pairs[i]
            pairs[i] = hinted + analysis.tokens, plain
            if not self.has_heading(analysis.tokens):
                [rows[i]] = self.judge([problems[i]], [analysis], "hinted")
                rows[i]["dropped"] = "unfinished analysis"
        return rows

    def retell(self, problems, beta):
        """Hinted decoding -> one trajectory per problem."""
        flags = self.flags
        pairs = [contexts(self.tokenizer, problem, flags.analysis) for problem in problems]
        rows = [None] * len(problems)
        if flags.analysis:
            rows = self.analyse(problems, pairs)
        ready = [i for i, row in enumerate(rows) if row is None]
        if ready:
            combine = hinted_combine(self.table, beta, flags.gate)
            texts = self.write(self.mixed, [pairs[i] for i in ready], flags.temperature,
                               flags.top_p, combine)
            retold = self.judge([problems[i] for i in ready], texts, "hinted")
            for i, row in zip(ready, retold):
                rows[i] = row
        return rows

    def rewrite(self, problems):
        """One trajectory per problem: the model's own answer if it is right, since nothing is more
        on-policy, or else the retold demonstration, right or not (if there is a demonstration)."""
        prompts = [prompt_ids(self.tokenizer, problem["problem"]) for problem in problems]
        samples = self.write(self.alone, prompts, self.flags.own_temperature)
        rows = self.judge(problems, samples, "own")
        wrong = []
        for i, row in enumerate(rows):
            if row["dropped"] and problems[i]["solution"]:
                wrong.append(i)
        if wrong:
            retold = self.retell([problems[i] for i in wrong], self.flags.beta)
            for i, row in zip(wrong, retold):
                rows[i] = row
        return rows


def kept(rows):
    """The trajectories to learn from."""
    return [row for row in rows if not row["dropped"]]


WAY_OUT = {
    "unfinished analysis": "The model does not write the analysis it is asked for: --no_analysis "
                           "lets it retell without one.",
    "length": "Raise --max_new_tokens: most texts did not end by themselves.",
    "repetition": "Most texts repeat themselves: raise --temperature, or take another model.",
    "wrong answer": "Lower --beta: 0 follows the reference most closely.",
}


def show(title, row):
    """Print a trajectory, and why it is dropped, if it is."""
    dropped = f", dropped: {row['dropped']}" if row["dropped"] else ""
    print(f"\n{title}, mean phi {row['mean_phi']:+.2f}{dropped}")
    print("    " + printable(row["solution"]))


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "problems and demonstrations: toy, a JSON(L) file or hf://...")
    problems: int = flag(10**6, "how many problems of --data to use, from the first", 1)
    out: str = flag("runs/hinted_decode", "directory for data.jsonl and trajectories.jsonl")
    beta: float = flag(3.0, "lam = beta H[p] / log|V|; 0 is self-distillation [code]", 0)
    gate: Literal["linear", "sigmoid", "piecewise"] = flag("linear", "linear is [D], others [code]")
    temperature: float = flag(0.3, "for the retelling; 0 is greedy [code]", 0, 100)
    top_p: float = flag(0.95, "for the retelling [code]", 1e-6, 1)
    own_temperature: float = flag(0.0, "for the model's own answers [code]; 1 is on-policy", 0, 100)
    analysis: bool = flag(True, "let the model analyse the reference first [code]")
    max_new_tokens: int = flag(8192, "longest text, and longest analysis, in tokens [ours]", 1)
    rows: int = flag(64, "texts written side by side: more is faster", 1)
    seed: int = flag(0, "seed of the toy and of sampling", 0)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the killed run in --out")


TOY = {"analysis": False, "max_new_tokens": 96}                # the toy cannot analyse


def main(flags):
    check_run(flags)
    problems = load_problems(flags.data, seed=flags.seed)[:flags.problems]
    model, tokenizer = load_model(flags.model, pick_device(flags.device), flags.seed)
    if flags.analysis and "<hint>" in tokenizer.get_vocab():
        raise InputError("--analysis: the toy cannot write an analysis, add --no_analysis")
    writer = Writer(model, tokenizer, problems, flags)
    out, _ = open_run(flags, data=problems, model=fingerprint(model, tokenizer))
    # Files are replaced whole, so a killed run has left whole chunks, with one row per problem.
    file = out / "trajectories.jsonl"
    rows = read_log(file)
    with blame(f"--resume: {file} is damaged", "; name another --out"):
        for row, problem in zip(rows, writer.problems[:len(rows)], strict=True):
            if (row["problem"], row["answer"]) != (problem["problem"], problem["answer"]):
                raise InputError("it holds other problems")
            row["source"] + row["dropped"]                     # both are texts

    # Show the first problem: its reference, retold by the hint alone (beta 0) and by the mixture.
    first = writer.problems[0]
    if first["solution"]:
        question = chat_turns(first["problem"])[-1]["content"].removesuffix(INSTRUCTION)
        print(printable(f"{question}    answer: {first['answer']}"))
        demo = Sample(demo_ids(tokenizer, demonstrations(first)[0]), finished=True)
        show("the reference", *writer.judge([first], [demo], "reference"))
        for beta in sorted({0.0, flags.beta}):
            show(f"retold, beta {beta:g}", *writer.retell([first], beta))

    # Rewrite all problems, in chunks.
    for start in tqdm(range(len(rows), len(writer.problems), 4 * flags.rows), leave=False):
        rows += writer.rewrite(writer.problems[start:start + 4 * flags.rows])
        write_rows(file, rows)
    write_rows(out / "data.jsonl", kept(rows))

    print(f"\n{len(rows)} problems -> {len(kept(rows))} texts in {out}/data.jsonl")
    fates = Counter(f"{row['source']}: {row['dropped'] or 'kept'}" for row in rows)
    for fate, count in fates.most_common():
        print(f"{count:8} {fate}")
    if not kept(rows):
        reasons = Counter(row["dropped"] for row in rows)
        [(reason, _)] = reasons.most_common(1)
        print(f"Nothing is left to learn from. {WAY_OUT[reason]}")


if __name__ == "__main__":
    run_script(main, Flags, TOY)
