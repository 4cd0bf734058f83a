"""Proofs of idft.py: the loss against the textbook, one step for every micro-batching, runs that survive SIGKILL."""

import copy
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import word_problems
from kill import assert_equal_runs, killed_and_resumed, logged, undisturbed
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM)

import idft
import toy
from eval import InputError, load_model, parse_flags
from idft import (compute_loss, draw_batch, learning_rate, micro_batches, strength_at, supervised_step, token_gamma,
                  token_weight)

V = 50


def small_model(seed=0, kind="qwen2", **config):
    """Random, two layers, wide enough weights that no two tokens look alike."""
    Config, Model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    torch.manual_seed(seed)
    return Model(Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, initializer_range=0.3, **config)).eval()


def small_rows(n=7, seed=0):
    """(prompt ids, response ids) of very unequal lengths; token 1 ends a response and occurs nowhere else."""
    rng = np.random.default_rng(seed)
    draw = lambda longest: rng.integers(2, V, rng.integers(1, longest)).tolist()
    return [(draw(12), draw(30) + [1]) for _ in range(n)]


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step_gradients(model, rows, **how):
    """The gradients of a supervised step: plain descent at lr 1 moves the weights by exactly them."""
    moved = copy.deepcopy(model)
    metrics = supervised_step(moved, torch.optim.SGD(moved.parameters(), lr=1.0), rows, 1.0, clip=1e9, **how)
    return torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), moved.parameters())]).detach(), metrics


def as_batch(rows):
    """The rows padded, and labels as a Trainer has them."""
    ids, mask, response = idft.pad(rows, torch.device("cpu"))
    return ids, mask, torch.where(response, ids, -100)


# ---- the loss

def random_logits(seed=0, scale=3.0, shape=(4, 6, 9)):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(shape[-1], shape[:-1], generator=g)
    labels[0, :3] = labels[1, 4:] = labels[3, 2] = -100
    return scale * torch.randn(shape, generator=g), labels


def loss_and_gradient(logits, labels, count=None, **how):
    logits = logits.clone().requires_grad_()
    loss = compute_loss(SimpleNamespace(logits=logits), labels, count, **how)
    loss.backward()
    return loss.detach(), logits.grad


