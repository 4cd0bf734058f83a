"""Proofs for eval.py and bridges/convert.py: the estimators against brute force, every way in for data, every mistake
a user can make, and a killed run."""

import contextlib
import copy
import itertools
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Literal
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config,
                          GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, T5Config,
                          T5ForConditionalGeneration)

import eval as ev
from bridges import convert
from conftest import ROOT, word_problems
from kill import ended, start

GSM8K_TEST = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"
CPU = torch.device("cpu")


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def script(capsys, monkeypatch):
    """script(*argv): eval.py with these flags, in this process -> exit code, what it printed, what it complained."""
    def run(*argv, main=ev.main, Flags=ev.Flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        try:
            ev.run_script(main, Flags)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())
    return run


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return ev.load_model(tiny_checkpoint, CPU)


# ---------------------------------------------------------------- estimators

def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_exact_for_large_n():
    for n, c, k in [(10_000, 1, 1), (10_000, 3, 7), (5000, 2500, 100), (100_000, 1, 2), (3000, 2990, 20)]:
        assert ev.pass_at_k(n, c, k) == float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    for n, c, k in [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)]:
        with pytest.raises(ValueError):
            ev.pass_at_k(n, c, k)


def test_interval_covers_the_truth_95_times_in_a_hundred():
    rng = np.random.default_rng(1)
    intervals = [ev.interval(rng.random(200) < 0.3, resamples=300) for _ in range(200)]
    hits = [low <= 0.3 <= high for low, high in intervals]
    assert 0.90 <= np.mean(hits) <= 0.99
    values = rng.random(50)
    assert ev.interval(values, seed=3) == ev.interval(values, seed=3) != ev.interval(values, seed=4)
    assert ev.interval([1.0]) == (1.0, 1.0)


