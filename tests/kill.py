"""A script killed at random moments and resumed: it must leave what an undisturbed run leaves. Every
run is the command itself, as a user types it, with as many threads as it takes by itself."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import torch
from conftest import ROOT
from safetensors.torch import load_file


def start(script, argv, **environment):
    """python script.py argv, in a process of its own."""
    own = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return subprocess.Popen([sys.executable, f"{script}.py", *map(str, argv)], cwd=ROOT,
                            env={**own, **environment}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def logged(out):
    """Rows of metrics.jsonl as they stand, half a row at the end left out."""
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def last_step(out):
    return max([row["step"] for row in logged(out)], default=0)


def ended(process):
    """Wait for a run that nobody disturbs."""
    _, said = process.communicate()
    assert process.returncode == 0, said


def killed_and_resumed(script, argv, out, kills, seed=0):
    """Kill the run `kills` times, each time some steps further, then let it end -> how often it was
    really killed."""
    rng = random.Random(seed)
    hits = 0
    for last in [False] * kills + [True]:
        process = start(script, [*argv, "--out", out, *(["--resume"] if out.exists() else [])])
        goal = last_step(out) + rng.randint(1, 3)
        while process.poll() is None and not last and last_step(out) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if not last:
            process.kill()
        _, said = process.communicate()
        hits += process.returncode == -signal.SIGKILL
    assert process.returncode == 0, said
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
