r"""
hinted_decode.py - demonstrations retold in the model's own voice.

Paper: Towards On-Policy SFT (Zhang et al., https://arxiv.org/abs/2602.12222), its second method. A demonstration
is right but foreign; an own answer is familiar but often wrong. Hinted decoding reads two contexts with one model,
and only one of them holds the reference solution. Where the hinted stream is sure of the next token, it leads; where
it hesitates, the question is one of wording, and the model speaks as it would alone:

    log m_t = (1 - lam_t) log p_t + lam_t log q_t        lam_t = clamp(beta H[p_t] / log|V|, 0, 1)

    log_p, log_q      p, the hinted stream (problem and reference), and q, the plain one (problem)
    lam               lambda_t, the share of the plain stream; H[p_t] is the entropy of p at temperature 1
    beta              how soon the plain stream has a say; 0 is self-distillation, the hinted stream alone
    phi               log q(y_t) + H[q_t] (ddt.py): how foreign a token still is to the model that is to learn it

The first token comes from p alone: it decides how the text goes on. Once the text holds `\boxed{`, q is alone: the
answer must follow from what was written. A text ends with an end token, at the budget, or when some 30-gram stands
in it for the fifth time. reward.py verifies every text, and a problem that the model solves by itself keeps the
model's own answer: nothing is more on-policy.

The authors' code decodes one text at a time, without a cache, on two copies of the model (--race: what that costs),
truncates to top-p before it divides by the temperature (here: after, as in Hugging Face), and looks for repetitions
every 100 tokens (here: every few). Left out: two different models as p and q.

    python hinted_decode.py                         retell the toy's demonstrations, compare the kinds of text
    python hinted_decode.py --compare               train on raw, self-distilled, hinted and online texts
    python hinted_decode.py --rounds 4              online: retell, train, retell ...; --rounds 1 is its offline twin
    python hinted_decode.py --race                  against the uncached loop
    python hinted_decode.py --model Qwen/Qwen2.5-1.5B-Instruct --data train.jsonl --n 4 --analysis --out runs/retold
    python idft.py --model Qwen/Qwen2.5-1.5B-Instruct --data runs/retold/data.jsonl
"""
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import toy
from ddt import cll, read
from eval import (INSTRUCTION, InputError, demo_ids, finished_rows, flag, load_benchmarks, load_model, load_problems,
                  new_run, one_line, pick_device, prompt_ids, read_rows, run, stop_ids, write)
from idft import (GRID, SEEDS, TUNING_SEED, assess, before_and_after, count_bad, learning_rate, log_row, mean_std,
                  new_optimizer, save_checkpoint, start_run, supervised_step, sweep, training_rows)
from reward import rewards
from sampler import Sampler

MARKER = "\\boxed{"


# ---- two streams, one distribution ----------------------------------------------------------------------------------

def mix(log_p, log_q, beta, mode="linear"):
    """The two streams as one: log_p (hinted) and log_q (plain), both (..., V) log-probabilities at temperature 1
    -> log_m (..., V), not normalised, and lam (...), the share of the plain stream.

    mode: linear (the paper's), sigmoid or piecewise (the authors' code, with its constants). Else ValueError."""
    h = torch.special.entr(log_p.exp()).sum(-1) / math.log(log_p.shape[-1])     # H[p] / log|V|, from 0 (sure) to 1
    if mode == "linear":
        lam = (beta * h).clamp(0, 1)
    elif mode == "sigmoid":
        lam = torch.sigmoid(beta * (h - 0.5))
    elif mode == "piecewise":
        lam = ((h - 0.3) / (0.7 - 0.3)).clamp(0, 1)
    else:
        raise ValueError(f"mode must be linear, sigmoid or piecewise, not {mode!r}")
    a, b = (1 - lam)[..., None], lam[..., None]
    log_m = torch.where(a > 0, a * log_p, 0) + torch.where(b > 0, b * log_q, 0)     # p^0 is 1, but 0 * -inf is NaN
    return log_m, lam


