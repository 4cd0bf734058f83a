"""Every command of the README runs: the scripts themselves, on a smaller toy, fewer steps, and a checkpoint made on the spot
where the README names one of the Hub. And what it says of the files is so."""

import copy
import dataclasses
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import hinted_decode
import toy
from eval import parse_flags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
            if re.match(r"python \w+\.py", line)]
FEWER = {"steps": 4, "batch": 2, "problems": 8, "max_new_tokens": 48}


@pytest.fixture(scope="module")
def small_base():
    return toy.pretrain(steps=40)


@pytest.fixture
def small_world(small_base, tiny_checkpoint, tmp_path, monkeypatch):
    """An empty directory with a data file, a base that took two seconds, and no toy split of more than 8 problems."""
    problems = toy.problems
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "problems", lambda split, n=8, *rest, **more: problems(split, min(n, 8), *rest, **more))
    monkeypatch.setattr(toy, "base_model", lambda seed=0: (copy.deepcopy(small_base[0]), small_base[1]))
    monkeypatch.setattr(hinted_decode, "rewards", lambda texts, answers: [1.0] * len(texts))    # that base is never right
    row = {"problem": "What is 6 x 7?", "solution": "6 x 7 = 42, so \\boxed{42}.", "answer": "42"}
    Path("train.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    return str(tiny_checkpoint)


def run_line(line, checkpoint, monkeypatch):
    """One README command with fewer of everything; a Hub id becomes `checkpoint`, a benchmark of the Hub train.jsonl."""
    script, *argv = shlex.split(line)[1:]
    argv = [checkpoint if word.startswith("Qwen/") else "train.jsonl" if word in ("gsm8k", "math500") else word for word in argv]
    module = importlib.import_module(Path(script).stem)
    if not hasattr(module, "Flags"):
        monkeypatch.setattr(sys, "argv", [script, *argv])
        return module.main()
    flags = parse_flags(module.Flags, argv, getattr(module, "TOY", None))
    for name in ("GRID", "SEEDS"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(module, name)[:1])
    names = {field.name for field in dataclasses.fields(flags)}
    module.main(dataclasses.replace(flags, **{key: value for key, value in FEWER.items() if key in names}))


def test_all_commands_run(small_world, monkeypatch, capsys):
    for line in ["python prefix_rft.py", "python eval.py", "python eval.py --model runs/prefix_rft/checkpoint --out runs/after",
                 *COMMANDS]:
        if "--compare all" not in line and line not in ("python sampler.py", "python hinted_decode.py --race --out runs/race"):
            print(line)                                  # (those have tests of their own)
            if "--data runs/retold" in line:             # the random model retold nothing that ended
                Path("runs/retold/data.jsonl").write_text(Path("train.jsonl").read_text())
            run_line(line, small_world, monkeypatch)
    assert "toy-hard" in capsys.readouterr().out


def test_names_in_the_readme_exist():
    for name in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / name).exists(), name
    for name, lines in re.findall(r"\[(\w+\.py)\]\(\1\) \| (\d+) lines", README):
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 15, name
