"""The comparisons: what is tuned, resumed and counted, what each arm is, and the preference losses."""

import copy
import json
import math
import multiprocessing
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import idft
import prefix_rft
import toy
from conftest import ROOT                                              # puts the root on the path
from ddt import response_stats
from eval import InputError, new_sampler, parse_flags, prompt_ids
from experiments import (distill, draw, experts, gpu, hpt, losses, online, preference, relatives,
                         rl, sweep, texts, weights)
from test_toy import answer_of, play, question, steps_of

REAL_PROBLEMS = toy.problems


@pytest.fixture
def small_world(small_base, monkeypatch):
    """The toy with a weak base, 8 problems a set, 3 steps."""
    def problems(split, n=256, seed=0):
        return REAL_PROBLEMS(split, min(n, 8), seed)

    monkeypatch.setattr(toy, "problems", problems)
    monkeypatch.setattr(toy, "base_model", lambda seed=0: (copy.deepcopy(small_base[0]), small_base[1]))
    for defaults, batch in ((prefix_rft.TOY, 2), (idft.TOY, 4), (online.TOY, 4)):
        monkeypatch.setitem(defaults, "steps", 3)
        monkeypatch.setitem(defaults, "batch", batch)
        monkeypatch.setitem(defaults, "max_new_tokens", 40)


def settings(arm, **more):
    return {"steps": 3, "batch": 2, "max_new_tokens": 40, "mini_batches": 2, **arm, **more}


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


# ---- the sweep ----------------------------------------------------------------------------------

# Of every rate: valid, valid_2, valid_easy; the rate to be chosen, and the rates tried.
TUNING = {
    "clear": ({3e-4: (0.1, 0, 1), 1e-3: (0.9, 0, 0), 3e-3: (0.3, 1, 1)}, 1e-3, 3),
    "tied, the second set decides": (
        {3e-4: (0.5, 0.1, 0), 1e-3: (0.5, 0.4, 0), 3e-3: (0.2, 0.9, 0)}, 1e-3, 3),
    "tied twice, the first": (
        {3e-4: (0.2, 0.9, 0), 1e-3: (0.7, 0.4, 0), 3e-3: (0.7, 0.4, 1)}, 1e-3, 3),
    "the grid grows upwards": (
        {3e-4: (0.1, 0, 0), 1e-3: (0.2, 0, 0), 3e-3: (0.3, 0, 0), 1e-2: (0.4, 0, 0),
         3e-2: (0.1, 0, 0)}, 1e-2, 5),
    "and downwards": (
        {3e-4: (0.3, 0, 0), 1e-3: (0.2, 0, 0), 3e-3: (0.1, 0, 0), 1e-4: (0.3, 0, 0)}, 3e-4, 4),
    "below 0.05 easy problems count": (
        {3e-4: (0.0, 0, 0.9), 1e-3: (0.02, 0, 1.0), 3e-3: (0.04, 0, 0.2)}, 1e-3, 3),
    "from 0.05 on they do not": (
        {3e-4: (0.04, 0, 1.0), 1e-3: (0.05, 0, 0.0), 3e-3: (0.04, 0, 1.0)}, 1e-3, 3),
}
ARMS = {**{name: {"colour": name} for name in TUNING},
        "like clear": {"colour": "clear", "twist": 1, "tune_like": "clear"},
        "fixed": {"lr": 0.0}}


