"""prefix_rft.py: functions against naive loops, the whole update against a textbook in float64, the
definition of every relative, whole runs."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import refusal, run_here, small_model, word_problems
from kill import assert_equal_runs, killed_and_resumed, logged, undisturbed, untimed
from transformers import AutoModelForCausalLM

import eval
import idft
import prefix_rft
import toy
from eval import InputError, new_sampler, parse_flags, stop_ids
from prefix_rft import (METHODS, Flags, Rollout, advantages, check, describe, entropy_clip,
                        hint_length, policy_loss, prefix_length, prefix_loss, prefix_window,
                        prepare_problems, sample_rollouts, update)


# ---- how much prefix ----------------------------------------------------------------------------

@pytest.mark.parametrize("schedule, start, middle, end", [
    ("cosine", (0.95, 0.95), (0.5, 0.95), (0.05, 0.95)),
    ("linear", (0.95, 0.95), (0.5, 0.95), (0.05, 0.95)),
    ("uniform", (0.05, 0.95), (0.05, 0.95), (0.05, 0.95)),
    ("binomial", (0.95, 0.95), (0.1103, 0.1103), (0, 0)),       # down along a cosine in 60 %
    ("full", (1, 1), (1, 1), (1, 1)), ("none", (0, 0), (0, 0), (0, 0))])
def test_window(schedule, start, middle, end):
    for step, window in ((0, start), (50, middle), (100, end), (1000, end)):
        found = prefix_window(step, 100, schedule=schedule)
        assert found == pytest.approx(window, abs=1e-4)
    lows = [prefix_window(step, 100, schedule=schedule)[0] for step in range(101)]
    assert lows == sorted(lows, reverse=True)


def test_window_between_and_settings():
    quarter = 0.9 * math.cos(math.pi / 4) / 2
    assert prefix_window(25, 100)[0] == pytest.approx(0.5 + quarter)            # above the line
    assert prefix_window(75, 100)[0] == pytest.approx(0.5 - quarter)            # below it
    assert prefix_window(25, 100, schedule="linear")[0] == pytest.approx(0.725)
    how = {"high": 0.8, "low": 0.6, "low_end": 0.2}
    assert prefix_window(0, 10, **how) == pytest.approx((0.6, 0.8))
    assert prefix_window(10, 10, **how) == pytest.approx((0.2, 0.8))
    for step, p in ((30, 0.5), (60, 0.05), (61, 0)):
        assert prefix_window(step, 100, schedule="binomial") == pytest.approx((p, p))
    with pytest.raises(ValueError, match="no schedule 'step'"):
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
    counts = np.histogram(lengths, 8, (200, 600))[0]            # uniform: 8 bins of 500 +- 22
    assert abs(counts - 500).max() < 5 * 500 ** 0.5


def test_hint_length_is_binomial():
    """Each of five slices of the demonstration is given with probability p."""
    rng, p = np.random.default_rng(0), 0.3
    lengths = [hint_length(100, p, rng) for _ in range(4000)]
    for k in range(6):
        expected = 4000 * math.comb(5, k) * p ** k * (1 - p) ** (5 - k)
        assert abs(lengths.count(min(20 * k, 99)) - expected) < 5 * expected ** 0.5 + 1
    assert hint_length(1, 1.0, rng) == 0 and hint_length(7, 1.0, rng) == 6
    assert hint_length(7, 0.0, rng) == 0


# ---- what it is worth ---------------------------------------------------------------------------

@pytest.mark.parametrize("hybrids", ["some", "none", "last", "all"])
def test_advantages_against_loops(hybrids):
    g = torch.Generator().manual_seed(0)
    rewards = (torch.rand(40, 8, generator=g) < 0.4).float()
    hybrid = torch.rand(40, 8, generator=g) < 0.3
    if hybrids != "some":
        hybrid = torch.zeros_like(hybrid)
        hybrid[:, {"none": slice(0), "last": slice(-1, None), "all": slice(None)}[hybrids]] = True
    paper, code = advantages(rewards, hybrid, "paper"), advantages(rewards, hybrid, "code")
    for i, (row, given) in enumerate(zip(rewards.tolist(), hybrid.tolist())):
        plain = [r for r, h in zip(row, given) if not h]
        baseline = sum(plain) / len(plain) if plain else 0.0
        for j, (reward, is_hybrid) in enumerate(zip(row, given)):
            assert paper[0][i, j] == paper[1][i, j] == pytest.approx(reward - sum(row) / len(row))
            assert code[0][i, j] == pytest.approx(reward if is_hybrid else reward - baseline)
            assert code[1][i, j] == pytest.approx(reward - baseline)
    if hybrids == "none":
        assert torch.equal(paper[0], code[0])                   # without hybrids both are Dr.GRPO
    torch.testing.assert_close(paper[0].sum(1), torch.zeros(len(rewards)))
    with pytest.raises(ValueError, match="paper or code"):
        advantages(rewards, hybrid, "verl")


def clip_case(B=6, T=11, seed=0, ties=False):
    g = torch.Generator().manual_seed(seed)
    entropy = torch.rand(B, T, generator=g)
    adv = torch.randn(B, T, generator=g)
    adv[2] = 0                              # a row without advantage takes part in the ranking
    prefix = torch.rand(B, T, generator=g) < 0.5
    return adv, prefix, (entropy * 4).round() if ties else entropy


@pytest.mark.parametrize("how", ["top", "bottom", "all", "none"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_entropy_clip_against_loops(how, keep, ties):
    """The definition on lists: sort all prefix tokens of the batch, keep the first ones."""
    for seed in range(5):
        adv, prefix, entropy = clip_case(seed=seed, ties=ties)
        places = [tuple(place) for place in prefix.nonzero().tolist()]
        count = {"all": len(places), "none": 0}.get(how, math.ceil(round(keep * len(places), 9)))
        sign = 1 if how == "bottom" else -1
        order = sorted(places, key=lambda place: sign * entropy[place].item())          # stable
        expected = adv.clone()
        for place in set(places) - set(order[:count]):
            expected[place] = 0
        entropy[~prefix] = math.nan                             # never looked at
        assert torch.equal(entropy_clip(adv, prefix, entropy, keep, how), expected)
        flat = entropy_clip(adv.flatten(), prefix.flatten(), entropy.flatten(), keep, how)
        assert torch.equal(flat, expected.flatten())            # tensors of any one shape


def test_entropy_clip_random_keeps_a_share_and_needs_no_entropy():
    def clipped(entropy, seed):
        generator = torch.Generator().manual_seed(seed)
        return entropy_clip(torch.ones(50, 40), prefix, entropy, 0.2, "random", generator)

    entropy, prefix = torch.rand(50, 40), torch.rand(50, 40) < 0.5
    one = clipped(entropy, 0)
    assert (one[prefix] != 0).sum() == math.ceil(0.2 * prefix.sum().item())
    assert (one[~prefix] == 1).all()
    assert torch.equal(one, clipped(-entropy, 0)) and not torch.equal(one, clipped(entropy, 1))
    with pytest.raises(ValueError, match="how must be"):
        entropy_clip(one, prefix, entropy, 0.2, "best")


@pytest.mark.parametrize("tokens, keep, kept", [(0, 0.2, 0), (1, 0.2, 1), (5, 0.2, 1), (6, 0.2, 2),
                                                (10, 0.3, 3), (7, 1.0, 7), (7, 0.0, 0)])
def test_entropy_clip_counts(tokens, keep, kept):
    prefix = torch.arange(12) < tokens
    clipped = entropy_clip(torch.ones(12), prefix, torch.rand(12), keep)
    assert clipped[prefix].count_nonzero() == kept


@pytest.mark.parametrize("clip", [1e-6, 0.2, 1.5, 1e9])
def test_policy_loss_against_a_loop_in_float64(clip):
    g = torch.Generator().manual_seed(0)
    logp = (-3 * torch.rand(5, 9, generator=g)).requires_grad_()
    old = logp.detach() + 0.4 * torch.randn(5, 9, generator=g)
    adv = torch.randn(5, 9, generator=g)
    loss = policy_loss(logp, old, adv, clip)
    loss.sum().backward()
    held = 0
    for place in np.ndindex(5, 9):
        A, ratio = adv[place].item(), math.exp(logp[place].item() - old[place].item())
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        assert loss[place].item() == pytest.approx(-min(ratio * A, clipped * A), rel=1e-5)
        moves = ratio * A <= clipped * A
        assert logp.grad[place].item() == pytest.approx(-ratio * A if moves else 0, rel=1e-5)
        held += not moves
    assert (held == 0) == (clip > 1)


@pytest.mark.parametrize("A, ratio, moves", [
    (1, 1.1, True), (1, 1.3, False), (1, 0.7, True), (1, 1.0, True),
    (-1, 0.9, True), (-1, 0.7, False), (-1, 1.3, True), (-1, 1.0, True)])
def test_the_clip_holds_back_only_what_has_gone_far_enough(A, ratio, moves):
    logp = torch.tensor(math.log(ratio), requires_grad=True)
    policy_loss(logp, torch.tensor(0.0), torch.tensor(float(A))).backward()
    assert logp.grad.item() == pytest.approx(-A * ratio if moves else 0)


def test_prefix_losses_against_the_formulas():
    logp, adv = -3 * torch.rand(40), torch.randn(40)
    for how, gradient in (("sft", lambda p: -adv), ("luffy", lambda p: -adv * 0.1 * p / (p + 0.1) ** 2)):
        ours = logp.clone().requires_grad_()
        loss = prefix_loss(ours, adv, how)
        loss.sum().backward()
        p = logp.exp()
        expected = -adv * logp if how == "sft" else -adv * p / (p + 0.1)
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(ours.grad, gradient(p))


# ---- the whole update, on rollouts written by hand ----------------------------------------------

V, N, ROOM = 40, 4, 12


def hand_rollouts(G=5, seed=0, hybrids=1):
    """G groups of N rollouts of very unequal lengths, the last ones hybrid. Group 0 is all wrong,
    group 3 all right, group 4 has no demonstration."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for g in range(G):
        prompt = rng.integers(2, V, rng.integers(1, 8)).tolist()
        for i in range(N):
            response = rng.integers(2, V, rng.integers(1, 12)).tolist() + [1]
            r = Rollout(prompt, response, "", finished=i != 1)
            if i >= N - hybrids and g != 4:
                r.prefix_length, r.demo_length = int(rng.integers(0, len(response))), len(response)
            r.reward = {0: 0.0, 3: 1.0}.get(g, float(rng.random() < 0.5))
            rollouts.append(r)
    rollouts[N].reward, rollouts[N + 1].reward = 0.0, 1.0       # some group is of two minds
    return rollouts


