"""Proofs for eval.py: the estimators against brute force, every way in for data, every mistake a user can make, and a killed run."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import eval as ev
from conftest import ROOT, word_problems

GSM8K_TEST = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def script(capsys, *argv):
    """eval.py with these flags, in this process -> exit code, what it printed, what it complained."""
    try:
        ev.run(ev.main, ev.Flags, [str(a) for a in argv])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return ev.load_model(tiny_checkpoint, torch.device("cpu"))


# ---------------------------------------------------------------- estimators

def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_exact_for_large_n():
    for n, c, k in [(10_000, 1, 1), (10_000, 3, 7), (5000, 2500, 100), (100_000, 1, 2), (3000, 2990, 20)]:
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert ev.pass_at_k(n, c, k) == float(exact)
    assert ev.pass_at_k(10, 4, 8) == 1.0                         # fewer wrong answers than k
    for n, c, k in [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)]:
        with pytest.raises(ValueError):
            ev.pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased():
    """Averaged over many experiments of n answers with success p it is 1 - (1 - p)^k, which the naive plug-in is not."""
    rng, n, k, p = np.random.default_rng(0), 10, 5, 0.2
    right = rng.binomial(n, p, 20_000)
    truth = 1 - (1 - p) ** k
    assert np.mean([ev.pass_at_k(n, int(c), k) for c in right]) == pytest.approx(truth, abs=0.01)
    assert abs(np.mean(1 - (1 - right / n) ** k) - truth) > 0.02


def test_interval_covers_the_truth_95_times_in_a_hundred():
    rng = np.random.default_rng(1)
    hits = [low <= 0.3 <= high for low, high in (ev.interval(rng.random(200) < 0.3, resamples=400) for _ in range(200))]
    assert 0.90 <= np.mean(hits) <= 0.99
    values = rng.random(50)
    assert ev.interval(values, seed=3) == ev.interval(values, seed=3) != ev.interval(values, seed=4)
    assert ev.interval([1.0]) == (1.0, 1.0)


# ---------------------------------------------------------------- ways in for data

OURS = {"problem": "1+1?", "solution": "It is \\boxed{2}.", "answer": "2"}


@pytest.mark.parametrize("row", [
    OURS,
    {"question": "1+1?", "demo": "It is \\boxed{2}.", "final_answer": "2"},
    {"prompt": "1+1?", "completion": "It is \\boxed{2}.", "ground_truth": 2},
    {"prompt": "1+1?", "response": "It is \\boxed{2}."},                                  # TRL, answer from the box
    {"instruction": "1+1?", "input": "", "output": "It is \\boxed{2}."},                  # alpaca
    {"problem": "1+1?", "question": "other", "demonstration": "It is \\boxed{2}.", "answer": "2", "ground_truth": "3"},
    {"problem": None, "prompt": "1+1?", "completion": [{"role": "assistant", "content": "It is \\boxed{2}."}], "answer": "2"},
])
def test_every_row_format_means_the_same(tmp_path, row):
    assert ev.load_problems(jsonl(tmp_path / "rows.jsonl", row), require=("solution", "answer")) == [OURS]


def test_conversational_rows_keep_their_messages(tmp_path):
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}
    said = {"role": "assistant", "content": "It is \\boxed{2}."}
    path = jsonl(tmp_path / "chat.jsonl", {"messages": [system, user, said]}, {"prompt": [system, user], "completion": [said]},
                 {"messages": [user], "answer": 2})
    first, second, third = ev.load_problems(path)
    assert first == second == {"problem": [system, user], "solution": "It is \\boxed{2}.", "answer": "2"}
    assert third == {"problem": [user], "solution": None, "answer": "2"}


def test_alpaca_input_and_several_demonstrations(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {"instruction": "Add.", "input": "1 and 1", "output": "\\boxed{2}"},
                 {"problem": "1+1?", "solution": ["So \\boxed{2}.", "2, so \\boxed{2}"]}, {"problem": "1.5?", "answer": 1.5})
    add, several, number = ev.load_problems(path)
    assert add["problem"] == "Add.\n1 and 1" and add["answer"] == "2"
    assert several["solution"] == ["So \\boxed{2}.", "2, so \\boxed{2}"] and several["answer"] == "2"
    assert number == {"problem": "1.5?", "solution": None, "answer": "1.5"}


def test_gsm8k_as_published(tmp_path):
    raw = {"question": "How much?", "answer": "She pays 40*26=$<<40*26=1040>>1040.\nPlus 2 is <<1040+2=1042>>1042.\n#### 1,042"}
    [row] = ev.load_problems(jsonl(tmp_path / "raw.jsonl", raw), require=("solution", "answer"))
    assert row["answer"] == "1042"
    assert row["solution"] == "She pays 40*26=$1040.\nPlus 2 is 1042.\nThe answer is \\boxed{1042}."
    assert ev.rewards([row["solution"]], [row["answer"]]) == [1.0]


def test_array_and_lines_and_byte_order_mark(tmp_path):
    rows = word_problems(5)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\r\n\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(r | {"problem": r["problem"] + "\u2028é"}, ensure_ascii=False)
                                                for r in rows), encoding="utf-8")
    assert ev.load_problems(tmp_path / "a.json") == ev.load_problems(tmp_path / "b.jsonl") == rows
    assert [r["problem"] for r in ev.load_problems(tmp_path / "c.jsonl")] == [r["problem"] + "\u2028é" for r in rows]


@pytest.mark.skipif(not GSM8K_TEST.exists(), reason="no GSM8K here")
def test_real_gsm8k_demonstrations_earn_their_reward():
    rows = ev.load_problems(GSM8K_TEST, require=("solution", "answer"))[:200]
    assert np.mean(ev.rewards([r["solution"] for r in rows], [r["answer"] for r in rows])) == 1.0


@pytest.mark.parametrize("given", ["B", "b", "(B)", 1, "1", "cat"])
def test_multiple_choice_by_letter_index_or_text(tmp_path, given):
    [row] = ev.load_problems(jsonl(tmp_path / "mc.jsonl", {"question": "Which?", "choices": ["dog", "cat", "cow"], "answer": given}))
    assert row["answer"] == "B"
    assert "A. dog\nB. cat\nC. cow" in row["problem"] and row["problem"].startswith("Which?")


def test_multiple_choice_text_wins_over_index(tmp_path):
    for choices, answer in [(["2", "1", "3"], "1"), ([2, 1, 3], 1), (["C", "A", "B"], "A")]:
        [row] = ev.load_problems(jsonl(tmp_path / "mc.jsonl", {"question": "Which?", "choices": choices, "answer": answer}))
        assert row["answer"] == "B"


BAD = [  # what stands in the file, what the sentence must name
    (b"", "empty"), (b"  \n\n", "empty"), (b"[]", "empty"), (b"{oops", "line 1"), (b'{"problem": "a", "answer": "1"}\n{"x"', "line 2"),
    (b"[\n{},\n{]", "line 3"), (b"3", "line 1"), (b'["a"]', "item 1"), (b"\xff\xfe\x00", "UTF-8"), (b"[" * 100_000, "JSON"),
    (b'{"a": 1, "b": 2}', "a, b"), (b"{}", "line 1"), (b'{"problem": "x"}', "answer"), (b'{"problem": "", "answer": "1"}', "problem"),
    (b'{"problem": 3, "answer": "1"}', "problem"), (b'{"problem": "x", "answer": true}', "answer"),
    (b'{"problem": "x", "answer": {"v": 1}}', "answer"), (b'{"problem": "x", "answer": " "}', "answer"),
    (b'{"problem": "x", "solution": 7, "answer": "1"}', "solution"), (b'{"problem": "x", "solution": ["a", 7], "answer": "1"}', "solution"),
    (b'{"problem": "x\\ud800", "answer": "1"}', "problem"), (b'{"prompt": [], "answer": "1"}', "chat"),
    (b'{"prompt": [{"role": "user"}], "answer": "1"}', "content"), (b'{"messages": "hi"}', "chat"), (b'{"messages": []}', "chat"),
    (b'{"messages": [{"role": "assistant", "content": "\\\\boxed{1}"}]}', "chat"),
    (b'{"problem": "x", "choices": ["a"], "answer": "A"}', "choices"), (b'{"problem": "x", "choices": ["a", "b"], "answer": "C"}', "A to B"),
    (b'{"problem": "x", "choices": ["a", "b"], "answer": 2}', "A to B"), (b'{"problem": "x", "choices": "ab", "answer": "a"}', "choices"),
    (b'{"choices": ["a", "b"], "answer": "a"}', "problem"), (b'{"problem": "x", "answer": ' + b"9" * 5000 + b"}", "line 1"),
]


@pytest.mark.parametrize("content, named", BAD, ids=range(len(BAD)))
def test_bad_data_is_one_sentence(tmp_path, content, named):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ev.InputError) as error:
        ev.load_problems(tmp_path / "bad.jsonl")
    assert named in str(error.value) and "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_bad_places_are_one_sentence(tmp_path):
    for place in (tmp_path, tmp_path / "absent.jsonl", "hf://owner", "hf://owner/name", "hf://", "nowhere/at/all.jsonl"):
        with pytest.raises(ev.InputError, match="hf://|" + str(tmp_path) + "|nowhere"):
            ev.load_problems(place)


def test_hub_paths(tmp_path, monkeypatch):
    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        return str(jsonl(tmp_path / "x.jsonl", OURS))

    monkeypatch.setattr(ev.huggingface_hub, "hf_hub_download", download)
    assert ev.load_problems("hf://owner/name/sub/x.jsonl") == [OURS]
    assert list(ev.load_benchmarks(["math500"])) == ["math500"]
    assert asked == [("owner/name", "sub/x.jsonl", "dataset"), ("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")]

    def offline(*args, **kwargs):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(ev.huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ev.InputError, match="could not be downloaded: Name or service not known"):
        ev.load_problems("hf://owner/name/x.jsonl")


# ---------------------------------------------------------------- models

def test_a_good_checkpoint(tiny, tiny_checkpoint):
    model, tokenizer = tiny
    assert model.dtype == torch.float32 and not model.training
    problem = word_problems(1)[0]
    text = tokenizer.decode(ev.prompt_ids(tokenizer, problem["problem"]))
    assert text == f"<|im_start|>user\n{problem['problem']}{ev.INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = ev.demo_ids(tokenizer, problem["solution"])
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == problem["solution"]
    chat = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "1+1?"}]
    assert tokenizer.decode(ev.prompt_ids(tokenizer, chat)) == (
        "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")


def test_a_tokenizer_without_template_pad_or_with_closing_eos():
    words = {w: i for i, w in enumerate(["[EOS]", "[BOS]", "[UNK]", "a", "b"])}
    raw = Tokenizer(models.WordLevel(words, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[EOS]", bos_token="[BOS]", unk_token="[UNK]")
    asked = ev.prompt_ids(plain, "a b")
    assert asked[:2] == [3, 4] and 0 not in asked
    from tokenizers.processors import TemplateProcessing
    raw.post_processor = TemplateProcessing("[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 0)])
    closing = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[EOS]", bos_token="[BOS]", unk_token="[UNK]")
    assert ev.prompt_ids(closing, "a b") == [1] + asked          # starts with BOS, does not end
    assert ev.demo_ids(closing, "a b") == [3, 4, 0]
    assert ev.prompt_ids(closing, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == [1, 3, 4]


def test_stop_ids(tiny):
    model, tokenizer = tiny
    before = model.generation_config.eos_token_id
    try:
        for eos, expected in [(None, {2}), (0, {0, 2}), ([0, 2, 5], {0, 2, 5})]:
            model.generation_config.eos_token_id = eos
            assert set(ev.stop_ids(model, tokenizer)) == expected
    finally:
        model.generation_config.eos_token_id = before


def damaged(checkpoint, path, how):
    """A copy of the checkpoint with one thing broken."""
    from transformers import BertConfig, BertForMaskedLM, Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration
    shutil.copytree(checkpoint, path)
    config, weights = path / "config.json", path / "model.safetensors"

    def change(file, **values):
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    small = dict(vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    {"config": lambda: config.write_text("{oops"), "no config": config.unlink, "no weights": weights.unlink,
     "cut": lambda: weights.write_bytes(weights.read_bytes()[:3000]),
     "unknown": lambda: change(config, model_type="frobnitz"),
     "shape": lambda: change(config, intermediate_size=96),
     "layers": lambda: change(config, num_hidden_layers=3, layer_types=["full_attention"] * 3),
     "no tokenizer": lambda: [f.unlink() for f in path.iterdir() if "token" in f.name or "template" in f.name],
     "tokenizer": lambda: (path / "tokenizer.json").write_text("{oops"),
     "vocabulary": lambda: Qwen2ForCausalLM(Qwen2Config(**small | {"vocab_size": 50}, num_key_value_heads=2)).save_pretrained(path),
     "encoder": lambda: BertForMaskedLM(BertConfig(**small)).save_pretrained(path),
     "encoder-decoder": lambda: T5ForConditionalGeneration(T5Config(vocab_size=1000, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                                                    num_heads=2)).save_pretrained(path),
     "code": lambda: change(config, model_type="own", auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}),
     "nan": lambda: nan_weights(path)}[how]()
    return path


def nan_weights(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(path)


@pytest.mark.parametrize("how", ["config", "no config", "no weights", "cut", "unknown", "shape", "layers", "no tokenizer", "tokenizer",
                                 "vocabulary", "encoder", "encoder-decoder", "code", "nan"])
def test_bad_checkpoints_are_one_sentence(tiny_checkpoint, tmp_path, how):
    with pytest.raises(ev.InputError, match="--model") as error:
        ev.load_model(str(damaged(tiny_checkpoint, tmp_path / "bad", how)), torch.device("cpu"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_end_token_and_no_such_model(tiny_checkpoint, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ev.InputError, match="eos_token"):
        ev.load_model(str(tmp_path), torch.device("cpu"))
    for name in ("nowhere", "./nowhere", "/nowhere/at/all", str(tmp_path / "config.json"), ""):
        with pytest.raises(ev.InputError, match="is no directory"):
            ev.load_model(name, torch.device("cpu"))


def test_a_prompt_longer_than_the_model_reads(tiny):
    with pytest.raises(ev.InputError, match="reads 2048"):
        ev.evaluate(*tiny, [{"problem": "one two " * 3000, "answer": "1"}])


def test_template_that_refuses(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(ev.InputError, match="no system turn"):
        ev.prompt_ids(tokenizer, "1+1?")


# ---------------------------------------------------------------- flags

@dataclass
class Example:
    steps: int = ev.flag(5, "steps, 20 % of them warm-up", 1, 10)
    rate: float = ev.flag(0.5, "a rate", 0, 1)
    free: float = ev.flag(0.0, "any number")
    names: list[str] = ev.flag(["a"], "names")
    ks: list[int] = ev.flag([1], "numbers", 1)
    loss: Literal["sft", "dft"] = ev.flag("sft", "which")
    resume: bool = ev.flag(False, "go on")
    fast: bool = ev.flag(True, "hurry")


def test_flags_are_parsed():
    flags = ev.parse_flags(Example, ["--steps", "7", "--rate", "1", "--ks", "1", "2", "--names", "x", "y", "--resume", "--no_fast"])
    assert flags == Example(7, 1.0, 0.0, ["x", "y"], [1, 2], "sft", True, False)
    assert ev.parse_flags(Example, []) == Example()
    assert Example().names is not Example().names


@dataclass
class WithToy:
    data: str = ev.flag("toy", "the toy or a file")
    steps: int = ev.flag(500, "steps", 1)
    lr: float = ev.flag(1e-6, "learning rate", 0)


def test_the_toy_has_defaults_of_its_own_and_flags_win():
    toy = {"steps": 60, "lr": 1e-3}
    assert ev.parse_flags(WithToy, [], toy) == WithToy("toy", 60, 1e-3)
    assert ev.parse_flags(WithToy, ["--lr", "0.5"], toy) == WithToy("toy", 60, 0.5)
    assert ev.parse_flags(WithToy, ["--steps", "500"], toy) == WithToy("toy", 500, 1e-3)    # by hand, though it is the default
    assert ev.parse_flags(WithToy, ["--data", "x.jsonl"], toy) == WithToy("x.jsonl")


@pytest.mark.parametrize("argv", ["--steps 0", "--steps 11", "--steps 2.5", "--steps x", "--rate nan", "--rate inf", "--rate -0.1",
                                  "--free inf", "--free nan", "--ks 3 0", "--loss mse", "--unknown 1", "--step 5", "stray", "--steps",
                                  "--resume maybe", "--steps " + "9" * 400])
def test_bad_flags_are_one_sentence_and_exit_2(argv, capsys):
    def main(flags):
        pytest.fail("main ran on bad flags")

    with pytest.raises(SystemExit) as stop:
        ev.run(main, Example, argv.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert argv.split()[0].removeprefix("--").split("=")[0] in err


def test_run_turns_mistakes_into_exit_codes(capsys):
    def fail(error):
        def main(flags):
            raise error
        with pytest.raises(SystemExit) as stop:
            ev.run(main, Example, [])
        return stop.value.code, capsys.readouterr().err

    assert fail(ev.InputError("--x is wrong")) == (2, "error: --x is wrong\n")
    assert fail(PermissionError(13, "Permission denied", "here")) == (2, "error: [Errno 13] Permission denied: 'here'\n")
    assert fail(KeyboardInterrupt()) == (130, "")
    with pytest.raises(ZeroDivisionError):                       # our own mistakes keep their traceback
        ev.run(lambda flags: 1 / 0, Example, [])
    with pytest.raises(SystemExit) as stop:
        ev.run(fail, Example, ["--help"])
    assert stop.value.code == 0 and "20 %" in capsys.readouterr().out


def test_new_run(tmp_path):
    out = ev.new_run(str(tmp_path / "runs" / "x"), False)
    assert out == tmp_path / "runs" / "x" and not (tmp_path / "runs").exists()
    out.mkdir(parents=True)
    assert ev.new_run(out, False) == out                         # an empty directory is no run
    (out / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ev.InputError, match="--resume"):
        ev.new_run(out, False)
    assert ev.new_run(out, True) == out
    for place in (out / "metrics.jsonl", out / "metrics.jsonl" / "deeper"):
        with pytest.raises(ev.InputError, match="--out"):
            ev.new_run(place, True)


def test_pick_device():
    assert ev.pick_device("cpu").type == "cpu" and ev.pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ev.InputError, match="--device"):
        ev.pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ev.InputError, match="no GPU"):
            ev.pick_device("cuda")


# ---------------------------------------------------------------- evaluation

def test_evaluate_adds_up(tiny):
    model, tokenizer = tiny
    problems = word_problems(6)
    result = ev.evaluate(model, tokenizer, problems, n=4, temperature=1.0, max_new_tokens=12, seed=1, ks=(1, 2, 4), keep=True)
    rows = [r for row in result["responses"] for r in row]
    assert [len(row) for row in result["responses"]] == [4] * 6 and result["problems"] == 6
    assert result["avg@n"] == np.mean([r["reward"] for r in rows]) and set(result["pass@k"]) == {1, 2, 4}
    assert result["length"] == np.mean([r["length"] for r in rows]) and all(1 <= r["length"] <= 12 for r in rows)
    assert result["finished"] == np.mean([r["finished"] for r in rows])
    assert not any("<|im_end|>" in r["text"] for r in rows)
    again = ev.evaluate(model, tokenizer, problems, n=4, temperature=1.0, max_new_tokens=12, seed=1, keep=True)
    other = ev.evaluate(model, tokenizer, problems, n=4, temperature=1.0, max_new_tokens=12, seed=2, keep=True)
    assert again["responses"] == result["responses"] != other["responses"]
    with pytest.raises(ev.InputError, match="--ks"):
        ev.evaluate(model, tokenizer, problems, n=2, ks=(4,))


def test_evaluate_greedy_is_generate(tiny):
    model, tokenizer = tiny
    problems = word_problems(5)
    result = ev.evaluate(model, tokenizer, problems, max_new_tokens=10, keep=True)
    for problem, [response] in zip(problems, result["responses"]):
        ids = torch.tensor([ev.prompt_ids(tokenizer, problem["problem"])])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)[0, ids.shape[1]:]
        assert response["text"] == tokenizer.decode(out, skip_special_tokens=True)


def test_summary_of_a_known_table():
    def row(*rewards):
        return [{"text": "", "reward": r, "length": 10, "finished": r > 0} for r in rewards]
    result = ev.summarise([row(1.0, 0.0, 0.0, 0.0), row(1.0, 1.0, 1.0, 1.0), row(0.0, 0.0, 0.0, 0.0)], ks=(1, 2), seconds=2.0)
    assert result["avg@n"] == result["pass@k"][1] == pytest.approx(5 / 12) and result["pass@k"][2] == pytest.approx((0.5 + 1 + 0) / 3)
    assert result["tokens_per_s"] == 60 and result["finished"] == pytest.approx(5 / 12)
    assert result["ci95"][0] <= 5 / 12 <= result["ci95"][1]


# ---------------------------------------------------------------- the script

def test_script_two_files_sampled_then_compared(tiny_checkpoint, tmp_path, capsys):
    easy, hard = jsonl(tmp_path / "easy.jsonl", *word_problems(6)), jsonl(tmp_path / "hard.json", *word_problems(4, seed=1))
    argv = ["--model", tiny_checkpoint, "--data", easy, hard, "--n", 2, "--temperature", 1, "--ks", 1, 2, "--max_new_tokens", 8]
    for name, seed in (("a", 0), ("b", 1)):
        code, out, err = script(capsys, *argv, "--seed", seed, "--out", tmp_path / name)
        assert code == 0 and all(word in out for word in ("easy", "hard", "avg@2", "pass@2")), err
    report = json.loads((tmp_path / "a" / "results.json").read_text())
    assert set(report["results"]) == {"easy", "hard"} and report["results"]["easy"]["problems"] == 6
    rows = [json.loads(line) for line in open(tmp_path / "a" / "easy.jsonl")]
    assert [row["problem"] for row in rows] == [p["problem"] for p in word_problems(6)] and len(rows[0]["responses"]) == 2
    code, out, err = script(capsys, "--compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and out.count("difference") == 2
    code, out, err = script(capsys, "--compare", tmp_path / "a" / "easy.jsonl", tmp_path / "a" / "hard.jsonl")
    assert code == 2 and "same problems" in err


def test_compare_is_paired(tmp_path, capsys):
    """B is right wherever A is and on five problems more: the paired interval knows, two separate ones would not."""
    rng = random.Random(0)
    base = [float(rng.random() < 0.5) for _ in range(200)]
    better = list(base)
    for i in [i for i, r in enumerate(base) if not r][:8]:
        better[i] = 1.0
    for name, rewards in (("a", base), ("b", better)):
        jsonl(tmp_path / f"{name}.jsonl", *({"problem": str(i), "responses": [{"reward": r}]} for i, r in enumerate(rewards)))
    ev.compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    line = capsys.readouterr().out
    assert "difference +0.040" in line
    low, high = (float(x) for x in line.rsplit("interval", 1)[1].split(" to "))
    assert 0 < low < 0.04 < high < 0.08
    for bad in ({"problem": "0"}, {"problem": "0", "responses": 3}, {"x": 1}):
        with pytest.raises(ev.InputError, match="--compare"):
            ev.compare(jsonl(tmp_path / "c.jsonl", bad), jsonl(tmp_path / "d.jsonl", bad))


def test_script_killed_and_resumed_is_the_undisturbed_run(tiny_checkpoint, tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", *word_problems(40))
    argv = ["--model", tiny_checkpoint, "--data", data, "--n", 16, "--temperature", 1, "--ks", 1, 16, "--max_new_tokens", 40,
            "--rows", 32]
    assert script(capsys, *argv, "--out", tmp_path / "whole")[0] == 0

    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *map(str, argv), "--out", str(out)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    while time.time() < deadline and not ((out / "data.jsonl").exists() and b"\n" in (out / "data.jsonl").read_bytes()):
        time.sleep(0.01)
    process.kill()
    process.wait()
    lines = (out / "data.jsonl").read_bytes()
    lines = lines[:lines.rfind(b"\n") + 1]
    assert 0 < lines.count(b"\n") < 40
    (out / "data.jsonl").write_bytes(lines + b'{"problem": "half a li')                # as a kill in mid-write leaves it

    assert "already holds a run" in script(capsys, *argv, "--out", out)[2]
    code, _, err = script(capsys, *argv, "--out", out, "--resume", "--seed", 5)
    assert code == 2 and "repeat these" in err
    assert script(capsys, *argv, "--out", out, "--resume")[0] == 0

    def said(place):
        return [[row["problem"], row["responses"]] for row in map(json.loads, open(place / "data.jsonl"))]
    assert said(out) == said(tmp_path / "whole")
    measured = [json.loads((place / "results.json").read_text())["results"]["data"] for place in (out, tmp_path / "whole")]
    for key in ("avg@n", "ci95", "pass@k", "length", "finished"):
        assert measured[0][key] == measured[1][key]


def test_resume_refuses_other_problems(tiny_checkpoint, tmp_path, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    argv = ["--model", tiny_checkpoint, "--data", jsonl(data, *word_problems(2)), "--max_new_tokens", 2, "--out", out]
    assert script(capsys, *argv)[0] == 0
    jsonl(data, *word_problems(2, seed=1))
    code, _, err = script(capsys, *argv, "--resume")
    assert code == 2 and "other problems" in err
    (out / "results.json").write_text("{oops")
    code, _, err = script(capsys, *argv, "--resume")
    assert code == 2 and "results.json" in err


@pytest.mark.parametrize("argv, named", [
    (["--model", "nowhere"], "--model"), (["--data", "absent.jsonl"], "absent.jsonl"), (["--n", "0"], "--n"), (["--n", "4"], "--temperature"),
    (["--ks", "2"], "--ks"), (["--top_p", "0"], "--top_p"), (["--device", "abacus"], "--device"), (["--compare", "a"], "--compare"),
    (["--compare", "a.jsonl", "b.jsonl"], "a.jsonl"), (["--frobnicate"], "--frobnicate"), (["--out", "/dev/null"], "--out"),
])
def test_script_mistakes_exit_2_with_one_sentence_and_write_nothing(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev.toy, "base_model", lambda seed: pytest.fail("the mistake was seen too late"))
    code, out, err = script(capsys, *argv)
    assert code == 2 and err.count("\n") == 1 and named in err
    assert out == "" and list(tmp_path.iterdir()) == []


def test_a_mistake_on_the_real_command_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--temperature", "hot"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--temperature" in done.stderr
