"""
idft.py - In-Distribution Finetuning: supervised learning that listens to what the model knows.

Paper [D]: Towards On-Policy SFT, Zhang et al., https://arxiv.org/abs/2602.12222; its code: [code]

SFT pushes every token of a demonstration up equally hard, even those that the model would never
write. That makes the model forget. IDFT weights each token by p^gamma, and gamma follows from the
token's phi = log p + H (ddt.py): gamma is 1 in text like the model's own, smaller in more typical
text, and larger in foreign text, which therefore gets very little weight.

    L = sum_t w_t (-log p_t) / (target tokens of the whole optimizer step)
    w_t = stopgrad(p_t ^ gamma_t)                gamma_t = clamp(exp(-phi_t / beta), 0.1, 2)

    sft           w = 1 (gamma = 0), ordinary cross-entropy
    dft           w = p (gamma = 1), Dynamic Fine-Tuning, https://arxiv.org/abs/2508.05629
    strength      s in gamma <- 1 + s (gamma - 1); it can rise from 0 during training    [code]
    nll           the plain cross-entropy, logged beside the weighted loss, which is much smaller

Two things break silently, and each has a test. The weight must be detached: if the gradient flows
through it, the update changes its sign for p < e^(-1/gamma). This happened to the authors' own code
until March 2026 (commit eb0f3e7 of their repository). And the loss must be divided once, by the
token count of the whole step: a mean of micro-batch means gives tokens in short micro-batches more
weight. It is the smaller of two bugs that https://arxiv.org/abs/2604.23747 found under published
SFT baselines: 48.3 became 49.1 without it. The larger was an optimizer offload that kept only the
first micro-batch: 48.3 became 53.4 without that.

Left out: LoRA, sequence packing, several GPUs (bridges/). At first reading skip what follows the
training loop: checkpoints, log and --resume. prefix_rft.py shares it, and the optimizer step.

    python idft.py                                  the toy's base learns the demonstrations
    python idft.py --loss sft --out runs/sft        the same with plain SFT
    python idft.py --model Qwen/Qwen2.5-1.5B-Instruct --data train.jsonl --eval_data gsm8k
"""

import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.utils.checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from ddt import batch_stats, cll, logp_entropy, micro_batches
from eval import (InputError, blame, check_run, context_length, encode, fingerprint, flag,
                  greedy_accuracy, load_benchmarks, load_model, load_problems, new_sampler,
                  open_run, pick_device, read_log, run_script, write_rows, writing)


# ---- the loss -----------------------------------------------------------------------------------

def token_gamma(logp, entropy, beta=1.0, gamma_min=0.1, gamma_max=2.0, strength=1.0):
    """gamma = clamp(exp(-phi / beta), gamma_min, gamma_max), pulled towards 1 by strength < 1."""
    phi = cll(logp, entropy)
    gamma = torch.exp(-phi / beta).clamp(gamma_min, gamma_max)
    return 1 + strength * (gamma - 1)          # strength 0: DFT


def token_weight(logp, entropy, loss="idft", beta=1.0, gamma_min=0.1, gamma_max=2.0, strength=1.0):
    """logp, entropy (in nats, of one shape) -> w = p^gamma of every token, detached.

    loss: "sft" (w = 1), "dft" (w = p) or "idft". ValueError for any other."""
    logp = logp.detach()
    if loss == "sft":
        return torch.ones_like(logp)
    if loss == "dft":
        return logp.exp()
    if loss == "idft":
        gamma = token_gamma(logp, entropy.detach(), beta, gamma_min, gamma_max, strength)
        return torch.exp(gamma * logp)                                     # p^gamma
    raise ValueError(f"loss must be sft, dft or idft, not {loss!r}")


