"""prefix_rft.py: functions against naive loops, the whole update against a textbook in float64, the
definition of every method, whole runs. The relatives have test_relatives.py; their steps are here,
beside those they are confused with."""

import copy
import functools
import json
import math
import re
import random
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import refusal, run_here, small_model, word_problems
from kill import assert_equal_runs, ended, killed_and_resumed, logged, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import idft
import prefix_rft
import toy
from eval import InputError, new_sampler, parse_flags, stop_ids
from experiments import relatives
from experiments.gradients import gradient
from prefix_rft import (METHODS, Flags, Rollout, advantages, check, describe, entropy_clip,
                        policy_loss, prefix_length, prefix_window, prepare_problems,
                        sample_rollouts, update)
from sampler import Sample


# ---- how much prefix ----------------------------------------------------------------------------

@pytest.mark.parametrize("schedule, start, middle, end", [
    ("cosine", (0.95, 0.95), (0.5, 0.95), (0.05, 0.95)),
    ("linear", (0.95, 0.95), (0.5, 0.95), (0.05, 0.95)),
    ("uniform", (0.05, 0.95), (0.05, 0.95), (0.05, 0.95)),
    ("none", (0, 0), (0, 0), (0, 0))])
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


@pytest.mark.parametrize("log_ratio", [-1000, -100, -1, 0, 0.1, 1, 100, 1000, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [0.2, 1.5, 1e9])
def test_policy_loss_where_the_ratio_overflows(log_ratio, clip):
    """0 for an advantage of 0; else PPO's formula, even where the ratio is infinite. A NaN of a
    broken model is not hidden."""
    for A in (-2.0, 0.0, 2.0):
        for old in (0.0, -3.0):
            logp = torch.tensor([old + log_ratio], requires_grad=True)
            loss = policy_loss(logp, torch.tensor([old]), torch.tensor([A]), clip)
            loss.sum().backward()
            with np.errstate(over="ignore"):
                ratio = np.exp(np.float32(log_ratio))
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            moves = A != 0 and (ratio <= clipped if A > 0 else ratio >= clipped)
            expected = -min(ratio * A, clipped * A) if A else 0
            assert loss.item() == pytest.approx(expected, rel=1e-4)
            assert logp.grad.item() == pytest.approx(-ratio * A if moves else 0, rel=1e-4)
    broken = policy_loss(torch.tensor([math.nan]), torch.zeros(1), torch.ones(1), clip)
    assert broken.isnan().all()
    one, other = (torch.tensor([x], requires_grad=True) for x in (-math.inf, math.nan))
    for logp in (one, other):
        loss = policy_loss(logp, torch.tensor([-math.inf]), torch.zeros(1), clip)
        loss.sum().backward()
        assert loss == 0 and logp.grad == 0


# ---- the whole update, on rollouts written by hand ----------------------------------------------

V, N, ROOM = 40, 4, 12


def hand_rollouts(seed=0, hybrids=1):
    """Five groups of N rollouts of unequal lengths, the last ones hybrid. Group 0 is all wrong,
    group 3 all right, group 4 has no demonstration."""
    rng = np.random.default_rng(seed)
    rollouts = []
    groups = [(0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 1)]
    for g, rewards in enumerate(groups):
        prompt = rng.integers(2, V, rng.integers(1, 8)).tolist()
        for i, reward in enumerate(rewards):
            response = rng.integers(2, V, rng.integers(3, ROOM)).tolist() + [1]
            r = Rollout(prompt, response, "", finished=i != 1, reward=float(reward))
            if i >= N - hybrids and g != 4:
                r.prefix_length = int(rng.integers(2, len(response)))
                r.demo_length = len(response)
            rollouts.append(r)
    return rollouts


def flags(**settings):
    settings = {**relatives.METHODS.get(settings.get("method"), {}), **settings}
    return Flags(**{"n": N, "lr": 1.0, "max_new_tokens": ROOM, "steps": 10, "mini_batches": 1,
                    **settings})


def starting(method):
    """The functions with which a relative replaces those of sample_rollouts."""
    return relatives.VARIANTS.get(method, {}).get("starting", {})


def learning(method):
    """The functions with which a relative replaces those of update."""
    return relatives.VARIANTS.get(method, {}).get("learning", {})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.0, eps=1e-3)      # or rounding errors become steps


