r"""
hinted_decode.py - demonstrations retold in the model's own voice.

Paper: Towards On-Policy SFT, Zhang et al., https://arxiv.org/abs/2602.12222, its second method

A demonstration is right but foreign; an own answer is familiar but often wrong. Hinted decoding
reads two contexts with one model, and only one of them holds the reference solution. Where the
hinted stream is sure of the next token, it leads; where it hesitates, the question is one of
wording, and the model speaks as it would alone:

    log m_t = (1 - lam_t) log p_t + lam_t log q_t       lam_t = clamp(beta H[p_t] / log|V|, 0, 1)

    log_p, log_q    p, the hinted stream (problem and reference), and q, the plain one (problem)
    lam             lambda_t, the share of the plain stream
    beta            how soon the plain stream has a say; 0 is self-distillation, p alone
    phi             log q(y_t) + H[q_t] (ddt.py): how foreign a token is to the model to be trained

Other than in the authors' code: one model, cached, many texts at once (theirs: two copies, no
cache, one text); top-p after the temperature, as in Hugging Face; repetitions are looked for at
every token, not every 100; the hint has other words. Left out: two different models as p and q.

    python hinted_decode.py                         retell the toy's demonstrations, compare texts
    python hinted_decode.py --model Qwen/Qwen2.5-7B-Instruct --data train.jsonl --out runs/retold
    python idft.py --model Qwen/Qwen2.5-7B-Instruct --data runs/retold/data.jsonl
    python -m experiments.online                    retell, train, retell with what was trained, ...
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from ddt import cll, response_stats
from eval import (INSTRUCTION, InputError, demo_ids, flag, load_model, load_problems, new_run,
                  new_sampler, pick_device, printable, prompt_ids, read_log, repeat_flags,
                  run_script, stop_ids, write_file, write_rows)
from reward import rewards
from sampler import Sample

MARKER = "\\boxed{"


# ---- the method ---------------------------------------------------------------------------------

def mix(log_p, log_q, beta, mode="linear"):
    """The two streams as one: log_p (hinted) and log_q (plain), both (..., V) log-probabilities at
    temperature 1 -> log_m (..., V), not normalised, and lam (...), the share of the plain stream.

    mode: linear [D], sigmoid or piecewise [code]. ValueError for another."""
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    h = entropy / math.log(log_p.shape[-1])                    # from 0, sure, to 1, no idea
    if mode == "linear":
        lam = (beta * h).clamp(0, 1)
    elif mode == "sigmoid":
        lam = torch.sigmoid(beta * (h - 0.5))
    elif mode == "piecewise":
        lam = ((h - 0.3) / (0.7 - 0.3)).clamp(0, 1)
    else:
        raise ValueError(f"mode must be linear, sigmoid or piecewise, not {mode!r}")
    # A stream without a share is left out, because 0 * -inf is NaN.
    p_share, q_share = (1 - lam)[..., None], lam[..., None]
    from_p = torch.where(p_share > 0, p_share * log_p, 0)
    from_q = torch.where(q_share > 0, q_share * log_q, 0)
    return from_p + from_q, lam


@torch.no_grad()
def uncached(model, tokenizer, hinted, plain, beta, max_new_tokens, stop=()):
    """The method, greedy, for one problem: the ids of its two contexts -> the ids of its text. As
    in the authors' code, both contexts are read again for every token."""
    ids = []
    while len(ids) < max_new_tokens and not (ids and ids[-1] in stop):
        p_ids = torch.tensor([hinted + ids], device=model.device)
        q_ids = torch.tensor([plain + ids], device=model.device)
        log_p = model(p_ids).logits[0, -1].log_softmax(-1)                 # (V,)
        log_q = model(q_ids).logits[0, -1].log_softmax(-1)                 # (V,)
        log_m, _ = mix(log_p, log_q, beta)
        if not ids:
            log_m = log_p                      # the first token decides how the text goes on
        if MARKER in tokenizer.decode(ids):
            log_m = log_q                      # the answer must follow from what was written
        ids.append(log_m.argmax().item())
    return ids


# ---- the same, batched and cached: what the sampler asks at every token -------------------------

def marker_progress(text):
    """How many characters of the marker a text ends with; all of them once it holds the marker."""
    length = len(MARKER)
    while MARKER not in text and not text.endswith(MARKER[:length]):
        length -= 1
    return length


def marker_table(tokenizer, size):
    """What each of `size` tokens does to a text's progress: table[progress, token] -> progress,
    int64 (8, size). One look-up on the device instead of decoding every text at every token."""
    # A token is read behind another one: at the start of a text it may lose its space.
    before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    skip = len(tokenizer.decode(before))
    columns = []
    for token in range(size):
        text = tokenizer.decode(before + [token])[skip:]
        # Of the text so far it matters only how much of the marker it ends with.
        column = [marker_progress(MARKER[:progress] + text) for progress in range(len(MARKER) + 1)]
        columns.append(column)
    return torch.tensor(columns).T.contiguous()


