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

The first token comes from p alone: it decides how the text goes on. Once the text holds `\boxed{`,
q is alone: the answer must follow from what was written. A text ends with an end token, at its
budget, or when some 30-gram stands in it for the fifth time [code].

Other than in the authors' code: one model with a cache and many texts at once; theirs reads two
copies without a cache, text by text. Top-p is taken after the temperature, as in Hugging Face,
theirs before. Repetitions are looked for every few tokens, there every 100. The hint is worded
anew. Left out: two different models as p and q.

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

import toy
from ddt import cll, response_stats
from eval import (INSTRUCTION, InputError, demo_ids, finished_rows, flag, load_model, load_problems,
                  new_run, new_sampler, pick_device, prompt_ids, run_script, stop_ids, write_file)
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

    # A stream without a share says nothing, not even -inf: 0 * -inf would be NaN.
    p_share, q_share = (1 - lam)[..., None], lam[..., None]
    from_p = torch.where(p_share > 0, p_share * log_p, 0)
    from_q = torch.where(q_share > 0, q_share * log_q, 0)
    return from_p + from_q, lam


@torch.no_grad()
def uncached(model, tokenizer, hinted, plain, beta, max_new_tokens, stop=()):
    """The whole method, greedy, for one problem: hinted and plain are the ids of the two contexts
    -> list of ids. Both are read again for every token, as in the authors' code."""
    ids = []
    while len(ids) < max_new_tokens and not (ids and ids[-1] in stop):
        log_p = model(torch.tensor([hinted + ids])).logits[0, -1].log_softmax(-1)    # (V,)
        log_q = model(torch.tensor([plain + ids])).logits[0, -1].log_softmax(-1)     # (V,)
        log_m, _ = mix(log_p, log_q, beta)
        if not ids:
            log_m = log_p
        elif MARKER in tokenizer.decode(ids):
            log_m = log_q
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
    """What each of `size` tokens does to the progress of a text: table[progress, token] -> progress,
    int64 (8, size). One look-up on the device instead of decoding every row at every token."""
    # A token is read behind another one, because at the start of a text it may lose its space.
    before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    skip = len(tokenizer.decode(before))
    tokens = range(min(size, len(tokenizer)))
    texts = tokenizer.batch_decode([before + [token] for token in tokens])

    # As far as it matters, the text before the token is MARKER[:progress].
    table = torch.zeros(len(MARKER) + 1, size, dtype=torch.long)
    for progress in range(len(MARKER)):
        for token, text in zip(tokens, texts):
            table[progress, token] = marker_progress(MARKER[:progress] + text[skip:])
    table[len(MARKER)] = len(MARKER)                           # found once is found for good
    return table


def hinted_combine(table, beta, mode="linear"):
    """`combine` for a sampler with the streams (hinted, plain). The state of a row is its progress
    in `table`, marker_table's, on the model's device."""
    def combine(logits, last, step, progress):
        log_p, log_q = logits.log_softmax(-1).unbind(1)                    # (R, V) each
        log_m, _ = mix(log_p, log_q, beta, mode)
        first = step == 0                                      # `last` still belongs to the prompt
        progress = torch.where(first, 0, table[progress, last])
        boxed = progress == len(MARKER)
        log_m = torch.where(first[:, None], log_p, log_m)
        log_m = torch.where(boxed[:, None], log_q, log_m)
        return log_m, progress
    return combine


def one_context(logits, last, step, state):
    """`combine` for a pair that holds one context twice. Own answers and analyses cost up to twice
    what they could, but one sampler and one slab of memory serve everything."""
    return logits[:, 0], state


def repetition(tokens, size=30, times=5, fresh=32):
    """`halt` for the sampler: the length at which some `size`-gram stood in tokens for the
    `times`-th time, or None. It looks at those that end in the last `fresh` tokens: the sampler
    asks at least that often."""
    if len(tokens) < size:
        return None
    grams = np.lib.stride_tricks.sliding_window_view(np.array(tokens), size)       # (N, size)
    for i in range(max(0, len(grams) - fresh), len(grams)):
        alike = np.flatnonzero(grams[:i + 1, 0] == grams[i, 0])                    # same first token
        if (grams[alike] == grams[i]).all(1).sum() >= times:
            return i + size
    return None


