"""The toy keeps its promises: problems that repeat, splits that do not meet, an expert that is right, a base that half
knows the verbs and can look them up."""

import os
import random
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import toy
from eval import INSTRUCTION, demo_ids, prompt_ids
from hinted_decode import contexts
from reward import extract_answer, reward


def play(move, x, y):
    """A move, by an evaluator of its own."""
    pile, sign, number = re.fullmatch(r"([xy])([-+*])(\d)", move).groups()
    change = {"+": lambda v: v + int(number), "-": lambda v: v - int(number), "*": lambda v: v * int(number)}[sign]
    return (change(x) % 24, y) if pile == "x" else (x, change(y) % 24)


def question(problem):
    x, y, *verbs, mark = problem.split()
    assert mark == "?"
    return int(x), int(y), verbs


def answer_of(problem):
    """The right answer, by the dictionary."""
    x, y, verbs = question(problem)
    for verb in verbs:
        x, y = play(toy.MEANINGS[verb][x % 2], x, y)
    return f"({x}, {y})"


def steps_of(solution):
    """A solution -> [(verb, move, piles or None)], boxed."""
    told, box = re.fullmatch(r"(.*) \\boxed\{(\(\d+, \d+\))\}", solution).groups()
    steps = re.findall(r"([a-z]+) (no|[xy]\S+)(?: (\d+) (\d+))?", told)
    assert " ".join(word for step in steps for word in step if word) == told
    return [(verb, move, (int(x), int(y)) if x else None) for verb, move, x, y in steps], box


def hint_prompt(tok, row):
    """The hinted context: ids of problem and reference, up to where the own telling begins."""
    return contexts(tok, row)[0]


# ---- problems

@pytest.mark.parametrize("split, low, high", [("train", 5, 6), ("hard", 5, 6), ("longer", 7, 9), ("easy", 3, 6)])
def test_problems_are_right_and_repeat(split, low, high):
    rows = toy.problems(split)
    assert len(rows) == 256 and rows == toy.problems(split) != toy.problems(split, seed=1)
    assert toy.problems(split, 10) == rows[:10]
    assert len({row["problem"] for row in rows}) == 256
    for row in rows:
        _, _, verbs = question(row["problem"])
        assert low <= len(verbs) == len(set(verbs)) <= high
        assert sum(verb in toy.KNOWN for verb in verbs) == (len(verbs) if split == "easy" else 1)
        assert row["answer"] == answer_of(row["problem"])


def test_no_training_problem_is_in_another_split():
    """Verbs alone tell long and easy problems apart; train and hard by the hash that the problems are drawn with, also
    for problems that both would draw: here half of all problems with two verbs."""
    train = {row["problem"] for seed in range(3) for row in toy.problems("train", 2000, seed)}
    for split in ("hard", "longer", "easy"):
        assert not train & {row["problem"] for seed in range(3) for row in toy.problems(split, 1000, seed)}


def test_train_and_hard_are_disjoint_where_they_would_meet(monkeypatch):
    monkeypatch.setitem(toy.SPLITS, "train", (1, 1))
    monkeypatch.setitem(toy.SPLITS, "hard", (1, 1))
    train, hard = ({row["problem"] for row in toy.problems(split, 1500)} for split in ("train", "hard"))
    assert len(train | hard) == 3000                         # of 24 * 24 * 8 = 4,608 problems


def test_the_answer_is_read_as_an_ordered_pair_and_cannot_be_guessed():
    assert extract_answer(r"sells x+3 \boxed{(23, 0)}") == "(23, 0)"
    assert reward(r"\boxed{(23, 0)}", "(23, 0)") == 1.0
    assert reward(r"\boxed{(0, 23)}", "(23, 0)") == 0.0
    answers = [row["answer"] for row in toy.problems("hard", 4000)]
    assert max(map(answers.count, set(answers))) < 40        # the best guess is right one time in a hundred


@pytest.mark.parametrize("move", toy.MOVES)
def test_apply_is_arithmetic_modulo_24(move):
    for x, y in [(0, 0), (3, 22), (23, 1), (12, 11)]:
        assert toy.apply(move, x, y) == play(move, x, y)


def test_the_expert_is_right_and_skips_piles():
    """Every shown pair follows from the moves, and the last is always shown."""
    shown = []
    for row in toy.problems("train", 300):
        assert reward(row["solution"], row["answer"]) == 1.0
        x, y, verbs = question(row["problem"])
        steps, box = steps_of(row["solution"])
        assert [verb for verb, _, _ in steps] == verbs and box == row["answer"]
        for verb, move, piles in steps:
            assert move == toy.MEANINGS[verb][x % 2]
            x, y = play(move, x, y)
            assert piles in (None, (x, y))
        shown += [piles is not None for _, _, piles in steps[:-1]]
        assert steps[-1][2] is not None
    assert abs(sum(shown) / len(shown) - 0.6) < 0.05