def test_evaluation_of_a_known_table(monkeypatch):
    """Three problems, four answers each, of which 1, 4 and 0 are right; right ones end by themselves."""
    right = [1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    samples = [SimpleNamespace(tokens=[1] * (8 + r * 2), finished=r > 0) for r in right]
    sampler, tokenizer, clock = mock.MagicMock(return_value=samples), mock.Mock(), iter([1.0, 3.0])
    tokenizer.batch_decode.return_value = [f"\\boxed{{{r}}}" for r in right[:11]] + ["It is 0."]
    monkeypatch.setattr(ev, "prompt_ids", lambda *_: [1])
    monkeypatch.setattr(ev, "stop_ids", lambda *_: [])
    monkeypatch.setattr(ev.time, "perf_counter", lambda: next(clock))
    problems = [{"problem": "?", "answer": "1"}] * 3
    model = SimpleNamespace(config=SimpleNamespace())
    result = ev.evaluate(model, tokenizer, problems, n=4, ks=(1, 2), sampler=sampler)
    assert result["avg@n"] == result["pass@k"][1] == pytest.approx(5 / 12)
    assert result["pass@k"][2] == pytest.approx((0.5 + 1 + 0) / 3)
    assert result["finished"] == pytest.approx(5 / 12) and result["length"] == pytest.approx(106 / 12)
    assert result["tokens_per_s"] == 53 and result["answered"] == pytest.approx(11 / 12)
    assert result["ci95"] == ev.interval([1 / 4, 1, 0]) and (result["problems"], result["n"]) == (3, 4)


# ---------------------------------------------------------------- ways in for data

DEMO = "It is \\boxed{2}."
OURS = {"problem": "1+1?", "solution": DEMO, "answer": "2"}
SYSTEM, USER, SAID = ({"role": role, "content": text} for role, text in
                      [("system", "Be brief."), ("user", "1+1?"), ("assistant", DEMO)])
PETS = ["dog", "cat", "cow"]
WHICH = {"problem": "Which?\n\nA. dog\nB. cat\nC. cow\n\nAnswer with the letter of the right option.",
         "solution": None, "answer": "B"}

LOADS = [  # a row that eval.py reads, the problem that it means
    (OURS, OURS),
    ({"question": "1+1?", "demo": DEMO, "final_answer": "2"}, OURS),
    ({"prompt": "1+1?", "completion": DEMO, "ground_truth": 2}, OURS),
    ({"prompt": "1+1?", "response": DEMO}, OURS),                                        # the answer from the box
    ({"problem": "1+1?", "question": "other", "demonstration": DEMO, "answer": "2", "ground_truth": "3"}, OURS),
    ({"problem": None, "question": "", "prompt": "1+1?", "solution": [], "completion": DEMO, "answer": "2"}, OURS),
    ({**OURS, "choices": None, "options": [], "messages": [USER, SAID]}, OURS),          # NuminaMath has both
    ({"prompt": [SYSTEM, USER], "completion": DEMO}, {**OURS, "problem": [SYSTEM, USER]}),
    ({"problem": "1+1?", "solution": [DEMO, "2"]}, {**OURS, "solution": [DEMO, "2"]}),
    ({"problem": "1.5?", "answer": 1.5}, {"problem": "1.5?", "solution": None, "answer": "1.5"}),
    ({"problem": "0?", "answer": 0}, {"problem": "0?", "solution": None, "answer": "0"}),
    ({"problem": "How?", "answer": "So 40*26=$<<40*26=1040>>1040.\nAnd 2 is <<1040+2=1042>>1042.\n#### 1,042"},
     {"problem": "How?", "answer": "1042",
      "solution": "So 40*26=$1040.\nAnd 2 is 1042.\nThe answer is \\boxed{1042}."}),
]
CONVERTS = [  # a row that bridges/convert.py reads and eval.py refuses, the problem that it becomes
    ({"instruction": "1+1?", "input": "", "output": DEMO}, OURS),
    ({"instruction": "Add.", "input": "1 and 1", "output": DEMO}, {**OURS, "problem": "Add.\n1 and 1"}),
    ({"messages": [SYSTEM, USER, SAID]}, {**OURS, "problem": [SYSTEM, USER]}),
    ({"prompt": [USER], "target": [SAID], "reward_model": {"ground_truth": "2"}}, {**OURS, "problem": [USER]}),
    ({"prompt": "1+1?", "chosen": DEMO, "rejected": "3"}, OURS),                                     # preferences
    ({"prompt": [USER], "chosen": [SAID], "rejected": [USER]}, {**OURS, "problem": [USER]}),
    ({"chosen": [SYSTEM, USER, SAID], "rejected": [USER]}, {**OURS, "problem": [SYSTEM, USER]}),
    ({"prompt": [USER], "completion": [SAID, USER, SAID]}, {**OURS, "problem": [USER, SAID, USER]}),
    ({"messages": [USER], "answer": 2}, {"problem": [USER], "solution": None, "answer": "2"}),
    ({"prompt": [USER], "completion": [SAID]}, {**OURS, "problem": [USER]}),
    ({"prompt": "1+1?", "completion": [SAID]}, OURS),
    ({"question": "Which?", "choices": {"text": PETS, "label": ["A", "B", "C"]}, "answerKey": "B"}, WHICH),    # ARC
    ({"question": "Which?", "choices": {"text": PETS, "label": ["1", "2", "3"]}, "answerKey": "2"}, WHICH),
    ({"question": "Which?", "options": PETS, "answer": "B", "answer_index": 1}, WHICH),              # MMLU-Pro
    ({"question": "Which?", "subject": "zoology", "choices": PETS, "answer": 1}, WHICH),             # MMLU
    ({"question": "Which?", "choices": PETS, "answer": "cat"}, WHICH),
    ({"question": "Which?", "choices": PETS, "answer": "B"}, WHICH),
]


@pytest.mark.parametrize("row, problem", LOADS, ids=range(len(LOADS)))
def test_rows_that_are_loaded(tmp_path, row, problem):
    assert ev.load_problems(jsonl(tmp_path / "rows.jsonl", row)) == [problem]
    assert ev.to_problem(convert.convert(row)) == problem        # convert leaves our rows as they are


@pytest.mark.parametrize("row, problem", CONVERTS, ids=range(len(CONVERTS)))
def test_rows_that_are_converted(tmp_path, row, problem):
    before, after = jsonl(tmp_path / "before.jsonl", row), tmp_path / "after.jsonl"
    with pytest.raises(ev.InputError, match="bridges/convert.py"):
        ev.load_problems(before, require=())
    convert.main([str(before), str(after)])
    assert ev.load_problems(after) == [problem]


def test_rows_of_verl():
    row = {"prompt": [USER], "reward_model": {"ground_truth": 2, "style": "rule"}, "data_source": "x"}
    assert ev.to_problem(convert.convert(row)) == {"problem": [USER], "solution": None, "answer": "2"}
    with pytest.raises(ev.InputError, match="answer"):
        ev.to_problem(row, ("answer",))


def test_gpqa_options_are_shuffled_always_the_same_way(tmp_path):
    letters = ""
    for i in range(60):
        row = {"Question": f"Which of {i}?", "Correct Answer": " right\n"}
        row |= {f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}
        problem = ev.to_problem(convert.convert(row))
        assert problem == ev.to_problem(convert.convert(row))
        letters += problem["answer"]
        assert problem["problem"].startswith(f"Which of {i}?\n\nA. ")
        assert f"\n{problem['answer']}. right\n" in problem["problem"]
        assert all(f". wrong {j}\n" in problem["problem"] for j in (1, 2, 3))
    assert all(letters.count(letter) >= 6 for letter in "ABCD")
    with pytest.raises(ev.InputError, match="bridges/convert.py"):
        ev.load_problems(jsonl(tmp_path / "gpqa.jsonl", row), require=())


@pytest.mark.parametrize("row, named", [
    ({"a": 1}, "problem"), ({"instruction": "x"}, "output"), ({"instruction": 3, "output": "x"}, "text"),
    ({"messages": []}, "chat"), ({"messages": "hi"}, "chat"), ({"messages": [SAID]}, "chat"),
    ({"Correct Answer": "x"}, "Incorrect Answer 1"),
    ({"question": "?", "choices": ["a"], "answer": "A"}, "2 to 26"), ({"question": "?", "choices": "ab"}, "2 to 26"),
    ({"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}, "answerKey"),
    ({"question": "?", "options": ["a", "b"], "answer": "C"}, "answer C"), ({"options": ["a", "b"]}, "no question"),
    ({"question": "?", "options": ["a", "b"], "answer_index": 2}, "answer 2"),
    ({"prompt": [USER], "completion": [SAID, USER]}, "assistant's turn"),
    ({"prompt": "x", "completion": [SAID, USER, SAID]}, "prompt"),
    ({"prompt": "x", "text": "y"}, "neither solution nor answer"),
    ({"prompt": [USER], "reward_model": {"style": "rule"}}, "ground_truth"),
    ({"question": "?", "options": ["a", None], "answer": "A"}, "not None"),
    ({"question": "?", "options": ["a", "b"], "answer": True}, "not True"),
    ({"question": "?", "options": ["a", "b"]}, "not None")], ids=str)
def test_convert_writes_all_or_nothing(tmp_path, row, named):
    before = jsonl(tmp_path / "in.jsonl", OURS, row)
    with pytest.raises(ev.InputError, match=f"in.jsonl line 2.*{named}") as error:
        convert.main([str(before), str(tmp_path / "out.jsonl")])
    assert "\n" not in str(error.value) and [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_convert_runs_as_a_script_and_as_a_module(tmp_path, monkeypatch, capsys):
    before, after = str(jsonl(tmp_path / "in.jsonl", CONVERTS[0][0])), str(tmp_path / "out.jsonl")
    script = str(ROOT / "bridges" / "convert.py")
    done = subprocess.run([sys.executable, script, before, after], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and ev.load_problems(after) == [OURS], done.stderr
    for argv, named in [([before, after], "exists already"), ([before, before], "exists already"),
                        ([before, str(tmp_path)], "exists already"), ([before, after + "2"], ""),
                        ([before], "two files"), (["absent", after + "3"], "absent")]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *argv])
        with pytest.raises(SystemExit) if named else contextlib.nullcontext() as stop:
            runpy.run_path(script, run_name="__main__")
        err = capsys.readouterr().err
        assert named in err and err.count("\n") == bool(named) and (not named or stop.value.code == 2)


def test_array_and_lines_and_byte_order_mark(tmp_path):
    rows = [row | {"problem": row["problem"] + "\u2028é"} for row in word_problems(5)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for text in (json.dumps(rows, indent=2), "\ufeff" + "\r\n\n".join(lines), "\n".join(lines) + "\n"):
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        assert ev.load_problems(tmp_path / "rows.jsonl") == rows


@pytest.mark.skipif(not GSM8K_TEST.exists(), reason="no GSM8K here")
def test_real_gsm8k_demonstrations_earn_their_reward():
    rows = ev.load_problems(GSM8K_TEST, require=("solution", "answer"))[:200]
    assert np.mean(ev.rewards([r["solution"] for r in rows], [r["answer"] for r in rows])) == 1.0


BAD_FILES = [  # what stands in the file, what the sentence must name
    (b"", "empty"), (b"  \n\n", "empty"), (b"[]", "empty"), (b"{oops", "line 1"), (b"{}\n{x}", "line 2"),
    (b"[\n{},\n{]", "line 3"), (b"3", "line 1"), (b'["a"]', "item 1"), (b"\xff\xfe\x00", "UTF-8"),
    (b"[" * 100_000, "JSON"), (b'{"problem": "x", "answer": ' + b"9" * 5000 + b"}", "line 1"),
    (b'{"problem": "x\\ud800", "answer": "1"}', "line 1"), (b'{"problem": "x", "answer": NaN}', r"line 1: answer \("),
    (b'{"problem": "x", "answer": -Infinity}', "line 1"), (b'{"problem": "x", "answer": 1e400}', "line 1"),
    (b'{"problem": "x", "answer": "1", "answer": "2"}', 'line 1 .*"answer" stands there twice'),
    (b'[{"problem": "x", "answer": {"a": 1, "a": 1}}]', '"a" stands there twice'),
]
BAD_ROWS = [
    ({"a": 1, "b": 2}, "a, b"), ({}, "none"), ({"problem": "", "answer": "1"}, r": problem \("),
    ({"problem": 3, "answer": "1"}, r": problem \("), ({"prompt": [], "answer": "1"}, r": problem \("),
    *(({"prompt": chat, "answer": "1"}, "chat") for chat in
      ([{"role": "user", "content": ""}], [{"role": "user", "content": " "}], [{"role": "", "content": "x"}],
       [SYSTEM, {"role": "user", "content": None}], [USER, {"role": "assistant", "content": ""}, USER])),
    ({"prompt": ["hi"], "answer": "1"}, "chat"), ({"prompt": [{"role": "user"}], "answer": "1"}, "content"),
    *(({"problem": "x", **answer}, r": answer \(") for answer in
      ({}, {"answer": True}, {"answer": {"v": 1}}, {"answer": " "}, {"answer": "2 ####"})),
    *(({"problem": "x", "solution": wrong, "answer": "1"}, r": solution \(") for wrong in (7, ["a", 7], ["a", None])),
]
BAD = BAD_FILES + [(b"\n" + json.dumps(row).encode(), f"line 2.*{named}") for row, named in BAD_ROWS]


@pytest.mark.parametrize("content, named", BAD, ids=range(len(BAD)))
def test_bad_data_is_one_sentence(tmp_path, content, named):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ev.InputError, match=f"bad.jsonl.*{named}") as error:
        ev.load_problems(tmp_path / "bad.jsonl")
    assert "\n" not in str(error.value)


def test_bad_places_are_one_sentence(tmp_path):
    for place in (tmp_path, tmp_path / "absent.jsonl", "hf://", "hf://owner", "hf://owner/name", "nowhere/x.jsonl"):
        with pytest.raises(ev.InputError, match=str(place)):
            ev.load_problems(place)


def test_hub_paths(tmp_path, monkeypatch):
    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        return str(jsonl(tmp_path / "x.jsonl", OURS))

    def offline(*args, **kwargs):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(ev.huggingface_hub, "hf_hub_download", download)
    assert ev.load_problems("hf://owner/name/sub/x.jsonl") == [OURS]
    assert list(ev.load_benchmarks(["math500"])) == ["math500"]
    assert asked == [("owner/name", "sub/x.jsonl", "dataset"), ("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")]
    monkeypatch.setattr(ev.huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ev.InputError, match="cannot be read: Name or service not known"):
        ev.load_problems("hf://owner/name/x.jsonl")


def test_two_benchmarks_of_one_name_are_both_kept(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "test.jsonl", OURS | {"problem": folder})
    found = ev.load_benchmarks([str(tmp_path / "a" / "test.jsonl"), str(tmp_path / "b" / "test.jsonl"), "toy"])
    assert list(found) == ["test", "test-2", "toy-hard", "toy-longer", "toy-easy"]
    assert found["test-2"] == [OURS | {"problem": "b"}]
    mine = str(jsonl(tmp_path / "toy-hard.jsonl", OURS))
    for names in ([mine, "toy"], ["toy", mine]):
        found = ev.load_benchmarks(names)
        assert len(found) == 4 and {"toy-hard", "toy-hard-2"} <= set(found) and [OURS] in found.values()
    assert ev.load_benchmarks([""]) == {}


# ---------------------------------------------------------------- models

def test_a_good_checkpoint(tiny):
    model, tokenizer = tiny
    assert model.dtype == torch.float32 and not model.training
    problem = word_problems(1)[0]
    text = tokenizer.decode(ev.prompt_ids(tokenizer, problem["problem"]))
    assert text == f"<|im_start|>user\n{problem['problem']}{ev.INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = ev.demo_ids(tokenizer, problem["solution"])
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == problem["solution"]
    assert tokenizer.decode(ev.prompt_ids(tokenizer, [SYSTEM, USER])) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")


def test_a_tokenizer_without_template_pad_or_with_closing_eos():
    words = {w: i for i, w in enumerate(["[EOS]", "[BOS]", "[UNK]", "a", "b"])}
    raw = Tokenizer(models.WordLevel(words, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[EOS]", bos_token="[BOS]", unk_token="[UNK]")
    asked = ev.prompt_ids(plain, "a b")
    assert asked[:2] == [3, 4] and 0 not in asked
    raw.post_processor = TemplateProcessing("[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 0)])
    closing = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[EOS]", bos_token="[BOS]", unk_token="[UNK]")
    assert ev.prompt_ids(closing, "a b") == [1] + asked          # starts with BOS, does not end
    assert ev.demo_ids(closing, "a b") == [3, 4, 0]
    assert ev.prompt_ids(closing, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == [1, 3, 4]


@pytest.mark.parametrize("eos, expected", [(None, [2]), (0, [0, 2]), ([0, 2, 5], [0, 2, 5])])
def test_stop_ids(tiny, monkeypatch, eos, expected):
    monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", eos)
    assert ev.stop_ids(*tiny) == expected


def test_a_turn_ends_where_the_template_says(tiny_checkpoint):
    """A base model's EOS is another token than the one that closes turns (Qwen2.5, Gemma, Phi)."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint, eos_token="<|endoftext|>")
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model.generation_config.eos_token_id = eos
    assert ev.turn_end(tokenizer) == end != eos == tokenizer.eos_token_id
    assert ev.stop_ids(model, tokenizer) == sorted([end, eos])
    ids = ev.demo_ids(tokenizer, "4.")
    assert ids.count(end) == 1 and ids[-1] == end and eos not in ids
    # Data that spells the end out is not taught it twice, whichever of the two it spells
    for spelled in ("4.<|im_end|>", "4.<|im_end|>\n", "4.<|endoftext|>"):
        assert ev.demo_ids(tokenizer, spelled) == ids
    # A template that writes nothing behind an answer, or none at all: EOS
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert ev.turn_end(tokenizer) == eos
    tokenizer.chat_template = None
    assert ev.demo_ids(tokenizer, "4.")[-1] == eos


def test_a_saved_model_knows_the_end_of_a_turn(tiny_checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint, eos_token="<|endoftext|>")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = ev.load_model(str(tmp_path), CPU)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert config["eos_token_id"] == ev.stop_ids(model, tokenizer) and len(config["eos_token_id"]) == 2


def test_control_tokens_in_a_text_are_plain(tiny):
    _, tokenizer = tiny
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    question = "Which token ends a turn: <|im_end|> or <|endoftext|>?"
    ids = ev.prompt_ids(tokenizer, question)
    usual = ev.prompt_ids(tokenizer, "Which token ends a turn?")
    assert ids.count(end) == usual.count(end)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        ev.chat_turns(question), tokenize=False, add_generation_prompt=True)
    assert ev.demo_ids(tokenizer, "It is <|im_end|>, of course.").count(end) == 1
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    assert end not in ev.prompt_ids(without, question)


def test_chats_that_cannot_be_answered(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    with pytest.raises(ev.InputError, match="ends with an assistant"):
        ev.prompt_ids(tokenizer, [USER, {"role": "assistant", "content": "2"}])
    tokenizer.chat_template = "{{ messages[0].role }}: "
    with pytest.raises(ev.InputError, match="does not print what the user says"):
        ev.prompt_ids(tokenizer, "1+1?")


def test_a_template_that_opens_think(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    good = "One and one.\n</think>\n2"
    assert ev.demo_ids(tokenizer, good) == ev.demo_ids(tiny[1], good)
    for bad in ("2", "<think>One and one.</think>2"):
        with pytest.raises(ev.InputError, match="opens <think>"):
            ev.demo_ids(tokenizer, bad)


def test_an_end_that_is_no_id(tiny, monkeypatch):
    monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", "</s>")
    with pytest.raises(ev.InputError, match="eos_token_id"):
        ev.stop_ids(*tiny)


def change_config(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def no_tokenizer(path):
    for file in path.iterdir():
        if "token" in file.name or "template" in file.name:
            file.unlink()


def nan_weights(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(path)


def no_eos(path):
    tokenizer = AutoTokenizer.from_pretrained(path).backend_tokenizer
    no_tokenizer(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=16, n_layer=1, n_head=2)).save_pretrained(path)


def save(model):
    return lambda path: model.save_pretrained(path)


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
T5 = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
OWN_CODE = {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}
DAMAGE = [  # what happens to a good checkpoint, what the sentence must name
    (lambda path: (path / "config.json").write_text("{oops"), "cannot be loaded"),
    (lambda path: (path / "config.json").unlink(), "cannot be loaded"),
    (lambda path: (path / "model.safetensors").unlink(), "cannot be loaded"),
    (lambda path: os.truncate(path / "model.safetensors", 3000), "cannot be loaded"),
    (lambda path: change_config(path, model_type="frobnitz"), "cannot be loaded"),
    (lambda path: change_config(path, model_type="own", auto_map=OWN_CODE), "cannot be loaded"),
    (lambda path: (path / "tokenizer.json").write_text("{oops"), "cannot be loaded"),
    (save(T5ForConditionalGeneration(T5Config(vocab_size=1000, **T5))), "cannot be loaded"),
    (lambda path: change_config(path, intermediate_size=96), "lacks weights"),
    (lambda path: change_config(path, num_hidden_layers=3, layer_types=["full_attention"] * 3), "lacks weights"),
    (no_tokenizer, "tokenizer"),
    (no_eos, "eos_token"),
    (save(Qwen2ForCausalLM(Qwen2Config(vocab_size=50, **SMALL, num_key_value_heads=2))), "more tokens"),
    (save(BertForMaskedLM(BertConfig(vocab_size=1000, **SMALL))), "looks ahead"),
    (nan_weights, "nan"),
]


@pytest.mark.parametrize("damage, named", DAMAGE, ids=range(len(DAMAGE)))
def test_bad_checkpoints_are_one_sentence(tiny_checkpoint, tmp_path, damage, named):
    path = tmp_path / "bad"
    shutil.copytree(tiny_checkpoint, path)
    damage(path)
    with pytest.raises(ev.InputError, match=named) as error:
        ev.load_model(str(path), CPU)
    assert str(error.value).startswith("--model") and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_such_model(tmp_path):
    for name in ("nowhere", "./nowhere", "/nowhere/at/all", str(tmp_path / "config.json"), ""):
        with pytest.raises(ev.InputError, match="is no directory"):
            ev.load_model(name, CPU)


def test_an_adapter_is_refused(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "beside")
    (tmp_path / "alone").mkdir()
    for name in ("beside", "alone"):
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(ev.InputError, match="--model .* is an adapter: merge it"):
            ev.load_model(str(tmp_path / name), CPU)


def test_a_mistyped_directory_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "AutoTokenizer", None)
    monkeypatch.setattr(ev, "find_adapter_config_file", lambda name: None)
    with pytest.raises(ev.InputError, match="runs/stf is no directory"):
        ev.load_model("runs/stf", CPU)
    with pytest.raises(ev.InputError, match="'NoneType' object"):
        ev.load_model("owner/name", CPU)


def test_the_advice_of_a_library_is_left_out(tiny_checkpoint, tmp_path):
    """A pickle that would run code, and a model that would."""
    path = tmp_path / "pickled"
    shutil.copytree(tiny_checkpoint, path)
    (path / "model.safetensors").unlink()
    torch.save({"x": os.system}, path / "pytorch_model.bin")
    with pytest.raises(ev.InputError, match="cannot be loaded: .") as error:
        ev.load_model(str(path), CPU)
    assert "weights_only" not in str(error.value)
    change_config(tmp_path / "pickled", model_type="own", auto_map=OWN_CODE)
    with pytest.raises(ev.InputError, match="cannot be loaded: .") as error:
        ev.load_model(str(path), CPU)
    assert "trust_remote_code=True" not in str(error.value)


def test_the_line_is_named_whatever_is_wrong_with_its_prompt(tiny, tiny_checkpoint, tmp_path):
    rows = word_problems(4)
    rows[2]["problem"] = "long " * 3000
    path = jsonl(tmp_path / "mine.jsonl", *rows)
    with pytest.raises(ev.InputError, match="mine.jsonl line 3: a prompt has .* the model reads 2048"):
        ev.evaluate(*tiny, ev.load_problems(path))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
                               "{% endif %}{{ m.content }}{% endfor %}")
    path = jsonl(tmp_path / "mine.jsonl", OURS, {**OURS, "problem": [SYSTEM, USER]})
    with pytest.raises(ev.InputError, match="mine.jsonl line 2: .*no system"):
        ev.encode(tokenizer, ev.load_problems(path))


def test_a_template_that_refuses(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(ev.InputError, match="no system turn"):
        ev.prompt_ids(tokenizer, "1+1?")
    tokenizer.chat_template = "{% if false %}never{% endif %}"
    with pytest.raises(ev.InputError, match="does not print"):
        ev.prompt_ids(tokenizer, "1+1?")


# ---------------------------------------------------------------- flags

@dataclass
class Example:
    steps: int = ev.flag(5, "steps, 20 % of them warm-up", 1, 10)
    rate: float = ev.flag(0.5, "a rate", 0, 1)
    names: list[str] = ev.flag(["a"], "names")
    ks: list[int] = ev.flag([1], "numbers", 1, 9)
    loss: Literal["sft", "dft"] = ev.flag("sft", "which")
    resume: bool = ev.flag(False, "go on")
    fast: bool = ev.flag(True, "hurry")


def test_flags_are_parsed():
    flags = ev.parse_flags(Example, "--steps 7 --rate 1 --ks 1 2 --names x y --resume --no_fast".split())
    assert flags == Example(7, 1.0, ["x", "y"], [1, 2], "sft", True, False)
    assert ev.parse_flags(Example, []) == Example()
    assert Example().names is not Example().names


@dataclass
class WithToy:
    data: str = ev.flag("toy", "the toy or a file")
    method: Literal["prefix", "luffy", "rft"] = ev.flag("prefix", "which method")
    steps: int = ev.flag(500, "steps", 1, 1000)
    lr: float = ev.flag(1e-6, "learning rate", 0, 1)
    clip: float = ev.flag(0.2, "ratio", 0, 9)
    schedule: str = ev.flag("cosine", "which prefix")


TOY = {"steps": 60, "lr": 1e-3, "clip": 0.3}
METHODS = {"prefix": {}, "luffy": {"schedule": "full", "clip": 9.0}, "rft": {"schedule": "none"}}


@pytest.mark.parametrize("argv, expected", [
    ("", WithToy("toy", "prefix", 60, 1e-3, 0.3, "cosine")),
    ("--lr 0.5", WithToy("toy", "prefix", 60, 0.5, 0.3, "cosine")),
    ("--steps 500", WithToy("toy", "prefix", 500, 1e-3, 0.3, "cosine")),       # typed, though it is the default
    ("--data x.jsonl", WithToy("x.jsonl")),
    ("--method luffy", WithToy("toy", "luffy", 60, 1e-3, 9.0, "full")),        # the method wins over the toy
    ("--method luffy --clip 0.1", WithToy("toy", "luffy", 60, 1e-3, 0.1, "full")),
    ("--method rft --schedule uniform", WithToy("toy", "rft", 60, 1e-3, 0.3, "uniform")),
    ("--schedule cosine --method rft --data x.jsonl", WithToy("x.jsonl", "rft")),
])
def test_typed_flags_win_over_method_over_toy_over_dataclass(argv, expected):
    assert ev.parse_flags(WithToy, argv.split(), TOY, METHODS) == expected


def test_help_shows_every_default_that_may_be_used(capsys):
    with pytest.raises(SystemExit) as stop:
        ev.parse_flags(WithToy, ["--help"], TOY, METHODS)
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "steps; toy: 60 (default: 500)" in said
    assert "; luffy: full; rft: none (default: cosine)" in said and "which method (default: prefix)" in said
    with pytest.raises(SystemExit):
        ev.parse_flags(Example, ["--help"])
    assert "20 % of them warm-up (default: 5)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv", [
    "--steps 0", "--steps 11", "--steps 2.5", "--steps x", "--rate nan", "--rate inf", "--rate -0.1", "--ks 3 0",
    "--loss mse", "--unknown 1", "--step 5", "stray", "--steps", "--resume maybe", "--steps " + "9" * 400])
def test_bad_flags_are_one_sentence_and_exit_2(argv, script):
    def main(flags):
        pytest.fail("main ran on bad flags")

    code, out, err = script(*argv.split(), main=main, Flags=Example)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert argv.split()[0].removeprefix("--") in err


@pytest.mark.parametrize("error, code, said", [
    (ev.InputError("--x is wrong"), 2, "error: --x is wrong\n"), (KeyboardInterrupt(), 130, ""),
    (PermissionError(13, "Permission denied", "here"), 2, "error: [Errno 13] Permission denied: 'here'\n")])
def test_mistakes_become_exit_codes(script, error, code, said):
    def main(flags):
        raise error
    assert script(main=main, Flags=Example) == (code, "", said)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ..."),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_a_full_memory_is_one_sentence_with_the_flags_that_help(script, error):
    @dataclass
    class Small:
        rows: int = ev.flag(1, "")
        max_new_tokens: int = ev.flag(1, "")
        offload: bool = ev.flag(False, "")

    def main(flags):
        with ev.blame("--model cannot be loaded"):               # this is not the model's fault
            raise error
    code, _, err = script(main=main, Flags=Small)
    assert code == 2 and err.startswith(
        "error: out of memory: lower --rows or --max_new_tokens, or add --offload; ")


def test_a_file_that_cannot_be_written_names_place_and_mend(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "absent" / "file"):
        with pytest.raises(ev.InputError, match=f"{path} cannot be written: .*make room"):
            ev.write_rows(path, [{}])
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("buffering", [1, -1])
@pytest.mark.parametrize("kind, code, said", [
    ("pipe", 141, ""), ("full", 2, "error: standard output cannot be written: "), ("ascii", None, "")])
def test_what_becomes_of_the_output_is_no_traceback(tmp_path, monkeypatch, capsys, kind, code, said, buffering):
    """`| true`, a full disk, a terminal without UTF-8; closing such a file complains once more."""
    reader, writer = os.pipe()
    os.close(reader)
    place = {"pipe": writer, "full": "/dev/full", "ascii": tmp_path / "out"}[kind]
    with open(place, "w", buffering, encoding="ascii" if kind == "ascii" else "utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as stop:
            ev.exit_on_mistake(print, "é" * 99)
        assert code is None or stop.value.code == code
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == bool(said)


def test_our_own_mistakes_keep_their_traceback(script):
    with pytest.raises(ZeroDivisionError):
        script(main=lambda flags: 1 / 0, Flags=Example)


@dataclass
class Run:
    out: str
    data: str = "d.jsonl"
    model: str = "m"
    lr: float = 0.5
    rows: int = 8
    device: str = "cpu"
    resume: bool = False


@pytest.fixture
def begun(tmp_path):
    """The flags of a run that has begun with data [1] and model 7, its folder, its record."""
    flags = Run(str(tmp_path / "runs" / "x"))
    out, record = ev.open_run(flags, data=[1], model=7)
    return replace(flags, resume=True), out, record


def test_a_run_begins_where_there_is_none(tmp_path):
    run = Run(str(tmp_path / "runs" / "x"))
    out, before = ev.check_run(run)
    assert out == tmp_path / "runs" / "x" and before is None and not (tmp_path / "runs").exists()
    with pytest.raises(ev.InputError, match="no run in"):
        ev.check_run(replace(run, resume=True))
    # What a kill in the first moments leaves is no run: both ways go on.
    out.mkdir(parents=True)
    (out / ".lock").touch(), (out / "flags.json.tmp").write_text("{")
    assert ev.check_run(run) == ev.check_run(replace(run, resume=True)) == (out, None)


def test_a_run_goes_on_with_what_it_began_with(begun, capsys):
    flags, out, record = begun
    assert json.loads((out / "flags.json").read_text()) == record and record["flags"]["lr"] == 0.5
    assert ev.check_run(flags) == (out, record) == ev.open_run(flags, data=[1], model=7)
    method, optimisation, machine = capsys.readouterr().out.splitlines()[:3]
    assert method.split() == "method data d.jsonl, model m".split()
    assert "lr 0.5" in optimisation and "threads 1" in machine
    assert ev.open_run(flags, data=[1]) == (out, record)         # the model is in the checkpoint
    for other, inputs, said in [
            (replace(flags, resume=False), {}, "already holds a run: add --resume"),
            (replace(flags, lr=1.0), {}, "has --lr 0.5, repeat its flags"),
            (flags, {"data": [2], "model": 7}, "--data d.jsonl is not what this run began with"),
            (flags, {"data": [1], "model": 8}, "--model m is not what this run began with")]:
        with pytest.raises(ev.InputError, match=said):
            ev.open_run(other, **inputs)


def test_a_run_may_move_to_another_machine_and_that_is_said(begun, capsys, monkeypatch):
    flags, out, record = begun
    capsys.readouterr()
    assert ev.open_run(flags, data=[1]) == (out, record) and "differ" not in capsys.readouterr().out
    assert ev.open_run(replace(flags, rows=2), data=[1]) == (out, record)
    assert "resumed with other rows: the last bits may differ" in capsys.readouterr().out
    try:
        (out / "flags.json").write_text(json.dumps({**record, "threads": 3}))
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        ev.open_run(flags, data=[1])
        assert torch.get_num_threads() == 3 and "other its 3 threads: " in capsys.readouterr().out
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{oops", '{"flags": {}, "checksum": {}, "threads": "2"}',
                                  '{"flags": {}, "checksum": {}, "threads": 999999}',
                                  '{"flags": 3, "checksum": {}, "threads": 1}', '{"flags": {}, "threads": 1}'])
def test_an_edited_flags_json_is_one_sentence(begun, text):
    flags, out, _ = begun
    (out / "flags.json").write_text(text)
    with pytest.raises(ev.InputError, match="flags.json is damaged.*name another --out"):
        ev.check_run(flags)


def test_one_run_at_a_time(begun):
    """While another process is at it, nobody goes on; when that is killed, everybody may."""
    flags, out, record = begun
    holder = "import pathlib, sys, time, eval; eval.lock(pathlib.Path(sys.argv[1])); print(); time.sleep(60)"
    (out / ".lock").unlink()                                     # this process holds the old file
    process = subprocess.Popen([sys.executable, "-c", holder, out], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(ev.InputError, match="another run is at work"):
        ev.check_run(flags)
    process.kill()
    process.communicate()
    assert ev.check_run(flags) == (out, record)


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("{}\n")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("", tmp_path / "file", tmp_path / "file" / "deeper", tmp_path / "link", tmp_path / ("x" * 300)):
        with pytest.raises(ev.InputError, match="--out"):
            ev.check_run(Run(str(place)))


def test_pick_device():
    assert ev.pick_device("cpu").type == "cpu" and ev.pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ev.InputError, match="--device"):
        ev.pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ev.InputError, match="--device cuda"):
            ev.pick_device("cuda")


def test_read_log_cuts_off_half_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    assert ev.read_log(path) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert ev.read_log(path) == [{"step": 1}, {"step": 2}] and path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n{oops\n')
    with pytest.raises(ev.InputError, match="log.jsonl line 2"):
        ev.read_log(path)


# ---------------------------------------------------------------- evaluation

def test_evaluate_adds_up(tiny):
    problems = word_problems(6)
    how = dict(n=4, temperature=1.0, max_new_tokens=12)
    result = ev.evaluate(*tiny, problems, **how, seed=1, ks=(1, 2, 4))
    rows = [r for row in result["responses"] for r in row]
    assert [len(row) for row in result["responses"]] == [4] * 6 and result["problems"] == 6
    assert result["avg@n"] == np.mean([r["reward"] for r in rows]) and set(result["pass@k"]) == {1, 2, 4}
    assert result["length"] == np.mean([r["length"] for r in rows]) and all(1 <= r["length"] <= 12 for r in rows)
    assert result["finished"] == np.mean([r["finished"] for r in rows])
    assert not any("<|im_end|>" in r["text"] for r in rows)
    again, other = ev.evaluate(*tiny, problems, **how, seed=1), ev.evaluate(*tiny, problems, **how, seed=2)
    assert again["responses"] == result["responses"] != other["responses"]
    with pytest.raises(ValueError, match="k <= n"):
        ev.evaluate(*tiny, problems, n=2, ks=(4,))


def test_every_response_is_scored_against_its_own_problem(tiny, monkeypatch):
    """Responses that repeat the answer to problem i, or to its neighbour, in a known pattern."""
    problems = word_problems(4)
    monkeypatch.setattr(tiny[1].__class__, "batch_decode", lambda self, ids, **_: [
        f"\\boxed{{{problems[(i // 2 + i % 2) % 4]['answer']}}}" for i in range(len(ids))])
    result = ev.evaluate(*tiny, problems, n=2, temperature=1.0, max_new_tokens=2)
    assert len({p["answer"] for p in problems}) == 4
    assert [[r["reward"] for r in row] for row in result["responses"]] == [[1.0, 0.0]] * 4


def test_evaluate_greedy_is_generate(tiny):
    model, tokenizer = tiny
    problems = word_problems(4)
    result = ev.evaluate(model, tokenizer, problems, max_new_tokens=10)
    for problem, [response] in zip(problems, result["responses"]):
        ids = torch.tensor([ev.prompt_ids(tokenizer, problem["problem"])])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert response["text"] == tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)


class Noting:
    """A sampler that notes in which order sync and sampling came."""

    def __init__(self, sampler):
        self.sampler, self.calls = sampler, []

    def sync(self, model):
        self.calls.append("sync")
        self.sampler.sync(model)

    def __call__(self, *args, **kwargs):
        self.calls.append("sample")
        return self.sampler(*args, **kwargs)


def test_a_given_sampler_is_used_and_never_stale(tiny_checkpoint):
    """The sampler keeps a bfloat16 copy; an evaluation through it sees what the model has learnt since."""
    model, tokenizer = ev.load_model(tiny_checkpoint, CPU)
    problems = word_problems(3)
    old = Noting(ev.Sampler(model, 2, 200, dtype=torch.bfloat16))

    def said(sampler):
        result = ev.evaluate(model, tokenizer, problems, max_new_tokens=8, sampler=sampler)
        return [response["text"] for [response] in result["responses"]]

    before, generator = said(old), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 10)
    after = said(old)
    assert before != after == said(ev.Sampler(model, 2, 200, dtype=torch.bfloat16))
    accuracy = ev.greedy_accuracy(model, tokenizer, {"one": problems[:2], "two": problems[2:]}, 8, sampler=old)
    assert accuracy == {"one": 0.0, "two": 0.0} and old.calls == ["sync", "sample"] * 4


def test_new_sampler_has_room(tiny, monkeypatch):
    model, _ = tiny
    pairs = [([1] * 5, [1] * 30), ([1] * 9, [1])]
    for prompts, streams, room, expected in [([[1] * 5, [1] * 9], 1, 20, (29, 20)), (pairs, 2, 20, (50, 20)),
                                             ([[1] * 2000], 1, 100, (2048, 48))]:
        sampler, max_new_tokens = ev.new_sampler(model, prompts, room, rows=3, streams=streams)
        assert (sampler.length, max_new_tokens) == expected and sampler.rows == 3 and sampler.streams == streams
    with pytest.raises(ev.InputError, match="reads 2048"):
        ev.new_sampler(model, [[1], [1] * 2048], 1)

    asked = []
    monkeypatch.setattr(ev, "Sampler", lambda *args: asked.append(args))
    gpu = SimpleNamespace(config=model.config, device=torch.device("cuda"))
    for each in (model, gpu):
        ev.new_sampler(each, [[1]], 1)
    assert asked == [(model, 64, 2, 1, None), (gpu, 64, 2, 1, torch.bfloat16)]

    def refuse(*args):
        raise ValueError("no such\nattention")
    monkeypatch.setattr(ev, "Sampler", refuse)
    with pytest.raises(ev.InputError, match="--model: no such attention"):
        ev.new_sampler(model, [[1]], 1)


# ---------------------------------------------------------------- the script

def test_script_two_files(tiny_checkpoint, tmp_path, script):
    easy = jsonl(tmp_path / "easy.jsonl", *word_problems(6))
    hard = jsonl(tmp_path / "hard.jsonl", *word_problems(4, seed=1))
    code, out, err = script("--model", tiny_checkpoint, "--data", easy, hard, "--n", 2, "--temperature", 1,
                            "--ks", 1, 2, "--max_new_tokens", 8, "--rows", 3, "--out", tmp_path / "out")
    assert code == 0 and all(word in out for word in ("easy", "hard", "avg@n", "pass@k", "2: 0.000")), err
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(report["results"]) == {"easy", "hard"} and report["results"]["easy"]["problems"] == 6
    for name, problems in (("easy", word_problems(6)), ("hard", word_problems(4, seed=1))):
        rows = ev.read_log(tmp_path / "out" / f"{name}.jsonl")
        assert [(row["problem"], row["answer"]) for row in rows] == [(p["problem"], p["answer"]) for p in problems]
        assert all(len(row["responses"]) == 2 for row in rows)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        ".lock", "easy.jsonl", "flags.json", "hard.jsonl", "results.json"]


def test_script_killed_and_resumed_is_the_undisturbed_run(tiny_checkpoint, tmp_path, script):
    """Killed when the first benchmark is on disk and the second is not: the first is kept as it is."""
    data = [jsonl(tmp_path / f"{name}.jsonl", *word_problems(size)) for name, size in [("one", 2), ("two", 40)]]
    argv = ["--model", tiny_checkpoint, "--data", *data, "--n", 8, "--temperature", 1, "--ks", 1, 8,
            "--max_new_tokens", 30, "--rows", 32]
    whole = start("eval", [*argv, "--out", tmp_path / "whole"])          # beside the other
    out, file = tmp_path / "killed", tmp_path / "killed" / "one.jsonl"
    process = start("eval", [*argv, "--out", out])
    while process.poll() is None:
        if file.exists() and json.loads((out / "results.json").read_text())["results"]:
            break
        time.sleep(0.01)
    process.kill()
    process.communicate()
    ended(whole)
    assert file.exists() and not (out / "two.jsonl").exists()
    first = file.stat().st_mtime_ns

    assert "already holds a run" in script(*argv, "--out", out)[2]
    code, _, err = script(*argv, "--out", out, "--resume", "--seed", 5)
    assert code == 2 and "repeat its flags" in err
    assert script(*argv, "--out", out, "--resume")[0] == 0 and file.stat().st_mtime_ns == first

    reports = []
    for place in (out, tmp_path / "whole"):
        reports.append(json.loads((place / "results.json").read_text()))
        for result in reports[-1]["results"].values():
            del result["tokens_per_s"]
    assert reports[0] == reports[1] and list(reports[0]["results"]) == ["one", "two"]
    for name in ("one.jsonl", "two.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resume_refuses_what_it_cannot_go_on_with_and_leaves_it_alone(tiny_checkpoint, tmp_path, script):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    argv = ["--model", tiny_checkpoint, "--data", jsonl(data, *word_problems(2)), "--max_new_tokens", 2, "--out", out]
    assert "no run in" in script(*argv, "--resume")[2]
    assert script(*argv)[0] == 0
    jsonl(data, *word_problems(2, seed=1))
    before = {file: file.read_bytes() for file in out.iterdir()}
    code, _, err = script(*argv, "--resume")
    assert code == 2 and "is not what this run began with" in err
    assert before == {file: file.read_bytes() for file in out.iterdir()}

    # Another model at the same place, and results that somebody has edited
    jsonl(data, *word_problems(2))
    copy = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, copy)
    argv[1], argv[-1] = copy, tmp_path / "other"
    assert script(*argv)[0] == script(*argv, "--resume")[0] == 0
    file = tmp_path / "other" / "results.json"
    report = json.loads(file.read_text())
    for change in ({"checksum": None}, {"results": []}, {"results": {"data": {}}}, {"flags": []}, {"more": 1}):
        file.write_text(json.dumps({**report, **change}))
        code, _, err = script(*argv, "--resume")
        assert code == 2 and "results.json is damaged" in err and err.count("\n") == 1
    for text in ("{oops", "[]", "{}"):
        file.write_text(text)
        assert "results.json is damaged" in script(*argv, "--resume")[2]
    file.write_text(json.dumps(report))
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.model.norm.weight.data[0] += 0.01
    model.save_pretrained(copy)
    code, _, err = script(*argv, "--resume")
    assert code == 2 and "--model" in err and "is not what this run began with" in err


def test_a_run_killed_in_its_first_evaluation_can_be_resumed(tiny_checkpoint, tmp_path, script, monkeypatch):
    argv = ["--model", tiny_checkpoint, "--data", jsonl(tmp_path / "data.jsonl", *word_problems(2)),
            "--max_new_tokens", 2, "--out", tmp_path / "out"]
    with monkeypatch.context() as killed:
        killed.setattr(ev, "evaluate", mock.Mock(side_effect=KeyboardInterrupt))
        assert script(*argv)[0] == 130
    assert script(*argv, "--resume")[0] == 0


def test_one_line_whatever_a_key_holds(tmp_path, script):
    code, _, err = script("--data", jsonl(tmp_path / "data.jsonl", {"a\nb\x1b": 1}), "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and "\x1b" not in err


@pytest.mark.parametrize("argv, named", [
    ("--model nowhere", "--model"), ("--data absent", "absent"), ("--n 0", "--n"), ("--n 4", "--temperature"),
    ("--ks 2", "--ks"), ("--top_p 0", "--top_p"), ("--device abacus", "--device"), ("--frobnicate", "--frobnicate"),
    ("--out /dev/null", "--out"), ("--resume", "--resume")])
def test_script_mistakes_exit_2_with_one_sentence_and_write_nothing(tmp_path, monkeypatch, script, argv, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev.toy, "base_model", lambda seed: pytest.fail("the mistake was seen too late"))
    code, out, err = script(*argv.split())
    assert code == 2 and err.count("\n") == 1 and named in err
    assert out == "" and list(tmp_path.iterdir()) == []
