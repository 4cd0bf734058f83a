"""Proofs of prefix_rft.py: functions against naive loops, the whole update against a textbook in float64, whole runs."""

import copy
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GSM8K, ROOT, word_problems
from kill import assert_equal_runs, killed_and_resumed, logged, undisturbed
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM)

import idft
import prefix_rft
import toy
from eval import InputError, load_problems, new_sampler, parse_flags, stop_ids
from prefix_rft import (Flags, advantages, entropy_clip, policy_loss, prefix_length, prefix_term, prefix_window, prepare,
                        rollout, update)

TIMINGS = {"rollout_s", "update_s", "rollout_tokens_per_s", "update_tokens_per_s"}
CPU = torch.device("cpu")


# ---- which prefix

@pytest.mark.parametrize("schedule, start, middle, end", [
    ("cosine", (0.95, 0.95), (0.5, 0.95), (0.05, 0.95)), ("linear", (0.95, 0.95), (0.5, 0.95), (0.05, 0.95)),
    ("uniform", (0.05, 0.95), (0.05, 0.95), (0.05, 0.95)), ("full", (1, 1), (1, 1), (1, 1)),
    ("none", (0, 0), (0, 0), (0, 0))])
def test_window(schedule, start, middle, end):
    for step, window in ((0, start), (50, middle), (100, end), (1000, end)):
        assert prefix_window(step, 100, schedule=schedule) == pytest.approx(window)
    lows = [prefix_window(step, 100, schedule=schedule)[0] for step in range(101)]
    assert lows == sorted(lows, reverse=True)


def test_window_between_and_settings():
    assert prefix_window(25, 100)[0] == pytest.approx(0.05 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)     # above the line
    assert prefix_window(75, 100)[0] == pytest.approx(0.05 + 0.9 * (1 - math.cos(math.pi / 4)) / 2)     # below it
    assert prefix_window(25, 100, schedule="linear")[0] == pytest.approx(0.725)
    assert prefix_window(0, 10, high=0.8, low=0.6, low_end=0.2) == pytest.approx((0.6, 0.8))
    assert prefix_window(10, 10, high=0.8, low=0.6, low_end=0.2) == pytest.approx((0.2, 0.8))
    with pytest.raises(ValueError, match="schedule must be"):
        prefix_window(0, 10, schedule="step")


@pytest.mark.parametrize("make", [np.random.default_rng, random.Random])
def test_prefix_length(make):
    rng = make(0)
    for length in (0, 1):
        assert {prefix_length(length, 0.05, 0.95, rng) for _ in range(99)} == {0}
    assert prefix_length(1000, 1.0, 1.0, rng) == 999 and prefix_length(1000, 0.0, 0.0, rng) == 0
    assert prefix_length(10, 0.95, 0.95, rng) == 9 and prefix_length(100, 0.95, 0.95, rng) == 95
    lengths = [prefix_length(1000, 0.2, 0.6, rng) for _ in range(4000)]
    assert 200 <= min(lengths) < 210 and 590 < max(lengths) < 600
    counts = np.histogram(lengths, 8, (200, 600))[0]
    assert abs(counts - 500).max() < 5 * 500 ** 0.5                     # uniform: 8 bins of 500 +- sqrt(500)


# ---- what it is worth

def group(G=40, N=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(G, N, generator=g) < 0.4).float(), torch.rand(G, N, generator=g) < 0.3


@pytest.mark.parametrize("hybrids", ["some", "none", "last", "all"])
def test_advantages_against_loops(hybrids):
    rewards, hybrid = group()
    if hybrids != "some":
        hybrid = torch.zeros_like(hybrid)
        hybrid[:, {"none": slice(0), "last": slice(-1, None), "all": slice(None)}[hybrids]] = True
    paper, code = advantages(rewards, hybrid, "paper"), advantages(rewards, hybrid, "code")
    for i, (row, flags) in enumerate(zip(rewards.tolist(), hybrid.tolist())):
        plain = [r for r, h in zip(row, flags) if not h]
        baseline = sum(plain) / len(plain) if plain else 0.0
        for j, (reward, is_hybrid) in enumerate(zip(row, flags)):
            assert paper[0][i, j] == paper[1][i, j] == pytest.approx(reward - sum(row) / len(row))
            assert code[0][i, j] == pytest.approx(reward if is_hybrid else reward - baseline)
            if is_hybrid:
                assert code[1][i, j] == pytest.approx(reward - baseline)
    if hybrids == "none":
        assert torch.equal(paper[0], code[0])                           # without hybrids both are Dr.GRPO
    torch.testing.assert_close(paper[0].sum(1), torch.zeros(len(rewards)))
    with pytest.raises(ValueError, match="paper or code"):
        advantages(rewards, hybrid, "verl")


def clipped_by_loops(adv, prefix_mask, entropy, keep, how):
    """The definition, on lists: sort all prefix tokens of the batch, keep the first ones."""
    places = [(b, t) for b in range(adv.shape[0]) for t in range(adv.shape[1]) if prefix_mask[b, t]]
    count = {"all": len(places), "none": 0}.get(how, math.ceil(round(keep * len(places), 9)))
    sign = 1 if how == "bottom" else -1
    order = sorted(places, key=lambda place: sign * entropy[place].item())                              # stable
    result = adv.clone()
    for place in set(places) - set(order[:count]):
        result[place] = 0
    return result