def test_gamma_0_is_cross_entropy_in_value_and_gradient():
    logits, labels = random_logits()
    reference = logits.clone().requires_grad_()
    plain = torch.nn.functional.cross_entropy(reference[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    plain.backward()
    for how in ({"loss": "sft"}, {"loss": "idft", "gamma_min": 0.0, "gamma_max": 0.0}):
        loss, gradient = loss_and_gradient(logits, labels, **how)
        torch.testing.assert_close(loss, plain.detach())
        torch.testing.assert_close(gradient, reference.grad)


@pytest.mark.parametrize("how", [{"gamma_min": 1.0, "gamma_max": 1.0}, {"strength": 0.0}, {"beta": 1e9}])
def test_gamma_1_is_dft(how):
    logits, labels = random_logits()
    dft = loss_and_gradient(logits, labels, loss="dft")
    for ours, theirs in zip(loss_and_gradient(logits, labels, loss="idft", **how), dft):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(loss_and_gradient(logits, labels, loss="idft")[1], dft[1])


@pytest.mark.parametrize("how", [{"loss": "sft"}, {"loss": "dft"}, {"loss": "idft"}, {"loss": "idft", "strength": 0.3},
                                 {"loss": "idft", "beta": 0.5, "gamma_min": 0.4, "gamma_max": 1.5}])
@pytest.mark.parametrize("count", [None, 37])
def test_value_and_gradient_against_a_loop_in_float64(how, count):
    logits, labels = random_logits()
    beta, low, high = how.get("beta", 1.0), how.get("gamma_min", 0.1), how.get("gamma_max", 2.0)
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
            targets, total = targets + 1, total - weight * math.log(p[y])
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
    """Also below p = 1/e, where the gradient of an undetached p log p points the other way."""
    for other in (-3.0, 0.0, 2.0, 5.0):
        logits = torch.tensor([[[0.0, other, other], [0.0, 0.0, 0.0]]])
        labels = torch.tensor([[-100, 0]])
        gradient = loss_and_gradient(logits, labels, loss=loss)[1][0, 0]
        assert gradient[0] < 0 and (gradient[1:] > 0).all()
    logp = torch.tensor(-3.0, requires_grad=True)               # the test above can fail: this is what it would see
    (-logp.exp() * logp).backward()
    assert logp.grad > 0


def test_extreme_logits_stay_finite():
    logits, labels = random_logits(scale=1e4)
    for loss in ("sft", "dft", "idft"):
        value, gradient = loss_and_gradient(logits, labels, loss=loss)
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
    own = torch.tensor([-1.3])
    assert token_gamma(own, -own).item() == pytest.approx(1)    # phi = 0: a token as likely as the model's own
    assert token_gamma(own, -own - 9) == 2 and token_gamma(own, -own + 9) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="sft, dft or idft"):
        token_weight(logp, entropy, "grpo")


def test_no_target_at_all_is_a_loss_of_0():
    loss, gradient = loss_and_gradient(random_logits()[0], torch.full((4, 6), -100))
    assert loss == 0 and (gradient == 0).all()


# ---- schedules and batches

def test_strength_schedule():
    assert [strength_at(p, 0, 0) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [strength_at(p, 0.2, 0) for p in (0, 0.19, 0.2, 1)] == [0, 0, 1, 1]
    assert [strength_at(p, 0.2, 0.4) for p in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_learning_rate():
    lr = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert lr[:10] == pytest.approx([0.2 * i for i in range(1, 11)])                        # up in a line
    assert lr[10] == 2.0 and lr[55] == pytest.approx(1.0) and 0 < lr[99] < 0.002            # down along half a cosine
    assert all(a >= b for a, b in zip(lr[9:], lr[10:]))
    assert learning_rate(0, 1, 2.0) == 2.0 and learning_rate(0, 3, 2.0, warmup=0) == 2.0
    assert learning_rate(99, 100, 2.0, warmup=1.0) == 2.0


@pytest.mark.parametrize("count, batch", [(10, 5), (7, 3), (4, 9), (5, 5)])
def test_draw_batch_shows_every_example_once_an_epoch(count, batch):
    stream = [i for step in range(6 * count) for i in draw_batch(count, batch, step, 0)]
    epochs = [stream[i:i + count] for i in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs[:9]}) > 5                                  # in fresh order
    assert draw_batch(count, batch, 3, 0) == draw_batch(count, batch, 3, 0)
    assert [draw_batch(50, 9, 0, seed) for seed in (0, 1)][0] != draw_batch(50, 9, 0, 1)


@pytest.mark.parametrize("budget", [1, 10, 64, 10**9])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(1, 40, 50).tolist()
    groups = micro_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(50))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget for group in groups)
    for full, following in zip(groups, groups[1:]):                            # no group closes while the next row fits
        assert (len(full) + 1) * lengths[following[0]] > budget
    assert len(micro_batches(lengths, 10**9)) == 1 and micro_batches([], 5) == []


def test_pad():
    ids, mask, response = idft.pad([([5, 6], [7]), ([8], [9, 10, 1])], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 1]]
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert response.tolist() == [[False, False, True, False], [False, True, True, True]]


# ---- one optimizer step

@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("loss", ["sft", "dft", "idft"])
def test_a_step_is_the_same_for_every_micro_batching(kind, loss):
    model, rows = small_model(kind=kind), small_rows()
    whole, metrics = step_gradients(model, rows, loss=loss)
    assert whole.norm() > 1e-2
    for micro_tokens in (1, 60, 150):
        cut, cut_metrics = step_gradients(model, rows[::-1], loss=loss, micro_tokens=micro_tokens)
        assert (whole - cut).norm() < 1e-5 * whole.norm()
        for key in ("nll", "loss", "phi", "gamma", "weight", "grad_norm", "tokens"):
            assert cut_metrics[key] == pytest.approx(metrics[key], rel=1e-4), key

    # A mean of micro-batch means is another step, so the test above can fail.
    parts = [step_gradients(model, [row], loss=loss)[0] for row in rows]
    assert (torch.stack(parts).mean(0) - whole).norm() > 1e-2 * whole.norm()


