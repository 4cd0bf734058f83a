"""experiments/relatives.py: how each starts and what it learns, in tests that fail for its
neighbour, and whole runs. Their updates stand against the textbook in test_prefix_rft.py."""

import copy
import math

import pytest
import torch
from conftest import refusal, run_here, small_model
from kill import logged
from test_prefix_rft import (N, arguments, flags, hand_rollouts, hybrid_counts, learning, moved_by,
                             problems_of, roll, sgd, starts, world)

from experiments import relatives
from experiments.relatives import METHODS, hint_window, shaped_loss, static_loss
from prefix_rft import update


def test_the_probability_of_a_hint_falls_along_a_cosine_in_60_percent_of_the_steps():
    for step, p in ((0, 0.95), (30, 0.5), (50, 0.1103), (60, 0.05), (61, 0), (100, 0)):
        assert hint_window(step, 100) == pytest.approx((p, p), abs=1e-4)
    assert hint_window(60, 100, low_end=0.2) == pytest.approx((0.2, 0.2))
    falling = [hint_window(step, 100) for step in range(101)]
    assert falling == sorted(falling, reverse=True)


def test_prefix_losses_against_the_formulas():
    logp, adv = -3 * torch.rand(40), torch.randn(40)
    p = logp.exp()
    for loss_of, value, slope in (
            (static_loss, -adv * logp, -adv),
            (shaped_loss, -adv * p / (p + 0.1), -adv * 0.1 * p / (p + 0.1) ** 2)):
        ours = logp.clone().requires_grad_()
        loss = loss_of(ours, adv)
        loss.sum().backward()
        torch.testing.assert_close(loss.detach(), value)
        torch.testing.assert_close(ours.grad, slope)


def test_uft_hints_every_rollout_by_a_binomial_and_static_one_by_a_window(small_base):
    """Of five slices of the demonstration each is given with probability p."""
    problems = problems_of(small_base[1], 30)
    static = starts(small_base, problems, method="static")
    assert hybrid_counts(static) == [1] * 30
    for step, p in ((0, 0.95), (3, 0.5), (6, 0.05), (7, 0.0)):
        uft = starts(small_base, 20 * problems, step, method="uft")
        assert hybrid_counts(uft) == [N] * 600
        slices = []
        for i in range(0, len(uft), N):
            assert len({r.prefix_length for r in uft[i:i + N]}) == 1        # one hint a problem
            r = uft[i]
            possible = [min(round(k / 5 * r.demo_length), r.demo_length - 1) for k in range(6)]
            slices.append(possible.index(r.prefix_length))
        for k in range(6):
            expected = 600 * math.comb(5, k) * p ** k * (1 - p) ** (5 - k)
            assert abs(slices.count(k) - expected) < 5 * expected ** 0.5 + 1


def test_luffy_rolls_out_the_whole_demonstration_and_has_no_clip(small_base):
    problems = problems_of(small_base[1])
    for r, problem in zip(roll(small_base, problems, method="luffy")[N - 1::N], problems):
        assert r.response == problem["demos"][0] and r.prefix_length == r.demo_length
        assert r.finished and r.reward == 1
    wrong = problems_of(small_base[1], answer=lambda row: "wrong")
    rollouts = roll(small_base, wrong, method="luffy")
    assert all(r.reward == 0 for r in rollouts)

    # Its two baselines, on rewards 0, 1, 0 of its own and 1 of the demonstration.
    model = small_model()
    group = hand_rollouts(hybrids=0)[N:2 * N]
    for r, reward in zip(group, (0.0, 1.0, 0.0, 1.0)):
        r.reward = reward
    group[-1].prefix_length = group[-1].demo_length = len(group[-1].response)
    for kind, advantage in (("paper", (-0.5, 0.5, -0.5, 0.5)), ("code", (-1/3, 2/3, -1/3, 2/3))):
        rollouts = copy.deepcopy(group)
        update(copy.deepcopy(model), sgd(model.parameters()), rollouts,
               flags(method="luffy", advantage=kind), **learning("luffy"))
        for r, adv in zip(rollouts, advantage):
            torch.testing.assert_close(r.adv, torch.full((len(r.response),), adv))

    # With several mini-batches its ratio is not held back; that of its neighbours is.
    clipped = {}
    for name in ("luffy", "static", "prefix_rft"):
        f = flags(mini_batches=5, lr=3.0, method=name)
        clipped[name] = moved_by(model, hand_rollouts(), f)[1]["clipped_tokens"]
    assert clipped["luffy"] == 0 < min(clipped["static"], clipped["prefix_rft"])


# ---- whole runs ---------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_every_relative_trains(world, tmp_path, method):
    run_here(relatives, *arguments(world, steps=2, method=method), "--out", tmp_path)
    first, second = logged(tmp_path)[1:3]
    assert math.isfinite(second["loss"]) and math.isfinite(second["grad_norm"])
    assert first["updates"] > 0 and first["grad_norm"] > 0
    if method == "luffy":
        assert first["reward_hybrid"] == 1 and first["prefix_share"] == 1


@pytest.mark.parametrize("more, sentence", [
    ({"method": "prefix_rft"}, "invalid choice: 'prefix_rft'"),
    ({"method": "luffy", "hybrids": -1}, "without a demonstration: lower --hybrids -1"),
    ({"method": "luffy", "schedule": "cosine"}, "--schedule: --method luffy has its own"),
    ({"method": "static", "prefix_loss": "top"}, "--prefix_loss: --method static has its own"),
    ({"method": "uft", "advantage": "code"}, "--advantage code needs a plain rollout"),
    ({"n": 1}, "--n 1 is out of range")])
def test_bad_input_is_one_sentence_and_leaves_nothing(more, sentence, world, tmp_path, capsys):
    argv = arguments(world, **more)
    assert sentence in refusal(capsys, relatives, *argv, "--out", tmp_path / "run")
    assert not list(tmp_path.iterdir())
