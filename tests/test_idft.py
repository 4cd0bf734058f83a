"""idft.py: the loss against the textbook, one step for every micro-batching, runs that survive
SIGKILL."""

import copy
import functools
import importlib.util
import json
import math
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import refusal, run_here, small_model, word_problems
from kill import assert_equal_runs, ended, killed_and_resumed, logged, start, untimed
from test_ddt import MODELS, build
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

import idft
import toy
from ddt import batch_stats, logp_entropy, micro_batches, pad_rows, token_stats
from eval import InputError, load_model, parse_flags
from idft import (Flags, compute_loss, draw_batch, learning_rate, strength_at, supervised_step,
                  token_gamma, token_weight)

V = 40


def small_rows(n=7, seed=0):
    """(prompt ids, response ids) of very unequal lengths; token 1 ends a response."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt = rng.integers(2, V, rng.integers(1, 12)).tolist()
        rows.append((prompt, rng.integers(2, V, rng.integers(1, 30)).tolist() + [1]))
    return rows


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step_gradients(model, rows, strength=1.0, weigh=token_weight, **settings):
    """The gradient of a supervised step and its metrics: plain descent at lr 1 moves the weights by
    exactly that, clipped to norm 1."""
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), lr=0.0)
    metrics = supervised_step(moved, optimizer, rows, 1.0, Flags(**settings), strength, weigh)
    change = [(p - q).flatten() for p, q in zip(model.parameters(), moved.parameters())]
    norm = metrics["grad_norm"]
    return torch.cat(change).detach() * max(1, norm + 1e-6), metrics


def as_batch(rows):
    """The rows padded, and labels as a Trainer has them."""
    ids, mask, response = pad_rows(rows, torch.device("cpu"))
    return ids, mask, torch.where(response, ids, -100)


# ---- the loss -----------------------------------------------------------------------------------

def random_logits(scale=3.0):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(9, (4, 6), generator=g)
    labels[0, :3] = labels[1, 4:] = labels[3, 2] = -100
    return scale * torch.randn(4, 6, 9, generator=g), labels


def loss_and_gradient(logits, labels, count=None, **how):
    logits = logits.clone().requires_grad_()
    loss = compute_loss(SimpleNamespace(logits=logits), labels, count, **how)
    loss.backward()
    return loss.detach(), logits.grad


def test_gamma_0_is_cross_entropy_in_value_and_gradient():
    logits, labels = random_logits()
    reference = logits.clone().requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy
    plain = cross_entropy(reference[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    plain.backward()
    for how in ({"loss": "sft"}, {"loss": "idft", "gamma_min": 0.0, "gamma_max": 0.0}):
        loss, gradient = loss_and_gradient(logits, labels, **how)
        torch.testing.assert_close(loss, plain.detach())
        torch.testing.assert_close(gradient, reference.grad)


@pytest.mark.parametrize("how", [{"gamma_min": 1.0, "gamma_max": 1.0}, {"strength": 0.0},
                                 {"beta": 1e9}])
def test_gamma_1_is_dft(how):
    logits, labels = random_logits()
    dft = loss_and_gradient(logits, labels, loss="dft")
    for ours, theirs in zip(loss_and_gradient(logits, labels, loss="idft", **how), dft):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(loss_and_gradient(logits, labels, loss="idft")[1], dft[1])


@pytest.mark.parametrize("count", [None, 37])
@pytest.mark.parametrize("how", [
    {"loss": "sft"}, {"loss": "dft"}, {"loss": "idft"}, {"loss": "idft", "strength": 0.3},
    {"loss": "idft", "beta": 0.5, "gamma_min": 0.4, "gamma_max": 1.5},
    {"loss": "idft", "gamma_min": 1 / 148, "gamma_max": 148.0}])        # the paper's clip at 5
def test_value_and_gradient_against_a_loop_in_float64(how, count):
    logits, labels = random_logits()
    beta = how.get("beta", 1.0)
    low, high = how.get("gamma_min", 0.1), how.get("gamma_max", 2.0)
    targets, total, gradient = 0, 0.0, np.zeros(logits.shape)
    for b in range(logits.shape[0]):
        for t in range(1, logits.shape[1]):
            y = labels[b, t].item()
            if y == -100:
                continue
            row = [float(x) for x in logits[b, t - 1]]
            z = sum(math.exp(x) for x in row)
            p = [math.exp(x) / z for x in row]
            entropy = -sum(q * math.log(q) for q in p)
            gamma = min(max(math.exp(-(math.log(p[y]) + entropy) / beta), low), high)
            gamma = 1 + how.get("strength", 1.0) * (gamma - 1)
            weight = {"sft": 1.0, "dft": p[y], "idft": p[y] ** gamma}[how["loss"]]
            targets += 1
            total -= weight * math.log(p[y])
            gradient[b, t - 1] = [weight * (q - (v == y)) for v, q in enumerate(p)]
    ours, our_gradient = loss_and_gradient(logits, labels, count, **how)
    assert ours.item() == pytest.approx(total / (count or targets), rel=1e-5)
    np.testing.assert_allclose(our_gradient.numpy(), gradient / (count or targets), atol=1e-6)


def test_no_gradient_flows_through_the_weight():
    logp = torch.tensor([-5.0, -2.0, -0.1], requires_grad=True)
    entropy = torch.tensor([1.0, 2.0, 0.3], requires_grad=True)
    for loss in ("sft", "dft", "idft"):
        assert not token_weight(logp, entropy, loss).requires_grad


@pytest.mark.parametrize("loss", ["sft", "dft", "idft"])
def test_every_step_makes_the_target_likelier(loss):
    """Also below p = e^(-1/gamma), where the gradient of an undetached weight points the other way:
    that is the control."""
    for other in (-3.0, 0.0, 2.0, 5.0):
        logits = torch.tensor([[[0.0, other, other], [0.0, 0.0, 0.0]]])
        gradient = loss_and_gradient(logits, torch.tensor([[-100, 0]]), loss=loss)[1][0, 0]
        assert gradient[0] < 0 and (gradient[1:] > 0).all()
    for gamma in (0.5, 1.0, 2.0):
        for p, sign in ((0.9 * math.exp(-1 / gamma), 1), (1.1 * math.exp(-1 / gamma), -1)):
            logp = torch.tensor(math.log(p), requires_grad=True)
            (-(gamma * logp).exp() * logp).backward()
            assert logp.grad.sign() == sign


def test_extreme_logits_stay_finite():
    logits, labels = random_logits(scale=1e4)
    for how in ({"loss": "sft"}, {"loss": "dft"}, {"loss": "idft"},
                {"loss": "idft", "gamma_max": 148.0}):
        value, gradient = loss_and_gradient(logits, labels, **how)
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_positions_touch_nothing(poison):
    logits, labels = random_logits()
    clean = loss_and_gradient(logits, labels)
    masked = torch.ones(logits.shape[:2], dtype=torch.bool)
    masked[:, :-1] = labels[:, 1:] == -100
    poisoned = loss_and_gradient(logits.masked_fill(masked[..., None], poison), labels)
    assert torch.equal(clean[0], poisoned[0]) and torch.equal(clean[1], poisoned[1])
    assert (clean[1][masked] == 0).all()


def test_weights_and_gamma():
    logp, entropy = -torch.rand(5, 7) * 6, torch.rand(5, 7) * 3
    gamma = token_gamma(logp, entropy)
    torch.testing.assert_close(gamma, torch.exp(-(logp + entropy)).clamp(0.1, 2))
    torch.testing.assert_close(token_weight(logp, entropy, "idft"), logp.exp() ** gamma)
    own = torch.tensor([-1.3])                                 # phi = 0: as likely as own text
    assert token_gamma(own, -own).item() == pytest.approx(1)
    assert token_gamma(own, -own - 9) == 2 and token_gamma(own, -own + 9) == pytest.approx(0.1)
    assert token_gamma(own, -own - 9, gamma_max=148.0) == 148
    with pytest.raises(ValueError, match="sft, dft or idft"):
        token_weight(logp, entropy, "grpo")


def test_no_target_at_all_is_a_loss_of_0():
    loss, gradient = loss_and_gradient(random_logits()[0], torch.full((4, 6), -100))
    assert loss == 0 and (gradient == 0).all()


# ---- schedules and batches ----------------------------------------------------------------------

@pytest.mark.parametrize("warmup, transition, expected", [
    (0, 0, {0: 1, 0.5: 1, 1: 1}), (0.2, 0, {0: 0, 0.19: 0, 0.2: 1, 1: 1}),
    (0.2, 0.4, {0: 0, 0.2: 0, 0.4: 0.5, 0.6: 1, 1: 1}), (0, 0.5, {0: 0, 0.25: 0.5, 0.5: 1})])
def test_strength_schedule(warmup, transition, expected):
    for progress, strength in expected.items():
        assert strength_at(progress, warmup, transition) == pytest.approx(strength)


def test_learning_rate():
    lr = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert lr[:10] == pytest.approx([0.2 * i for i in range(1, 11)])            # up in a line
    assert lr[10] == 2.0 and lr[55] == pytest.approx(1.0) and 0 < lr[99] < 0.002
    assert all(a >= b for a, b in zip(lr[9:], lr[10:]))                         # and down
    assert learning_rate(0, 1, 2.0) == 2.0 and learning_rate(0, 3, 2.0, warmup=0) == 2.0
    assert learning_rate(99, 100, 2.0, warmup=1.0) == 2.0


@pytest.mark.parametrize("count, batch", [(10, 5), (7, 3), (4, 9), (5, 5)])
def test_draw_batch_shows_every_example_once_an_epoch(count, batch):
    items = list(range(count))
    stream = [i for step in range(6 * count) for i in draw_batch(items, batch, step, 0)]
    epochs = [stream[i:i + count] for i in range(0, len(stream), count)]
    assert all(sorted(epoch) == items for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs[:9]}) > 5                      # in fresh order
    many = list("abcdefghijklmnopqrstuvwxyz")
    assert draw_batch(many, 9, 0, 0) == draw_batch(many, 9, 0, 0) != draw_batch(many, 9, 0, 1)


# ---- one optimizer step -------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("loss", ["sft", "dft", "idft"])
def test_a_step_is_the_same_for_every_micro_batching(kind, loss):
    model, rows = small_model(kind), small_rows()
    whole, metrics = step_gradients(model, rows, loss=loss)
    assert whole.norm() > 1e-2
    for micro_tokens in (1, 60, 150):
        cut, cut_metrics = step_gradients(model, rows[::-1], loss=loss, micro_tokens=micro_tokens)
        assert (whole - cut).norm() < 1e-5 * whole.norm()
        for key in metrics.keys() - {"tokens_per_s"}:
            assert cut_metrics[key] == pytest.approx(metrics[key], rel=1e-4), key

    # A mean of micro-batch means is another step, so the test above can fail.
    parts = [step_gradients(model, [row], loss=loss)[0] for row in rows]
    assert (torch.stack(parts).mean(0) - whole).norm() > 1e-2 * whole.norm()


@pytest.mark.parametrize("how", [{"loss": "sft"}, {"loss": "dft"}, {"loss": "idft"},
                                 {"loss": "idft", "strength": 0.4, "gamma_max": 148.0}])
def test_compute_loss_and_the_step_have_one_gradient(how):
    model, rows = small_model(), small_rows()
    ids, mask, labels = as_batch(rows)
    count = sum(len(response) for _, response in rows)
    ours, metrics = step_gradients(model, rows, **how)
    for given in (None, count, torch.tensor(count)):
        model.zero_grad()
        outputs = model(input_ids=ids, attention_mask=mask.long())
        value = compute_loss(outputs, labels, given, **how)
        value.backward()
        torch.testing.assert_close(gradients(model), ours, rtol=1e-4, atol=1e-6)
        assert value.item() == pytest.approx(metrics["loss"], rel=1e-5)
    accumulated = torch.zeros_like(ours)            # as a Trainer does it: parts, one count for all
    for row in rows:
        ids, mask, labels = as_batch([row])
        model.zero_grad()
        compute_loss(model(input_ids=ids), labels, count, **how).backward()
        accumulated += gradients(model)
    torch.testing.assert_close(accumulated, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="Trainer needs accelerate")
def test_compute_loss_in_the_trainer(tmp_path):
    """One step of plain descent over two accumulated micro-batches is supervised_step."""
    model, rows = small_model(), small_rows(8)
    expected, _ = step_gradients(model, rows, loss="idft")
    before = [p.detach().clone() for p in model.parameters()]

    def collate(rows):
        ids, mask, labels = as_batch(rows)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=1e9,
        report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows, data_collator=collate,
            compute_loss_func=functools.partial(compute_loss, loss="idft")).train()
    moved = torch.cat([(p - q).flatten() for p, q in zip(before, model.parameters())])
    assert (moved - expected).norm() < 1e-4 * expected.norm()


def test_trained_are_the_response_from_its_first_token_to_eos_and_nothing_else():
    model, rows = small_model(), small_rows()
    logp, phi = [], []
    for prompt, answer in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        for i, token in enumerate(answer):
            log_p = logits[len(prompt) + i - 1].log_softmax(-1)
            logp.append(log_p[token].item())
            phi.append(logp[-1] - (log_p.exp() * log_p).sum().item())
    _, metrics = step_gradients(model, rows, loss="sft")
    assert metrics["tokens"] == len(logp) == sum(len(answer) for _, answer in rows)
    assert metrics["nll"] == metrics["loss"] == pytest.approx(-np.mean(logp), rel=1e-5)
    assert metrics["weight"] == 1

    # What is logged beside the weighted loss, which is much smaller.
    gradient, metrics = step_gradients(model, rows, loss="idft")
    gamma = np.exp(-np.array(phi)).clip(0.1, 2)
    weight = np.exp(gamma * np.array(logp))
    expected = {"nll": -np.mean(logp), "loss": -np.mean(weight * logp), "phi": np.mean(phi),
                "gamma": gamma.mean(), "weight": weight.mean(),
                "grad_norm": gradient.norm().item()}
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-4), key
    assert metrics["loss"] < metrics["nll"] / 2

    # A response of EOS alone is a target like any other.
    model.zero_grad()
    (-model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1)[1]).backward()
    alone = step_gradients(model, [([5, 6], [1])], loss="sft")[0]
    torch.testing.assert_close(alone, gradients(model))


def test_experiments_bring_their_own_weights():
    model, rows = small_model(), small_rows()
    ours = step_gradients(model, rows, weigh=lambda logp, *rest: logp.detach().exp())[0]
    assert torch.equal(ours, step_gradients(model, rows, loss="dft")[0])


def test_gradients_are_clipped_to_the_norm():
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = supervised_step(model, optimizer, small_rows(), 1.0, Flags(loss="sft"))
    change = torch.cat([(p - q).flatten() for p, q in zip(before, model.parameters())])
    assert change.norm().item() == pytest.approx(1.0, rel=1e-4) and metrics["grad_norm"] > 2


def test_a_gradient_or_loss_that_is_not_finite_changes_no_weight(monkeypatch):
    model, rows, flags = small_model(), small_rows(), Flags(loss="sft")
    optimizer = idft.new_optimizer(model)
    supervised_step(model, optimizer, rows, 1e-2, flags)
    before = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    run = idft.Run(flags, model, None, optimizer)

    def unchanged():
        after = optimizer.state_dict()["state"]
        return (all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
                and all(torch.equal(after[i][key], moments[i][key])
                        for i in moments for key in moments[i]))

    # The loss is fine, its gradient not.
    hook = next(model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    row = supervised_step(model, optimizer, rows, 1e-2, flags)
    idft.end_step(None, model, None, optimizer, run.state, row, flags)
    assert unchanged() and math.isfinite(row["loss"]) and not math.isfinite(row["grad_norm"])
    assert run.state == {"step": 1, "bad": 1}
    hook.remove()

    # The gradient is fine, the loss not.
    def infinite(model, rows, **how):
        logp, entropy = logp_entropy(torch.zeros(3, 5), torch.tensor([0, 1, 2]))
        return next(model.parameters()).sum() * 0 + logp - math.inf, entropy

    monkeypatch.setattr(idft, "batch_stats", infinite)
    row = supervised_step(model, optimizer, [([5], [5, 6, 1])], 1e-2, flags)
    idft.end_step(None, model, None, optimizer, run.state, row, flags)
    assert unchanged() and row["loss"] == math.inf and math.isfinite(row["grad_norm"])
    assert run.state == {"step": 2, "bad": 2}
    monkeypatch.undo()

    row = supervised_step(model, optimizer, rows, 1e-2, flags)                  # and on it goes
    idft.end_step(None, model, None, optimizer, run.state, row, flags)
    assert not unchanged() and run.state == {"step": 3, "bad": 0}


# ---- memory: recomputed activations, weights in main memory -------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_are_those_that_were_kept(name):
    """Values and gradients, bit for bit: no dropout wakes up, not even where a layer asks itself
    whether it is training. And the layers really run again."""
    kept = build(name)
    model = copy.deepcopy(kept)
    idft.checkpoint_activations(model)
    ids = torch.arange(3, 27).view(2, 12)
    calls, found = [], []
    for one in (kept, model):
        for layer in one.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                for part in layer.children():
                    part.register_forward_pre_hook(lambda *_: calls.append(1))
        values = torch.stack(token_stats(one, ids, torch.ones_like(ids)))
        forward = len(calls)
        (values ** 2).sum().backward()
        found.append([values, *(p.grad for p in one.parameters() if p.grad is not None)])
        assert (len(calls) > forward) == (one is model)
        calls.clear()
        assert forward and not any(module.training for module in one.modules())
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found):
        assert torch.equal(one, other)


def test_only_a_micro_batch_that_would_keep_much_is_recomputed():
    model = small_model()
    rows = [([5], [6] * 9)]                                    # 10 tokens of 32 numbers, two layers
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for above, runs in ((10 * 32 * 100 * 2, 1), (10 * 32 * 100 * 2 - 1, 2)):
        recomputing = copy.deepcopy(model)
        idft.checkpoint_activations(recomputing, above)
        calls.clear()
        step_gradients(recomputing, rows)
        assert len(calls) == runs


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_recomputes_unless_told_otherwise(keep, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(idft, "KEEP", 0)
    flags = Flags(model=tiny_checkpoint, out=str(tmp_path / "run"), device="cpu",
                  keep_activations=keep)
    model = idft.start_run(flags).model
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    batch_stats(model, small_rows(1))[0].sum().backward()
    assert len(calls) == (1 if keep else 2) and not list(tmp_path.iterdir())


def test_a_copy_of_a_model_that_recomputes_stands_alone():
    model = small_model()
    idft.checkpoint_activations(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.model.layers.parameters():
            p.zero_()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(twin.model.layers[0](twin.model.embed_tokens(ids),
                                            position_embeddings=(torch.ones(1), torch.ones(1))),
                       twin.model.embed_tokens(ids))


def train(model, optimizer, steps, first=0, **settings):
    for step in range(first, first + steps):
        rows = small_rows(16, seed=step)
        supervised_step(model, optimizer, rows, 1e-3, Flags(**settings))


def weights(optimizer):
    return optimizer.param_groups[0]["params"]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_offloaded_training_is_the_same_where_the_arithmetic_is_float32(kind):
    """Five steps of 16 micro-batches: every weight, bit for bit."""
    plain = small_model(kind, tie_word_embeddings=True)
    model = copy.deepcopy(plain)
    optimizer = idft.OffloadedAdamW(model, torch.device("cpu"), torch.float32)
    train(plain, idft.new_optimizer(plain), 5, micro_tokens=1)
    train(model, optimizer, 5, micro_tokens=1)
    for expected, weight, copied in zip(plain.parameters(), weights(optimizer), model.parameters()):
        assert torch.equal(weight, expected) and torch.equal(copied, expected)
        assert weight.data_ptr() != copied.data_ptr() and weight.grad is copied.grad is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_offloaded_gradients_of_16_micro_batches_add_up(dtype, tolerance):
    """The whole gradient, in float32, whatever the copy's precision, and not that of the first
    micro-batch alone."""
    def gradient(micro_tokens, rows=small_rows(16), count=None):
        model = small_model()
        optimizer = idft.OffloadedAdamW(model, torch.device("cpu"), dtype)
        total = sum(len(response) for _, response in small_rows(16))
        for group in micro_batches(rows, micro_tokens):
            logp, _ = batch_stats(model, [rows[i] for i in group])
            (-logp.sum() / total).backward()
        assert {p.dtype for p in model.parameters()} == {dtype}
        return torch.cat([weight.grad.flatten() for weight in weights(optimizer)])

    whole, cut = gradient(10**6), gradient(1)
    assert whole.dtype == torch.float32
    assert (whole - cut).norm() < tolerance * whole.norm()
    first = gradient(1, small_rows(16)[:1])
    assert (whole - first).norm() > 0.3 * whole.norm()


def test_a_small_step_of_an_offloaded_model_is_not_lost():
    """1e-6 is below bf16's grain at most weights; a thousand of them are not."""
    model = small_model()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = idft.OffloadedAdamW(model, torch.device("cpu"))
    rows = small_rows()
    supervised_step(model, optimizer, rows, 1e-6, Flags(loss="sft"))
    moved = torch.cat([(w != old).flatten() for w, old in zip(weights(optimizer), start)])
    seen = torch.cat([(p != old.bfloat16()).flatten() for p, old in zip(model.parameters(), start)])
    learning = torch.cat([(optimizer.state[w]["exp_avg"] != 0).flatten()
                          for w in weights(optimizer)])
    assert moved[learning].float().mean() > 0.95 and seen.float().mean() < 0.05
    for _ in range(20):
        supervised_step(model, optimizer, rows, 1e-3, Flags(loss="sft"))
    for p, weight in zip(model.parameters(), weights(optimizer)):
        assert weight.dtype == torch.float32 and torch.equal(p, weight.bfloat16())