class Runner:
    """A fake run function: notes its calls, may stop the program before one."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def __call__(self, arm, lr, seed, stage):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((arm.get("colour"), arm.get("twist"), lr, seed, stage))
        if stage == "tune":
            figures = TUNING[arm["colour"]][0][lr]
            return dict(zip(("valid", "valid_2", "valid_easy"), figures))
        return {"hard": lr * 100 + seed}


def compare(path, runner, **flags):
    sweep.sweep(path, runner, ARMS, {"steps": 7}, sweep.Flags(**flags), {"hard": "hard"})


def test_every_arm_is_tuned_alone_and_reported_on_other_seeds(tmp_path, capsys):
    runner = Runner()
    compare(tmp_path / "rows.jsonl", runner)
    for name, (known, best, tried) in TUNING.items():
        tuned = [call for call in runner.calls if call[0] == name and call[4] == "tune"]
        assert [(lr, seed) for _, _, lr, seed, _ in tuned] == [(lr, 5) for lr in list(known)[:tried]]
        reported = [call for call in runner.calls if call[:2] == (name, None) and call[4] == "report"]
        assert [(lr, seed) for _, _, lr, seed, _ in reported] == [(best, s) for s in range(5)]
    # An inheriting arm is not tuned, its parent's rate is used; an arm that learns nothing neither.
    assert [call[2:] for call in runner.calls if call[1] == 1] == [
        (1e-3, seed, "report") for seed in range(5)]
    assert [call[2:] for call in runner.calls if call[0] is None] == [
        (0.0, seed, "report") for seed in range(5)]

    # The table: mean and standard deviation of 0..4 are 2 and 1.58.
    lines = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert lines[0] == "| arm | lr | seeds | hard |"
    assert "| clear | 1e-03 | 5 | 2.10 ± 1.58 |" in lines
    assert "| like clear | 1e-03 (of clear) | 5 | 2.10 ± 1.58 |" in lines
    assert "| fixed | - | 5 | 2.00 ± 1.58 |" in lines


def test_two_stages_are_tuned_together(tmp_path, capsys):
    """The best point, (3e-3, 3e-4, 0.25), is off the first grid: all its neighbours were tried."""
    points = []

    def run(arm, lr, seed, stage):
        point = arm["sft_lr"], lr, arm["supervised"]
        if stage == "report":
            return {"hard": 0.5, "point": point}
        points.append(point)
        away = (abs(math.log10(point[0] / 3e-3)) + abs(math.log10(point[1] / 3e-4))
                + abs(point[2] - 0.25))
        return {"valid": 1 - away / 10, "valid_2": 0, "valid_easy": 0}

    arms = {"both": {"two_stages": True}, "worse texts": {"two_stages": True, "tune_like": "both"}}
    sweep.sweep(tmp_path / "rows.jsonl", run, arms, {}, sweep.Flags(), {"hard": "hard"})
    grid = [(a, b, 0.5) for a in sweep.GRID for b in sweep.GRID]
    assert points[:9] == grid and len(set(points)) == len(points)
    assert {(3e-3, 3e-4, 0.25), (1e-2, 3e-4, 0.25), (1e-3, 3e-4, 0.25), (3e-3, 1e-4, 0.25),
            (3e-3, 1e-3, 0.25), (3e-3, 3e-4, 0.5)} <= set(points)
    rows = sweep.load_results(tmp_path / "rows.jsonl")
    reported = [row for row in rows if row["stage"] == "report"]
    assert len(reported) == 10 and {tuple(row["point"]) for row in reported} == {(3e-3, 3e-4, 0.25)}
    table = capsys.readouterr().out
    assert "| both | 3e-03 for 25%, then 3e-04 | 5 |" in table
    assert "| worse texts | 3e-03 for 25%, then 3e-04 (of both) | 5 |" in table


@pytest.mark.parametrize("stop_at", [0, 1, 4, 20, 60])
def test_a_stopped_comparison_goes_on(tmp_path, capsys, stop_at):
    undisturbed, stopped, rest = Runner(), Runner(stop_at), Runner()
    compare(tmp_path / "one.jsonl", undisturbed)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "two.jsonl", stopped)
    compare(tmp_path / "two.jsonl", rest)
    assert stopped.calls + rest.calls == undisturbed.calls
    one, two = (sweep.load_results(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    for row in one + two:
        del row["seconds"]
    assert one == two


def test_another_budget_is_another_run(tmp_path, capsys):
    path, again = tmp_path / "rows.jsonl", Runner()
    sweep.sweep(path, Runner(), {"fixed": {"lr": 0.0}}, {"steps": 7}, sweep.Flags(seeds=2), {})
    sweep.sweep(path, again, {"fixed": {"lr": 0.0}}, {"steps": 8}, sweep.Flags(seeds=2), {})
    assert len(again.calls) == 2


def test_arms_and_table_flags(tmp_path, capsys):
    runner = Runner()
    compare(tmp_path / "rows.jsonl", runner, arms=["like clear"], seeds=2)
    assert [call[0] for call in runner.calls] == ["clear"] * 5      # three rates, two seeds
    compare(tmp_path / "rows.jsonl", runner, table=True)
    assert len(runner.calls) == 5
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert table.count("\n") == 3 and "| like clear | 1e-03 (of clear) | 2 |" in table
    with pytest.raises(InputError, match="--arms nobody is unknown.*like clear"):
        compare(tmp_path / "rows.jsonl", runner, arms=["nobody"])


def append_rows(path, number):
    for i in range(200):
        sweep.add_result(path, {"process": number, "i": i, "text": "x" * 500})


def test_two_processes_append_to_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    jobs = [multiprocessing.get_context("fork").Process(target=append_rows, args=(path, number))
            for number in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    found = [(row["process"], row["i"]) for row in sweep.load_results(path)]
    assert sorted(found) == [(number, i) for number in (0, 1) for i in range(200)]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"arm": 1}\n{"arm"\n')
    with pytest.raises(InputError, match="rows.jsonl line 2 is not valid JSON"):
        sweep.load_results(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("curve, height", [
    ([[0, 0.3]], 0.3), ([[0, 0.5], [20, 0.5], [50, 0.5]], 0.5), ([[0, 0], [100, 1]], 0.5),
    ([[0, 0], [20, 1], [100, 1]], 0.9)])
def test_area_under_the_curve(curve, height):
    assert sweep.area(curve) == pytest.approx(height)


def test_learning_curve_looks_before_between_and_after(monkeypatch):
    learnt = []
    monkeypatch.setattr(sweep, "LOOK_EVERY", 20)
    monkeypatch.setattr(sweep, "greedy_accuracy", lambda *args, **more: {
        "hard": len(learnt) / 50, "easy": 1 - len(learnt) / 100})
    found = sweep.learning_curve(None, None, 50, learnt.append, 9, None)
    assert learnt == list(range(50))
    assert found["curve"] == [[0, 0], [20, 0.4], [40, 0.8], [50, 1.0]]
    assert found["easy_curve"] == [[0, 1], [20, 0.8], [40, 0.6], [50, 0.5]]
    assert found["steps_to_half"] == 40 and found["auc"] == pytest.approx(0.5)
    assert found["easy_at_0.3"] == pytest.approx(0.85)


@pytest.mark.parametrize("heights, expected", [
    ([0.3, 0.1], 1.0), ([0.0, 0.6, 0.2], 0.5), ([0.1, 0.2, 0.4], 0.25), ([0.1, 0.2, 0.29], None)])
def test_one_curve_where_another_reaches_a_level(heights, expected):
    curve = [[10 * i, height] for i, height in enumerate(heights)]
    other = [[0, 1.0], [10, 0.0], [20, 0.5]]
    assert sweep.value_at(0.3, curve, other) == (expected and pytest.approx(expected))


@pytest.mark.parametrize("values, cell", [
    ([0.5], "0.50"), ([0, 1], "0.50 ± 0.71"), ([None, 20, 40], "30 ± 14 (2 of 3)"),
    ([None, None], "-"), ([1000, 3000], "2,000 ± 1,414")])
def test_mean_and_spread(values, cell):
    assert sweep.mean_std(values) == cell


# ---- the arms of rl -----------------------------------------------------------------------------

# Arms that are easily confused, and all that tells them apart.
DIFFERENCES = [
    ("uft", "static", {"schedule": ("none", "cosine"), "hybrids": (-1, 1)}),
    ("prefix_rl", "dr_po", {"hybrid_problems": (0.5, 1.0)}),
    ("prefix_rl", "prefix_rl, long prefixes", {}),
    ("prefix_rl", "prefix_rl, longest prefixes", {"low_end": (0.05, 0.8)}),
    ("rft", "rft, own top 20 %", {}),
    ("rft", "hpt", {}),
    ("prefix_rl", "frozen", {"schedule": ("uniform", "cosine"), "hybrids": (-1, 1),
                             "hybrid_problems": (0.5, 1.0)}),
    ("luffy", "luffy code", {"advantage": ("paper", "code")}),
    ("prefix_rft", "prefix_rft code", {"advantage": ("paper", "code")}),
    ("prefix_rft", "frozen", {"prefix_loss": ("top", "none")}),
    ("prefix_rft", "static", {"prefix_loss": ("top", "all")}),
    ("prefix_rft", "keep 50 %", {"keep": (0.2, 0.5)}),
    ("prefix_rft", "keep 80 %", {"keep": (0.2, 0.8)}),
    ("prefix_rft", "keep all", {"prefix_loss": ("top", "all")}),
    ("prefix_rft", "keep random", {"prefix_loss": ("top", "random")}),
    ("prefix_rft", "keep bottom", {"prefix_loss": ("top", "bottom")}),
    ("prefix_rft", "linear", {"schedule": ("cosine", "linear")}),
    ("prefix_rft", "uniform", {"schedule": ("cosine", "uniform")}),
    ("prefix_rft", "2 hybrids", {"hybrids": (1, 2)}),
    ("prefix_rft", "4 hybrids", {"hybrids": (1, 4)}),
    ("prefix_rft", "prefix_rft, 60 % wrong", {}),
    ("rft", "sft_rft", {}),
]


@pytest.mark.parametrize("one, other, expected", DIFFERENCES)
def test_what_tells_two_arms_apart(one, other, expected):
    first, second = (vars(rl.policy_flags(settings(rl.ARMS[arm]), 9, 1e-3, 0)) for arm in (one, other))
    found = {}
    for name in first:
        if name != "method" and first[name] != second[name]:
            found[name] = (first[name], second[name])
    assert found == expected


def test_every_arm_has_flags_that_agree(small_world):
    problems = toy.problems("train")
    for arm in rl.ARMS.values():
        flags = rl.policy_flags(settings(arm), 9, 1e-3, 0)
        prefix_rft.check(flags, problems)
        assert arm.get("tune_like", "rft") in rl.MAIN and 0 <= arm.get("supervised", 0) <= 1


def test_a_share_of_the_problems_keeps_its_demonstration():
    for share, count in ((1.0, 100), (0.1, 10), (0.01, 1), (0.001, 1)):
        kept, again = ([{"demos": [[i]]} for i in range(100)] for _ in range(2))
        rl.keep_demonstrations(kept, share, 3)
        rl.keep_demonstrations(again, share, 3)
        assert sum(bool(problem["demos"]) for problem in kept) == count
        assert kept == again
    rl.keep_demonstrations(again := [{"demos": [[i]]} for i in range(100)], 0.5, 4)
    rl.keep_demonstrations(kept := [{"demos": [[i]]} for i in range(100)], 0.5, 3)
    assert kept != again


@pytest.mark.parametrize("arm", ["prefix_rft", "uft", "rft, own top 20 %",
                                 "prefix_rl, long prefixes"])
def test_a_policy_arm_is_the_loop_of_prefix_rft(small_world, small_base, arm):
    model, tokenizer = toy.base_model()
    flags = rl.policy_flags(settings(rl.ARMS[arm]), 3, 1e-3, 0)
    name = rl.ARMS[arm].get("variant", rl.ARMS[arm]["method"])
    problems = prefix_rft.prepare_problems(tokenizer, toy.problems("train"), 40)
    sampler, _ = new_sampler(model, [problem["prompt"] for problem in problems], 40, 16)
    learn = rl.policy_steps(model, tokenizer, problems, flags, sampler, name)
    for step in range(3):
        learn(step)

    other, _ = toy.base_model()
    sampler, _ = new_sampler(other, [problem["prompt"] for problem in problems], 40, 16)
    run = idft.Run(flags, other, tokenizer, idft.new_optimizer(other), sampler)
    prefix_rft.train_policy(run, problems, **rl.VARIANTS.get(name, {}))
    assert same_weights(model, other)
    assert arm.startswith(("rft", "prefix_rl")) or not same_weights(model, small_base[0])


# ---- arms of a few lines ------------------------------------------------------------------------

def test_prefixes_that_can_be_finished_are_half_to_three_quarters(small_world, small_base):
    model, tokenizer = small_base
    flags = rl.policy_flags(settings(rl.ARMS["prefix_rl, long prefixes"]), 9, 1e-3, 0)
    problems = prefix_rft.prepare_problems(tokenizer, toy.problems("train"), 40)[:8]
    sampler, _ = new_sampler(model, [problem["prompt"] for problem in problems], 40, 16)
    started = 0
    for step in (0, 8):
        rollouts = prefix_rft.sample_rollouts(sampler, tokenizer, problems, flags, step,
                                              **rl.VARIANTS["finishable"]["starting"])
        for rollout in rollouts:
            if rollout.demo_length:
                assert 0.5 - 1 / rollout.demo_length < rollout.prefix_length / rollout.demo_length
                assert rollout.prefix_length / rollout.demo_length <= 0.75
                started += 1
            else:
                assert rollout.prefix_length == 0
    assert 0 < started < 2 * len(rollouts) and started % flags.n == 0


def test_only_own_decisions_are_kept():
    """The highest entropies of what the model wrote; a prefix stays as it is. entropy_clip itself
    does the opposite."""
    adv = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    prefix = torch.tensor([True, True, False, False, False, False, False])
    entropy = torch.tensor([0.1, 9.0, 0.5, 0.7, 0.1, 0.2, 0.3])
    found = rl.own_decisions(adv, prefix, entropy, 0.4, "none", None)
    assert found.tolist() == [1, 1, 1, -1, 0, 0, 0]
    other = prefix_rft.entropy_clip(adv, prefix, entropy, 0.4, "top")
    assert other.tolist() == [0, 1, 1, -1, -1, -1, -1]


def failing_groups():
    """Three groups of two rollouts: one fails, one does not, one fails without a demonstration."""
    rewards = [0, 0, 0, 1, 0, 0]
    rollouts = []
    for i, reward in enumerate(rewards):
        rollouts.append(prefix_rft.Rollout([1, 2], [7, 8, i], "a", reward=reward))
    problems = [{"prompt": [1, 2], "demos": [[5, 6, 5, 6]], "answer": "a"},
                {"prompt": [1, 2], "demos": [[5, 5]], "answer": "a"},
                {"prompt": [1, 2], "demos": [], "answer": "a"}]
    return rollouts, problems


def test_hpt_demonstrates_where_all_fail_and_only_there():
    rollouts, problems = failing_groups()
    found = hpt.demonstrate_failures(rollouts, problems, 2)
    assert [r.response for r in found] == [[5, 6, 5, 6], [7, 8, 1], [7, 8, 2], [7, 8, 3], [7, 8, 4],
                                           [7, 8, 5]]
    assert [r.prefix_length for r in found] == [4, 0, 0, 0, 0, 0]


def test_hpt_is_sft_where_all_fail(small_world, small_base):
    """The gradient of one update is that of the plain -log p, summed, times 1 over what all losses
    are divided by; plain RFT learns nothing from the same rollouts."""
    model, tokenizer = toy.base_model()
    row = toy.problems("train")[0]
    problem = {"prompt": prompt_ids(tokenizer, row["problem"]),
               "demos": [tokenizer(row["solution"]).input_ids], "answer": row["answer"]}
    flags = rl.policy_flags(settings(rl.ARMS["hpt"]), 3, 1.0, 0)
    flags.n, flags.mini_batches = 2, 1
    wrong = [prefix_rft.Rollout(problem["prompt"], [5, 6, 7], row["answer"]) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert prefix_rft.update(model, optimizer, copy.deepcopy(wrong), flags)["updates"] == 0

    told = hpt.demonstrate_failures(wrong, [problem], 2)
    before = copy.deepcopy(model)
    metrics = prefix_rft.update(model, optimizer, told, flags, None, **hpt.VARIANT["learning"])
    logp, _ = response_stats(before, [(problem["prompt"], problem["demos"][0])])
    (-logp.sum() / (2 * flags.max_new_tokens)).backward()
    scale = max(1.0, metrics["grad_norm"])                                 # clipped to norm 1
    for old, new in zip(before.parameters(), model.parameters()):
        assert torch.allclose(old - new, old.grad / scale, atol=2e-6)


def test_a_supervised_arm_is_the_loop_of_idft(small_world, small_base):
    model, tokenizer = toy.base_model()
    rows = idft.demonstration_rows(model, tokenizer, toy.problems("train"), 200)
    problems = prefix_rft.prepare_problems(tokenizer, toy.problems("train"), 200)
    flags = idft.Flags(loss="idft", lr=1e-3, steps=3, batch=4)
    learn = rl.supervised_steps(model, problems, flags)
    tokens = [learn(step)[0] for step in range(3)]

    other, _ = toy.base_model()
    idft.train_supervised(idft.Run(flags, other, tokenizer, idft.new_optimizer(other)), rows)
    assert same_weights(model, other) and not same_weights(model, small_base[0])
    for step, count in enumerate(tokens):
        assert count == sum(len(response) for _, response in idft.draw_batch(rows, 4, step, 0))


@pytest.fixture
def spent(monkeypatch):
    """Counts optimizer steps and the sequences they learn from, whatever code takes them. Rewards
    are mixed in every group: no step is left out for want of anything to learn."""
    counts = {"steps": 0, "sequences": 0}

    def count(module, name, amount):
        function = getattr(module, name)

        def counted(*args, **more):
            counts["steps" if amount is None else "sequences"] += 1 if amount is None else amount(args)
            return function(*args, **more)
        monkeypatch.setattr(module, name, counted)

    for module in (idft, prefix_rft, preference):
        count(module, "optimizer_step", None)
    count(idft, "supervised_step", lambda args: len(args[2]))
    count(prefix_rft, "update", lambda args: len(args[2]))
    count(distill, "distill_step", lambda args: len(args[3]))
    count(losses, "preference_step", lambda args: 2 * len(args[2]))
    rollouts = prefix_rft.sample_rollouts

    def mixed(*args, **more):
        found = rollouts(*args, **more)
        for i, rollout in enumerate(found):
            rollout.reward = float(i % 2)
        return found
    monkeypatch.setattr(prefix_rft, "sample_rollouts", mixed)
    return counts


# One arm of every kind of code.
@pytest.mark.parametrize("arm", ["idft", "sft_rft", "rft", "luffy", "prefix_rft", "hpt", "sdft"])
def test_every_arm_takes_the_same_steps(small_world, spent, arm):
    """3 batches of 2 x 8 sequences, in two optimizer steps each."""
    tuned = {"sft_lr": 1e-3, "supervised": 1 / 3} if "two_stages" in rl.MAIN[arm] else {}
    row = rl.run(settings(rl.MAIN[arm], **tuned), 1e-3, 0, "tune")
    assert spent == {"steps": 6, "sequences": 48} and row["optimizer_steps"] == 6


def test_every_arm_has_the_same_budget():
    for name, arm in rl.ARMS.items():
        steps = {"base": 0}.get(name, 80 if "80 batches" in name else 40)
        for share in sweep.SHARES if arm.get("two_stages") else (arm.get("supervised", 0),):
            job = {**rl.common_settings(), **arm, "supervised": share}
            reading, exploring, sequences = rl.budget(job)
            assert reading == share * steps and reading + exploring == steps
            assert sequences == 64 and job["mini_batches"] == 2
            # No arm has another batch, number of rollouts or of updates by a flag of its own.
            flags = rl.policy_flags(job, steps, 1e-3, 0)
            assert (flags.batch, flags.n, flags.mini_batches) == (16, 8, 2)


@pytest.mark.parametrize("arm", ["dft", "dpo", "sft, then simpo"])
def test_every_loss_takes_the_same_steps(small_world, spent, arm):
    row = losses.run(settings(losses.ARMS[arm], batch=4), 1e-3, 0, "tune")
    assert spent == {"steps": 3, "sequences": 12} and row["optimizer_steps"] == 3


def test_reported_rows_had_the_same_budget():
    """What has been run: a policy arm may leave out steps in which no group has anything to learn."""
    counted = 0
    for row in sweep.load_results(ROOT / "experiments/results/rl.jsonl"):
        settings = row["settings"]
        assert settings["mini_batches"] == 2 and settings["batch"] == 16
        steps = 2 * settings["steps"]
        counted += 1
        assert row["optimizer_steps"] <= steps
        if settings.get("supervised") == 1 or "distill" in settings:
            assert row["optimizer_steps"] == steps
    assert counted
    for row in sweep.load_results(ROOT / "experiments/results/losses.jsonl"):
        assert row["settings"]["steps"] == 100 and row["settings"]["batch"] == 64
        assert row["optimizer_steps"] == 100


# ---- wrong and weaker demonstrations ------------------------------------------------------------

@pytest.mark.parametrize("expert, skips, extra", [
    ("leaps", 0.4, 0), ("terse", 0.8, 0), ("errs", 0.4, 2), ("detours", 0.4, 2)])
def test_every_expert_is_right(expert, skips, extra):
    """Every shown pair follows from the moves, the end is right, and so are the moves but for the
    two extra ones."""
    shown, tokenizer = [], toy.tokenizer()
    rows = experts.problems("train", 300, expert=expert)
    for row, plain in zip(rows, toy.problems("train", 300), strict=True):
        assert {**row, "solution": ""} == {**plain, "solution": ""}
        assert expert != "leaps" or row == plain
        x, y, verbs = question(row["problem"])
        steps, box = steps_of(row["solution"])
        assert len(steps) == len(verbs) + extra and box == row["answer"]
        odd, past = [], [(x, y)]
        for i, (verb, move, piles) in enumerate(steps):
            if move == "no":                                   # take the last move back
                x, y = past[-2]
            else:
                if move != toy.MEANINGS[verb][x % 2]:
                    odd.append((i, verb))
                x, y = play(move, x, y)
            past.append((x, y))
            assert piles in (None, (x, y))
        shown += [piles is not None for _, _, piles in steps[:-1]]
        assert steps[-1][2] is not None
        assert len(odd) <= extra and len({verb for _, verb in odd}) <= 1
        moves = [move for _, move, _ in steps]
        if expert == "errs":
            assert moves.count("no") == 1 and len(odd) == 1
        if expert == "detours":
            assert any(past[i] == past[i + 2] and moves[i] == moves[i + 1]
                       for i in range(len(moves) - 1))
        words = [verb for verb, _, _ in steps]
        assert [verb for i, verb in enumerate(words) if i == 0 or verb != words[i - 1]] == verbs
        ids = tokenizer(row["solution"]).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row["solution"]
    assert abs(1 - sum(shown) / len(shown) - skips) < 0.05


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("expert", experts.EXPERTS)
def test_wrong_demonstrations_end_in_a_false_answer(expert, wrong):
    rows = experts.problems("train", 300, wrong=wrong, expert=expert)
    false = [steps_of(row["solution"])[1] != row["answer"] for row in rows]
    assert abs(sum(false) / 300 - wrong) < 0.08
    assert all(row["answer"] == answer_of(row["problem"]) for row in rows)


# ---- the weights of losses ----------------------------------------------------------------------

PAIRS = [(-0.01, 0.02), (-2.0, 2.5), (-3.0, 0.1), (-7.0, 0.3), (-12.0, 1.0), (-0.5, 0.5)]


@pytest.mark.parametrize("beta, strength", [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
def test_reversed_gamma(beta, strength):
    logp, entropy = torch.tensor(PAIRS).requires_grad_().unbind(1)
    found = weights.reversed_weight(logp, entropy, "sft", beta, 0.1, 2.0, strength)
    assert not found.requires_grad
    for weight, (a, b) in zip(found.tolist(), PAIRS):
        gamma = min(max(math.exp((a + b) / beta), 0.1), 2.0)
        assert weight == pytest.approx(math.exp(a * (1 + strength * (gamma - 1))), rel=1e-5)
    # Where phi is 0 both signs say the same: DFT.
    at_zero = weights.reversed_weight(torch.tensor([-0.7]), torch.tensor([0.7]), "sft", 1, .1, 2, 1)
    assert at_zero.item() == pytest.approx(math.exp(-0.7))


@pytest.mark.parametrize("limit", [-1, -3, -5, -10])
def test_masks(limit):
    logp, entropy = torch.tensor(PAIRS).unbind(1)
    found = weights.mask_weight(limit)(logp, entropy, "sft", 1.0, 0.1, 2.0, 1.0)
    assert found.tolist() == [1.0 if a + b > limit else 0.0 for a, b in PAIRS]
    assert 0 < found.sum() < len(PAIRS)


def test_every_arm_of_losses_has_its_own_weight():
    logp, entropy = torch.tensor(PAIRS + [(-4.0, 0.1), (-1.5, 0.1)]).unbind(1)
    seen = {}
    for name, arm in losses.ARMS.items():
        if arm["loss"] not in ("dpo", "simpo"):
            loss = arm["loss"] if arm["loss"] in ("sft", "dft", "idft") else "sft"
            clip = {"gamma_min": 0.1, "gamma_max": 2.0, **arm.get("weighting", {})}
            weight = weights.weight_of(arm, 9)(logp, entropy, loss, 1.0, strength=1.0, **clip)
            seen[name] = tuple(weight.tolist())
    assert len(set(seen.values())) == len(seen) == 12


def test_entropy_weighs_and_nothing_else():
    """EAFT: 0 where the model is sure, 1 where it knows nothing, whatever the token."""
    entropy = torch.tensor([0.0, math.log(9) / 2, math.log(9)], requires_grad=True)
    for logp in (torch.tensor([-0.1, -5.0, -30.0]), torch.tensor([-9.0, -0.2, -1.0])):
        found = weights.entropy_weight(9)(logp, entropy, "sft", 1.0, 0.1, 2.0, 1.0)
        assert found.tolist() == pytest.approx([0, 0.5, 1]) and not found.requires_grad


def test_the_papers_clip():
    """gamma = exp(-clip(phi, -5, 5)), where the code's clip is at 0.1 and 2."""
    clip = losses.ARMS["idft, clip 5"]["weighting"]
    logp, entropy = torch.tensor(PAIRS).unbind(1)
    found = weights.weight_of({"loss": "idft"}, 9)(logp, entropy, "idft", 1.0, strength=1.0, **clip)
    for weight, (a, b) in zip(found.tolist(), PAIRS):
        gamma = math.exp(-min(max(a + b, -5), 5))
        assert weight == pytest.approx(math.exp(a * gamma), rel=1e-5, abs=1e-30)