def hinted_combine(table, beta, mode="linear"):
    """`combine` for a sampler with the streams (hinted, plain). The state of a row is its progress
    in `table`, which is marker_table's, on the model's device."""
    def combine(logits, last, step, progress):
        log_p, log_q = logits.log_softmax(-1).unbind(1)                                   # (R, V)
        log_m, _ = mix(log_p, log_q, beta, mode)
        # At the first token `last` is the end of the prompt, which does not count.
        first = step == 0
        progress = torch.where(first, 0, table[progress, last])
        boxed = progress == len(MARKER)
        log_m = torch.where(first[:, None], log_p, log_m)
        log_m = torch.where(boxed[:, None], log_q, log_m)
        return log_m, progress
    return combine


def repetition(tokens, size=30, times=5, fresh=32):
    """`halt` for the sampler: the length at which some `size`-gram stood in tokens for the
    `times`-th time [code], or None. It looks at those that end in the last `fresh` tokens: the
    sampler asks at least that often."""
    if len(tokens) < size:
        return None
    grams = np.lib.stride_tricks.sliding_window_view(np.array(tokens), size)    # (N, size)
    for i in range(max(0, len(grams) - fresh), len(grams)):
        # To compare all of them is slow: first those that begin with the same token.
        alike = np.flatnonzero(grams[:i + 1, 0] == grams[i, 0])
        if (grams[alike] == grams[i]).all(1).sum() >= times:
            return i + size


# ---- the two contexts ---------------------------------------------------------------------------

HINT = """Below are a problem and a reference solution that is known to be right. Solve the \
problem the way you would if you had found the solution yourself: in your own words, one small \
step after the other. Let the reference guide you, but never mention that there is one."""
HEADING = "# CoT"
ANALYSIS = f"""
Answer in two parts. Under the heading `# Analysis`, go through the reference line by line: what \
is done there, why, and what it leaves out. Then, under the heading `{HEADING}`, solve the \
problem from the start."""


def contexts(tokenizer, problem, analysis=False):
    """A problem -> hinted ids, plain ids, up to where the text, or its analysis, begins. Without a
    demonstration both are the plain ones."""
    turns, solution = problem["problem"], problem["solution"]
    plain = prompt_ids(tokenizer, turns)
    if not solution:
        return plain, plain
    if isinstance(turns, str):
        turns = [{"content": turns}]
    question = turns[-1]["content"]
    if "<hint>" in tokenizer.get_vocab():                      # the toy has hints of its own form
        return tokenizer(f"<user> {question} <hint> {solution} <assistant>").input_ids, plain
    text = HINT + INSTRUCTION
    if analysis:
        text = HINT + ANALYSIS + INSTRUCTION
    text += f"\n\n# Problem\n{question}\n\n# Reference solution\n{solution}"
    return prompt_ids(tokenizer, [*turns[:-1], {"role": "user", "content": text}]), plain


def new_writer(model, tokenizer, problems, flags):
    """-> the problems that leave the model room for --max_new_tokens, and a function
    write(prompts, temperature, top_p, beta, halt) -> samples. With a beta the prompts are pairs of
    contexts and the texts are hinted, without one they are lists of ids and the model is alone."""
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    room = flags.max_new_tokens * (2 if flags.analysis else 1)    # an analysis is a text of its own
    fit, pairs, longer = [], [], []
    for problem in problems:
        pair = contexts(tokenizer, problem, flags.analysis)
        if max(len(ids) for ids in pair) + room <= context:
            fit.append(problem)
            pairs.append(pair)
            longer.append(max(pair, key=len))
    if len(fit) < len(problems):
        print(f"{len(problems) - len(fit)} of {len(problems)} problems are left out: the model "
              f"reads {context} tokens, with --max_new_tokens they have more")
    if not fit:
        raise InputError(f"--max_new_tokens {flags.max_new_tokens} leaves no problem, lower it")

    # Two samplers, on a GPU with one bf16 twin. What a call holds in memory ends with the call.
    of_pairs, _ = new_sampler(model, pairs, room, flags.rows, streams=2)
    of_one, _ = new_sampler(of_pairs.model, longer, room, flags.rows)
    table = marker_table(tokenizer, model.get_input_embeddings().num_embeddings).to(model.device)

    def write(prompts, temperature, top_p=1.0, beta=None, halt=repetition):
        sampler, combine = of_one, None
        if beta is not None:
            sampler, combine = of_pairs, hinted_combine(table, beta, flags.gate)
        sampler.sync(model)
        return sampler(prompts, max_new_tokens=flags.max_new_tokens, temperature=temperature,
                       top_p=top_p, seed=flags.seed, stop=stop_ids(model, tokenizer),
                       combine=combine, halt=halt)
    return fit, write