def marker_table(tokenizer, size, marker=MARKER):
    """What every token does to a reader who waits for the marker: table[state, token] -> state, int64 (8, size).

    The state is how many characters of the marker the text ends with (the automaton of Knuth, Morris and Pratt), so
    the marker is found wherever the token borders fall; the last state means found, and stays. One lookup a step, on
    the device, instead of decoding every row. Special tokens, and ids that are no token, interrupt the marker."""
    found = len(marker)

    def after(state, c):
        return next(k for k in range(found, -1, -1) if (marker[:state] + c).endswith(marker[:k]))

    def text(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    moves = {c: [after(state, c) for state in range(found)] + [found] for c in marker}
    other = [0] * found + [found]                                       # any other character
    anchor = tokenizer("a", add_special_tokens=False).input_ids[-1:]    # read behind another token, for at the start
    columns, skip = [other] * size, len(text(anchor))                   # of a text a token may lose its space
    for token in set(range(min(size, len(tokenizer)))) - set(tokenizer.all_special_ids):
        states = range(found + 1)
        for c in text(anchor + [token])[skip:]:
            move = moves.get(c, other)
            states = [move[state] for state in states]
        columns[token] = list(states)
    return torch.tensor(columns).T.contiguous()


def hinted_combine(table, beta, mode="linear"):
    """`combine` for a sampler with the streams (hinted, plain). Its row state is that of marker_table."""
    def combine(logits, last, step, state):
        log_p, log_q = logits.log_softmax(-1).unbind(1)                 # (R, V)
        state = torch.where(step > 0, table[state, last], 0)            # at step 0 `last` belongs to the prompt
        log_m, _ = mix(log_p, log_q, beta, mode)
        log_m = torch.where((step == 0)[:, None], log_p, log_m)
        return torch.where((state == len(table) - 1)[:, None], log_q, log_m), state
    return combine


def repetition(tokens, size=30, times=5, fresh=8):
    """`halt` for the sampler: the length at which a `size`-gram stood in `tokens` for the `times`-th time, else None.

    Looks only at n-grams that end in the last `fresh` tokens: the sampler asks at least that often."""
    tokens = np.array(tokens)
    for end in range(max(size, len(tokens) - fresh + 1), len(tokens) + 1):
        starts = np.flatnonzero(tokens[:end - size + 1] == tokens[end - size])          # same first token
        if len(starts) >= times:
            grams = tokens[starts[:, None] + np.arange(size)]
            if (grams == tokens[end - size:end]).all(1).sum() >= times:
                return end


# ---- the two contexts -----------------------------------------------------------------------------------------------

HINT = """Below are a problem and a reference solution that is known to be right. Solve the problem the way you would \
if you had found the solution yourself: in your own words, one small step after the other. Let the reference guide \
you, but never mention that there is one."""
ANALYSIS = """
Answer in two parts. Under the heading `# Analysis`, go through the reference line by line: what is done there, why, \
and what it leaves out. Then, under the heading `# CoT`, solve the problem from the start."""


def contexts(tokenizer, problem, analysis=False):
    """A problem -> (hinted ids, plain ids), up to where the text (or the analysis) begins. Of several demonstrations
    the first is the reference; without one the hinted ids are []. The toy has a hint of its own form."""
    plain, solution = prompt_ids(tokenizer, problem["problem"]), problem["solution"]
    solution = solution[0] if isinstance(solution, list) else solution
    *turns, last = problem["problem"] if isinstance(problem["problem"], list) else [{"content": problem["problem"]}]
    if not solution:
        return [], plain
    if "<hint>" in tokenizer.get_vocab():
        return toy.hint_prompt(tokenizer, last["content"], solution), plain
    text = (f"{HINT}{ANALYSIS if analysis else ''}{INSTRUCTION}\n\n"
            f"# Problem\n{last['content']}\n\n# Reference solution\n{solution}")
    hinted = prompt_ids(tokenizer, [*turns, {"role": "user", "content": text}])
    return hinted + (encode(tokenizer, "# Analysis\n") if analysis else []), plain


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def readable(model, tokenizer, problems, analysis=False, room=64):
    """The problems whose contexts leave `room` tokens of what the model can read; says how many do not."""
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    fit = [p for p in problems if max(map(len, contexts(tokenizer, p, analysis))) + room <= limit]
    if analysis and "<hint>" in tokenizer.get_vocab():
        raise InputError("--analysis: the toy can retell a solution but not analyse it, take another --model")
    if not fit:
        raise InputError(f"--data: with its solution, every problem is longer than the {limit} tokens the model reads")
    if len(fit) < len(problems):
        print(f"{len(problems) - len(fit)} of {len(problems)} problems are too long for the model and left out")
    return fit


# ---- from problems to trajectories ----------------------------------------------------------------------------------

class Rewriter:
    """Turns problems into trajectories of one model: own answers, or demonstrations retold.

    A trajectory is a line of the output: the problem with the new text as its solution; source (own, hinted); finish
    (stop, length, repetition); tokens; mean_phi and the shares phi>-1, phi>-3, phi>-5 under the plain context; and
    dropped: why nobody should learn from it, "" if one should."""

    def __init__(self, model, tokenizer, problems, flags):
        """Memory is taken for the longest of `problems`. InputError if the model cannot be sampled from."""
        self.model, self.tokenizer, self.flags, self.stop = model, tokenizer, flags, stop_ids(model, tokenizer)
        longest = max(len(ids) for p in problems for ids in contexts(tokenizer, p, flags.analysis))
        longest += flags.max_new_tokens * (2 if flags.analysis else 1)
        length = min(longest, getattr(model.config, "max_position_embeddings", None) or longest)
        dtype = torch.bfloat16 if model.device.type == "cuda" else None
        try:
            self.plain = Sampler(model, flags.rows, length, dtype=dtype)
            self.pair = Sampler(self.plain.model, flags.rows, length, streams=2)
        except ValueError as error:
            raise InputError(f"--model: {one_line(error)}") from None
        self.table = marker_table(tokenizer, model.get_input_embeddings().num_embeddings).to(model.device)

    def own(self, problems, n, temperature, top_p=1.0):
        """n answers a problem, without a hint -> n trajectories a problem."""
        prompts = [contexts(self.tokenizer, p)[1] for p in problems]
        return self.trajectories(problems, *self.sample(self.plain, prompts, temperature, top_p, n=n), "own")

    def hinted(self, problems, beta):
        """One retelling a problem."""
        pairs = [contexts(self.tokenizer, p, self.flags.analysis) for p in problems]
        if self.flags.analysis:
            pairs = self.analysed(pairs)
        combine = hinted_combine(self.table, beta, self.flags.gate)
        samples = self.sample(self.pair, pairs, self.flags.temperature, self.flags.top_p, combine=combine)
        return self.trajectories(problems, *samples, "hinted")

    def analysed(self, pairs, heading="# CoT"):
        """Has the model write its analysis, in half the room there is; the retelling goes on under the heading."""
        def halt(ids):
            return len(ids) if heading in self.tokenizer.decode(ids[-32:]) else repetition(ids)

        prompts = [hinted for hinted, _ in pairs]
        ids, _ = self.sample(self.plain, prompts, self.flags.temperature, self.flags.top_p, halt=halt, share=0.5)
        result = []
        for (hinted, plain), text in zip(pairs, self.tokenizer.batch_decode(ids, skip_special_tokens=True)):
            analysis = encode(self.tokenizer, f"{text.split(heading)[0].rstrip()}\n\n{heading}\n")
            result.append((hinted + analysis[-((self.pair.length - len(hinted)) // 2):], plain))
        return result

    def sample(self, sampler, prompts, temperature, top_p, halt=repetition, share=1, **how):
        """Lists of tokens and how each ended. Budget: --max_new_tokens, but at most a share of the room there is."""
        sampler.sync(self.model)
        lengths = [max(map(len, prompt)) if sampler.streams == 2 else len(prompt) for prompt in prompts]
        budgets = [min(self.flags.max_new_tokens, int(share * (sampler.length - length))) for length in lengths]
        samples = sampler(prompts, max_new_tokens=budgets, stop=self.stop, temperature=temperature, top_p=top_p,
                          seed=self.flags.seed, halt=halt, **how)
        ids = samples.lists()
        return ids, ["stop" if stopped else "repetition" if repetition(row) else "length"
                     for row, stopped in zip(ids, samples.finished.tolist())]

    def trajectories(self, problems, ids, finish, source):
        """Responses (as many a problem) as verified trajectories with their phi."""
        problems = [p for p in problems for _ in range(len(ids) // len(problems))]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        right = rewards(texts, [p["answer"] for p in problems])
        logp, entropy, _, mask = read(self.model, [contexts(self.tokenizer, p)[1] for p in problems], ids)
        phi, tokens = cll(logp, entropy), mask.sum(-1)                                  # (R, T), (R,)
        numbers = {"tokens": tokens, "mean_phi": phi.sum(-1) / tokens,
                   **{f"phi>{x}": ((phi > x) & mask).sum(-1) / tokens for x in (-1, -3, -5)}}
        rows = []
        for i, (problem, text, end) in enumerate(zip(problems, texts, finish)):
            reason = end if end != "stop" else "" if right[i] else "wrong answer" if MARKER in text else "no answer"
            rows.append({**problem, "solution": text, "source": source, "finish": end, "dropped": reason,
                         **{name: round(values[i].item(), 4) for name, values in numbers.items()}})
        return rows

    def rewrite(self, problems):
        """The pipeline: one trajectory a problem, its first right own answer or else the retelling, right or not."""
        n = self.flags.n
        own, rows = self.own(problems, n, self.flags.own_temperature), []
        for i, problem in enumerate(problems):
            right = [row for row in own[i * n:(i + 1) * n] if not row["dropped"]]
            rows.append(right[0] if right else {**problem, "source": "none", "dropped": "no demonstration"})
        todo = [i for i, row in enumerate(rows) if row["dropped"] and problems[i]["solution"]]
        if todo:
            for i, row in zip(todo, self.hinted([problems[i] for i in todo], self.flags.beta)):
                rows[i] = row
        return rows


def kept(rows):
    return [row for row in rows if not row["dropped"]]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- a data file, and what is in it ---------------------------------------------------------------------------------

def rewrite_all(rewriter, problems, flags, out):
    """The pipeline over all problems: <out>/trajectories.jsonl grows chunk by chunk, data.jsonl (the kept ones) comes
    at the end. A sample's randomness belongs to its prompt, so a resumed run ends as an undisturbed one."""
    settings = {k: v for k, v in asdict(flags).items() if k not in ("out", "resume", "device", "rows", "betas")}
    report, rows = {"flags": settings}, []
    if flags.resume and (out / "summary.json").exists():
        [(_, before)] = read_rows(out / "summary.json")
        if before.get("flags") != settings:
            raise InputError(f"--resume: the run in {out} had the flags {before.get('flags')}: repeat them")
        rows = finished_rows(out / "trajectories.jsonl", problems, flags.save_every)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "summary.json", json.dumps(report))
    write(out / "trajectories.jsonl", json_lines(rows))
    for start in tqdm(range(len(rows), len(problems), flags.save_every), desc="rewriting", leave=False):
        new = rewriter.rewrite(problems[start:start + flags.save_every])
        with open(out / "trajectories.jsonl", "a", encoding="utf-8") as file:
            file.write(json_lines(new))
        rows += new
    write(out / "data.jsonl", json_lines(kept(rows)))
    report["counts"] = Counter(f"dropped: {row['dropped']}" if row["dropped"] else row["source"] for row in rows)
    print(f"{len(rows)} problems -> {out}/data.jsonl with {len(kept(rows))}: "
          + ", ".join(f"{count} {name}" for name, count in report["counts"].most_common()))
    if flags.betas:
        report["table"] = compare_texts(rewriter, problems, flags)
    write(out / "summary.json", json.dumps(report))


def compare_texts(rewriter, problems, flags):
    """The paper's kind of table, all kinds of text for the same problems: {kind: its numbers}, also printed."""
    problems = [p for p in problems if p["solution"]]
    demos = [p["solution"][0] if isinstance(p["solution"], list) else p["solution"] for p in problems]
    ids, table = [demo_ids(rewriter.tokenizer, demo) for demo in demos], {}
    kinds = {"demonstrations": rewriter.trajectories(problems, ids, ["stop"] * len(ids), "demonstration")}
    kinds |= {f"hinted, beta {beta:g}": rewriter.hinted(problems, beta) for beta in flags.betas}
    kinds[f"own, T {flags.temperature:g}"] = rewriter.own(problems, 1, flags.temperature, flags.top_p)
    kinds["own, T 1"] = rewriter.own(problems, 1, 1.0)
    print(f"\n{'':20} mean phi  phi>-1  phi>-3  phi>-5   right   tokens")
    for name, rows in kinds.items():
        tokens = [row["tokens"] for row in rows]
        table[name] = {key: float(np.average([row[key] for row in rows], weights=tokens))
                       for key in ("mean_phi", "phi>-1", "phi>-3", "phi>-5")}
        table[name] |= {"right": len(kept(rows)) / len(rows), "tokens": sum(tokens) / len(rows)}
        print("{:20} {:+8.3f} {:7.3f} {:7.3f} {:7.3f} {:7.3f} {:8.1f}".format(name, *table[name].values()))
    return table


# ---- training on it: offline, online --------------------------------------------------------------------------------

def token_batch(rows, tokens, step, seed):
    """Random rows (prompt ids, response ids) until their responses hold `tokens` tokens: a step learns from as many
    tokens whatever the length of the texts."""
    rng, batch = np.random.default_rng((seed, step)), []
    while tokens > 0:
        batch.append(rows[rng.integers(len(rows))])
        tokens -= len(batch[-1][1])
    return batch


def train(model, tokenizer, problems, flags, optimizer, state, out=None):
    """On-policy SFT in rounds: a round rewrites its share of the problems with the model as it is now, then trains on
    what is kept for its share of the steps. One round is offline; 0 rounds learn from the demonstrations as they are.
    Every problem is rewritten once, and a checkpoint ends every round."""
    rounds = max(1, flags.rounds)
    order = np.random.default_rng(flags.seed).permutation(len(problems))
    rewriter = Rewriter(model, tokenizer, problems, flags) if flags.rounds else None
    bar = tqdm(total=flags.steps, initial=state["step"], desc=flags.loss, leave=False)
    for number in range(state.setdefault("round", 0), rounds):
        texts = [problems[i] for i in order[number::rounds]]
        about = {"round": number + 1, "problems": len(texts)}
        if rewriter:
            texts = kept(rewriter.rewrite(texts))
            about |= {source: sum(row["source"] == source for row in texts) for source in ("own", "hinted")}
        if not texts:
            raise InputError(f"round {number + 1} of --rounds kept no text: take fewer rounds or a better --model")
        rows = training_rows(model, tokenizer, texts, 10**9)
        for step in range(number * flags.steps // rounds, (number + 1) * flags.steps // rounds):
            lr = learning_rate(step, flags.steps, flags.lr)
            row = supervised_step(model, optimizer, token_batch(rows, flags.batch_tokens, step, flags.seed), lr,
                                  flags.loss, micro_tokens=flags.micro_tokens)
            state["step"] = step + 1
            count_bad(state, row)
            bar.update()
            bar.set_postfix(**about, nll=f"{row['nll']:.3f}")
            if out:
                log_row(out, {"step": step + 1, **about, **row})
        state["round"] = number + 1
        if out:
            write(out / f"round-{number + 1}.jsonl", json_lines(texts))
            save_checkpoint(out, model, tokenizer, optimizer, state)


ARMS = {"raw": {"rounds": 0}, "self-distilled": {"rounds": 1, "beta": 0.0}, "hinted": {"rounds": 1},
        "online": {"rounds": 4}}


def compare_training(flags):
    """Four kinds of text, two losses, on the toy: equal tokens to learn from, lr tuned for each arm on another seed."""
    def one(texts, loss, lr, seed):
        job = Flags(**{**asdict(flags), "loss": loss, "lr": lr, "seed": seed, **ARMS[texts]})
        model, tokenizer = load_model("toy", pick_device(flags.device), seed)
        problems, state = toy.problems("train", flags.problems or 256, seed), {"step": 0, "bad": 0}
        train(model, tokenizer, problems, job, new_optimizer(model, flags.weight_decay), state)
        sets = {"valid": toy.problems("hard", seed=1)} if seed == TUNING_SEED else load_benchmarks(["toy"])
        return assess(model, tokenizer, sets, flags.max_new_tokens)

    file, arms = Path(flags.out) / "compare.jsonl", [(texts, loss) for texts in ARMS for loss in ("sft", "idft")]
    tuning = sweep(file, [{"texts": texts, "loss": loss, "lr": lr, "seed": TUNING_SEED}
                          for texts, loss in arms for lr in GRID], one, steps=flags.steps)
    print(f"{'texts':14}  loss      lr   hard          longer        easy")
    for texts, loss in arms:
        tried = [row for row in tuning if row["texts"] == texts and row["loss"] == loss]
        lr = max(tried, key=lambda row: row["valid"])["lr"]
        rows = sweep(file, [{"texts": texts, "loss": loss, "lr": lr, "seed": seed} for seed in SEEDS], one,
                     steps=flags.steps)
        accuracy = [mean_std([row[f"toy-{split}"] for row in rows]) for split in ("hard", "longer", "easy")]
        print(f"{texts:14}  {loss:4}  {lr:6.0e}   {'   '.join(accuracy)}")


# ---- the race -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def uncached(model, tokenizer, hinted, plain, beta, max_new_tokens, stop=()):
    """Greedy hinted decoding of one problem the way the authors' code goes: both contexts are read again for every
    token, and the text is decoded again to look for the marker. -> list of token ids."""
    ids = []
    while len(ids) < max_new_tokens and not (ids and ids[-1] in stop):
        log_p, log_q = (model(torch.tensor([prompt + ids], device=model.device)).logits[0, -1].log_softmax(-1)
                        for prompt in (hinted, plain))
        alone = MARKER in tokenizer.decode(ids)
        ids.append(int((log_p if not ids else log_q if alone else mix(log_p, log_q, beta)[0]).argmax()))
    return ids


def race(flags, new=128):
    """Both ways on a small random model that never stops, alternately, and the proof that they write the same."""
    tokenizer = toy.tokenizer()
    config = LlamaConfig(vocab_size=4096, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                         intermediate_size=512, eos_token_id=None, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(flags.seed)
        model = LlamaForCausalLM(config).to(pick_device(flags.device)).eval()
    pairs = [contexts(tokenizer, p) for p in toy.problems("longer", 16)]
    combine = hinted_combine(marker_table(tokenizer, config.vocab_size).to(model.device), flags.beta)
    print(f"{new} new tokens a row   cached   uncached   ratio   same tokens")
    for rows in (1, 16):
        sampler = Sampler(model, rows, 512, streams=2)
        seconds, texts = [math.inf, math.inf], [None, None]
        ways = (lambda: sampler(pairs[:rows], max_new_tokens=new, stop=(), temperature=0, combine=combine).lists(),
                lambda: [uncached(model, tokenizer, *pair, flags.beta, new) for pair in pairs[:rows]])
        for way in (0, 1, 0, 1, 0):
            start = time.perf_counter()
            texts[way] = ways[way]()
            seconds[way] = min(seconds[way], time.perf_counter() - start)
        print(f"{rows:4} rows {seconds[0]:17.2f} s {seconds[1]:8.2f} s {seconds[1] / seconds[0]:6.1f}x   "
              f"{'yes' if texts[0] == texts[1] else 'NO'}")


# ---- flags and main -------------------------------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "problems with demonstrations: toy, a JSON(L) file or hf://owner/name/file.jsonl")
    eval_data: str = flag("", "--rounds: evaluated before and after: toy, a JSON(L) file, hf://... (on the toy: toy)")
    out: str = flag("runs/hinted_decode", "directory for the texts or, with --rounds, for metrics and checkpoint/")
    beta: float = flag(3.0, "lam = beta H[p] / log|V|; 0 is self-distillation [code]", 0, 1e9)
    gate: Literal["linear", "sigmoid", "piecewise"] = flag("linear", "how lam depends on H: [D]; the others: [code]")
    temperature: float = flag(0.3, "of the retelling; 0 is greedy [code]", 0, 100)
    top_p: float = flag(0.95, "of the retelling, after temperature [code]", 1e-6, 1)
    analysis: bool = flag(False, "let the model analyse the reference before it retells it [code]")
    n: int = flag(1, "own answers a problem; each is also a chance to be right by luck [ours]", 1, 10**4)
    own_temperature: float = flag(1.0, "of the own answers; at 1 they are truly on-policy [ours]", 0, 100)
    max_new_tokens: int = flag(8192, "longest text, cut to what the model can read [code]", 1, 10**6)
    rows: int = flag(64, "texts decoded side by side: more is faster until memory is full", 1, 10**5)
    problems: int = flag(0, "how many problems to use, the first ones; 0: all, of the toy 256", 0, 10**9)
    betas: list[float] = flag([], "compare these on all problems, and with demonstrations and own texts", 0, 1e9)
    rounds: int = flag(0, "train in so many rounds of online on-policy SFT instead of writing data", 0, 10**6)
    steps: int = flag(150, "--rounds: optimizer steps in all", 1, 10**9)
    batch_tokens: int = flag(65536, "--rounds: response tokens in an optimizer step [ours]", 1, 10**9)
    loss: Literal["idft", "dft", "sft"] = flag("idft", "--rounds: the loss, see idft.py")
    lr: float = flag(6e-5, "--rounds: peak learning rate, it is per model [code]", 0, 10)
    weight_decay: float = flag(0.01, "--rounds: AdamW [code]", 0, 10)
    micro_tokens: int = flag(16384, "--rounds: padded tokens in one forward and backward pass [ours]", 1, 10**9)
    save_every: int = flag(64, "problems between two writes; --rounds saves every round", 1, 10**9)
    seed: int = flag(0, "of everything: toy, sampling, order", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the run in --out")
    compare: bool = flag(False, "train on each kind of text with each loss, on the toy")
    race: bool = flag(False, "time this file against the uncached loop")


TOY = {"eval_data": "toy", "max_new_tokens": 64, "betas": [0.0, 3.0, 30.0, 300.0], "batch_tokens": 1024, "lr": 3e-4}


def main(flags):
    if flags.race:
        return race(flags)
    if flags.compare:
        return compare_training(flags)
    problems = toy.problems("train", flags.problems or 256, flags.seed) if flags.data == "toy" else \
        load_problems(flags.data)[:flags.problems or None]
    if flags.rounds > min(len(problems), flags.steps):
        raise InputError(f"--rounds {flags.rounds}: each round needs a problem and a step, there are {len(problems)} "
                         f"and {flags.steps}")
    if flags.rounds:
        out, model, tokenizer, optimizer, state = start_run(flags)
        problems = readable(model, tokenizer, problems, flags.analysis)
        benchmarks = load_benchmarks([flags.eval_data] if flags.eval_data else [])
        if "before" not in state:
            state["before"] = assess(model, tokenizer, benchmarks, flags.max_new_tokens)
        out.mkdir(parents=True, exist_ok=True)
        train(model, tokenizer, problems, flags, optimizer, state, out)
        print(before_and_after(state["before"], assess(model, tokenizer, benchmarks, flags.max_new_tokens)))
    else:
        out = new_run(flags.out, flags.resume)
        model, tokenizer = load_model(flags.model, pick_device(flags.device), flags.seed)
        problems = readable(model, tokenizer, problems, flags.analysis)
        rewrite_all(Rewriter(model, tokenizer, problems, flags), problems, flags, out)


if __name__ == "__main__":
    run(main, Flags, toy_defaults=TOY)