def compute_loss(outputs, labels, num_items_in_batch=None, loss="idft", **weighting):
    """The loss for transformers.Trainer(compute_loss_func=compute_loss) -> scalar.

    outputs: has .logits (B, T, V); labels (B, T), not yet shifted, -100 where there is nothing to
    learn; num_items_in_batch: target tokens of the whole optimizer step, which the Trainer counts
    (None: those of `labels`); weighting: the other arguments of token_weight."""
    # Position t predicts token t + 1. Only tokens with a label are learnt from.
    targets = labels[:, 1:].to(outputs.logits.device)          # (B, T-1)
    learn = targets != -100
    logits = outputs.logits[:, :-1][learn]                     # (tokens, V)
    logp, entropy = logp_entropy(logits, targets[learn])       # (tokens,)
    weight = token_weight(logp, entropy, loss, **weighting)
    if num_items_in_batch is None:
        num_items_in_batch = learn.sum().clamp(min=1)
    return -(weight * logp).sum() / num_items_in_batch


# ---- the supervised loop and its step -----------------------------------------------------------

def supervised_step(model, optimizer, rows, lr, flags, strength=1.0, weigh=token_weight):
    """One optimizer step on rows of (prompt ids, response ids) -> its metrics. Up to rounding they
    do not depend on --micro_tokens. weigh: a function to use in place of token_weight."""
    start = time.perf_counter()
    count = sum(len(response) for _, response in rows)         # of the whole step
    weighting = (flags.beta, flags.gamma_min, flags.gamma_max, strength)

    # Gradients add up over micro-batches. Each loss is divided by the count of the whole step.
    parts = []
    for group in micro_batches(rows, flags.micro_tokens):
        logp, entropy = batch_stats(model, [rows[i] for i in group])           # each (tokens,)
        weight = weigh(logp, entropy, flags.loss, *weighting)
        loss = -(weight * logp).sum() / count
        loss.backward()
        parts.append(torch.stack([logp, entropy, weight]).detach())
    logp, entropy, weight = torch.cat(parts, dim=1)            # each (count,)
    loss = -(weight * logp).mean().item()
    norm = optimizer_step(model, optimizer, lr, loss)

    # The metrics. gamma is that of IDFT, whichever loss is used.
    means = {"nll": -logp, "phi": cll(logp, entropy), "weight": weight,
             "gamma": token_gamma(logp, entropy, *weighting)}
    row = {name: values.mean().item() for name, values in means.items()}
    return {"loss": loss, **row, "grad_norm": norm, "lr": lr, "tokens": count,
            "tokens_per_s": count / (time.perf_counter() - start)}


KEEP = 4e9      # bytes of activations that a micro-batch may keep; above, they are recomputed

# AdamW's settings [code]. Fused: one pass over the weights, with no temporary of their size.
ADAMW = {"lr": 0.0, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}


def new_optimizer(model):
    return torch.optim.AdamW(model.parameters(), **ADAMW)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW for training on a small card. The card holds a bf16 copy of the weights and nothing
    else of that size. The float32 weights, gradients and moments are in main memory.

    model: in float32 and in main memory. It moves to `device`, with its parameters in `dtype`."""

    def __init__(self, model, device, dtype=torch.bfloat16):
        weights = [torch.nn.Parameter(p.data) for p in model.parameters()]
        super().__init__(weights, **ADAMW)
        self.copies = list(model.parameters())
        for weight, copy in zip(weights, self.copies):
            copy.data = copy.data.to(device, dtype, copy=True)
            copy.register_post_accumulate_grad_hook(partial(self.collect, weight))
        model.to(device)                       # moves its buffers

    def collect(self, weight, copy):
        """Add the gradient of one micro-batch to the float32 sum of the step. The backward pass
        calls this as soon as a gradient is complete, so that the card holds few of them at once."""
        gradient = copy.grad.to(weight)
        if weight.grad is None:
            weight.grad = gradient
        else:
            weight.grad += gradient
        copy.grad = None

    def step(self):
        super().step()
        with torch.no_grad():
            for weight, copy in zip(self.param_groups[0]["params"], self.copies):
                copy.copy_(weight)


def swap_weights(model, optimizer):
    """Exchange the model's parameters with the optimizer's. With --offload this puts the float32
    weights into the model, to be saved; a second call undoes it. Else both are the same."""
    for copy, weight in zip(model.parameters(), optimizer.param_groups[0]["params"]):
        copy.data, weight.data = weight.data, copy.data


def optimizer_step(model, optimizer, lr, loss, clip=1.0):
    """Clip the gradients [code], step, clear them -> the gradient norm before clipping. If this
    norm or the loss is not finite, nothing is updated."""
    weights = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(weights, clip).item()
    if math.isfinite(norm) and math.isfinite(loss):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over a share of the steps, then a cosine down to 0 [code]."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    progress = (step - ramp) / max(1, steps - ramp)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def strength_at(progress, warmup, transition):
    """The strength after a share `progress` of training: 0 in the warm-up, then rising linearly to
    1 over the transition [code]."""
    if progress < warmup:
        return 0.0
    if progress >= warmup + transition:
        return 1.0
    return (progress - warmup) / transition


def draw_batch(items, batch, step, seed):
    """The `batch` items of optimizer step `step`. Every epoch has a new order. The result depends
    on the arguments alone, so a resumed run needs no generator state."""
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(place, len(items))
        if position == 0 or not chosen:
            order = np.random.default_rng((seed, epoch)).permutation(len(items))
        chosen.append(items[order[position]])
    return chosen


def checkpoint_activations(model, above=0):
    """Recompute activations in the backward pass if a micro-batch would keep over `above` bytes of
    them: a third more time, a tenth of the memory. Unlike transformers' own switch, this does
    not turn dropout on. The model stays in eval mode, because the policy that learns must be the
    one that sampled."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(recomputed, layer.forward, above / len(layers))