# ---- the pipeline -------------------------------------------------------------------------------

def judge(model, tokenizer, problems, samples, source):
    """Samples, one a problem -> trajectories: the problem with the text as its solution; source;
    finish (stop, length, repetition); dropped, why nobody should learn from it, or ""; tokens;
    mean_phi and the shares phi>-1, phi>-3, phi>-5 under the plain context."""
    texts = tokenizer.batch_decode([s.tokens for s in samples], skip_special_tokens=True)
    right = rewards(texts, [problem["answer"] for problem in problems])
    pairs = []
    for problem, sample in zip(problems, samples):
        pairs.append((prompt_ids(tokenizer, problem["problem"]), sample.tokens))
    with torch.no_grad():
        logp, entropy = response_stats(model, pairs)                       # (tokens of all,)
    phis = cll(logp, entropy).split([len(sample.tokens) for sample in samples])

    rows = []
    for problem, sample, text, correct, phi in zip(problems, samples, texts, right, phis):
        finish = "stop"
        dropped = "" if correct else "wrong answer"
        if not sample.finished:
            finish = dropped = "repetition" if repetition(sample.tokens) else "length"
        row = {**problem, "solution": text, "source": source, "finish": finish, "dropped": dropped,
               "tokens": len(phi), "mean_phi": phi.mean().item()}
        for limit in (-1, -3, -5):
            row[f"phi>{limit}"] = (phi > limit).float().mean().item()
        rows.append(row)
    return rows


def answer(model, tokenizer, write, problems, temperature):
    """The model alone -> one trajectory a problem."""
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    return judge(model, tokenizer, problems, write(prompts, temperature), "own")


def analyse(tokenizer, write, hinted):
    """The model goes through every reference, greedily [code]: hinted contexts -> the tokens of the
    analyses, up to the heading of the next part if there is one."""
    def halt(tokens):
        # Which of the last tokens completes the heading? The retelling begins behind it.
        for end in range(max(0, len(tokens) - 32), len(tokens) + 1):
            if HEADING in tokenizer.decode(tokens[max(0, end - 16):end]):
                return end
        return repetition(tokens)
    return [sample.tokens for sample in write(hinted, 0, halt=halt)]


def retell(model, tokenizer, write, problems, flags, beta):
    """Hinted decoding -> one trajectory a problem."""
    pairs = [contexts(tokenizer, problem, flags.analysis) for problem in problems]
    hinted, plain = zip(*pairs)
    if flags.analysis:
        analyses = analyse(tokenizer, write, hinted)
        hinted = [ids + analysis for ids, analysis in zip(hinted, analyses)]
    samples = write(list(zip(hinted, plain)), flags.temperature, flags.top_p, beta)
    rows = judge(model, tokenizer, problems, samples, "hinted")

    # Without its heading an analysis is unfinished: dropped, right or not, as the authors do.
    if flags.analysis:
        for row, analysis in zip(rows, analyses):
            if HEADING not in tokenizer.decode(analysis[-16:]):
                row["dropped"] = "unfinished analysis"
    return rows


def rewrite(model, tokenizer, write, problems, flags):
    """One trajectory a problem: the model's own answer if it is right, since nothing is more
    on-policy, else the demonstration retold, right or not."""
    rows = answer(model, tokenizer, write, problems, flags.own_temperature)
    wrong = []
    for i, row in enumerate(rows):
        if row["dropped"] and problems[i]["solution"]:
            wrong.append(i)
    if wrong:
        todo = [problems[i] for i in wrong]
        retold = retell(model, tokenizer, write, todo, flags, flags.beta)
        for i, row in zip(wrong, retold):
            rows[i] = row
    return rows


def kept(rows):
    return [row for row in rows if not row["dropped"]]


def rewrite_all(model, tokenizer, write, problems, flags, out, rows):
    """The pipeline, a chunk of problems at a time; `rows` are those of the chunks already done.
    trajectories.jsonl grows with every chunk, data.jsonl, what is kept of it, comes at the end."""
    for start in tqdm(range(len(rows), len(problems), 4 * flags.rows), leave=False):
        chunk = problems[start:start + 4 * flags.rows]
        rows += rewrite(model, tokenizer, write, chunk, flags)
        write_rows(out / "trajectories.jsonl", rows)
    write_rows(out / "data.jsonl", kept(rows))

    print(f"\n{len(rows)} problems -> {len(kept(rows))} texts in {out}/data.jsonl")
    counts = Counter()
    for row in rows:
        counts[f"{row['source']}: {row['dropped'] or 'kept'}"] += 1
    for fate, count in counts.most_common():
        print(f"{count:8} {fate}")