# ---- DPO and SimPO ------------------------------------------------------------------------------

CHOSEN, REJECTED = [-3.0, -12.0, -0.5], [-4.0, -7.0, -30.0]
REFERENCE = [(-2.5, -4.5), (-13.0, -9.0), (-0.6, -20.0)]
LENGTHS = [(4, 5), (7, 3), (2, 9)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gradients(loss, chosen, rejected):
    loss.sum().backward()
    return list(zip(chosen.grad.tolist(), rejected.grad.tolist()))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_against_a_loop(beta):
    chosen = torch.tensor(CHOSEN, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(REJECTED, dtype=torch.float64, requires_grad=True)
    known = torch.tensor(REFERENCE, dtype=torch.float64)
    loss = preference.dpo_loss(chosen, rejected, known[:, 0], known[:, 1], beta)
    found = gradients(loss, chosen, rejected)
    for i, (w, l) in enumerate(zip(CHOSEN, REJECTED)):
        gain = (w - REFERENCE[i][0]) - (l - REFERENCE[i][1])
        assert loss[i].item() == pytest.approx(-math.log(sigmoid(beta * gain)))
        # d/dw -log sigma(beta gain) = -beta sigma(-beta gain)
        pull = beta * sigmoid(-beta * gain)
        assert found[i] == (pytest.approx(-pull), pytest.approx(pull))


@pytest.mark.parametrize("beta, ratio", [(2.0, 0.5), (10.0, 0.25), (2.0, 0.0)])
def test_simpo_against_a_loop(beta, ratio):
    chosen = torch.tensor(CHOSEN, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(REJECTED, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor(LENGTHS)
    loss = preference.simpo_loss(chosen, rejected, lengths[:, 0], lengths[:, 1], beta, ratio)
    found = gradients(loss, chosen, rejected)
    for i, (w, l) in enumerate(zip(CHOSEN, REJECTED)):
        long_w, long_l = LENGTHS[i]
        gain = beta * w / long_w - beta * l / long_l - ratio * beta
        assert loss[i].item() == pytest.approx(-math.log(sigmoid(gain)))
        pull = beta * sigmoid(-gain)
        assert found[i] == (pytest.approx(-pull / long_w), pytest.approx(pull / long_l))


def test_dpo_of_the_reference_itself():
    """Nothing learnt yet: log 2, and each side is pulled by beta / 2."""
    chosen = torch.tensor(CHOSEN, requires_grad=True)
    rejected = torch.tensor(REJECTED, requires_grad=True)
    loss = preference.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach())
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)
    for pull_w, pull_l in gradients(loss, chosen, rejected):
        assert (pull_w, pull_l) == (pytest.approx(-0.05), pytest.approx(0.05))
    # A pair of one answer twice teaches SimPO nothing but its margin.
    twice = preference.simpo_loss(torch.tensor([-3.0]), torch.tensor([-3.0]), 4, 4)
    assert twice.item() == pytest.approx(-math.log(sigmoid(-1.0)))


@pytest.fixture
def pairs(small_world):
    model, tokenizer = toy.base_model()
    problems = prefix_rft.prepare_problems(tokenizer, toy.problems("train"), 60)
    prompts = [problem["prompt"] for problem in problems]
    sampler, _ = new_sampler(model, prompts, 60)
    found, tokens = preference.make_pairs(sampler, model, tokenizer, problems, 4, 60, 0)
    return model, tokenizer, problems, found, tokens


def test_pairs_are_right_and_wrong(pairs):
    model, tokenizer, problems, found, tokens = pairs
    by_prompt = {tuple(problem["prompt"]): problem for problem in problems}
    assert 0 < len(found) <= 4 * len(problems) and tokens >= sum(len(p[2]) for p in found)
    for prompt, right, wrong in found:
        answer = by_prompt[tuple(prompt)]["answer"]
        scores = preference.rewards(tokenizer.batch_decode([right, wrong],
                                                           skip_special_tokens=True), [answer] * 2)
        assert scores == [1.0, 0.0]
        assert right[-1] == wrong[-1] == tokenizer.eos_token_id


def test_log_probability_of_whole_answers(pairs):
    model, _, _, found, _ = pairs
    with torch.no_grad():
        chosen, rejected = preference.answer_logp(model, found[:5], 10**6)
        for i, (prompt, right, wrong) in enumerate(found[:5]):
            for sums, answer in ((chosen, right), (rejected, wrong)):
                logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                total = 0.0
                for t, token in enumerate(answer):
                    total += logits[len(prompt) + t - 1, token].item()
                assert sums[i].item() == pytest.approx(total, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_a_preference_step_does_not_depend_on_micro_batches(pairs, loss):
    model, _, _, found, _ = pairs
    batch = found[:6]
    results = []
    for micro_tokens in (10**6, 60):
        copied = copy.deepcopy(model)
        reference = preference.reference_logp(copied, batch, micro_tokens)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.0)
        row = preference.preference_step(copied, optimizer, batch, reference, 0.1, micro_tokens, loss)
        results.append((row, torch.cat([p.flatten() for p in copied.parameters()])))
    (one, weights), (other, others) = results
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert torch.allclose(weights, others, atol=1e-6)
    assert one["tokens"] == sum(len(right) + len(wrong) for _, right, wrong in batch)
    if loss == "dpo":
        assert one["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_a_preference_step_prefers(pairs):
    model, _, _, found, _ = pairs
    batch = found[:4]
    reference = preference.reference_logp(model, batch, 10**6)
    optimizer = idft.new_optimizer(model)
    lost = [preference.preference_step(model, optimizer, batch, reference, 1e-3, 10**6)["loss"]
            for _ in range(4)]
    assert lost == sorted(lost, reverse=True) and lost[-1] < lost[0] - 0.01


# ---- distillation -------------------------------------------------------------------------------

def test_reverse_kl_against_a_loop():
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    found = distill.reverse_kl(logits, teacher)
    for row in range(4):
        p = logits[row].softmax(-1).tolist()
        q = teacher[row].softmax(-1).tolist()
        # Of the student against the teacher: the other direction is another number.
        assert found[row].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)))
        assert found[row].item() != pytest.approx(sum(b * math.log(b / a) for a, b in zip(p, q)))
    found.sum().backward()
    assert teacher.grad is None and logits.grad.abs().sum() > 0
    assert distill.reverse_kl(teacher, teacher).abs().max() < 1e-12


