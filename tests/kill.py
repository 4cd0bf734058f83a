"""A script in a process of its own, killed at random moments and resumed: it must leave what an
undisturbed run leaves."""

import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import time
from unittest import mock

import torch
from conftest import ROOT, run_here
from safetensors.torch import load_file

# torch is imported once, every run is a fork of that
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["idft", "prefix_rft"])


def work(script, argv):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    run_here(importlib.import_module(script), *argv)


def start(script, argv):
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        multiprocessing.forkserver.ensure_running()
    process = processes.Process(target=work, args=(script, [str(a) for a in argv]))
    process.start()
    return process


def logged(out):
    """Rows of metrics.jsonl as they stand, half a row at the end left out."""
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def last_step(out):
    return max([row["step"] for row in logged(out)], default=0)


def undisturbed(script, argv, out):
    process = start(script, [*argv, "--out", out])
    process.join()
    assert process.exitcode == 0


def killed_and_resumed(script, argv, out, kills, seed=0):
    """Kill the run `kills` times, each time some steps further, then let it end -> how often it was
    really killed."""
    rng = random.Random(seed)
    hits = 0
    for last in [False] * kills + [True]:
        process = start(script, [*argv, "--out", out, *(["--resume"] if out.exists() else [])])
        goal = last_step(out) + rng.randint(1, 3)
        while process.is_alive() and not last and last_step(out) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if not last:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        hits += process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    return hits


def assert_equal_runs(one, other):
    """Bit for bit the same weights and optimizer, and the same metrics but for the clock's."""
    ours, theirs = (load_file(out / "checkpoint" / "model.safetensors") for out in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (torch.load(out / "checkpoint" / "trainer.pt", weights_only=True)
                    for out in (one, other))
    for i, state in ours["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, theirs["optimizer"]["state"][i][key])
    assert {**ours, "optimizer": 0} == {**theirs, "optimizer": 0}
    assert untimed(one) == untimed(other)
    assert not list(one.glob("checkpoint.*"))


def untimed(out):
    """The rows of metrics without seconds and speeds."""
    return [{key: value for key, value in row.items() if not key.endswith("_s")}
            for row in logged(out)]
