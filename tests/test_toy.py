"""The toy keeps its promises: problems that repeat, splits that do not meet, answers that are right, a real tokenizer."""

import operator
import random
import re

import pytest
import torch
from transformers import AutoTokenizer

import toy
from eval import INSTRUCTION, demo_ids, prompt_ids
from reward import reward


def value_of(words):
    """An evaluator of its own: start value, then pairs of a label and an operation, e.g. "17 a +3 b *5"."""
    value, rest = int(words[0]), words[1:]
    assert len(rest) % 2 == 0
    for label, operation in zip(rest[::2], rest[1::2]):
        assert label in "abcdefghijkl" and re.fullmatch(r"[+-][1-9]|\*[57]", operation)
        value = {"+": operator.add, "-": operator.sub, "*": operator.mul}[operation[0]](value, int(operation[1:]))
    return value % 24


def steps_of(solution):
    """A solution -> (start, [(operation, value or None)], boxed)."""
    words = solution.split()
    assert words[0] == "think" and re.fullmatch(r"\\boxed\{\d+\}", words[-1])
    steps = []
    for word in words[2:-1]:
        if word[0] in "+-*":
            steps.append((word, None))
        elif word.isdigit():
            steps[-1] = (steps[-1][0], int(word))
    return int(words[1]), steps, int(words[-1][7:-1])


# ---- problems and solutions

@pytest.mark.parametrize("split", toy.SPLITS)
def test_problems_are_right_and_repeat(split):
    rows = toy.problems(split)
    assert len(rows) == 256 and rows == toy.problems(split) != toy.problems(split, seed=1)
    assert toy.problems(split, 10) == rows[:10]
    assert len({row["problem"] for row in rows}) == 256
    low, high = toy.SPLITS[split]
    for row in rows:
        assert row.keys() == {"problem", "solution", "answer"}
        words = row["problem"].split()
        assert words[-1] == "?" and low <= len(words[1:-1]) / 2 <= high
        assert row["answer"] == str(value_of(words[:-1]))
        assert reward(row["solution"], row["answer"]) == 1.0
    with pytest.raises(ValueError, match="choose one of train, hard, longer, easy"):
        toy.problems("medium")


def test_no_training_problem_is_in_another_split():
    """Of train and hard so many that 6 problems of 4 operations would be in both by chance."""
    train = {row["problem"] for seed in range(5) for row in toy.problems("train", 4000, seed)}
    for split, n in (("hard", 4000), ("longer", 400), ("easy", 400)):
        assert not train & {row["problem"] for seed in range(5) for row in toy.problems(split, n, seed)}
    hard = {row["problem"] for row in toy.problems("hard", 400)}
    assert len(hard & {row["problem"] for row in toy.problems("hard", 400, seed=1)}) < 4    # validation is another draw


def test_the_expert_is_right_and_leaps():
    leaps = chances = 0
    for row in toy.problems("train", 400):
        start, steps, boxed = steps_of(row["solution"])
        assert str(boxed) == row["answer"] and [op for op, _ in steps] == row["problem"].split()[2:-1:2]
        value, skipped = start, False
        for i, (operation, shown) in enumerate(steps):
            value = toy.apply(value, operation)
            assert shown in (None, value)
            assert not (skipped and shown is None)              # never more than two operations before the next value
            if not skipped and i + 1 < len(steps):
                chances, leaps = chances + 1, leaps + (shown is None)
            skipped = shown is None
        assert not skipped                                      # the last value is always written
    assert abs(leaps / chances - toy.LEAP) < 0.05