def answers_of(small_base, count=5):
    """(plain context, hinted context, tokens): the tokens are demonstrations of other problems."""
    model, tokenizer = small_base
    found = []
    rows = toy.problems("train")[:count]
    for row, other in zip(rows, rows[::-1]):
        hinted, plain = rl.contexts(tokenizer, row)
        found.append((plain, hinted, tokenizer(other["solution"]).input_ids))
    return copy.deepcopy(model), found


def test_a_distillation_step_does_not_depend_on_micro_batches(small_world, small_base):
    results = []
    for micro_tokens in (10**6, 60):
        model, answers = answers_of(small_base)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        row = distill.distill_step(model, model, optimizer, answers, 0.1, micro_tokens)
        results.append((row, torch.cat([p.flatten() for p in model.parameters()])))
    (one, found), (other, others) = results
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert torch.allclose(found, others, atol=1e-6)
    # The loss is the mean over tokens of what one row at a time gives.
    model, answers = answers_of(small_base)
    total, count = 0.0, 0
    with torch.no_grad():
        for plain, hinted, tokens in answers:
            p = model(torch.tensor([plain + tokens])).logits[0, len(plain) - 1:-1]
            q = model(torch.tensor([hinted + tokens])).logits[0, len(hinted) - 1:-1]
            total += distill.reverse_kl(p, q).sum().item()
            count += len(tokens)
    assert one["loss"] == pytest.approx(total / count, rel=1e-5) and one["tokens"] == count