@pytest.mark.parametrize("loss", ["sft", "dft", "idft"])
def test_compute_loss_and_the_step_have_one_gradient(loss):
    model, rows = small_model(), small_rows()
    ids, mask, labels = as_batch(rows)
    count = sum(len(answer) for _, answer in rows)
    ours, metrics = step_gradients(model, rows, loss=loss)
    for given in (None, count, torch.tensor(count)):
        model.zero_grad()
        value = compute_loss(model(input_ids=ids, attention_mask=mask.long()), labels, given, loss=loss)
        value.backward()
        torch.testing.assert_close(gradients(model), ours, rtol=1e-4, atol=1e-6)
        assert value.item() == pytest.approx(metrics["loss"], rel=1e-5)
    accumulated = torch.zeros_like(ours)                        # as a Trainer does it: parts, one count for all
    for row in rows:
        ids, mask, labels = as_batch([row])
        model.zero_grad()
        compute_loss(model(input_ids=ids), labels, count, loss=loss).backward()
        accumulated += gradients(model)
    torch.testing.assert_close(accumulated, ours, rtol=1e-4, atol=1e-6)


def test_trained_are_the_response_from_its_first_token_to_eos_and_nothing_else():
    model, rows = small_model(), small_rows()
    logp = []
    for prompt, answer in rows:
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        logp += [log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    _, metrics = step_gradients(model, rows, loss="sft")
    assert metrics["tokens"] == len(logp) == sum(len(answer) for _, answer in rows)
    assert metrics["nll"] == metrics["loss"] == pytest.approx(-np.mean(logp), rel=1e-5)
    assert metrics["weight"] == 1

    model.zero_grad()                                           # a response of EOS alone is a target like any other
    (-model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1)[1]).backward()
    torch.testing.assert_close(step_gradients(model, [([5, 6], [1])], loss="sft")[0], gradients(model))


def test_metrics_of_a_step():
    model, rows = small_model(), small_rows()
    metrics = step_gradients(model, rows, loss="idft")[1]
    assert metrics["grad_norm"] == pytest.approx(step_gradients(model, rows, loss="idft")[0].norm().item(), rel=1e-4)
    low, middle, high = metrics["gamma_q10_q50_q90"]
    assert 0.1 <= low <= middle <= high <= 2 and low <= metrics["gamma"] <= 2
    assert 0 < metrics["weight"] < 1 and metrics["loss"] < metrics["nll"]


def test_gradients_are_clipped_to_the_norm():
    model = small_model()
    moved = copy.deepcopy(model)
    supervised_step(moved, torch.optim.SGD(moved.parameters(), lr=1.0), small_rows(), 1.0, loss="sft", clip=0.01)
    change = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), moved.parameters())])
    assert change.norm().item() == pytest.approx(0.01, rel=1e-2)


# ---- what is not finite

def test_a_gradient_or_loss_that_is_not_finite_changes_no_weight(monkeypatch):
    model, rows = small_model(), small_rows()
    optimizer = idft.new_optimizer(model)
    supervised_step(model, optimizer, rows, 1e-2)
    before, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])

    def unchanged():
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        after = optimizer.state_dict()["state"]
        return same and all(torch.equal(after[i][key], moments[i][key]) for i in moments for key in moments[i])

    handle = next(model.parameters()).register_hook(lambda gradient: gradient * math.nan)     # the loss is fine, its gradient not
    state = {"bad": 0}
    row = supervised_step(model, optimizer, rows, 1e-2)
    idft.count_bad(state, row)
    assert unchanged() and math.isfinite(row["loss"]) and not math.isfinite(row["grad_norm"])
    assert state == {"bad": 1, "dropped": 1} and row["dropped"] == 1
    handle.remove()

    real = idft.token_stats                                                         # the gradient is fine, the loss not

    def infinite(model, ids, mask, want):
        logp, entropy = real(model, ids, mask, want=want)
        return torch.where(want[:, 1:], logp * 0 - math.inf, logp), entropy

    monkeypatch.setattr(idft, "token_stats", infinite)
    row = supervised_step(model, optimizer, rows, 1e-2, loss="sft")
    idft.count_bad(state, row)
    assert unchanged() and row["loss"] == math.inf and math.isfinite(row["grad_norm"])
    assert state == {"bad": 2, "dropped": 2}
    monkeypatch.undo()

    row = supervised_step(model, optimizer, rows, 1e-2)                                       # and on it goes
    idft.count_bad(state, row)
    assert not unchanged() and state == {"bad": 0, "dropped": 2} and row["dropped"] == 2