# ---- the tokenizer

def test_texts_survive_the_tokenizer():
    tok = toy.tokenizer()
    for split in toy.SPLITS:
        for row in toy.problems(split, 50):
            for text in (row["problem"], row["solution"]):
                ids = tok(text, add_special_tokens=False).input_ids
                assert tok.unk_token_id not in ids and tok.decode(ids) == text
                assert len(ids) == len(text.split()) + 3 * ("boxed" in text)     # a token a word; the box is five


def test_the_chat_template_and_the_instruction():
    tok = toy.tokenizer()
    assert toy.INSTRUCTION == INSTRUCTION
    problem = "17 4 pours ?"
    ids = prompt_ids(tok, problem)                                               # the path of every real model
    assert tok.convert_ids_to_tokens(ids) == ["<user>", "17", "4", "pours", "?", "<assistant>"]
    chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": "\\boxed{(20, 4)}"}]
    whole = tok.apply_chat_template(chat, tokenize=False)
    assert tok(whole, add_special_tokens=False).input_ids == ids + demo_ids(tok, "\\boxed{(20, 4)}")
    assert demo_ids(tok, "\\boxed{(20, 4)}")[-1] == tok.eos_token_id
    assert tok("25 hello").input_ids == [tok.unk_token_id] * 2


def test_a_saved_tokenizer_comes_back_the_same(tmp_path):
    tok = toy.tokenizer()
    model, _ = toy.pretrain(steps=1)
    model.save_pretrained(tmp_path), tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for row in toy.problems("hard", 30):
        assert again(row["solution"]).input_ids == tok(row["solution"]).input_ids
        assert prompt_ids(again, row["problem"]) == prompt_ids(tok, row["problem"])
        assert again.decode(tok(row["solution"]).input_ids) == row["solution"]
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (tok.eos_token_id, tok.pad_token_id, len(tok))


# ---- pre-training

def test_pretraining_texts():
    """Plain texts are told with the base's beliefs, and no leap is trained; retellings repeat their reference."""
    tok, rng = toy.tokenizer(), random.Random(0)
    retold, doubtful = [], []
    for _ in range(3000):
        context, response, fair = toy.pretraining_text(rng, 9)
        x, y, verbs = question(re.match(r"<user> (.* \?)", context)[1])
        steps, box = steps_of(response)
        assert [verb for verb, _, _ in steps] == verbs
        retold.append("<hint>" in context)
        expected, lost = [], False
        for verb, move, piles in steps:
            if verb in toy.DOUBTFUL and not retold[-1]:
                doubtful.append(toy.MEANINGS[verb][x % 2::2].index(move) if move in toy.MEANINGS[verb][x % 2::2] else 2)
            assert verb in toy.DOUBTFUL or retold[-1] or move == toy.MEANINGS[verb][x % 2]
            x, y = play(move, x, y)
            assert piles in (None, (x, y))
            expected += [not lost, True] + [not lost] * (2 if piles else 0)
            lost = piles is None
        assert box == f"({x}, {y})"
        assert len(fair) == len(tok.tokenize(response))
        assert fair == [True] * len(fair) if retold[-1] else fair == expected + [True] * 5
        if retold[-1]:
            reference, _ = steps_of(re.search("<hint> (.*) <assistant>", context)[1])
            assert [step[:2] for step in reference] == [step[:2] for step in steps]
    assert abs(sum(retold) / len(retold) - 0.4) < 0.03
    for kind, share in enumerate([0.2, 0.5, 0.3]):                               # right, tempting, one of the others
        assert abs(doubtful.count(kind) / len(doubtful) - share) < 0.02


def test_pretraining_is_a_function_of_its_seed_and_touches_no_global_state():
    torch.manual_seed(1), random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    one, _ = toy.pretrain(0, steps=4)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    torch.manual_seed(2)
    two, _ = toy.pretrain(0, steps=4)
    three, _ = toy.pretrain(1, steps=4)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert same(one, two) and not same(one, three) and not one.training