def flags(**settings):
    return Flags(**{"n": N, "lr": 1.0, "max_new_tokens": ROOM, "steps": 10, "mini_batches": 1,
                    **settings})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.0, eps=1e-3)      # or rounding errors become steps


def moved_by(model, rollouts, flags, make=sgd, measure_prefix=False):
    """What update() adds to the weights, as one vector, and its metrics."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    metrics = update(other, make(other.parameters()), copy.deepcopy(rollouts), flags, generator,
                     measure_prefix)
    change = [(q - p).flatten() for p, q in zip(model.parameters(), other.parameters())]
    return torch.cat(change).detach(), metrics


def look(model, r, temperature):
    """log p(y) with gradient and H of every token of a response, one after the other."""
    logits = model(input_ids=torch.tensor([r.prompt + r.response])).logits[0] / temperature
    found = []
    for t, y in enumerate(r.response):
        log_p = logits[len(r.prompt) + t - 1].log_softmax(-1)
        found.append((log_p[y], -(log_p.exp() * log_p).sum().item()))
    return found


def textbook(model, rollouts, flags, make=sgd):
    """The same from the papers' formulas: rollout by rollout, token by token, in float64."""
    model = copy.deepcopy(model).double()
    start = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    optimizer = make(model.parameters())
    generator = torch.Generator().manual_seed(0)
    groups = [rollouts[i:i + N] for i in range(0, len(rollouts), N)]
    with torch.no_grad():
        sampled = {id(r): look(model, r, flags.temperature) for r in rollouts}
    size = math.ceil(len(groups) / flags.mini_batches)
    held = 0
    for first in range(0, len(groups), size):
        mini_batch = [(r, group) for group in groups[first:first + size] for r in group]

        # Which prefix tokens of the mini-batch are learnt from.
        places = [(id(r), t) for r, _ in mini_batch for t in range(r.prefix_length)]
        count = math.ceil(round(flags.keep * len(places), 9))
        if flags.prefix_loss in ("top", "bottom"):
            sign = -1 if flags.prefix_loss == "top" else 1
            order = sorted(places, key=lambda place: sign * sampled[place[0]][place[1]][1])
        elif flags.prefix_loss == "random":
            order = [places[i] for i in torch.randperm(len(places), generator=generator)]
        else:
            order, count = places, 0 if flags.prefix_loss == "none" else len(places)
        kept = set(order[:count])

        loss = torch.zeros((), dtype=torch.float64)
        for r, group in mini_batch:
            plain = [other.reward for other in group if other.demo_length == 0]
            for t, (logp, _) in enumerate(look(model, r, flags.temperature)):
                given = t < r.prefix_length
                if flags.advantage == "paper":
                    A = r.reward - sum(other.reward for other in group) / N
                elif r.demo_length > 0 and not given:
                    A = r.reward
                else:
                    A = r.reward - (sum(plain) / len(plain) if plain else 0)
                ratio = torch.exp(logp - sampled[id(r)][t][0])
                clipped = ratio.clamp(1 - flags.clip_ratio, 1 + flags.clip_ratio)
                if given and flags.prefix_loss == "sft":
                    loss = loss - 0.001 * logp
                elif given and flags.prefix_loss == "luffy":
                    loss = loss - A * logp.exp() / (logp.exp() + 0.1)
                elif not given or (id(r), t) in kept:
                    loss = loss - torch.minimum(ratio * A, clipped * A)
                    held += (clipped * A < ratio * A).item()
        (loss / (len(mini_batch) * flags.max_new_tokens)).backward()
        if torch.stack([p.grad.norm() for p in model.parameters()]).any():      # else: no step
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = flags.lr
            optimizer.step()
        optimizer.zero_grad()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    return moved.float(), held