def moved_by(model, rollouts, flags, make=sgd):
    """What update() adds to the weights, as one vector, and its metrics."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    metrics = update(other, make(other.parameters()), copy.deepcopy(rollouts), flags, generator,
                     **learning(flags.method))
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
    held = 0
    for share in np.array_split(range(len(groups)), flags.mini_batches):
        mini_batch = [(r, groups[i]) for i in share for r in groups[i]]

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
                if given and flags.method in ("static", "uft"):
                    loss = loss - 0.001 * logp
                elif given and flags.method == "luffy":
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
        {"method": "static"}, {"method": "luffy", "clip_ratio": 0.2},
        {"method": "luffy", "advantage": "code"}, {"method": "uft", "hybrids": 4},
        {"hybrids": 0, "schedule": "none"}]
# Steps so large that the ratio is far from 1 and the clip holds back.
SEVERAL = [{"mini_batches": 5, "lr": 3.0, **more} for more in (
    {}, {"advantage": "code", "prefix_loss": "all"}, {"method": "luffy"},
    {"method": "static"}, {"prefix_loss": "random"}, {"mini_batches": 2, "temperature": 0.7})]


def name_of(settings):
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "paper"


@functools.cache
def case(number):
    """A model, rollouts, settings, and what the textbook makes of them."""
    settings = (ARMS + SEVERAL)[number]
    model, rollouts = small_model(), hand_rollouts(hybrids=settings.get("hybrids", 1))
    return model, rollouts, settings, *textbook(model, rollouts, flags(**settings))


@pytest.mark.parametrize("number", range(len(ARMS + SEVERAL)),
                         ids=lambda number: name_of((ARMS + SEVERAL)[number]))
def test_update_against_the_textbook(number):
    model, rollouts, settings, expected, held = case(number)
    f = flags(**settings)
    moved, metrics = moved_by(model, rollouts, f)
    assert (moved - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 1e-3
    assert (held > 0) == (settings in SEVERAL and f.clip_ratio < 1)
    if f.method != "static":                                    # which has no ratio in its prefix
        assert metrics["clipped_tokens"] == held

    # Every micro-batching is the same, and so is another optimizer.
    for micro_tokens in (1, 70):
        cut, cut_metrics = moved_by(model, rollouts, flags(**settings, micro_tokens=micro_tokens))
        assert (moved - cut).norm() < 1e-4 * moved.norm()
        for key in metrics:
            assert cut_metrics[key] == pytest.approx(metrics[key], rel=1e-3, abs=1e-6), key
    f = flags(**{**settings, "lr": 1e-3})
    expected = textbook(model, rollouts, f, adamw)[0]
    moved = moved_by(model, rollouts, f, adamw)[0]
    assert (moved - expected).norm() < 1e-3 * expected.norm() and expected.norm() > 1e-3


def test_the_textbook_tells_the_arms_apart():
    """Or the test above could not fail: any two differ by five times its tolerance."""
    moves = [case(number)[3] for number in range(len(ARMS))]
    for i, one in enumerate(moves):
        for other in moves[:i]:
            assert (one - other).norm() > 5e-4 * one.norm()


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
    for settings in ({}, {"method": "static"}, {"method": "luffy"}, {"advantage": "code"}):
        assert (rft - moved_by(model, plain, flags(**settings))[0]).norm() <= 1e-6 * rft.norm()


def test_mini_batches_are_whole_groups_and_skip_what_teaches_nothing():
    model, rollouts = small_model(), hand_rollouts()
    assert moved_by(model, rollouts, flags(mini_batches=5))[1]["updates"] == 3  # not 0, not 3
    teaching = rollouts[N:3 * N] + 2 * rollouts[4 * N:]
    for count in (1, 2, 3, 4):                                  # 3 do not divide 4 groups
        update_many = moved_by(model, teaching, flags(mini_batches=count))[1]
        assert update_many["updates"] == count
    one_group = moved_by(model, rollouts[N:2 * N], flags())[0]
    two = moved_by(model, rollouts[:2 * N], flags(mini_batches=2))[0]
    assert (two - one_group).norm() < 1e-5 * one_group.norm() and one_group.norm() > 1e-2
    for r in rollouts:
        r.reward = 0.0
    moved, metrics = moved_by(model, rollouts, flags(), adamw)
    assert not moved.any() and metrics["updates"] == metrics["grad_norm"] == metrics["loss"] == 0


def test_the_gradient_of_prefixes_is_what_frozen_prefixes_lack():
    """experiments/gradients.py against one backward pass over the prefix tokens alone."""
    for scale in (1, 100):                                      # unclipped, and clipped to norm 1
        model, rollouts = small_model(), hand_rollouts()
        for r in rollouts:
            r.reward *= scale
        found = gradient(model, rollouts, flags(), "all")
        found -= gradient(model, rollouts, flags(), "none")
        for i, r in enumerate(rollouts):
            if r.prefix_length > 0:
                logp = torch.stack([logp for logp, _ in look(model, r, 1.0)[:r.prefix_length]])
                group = rollouts[i // N * N:][:N]
                adv = r.reward - sum(other.reward for other in group) / N
                (-adv * logp.sum() / (len(rollouts) * ROOM)).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (found - expected).norm() < 1e-3 * expected.norm() and expected.norm() > 1e-3 * scale


def test_a_broken_number_updates_nothing(monkeypatch):
    model, rollouts = small_model(), hand_rollouts()
    real = prefix_rft.batch_stats

    def broken(*args, **how):
        return [x * math.nan for x in real(*args, **how)]

    monkeypatch.setattr(prefix_rft, "batch_stats", broken)
    run = idft.Run(flags(), model, None, None)
    for _ in range(9):
        moved, metrics = moved_by(model, rollouts, flags(mini_batches=2))
        assert not moved.any()
        idft.end_step(None, model, None, None, run.state, metrics, flags())
    with pytest.raises(InputError, match="10 updates in a row"):
        idft.end_step(None, model, None, None, run.state, metrics, flags())
    monkeypatch.undo()
    monkeypatch.setattr(prefix_rft, "policy_loss",
                        lambda logp, *rest: logp * 0 + math.inf)        # its gradient is 0
    moved, metrics = moved_by(model, rollouts, flags())
    assert not moved.any() and metrics["loss"] == math.inf and metrics["grad_norm"] == 0


# ---- rollouts -----------------------------------------------------------------------------------

def problems_of(tokenizer, n=6, solution=None, answer=None, room=100):
    """Prepared toy problems; `solution` and `answer` (functions of a problem) replace its own."""
    rows = toy.problems("train", n)
    for row in rows:
        demo, right = row["solution"], row["answer"]
        row["solution"] = solution(row) if solution else demo
        row["answer"] = answer(row) if answer else right
    return prepare_problems(tokenizer, rows, room)


def roll(base, problems, step=0, **settings):
    model, tokenizer = base
    f = flags(**{"max_new_tokens": 48, "batch": len(problems), **settings})
    sampler, _ = new_sampler(model, [p["prompt"] for p in problems], f.max_new_tokens, 16)
    return sample_rollouts(sampler, tokenizer, problems, f, step, stop_ids(model, tokenizer),
                           **starting(f.method))


def starts(small_base, problems, step=0, **settings):
    """Rollouts of which only the start is looked at: the model writes an end token."""
    def sampler(contexts, *args, **how):
        return [Sample([small_base[1].eos_token_id], [0.0], [0.0], True) for _ in contexts]

    f = flags(**{"max_new_tokens": 48, **settings})
    return sample_rollouts(sampler, small_base[1], problems, f, step, [], **starting(f.method))


@pytest.mark.parametrize("step", [0, 5, 9])
def test_rollouts_start_with_the_demonstration(small_base, step):
    tokenizer = small_base[1]
    problems = problems_of(tokenizer, n=20)
    rollouts = roll(small_base, problems, step)
    low, high = prefix_window(step, 10)
    assert len(rollouts) == 20 * N
    for i, r in enumerate(rollouts):
        problem = problems[i // N]
        demo = problem["demos"][0]
        assert (r.prompt, r.answer) == (problem["prompt"], problem["answer"])
        assert (r.demo_length > 0) == (i % N == N - 1)          # the last of a group is hybrid
        assert r.prefix_length < len(r.response) <= 48
        if r.demo_length:
            assert r.response[:r.prefix_length] == demo[:r.prefix_length]
            assert r.demo_length == len(demo)
            longest = min(len(demo) - 1, math.floor(high * len(demo)))
            assert math.floor(low * len(demo)) - 1 <= r.prefix_length <= longest
        else:
            assert r.prefix_length == 0
        assert r.finished == (r.response[-1] == tokenizer.eos_token_id) and r.mean_entropy > 0
        text = tokenizer.decode(r.response, skip_special_tokens=True)
        assert not r.reward or (r.finished and f"\\boxed{{{r.answer}}}" in text)
    assert step > 0 or sum(r.reward for r in rollouts) > 0      # a word from the end of a solution
    plain = [tuple(r.response) for r in rollouts if not r.demo_length]
    assert len(set(plain)) > len(plain) / 2                     # the rollouts of a problem differ


def test_responses_that_did_not_end_earn_nothing(small_base, monkeypatch):
    """Even with the right answer in them."""
    monkeypatch.setattr(prefix_rft, "rewards", lambda texts, answers: [1.0] * len(texts))
    for room in (3, 30):
        problems = problems_of(small_base[1], 12, room=room)
        rollouts = roll(small_base, problems, max_new_tokens=room)
        for r in rollouts:
            assert len(r.response) <= room and r.reward == r.finished
            assert r.finished or len(r.response) == room
            assert room == 30 or any(not r.finished for r in rollouts)


def test_rollouts_follow_the_seed_alone(small_base):
    problems = problems_of(small_base[1])
    torch.manual_seed(1)
    one = roll(small_base, problems)
    torch.manual_seed(2)
    assert roll(small_base, problems) == one
    assert roll(small_base, problems, seed=1) != one and roll(small_base, problems, step=1) != one


def test_problems_without_a_demonstration_are_plain(small_base):
    plain = roll(small_base, problems_of(small_base[1], solution=lambda row: None))
    rft = roll(small_base, problems_of(small_base[1]), **METHODS["rft"])
    assert plain == rft and not any(r.demo_length for r in plain)


def test_one_of_several_demonstrations_is_drawn_each_time(small_base):
    problems = problems_of(small_base[1], n=10, solution=lambda row: [
        row["solution"], "\\boxed{" + row["answer"] + "}"])
    short = len(problems[0]["demos"][1])
    assert all(len(problem["demos"]) == 2 for problem in problems)
    for step in range(2):
        drawn = {r.demo_length for r in roll(small_base, problems, step) if r.demo_length}
        assert short in drawn and len(drawn) > 1


def test_a_demonstration_without_room_to_end_is_left_out_and_said(small_base, capsys):
    """It would be cut, earn 0 and be taught as wrong."""
    tokenizer = small_base[1]
    everything = problems_of(tokenizer, 20)
    assert capsys.readouterr().out == ""
    lengths = sorted(len(problem["demos"][0]) for problem in everything)
    room = lengths[9]
    count = sum(length > room for length in lengths)
    fitting = problems_of(tokenizer, 20, room=room)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith(f"{count} demonstrations are longer than "
                                                 f"--max_new_tokens {room}")
    assert [len(p["demos"]) for p in fitting] == [len(p["demos"][0]) <= room for p in everything]
    assert [p["prompt"] for p in fitting] == [p["prompt"] for p in everything]
    assert everything[0]["demos"][0][-1] == tokenizer.eos_token_id
    for method in ("prefix_rft", "luffy"):
        for r in roll(small_base, fitting, max_new_tokens=room, method=method):
            assert r.demo_length <= room


# ---- the methods: a test for each that fails for its neighbour -----------------------------------

def hybrid_counts(rollouts):
    """How many of the rollouts of every problem start from a demonstration."""
    return [sum(r.demo_length > 0 for r in rollouts[i:i + N]) for i in range(0, len(rollouts), N)]


def test_prefix_rl_starts_all_rollouts_of_half_of_the_problems_and_frozen_one_of_each(small_base):
    """And DR-PO all of all."""
    problems = problems_of(small_base[1], 60)
    assert hybrid_counts(starts(small_base, problems, **METHODS["dr_po"])) == [N] * 60
    assert hybrid_counts(starts(small_base, problems, **METHODS["frozen"])) == [1] * 60
    for step in (0, 9):                                         # uniform throughout
        rollouts = starts(small_base, problems, step, **METHODS["prefix_rl"])
        counts = hybrid_counts(rollouts)
        assert set(counts) == {0, N} and 15 < counts.count(N) < 45
        shares = [r.prefix_length / r.demo_length for r in rollouts if r.demo_length]
        assert min(shares) < 0.25 and max(shares) > 0.75
    for method in ("frozen", "prefix_rl", "dr_po"):             # and none learns from a prefix
        rollouts = hand_rollouts()
        update(small_model(), sgd(small_model().parameters()), rollouts, flags(**METHODS[method]))
        assert not any(r.adv[:r.prefix_length].any() for r in rollouts)
        assert any(r.adv[r.prefix_length:].any() for r in rollouts if r.prefix_length)


def test_describe_and_show(small_base, capsys):
    rollouts = roll(small_base, problems_of(small_base[1]), prefix_loss="all")
    about = describe(rollouts)
    hybrid = [r for r in rollouts if r.demo_length]
    plain = [r for r in rollouts if not r.demo_length]
    assert about["reward"] == np.mean([r.reward for r in plain])
    assert about["reward_hybrid"] == np.mean([r.reward for r in hybrid])
    shares = [r.prefix_length / r.demo_length for r in hybrid]
    assert about["prefix_share"] == pytest.approx(np.mean(shares))
    assert about["overlong"] == pytest.approx(np.mean([not r.finished for r in rollouts]))
    assert about["tokens"] + about["prefix_tokens"] == sum(len(r.response) for r in rollouts)
    assert about["entropy"] == pytest.approx(np.mean([r.mean_entropy for r in rollouts]))
    nothing = describe(plain)
    assert math.isnan(nothing["reward_hybrid"]) and math.isnan(nothing["prefix_share"])
    luffy = roll(small_base, problems_of(small_base[1]), method="luffy")
    wrote = [r.mean_entropy for r in luffy if not r.demo_length]     # a demonstration has none
    assert describe(luffy)["entropy"] == pytest.approx(np.mean(wrote))

    for r in rollouts:
        r.reward = float(r.demo_length > 0)
    update(copy.deepcopy(small_base[0]), sgd(small_base[0].parameters()), rollouts,
           flags(keep=0.2, max_new_tokens=48))
    prefix_rft.show_rollouts(small_base[1], rollouts, "here")
    title, shown = capsys.readouterr().out.splitlines()
    assert "here" in title and "reward 1, advantage +0.75" in title
    before, after = shown.split(" |")
    assert "[" in before and "[" not in after
    texts = [small_base[1].decode(r.response) for r in rollouts]
    assert re.sub(r"[\[\]]", "", before + after).strip() in texts

    # One of its problems right by a plain rollout alone: a failed hybrid follows the success.
    rollouts[0].reward, rollouts[N - 1].reward = 1.0, 0.0
    update(copy.deepcopy(small_base[0]), sgd(small_base[0].parameters()), rollouts,
           flags(keep=1.0, max_new_tokens=48))
    prefix_rft.show_rollouts(small_base[1], rollouts, "here")
    titles = capsys.readouterr().out.splitlines()[::2]
    assert [title.split("; ")[1] for title in titles] == ["reward 1, advantage +0.75",
                                                          "reward 0, advantage -0.25"]
    prefix_rft.show_rollouts(small_base[1], plain, "here")                  # nothing to show
    assert capsys.readouterr().out == ""


# ---- whole runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def world(small_base, tmp_path_factory):
    """The small base as a checkpoint, and two files of toy problems: a real model but for size."""
    folder = tmp_path_factory.mktemp("world")
    for part in small_base:
        part.save_pretrained(folder / "base")
    for name, split, n in (("train", "train", 12), ("test", "easy", 4)):
        lines = [json.dumps(row) + "\n" for row in toy.problems(split, n)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def arguments(world, **more):
    settings = {"model": world / "base", "data": world / "train.jsonl", "steps": 3, "batch": 4,
                "n": 4, "lr": 1e-3, "max_new_tokens": 48, "rows": 16, "low_end": 0.9, **more}
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def test_two_runs_with_one_seed_are_one_and_one_sampler_serves_all(world, tmp_path, slabs, capsys):
    """Rollouts and evaluations, of one width: a second slab would not fit on a GPU."""
    argv = arguments(world, eval_data=world / "test.jsonl", eval_every=2)
    for name, noise in (("one", 1), ("other", 2)):
        torch.manual_seed(noise), np.random.seed(noise), random.seed(noise)
        run_here(prefix_rft, *argv, "--out", tmp_path / name)
    assert slabs == [16, 16]
    assert "A hybrid rollout of step 1:" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "one", tmp_path / "other")
    rows = logged(tmp_path / "one")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert [[key for key in ("before", "accuracy", "after") if key in row] for row in rows] == [
        ["before"], [], ["accuracy"], [], ["after"]]
    assert rows[1]["updates"] == 2                              # something was learnt
    run_here(prefix_rft, *arguments(world, seed=1), "--out", tmp_path / "another")
    assert logged(tmp_path / "another")[1]["loss"] != rows[1]["loss"]

    # A finished run ends again, the same; another method may not go on with it.
    run_here(prefix_rft, *argv, "--out", tmp_path / "one", "--resume")
    assert logged(tmp_path / "one") == rows
    for more, sentence in ((["--resume"], "has --method prefix_rft"), ([], "already holds")):
        assert sentence in refusal(capsys, prefix_rft, *argv, "--method", "dr_po",
                                   "--out", tmp_path / "one", *more)


def test_killed_and_resumed_is_undisturbed_bit_for_bit(toy_base, world, tmp_path):
    """On the toy, whose first run pre-trains or loads the base, and whose resumed run does not."""
    argv = ["--steps", 8, "--batch", 4, "--n", 4, "--save_every", 2, "--eval_every", 3,
            "--eval_data", world / "test.jsonl", "--prefix_loss", "random"]
    whole = start("prefix_rft", [*argv, "--out", tmp_path / "whole"])          # beside the other
    hits = killed_and_resumed("prefix_rft", argv, tmp_path / "killed", kills=2)
    ended(whole)
    assert hits == 2
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")
    rows = logged(tmp_path / "killed")
    assert [row["step"] for row in rows] == [0, *range(1, 9), 8]
    assert sum(row.get("updates", 0) for row in rows) > 5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(world, tmp_path, method):
    run_here(prefix_rft, *arguments(world, steps=2, method=method), "--out", tmp_path)
    first, second = logged(tmp_path)[1:3]
    saved = torch.load(tmp_path / "checkpoint" / "trainer.pt", weights_only=True)["flags"]
    assert {key: saved[key] for key in METHODS[method]} == METHODS[method]
    assert (first["reward_hybrid"] is None) == (method == "rft")
    assert math.isfinite(second["loss"]) and math.isfinite(second["grad_norm"])
    if method not in ("rft", "prefix_rl", "dr_po"):
        assert first["updates"] > 0 and first["grad_norm"] > 0


def test_a_real_model_on_real_text(tiny_checkpoint, tmp_path, capsys):
    """A BPE tokenizer and a model that earns nothing, but every stage does its work."""
    lines = [json.dumps(row) + "\n" for row in word_problems(12)]
    (tmp_path / "train.jsonl").write_text("".join(lines[:8]))
    (tmp_path / "test.jsonl").write_text("".join(lines[8:]))
    out = tmp_path / "run"
    run_here(relatives, *arguments(tmp_path, model=tiny_checkpoint, steps=2, max_new_tokens=80,
                                   eval_data=tmp_path / "test.jsonl", method="uft", out=out))
    shown = capsys.readouterr().out
    assert "before   after" in shown and "test" in shown and "longer" not in shown
    rows = logged(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 2] and rows[0]["before"].keys() == {"test"}
    assert rows[1]["prefix_tokens"] > 100 and rows[1]["updates"] == 2 and rows[1]["entropy"] > 1
    trained, start = (AutoModelForCausalLM.from_pretrained(place)
                      for place in (out / "checkpoint", tiny_checkpoint))
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))


def test_an_offloaded_run_on_a_model_that_reads_less_than_asked_for(world, tmp_path, capsys):
    """The bf16 model on the card is sampled from, without a twin; saved are float32 weights. The
    paper's 8,192 tokens become what a model of 96 positions has beside its prompts."""
    shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 96}))
    argv = [*arguments(world, model=tmp_path / "base", max_new_tokens=8192, steps=2, batch=2),
            "--offload", "--out", tmp_path / "run"]
    with mock.patch.object(idft, "new_sampler", wraps=new_sampler) as built:
        run_here(prefix_rft, *argv)
    model = built.call_args.args[0]
    assert model.dtype == torch.bfloat16 and new_sampler(*built.call_args.args)[0].model is model
    assert "--max_new_tokens 8192 becomes" in capsys.readouterr().out
    rows = logged(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 2] and 0 < rows[1]["length"] < 96
    weights = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    run_here(prefix_rft, *argv, "--resume")                     # finished: it ends again, the same
    assert logged(tmp_path / "run") == rows