def recomputed(forward, above, hidden_states, *args, **kwargs):
    """A layer's `forward`, with activations recomputed if they take more than `above` bytes."""
    # A layer keeps about 25 float32 numbers for every number of its input (measured on Llama).
    kept = 25 * 4 * hidden_states.numel()
    if kept <= above or not torch.is_grad_enabled():
        return forward(hidden_states, *args, **kwargs)
    return torch.utils.checkpoint.checkpoint(
        forward, hidden_states, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def demonstration_rows(model, tokenizer, problems, max_tokens):
    """Every demonstration as (prompt ids, response ids with the end token). The response is cut so
    that both fit max_tokens and the model. InputError if a prompt alone is longer."""
    limit = min(max_tokens, context_length(model))
    rows, cut = [], 0
    for row in encode(tokenizer, problems, limit):
        room = limit - len(row["prompt"])
        for response in row["demos"]:
            cut += len(response) > room
            rows.append((row["prompt"], response[:room]))
    if cut:
        print(f"{cut} of {len(rows)} demonstrations are longer than {limit} tokens with their "
              "prompt and were cut: they do not teach where to end")
    return rows


def train_supervised(run, rows):
    """The loop, from the step where `run` is to --steps."""
    flags = run.flags
    bar = tqdm(range(run.state["step"], flags.steps), desc=flags.loss, leave=False)
    for step in bar:
        # Everything that changes between steps follows from the number of the step.
        batch = draw_batch(rows, flags.batch, step, flags.seed)
        lr = learning_rate(step, flags.steps, flags.lr, flags.warmup)
        strength = strength_at(step / flags.steps, flags.gamma_warmup, flags.gamma_transition)
        row = supervised_step(run.model, run.optimizer, batch, lr, flags, strength)
        bar.set_postfix(nll=f"{row['nll']:.3f}", phi=f"{row['phi']:.3f}", refresh=False)
        end_step(run.out, run.model, run.tokenizer, run.optimizer, run.state, row, flags)


# ---- checkpoints, metrics, resume ---------------------------------------------------------------

def save_checkpoint(out, model, tokenizer, optimizer, state):
    """<out>/checkpoint: what from_pretrained loads, the optimizer and `state`."""
    new, now, old = out / "checkpoint.new", out / "checkpoint", out / "checkpoint.old"
    # Write it completely, in a place where a kill does no harm.
    shutil.rmtree(new, ignore_errors=True)
    with writing(new):
        swap_weights(model, optimizer)         # the float32 weights are what is saved
        model.save_pretrained(new)
        swap_weights(model, optimizer)
        tokenizer.save_pretrained(new)
        torch.save({"optimizer": optimizer.state_dict(), **state}, new / "trainer.pt")
    # Move it into the place of the old one. A kill between the two moves leaves checkpoint.old.
    if now.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(now, old)
    os.rename(new, now)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(out):
    """The newest whole checkpoint of a run, or None."""
    for name in ("checkpoint", "checkpoint.old"):
        if (out / name / "trainer.pt").exists():
            return out / name


def log_row(out, row):
    """Append a row to metrics.jsonl. nan and inf, which JSON lacks, become null."""
    row = json.loads(json.dumps(row), parse_constant=lambda name: None)
    with writing(out / "metrics.jsonl"), open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def end_step(out, model, tokenizer, optimizer, state, row, flags):
    """Log a step and save what is due, unless `out` is None. Ten dropped updates in a row end the
    run."""
    state["step"] += 1
    state["bad"] += 1
    if math.isfinite(row["loss"] + row["grad_norm"]):
        state["bad"] = 0
    if state["bad"] == 10:
        raise InputError("10 updates in a row had a loss or gradient that is not finite: lower "
                         "--lr, check the data")
    if out:
        log_row(out, {"step": state["step"], **row})
        if state["step"] % flags.save_every == 0 or state["step"] == flags.steps:
            save_checkpoint(out, model, tokenizer, optimizer, state)


def start_run(flags, require=("answer",), check=None, sampling=False):
    """A new run, or with --resume the one in --out -> Run, which has written nothing yet.
    check(flags, problems) may refuse. sampling: one sampler, with room for a response to every
    prompt, serves training and evaluations."""
    problems = load_problems(flags.data, require, flags.seed)
    if check:
        check(flags, problems)
    out, _ = check_run(flags)
    benchmarks = load_benchmarks([flags.eval_data])
    inputs = {"data": problems, "eval_data": benchmarks}
    device = pick_device(flags.device)
    checkpoint = find_checkpoint(out)
    memory = torch.device("cpu") if flags.offload else device
    model, tokenizer = load_model(str(checkpoint or flags.model), memory, flags.seed)
    if not checkpoint:                         # else it is read instead of --model
        inputs["model"] = fingerprint(model, tokenizer)
    if not flags.keep_activations:
        checkpoint_activations(model, above=KEEP)
    optimizer = OffloadedAdamW(model, device) if flags.offload else new_optimizer(model)
    state = {"step": 0, "bad": 0}
    if checkpoint:
        with blame(f"--resume: {checkpoint}/trainer.pt is damaged", "; name another --out"):
            state = torch.load(checkpoint / "trainer.pt", map_location=memory, weights_only=True)
            optimizer.load_state_dict(state.pop("optimizer"))
            if not (state["step"] > 0 and state["bad"] >= 0):
                raise InputError("it counts no steps")

    # A prompt that is too long is met here.
    sampler, room = None, flags.max_new_tokens
    asked = sum(benchmarks.values(), problems if sampling else [])
    rows = encode(tokenizer, asked, context_length(model), demos=False)
    if sampling:
        sampler, room = new_sampler(model, [row["prompt"] for row in rows], room, flags.rows)
    return Run(flags, model, tokenizer, optimizer, sampler, benchmarks, state, out, room, inputs)


@dataclass
class Run:
    """What a training loop works on. Without `out` it neither logs nor saves."""
    flags: object
    model: torch.nn.Module
    tokenizer: object
    optimizer: torch.optim.Optimizer
    sampler: object = None              # None: every evaluation makes its own
    benchmarks: dict = None             # {title: problems} of --eval_data
    state: dict = field(default_factory=lambda: {"step": 0, "bad": 0})      # kept in trainer.pt
    out: Path = None
    room: int = 0                       # --max_new_tokens, or as many as the model has room for
    inputs: dict = None                 # all that the run reads, by the flag that names it

    def begin(self):
        """Claim --out, now that nothing can be refused any more, and evaluate."""
        out, record = open_run(self.flags, **self.inputs)
        fresh = self.state["step"] == 0
        if fresh:
            self.state.update(record)
        elif {**self.state, **record} != self.state:
            raise InputError(f"--resume: {out}/checkpoint is of another run, name another --out")
        # The log has one row from before training and one per step. Later rows will be rewritten.
        rows = read_log(out / "metrics.jsonl")
        write_rows(out / "metrics.jsonl", [] if fresh else rows[:self.state["step"] + 1])
        if (out / "checkpoint").exists():      # what a kill in save_checkpoint left beside it
            for name in ("checkpoint.new", "checkpoint.old"):
                shutil.rmtree(out / name, ignore_errors=True)
        self.flags.max_new_tokens = self.room
        self.measure("before")

    def accuracy(self):
        """The greedy accuracy on every benchmark."""
        return greedy_accuracy(self.model, self.tokenizer, self.benchmarks,
                               self.flags.max_new_tokens, self.flags.rows, self.sampler)

    def measure(self, when):
        """Log the accuracy "before" or "after" training, unless a killed run has done so."""
        if when not in self.state:
            self.state[when] = self.accuracy()
            log_row(self.out, {"step": self.state["step"], when: self.state[when]})

    def end(self):
        """Evaluate again, and print the table of both."""
        self.measure("after")
        before, after = self.state["before"], self.state["after"]
        print("greedy accuracy   before   after" if before else "no --eval_data: not evaluated")
        for name in before:
            print(f"{name:16}  {before[name]:6.3f}  {after[name]:6.3f}")


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "demonstrations: toy, a JSON(L) file or hf://owner/name/file.jsonl")
    eval_data: str = flag("", "evaluated before and after training: toy, JSON(L) file or hf://...")
    out: str = flag("runs/idft", "directory for metrics.jsonl and checkpoint/")
    loss: Literal["idft", "dft", "sft"] = flag("idft", "idft [D], dft (gamma 1), sft (gamma 0)")
    lr: float = flag(6e-5, "peak learning rate, for a 7B instruct model [code]", 0, 10)
    warmup: float = flag(0.1, "share of training with rising learning rate [code]", 0, 1)
    epochs: float = flag(3.0, "passes over the demonstrations, if --steps is 0 [code]", 0)
    steps: int = flag(0, "optimizer steps; 0: as many as --epochs need", 0)
    batch: int = flag(128, "demonstrations per optimizer step [code]", 1, 10**5)
    beta: float = flag(1.0, "gamma = exp(-phi / beta) [code]", 1e-6)
    gamma_min: float = flag(0.1, "smallest gamma [code]", 0)
    gamma_max: float = flag(2.0, "largest gamma [code]; exp(B) for the paper's clip at B", 0)
    gamma_warmup: float = flag(0.0, "share of training at gamma = 1 [code]", 0, 1)
    gamma_transition: float = flag(0.0, "share over which it then moves to its value [code]", 0, 1)
    max_tokens: int = flag(8192, "longest prompt with demonstration; the rest is cut [ours]", 2)
    max_new_tokens: int = flag(512, "longest response in evaluations [ours]", 1)
    rows: int = flag(64, "responses sampled side by side in evaluations", 1)
    micro_tokens: int = flag(16384, "padded tokens in one pass: fewer need less memory", 1)
    keep_activations: bool = flag(False, "keep them even above 4 GB: faster, more memory")
    offload: bool = flag(False, "only bf16 weights on the card, float32 and AdamW in main memory")
    save_every: int = flag(50, "steps between checkpoints", 1)
    seed: int = flag(0, "seed of everything: toy, order", 0)
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "continue the run in --out")


TOY = {"eval_data": "toy", "lr": 1e-3, "steps": 100, "batch": 64, "max_new_tokens": 64}


def main(flags):
    if flags.gamma_min > flags.gamma_max:
        raise InputError(f"--gamma_min {flags.gamma_min} is above --gamma_max {flags.gamma_max}")
    run = start_run(flags, ("solution",))
    rows = demonstration_rows(run.model, run.tokenizer, run.inputs["data"], flags.max_tokens)
    run.begin()
    if flags.steps == 0:
        flags.steps = max(1, math.ceil(flags.epochs * len(rows) / flags.batch))
    train_supervised(run, rows)
    run.end()


if __name__ == "__main__":
    run_script(main, Flags, TOY)