def compare_kinds(model, tokenizer, write, problems, flags):
    """All kinds of text for the same problems: prints one of each, and a table."""
    demos = []
    for problem in problems:
        demos.append(Sample(demo_ids(tokenizer, problem["solution"]), finished=True))
    kinds = {"demonstration": judge(model, tokenizer, problems, demos, "demonstration")}
    for beta in flags.betas:
        kinds[f"hinted, beta {beta:g}"] = retell(model, tokenizer, write, problems, flags, beta)
    kinds["own, T = 1"] = answer(model, tokenizer, write, problems, 1.0)

    # The problem whose texts differ most.
    def different(i):
        return len({rows[i]["solution"] for rows in kinds.values()})
    shown = max(range(len(problems)), key=different)
    print(printable(f"{problems[shown]['problem']}    answer: {problems[shown]['answer']}"))
    for kind, rows in kinds.items():
        print(f"\n{kind}, mean phi {rows[shown]['mean_phi']:+.2f}")
        print("    " + printable(rows[shown]["solution"]))
    print(f"\n{len(problems)} problems".ljust(21) + "phi   phi>-1  phi>-3  phi>-5   right  tokens")
    for kind, rows in kinds.items():
        lengths = [row["tokens"] for row in rows]
        line = f"{kind:17}"
        for name in ("mean_phi", "phi>-1", "phi>-3", "phi>-5"):
            of_texts = [row[name] for row in rows]
            line += f"{np.average(of_texts, weights=lengths):8.3f}"
        print(line + f"{len(kept(rows)) / len(rows):8.3f}{np.mean(lengths):8.1f}")


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "problems and demonstrations: toy, a JSON(L) file or hf://...")
    problems: int = flag(10**6, "how many of its problems to use, the first ones", 1, 10**6)
    out: str = flag("runs/hinted_decode", "directory for data.jsonl and trajectories.jsonl")
    beta: float = flag(3.0, "lam = beta H[p] / log|V|; 0 is self-distillation [code]", 0, 1e9)
    gate: Literal["linear", "sigmoid", "piecewise"] = flag("linear", "[D]; the others [code]")
    temperature: float = flag(0.3, "of the retelling, 0 is greedy [code]", 0, 100)
    top_p: float = flag(0.95, "of the retelling [code]", 1e-6, 1)
    own_temperature: float = flag(0.0, "of the own answers [code]; 1 is on-policy", 0, 100)
    analysis: bool = flag(True, "let the model analyse the reference first [code]")
    max_new_tokens: int = flag(8192, "longest text, longest analysis [ours]", 1, 10**6)
    rows: int = flag(64, "texts written side by side: more is faster", 1, 10**5)
    betas: list[float] = flag([], "compare these, demonstrations and own text first", 0, 1e9)
    seed: int = flag(0, "of everything: toy, sampling", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the killed run in --out")


# The toy knows no analysis. Its answers are pairs, 1 in 576, so a right own answer is no guess.
TOY = {"analysis": False, "max_new_tokens": 96, "betas": [0.0, 3.0, 30.0, 300.0]}


def main(flags):
    out = new_run(flags.out, flags.resume)
    require = ("answer", "solution") if flags.betas else ("answer",)
    problems = load_problems(flags.data, require, flags.seed)[:flags.problems]
    for problem in problems:
        if isinstance(problem["solution"], list):
            problem["solution"] = problem["solution"][0]       # of several the first is retold
    settings = asdict(flags)
    for name in ("out", "resume", "device", "betas"):
        del settings[name]
    if flags.resume:
        repeat_flags(json.loads((out / "flags.json").read_text()), settings)

    model, tokenizer = load_model(flags.model, pick_device(flags.device), flags.seed)
    if flags.analysis and "<hint>" in tokenizer.get_vocab():
        raise InputError("--analysis: the toy can retell but not analyse, add --no_analysis")
    problems, write = new_writer(model, tokenizer, problems, flags)
    # the file is only ever replaced, so a killed run has left whole chunks
    rows = read_log(out / "trajectories.jsonl")
    answered = [(row["problem"], row["answer"]) for row in rows]
    if answered != [(p["problem"], p["answer"]) for p in problems[:len(rows)]]:
        raise InputError(f"--resume: {out} holds other problems, name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "flags.json", json.dumps(settings))
    if flags.betas:
        compare_kinds(model, tokenizer, write, problems, flags)
    rewrite_all(model, tokenizer, write, problems, flags, out, rows)


if __name__ == "__main__":
    run_script(main, Flags, TOY)