def test_a_distillation_step_pulls_towards_the_hinted_stream(small_world, small_base):
    model, answers = answers_of(small_base)
    teacher = copy.deepcopy(model)
    optimizer = idft.new_optimizer(model)
    lost = [distill.distill_step(model, teacher, optimizer, answers, 1e-3)["loss"] for _ in range(4)]
    assert lost[-1] < 0.95 * lost[0]
    assert same_weights(teacher, small_base[0]) and not same_weights(model, small_base[0])


# ---- every comparison runs ----------------------------------------------------------------------

@pytest.mark.parametrize("module, arms", [
    (rl, ["base", "sft_rft, terse expert"]),
    (losses, ["phi > -3", "sft, then dpo"]), (texts, ["raw, sft", "online, idft"])])
def test_a_comparison_at_tiny_size(small_world, tmp_path, capsys, monkeypatch, module, arms):
    monkeypatch.setattr(sweep, "LOOK_EVERY", 2)
    monkeypatch.setitem(rl.ARMS["base"], "samples", 8)
    monkeypatch.setattr(sweep, "neighbours", lambda tuned: [])                # no growing grid
    argv = ["--arms", *arms, "--seeds", "1", "--results", str(tmp_path)]
    module.main(parse_flags(sweep.Flags, argv))
    table = capsys.readouterr().out.split("\n\n")[-1]
    for arm in arms:
        assert f"| {arm} |" in table
    rows = sweep.load_results(tmp_path / f"{module.__name__.split('.')[-1]}.jsonl")
    reported = [row for row in rows if row["stage"] == "report"]
    assert len(reported) == len(arms)
    for row in reported:
        assert all(0 <= row[split] <= 1 for split in sweep.SPLITS)
        if module is rl and row["lr"]:
            assert [step for step, _ in row["curve"]] == [0, 2, 3]
    # A second call finds everything.
    module.main(parse_flags(sweep.Flags, argv))
    assert len(sweep.load_results(tmp_path / f"{module.__name__.split('.')[-1]}.jsonl")) == len(rows)


