"""Every command of the README runs: the scripts themselves, on a smaller toy, in fewer steps, and
with a checkpoint made on the spot where the README names one of the Hub. What it names exists."""

import copy
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import hinted_decode
import toy
from eval import parse_flags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"python \w+\.py.*", "\n".join(BLOCKS))
COMMANDS = list(dict.fromkeys(COMMANDS + re.findall(r"`(python \w+\.py[^`]*)`", README)))
FEWER = {"steps": 2, "batch": 2, "problems": 8, "max_new_tokens": 64, "n": 4}


@pytest.fixture
def small_world(small_base, tiny_checkpoint, tmp_path, monkeypatch):
    """An empty directory with a data file, a base that took two seconds, splits of 8 problems."""
    def few(split, n=8, *rest, **more):
        return problems(split, min(n, 8), *rest, **more)

    problems = toy.problems
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "problems", few)
    monkeypatch.setattr(toy, "base_model", lambda seed=0: copy.deepcopy(small_base))
    # That base is never right; a pipeline that keeps nothing would leave nothing to train on.
    monkeypatch.setattr(hinted_decode, "rewards", lambda texts, answers: [1.0] * len(texts))
    row = {"problem": "What is 6 x 7?", "solution": "6 x 7 = 42, so \\boxed{42}.", "answer": "42"}
    Path("train.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    return tiny_checkpoint


def run_line(line, checkpoint):
    """One command with fewer of everything; a Hub id becomes `checkpoint`, a benchmark of the Hub
    train.jsonl."""
    script, *argv = shlex.split(line)[1:]
    for i, word in enumerate(argv):
        if word.startswith(("Qwen/", "HuggingFaceTB/")):
            argv[i] = checkpoint
        if word in ("gsm8k", "math500"):
            argv[i] = "train.jsonl"
    module = importlib.import_module(Path(script).stem)
    defaults = getattr(module, "TOY", {}), getattr(module, "METHODS", {})
    flags = parse_flags(module.Flags, argv, *defaults)
    names = {field.name for field in dataclasses.fields(flags)}
    fewer = {name: value for name, value in FEWER.items() if name in names}
    if "analysis" in names:
        fewer["max_new_tokens"] = 16                 # an analysis and a text, beside the contexts
    if module.__name__ == "eval":
        fewer["n"] = 1
    module.main(dataclasses.replace(flags, **fewer))


def test_all_commands_run(small_world, capsys):
    assert len(COMMANDS) >= 10
    for line in COMMANDS:
        print(line)
        data = Path("runs/hinted_decode/data.jsonl"), Path("runs/own_voice/data.jsonl")
        for path in data:                            # the random model retold nothing that ended
            if f"--data {path}" in line and not path.read_text():
                path.write_text(Path("train.jsonl").read_text())
        out = re.search(r"--out (\S+)", line)
        run_line(line, small_world)
        if out:
            assert list(Path(out[1]).iterdir()), line
    assert "toy-hard" in capsys.readouterr().out


def test_what_the_readme_names_exists():
    for name in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / name).exists(), name