def clip_case(B=6, T=11, seed=0, ties=False):
    g = torch.Generator().manual_seed(seed)
    entropy = torch.rand(B, T, generator=g)
    adv = torch.randn(B, T, generator=g)
    adv[2] = 0                                                       # a row without advantage takes part in the ranking
    return adv, torch.rand(B, T, generator=g) < 0.5, (entropy * 4).round() if ties else entropy


@pytest.mark.parametrize("how", ["top", "bottom", "all", "none"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_entropy_clip_against_loops(how, keep, ties):
    for seed in range(5):
        adv, prefix, entropy = clip_case(seed=seed, ties=ties)
        entropy[~prefix] = math.nan                                     # never looked at
        clipped = entropy_clip(adv, prefix, entropy, keep, how)
        assert torch.equal(clipped, clipped_by_loops(adv, prefix, entropy, keep, how))
        assert torch.equal(clipped[~prefix], adv[~prefix])


def test_entropy_clip_random_keeps_a_share_and_needs_no_entropy():
    adv, prefix, entropy = torch.ones(50, 40), torch.rand(50, 40) < 0.5, torch.rand(50, 40)
    seed = lambda n: torch.Generator().manual_seed(n)
    one = entropy_clip(adv, prefix, entropy, 0.2, "random", seed(0))
    assert (one[prefix] != 0).sum() == math.ceil(0.2 * prefix.sum().item()) and (one[~prefix] == 1).all()
    assert torch.equal(one, entropy_clip(adv, prefix, -entropy, 0.2, "random", seed(0)))
    assert not torch.equal(one, entropy_clip(adv, prefix, entropy, 0.2, "random", seed(1)))
    with pytest.raises(ValueError, match="how must be"):
        entropy_clip(adv, prefix, entropy, 0.2, "best")


@pytest.mark.parametrize("tokens, keep, kept", [(0, 0.2, 0), (1, 0.2, 1), (5, 0.2, 1), (6, 0.2, 2), (10, 0.3, 3),
                                                (7, 1.0, 7), (7, 0.0, 0)])
def test_entropy_clip_counts(tokens, keep, kept):
    prefix = torch.arange(12)[None] < tokens
    assert (entropy_clip(torch.ones(1, 12), prefix, torch.rand(1, 12), keep)[prefix] != 0).sum() == kept


@pytest.mark.parametrize("how", ["top", "bottom"])
def test_entropy_clip_minds_neither_padding_nor_order(how):
    adv, prefix, entropy = clip_case()
    clipped = entropy_clip(adv, prefix, entropy, 0.3, how)
    order = torch.randperm(len(adv))
    wide = lambda x: torch.nn.functional.pad(x[order], (2, 5))
    moved = entropy_clip(wide(adv), wide(prefix), wide(entropy), 0.3, how)
    assert torch.equal(moved, wide(clipped))


def loss_case(seed=0, spread=0.4, B=5, T=9):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, T, generator=g)
    return (logp, logp + spread * torch.randn(B, T, generator=g), torch.randn(B, T, generator=g),
            torch.rand(B, T, generator=g) < 0.7)


def loss_and_gradient(logp, *rest, loss=policy_loss, **how):
    logp = logp.clone().requires_grad_()
    value = loss(logp, *rest, **how)
    value, metrics = value if isinstance(value, tuple) else (value, {})
    value.backward()
    return value.item(), logp.grad, metrics


@pytest.mark.parametrize("clip", [0.0, 0.2, 1.5])
def test_policy_loss_against_a_loop_in_float64(clip):
    logp, old, adv, mask = loss_case()
    denom, total, held, ratios = 77, 0.0, 0, []
    gradient = np.zeros(logp.shape)
    for place in np.argwhere(mask.numpy()).tolist():
        place = tuple(place)
        ratio, A = math.exp(logp[place].double() - old[place].double()), adv[place].item()
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        total -= min(ratio * A, clipped * A)
        if ratio * A <= clipped * A:
            gradient[place] = -ratio * A / denom
        held += clipped * A < ratio * A
        ratios.append(ratio)
    value, ours, metrics = loss_and_gradient(logp, old, adv, mask, denom, clip=clip)
    assert value == pytest.approx(total / denom, rel=1e-5)
    np.testing.assert_allclose(ours, gradient, atol=1e-6)
    assert metrics["clip_share"] == pytest.approx(held / len(ratios))
    assert metrics["ratio"] == pytest.approx(np.mean(ratios), rel=1e-5)
    assert held > 0 or clip == 1.5


@pytest.mark.parametrize("A, ratio, moves", [(1, 1.1, True), (1, 1.3, False), (1, 0.7, True), (1, 1.0, True),
                                             (-1, 0.9, True), (-1, 0.7, False), (-1, 1.3, True), (-1, 1.0, True)])
def test_the_clip_holds_back_only_what_has_gone_far_enough(A, ratio, moves):
    logp, old, adv, mask = torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.full((1, 1), float(A)), torch.tensor([[True]])
    _, gradient, metrics = loss_and_gradient(logp, old, adv, mask, 1)
    assert gradient.item() == pytest.approx(-A * ratio if moves else 0) and metrics["clip_share"] == 1 - moves


def test_the_first_step_is_reinforce():
    logp, _, adv, mask = loss_case()
    value, gradient, metrics = loss_and_gradient(logp, logp, adv, mask, 50)
    torch.testing.assert_close(gradient, -(adv * mask) / 50)
    assert value == pytest.approx(-(adv * mask).sum().item() / 50, rel=1e-5)
    assert metrics == {"clip_share": 0, "ratio": 1}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_touch_nothing(poison):
    logp, old, adv, mask = loss_case()
    clean = loss_and_gradient(logp, old, adv, mask, 50)
    dirty = loss_and_gradient(*(x.masked_fill(~mask, poison) for x in (logp, old, adv)), mask, 50)
    assert clean[0] == dirty[0] and torch.equal(clean[1], dirty[1]) and (clean[1][~mask] == 0).all()
    value, gradient, metrics = loss_and_gradient(logp, old, adv, torch.zeros_like(mask), 50)
    assert value == 0 and (gradient == 0).all() and metrics["clip_share"] == 0
    for how in ("sft", "luffy"):
        one, other = (loss_and_gradient(x, adv, mask, 50, loss=prefix_term, how=how)
                      for x in (logp, logp.masked_fill(~mask, poison)))
        assert one[0] == other[0] and torch.equal(one[1], other[1])


def test_prefix_terms_against_the_formulas():
    logp, _, adv, mask = loss_case()
    value, gradient, _ = loss_and_gradient(logp, adv, mask, 50, loss=prefix_term, how="sft")
    assert value == pytest.approx(-0.001 * logp[mask].sum().item() / 50)
    torch.testing.assert_close(gradient, -0.001 * mask / 50)
    value, gradient, _ = loss_and_gradient(logp, adv, mask, 50, loss=prefix_term, how="luffy")
    p = logp.double().exp()
    assert value == pytest.approx(-(adv * p / (p + 0.1))[mask].sum().item() / 50)
    torch.testing.assert_close(gradient, (-adv * mask * p * 0.1 / (p + 0.1) ** 2 / 50).float())    # d p/(p+c) / d log p
    assert all(prefix_term(logp, adv, mask, 50, how) == 0 for how in ("top", "all", "none", "random", "bottom"))


# ---- the whole update, on rollouts written by hand

V, N = 40, 4


def small_model(kind="llama", seed=0):
    Config, Model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    torch.manual_seed(seed)
    return Model(Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, initializer_range=0.3)).eval()