def test_rft_after_sft_starts_from_the_checkpoint_of_idft(world, tmp_path):
    run_here(idft, "--model", world / "base", "--data", world / "train.jsonl", "--loss", "sft",
             "--lr", 1e-3, "--steps", 2, "--batch", 4, "--out", tmp_path / "sft")
    run_here(prefix_rft, *arguments(world, model=tmp_path / "sft" / "checkpoint", method="rft",
                                    steps=1, lr=0), "--out", tmp_path / "rft")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint")
                  for name in ("sft", "rft"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("more, sentence", [
    ({"keep": 1.5}, "--keep 1.5 is out of range"),
    ({"n": 0}, "--n 0 is out of range"),
    ({"clip_ratio": 0}, "--clip_ratio 0.0 is out of range"),
    ({"method": "ppo"}, "invalid choice: 'ppo'"),
    ({"schedule": "step"}, "invalid choice: 'step'"),
    ({"advantage": "grpo"}, "invalid choice: 'grpo'"),
    ({"kep": 0.2}, "unrecognized arguments: --kep"),
    ({"low_end": 0.96}, "--low_end 0.96 is out of range"),
    ({"n": 1}, "--n 1 is out of range"),
    ({"hybrids": 5}, "--hybrids 5 is more than --n 4"),
    ({"hybrids": 0}, "--hybrids 0 contradicts --schedule cosine"),
    ({"method": "rft", "hybrids": 1}, "--hybrids 1 contradicts --schedule none"),
    ({"method": "rft", "schedule": "linear"}, "--hybrids 0 contradicts --schedule linear"),
    ({"method": "luffy"}, "invalid choice: 'luffy'"),
    ({"advantage": "code", "hybrids": 4}, "needs a plain rollout: lower --hybrids 4"),
    ({"advantage": "code", "method": "dr_po"}, "needs a plain rollout: lower --hybrids -1"),
    ({"mini_batches": 5}, "--mini_batches 5 is more than --batch 4"),
    ({"data": "no.jsonl"}, "no.jsonl cannot be read"),
    ({"eval_data": "no.jsonl"}, "no.jsonl cannot be read"),
    ({"data": "{tmp}/bad.jsonl"}, "bad.jsonl line 2: answer (answer|final_answer|ground_truth)"),
    ({"data": "{tmp}/bare.jsonl"}, "bare.jsonl has no solution for a rollout to start from"),
    ({"model": "no/such/model"}, "--model no/such/model"),
    ({"device": "tpu"}, "--device tpu: PyTorch finds none here"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(more, sentence, world, tmp_path, capsys):
    (tmp_path / "bare.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "bad.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n'
                                        '{"problem": "2 + 2?"}\n')
    more = {key: str(value).format(tmp=tmp_path) for key, value in more.items()}
    before = set(tmp_path.rglob("*"))
    argv = arguments(world, **more)
    assert sentence in refusal(capsys, prefix_rft, *argv, "--out", tmp_path / "run")
    assert set(tmp_path.rglob("*")) == before


def test_defaults_are_the_papers_a_method_sets_its_row_and_what_is_typed_wins(capsys):
    def parse(*argv):
        return parse_flags(Flags, [*argv], prefix_rft.TOY, METHODS)

    real = parse("--data", "x.jsonl")
    assert (real.schedule, real.hybrids, real.prefix_loss) == ("cosine", 1, "top")
    assert (real.advantage, real.n, real.keep, real.clip_ratio) == ("paper", 8, 0.2, 0.2)
    assert (real.lr, real.steps, real.batch, real.max_new_tokens) == (1e-6, 500, 128, 8192)
    assert (real.low_end, real.temperature) == (0.05, 1.0)
    assert real.mini_batches == 2                               # with 1 the clip cannot act
    for method, row in METHODS.items():
        found = parse("--method", method)
        assert {key: getattr(found, key) for key in row} == row
        assert found.lr == prefix_rft.TOY["lr"]
        check(found, [{"solution": "s"}])
    assert parse("--method", "dr_po", "--schedule", "linear").schedule == "linear"
    assert parse("--lr", "0.5").lr == 0.5
    with pytest.raises(SystemExit):                             # --help knows all of them
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"; toy: {prefix_rft.TOY['lr']} (default: 1e-06)" in shown
    assert "rft: none" in shown and "prefix_rl: uniform" in shown