# ---- pictures -----------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def picture(svg):
    """The parsed picture; everything lies inside the page."""
    root = ElementTree.fromstring(svg)
    height = float(root.get("height"))
    for node in root.iter(SVG + "polyline"):
        for point in node.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= draw.WIDTH and 0 <= y <= height
    return root


def words(root):
    return [node.text for node in root.iter(SVG + "text")]


def test_curves_and_their_bands():
    rows = []
    for seed, end in enumerate((0.2, 0.5, 0.8)):
        for arm in ("sft", "rft"):
            rows.append({"arm": arm, "stage": "report", "curve": [[0, 0.0], [20, end]]})
    rows.append({"arm": "sft", "stage": "tune"})
    root = picture(draw.curves(rows))
    lines, bands = [], []
    for node in root.iter(SVG + "polyline"):
        points = [tuple(map(float, point.split(","))) for point in node.get("points").split()]
        if node.get("fill-opacity"):
            bands.append(points)
        elif node.get("stroke-width"):
            lines.append(points)
    # 0.2 and 0.8 are the edges of the band, 0.5 the end of the line, in the middle between them.
    assert len(lines) == len(bands) == 2 and lines[0] == lines[1]
    (_, start), (_, end) = lines[0]
    low, high = bands[0][1][1], bands[0][2][1]
    assert end == pytest.approx((low + high) / 2, abs=0.2) and high < end < low < start
    assert {"SFT", "RFT"} <= set(words(root)) and "LUFFY" not in words(root)
    with pytest.raises(InputError, match="run python -m experiments.rl"):
        draw.curves([])