def test_own_style_shows_every_value_and_sloppy_work_gives_up():
    rng = random.Random(0)
    for _ in range(200):
        start, operations = toy.draw(rng, rng.randint(1, 9))
        answer = value_of(toy.problem_text(start, operations).split()[:-1])
        first, steps, boxed = steps_of(toy.solution_text(rng, start, operations))
        value = first
        assert first == start and boxed == answer and [op for op, _ in steps] == operations
        for operation, shown in steps:
            value = toy.apply(value, operation)
            assert shown == value
    start, operations = toy.draw(rng, 6)
    answer = value_of(toy.problem_text(start, operations).split()[:-1])
    texts = [toy.solution_text(rng, start, operations, give_up=0.6) for _ in range(500)]
    assert abs(sum(len(text.split()) == 3 for text in texts) / 500 - 0.6) < 0.08              # think, start, box
    assert all(text.endswith(f"\\boxed{{{answer}}}") for text in texts)
    slips = [toy.solution_text(rng, start, operations, wrong=0.1) for _ in range(500)]
    assert 0.3 < sum(not text.endswith(f"\\boxed{{{answer}}}") for text in slips) / 500 < 0.55  # 1 - 0.9^6 = 0.47


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_wrong_demonstrations_end_in_a_false_answer(wrong):
    rows = toy.problems("train", 400, wrong=wrong)
    false = [steps_of(row["solution"])[2] != int(row["answer"]) for row in rows]
    assert abs(sum(false) / 400 - wrong) < 0.07
    for row, is_false in zip(rows, false):
        assert row["answer"] == str(value_of(row["problem"].split()[:-1]))               # the answer itself stays right
        assert reward(row["solution"], row["answer"]) == 1.0 - is_false


def test_apply_is_arithmetic_modulo_24():
    for value in range(24):
        for operation in toy.OPERATIONS:
            assert toy.apply(value, operation) == value_of([str(value), "a", operation])


# ---- the tokenizer

def test_texts_survive_the_tokenizer():
    tok = toy.tokenizer()
    for split in toy.SPLITS:
        for row in toy.problems(split, 50):
            for text in (row["problem"], row["solution"]):
                ids = tok(text, add_special_tokens=False).input_ids
                assert tok.unk_token_id not in ids and tok.decode(ids) == text
    words = "17 a +3 b *5 c -2 ?".split()
    assert len(tok(" ".join(words)).input_ids) == len(words)                                  # a token a word
    assert tok.convert_ids_to_tokens(tok("think \\boxed{2}").input_ids) == ["think", "\\boxed{", "2", "}"]
    assert tok("25 hello").input_ids == [tok.unk_token_id] * 2


def test_the_chat_template_and_the_instruction():
    tok = toy.tokenizer()
    assert toy.INSTRUCTION == INSTRUCTION
    problem = "17 a +3 ?"
    ids = prompt_ids(tok, problem)                                                        # the path of every real model
    assert tok.convert_ids_to_tokens(ids) == ["<user>", "17", "a", "+3", "?", "<assistant>"]
    chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": "\\boxed{20}"}]
    whole = tok.apply_chat_template(chat, tokenize=False)
    assert tok(whole, add_special_tokens=False).input_ids == ids + demo_ids(tok, "\\boxed{20}")
    assert demo_ids(tok, "\\boxed{20}")[-1] == tok.eos_token_id
    hinted = toy.hint_prompt(tok, problem, "think 17 a +3 20 \\boxed{20}")
    assert tok.decode(hinted) == "<user> 17 a +3 ? <hint> think 17 a +3 20 \\boxed{20} <assistant>"


def test_a_saved_tokenizer_comes_back_the_same(tmp_path):
    tok = toy.tokenizer()
    model, _ = toy.pretrain(steps=1, batch=2, width=16, heads=2, ffn=16)
    model.save_pretrained(tmp_path), tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for row in toy.problems("hard", 30):
        assert again(row["solution"]).input_ids == tok(row["solution"]).input_ids
        assert prompt_ids(again, row["problem"]) == prompt_ids(tok, row["problem"])
        assert again.decode(tok(row["solution"]).input_ids) == row["solution"]
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (tok.eos_token_id, tok.pad_token_id, len(tok))


# ---- the base model

def test_pretraining_texts():
    rng = random.Random(0)
    early = [toy.pretraining_text(rng, 0.5) for _ in range(400)]
    late = [toy.pretraining_text(rng, 0.9) for _ in range(2000)]
    share = lambda rows, test: sum(map(test, rows)) / len(rows)
    retold = lambda row: "<hint>" in row[0]
    assert abs(share(early, retold) - 0.25) < 0.07 and abs(share(late, retold) - 0.25) < 0.04
    assert all(row[1].startswith("think") for row in early) and not any(row[2] for row in early if not retold(row))
    assert 0.2 < share(late, lambda row: row[1].startswith("\\boxed")) < 0.4                  # what it blurts
    for context, response, train_first in early + late:
        words = context.split("<hint>")[0].replace("<assistant>", "").split()
        assert words[0] == "<user>" and words[-1] == "?"
        if "<hint>" in context:                                                               # a hint tells the truth
            assert response.endswith(f"\\boxed{{{value_of(words[1:-1])}}}") and train_first
        if response.startswith("\\boxed"):
            assert response == f"\\boxed{{{value_of(words[1:-1])}}}" and train_first