@torch.no_grad()
def test_the_circuits_are_there_before_training():
    """First layer: head 0 looks one token back and head 1 three. Second layer: at a verb, head 0 looks for the move
    that the hint names, and at the last pile, head 1 for the next verb."""
    model, tok = toy.pretrain(0, steps=0)
    model.set_attn_implementation("eager")
    looked, found = {(0, 1): [], (1, 3): []}, {0: [], 1: []}
    for row in toy.problems("hard", 30):
        steps = toy.walk(*question(row["problem"]), toy.right)
        own, _ = toy.tell(steps)
        hinted = hint_prompt(tok, row)
        ids = hinted + tok(own).input_ids
        first, second = model(torch.tensor([ids]), output_attentions=True).attentions        # (1, heads, T, T)
        for head, back in looked:
            looked[head, back].append(first[0, head].diagonal(-back).mean())
        words = tok.convert_ids_to_tokens(ids)
        hint = words.index("<hint>")
        for i, (verb, _, _, _) in enumerate(steps):
            t = len(hinted) + 4 * i
            found[0].append(second[0, 0, t, words.index(verb, hint) + 1] * t)                # 1 if it looked anywhere
            if i + 1 < len(steps):
                found[1].append(second[0, 1, t + 3, words.index(verb) + 1] * (t + 3))
    for shares in looked.values():
        assert torch.stack(shares).mean() > 0.4
    for ratios in found.values():
        assert torch.stack(ratios).mean() > 1.5


def test_every_text_fits_the_base():
    """Hinted context and the longest telling, within the positions that the base knows."""
    model, tok = toy.pretrain(0, steps=0)
    for split in toy.SPLITS:
        for row in toy.problems(split, 200):
            hinted = hint_prompt(tok, row)
            assert len(hinted) + 48 <= model.config.max_position_embeddings
            assert max(demo_ids(tok, row["solution"])) < model.config.vocab_size
        longest = max(len(demo_ids(tok, row["solution"])) for row in toy.problems(split, 200))
        assert longest <= 4 * toy.SPLITS[split][1] + 6 <= 48                     # what max_new_tokens must hold


@torch.no_grad()
def beliefs(model, tok, rows):
    """Mean probability of what stands in the right own telling -> {name: probability}. Exact, nothing is sampled."""
    found = {}
    for row in rows:
        x, y, verbs = question(row["problem"])
        steps = toy.walk(x, y, verbs, toy.right)
        response = tok(toy.tell(steps)[0], add_special_tokens=False).input_ids
        probs = {}
        for name, context in (("plain", prompt_ids(tok, row["problem"])),
                              ("hint", hint_prompt(tok, row))):
            logits = model(torch.tensor([context + response])).logits[0, len(context) - 1:-1]
            probs[name] = logits.softmax(-1)                                     # (T, V)
        for i, (verb, move, *piles) in enumerate(steps):
            t = 4 * i                                                            # verb, move, x, y
            found.setdefault("next verb", []).append(probs["plain"][t, response[t]])
            found.setdefault("looked up", []).append(probs["hint"][t + 1, response[t + 1]])
            for j in (t + 2, t + 3):
                found.setdefault("piles", []).append(probs["plain"][j, response[j]])
            names = ["known"] if verb in toy.KNOWN else ["right", "others", "tempting", "others"]
            ids = tok.convert_tokens_to_ids(toy.MEANINGS[verb])
            if x % 2:
                ids = [ids[j] for j in (1, 0, 3, 2)[:len(ids)]]
            for name, move_id in zip(names, ids):
                found.setdefault(name, []).append(probs["plain"][t + 1, move_id])
            x = piles[0]
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


def test_the_base_is_what_the_chapter_says(toy_base):
    model, tok = toy_base
    believed = beliefs(model, tok, toy.problems("hard", 100))
    assert believed["looked up"] > 0.95
    assert believed["piles"] > 0.98 and believed["known"] > 0.98 and believed["next verb"] > 0.98
    assert abs(believed["right"] - 0.2) < 0.05
    assert abs(believed["tempting"] - 0.5) < 0.1
    assert abs(believed["others"] - 0.15) < 0.05
    scores = {split: greedy(model, tok, toy.problems(split, 64)) for split in ("hard", "easy")}
    assert scores["hard"] < 0.05 and scores["easy"] > 0.9


def greedy(model, tok, rows):
    """Share of problems that the model solves greedily, one by one."""
    right = 0
    for row in rows:
        ids = prompt_ids(tok, row["problem"])
        out = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids):]
        right += reward(tok.decode(out, skip_special_tokens=True), row["answer"])
    return right / len(rows)


@torch.no_grad()
def test_the_base_finds_its_way_after_a_leap(toy_base):
    """Where a demonstration shows the piles again, the base goes on as it would have in its own words."""
    model, tok = toy_base
    found = {"verb": [], "piles": []}
    for row in toy.problems("hard", 100):
        prompt, response = prompt_ids(tok, row["problem"]), demo_ids(tok, row["solution"])
        probs = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].softmax(-1)
        t, lost, leapt = 0, False, False
        for verb, move, piles in steps_of(row["solution"])[0]:
            if leapt and not lost:
                found["verb"].append(probs[t, response[t]])
            t += 2
            if piles:
                if leapt and not lost:
                    found["piles"] += [probs[t, response[t]], probs[t + 1, response[t + 1]]]
                t += 2
            lost = piles is None
            leapt = leapt or lost
    assert all(float(torch.stack(values).mean()) > 0.97 for values in found.values())