# ---- the two contexts ---------------------------------------------------------------------------

HINT = """Below are a problem and a reference solution that is known to be right. Solve the problem \
the way you would if you had found the solution yourself: in your own words, one small step after \
the other. Let the reference guide you, but never mention that there is one."""
HEADING = "# CoT"
ANALYSIS = f"""
Answer in two parts. Under the heading `# Analysis`, go through the reference line by line: what is \
done there, why, and what it leaves out. Then, under the heading `{HEADING}`, solve the problem \
from the start."""


def contexts(tokenizer, problem, analysis):
    """A problem -> hinted ids, plain ids, up to where the text (or its analysis) begins. Without a
    demonstration there is no hint, and both are the plain ones."""
    plain = prompt_ids(tokenizer, problem["problem"])
    if not problem["solution"]:
        return plain, plain
    turns = problem["problem"]
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    question = turns[-1]["content"]
    if "<hint>" in tokenizer.get_vocab():                      # the toy has hints of its own form
        return toy.hint_prompt(tokenizer, question, problem["solution"]), plain

    text = HINT + INSTRUCTION
    if analysis:
        text = HINT + ANALYSIS + INSTRUCTION
    text += f"\n\n# Problem\n{question}\n\n# Reference solution\n{problem['solution']}"
    return prompt_ids(tokenizer, [*turns[:-1], {"role": "user", "content": text}]), plain


def two_streams(model, tokenizer, problems, flags):
    """What the functions below need -> a sampler, the marker's table, and the problems that leave
    the model room for --max_new_tokens. Says how many do not, InputError if none does."""
    if flags.analysis and "<hint>" in tokenizer.get_vocab():
        raise InputError("--analysis: the toy can retell but not analyse, add --no_analysis")
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    room = flags.max_new_tokens
    if flags.analysis:
        room *= 2                                              # the analysis and the retelling
    pairs, fit = [], []
    for problem in problems:
        pair = contexts(tokenizer, problem, flags.analysis)
        if max(len(ids) for ids in pair) + room <= context:
            pairs.append(pair)
            fit.append(problem)
    if len(fit) < len(problems):
        print(f"{len(problems) - len(fit)} of {len(problems)} problems are left out: with their "
              f"solution and {room} new tokens they are longer than the {context} the model reads")
    if not fit:
        raise InputError("--max_new_tokens leaves no problem that the model can read: lower it")
    sampler, _ = new_sampler(model, pairs, room, flags.rows, streams=2)
    table = marker_table(tokenizer, model.get_input_embeddings().num_embeddings)
    return sampler, table.to(model.device), fit


# ---- texts --------------------------------------------------------------------------------------

def judge(model, tokenizer, problems, samples, source):
    """Samples, one a problem -> trajectories: the problem with the text as its solution; source;
    finish (stop, length, repetition); tokens; mean_phi and the shares phi>-1, phi>-3, phi>-5 under
    the plain context; dropped: why nobody should learn from it, or ""."""
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
        finish, dropped = "stop", ""
        if not sample.finished:
            finish = dropped = "repetition" if repetition(sample.tokens) else "length"
        elif not correct:
            dropped = "wrong answer"
        row = {**problem, "solution": text, "source": source, "finish": finish, "dropped": dropped,
               "tokens": len(phi), "mean_phi": phi.mean().item()}
        for limit in (-1, -3, -5):
            row[f"phi>{limit}"] = (phi > limit).float().mean().item()
        rows.append(row)
    return rows