def hand_rows(G=5, seed=0, rewards=None):
    """G groups of N rollouts of very unequal lengths, the last hybrid. Group 0 is all wrong, group 3 all right."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(2, V, rng.integers(low, high)).tolist()
    rows = []
    for g in range(G):
        prompt = draw(1, 8)
        for i in range(N):
            response = draw(1, 20) + [1]
            hybrid = i == N - 1 and g != 4                              # group 4 has no demonstration
            L = int(rng.integers(0, len(response))) if hybrid else 0
            reward = {0: 0.0, 3: 1.0}.get(g, float(rng.random() < 0.5))
            rows.append({"prompt": prompt, "response": response, "L": L, "hybrid": hybrid, "finished": i != 1,
                         "reward": reward, "entropy": 0.0, "demo": len(response), "answer": ""})
    rows[N]["reward"], rows[N + 1]["reward"] = 0.0, 1.0                 # some group does have one
    return rows


def flags(**settings):
    return Flags(**{"n": N, "lr": 1.0, "clip": 1e9, "max_new_tokens": 24, "steps": 10, **settings})


def moved_by(model, rows, flags, make=None, seed=0):
    """What update() changes, as one vector, and its metrics. With plain descent at lr 1 that is minus the gradient."""
    other = copy.deepcopy(model)
    optimizer = (make or (lambda p: torch.optim.SGD(p, lr=0.0)))(other.parameters())
    metrics = update(other, optimizer, rows, flags, torch.Generator().manual_seed(seed))
    return torch.cat([(q - p).flatten() for p, q in zip(model.parameters(), other.parameters())]).detach(), metrics


def textbook(model, rows, flags):
    """The same for one mini-batch and one epoch: row by row, token by token, in float64, no clip (all ratios are 1)."""
    model = copy.deepcopy(model).double()
    tokens = []                                                         # (row, is prefix, logp, entropy) of every one
    for r, row in enumerate(rows):
        log_p = model(input_ids=torch.tensor([row["prompt"] + row["response"]])).logits[0].log_softmax(-1)
        for t, y in enumerate(row["response"]):
            q = log_p[len(row["prompt"]) + t - 1]
            tokens.append((r, t < row["L"], q[y], -(q.exp() * q).sum().item()))
    means = [np.mean([row["reward"] for row in rows[g:g + N]]) for g in range(0, len(rows), N)]
    plain = [np.mean([row["reward"] for row in rows[g:g + N] if not row["hybrid"]]) for g in range(0, len(rows), N)]

    def kept(wanted, share, how):
        count = math.ceil(round(share * sum(wanted), 9))
        sign = 1 if how == "bottom" else -1
        order = sorted((i for i, w in enumerate(wanted) if w), key=lambda i: sign * tokens[i][3])
        return set(order[:{"all": len(order), "none": 0, "sft": 0, "luffy": 0}.get(how, count)])

    # Overlong responses that are masked are no tokens of the loss, nor of the ranking.
    inside = [rows[r]["finished"] or not flags.mask_overlong for r, *_ in tokens]
    prefix_kept = kept([inside[i] and p for i, (_, p, *_) in enumerate(tokens)], flags.keep, flags.prefix_loss)
    own_kept = kept([inside[i] and not p for i, (_, p, *_) in enumerate(tokens)], flags.own_keep, "top")
    loss = 0
    for i, (r, is_prefix, logp, _) in enumerate(tokens):
        row, g = rows[r], r // N
        if not inside[i]:
            continue
        if flags.advantage == "paper" and flags.prefix_loss != "luffy":
            A = row["reward"] - means[g]
        else:
            A = row["reward"] - (0 if row["hybrid"] and not is_prefix else plain[g])
        if i in (prefix_kept if is_prefix else own_kept):
            loss = loss - A * logp
        if is_prefix and flags.prefix_loss == "sft":
            loss = loss - 0.001 * logp
        if is_prefix and flags.prefix_loss == "luffy":
            loss = loss - A * logp.exp() / (logp.exp() + 0.1)
    (loss / (len(rows) * flags.max_new_tokens)).backward()
    return -torch.cat([p.grad.flatten() for p in model.parameters()]).float()


@pytest.mark.parametrize("settings", [
    {}, {"keep": 0.5}, {"prefix_loss": "all"}, {"prefix_loss": "none"}, {"prefix_loss": "bottom"}, {"prefix_loss": "sft"},
    {"prefix_loss": "luffy"}, {"advantage": "code"}, {"own_keep": 0.2}, {"mask_overlong": True},
    {"schedule": "none", "own_keep": 0.5}],
    ids=lambda settings: " ".join(map(str, settings.values())) or "paper")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_update_against_the_textbook(kind, settings):
    model, rows = small_model(kind), hand_rows()
    ours, metrics = moved_by(model, rows, flags(**settings))
    theirs = textbook(model, rows, flags(**settings))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm() and theirs.norm() > 1e-4
    assert metrics["clip_share"] == 0 and metrics["updates"] == 1
    assert metrics["grad_norm"] == pytest.approx(theirs.norm().item(), rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"prefix_loss": "sft"}, {"prefix_loss": "luffy"}, {"prefix_loss": "random"},
                                      {"own_keep": 0.5, "advantage": "code"},
                                      {"mini_batches": 2, "epochs": 2, "lr": 0.3}],
                         ids=lambda settings: " ".join(map(str, settings.values())) or "paper")
def test_update_is_the_same_for_every_micro_batching(settings):
    model, rows = small_model(), hand_rows()
    whole, metrics = moved_by(model, rows, flags(**settings))
    for micro_tokens in (1, 70):                                        # one row at a time; a few
        cut, cut_metrics = moved_by(model, rows, flags(**settings, micro_tokens=micro_tokens))
        assert (whole - cut).abs().max() < 1e-6 < 1e-3 < whole.abs().max()
        for key in metrics:
            assert cut_metrics[key] == pytest.approx(metrics[key], rel=1e-3, abs=1e-6), key
    adamw = lambda p: torch.optim.AdamW(p, lr=0.0, eps=1e-3)            # a large eps, or rounding errors become steps
    small = {**settings, "lr": 1e-3}
    one, other = (moved_by(model, rows, flags(**small, micro_tokens=m), adamw)[0] for m in (1, 10**6))
    assert (one - other).abs().max() < 1e-6 and one.abs().max() > 1e-4


def test_keeping_all_is_no_clipping():
    model, rows = small_model(), hand_rows()
    unclipped = moved_by(model, rows, flags(prefix_loss="all"))[0]
    for settings in ({"keep": 1.0}, {"keep": 1.0, "prefix_loss": "bottom"}, {"keep": 1.0, "prefix_loss": "random"}):
        assert torch.equal(moved_by(model, rows, flags(**settings))[0], unclipped)
    assert not torch.equal(moved_by(model, rows, flags())[0], unclipped)
    assert torch.equal(moved_by(model, rows, flags(keep=0.0))[0], moved_by(model, rows, flags(prefix_loss="none"))[0])


def test_a_prefix_without_loss_is_part_of_the_prompt():
    """prefix_loss none: the prefix is only a place to start from."""
    model, rows = small_model(), hand_rows()
    as_prompt = [row | {"prompt": row["prompt"] + row["response"][:row["L"]], "response": row["response"][row["L"]:],
                        "L": 0} for row in rows]
    one = moved_by(model, rows, flags(prefix_loss="none"))[0]
    other = moved_by(model, as_prompt, flags(prefix_loss="all"))[0]
    assert (one - other).norm() < 1e-5 * one.norm() and one.norm() > 1e-2


def test_without_hybrids_every_setting_is_rft():
    model = small_model()
    rows = [row | {"L": 0, "hybrid": False} for row in hand_rows()]
    rft = moved_by(model, rows, flags(schedule="none", prefix_loss="none"))[0]
    for settings in ({}, {"prefix_loss": "sft"}, {"prefix_loss": "luffy"}, {"advantage": "code"}):
        other = moved_by(model, rows, flags(**settings))[0]
        assert (rft - other).norm() <= 1e-6 * rft.norm() and rft.norm() > 1e-2


def test_the_clip_starts_to_work_with_the_second_step():
    model, rows = small_model(), hand_rows()
    for m in (10**6, 100):                                              # the first ratio is 1 to the last bit: no clip
        moved, metrics = moved_by(model, rows, flags(clip_ratio=0.0, micro_tokens=m))           # is too tight for it
        assert metrics["clip_share"] == 0 and torch.equal(moved, moved_by(model, rows, flags(micro_tokens=m))[0])
    shares = {(m, e): moved_by(model, rows, flags(mini_batches=m, epochs=e, lr=3.0))[1]["clip_share"]
              for m, e in ((1, 1), (5, 1), (1, 4))}
    assert shares[1, 1] == 0 and shares[5, 1] > 0 and shares[1, 4] > 0
    assert moved_by(model, rows, flags(epochs=4, lr=3.0, clip_ratio=1e6))[1]["clip_share"] == 0


def test_mini_batches_are_whole_groups_and_skip_what_teaches_nothing():
    model, rows = small_model(), hand_rows()
    assert moved_by(model, rows, flags(mini_batches=5))[1]["updates"] == 3          # groups 0 and 3 have no advantage
    one_group = moved_by(model, rows[N:2 * N], flags())[0]                          # a group alone is a step of its own
    nothing = [row | {"reward": 0.0} for row in rows]
    moved, metrics = moved_by(model, nothing, flags())
    assert not moved.any() and metrics["updates"] == 0 and metrics["grad_norm"] == 0 and metrics["loss"] == 0
    assert (moved_by(model, rows[:2 * N], flags(mini_batches=2))[0] - one_group).abs().max() < 1e-6


def test_the_gradient_share_of_the_prefix_is_measured_without_a_trace():
    model, rows = small_model(), hand_rows()
    plain, metrics = moved_by(model, rows, flags(prefix_loss="all"))
    measured, more = moved_by(model, rows, flags(prefix_loss="all", prefix_grad=True))
    assert torch.equal(plain, measured) and "prefix_grad" not in metrics
    assert {k: more[k] for k in metrics} == metrics
    assert moved_by(model, rows, flags(prefix_loss="none", prefix_grad=True))[1]["prefix_grad"] == 0
    only_prefix = [row | {"L": len(row["response"])} for row in rows]
    assert moved_by(model, only_prefix, flags(prefix_loss="all", prefix_grad=True))[1]["prefix_grad"] == 1


def test_a_broken_number_updates_nothing(monkeypatch):
    model, rows = small_model(), hand_rows()
    real = prefix_rft.token_stats
    monkeypatch.setattr(prefix_rft, "token_stats", lambda *a, **k: [x * math.nan for x in real(*a, **k)])
    moved, metrics = moved_by(model, rows, flags())
    state = {"bad": 0}
    idft.count_bad(state, metrics)
    assert not moved.any() and state == {"bad": 1, "dropped": 1}
    monkeypatch.undo()
    monkeypatch.setattr(prefix_rft, "policy_loss", lambda logp, *a: (logp.sum() * 0 + math.inf, {"clip_share": 0.0}))
    moved, metrics = moved_by(model, rows, flags())
    assert not moved.any() and metrics["loss"] == math.inf and metrics["grad_norm"] == 0


def test_activation_checkpointing_changes_no_update():
    model, rows = small_model(), hand_rows()
    plain = moved_by(model, rows, flags())[0]
    idft.checkpoint_activations(model)
    assert (plain - moved_by(model, rows, flags())[0]).abs().max() < 1e-6


# ---- rollouts

@pytest.fixture(scope="session")
def base():
    """A toy base after a second of pre-training: it writes texts that end, and guesses."""
    return toy.pretrain(seed=0, steps=60, batch=16, lr=1e-2, width=32, heads=2, ffn=64)


def problems_of(tokenizer, split="train", n=6, demo_share=1.0, change=lambda row: row):
    return prepare(tokenizer, [change(row) for row in toy.problems(split, n)], demo_share, seed=0)


def roll(base, problems, step=0, **settings):
    model, tokenizer = base
    f = flags(**{"max_new_tokens": 40, "batch": len(problems), **settings})
    sampler, _ = new_sampler(model, [p["prompt"] for p in problems], f.max_new_tokens, 16)
    return rollout(sampler, tokenizer, problems, f, step, stop_ids(model, tokenizer)), f


@pytest.mark.parametrize("step", [0, 5, 9])
def test_rollouts_start_with_the_demonstration(base, step):
    problems = problems_of(base[1], n=20)
    rows, f = roll(base, problems, step)
    low, high = prefix_window(step, f.steps)
    assert len(rows) == 20 * N
    for i, row in enumerate(rows):
        problem = problems[i // N]
        demo = problem["demos"][0]
        assert row["prompt"] == problem["prompt"] and row["answer"] == problem["answer"]
        assert row["hybrid"] == (i % N == N - 1) and 1 <= len(row["response"]) - row["L"]
        assert len(row["response"]) <= f.max_new_tokens
        if row["hybrid"]:
            assert row["response"][:row["L"]] == demo[:row["L"]] and row["demo"] == len(demo)
            assert math.floor(low * len(demo)) - 1 <= row["L"] <= min(len(demo) - 1, math.floor(high * len(demo)))
        else:
            assert row["L"] == 0
        assert row["finished"] == (row["response"][-1] == base[1].eos_token_id)
        text = base[1].decode(row["response"], skip_special_tokens=True)
        assert row["reward"] == (row["finished"] and text.endswith(f"\\boxed{{{row['answer']}}}"))
    assert any(row["reward"] == 1 and row["hybrid"] for row in rows) or step == 9
    plain = [tuple(row["response"]) for row in rows if not row["hybrid"]]
    assert len(set(plain)) > len(plain) / 2                             # the rollouts of a problem differ


def test_overlong_responses_earn_nothing(base, monkeypatch):
    """Even a response that holds the right answer: it did not end."""
    monkeypatch.setattr(prefix_rft, "rewards", lambda texts, answers: [1.0] * len(texts))
    rows, f = roll(base, problems_of(base[1], "easy", 20), max_new_tokens=5)
    for row in rows:
        assert len(row["response"]) <= 5 and row["reward"] == row["finished"]
        assert row["finished"] or len(row["response"]) == 5
        if row["hybrid"]:
            assert row["L"] <= 4                                        # something is left to write
    assert any(not row["finished"] for row in rows)
    described = prefix_rft.describe(rows, f, 0)
    assert described["overlong"] == np.mean([not row["finished"] for row in rows])


def test_problems_without_a_demonstration_are_plain(base):
    without = lambda row: row | {"solution": None}
    rows, _ = roll(base, problems_of(base[1], change=without))
    rft, _ = roll(base, problems_of(base[1]), schedule="none")
    assert rows == rft and not any(row["hybrid"] for row in rows)


def test_one_of_several_demonstrations_is_drawn_each_time(base):
    two = lambda row: row | {"solution": [row["solution"], "\\boxed{" + row["answer"] + "}"]}
    problems = problems_of(base[1], n=10, change=two)
    assert all(len(p["demos"]) == 2 for p in problems)
    drawn = [{row["demo"] for row in roll(base, problems, step)[0] if row["hybrid"]} for step in range(2)]
    short = len(problems[0]["demos"][1])
    assert all(short in lengths and len(lengths) > 1 for lengths in drawn)


def test_luffy_rolls_out_the_whole_demonstration(base):
    problems = problems_of(base[1], n=6)
    rows, _ = roll(base, problems, schedule="full", prefix_loss="luffy")
    for problem, row in zip(problems, rows[N - 1::N]):
        assert row["response"] == problem["demos"][0] and row["L"] == row["demo"] == len(row["response"])
        assert row["response"][-1] == base[1].eos_token_id and row["reward"] == 1 and row["finished"]
    rows, _ = roll(base, problems, schedule="full", prefix_loss="luffy", max_new_tokens=6)      # no room for it
    for problem, row in zip(problems, rows[N - 1::N]):
        assert row["response"] == problem["demos"][0][:6] and row["reward"] == 0 and not row["finished"]
    wrong = lambda row: row | {"answer": str((int(row["answer"]) + 1) % 24)}
    rows, _ = roll(base, problems_of(base[1], change=wrong), schedule="full", prefix_loss="luffy")
    assert all(row["reward"] == 0 for row in rows[N - 1::N])


def test_rollouts_follow_the_seed_alone(base):
    problems = problems_of(base[1])
    torch.manual_seed(1)
    one = roll(base, problems)[0]
    torch.manual_seed(2)
    assert roll(base, problems)[0] == one
    assert roll(base, problems, seed=1)[0] != one and roll(base, problems, step=1)[0] != one


def test_prepare_keeps_the_demonstrations_of_a_share():
    tokenizer, rows = toy.tokenizer(), toy.problems("train", 40)
    for share, count in ((0.0, 0), (1e-4, 1), (0.1, 4), (0.3, 12), (0.51, 21), (1.0, 40)):
        ready = prepare(tokenizer, rows, share, seed=3)
        assert sum(bool(p["demos"]) for p in ready) == count            # a share above 0 leaves at least one
        assert [p["demos"] for p in prepare(tokenizer, rows, share, 3)] == [p["demos"] for p in ready]
    few, many = ({i for i, p in enumerate(prepare(tokenizer, rows, share, 3)) if p["demos"]} for share in (0.1, 0.5))
    assert few < many and few != {0, 1, 2, 3}
    assert ready[0]["demos"][0][-1] == tokenizer.eos_token_id and ready[0]["answer"] == rows[0]["answer"]


def test_to_tensors(base):
    rows = hand_rows()
    b = prefix_rft.to_tensors(rows, flags(advantage="code", mask_overlong=True), CPU)
    rewards, hybrid = (torch.tensor([row[key] for row in rows]).view(-1, N) for key in ("reward", "hybrid"))
    adv = advantages(rewards, hybrid, "code")
    for i, row in enumerate(rows):
        prompt, response = len(row["prompt"]), len(row["response"])
        assert b["ids"][i, :prompt + response].tolist() == row["prompt"] + row["response"]
        assert b["lengths"][i] == prompt + response
        for t in range(b["ids"].shape[1] - 1):
            place = t + 1 - prompt                                      # column t is about token t + 1
            inside = 0 <= place < response and row["finished"]
            assert b["prefix"][i, t] == (inside and place < row["L"])
            assert b["own"][i, t] == (inside and place >= row["L"])
            which = adv[1 if place < row["L"] else 0].flatten()[i]
            assert b["adv"][i, t] == (which if inside else 0)


def test_describe():
    rows = hand_rows()
    about = prefix_rft.describe(rows, flags(), 5)
    hybrid = [row for row in rows if row["hybrid"]]
    assert about["reward"] == np.mean([row["reward"] for row in rows if not row["hybrid"]])
    assert about["reward_hybrid"] == np.mean([row["reward"] for row in hybrid]) and about["low"] == pytest.approx(0.5)
    assert about["prefix_share"] == pytest.approx(np.mean([row["L"] / row["demo"] for row in hybrid]))
    assert about["tokens"] + about["prefix_tokens"] == sum(len(row["response"]) for row in rows)
    plain = prefix_rft.describe([row | {"hybrid": False, "L": 0} for row in rows], flags(), 5)
    assert plain["reward_hybrid"] is None and plain["prefix_share"] is None


# ---- whole runs

@pytest.fixture(scope="session")
def world(base, tmp_path_factory):
    """The same base as a checkpoint directory, and two files of toy problems: a real model in everything but size."""
    folder = tmp_path_factory.mktemp("world")
    base[0].save_pretrained(folder / "base")
    base[1].save_pretrained(folder / "base")
    for name, split, n in (("train", "train", 12), ("test", "easy", 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy.problems(split, n)))
    return folder


def arguments(world, **more):
    settings = {"model": world / "base", "data": world / "train.jsonl", "steps": 3, "batch": 4, "n": 4,
                "mini_batches": 2, "lr": 1e-3, "max_new_tokens": 32, "rows": 16, **more}
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def run_here(argv):
    prefix_rft.run(prefix_rft.main, Flags, [str(a) for a in argv], toy_defaults=prefix_rft.TOY)


def test_two_runs_with_one_seed_are_one(world, tmp_path):
    for name, noise in (("one", 1), ("other", 2)):
        torch.manual_seed(noise), np.random.seed(noise), random.seed(noise)
        run_here([*arguments(world, eval_data=world / "test.jsonl", eval_every=2), "--out", tmp_path / name])
    assert_equal_runs(tmp_path / "one", tmp_path / "other", TIMINGS)
    rows = logged(tmp_path / "one")
    assert [(row["step"], "accuracy" in row) for row in rows] == [(0, True), (1, False), (2, True), (3, False), (3, True)]
    assert sum(row.get("updates", 0) for row in rows) > 0               # there was something to learn
    run_here([*arguments(world, seed=1), "--out", tmp_path / "another"])
    assert logged(tmp_path / "another")[1]["loss"] != rows[1]["loss"]


def test_killed_and_resumed_is_undisturbed_bit_for_bit(world, tmp_path):
    argv = arguments(world, steps=10, save_every=2, eval_data=world / "test.jsonl", eval_every=3, prefix_loss="random",
                     epochs=2)
    undisturbed("prefix_rft", argv, tmp_path / "whole")
    hits = killed_and_resumed("prefix_rft", argv, tmp_path / "killed", kills=3)
    assert hits >= 2
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole", TIMINGS)
    assert [row["step"] for row in logged(tmp_path / "killed")] == [0, *range(1, 11), 10]
    assert sum(row.get("updates", 0) for row in logged(tmp_path / "whole")) > 5


def test_a_real_model_on_real_text(tiny_checkpoint, tmp_path):
    """The README's command on a checkpoint with a BPE tokenizer: it earns nothing, but every stage does its work."""
    rows = word_problems(12)
    if GSM8K.exists():
        rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:12]]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    out = tmp_path / "run"
    argv = arguments(tmp_path, model=tiny_checkpoint, eval_data=tmp_path / "test.jsonl", steps=2, max_new_tokens=64,
                     mini_batches=1, method="uft", out=out)
    done = subprocess.run([sys.executable, "prefix_rft.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "before   after" in done.stdout and "test" in done.stdout
    metrics = logged(out)
    assert [row["step"] for row in metrics] == [0, 1, 2, 2] and metrics[0]["accuracy"].keys() == {"test"}
    for row in metrics[1:3]:
        assert row["prefix_tokens"] > 100 and row["tokens"] > 100 and row["updates"] == 1 and row["grad_norm"] > 0
        assert row["entropy"] > 1 and 0.3 < row["prefix_share"] <= 0.95 and 0 <= row["overlong"] <= 1
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    start = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))
    assert tokenizer("a b c").input_ids == AutoTokenizer.from_pretrained(tiny_checkpoint)("a b c").input_ids
    assert tokenizer.chat_template