def test_an_offloaded_run_resumes_bit_for_bit_and_saves_float32(tiny_checkpoint, tmp_path):
    def offloaded(out, resume=False):
        flags = Flags(model=tiny_checkpoint, out=str(tmp_path / out), offload=True, device="cpu",
                      resume=resume)
        return idft.start_run(flags)

    whole = offloaded("whole")
    train(whole.model, whole.optimizer, 6)
    half = offloaded("half")
    half.begin()
    train(half.model, half.optimizer, 3)
    half.state["step"] = 3
    idft.save_checkpoint(half.out, half.model, half.tokenizer, half.optimizer, half.state)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}

    saved = AutoModelForCausalLM.from_pretrained(half.out / "checkpoint")
    for p, weight in zip(saved.parameters(), weights(half.optimizer)):
        assert p.dtype == torch.float32 and torch.equal(p, weight)
    resumed = offloaded("half", resume=True)
    assert resumed.state["step"] == 3
    train(resumed.model, resumed.optimizer, 3, first=3)
    for one, other in zip(weights(whole.optimizer), weights(resumed.optimizer)):
        assert torch.equal(one, other)


# ---- runs: checkpoints, resume, refusals --------------------------------------------------------

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A JSONL file of 12 word problems with demonstrations of unequal length."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    with file.open("w") as lines:
        for i, row in enumerate(word_problems(12)):
            row["solution"] = "So. " * (i % 5) + row["solution"]
            lines.write(json.dumps(row) + "\n")
    return file