def test_pretraining_is_a_function_of_its_seed_and_touches_no_global_state():
    small = dict(steps=8, batch=4, width=16, heads=2, ffn=16)
    torch.manual_seed(1), random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    one, _ = toy.pretrain(0, **small)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    torch.manual_seed(2)
    two, _ = toy.pretrain(0, **small)
    three, _ = toy.pretrain(1, **small)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert same(one, two) and not same(one, three) and not one.training


def test_pretraining_learns():
    """120 small steps: the loss of clean worked examples falls well below that of a uniform guess."""
    model, tok = toy.pretrain(0, steps=120, batch=16, lr=1e-2, width=32, heads=2, ffn=64)
    rng, losses = random.Random(7), []
    for _ in range(40):
        start, operations = toy.draw(rng, rng.randint(1, 5))
        context = f"<user> {toy.problem_text(start, operations)} <assistant>"
        context, response = (tok(text, add_special_tokens=False).input_ids
                             for text in (context, toy.solution_text(rng, start, operations) + " <end>"))
        labels = torch.tensor([[-100] * (len(context) + 1) + response[1:]])
        with torch.no_grad():
            losses.append(model(input_ids=torch.tensor([context + response]), labels=labels).loss.item())
    assert sum(losses) / 40 < 2.0 < torch.tensor(len(tok)).log()


@pytest.fixture
def cheap(monkeypatch, tmp_path):
    """base_model() with a tiny, quick pre-training and a cache of its own; counts how often it trains."""
    real, trained = toy.pretrain, []

    def pretrain(seed=0):
        trained.append(seed)
        return real(seed, steps=2, batch=2, width=16, heads=2, ffn=16)

    monkeypatch.setattr(toy, "pretrain", pretrain)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return trained


def test_the_base_is_made_once(cheap, tmp_path):
    first, tok = toy.base_model(0)
    again, _ = toy.base_model(0)
    other, _ = toy.base_model(1)
    assert cheap == [0, 1] and not first.training
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters()))
    assert tok("think 3").input_ids == toy.tokenizer()("think 3").input_ids
    assert len(list((tmp_path / "cache" / "prefix-rft-toy").iterdir())) == 2              # two bases, nothing half-made


def test_a_base_that_was_interrupted_is_made_again(cheap, tmp_path, monkeypatch):
    def dies(self, folder):
        (folder / "config.json").parent.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toy.LlamaForCausalLM, "save_pretrained", dies)
        with pytest.raises(KeyboardInterrupt):
            toy.base_model(0)
    assert not list((tmp_path / "cache" / "prefix-rft-toy").iterdir())
    toy.base_model(0)
    assert cheap == [0, 0]


def test_without_a_place_for_the_cache_the_base_still_comes(cheap, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model, tok = toy.base_model(0)
    assert cheap == [0] and tok.eos_token == "<end>" and not model.training


def test_two_programs_at_once_make_one_base(cheap, tmp_path, monkeypatch):
    """The other program's base appears while ours trains: ours is used, theirs stays."""
    train = toy.pretrain

    def slow(seed=0):
        monkeypatch.setattr(toy, "pretrain", train)
        toy.base_model(seed)
        return train(seed)

    monkeypatch.setattr(toy, "pretrain", slow)
    model, _ = toy.base_model(0)
    folders = list((tmp_path / "cache" / "prefix-rft-toy").iterdir())
    assert len(folders) == 1 and (folders[0] / "model.safetensors").exists()
    again, _ = toy.base_model(0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_the_first_page(cheap, capsys):
    toy.main()
    out = capsys.readouterr().out
    for title in ("problem", "own style", "expert", "sloppy", "the base:", *toy.SPLITS):
        assert f"\n{title}" in f"\n{out}"