# ---- the cache

@pytest.fixture
def cheap(monkeypatch, tmp_path):
    """base_model() with a tiny, quick pre-training and a cache of its own; counts how often it trains."""
    real, trained = toy.pretrain, []

    def pretrain(seed=0):
        trained.append(seed)
        return real(seed, steps=2)

    monkeypatch.setattr(toy, "pretrain", pretrain)
    monkeypatch.setenv("HOME", str(tmp_path))
    return trained


def test_the_base_is_made_once(cheap, tmp_path):
    first, tok = toy.base_model(0)
    again, _ = toy.base_model(0)
    other, _ = toy.base_model(1)
    assert cheap == [0, 1] and not first.training
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters()))
    assert tok("digs x+3").input_ids == toy.tokenizer()("digs x+3").input_ids
    assert len(list((tmp_path / ".cache" / "prefix-rft-toy").iterdir())) == 2     # two bases, nothing half-made


def test_a_changed_file_gets_a_base_of_its_own(cheap, tmp_path, monkeypatch):
    toy.base_model(0)
    changed = tmp_path / "toy.py"
    changed.write_bytes(Path(toy.__file__).read_bytes() + b"# a change")
    monkeypatch.setattr(toy, "__file__", str(changed))
    toy.base_model(0)
    assert cheap == [0, 0]


def test_a_base_that_was_interrupted_is_made_again(cheap, tmp_path, monkeypatch):
    def dies(self, folder):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toy.LlamaForCausalLM, "save_pretrained", dies)
        with pytest.raises(KeyboardInterrupt):
            toy.base_model(0)
    assert not list((tmp_path / ".cache" / "prefix-rft-toy").iterdir())
    toy.base_model(0)
    assert cheap == [0, 0]


@pytest.mark.parametrize("damage", [
    lambda file: os.truncate(file, file.stat().st_size // 2),
    lambda file: file.unlink(),
    lambda file: save_file({k: v for k, v in load_file(file).items() if "q_proj" not in k}, file,
                           {"format": "pt"})])
def test_a_damaged_base_is_made_again(cheap, tmp_path, damage):
    first, _ = toy.base_model(0)
    [file] = (tmp_path / ".cache").rglob("model.safetensors")
    damage(file)
    for _ in range(2):
        model, _ = toy.base_model(0)
        assert cheap == [0, 0]
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), model.parameters()))


@pytest.mark.parametrize("broken", ["home", "save_pretrained"])
def test_whatever_forbids_the_cache_the_base_still_comes(cheap, monkeypatch, broken):
    """No HOME and no entry in passwd; a full disk, which safetensors calls by a name of its own."""
    if broken == "home":
        monkeypatch.setattr(toy.Path, "home", mock.Mock(side_effect=RuntimeError("no home")))
    else:
        monkeypatch.setattr(toy.LlamaForCausalLM, "save_pretrained",
                            mock.Mock(side_effect=SafetensorError("No space left on device")))
    model, _ = toy.base_model(0)
    assert cheap == [0] and not model.training


def test_the_base_is_made_on_one_thread_and_leaves_the_number_alone(cheap, monkeypatch):
    real, seen = toy.pretrain, []
    monkeypatch.setattr(toy, "pretrain", lambda seed: seen.append(torch.get_num_threads()) or real(seed))
    torch.set_num_threads(2)
    toy.base_model(0)
    assert seen == [1] and torch.get_num_threads() == 2


def test_without_a_place_for_the_cache_the_base_still_comes(cheap, tmp_path):
    (tmp_path / ".cache").write_text("")
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
    folders = list((tmp_path / ".cache" / "prefix-rft-toy").iterdir())
    assert len(folders) == 1 and (folders[0] / "model.safetensors").exists()
    again, _ = toy.base_model(0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_the_first_page(cheap, capsys):
    toy.main()
    out, row = capsys.readouterr().out, toy.problems("hard", 1)[0]
    assert row["problem"] in out and row["solution"] in out
    x, y, verbs = question(row["problem"])
    for line, verb in zip(out.splitlines()[-len(verbs):], verbs, strict=True):
        move = toy.MEANINGS[verb][x % 2]
        x, y = play(move, x, y)
        *told, probability = line.split()
        assert told == [verb, move, str(x), str(y)] and 0 <= float(probability) <= 1