def test_killed_and_resumed_is_undisturbed_bit_for_bit(tiny_checkpoint, data, tmp_path):
    argv = ["--model", tiny_checkpoint, "--data", data, "--steps", 8, "--batch", 4,
            "--save_every", 2, "--lr", 1e-3, "--gamma_transition", 0.5]
    whole = start("idft", [*argv, "--out", tmp_path / "whole"])          # beside the other
    hits = killed_and_resumed("idft", argv, tmp_path / "killed", kills=1)
    ended(whole)
    assert hits == 1
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")
    assert [row["step"] for row in logged(tmp_path / "killed")] == [0, *range(1, 9), 8]
    trained, _ = load_model(str(tmp_path / "killed" / "checkpoint"), torch.device("cpu"))
    untrained, _ = load_model(tiny_checkpoint, torch.device("cpu"))
    pairs = zip(trained.parameters(), untrained.parameters())
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_is_whole_whenever_the_program_dies(tmp_path, monkeypatch):
    """Every rename, removal and save in turn is the last thing that happens."""
    class Died(BaseException):
        pass

    model, tokenizer = small_model(), toy.tokenizer()
    optimizer = idft.new_optimizer(model)
    steps = [(os, "rename"), (idft.shutil, "rmtree"), (torch, "save"),
             (type(model), "save_pretrained"), (type(tokenizer), "save_pretrained")]
    stages = 0
    for die_at in range(12):
        out = tmp_path / str(die_at)
        idft.save_checkpoint(out, model, tokenizer, optimizer, {"step": 1})
        calls = []

        def dying(function):
            def call(*args, **kwargs):
                if len(calls) == die_at:
                    raise Died
                calls.append(function.__name__)
                return function(*args, **kwargs)
            return call

        with monkeypatch.context() as patch:
            for module, name in steps:
                patch.setattr(module, name, dying(getattr(module, name)))
            done = False
            try:
                idft.save_checkpoint(out, model, tokenizer, optimizer, {"step": 2})
                done = True
            except Died:
                stages += 1
        found = idft.find_checkpoint(out)
        step = torch.load(found / "trainer.pt", weights_only=True)["step"]
        assert step == 2 if done else step in (1, 2)
        AutoModelForCausalLM.from_pretrained(found)
        AutoTokenizer.from_pretrained(found)
        idft.save_checkpoint(out, model, tokenizer, optimizer, {"step": 3})     # the next succeeds
        found = idft.find_checkpoint(out)
        assert torch.load(found / "trainer.pt", weights_only=True)["step"] == 3
        assert [path.name for path in out.iterdir()] == ["checkpoint"]
    assert stages >= 6