def test_ten_in_a_row_stop_the_run(tiny_checkpoint, data, tmp_path, monkeypatch, capsys):
    real = idft.token_stats
    monkeypatch.setattr(idft, "token_stats", lambda *a, **k: [x * math.nan for x in real(*a, **k)])
    with pytest.raises(SystemExit) as stop:
        run_here(["--model", tiny_checkpoint, "--data", data, "--out", tmp_path / "run", "--steps", 30, "--batch", 2])
    assert stop.value.code == 2
    assert last_line(capsys).startswith("error: 10 updates in a row had a loss or gradient that is not finite")
    rows = logged(tmp_path / "run")
    assert [row["dropped"] for row in rows[1:]] == list(range(1, 10)) and rows[-1]["loss"] is None


# ---- activation checkpointing

@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_activation_checkpointing_is_active_and_changes_no_gradient(kind):
    model, rows = small_model(kind=kind, attention_dropout=0.5), small_rows()
    calls = []
    layer = model.model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run():
        calls.clear()
        kept = {}
        handles = [p.register_post_accumulate_grad_hook(lambda p, i=i: kept.update({i: p.grad.clone()}))
                   for i, p in enumerate(model.parameters())]
        supervised_step(model, optimizer, rows, 0.0)
        for handle in handles:
            handle.remove()
        return len(calls), torch.cat([kept[i].flatten() for i in sorted(kept)])

    once, plain = run()
    idft.checkpoint_activations(model)
    twice, recomputed = run()
    assert (once, twice) == (1, 2)                                                         # the layer really runs again
    assert (plain - recomputed).norm() <= 1e-6 * plain.norm()                                 # and no dropout woke up
    assert not layer.self_attn.training and not model.training


# ---- runs: checkpoints, resume, refusals

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A JSONL file of 12 word problems with demonstrations of unequal length."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [row | {"solution": "So. " * (i % 5) + row["solution"]} for i, row in enumerate(word_problems(12))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run_here(argv):
    idft.run(idft.main, idft.Flags, [str(a) for a in argv], toy_defaults=idft.TOY)


def last_line(capsys):
    """What a user reads last on standard error: the bars before it wiped themselves out."""
    return capsys.readouterr().err.rstrip().splitlines()[-1].split("\r")[-1]


def test_killed_and_resumed_is_undisturbed_bit_for_bit(tiny_checkpoint, data, tmp_path):
    argv = ["--model", tiny_checkpoint, "--data", data, "--steps", 16, "--batch", 5, "--save_every", 2, "--lr", 1e-3]
    undisturbed("idft", argv, tmp_path / "whole")
    hits = killed_and_resumed("idft", argv, tmp_path / "killed", kills=4)
    assert hits >= 2
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole", timings={"tokens_per_s"})
    assert [row["step"] for row in logged(tmp_path / "killed")] == [0, *range(1, 17), 16]
    trained, tokenizer = load_model(str(tmp_path / "killed" / "checkpoint"), torch.device("cpu"))
    start, _ = load_model(tiny_checkpoint, torch.device("cpu"))
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))


def test_a_checkpoint_is_whole_whenever_the_program_dies(tmp_path, monkeypatch):
    """Every rename and removal in turn is the last thing that happens."""
    class Died(BaseException):
        pass

    model, tokenizer = small_model(), toy.tokenizer()
    optimizer = idft.new_optimizer(model)
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
            for module, name in ((os, "rename"), (idft.shutil, "rmtree"), (torch, "save"),
                                 (type(model), "save_pretrained"), (type(tokenizer), "save_pretrained")):
                patch.setattr(module, name, dying(getattr(module, name)))
            try:
                idft.save_checkpoint(out, model, tokenizer, optimizer, {"step": 2})
                done = True
            except Died:
                done, stages = False, stages + 1
        found = idft.find_checkpoint(out)
        step = torch.load(found / "trainer.pt", weights_only=True)["step"]
        assert step == 2 if done else step in (1, 2)
        AutoModelForCausalLM.from_pretrained(found), AutoTokenizer.from_pretrained(found)
        idft.save_checkpoint(out, model, tokenizer, optimizer, {"step": 3})                 # and the next save succeeds
        assert torch.load(idft.find_checkpoint(out) / "trainer.pt", weights_only=True)["step"] == 3
        assert [path.name for path in out.iterdir()] == ["checkpoint"]
    assert stages >= 6