def answer(model, tokenizer, sampler, problems, flags, temperature):
    """What the model writes without a hint -> one trajectory a problem."""
    plain = [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    samples = sampler([(ids, ids) for ids in plain], max_new_tokens=flags.max_new_tokens,
                      stop=stop_ids(model, tokenizer), temperature=temperature, seed=flags.seed,
                      combine=one_context, halt=repetition)
    return judge(model, tokenizer, problems, samples, "own")


def analyse(model, tokenizer, sampler, hinted, flags):
    """The model goes through every reference, greedily [code]: hinted contexts -> the same with the
    analysis and the heading of the second part behind; whether it came to that heading."""
    def halt(tokens):
        for end in range(max(0, len(tokens) - 32), len(tokens) + 1):
            if HEADING in tokenizer.decode(tokens[max(0, end - 16):end]):
                return end
        return repetition(tokens)

    samples = sampler([(ids, ids) for ids in hinted], max_new_tokens=flags.max_new_tokens,
                      stop=stop_ids(model, tokenizer), temperature=0, combine=one_context,
                      halt=halt)
    longer = [ids + sample.tokens for ids, sample in zip(hinted, samples)]
    came = [HEADING in tokenizer.decode(sample.tokens[-16:]) for sample in samples]
    return longer, came


def retell(model, tokenizer, sampler, table, problems, flags, beta):
    """Hinted decoding -> one trajectory a problem."""
    hinted, plain = zip(*[contexts(tokenizer, problem, flags.analysis) for problem in problems])
    if flags.analysis:
        hinted, came = analyse(model, tokenizer, sampler, hinted, flags)
    samples = sampler(list(zip(hinted, plain)), max_new_tokens=flags.max_new_tokens,
                      stop=stop_ids(model, tokenizer), temperature=flags.temperature,
                      top_p=flags.top_p, seed=flags.seed, halt=repetition,
                      combine=hinted_combine(table, beta, flags.gate))
    rows = judge(model, tokenizer, problems, samples, "hinted")
    if flags.analysis:
        for row, finished in zip(rows, came):
            if not finished:
                row["dropped"] = "unfinished analysis"         # as the authors do, right or not
    return rows


# ---- the pipeline -------------------------------------------------------------------------------

def rewrite(model, tokenizer, sampler, table, problems, flags):
    """One trajectory a problem: the model's own answer if it is right, since nothing is more
    on-policy, else the demonstration retold, right or not."""
    sampler.sync(model)
    rows = answer(model, tokenizer, sampler, problems, flags, flags.own_temperature)
    wrong = []
    for i, row in enumerate(rows):
        if row["dropped"] and problems[i]["solution"]:
            wrong.append(i)
        elif row["dropped"]:
            row["dropped"] = "no demonstration"
    if wrong:
        todo = [problems[i] for i in wrong]
        retold = retell(model, tokenizer, sampler, table, todo, flags, flags.beta)
        for i, row in zip(wrong, retold):
            rows[i] = row
    return rows


def kept(rows):
    return [row for row in rows if not row["dropped"]]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_data(model, tokenizer, sampler, table, problems, flags, out, rows):
    """<out>/trajectories.jsonl, which holds `rows` already, grows chunk by chunk; data.jsonl, what
    is kept, comes at the end. -> {what became of a problem: how often}, also printed."""
    write_file(out / "trajectories.jsonl", json_lines(rows))
    for start in tqdm(range(len(rows), len(problems), 4 * flags.rows), leave=False):
        chunk = problems[start:start + 4 * flags.rows]
        new = rewrite(model, tokenizer, sampler, table, chunk, flags)
        with open(out / "trajectories.jsonl", "a", encoding="utf-8") as file:
            file.write(json_lines(new))
        rows += new
    write_file(out / "data.jsonl", json_lines(kept(rows)))
    counts = Counter()
    for row in rows:
        counts[f"dropped: {row['dropped']}" if row["dropped"] else row["source"]] += 1
    print(f"{len(rows)} problems -> {len(kept(rows))} texts in {out}/data.jsonl ("
          + ", ".join(f"{count} {name}" for name, count in counts.most_common()) + ")")
    return counts


def compare(model, tokenizer, sampler, table, problems, flags):
    """All kinds of text for the same problems: prints those of the first problem and the paper's
    kind of table -> {kind: its numbers}."""
    demos = []
    for problem in problems:
        demos.append(Sample(tokens=demo_ids(tokenizer, problem["solution"]), finished=True))
    kinds = {"demonstration": judge(model, tokenizer, problems, demos, "demonstration")}
    for beta in flags.betas:
        kinds[f"hinted, beta {beta:g}"] = retell(model, tokenizer, sampler, table, problems, flags,
                                                 beta)
    kinds["own, T 1"] = answer(model, tokenizer, sampler, problems, flags, 1.0)

    print(f"{problems[0]['problem']}    [{problems[0]['answer']}]\n")
    for kind, rows in kinds.items():
        print(f"{kind}, mean phi {rows[0]['mean_phi']:+.2f}:\n    {rows[0]['solution']}")
    print(f"\n{len(problems)} problems      mean phi  phi>-1  phi>-3  phi>-5   right   tokens")
    result = {}
    for kind, rows in kinds.items():
        tokens = [row["tokens"] for row in rows]
        numbers = {}
        for name in ("mean_phi", "phi>-1", "phi>-3", "phi>-5"):
            numbers[name] = np.average([row[name] for row in rows], weights=tokens)
        numbers |= {"right": len(kept(rows)) / len(rows), "tokens": np.mean(tokens)}
        form = "{:16} {:+12.3f} {:7.3f} {:7.3f} {:7.3f} {:7.3f} {:8.1f}"
        print(form.format(kind, *numbers.values()))
        result[kind] = numbers
    return result


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "problems and demonstrations: toy, a JSON(L) file or hf://...")
    problems: int = flag(0, "how many of its problems to use; 0: all", 0, 10**9)
    out: str = flag("runs/hinted_decode", "directory for data.jsonl and trajectories.jsonl")
    beta: float = flag(3.0, "lam = beta H[p] / log|V|; 0 is self-distillation [code]", 0, 1e9)
    gate: Literal["linear", "sigmoid", "piecewise"] = flag("linear", "[D]; the others [code]")
    temperature: float = flag(0.3, "of the retelling, 0 is greedy [code]", 0, 100)
    top_p: float = flag(0.95, "of the retelling [code]", 1e-6, 1)
    own_temperature: float = flag(0.0, "of the own answers [code]; 1 is on-policy", 0, 100)
    analysis: bool = flag(True, "let the model analyse the reference first [code]")
    max_new_tokens: int = flag(8192, "longest text, longest analysis [code]", 1, 10**6)
    rows: int = flag(64, "texts written side by side: more is faster", 1, 10**5)
    betas: list[float] = flag([], "compare these, demonstrations and own text first", 0, 1e9)
    seed: int = flag(0, "of everything: toy, sampling", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the killed run in --out")


# The toy knows no analysis. Its answers are pairs, 1 in 576, so a right own answer is no guess.
TOY = {"problems": 256, "analysis": False, "max_new_tokens": 96, "betas": [0.0, 3.0, 30.0, 300.0]}


def main(flags):
    out = new_run(flags.out, flags.resume)
    if flags.data == "toy":
        problems = toy.problems("train", flags.problems or 256, flags.seed)
    else:
        problems = load_problems(flags.data)[:flags.problems or None]
    for problem in problems:
        if isinstance(problem["solution"], list):              # of several the first
            problem["solution"] = problem["solution"][0]
    settings = asdict(flags)
    for name in ("out", "resume", "device", "betas"):
        del settings[name]
    if flags.resume:
        before = json.loads((out / "summary.json").read_text())["flags"]
        if before != settings:
            raise InputError(f"--resume: the run in {out} had {before}, repeat its flags")

    model, tokenizer = load_model(flags.model, pick_device(flags.device), flags.seed)
    sampler, table, problems = two_streams(model, tokenizer, problems, flags)
    rows = finished_rows(out / "trajectories.jsonl", problems, 4 * flags.rows)
    out.mkdir(parents=True, exist_ok=True)
    summary = {"flags": settings}
    write_file(out / "summary.json", json.dumps(summary))
    told = [problem for problem in problems if problem["solution"]]
    if flags.betas and told:
        summary["table"] = compare(model, tokenizer, sampler, table, told, flags)
    summary["counts"] = write_data(model, tokenizer, sampler, table, problems, flags, out, rows)
    write_file(out / "summary.json", json.dumps(summary))


if __name__ == "__main__":
    run_script(main, Flags, TOY)