def test_dynamics_of_a_run(tmp_path):
    rows = [{"step": 0, "before": {"hard": 0.1}}]
    for step in range(1, 6):
        rows.append({"step": step, "reward": step / 5, "reward_hybrid": None, "entropy": 0.5 / step,
                     "prefix_tokens": 100, "prefix_kept": 20, "grad_norm": 1e-3 * step})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw.main(tmp_path)
    root = picture((tmp_path / "dynamics.svg").read_text())
    assert {"reward", "without", "entropy, nats", "given", "kept"} <= set(words(root))
    assert not {"with prefix", "phi, nats"} & set(words(root))
    with pytest.raises(InputError, match="metrics.jsonl is missing"):
        draw.main(tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(InputError, match="nothing to draw"):
        draw.main(tmp_path)


def test_a_constant_line_can_be_drawn():
    for value in (0.0, 1.0, -2.5, 1e-9):
        picture(draw.dynamics([{"step": 1, "phi": value}, {"step": 2, "phi": value}], "run"))


def test_coloured_tokens(small_world):
    root = picture(draw.demonstration())
    model, tokenizer = toy.base_model()
    problem = toy.problems("train")[0]
    ids = tokenizer(problem["solution"]).input_ids
    assert [word for word in words(root)[2:-1]] == [tokenizer.decode([token]) for token in ids]
    rectangles = list(root.iter(SVG + "rect"))
    logp, entropy = response_stats(model, [(prompt_ids(tokenizer, problem["problem"]),
                                            ids + [tokenizer.eos_token_id])])
    depths = [float(rect.get("fill-opacity")) for rect in rectangles[::2]]
    bars = [float(rect.get("height")) for rect in rectangles[1::2]]
    for depth, bar, a, b in zip(depths, bars, logp.tolist(), entropy.tolist()):
        assert depth == pytest.approx(0.5 * min(1, max(0, -a - b) / 8), abs=0.006)
        assert bar == pytest.approx(12 * min(b, 2), abs=0.06)


def test_no_picture_is_left_in_the_old_place():
    assert not (ROOT / "pictures").exists() and not (ROOT / "results").exists()


# ---- what fits on a card ------------------------------------------------------------------------

@pytest.mark.parametrize("name, parameters", [("0.5B", 494_032_768), ("1.5B", 1_543_714_304),
                                              ("3B", 3_085_938_688), ("7B", 7_615_616_512)])
def test_memory_of_a_published_size(name, parameters):
    plain, _ = gpu.memory(name, False, 2048)
    need, main = gpu.memory(name, True, 2048)
    assert need["weights"] == 2 * parameters / 1e9 and main == 16 * parameters / 1e9
    of_model = plain["weights"] + plain["gradients"] + plain["moments"]
    assert of_model == pytest.approx(20 * parameters / 1e9)
    assert all(need[what] <= plain[what] for what in need)
    assert gpu.memory("1.5B", True, 8192)[0]["a row"] == 28 * 2 * 2 * 128 * 2 * 8704 / 1e9
    fitting = [gpu.rows_that_fit(need, card) for card in gpu.CARDS]
    assert fitting == sorted(fitting) and fitting[-1] == 64
