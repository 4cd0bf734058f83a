"""
idft.py - In-Distribution Finetuning: supervised learning that listens to what the model already knows.

Paper: "Towards On-Policy SFT", arXiv 2602.12222, section 4. Plain SFT pulls every token of a demonstration up equally
hard, also those that no model of this kind would ever write; that is what makes it forget. IDFT weighs each token by
p^gamma and reads gamma off the token's own phi = log p + H (ddt.py): a token as likely as the model's own samples gets
gamma near 1, a more typical one less, a foreign one more, and with it a weight that is a whisper.

    L = sum_t w_t (-log p_t) / (target tokens of the whole optimizer step),   w_t = stopgrad(p_t ^ gamma_t),
    gamma_t = clamp(exp(-phi_t / beta), gamma_min, gamma_max)

    loss="sft"    w = 1 (gamma = 0), ordinary cross-entropy
    loss="dft"    w = p (gamma = 1), Dynamic Fine-Tuning, arXiv 2508.05629
    loss="idft"   the above

Glossary: logp = log p_t(y_t); entropy = H[p_t]; phi = centered log-likelihood (sec. 3); gamma = the exponent; strength
= how much of gamma's deviation from 1 is used (the authors' code can fade it in, a warm-up share and a transition share
of training; both are 0 in their final script); nll = the plain cross-entropy, logged because the weighted loss is 10 to
20 times smaller and users of DFT take that for a bug.

Two things break silently and have a test each. The weight must be detached: with a gradient through it the sign flips
for p < e^(-1/gamma). And the division happens once, by the token count of the whole step: a mean of micro-batch means
counts the tokens of short micro-batches more, the bug that arXiv 2604.23747 found under published SFT baselines.

Left out: LoRA, sequence packing, several GPUs. The part from "one optimizer step" on is the training plumbing that
prefix_rft.py and hinted_decode.py use as well.

    python idft.py                                  the toy's base learns the expert's demonstrations, before and after
    python idft.py --loss sft --out runs/sft        the same with plain SFT
    python idft.py --compare                        SFT, DFT, IDFT: tuned, three seeds, also with wrong demonstrations
    python idft.py --model DIR --data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl
"""

import contextlib
import json
import math
import os
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import toy
from ddt import cll, logp_entropy, token_stats
from eval import (InputError, demo_ids, evaluate, flag, load_benchmarks, load_model, load_problems, new_run,
                  pick_device, prompt_ids, run, write)


# ---- the loss ------------------------------------------------------------------------------------------------------

def token_gamma(logp, entropy, beta=1.0, gamma_min=0.1, gamma_max=2.0, strength=1.0):
    """IDFT's exponent, shaped as logp: clamp(exp(-phi / beta), gamma_min, gamma_max); strength < 1 pulls it to 1."""
    gamma = torch.exp(-cll(logp, entropy) / beta).clamp(gamma_min, gamma_max)
    return (1 + strength * (gamma - 1)).detach()


def token_weight(logp, entropy, loss="idft", beta=1.0, gamma_min=0.1, gamma_max=2.0, strength=1.0):
    """w = p^gamma of every token, detached (sec. 4). logp and entropy: any one shape, in nats. loss: "sft" (w = 1),
    "dft" (w = p) or "idft". ValueError for another loss."""
    if loss == "sft":
        return torch.ones_like(logp).detach()
    if loss == "dft":
        return logp.detach().exp()
    if loss == "idft":
        return (token_gamma(logp, entropy, beta, gamma_min, gamma_max, strength) * logp.detach()).exp()
    raise ValueError(f"loss must be sft, dft or idft, not {loss!r}")


def compute_loss(outputs, labels, num_items_in_batch=None, loss="idft", **weighting):
    """The loss for `transformers.Trainer(compute_loss_func=compute_loss)`; functools.partial sets loss, beta, ...

    outputs: has .logits (B, T, V); labels: (B, T), not yet shifted, -100 where there is nothing to learn;
    num_items_in_batch: target tokens of the whole optimizer step (the Trainer counts them; None: those in `labels`).
    Returns a scalar."""
    targets = labels[:, 1:].to(outputs.logits.device)                              # position t predicts token t + 1
    learn = targets != -100
    logp, entropy = logp_entropy(outputs.logits[:, :-1][learn], targets[learn])    # (tokens,), nothing that is masked
    weight = token_weight(logp, entropy.detach(), loss, **weighting)
    count = learn.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return -(weight * logp).sum() / count