def test_the_run_directory(tiny_checkpoint, data, tmp_path, capsys, slabs):
    out = tmp_path / "run"
    argv = ["--model", tiny_checkpoint, "--data", data, "--steps", 3, "--batch", 2, "--out", out,
            "--eval_data", data, "--max_new_tokens", 2, "--rows", 3]
    run_here(idft, *argv)
    assert slabs == [3, 3]                                     # evaluations mind --rows
    assert "greedy accuracy" in capsys.readouterr().out
    rows = logged(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert rows[0]["before"].keys() == rows[-1]["after"].keys() == {"train"}
    files = {path.name for path in (out / "checkpoint").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "trainer.pt"} <= files

    def contents():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = contents()
    no = tmp_path / "no"
    refusals = {(): f"--out {out} already holds a run: add --resume or name another --out",
                ("--resume", "--lr", "1e-3"): "this run has --lr 6e-05, repeat its flags",
                ("--resume", "--loss", "sft"): "this run has --loss idft, repeat its flags",
                ("--resume", "--out", no): f"--resume: there is no run in {no}"}
    for more, sentence in refusals.items():
        assert sentence in refusal(capsys, idft, *argv, *more)
    assert before == contents() and not no.exists()

    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "nll": 1')                     # half a line, as a kill leaves it
    run_here(idft, *argv, "--resume")                          # a finished run ends again, the same
    assert logged(out) == rows


def test_resume_before_the_first_checkpoint_starts_over(tiny_checkpoint, data, tmp_path):
    argv = ["--model", tiny_checkpoint, "--data", data, "--epochs", 0.5, "--batch", 2]
    run_here(idft, *argv, "--out", tmp_path / "whole")
    rows = logged(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]    # half of 12, 2 a step
    out = tmp_path / "run"
    with mock.patch.object(idft, "end_step", side_effect=KeyboardInterrupt):
        with pytest.raises(SystemExit):
            run_here(idft, *argv, "--out", out)
    (out / "metrics.jsonl").write_text('{"step": 0, "before": {}}\n{"step": 1, "loss": 3.0}\n{"st')
    run_here(idft, *argv, "--out", out, "--resume")
    assert untimed(out) == untimed(tmp_path / "whole")


def test_resume_after_a_kill_in_the_first_evaluation(tiny_checkpoint, data, tmp_path, monkeypatch, capsys):
    argv = ["--model", tiny_checkpoint, "--data", data, "--steps", 1, "--batch", 2, "--out", tmp_path / "run"]
    with monkeypatch.context() as killed:
        killed.setattr(idft, "greedy_accuracy", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_here(idft, *argv)
    run_here(idft, *argv, "--resume")
    assert [row["step"] for row in logged(tmp_path / "run")] == [0, 1, 1]

    # A trainer.pt that is damaged, or whole and of something else.
    file = tmp_path / "run/checkpoint/trainer.pt"
    state = torch.load(file, weights_only=True)
    others = [[1], {"a": 1}, {**state, "step": "x"}, {**state, "optimizer": {}},
              {**state, "checksum": {}}]
    for name in set(state) - {"before", "after"}:
        others.append({key: value for key, value in state.items() if key != name})
    for other in others:
        torch.save(other, file)
        line = refusal(capsys, idft, *argv, "--resume")
        assert "trainer.pt is damaged" in line or "is of another run" in line
    file.write_bytes(b"PK half")
    assert "trainer.pt is damaged" in refusal(capsys, idft, *argv, "--resume")


def test_resume_reads_what_the_run_began_with(tiny_checkpoint, data, tmp_path, capsys):
    """Other data at the same path are refused; another machine is not, and that is said."""
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(data.read_text())
    argv = ["--model", tiny_checkpoint, "--data", tmp_path / "train.jsonl", "--steps", 2,
            "--batch", 2, "--eval_data", tmp_path / "test.jsonl", "--max_new_tokens", 2,
            "--save_every", 1, "--out", tmp_path / "run"]
    with mock.patch.object(idft, "draw_batch", side_effect=[idft.draw_batch([([5], [6])], 2, 0, 0),
                                                            KeyboardInterrupt]):
        with pytest.raises(SystemExit):
            run_here(idft, *argv)
    record = json.loads((tmp_path / "run/flags.json").read_text())
    assert record["flags"]["lr"] == 6e-5 and record["threads"] == 1
    assert set(record["checksum"]) == {"data", "eval_data", "model"}
    capsys.readouterr()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(data.read_text().replace("So. ", "Now. "))
        assert "is not what this run began with" in refusal(capsys, idft, *argv, "--resume")
        (tmp_path / name).write_text(data.read_text())
    (tmp_path / "run/checkpoint.old").mkdir()                  # left by a kill while tidying
    run_here(idft, *argv, "--resume", "--rows", 3, "--micro_tokens", 40)
    shown = capsys.readouterr().out
    assert "resumed with other rows, micro_tokens: the last bits may differ" in shown
    assert [row["step"] for row in logged(tmp_path / "run")] == [0, 1, 2, 2]
    assert not list((tmp_path / "run").glob("checkpoint.*"))


def test_a_second_run_is_refused_while_the_first_evaluates(tiny_checkpoint, data, tmp_path):
    argv = ["--model", tiny_checkpoint, "--data", data, "--steps", 1, "--batch", 2,
            "--eval_data", data, "--max_new_tokens", 2, "--out", tmp_path / "run"]
    real, said = idft.greedy_accuracy, []

    def slow(*args, **more):
        if not said:
            others = [start("idft", [*argv, *resume]) for resume in ([], ["--resume"])]
            for process in others:
                said.append(process.communicate()[1])
        return real(*args, **more)

    with mock.patch.object(idft, "greedy_accuracy", slow):
        run_here(idft, *argv)
    assert "already holds a run" in said[0] and "another run is at work" in said[1]
    assert [row["step"] for row in logged(tmp_path / "run")] == [0, 1, 1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_is_one_sentence(tiny_checkpoint, data, tmp_path, capsys, error):
    argv = ["--model", tiny_checkpoint, "--data", data, "--steps", 1, "--batch", 2, "--out", tmp_path / "run"]
    with mock.patch.object(idft.torch, "save", side_effect=error):
        line = refusal(capsys, idft, *argv)
    assert "checkpoint.new cannot be written" in line and "make room or name another --out" in line


def test_ten_in_a_row_stop_the_run(tiny_checkpoint, data, tmp_path, monkeypatch, capsys):
    real = idft.batch_stats
    nan = lambda *args, **how: [x * math.nan for x in real(*args, **how)]
    monkeypatch.setattr(idft, "batch_stats", nan)
    line = refusal(capsys, idft, "--model", tiny_checkpoint, "--data", data, "--steps", 30,
                   "--batch", 2, "--out", tmp_path / "run")
    assert "10 updates in a row had a loss or gradient that is not finite" in line
    rows = logged(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(10)) and rows[-1]["loss"] is None


@pytest.mark.parametrize("argv, sentence", [
    (["--lr", "-1"], "--lr -1.0 is out of range"),
    (["--batch", "0"], "--batch 0 is out of range"),
    (["--lr", "nan"], "--lr nan is out of range"),
    (["--gamma_min", "3"], "--gamma_min 3.0 is above --gamma_max 2.0"),
    (["--loss", "grpo"], "invalid choice: 'grpo'"),
    (["--los", "sft"], "unrecognized arguments: --los"),
    (["--device", "tpu"], "--device tpu: PyTorch finds none here"),
    (["--data", "{tmp}/no.jsonl"], "no.jsonl cannot be read"),
    (["--data", "{tmp}/bad.jsonl"], "bad.jsonl line 2: solution"),
    (["--eval_data", "{tmp}/no.jsonl"], "no.jsonl cannot be read"),
    (["--model", "{tmp}/no"], "no is no directory"),
    (["--max_tokens", "20"], "a prompt has"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(argv, sentence, tiny_checkpoint, data,
                                                      tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"problem": "1 + 1?", "solution": "2", "answer": "2"}\n'
                                        '{"problem": "x", "answer": "1"}\n')
    argv = [text.format(tmp=tmp_path) for text in argv]
    before = set(tmp_path.rglob("*"))
    assert sentence in refusal(capsys, idft, "--model", tiny_checkpoint, "--data", data,
                               "--out", tmp_path / "run", *argv)
    assert set(tmp_path.rglob("*")) == before


def test_demonstration_rows(tiny_checkpoint, capsys):
    model, tokenizer = load_model(tiny_checkpoint, torch.device("cpu"))
    problems = [{"problem": "What is 1 + 1?", "solution": "It is \\boxed{2}."},
                {"problem": "What is 1 + 2?", "solution": ["3", "It is 3. " * 100]}]
    rows = idft.demonstration_rows(model, tokenizer, problems, 8192)
    assert len(rows) == 3 and rows[1][0] == rows[2][0] != rows[0][0]    # every demonstration
    assert tokenizer.decode(rows[0][0]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(rows[0][1]) == "It is \\boxed{2}.<|im_end|>"
    assert capsys.readouterr().out == ""
    limit = len(rows[2][0]) + 20
    cut = idft.demonstration_rows(model, tokenizer, problems, limit)
    assert cut[:2] == rows[:2] and cut[2] == (rows[2][0], rows[2][1][:20])
    assert f"1 of 3 demonstrations are longer than {limit} tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="a prompt has"):
        idft.demonstration_rows(model, tokenizer, problems, 5)


def test_defaults_are_the_papers_for_a_model_and_small_for_the_toy(capsys):
    real = parse_flags(Flags, ["--data", "x.jsonl", "--gamma_max", "148"], idft.TOY)
    assert (real.loss, real.lr, real.epochs, real.batch) == ("idft", 6e-5, 3.0, 128)
    assert (real.beta, real.gamma_min, real.gamma_max) == (1.0, 0.1, 148.0)
    assert real.warmup == 0.1
    small = parse_flags(Flags, ["--batch", "7"], idft.TOY)
    assert (small.lr, small.batch, small.eval_data) == (idft.TOY["lr"], 7, "toy")
    with pytest.raises(SystemExit):                            # --help knows both
        parse_flags(Flags, ["--help"], idft.TOY)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"; toy: {idft.TOY['lr']} (default: 6e-05)" in shown
    optimizer = idft.new_optimizer(small_model())
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["weight_decay"] == 0.01