ARMS = [{}, {"keep": 0.5}, {"prefix_loss": "all"}, {"prefix_loss": "none"}, {"temperature": 0.7},
        {"prefix_loss": "bottom"}, {"prefix_loss": "random"}, {"advantage": "code"},
        {"prefix_loss": "sft"}, {"prefix_loss": "luffy"},
        {"prefix_loss": "luffy", "advantage": "code"}, {"hybrids": 4, "prefix_loss": "sft"},
        {"hybrids": 0, "schedule": "none"}]
# Steps so large that the ratio is far from 1 and the clip holds back.
SEVERAL = [{"mini_batches": 5, "lr": 3.0, **more} for more in (
    {}, {"advantage": "code", "prefix_loss": "all"}, {"prefix_loss": "luffy", "clip_ratio": 1e9},
    {"prefix_loss": "random"}, {"mini_batches": 2, "temperature": 0.7})]


def name_of(settings):
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "paper"


@pytest.mark.parametrize("settings", ARMS + SEVERAL, ids=name_of)
def test_update_against_the_textbook(settings):
    model, rollouts = small_model(), hand_rollouts(hybrids=settings.get("hybrids", 1))
    f = flags(**settings)
    expected, held = textbook(model, rollouts, f)
    moved, metrics = moved_by(model, rollouts, f)
    assert (moved - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 1e-3
    assert (held > 0) == (settings in SEVERAL and f.clip_ratio < 1)
    if f.prefix_loss not in ("sft", "luffy"):
        assert metrics["clipped_tokens"] == held

    # Every micro-batching is the same, and so is another optimizer.
    for micro_tokens in (1, 70):
        cut, cut_metrics = moved_by(model, rollouts, flags(**settings, micro_tokens=micro_tokens))
        assert (moved - cut).norm() < 1e-4 * moved.norm()
        for key in metrics.keys() - {"grad_norm_prefix"}:
            assert cut_metrics[key] == pytest.approx(metrics[key], rel=1e-3, abs=1e-6), key
    f = flags(**{**settings, "lr": 1e-3})
    expected = textbook(model, rollouts, f, adamw)[0]
    moved = moved_by(model, rollouts, f, adamw)[0]
    assert (moved - expected).norm() < 1e-3 * expected.norm() and expected.norm() > 1e-3


def test_the_textbook_tells_the_arms_apart():
    """Or the test above could not fail: any two differ by ten times its tolerance."""
    model = small_model()
    moves = [textbook(model, hand_rollouts(hybrids=arm.get("hybrids", 1)), flags(**arm))[0]
             for arm in ARMS]
    for i, one in enumerate(moves):
        for other in moves[:i]:
            assert (one - other).norm() > 1e-3 * one.norm()


def test_the_ranking_is_over_the_whole_mini_batch_and_rollouts_of_advantage_0():
    model, rollouts = small_model(), hand_rollouts()
    undecided = rollouts[N:3 * N] + rollouts[4 * N:]            # without the groups of one mind
    prefix_tokens = sum(r.prefix_length for r in undecided)
    alone = moved_by(model, undecided, flags())[1]["prefix_kept"]
    assert alone == math.ceil(0.2 * prefix_tokens)
    assert moved_by(model, rollouts, flags())[1]["prefix_kept"] != alone


def test_limits_collapse_into_each_other():
    model, rollouts = small_model(), hand_rollouts()
    unclipped = moved_by(model, rollouts, flags(prefix_loss="all"))[0]
    for how in ("top", "bottom", "random"):
        full = moved_by(model, rollouts, flags(prefix_loss=how, keep=1.0))[0]
        assert torch.equal(full, unclipped)
        none = moved_by(model, rollouts, flags(prefix_loss=how, keep=0.0))[0]
        assert torch.equal(none, moved_by(model, rollouts, flags(prefix_loss="none"))[0])

    # Without loss a prefix is part of the prompt.
    as_prompt = copy.deepcopy(rollouts)
    for r in as_prompt:
        r.prompt, r.response = r.prompt + r.response[:r.prefix_length], r.response[r.prefix_length:]
        r.prefix_length = 0
    frozen = moved_by(model, rollouts, flags(prefix_loss="none"))[0]
    other = moved_by(model, as_prompt, flags(prefix_loss="all"))[0]
    assert (frozen - other).norm() < 1e-5 * frozen.norm() and frozen.norm() > 1e-2

    # Without hybrids every setting is RFT.
    plain = hand_rollouts(hybrids=0)
    rft = moved_by(model, plain, flags(prefix_loss="none"))[0]
    for settings in ({}, {"prefix_loss": "sft"}, {"prefix_loss": "luffy"}, {"advantage": "code"}):
        assert (rft - moved_by(model, plain, flags(**settings))[0]).norm() <= 1e-6 * rft.norm()


def test_mini_batches_are_whole_groups_and_skip_what_teaches_nothing():
    model, rollouts = small_model(), hand_rollouts()
    assert moved_by(model, rollouts, flags(mini_batches=5))[1]["updates"] == 3  # not 0, not 3
    one_group = moved_by(model, rollouts[N:2 * N], flags())[0]
    two = moved_by(model, rollouts[:2 * N], flags(mini_batches=2))[0]
    assert (two - one_group).norm() < 1e-5 * one_group.norm() and one_group.norm() > 1e-2
    for r in rollouts:
        r.reward = 0.0
    moved, metrics = moved_by(model, rollouts, flags(), adamw)
    assert not moved.any() and metrics["updates"] == metrics["grad_norm"] == metrics["loss"] == 0


@pytest.mark.parametrize("settings", [{"prefix_loss": "all"}, {"prefix_loss": "luffy"}, {}])
def test_the_prefix_gradient_is_measured_without_a_trace(settings):
    model, rollouts = small_model(), hand_rollouts()
    for f in (flags(**settings), flags(**settings, mini_batches=2, micro_tokens=70)):
        plain, metrics = moved_by(model, rollouts, f)
        measured, more = moved_by(model, rollouts, f, measure_prefix=True)
        assert (plain - measured).norm() < 1e-5 * plain.norm()
        assert {**more, "grad_norm_prefix": None} == pytest.approx({**metrics, "grad_norm_prefix": None})
    norm = moved_by(model, rollouts, flags(**settings), measure_prefix=True)[1]["grad_norm_prefix"]
    for r in rollouts:                                          # what is written teaches nothing
        r.response = r.response[:r.prefix_length] or r.response
    own = [r for r in rollouts if not r.prefix_length]
    only = moved_by(model, rollouts, flags(**settings), measure_prefix=True)[1]["grad_norm_prefix"]
    assert norm == pytest.approx(only, rel=1e-4) and norm > 1e-3 and own


def test_a_broken_number_updates_nothing(monkeypatch):
    model, rollouts = small_model(), hand_rollouts()
    real = prefix_rft.response_stats

    def broken(*args, **how):
        return [x * math.nan for x in real(*args, **how)]

    monkeypatch.setattr(prefix_rft, "response_stats", broken)
    state = {"step": 0, "bad": 0}
    for _ in range(9):
        moved, metrics = moved_by(model, rollouts, flags(mini_batches=2))
        assert not moved.any()
        idft.end_step(None, model, None, None, state, metrics, flags())
    with pytest.raises(InputError, match="10 updates in a row"):
        idft.end_step(None, model, None, None, state, metrics, flags())
    monkeypatch.undo()
    monkeypatch.setattr(prefix_rft, "policy_loss",
                        lambda logp, *rest: logp * 0 + math.inf)        # its gradient is 0
    moved, metrics = moved_by(model, rollouts, flags())
    assert not moved.any() and metrics["loss"] == math.inf and metrics["grad_norm"] == 0


def test_activation_checkpointing_changes_no_update():
    model, rollouts = small_model(), hand_rollouts()
    plain = moved_by(model, rollouts, flags())[0]
    idft.checkpoint_activations(model)
    assert (plain - moved_by(model, rollouts, flags())[0]).abs().max() < 1e-6