def strength_at(progress, warmup, transition):
    """How much of gamma is used at a share `progress` of training: 0 in the warm-up, then a line up to 1 [code]."""
    return min(1.0, max(0.0, progress - warmup) / transition) if transition else float(progress >= warmup)


def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over a share of the steps, then a cosine down to 0 [code]."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


# ---- one optimizer step --------------------------------------------------------------------------------------------

def draw_batch(count, batch, step, seed):
    """The examples of optimizer step `step`, a list of `batch` ints below `count`: epoch after epoch in fresh order. A
    function of its arguments alone, so that a resumed run needs no generator state."""
    places = range(step * batch, (step + 1) * batch)
    epochs = {place // count for place in places}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count).tolist() for epoch in epochs}
    return [orders[place // count][place % count] for place in places]


def micro_batches(lengths, budget):
    """Index lists that hold every row once: rows of like length side by side, rows x longest <= budget (or one row)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def pad(rows, device):
    """(prompt ids, response ids) pairs -> ids, mask, response, each (B, T): tokens, right-padded; which of them are
    real; which of those are the response."""
    T = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    mask, response = torch.zeros(2, len(rows), T, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, :end] = True
        response[i, len(prompt):end] = True
    return ids.to(device), mask.to(device), response.to(device)


def precision(device):
    """bf16 arithmetic on a GPU, float32 on a CPU. Weights stay float32: at lr 1e-6 bf16's 8 bits lose the update."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def new_optimizer(model, weight_decay=0.01):
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay)


def checkpoint_activations(model):
    """Recompute activations layer by layer in the backward pass. Only the layers are told that they train; the rest
    stays in eval mode, because dropout would make the policy that learns another one than the policy that sampled."""
    new_name = getattr(model, "activation_checkpointing_enable", None)
    enable = new_name or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def apply_gradients(model, optimizer, lr, clip):
    """Clip, step, clear; returns the norm before clipping. No step if that is not finite (or if lr is None)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if math.isfinite(norm) and lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def supervised_step(model, optimizer, rows, lr, loss="idft", beta=1.0, gamma_min=0.1, gamma_max=2.0, strength=1.0,
                    clip=1.0, micro_tokens=16384):
    """One optimizer step on (prompt ids, response ids) pairs, the same for every micro_tokens. Returns its metrics;
    gamma among them is what IDFT would use, whatever the loss."""
    start, device = time.perf_counter(), model.device
    count = sum(len(answer) for _, answer in rows)                 # counted before anything is cut into micro-batches
    stats = []
    for group in micro_batches([len(prompt) + len(answer) for prompt, answer in rows], micro_tokens):
        ids, mask, response = pad([rows[i] for i in group], device)
        with precision(device):
            logp, entropy = token_stats(model, ids, mask, want=response)                               # (B, T-1)
        learn = response[:, 1:]
        logp, entropy = logp[learn], entropy[learn].detach()                                           # (tokens,)
        weight = token_weight(logp, entropy, loss, beta, gamma_min, gamma_max, strength)
        (-(weight * logp).sum() / count).backward()
        stats.append(torch.stack([logp.detach(), entropy, weight]))
    logp, entropy, weight = torch.cat(stats, 1)
    total = -(weight * logp).mean().item()
    norm = apply_gradients(model, optimizer, lr if math.isfinite(total) else None, clip)
    gamma = token_gamma(logp, entropy, beta, gamma_min, gamma_max, strength)
    quantiles = np.quantile(gamma.cpu().numpy(), [0.1, 0.5, 0.9]).tolist()
    return {"nll": -logp.mean().item(), "loss": total, "phi": cll(logp, entropy).mean().item(),
            "gamma": gamma.mean().item(), "gamma_q10_q50_q90": quantiles, "weight": weight.mean().item(),
            "grad_norm": norm, "lr": lr, "tokens": count, "tokens_per_s": count / (time.perf_counter() - start)}


# ---- checkpoints, metrics, the rest --------------------------------------------------------------------------------

def save_checkpoint(out, model, tokenizer, optimizer, state):
    """<out>/checkpoint: what from_pretrained loads, plus the optimizer and `state`. It is written beside the old one
    and then takes its place; if the program dies between the two renames, find_checkpoint() still sees a whole one."""
    new, now, old = (out / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    torch.save({"optimizer": optimizer.state_dict(), **state}, new / "trainer.pt")
    if now.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(now, old)
    os.rename(new, now)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(out):
    """The newest whole checkpoint of a run directory, or None."""
    return next((out / name for name in ("checkpoint", "checkpoint.old") if (out / name / "trainer.pt").exists()), None)


def start_run(flags):
    """What every trainer does first: -> (out, model, tokenizer, optimizer, state).

    With --resume all of it comes from <out>/checkpoint, metrics.jsonl forgets what was logged after that, and the flags
    must be the same, or the run would not end where it would have ended undisturbed."""
    out, device, checkpoint = new_run(flags.out, flags.resume), pick_device(flags.device), None
    settings = {k: v for k, v in asdict(flags).items() if k not in ("out", "resume", "save_every", "device")}
    if flags.resume:
        checkpoint = find_checkpoint(out)
        if checkpoint is None and not out.exists():
            raise InputError(f"--resume: there is no run in {out}")
    model, tokenizer = load_model(str(checkpoint or flags.model), device, flags.seed)
    optimizer, state = new_optimizer(model, flags.weight_decay), {"step": 0, "bad": 0, "flags": settings}
    if checkpoint:
        saved = torch.load(checkpoint / "trainer.pt", map_location=device, weights_only=True)
        changed = [k for k in settings if saved["flags"].get(k) != settings[k]]
        if changed:
            was = saved["flags"].get(changed[0])
            raise InputError(f"--resume: this run was started with --{changed[0]} {was}, repeat its flags")
        optimizer.load_state_dict(saved.pop("optimizer"))
        state = saved
    if flags.resume and (out / "metrics.jsonl").exists():
        rows = read_log(out / "metrics.jsonl") if checkpoint else []
        rows = [row for row in rows if row["step"] <= state["step"] and (row["step"] == 0 or "loss" in row)]
        write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return out, model, tokenizer, optimizer, state


def log_row(out, row):
    """One JSON object a line into <out>/metrics.jsonl; nan and inf, which JSON does not know, become null."""
    row = json.loads(json.dumps(row), parse_constant=lambda name: None)
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def read_log(file):
    """The rows of a JSONL file, [] if there is none. Half a line at its end, left by a kill, is cut off."""
    if not file.exists():
        return []
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return [json.loads(line) for line in file.read_text().splitlines()]


def count_bad(state, row, limit=10):
    """Count the updates that were dropped because loss or gradient was not finite; ten in a row end the run."""
    bad = not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]))
    state["bad"] = state["bad"] + 1 if bad else 0
    state["dropped"] = row["dropped"] = state.get("dropped", 0) + bad
    if state["bad"] == limit:
        raise InputError(f"{limit} updates in a row had a loss or gradient that is not finite: lower --lr, "
                         "check the data")


def assess(model, tokenizer, benchmarks, max_new_tokens, sampler=None):
    """Greedy accuracy on every benchmark: {name: avg@1}."""
    return {name: evaluate(model, tokenizer, problems, max_new_tokens=max_new_tokens, sampler=sampler)["avg@n"]
            for name, problems in benchmarks.items()}


def before_and_after(before, after):
    """The short table at the end of every run."""
    if not before:
        return "no --eval_data: nothing was evaluated"
    lines = [f"{name:16}  {before[name]:6.3f}  {after[name]:6.3f}" for name in before]
    return "\n".join(["greedy accuracy   before   after", *lines])


def sweep(file, jobs, run_one, **also):
    """The results of run_one(**job), a dict, for every job, a dict. Each is a line of `file`, and what stands there is
    not run again: a sweep that was stopped goes on where it was. also: what else tells a result from another."""
    done, results = read_log(file), []
    for job in tqdm(jobs, desc=file.stem, leave=False):
        wanted = {**job, **also}
        found = next((row for row in done if all(row.get(key) == value for key, value in wanted.items())), None)
        if found is None:
            found = {**wanted, **run_one(**job)}
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a") as lines:
                lines.write(json.dumps(found) + "\n")
        results.append(found)
    return results


def mean_std(values):
    """ "0.52 ± 0.03": mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


# ---- the supervised loop -------------------------------------------------------------------------------------------

def training_rows(model, tokenizer, problems, max_tokens):
    """Every demonstration as (prompt ids, response ids with the end token), cut to max_tokens or the context."""
    limit = min(max_tokens, getattr(model.config, "max_position_embeddings", None) or max_tokens)
    rows, cut = [], 0
    for problem in problems:
        prompt = prompt_ids(tokenizer, problem["problem"])
        if len(prompt) >= limit:
            raise InputError(f"a prompt has {len(prompt)} tokens, --max_tokens and the model allow {limit}: shorten it")
        for solution in problem["solution"] if isinstance(problem["solution"], list) else [problem["solution"]]:
            response = demo_ids(tokenizer, solution)
            cut += len(prompt) + len(response) > limit
            rows.append((prompt, response[:limit - len(prompt)]))
    if cut:
        print(f"{cut} of {len(rows)} demonstrations are longer than {limit} tokens and were cut: they teach no ending")
    return rows


def train(model, tokenizer, rows, flags, optimizer, state, out=None):
    """The supervised loop from state["step"] to flags.steps; with `out` it leaves metrics.jsonl and checkpoints."""
    if flags.checkpoint_activations:
        checkpoint_activations(model)
    bar = tqdm(range(state["step"], flags.steps), initial=state["step"], total=flags.steps, desc=flags.loss,
               leave=False)
    for step in bar:
        batch = [rows[i] for i in draw_batch(len(rows), flags.batch, step, flags.seed)]
        lr = learning_rate(step, flags.steps, flags.lr, flags.warmup)
        strength = strength_at(step / flags.steps, flags.gamma_warmup, flags.gamma_transition)
        row = supervised_step(model, optimizer, batch, lr, flags.loss, flags.beta, flags.gamma_min, flags.gamma_max,
                              strength, flags.clip, flags.micro_tokens)
        state["step"] = step + 1
        count_bad(state, row)
        bar.set_postfix(nll=f"{row['nll']:.3f}", phi=f"{row['phi']:.3f}", gamma=f"{row['gamma']:.2f}", refresh=False)
        if out:
            log_row(out, {"step": step + 1, **row})
            if (step + 1) % flags.save_every == 0 or step + 1 == flags.steps:
                save_checkpoint(out, model, tokenizer, optimizer, state)
    return model


# ---- flags and main ------------------------------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "demonstrations: toy, a JSON(L) file or hf://owner/name/file.jsonl")
    eval_data: str = flag("", "evaluated before and after: toy, a JSON(L) file or hf://...; default: toy if --data is")
    out: str = flag("runs/idft", "directory for metrics.jsonl and checkpoint/")
    loss: Literal["idft", "dft", "sft"] = flag("idft", "idft [D], dft (gamma = 1) or sft (gamma = 0)")
    lr: float = flag(6e-5, "peak learning rate; 6e-5 suits a 7B instruct model, it is per model [code]", 0, 10)
    epochs: float = flag(3.0, "passes over the demonstrations, if --steps is 0 [code]", 0, 1e6)
    steps: int = flag(0, "optimizer steps; 0: as many as --epochs need", 0, 10**9)
    batch: int = flag(128, "demonstrations in an optimizer step [code]", 1, 10**6)
    beta: float = flag(1.0, "gamma = exp(-phi / beta) [code]", 1e-6, 1e6)
    gamma_min: float = flag(0.1, "smallest gamma [code]", 0, 100)
    gamma_max: float = flag(2.0, "largest gamma [code]", 0, 100)
    gamma_warmup: float = flag(0.0, "share of training at gamma = 1 [code]", 0, 1)
    gamma_transition: float = flag(0.0, "share of training over which gamma is faded in [code]", 0, 1)
    warmup: float = flag(0.1, "share of training with rising learning rate [code]", 0, 1)
    weight_decay: float = flag(0.01, "AdamW [code]", 0, 10)
    clip: float = flag(1.0, "largest gradient norm [code]", 0, 1e9)
    max_tokens: int = flag(8192, "prompt and demonstration together; what is longer is cut [ours]", 2, 10**7)
    micro_tokens: int = flag(16384, "padded tokens in one pass through the model: fewer, less memory [ours]", 1, 10**9)
    checkpoint_activations: bool = flag(False, "recompute activations: a third more time, far less memory [ours]")
    max_new_tokens: int = flag(512, "longest response in evaluations [ours]", 1, 10**6)
    problems: int = flag(256, "toy: how many training problems [ours]", 1, 10**5)
    wrong: float = flag(0.0, "toy: share of demonstrations with a false answer [ours]", 0, 1)
    save_every: int = flag(50, "steps between checkpoints", 1, 10**9)
    seed: int = flag(0, "of everything: toy, order", 0, 2**31)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the run in --out")
    compare: bool = flag(False, "the comparison of losses on the toy instead of one run")


TOY = {"eval_data": "toy", "lr": 3e-4, "steps": 100, "batch": 64, "max_new_tokens": 48}     # suits 100k parameters
GRID, TUNING_SEED, SEEDS = (3e-5, 1e-4, 3e-4, 1e-3), 5, (0, 1, 2)                          # --compare


def compare(flags):
    """SFT, DFT and IDFT on the toy: same data and steps, learning rate tuned for each on problems of another seed."""
    def one(loss, lr, wrong, seed):
        job = Flags(**{**asdict(flags), "loss": loss, "lr": lr, "wrong": wrong, "seed": seed})
        model, tokenizer = load_model("toy", pick_device(flags.device), seed)
        problems = toy.problems("train", flags.problems, seed, wrong)
        rows = training_rows(model, tokenizer, problems, flags.max_tokens)
        train(model, tokenizer, rows, job, new_optimizer(model, flags.weight_decay), {"step": 0, "bad": 0})
        sets = {"valid": toy.problems("hard", seed=1)} if seed == TUNING_SEED else load_benchmarks(["toy"])
        return assess(model, tokenizer, sets, flags.max_new_tokens)

    file, losses = Path(flags.out) / "compare.jsonl", ("sft", "dft", "idft")
    print(f"{'loss':6} {'lr':>6}  wrong   hard          longer        easy")
    for wrong in (0.0, 0.3):
        for loss in losses:
            tuning = sweep(file, [{"loss": loss, "lr": lr, "wrong": wrong, "seed": TUNING_SEED} for lr in GRID], one,
                           steps=flags.steps)
            lr = max(tuning, key=lambda row: row["valid"])["lr"]
            rows = sweep(file, [{"loss": loss, "lr": lr, "wrong": wrong, "seed": seed} for seed in SEEDS], one,
                         steps=flags.steps)
            scores = [mean_std([row[f"toy-{split}"] for row in rows]) for split in ("hard", "longer", "easy")]
            print(f"{loss:6} {lr:6.0e}  {wrong:4.0%}   " + "   ".join(scores), flush=True)


def main(flags):
    if flags.compare:
        return compare(flags)
    if flags.data == "toy":
        problems = toy.problems("train", flags.problems, flags.seed, flags.wrong)
    else:
        problems = load_problems(flags.data, require=("solution",))
    benchmarks = load_benchmarks([flags.eval_data] if flags.eval_data else [])
    out, model, tokenizer, optimizer, state = start_run(flags)
    rows = training_rows(model, tokenizer, problems, flags.max_tokens)
    flags.steps = flags.steps or max(1, math.ceil(flags.epochs * len(rows) / flags.batch))
    if "before" not in state:
        state["before"] = assess(model, tokenizer, benchmarks, flags.max_new_tokens)
    out.mkdir(parents=True, exist_ok=True)
    if state["step"] == 0:
        log_row(out, {"step": 0, "accuracy": state["before"]})
    train(model, tokenizer, rows, flags, optimizer, state, out)
    after = assess(model, tokenizer, benchmarks, flags.max_new_tokens)
    log_row(out, {"step": flags.steps, "accuracy": after})
    print(before_and_after(state["before"], after))


if __name__ == "__main__":
    run(main, Flags, toy_defaults=TOY)