def test_the_run_directory(tiny_checkpoint, data, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--model", tiny_checkpoint, "--data", data, "--steps", 3, "--batch", 2, "--out", out, "--eval_data", data,
            "--max_new_tokens", 2]
    run_here(argv)
    assert "greedy accuracy" in capsys.readouterr().out
    rows = logged(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3] and "accuracy" in rows[0] and "accuracy" in rows[-1]
    files = {path.name for path in (out / "checkpoint").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "trainer.pt"} <= files
    contents = lambda: {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    before = contents()

    refusals = {(): f"--out {out} already holds a run: add --resume or name another --out",
                ("--resume", "--lr", "1e-3"): "--resume: this run was started with --lr 6e-05, repeat its flags",
                ("--resume", "--loss", "sft"): "--resume: this run was started with --loss idft, repeat its flags",
                ("--resume", "--out", str(tmp_path / "no")): f"--resume: there is no run in {tmp_path / 'no'}"}
    for more, sentence in refusals.items():
        with pytest.raises(SystemExit) as stop:
            run_here([*argv, *more])
        assert stop.value.code == 2 and last_line(capsys) == f"error: {sentence}"
    assert before == contents() and not (tmp_path / "no").exists()

    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "nll": 1')                                       # half a line, as a full disk leaves it
    run_here([*argv, "--resume"])                                                  # a finished run ends again, the same
    again = logged(out)
    assert again == rows


def test_resume_before_the_first_checkpoint_starts_over(tiny_checkpoint, data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 0, "accuracy": {}}\n{"step": 1, "loss": 3.0}\n{"ste')
    run_here(["--model", tiny_checkpoint, "--data", data, "--steps", 2, "--batch", 2, "--out", out, "--resume"])
    assert [row["step"] for row in logged(out)] == [0, 1, 2, 2]


def test_steps_come_from_epochs(tiny_checkpoint, data, tmp_path):
    run_here(["--model", tiny_checkpoint, "--data", data, "--epochs", 0.5, "--batch", 2, "--out", tmp_path / "run"])
    assert [row["step"] for row in logged(tmp_path / "run")] == [0, 1, 2, 3, 3]              # 12 / 2 / 2


@pytest.mark.parametrize("argv, sentence", [
    (["--lr", "-1"], "--lr -1.0 is out of range"),
    (["--batch", "0"], "--batch 0 is out of range"),
    (["--lr", "nan"], "--lr nan is out of range"),
    (["--loss", "grpo"], "invalid choice: 'grpo'"),
    (["--los", "sft"], "unknown flag --los"),
    (["--device", "tpu"], "--device tpu is unknown"),
    (["--data", "{tmp}/no.jsonl"], "no.jsonl: No such file"),
    (["--data", "{tmp}/bad.jsonl"], "bad.jsonl line 2: solution"),
    (["--data", "{data}", "--eval_data", "{tmp}/no.jsonl"], "no.jsonl: No such file"),
    (["--data", "{data}", "--model", "{tmp}/no"], "no is no directory"),
    (["--data", "{data}", "--model", "{model}", "--max_tokens", "20"], "a prompt has"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(argv, sentence, tiny_checkpoint, data, tmp_path, capsys):
    bad = [{"problem": "1 + 1?", "solution": "2", "answer": "2"}, {"problem": "x", "answer": "1"}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    argv = [a.format(tmp=tmp_path, data=data, model=tiny_checkpoint) for a in argv]
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_here([*argv, "--out", tmp_path / "run"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and sentence in lines[0], lines
    assert set(tmp_path.rglob("*")) == before


def test_training_rows(tiny_checkpoint, capsys):
    model, tokenizer = load_model(tiny_checkpoint, torch.device("cpu"))
    problems = [{"problem": "What is 1 + 1?", "solution": "It is \\boxed{2}.", "answer": "2"},
                {"problem": "What is 1 + 2?", "solution": ["3", "It is 3. " * 100], "answer": "3"}]
    rows = idft.training_rows(model, tokenizer, problems, 8192)
    assert len(rows) == 3 and rows[1][0] == rows[2][0] != rows[0][0]                          # every demonstration
    assert tokenizer.decode(rows[0][0]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(rows[0][1]) == "It is \\boxed{2}.<|im_end|>" and capsys.readouterr().out == ""
    limit = len(rows[2][0]) + 9
    cut = idft.training_rows(model, tokenizer, problems, limit)
    assert [len(p) + len(r) for p, r in cut][2] == limit and cut[2][1] == rows[2][1][:9]
    assert "1 of 3 demonstrations are longer" in capsys.readouterr().out or limit < len(rows[0][0]) + len(rows[0][1])
    with pytest.raises(InputError, match="a prompt has"):
        idft.training_rows(model, tokenizer, problems, 5)


# ---- sweeps and the comparison

def test_a_sweep_goes_on_where_it_was(tmp_path):
    file, seen = tmp_path / "new" / "sweep.jsonl", []

    def one(a, b):
        seen.append((a, b))
        if (a, b) == stop_at:
            raise KeyboardInterrupt
        return {"value": 10 * a + b}

    jobs, stop_at = [{"a": a, "b": b} for a in (1, 2) for b in (3, 4)], (2, 3)
    with pytest.raises(KeyboardInterrupt):
        idft.sweep(file, jobs, one)
    file.write_text(file.read_text() + '{"a": 2, "b"')                                        # killed while writing
    stop_at = None
    results = idft.sweep(file, jobs, one)
    assert [row["value"] for row in results] == [13, 14, 23, 24] and seen == [(1, 3), (1, 4), (2, 3), (2, 3), (2, 4)]
    assert idft.sweep(file, jobs, one) == results and len(seen) == 5
    assert [json.loads(line) for line in file.read_text().splitlines()] == results


def test_compare_tunes_every_loss_by_itself(tmp_path, monkeypatch, capsys):
    """Training is real, the scores are made up: each loss likes another learning rate."""
    best = {"sft": 3e-5, "dft": 1e-4, "idft": 1e-3}
    trained = []

    def train(model, tokenizer, rows, job, optimizer, state, out=None):
        trained.append(job)

    def assess(model, tokenizer, benchmarks, max_new_tokens):
        job = trained[-1]
        score = 1.0 if job.lr == best[job.loss] else 0.25
        return {name: score for name in benchmarks}

    monkeypatch.setattr(idft, "load_model", lambda *a: (small_model(), toy.tokenizer()))
    monkeypatch.setattr(idft, "train", train)
    monkeypatch.setattr(idft, "assess", assess)
    run_here(["--compare", "--out", tmp_path, "--problems", 4])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 3
    for line in lines[1:]:
        loss, lr = line.split()[:2]
        assert float(lr) == best[loss] and line.count("1.00 ± 0.00") == 3
    tuning = [job for job in trained if job.seed == idft.TUNING_SEED]
    assert len(tuning) == 2 * 3 * len(idft.GRID) and len(trained) - len(tuning) == 2 * 3 * len(idft.SEEDS)
    assert {job.wrong for job in trained} == {0.0, 0.3}


def test_mean_std():
    assert idft.mean_std([0.5, 0.7]) == "0.60 ± 0.14" and idft.mean_std([0.5]) == "0.50 ± 0.00"


def test_defaults_are_the_papers_for_a_model_and_small_for_the_toy():
    real = parse_flags(idft.Flags, ["--data", "x.jsonl"], idft.TOY)
    assert (real.loss, real.lr, real.epochs, real.batch, real.beta) == ("idft", 6e-5, 3.0, 128, 1.0)
    assert (real.gamma_min, real.gamma_max, real.warmup, real.weight_decay, real.clip) == (0.1, 2.0, 0.1, 0.01, 1.0)
    small = parse_flags(idft.Flags, ["--batch", "7"], idft.TOY)
    assert (small.lr, small.steps, small.batch, small.eval_data) == (3e-4, 100, 7, "toy")
    optimizer = idft.new_optimizer(small_model())
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["weight_decay"] == 0.01