@pytest.mark.parametrize("method", prefix_rft.METHODS)
def test_every_method_trains(world, tmp_path, method):
    run_here([*arguments(world, steps=2, method=method, mini_batches=1), "--out", tmp_path])
    first, second = logged(tmp_path)[1:3]
    saved = torch.load(tmp_path / "checkpoint" / "trainer.pt", weights_only=True)["flags"]
    assert (saved["schedule"], saved["prefix_loss"]) == prefix_rft.METHODS[method]
    assert (first["reward_hybrid"] is None) == (method in ("rft", "sft_rft"))
    assert math.isfinite(second["loss"]) and second["dropped"] == 0
    if method == "luffy":
        assert first["reward_hybrid"] == 1 and first["prefix_share"] == 1
    if method not in ("rft", "sft_rft"):
        assert first["updates"] == 1 and first["grad_norm"] > 0


def test_rft_after_sft_starts_from_the_checkpoint_of_idft(world, tmp_path):
    supervised = ["--model", world / "base", "--data", world / "train.jsonl", "--loss", "sft", "--lr", 1e-3, "--steps", 2,
                  "--batch", 4, "--out", tmp_path / "sft"]
    idft.run(idft.main, idft.Flags, [str(a) for a in supervised])
    run_here(arguments(world, model=tmp_path / "sft" / "checkpoint", method="sft_rft", steps=1, lr=0, out=tmp_path / "rft"))
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint") for name in ("sft", "rft"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("more, sentence", [
    ({"keep": 1.5}, "--keep 1.5 is out of range"),
    ({"n": 0}, "--n 0 is out of range"),
    ({"method": "ppo"}, "invalid choice: 'ppo'"),
    ({"schedule": "step"}, "invalid choice: 'step'"),
    ({"advantage": "grpo"}, "invalid choice: 'grpo'"),
    ({"kep": 0.2}, "unknown flag --kep"),
    ({"high": 0.5}, "--high 0.5 must be at least --low 0.95 and --low_end 0.05"),
    ({"low": 0.1, "low_end": 0.4, "high": 0.3}, "--high 0.3 must be at least"),
    ({"method": "luffy", "n": 1}, "--n 1: the demonstration is the only rollout"),
    ({"max_new_tokens": 8192}, "--max_new_tokens 8192: beside the longest prompt the model reads"),
    ({"data": "no.jsonl"}, "no.jsonl: No such file"),
    ({"eval_data": "no.jsonl"}, "no.jsonl: No such file"),
    ({"data": "{tmp}/bad.jsonl"}, "bad.jsonl line 2: answer (answer|final_answer|ground_truth) is missing"),
    ({"model": "no/such/model"}, "--model no/such/model is no directory"),
    ({"device": "tpu"}, "--device tpu is unknown"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(more, sentence, world, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": "2 + 2?"}\n')
    more = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in more.items()}
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_here([*arguments(world, **more), "--out", tmp_path / "run"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and sentence in lines[0], lines
    assert set(tmp_path.rglob("*")) == before


def test_resume_with_another_method_is_refused(world, tmp_path, capsys):
    run_here([*arguments(world, steps=1, method="rft"), "--out", tmp_path])
    for more, sentence in ((["--resume"], "was started with --method rft"), ([], "already holds a run")):
        with pytest.raises(SystemExit) as stop:
            run_here([*arguments(world, steps=1, method="luffy"), "--out", tmp_path, *more])
        assert stop.value.code == 2 and sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_defaults_are_the_papers():
    real = parse_flags(Flags, ["--data", "x.jsonl"], prefix_rft.TOY)
    assert (real.schedule, real.prefix_loss, real.advantage, real.n, real.keep) == ("cosine", "top", "paper", 8, 0.2)
    assert (real.lr, real.steps, real.batch, real.max_new_tokens, real.clip_ratio) == (1e-6, 500, 128, 8192, 0.2)
    assert (real.low, real.low_end, real.high, real.temperature) == (0.95, 0.05, 0.95, 1.0)
    assert prefix_rft.METHODS["prefix_rft"] == (real.schedule, real.prefix_loss)


# ---- the honest table

@pytest.mark.parametrize("arm", prefix_rft.ARMS)
def test_every_arm_of_the_comparison_trains_on_the_same_budget(arm, base, monkeypatch):
    """One tiny run an arm: it moves the weights (or is an arm that needs rewards), and sees what it should see."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    before = copy.deepcopy(model.state_dict())
    sequences, scored = [], []
    supervised, policy = idft.supervised_step, prefix_rft.rollout

    def count_rows(model, optimizer, rows, *a, **k):
        sequences.append(len(rows))
        return supervised(model, optimizer, rows, *a, **k)

    def count_rollouts(*a, **k):
        rows = policy(*a, **k)
        sequences.append(len(rows))
        scored.append(sum(row["hybrid"] for row in rows))
        return rows

    monkeypatch.setattr(idft, "supervised_step", count_rows)
    monkeypatch.setattr(prefix_rft, "rollout", count_rollouts)
    monkeypatch.setattr(prefix_rft, "load_model", lambda *a: (model, tokenizer))
    monkeypatch.setattr(prefix_rft, "assess", lambda m, t, sets, *a: {name: 0.5 for name in sets})
    monkeypatch.setattr(prefix_rft, "evaluate", lambda *a, **k: {"pass@k": {1: 0.1, 8: 0.2}})
    job = Flags(steps=2, batch=3, n=4, max_new_tokens=24, problems=30, compare="all", rows=12, mini_batches=2)
    result = prefix_rft.run_arm(job, arm, lr=1e-3, seed=0)
    assert {"toy-hard", "toy-longer", "toy-easy", "pass@1", "pass@8", "seconds"} == result.keys()
    assert sequences == [12] * 2                                        # steps, and sequences a step, are equal for all
    assert len(scored) == (0 if arm in prefix_rft.SUPERVISED else 1 if arm.startswith("sft_rft") else 2)
    plain = arm.startswith(("rft", "sft_rft")) or arm in prefix_rft.SUPERVISED
    assert sum(scored) == 0 if plain else sum(scored) == 6 or "demos" in arm
    moved = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert moved or arm.startswith("rft") or "demos" in arm
    if arm == "dft":
        assert prefix_rft.run_arm(job, arm, lr=1e-3, seed=prefix_rft.TUNING_SEED) == {"valid": 0.5}


def test_compare_tunes_every_arm_and_reports_other_seeds(tmp_path, monkeypatch, capsys):
    best = {arm: prefix_rft.GRID[i % len(prefix_rft.GRID)] for i, arm in enumerate(prefix_rft.ARMS)}
    runs = []

    def run_arm(job, arm, lr, seed):
        runs.append((arm, lr, seed))
        if seed == prefix_rft.TUNING_SEED:
            return {"valid": float(lr == best[arm])}
        return {key: 0.5 for key in ("toy-hard", "toy-longer", "toy-easy", "pass@1", "pass@8")}

    monkeypatch.setattr(prefix_rft, "run_arm", run_arm)
    run_here(["--compare", "all", "--out", tmp_path])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(prefix_rft.ARMS) and all("0.50 ± 0.00" in line for line in lines)
    for arm in prefix_rft.ARMS:
        tuned = {lr for a, lr, seed in runs if a == arm and seed != prefix_rft.TUNING_SEED}
        assert tuned == {best[arm.split(",")[0]]}
        assert {seed for a, _, seed in runs if a == arm} - {prefix_rft.TUNING_SEED} == set(prefix_rft.SEEDS)
    assert len(runs) == len(set(runs))                                  # nothing is run twice
    count = len(runs)
    run_here(["--compare", "main", "--out", tmp_path])
    assert len(runs) == count                                           # and what stands in the file is not run again
