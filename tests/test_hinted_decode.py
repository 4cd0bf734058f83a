"""Proofs about hinted_decode.py: the mixture, the marker, the two streams against an uncached loop, the pipeline."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT, make_tokenizer, word_problems
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hinted_decode as hd
import toy
from ddt import token_stats
from eval import InputError, load_problems, parse_flags, prompt_ids
from reward import reward
from sampler import Sampler, draw, row_key, uniform

INF = float("inf")


# ---- the mixture ----------------------------------------------------------------------------------------------------

def mix_by_hand(log_p, log_q, beta, mode):
    """One position, float64, word by word."""
    V = len(log_p)
    h = -sum(math.exp(x) * x for x in log_p if x > -INF) / math.log(V)
    lam = {"linear": min(1, max(0, beta * h)), "sigmoid": 1 / (1 + math.exp(-beta * (h - 0.5))),
           "piecewise": 0 if h < 0.3 else 1 if h > 0.7 else (h - 0.3) / 0.4}[mode]
    return [(0 if lam == 1 else (1 - lam) * x) + (0 if lam == 0 else lam * y) for x, y in zip(log_p, log_q)], lam


@pytest.mark.parametrize("mode", ["linear", "sigmoid", "piecewise"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0, 300.0])
def test_mix_is_the_formula(mode, beta):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 11, generator=rng) * torch.tensor([0.1, 1.0, 9.0])[:, None, None]
    logits[0, :, 0, 3:] = -INF                      # tokens that one stream, or both, rule out
    logits[1, :, 1, :4] = -INF
    logits[:, :, 2, 5:9] = -INF
    logits[0, :, 3, 1:] = -INF                      # p is sure: lam = 0, so q's opinion must not make a NaN
    logits[1, :, 3, 0] = -INF
    log_p, log_q = logits.log_softmax(-1)
    log_m, lam = hd.mix(log_p, log_q, beta, mode)
    assert log_m.shape == (3, 5, 11) and lam.shape == (3, 5)
    for index in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        want, share = mix_by_hand(log_p[*index].double().tolist(), log_q[*index].double().tolist(), beta, mode)
        assert lam[*index].item() == pytest.approx(share, abs=2e-5)
        if min(share, 1 - share) > 1e-4 or share in (0, 1):
            torch.testing.assert_close(log_m[*index], torch.tensor(want), atol=1e-3, rtol=1e-3)


def test_mix_at_its_ends():
    log_p, log_q = torch.randn(2, 4, 9).log_softmax(-1)
    log_p[0, 2], log_q[1, 3] = -INF, -INF
    assert torch.equal(hd.mix(log_p, log_q, 0.0)[0], log_p)
    assert torch.equal(hd.mix(log_p, log_q, 1e9)[0], log_q)
    assert hd.mix(torch.full((9,), 1 / 9).log(), log_q[0], 0.25)[1].item() == pytest.approx(0.25)      # h = 1
    with pytest.raises(ValueError, match="linear"):
        hd.mix(log_p, log_q, 1.0, "cubic")


# ---- the marker -----------------------------------------------------------------------------------------------------

def sentencepiece_like():
    """As Llama's: spaces are part of the token, the first one of a text is dropped, unknown characters become bytes."""
    words = ["<s>", "</s>", "<unk>"] + [f"<0x{i:02X}>" for i in range(256)]
    words += [c for c in "▁abcdefoxed1\\{}"] + ["▁a", "\\box", "ed{", "▁\\", "ed"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    merges = [("▁", "a"), ("▁", "\\"), ("e", "d")]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def byte_level():
    texts = ["x \\boxed{1} x{\\b", "{\\boxed", "$\\boxed{\\boxed{"] * 20
    return make_tokenizer(texts + [row["solution"] for row in word_problems(50)], 420)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, toy.tokenizer])
def test_marker_is_seen_where_the_text_has_it(make):
    tokenizer, rng = make(), random.Random(0)
    size = len(tokenizer) + 7                       # models round their vocabulary up
    table = hd.marker_table(tokenizer, size)
    assert table.shape == (8, size) and table.dtype == torch.int64 and (table[7] == 7).all()
    special = set(tokenizer.all_special_ids)
    useful = [i for i in range(len(tokenizer)) if i not in special and set(tokenizer.decode([i])) & set("\\boxed{")]
    found, split = 0, Counter()
    for trial in range(400):
        ids = [rng.choice(useful) if rng.random() < 0.8 else rng.choice(range(len(tokenizer))) for _ in range(12)]
        if trial % 2 and make is not toy.tokenizer:                     # the marker in pieces, cut anywhere
            cuts = sorted(rng.sample(range(1, 7), rng.randint(0, 4)))
            pieces = ["\\boxed{"[i:j] for i, j in zip([0, *cuts], [*cuts, 7])]
            raw = [tokenizer.encode("a" + piece, add_special_tokens=False) for piece in pieces]
            head = len(tokenizer.encode("a", add_special_tokens=False))
            if all(tokenizer.decode(r[:head]) == "a" for r in raw):     # else "a" and the piece are one token
                ids[6:6] = [i for r in raw for i in r[head:]]
                split[len(pieces)] += 1
        ids = [i for i in ids if i not in special]
        state = 0
        for t, token in enumerate(ids, 1):
            state = int(table[state, token])
            assert (state == 7) == ("\\boxed{" in tokenizer.decode(ids[:t], clean_up_tokenization_spaces=False))
        found += state == 7
    assert found >= 20 and (make is toy.tokenizer or len(split) >= 4)


def test_special_tokens_begin_a_new_text():
    tokenizer = byte_level()
    table = hd.marker_table(tokenizer, len(tokenizer))
    for special in tokenizer.all_special_ids:
        assert table[:, special].tolist() == [0] * 7 + [7]


def test_combine_switches_at_the_right_token():
    """First token from p; then the mixture; q alone from the token after the marker on; the prompt does not count."""
    table = torch.tensor([[0, 1, 0], [0, 1, 2], [2, 2, 2]])             # a marker of two tokens: 1 then 2
    combine = hd.hinted_combine(table, 0.5)
    logits = torch.randn(1, 2, 3)
    log_p, log_q = logits.log_softmax(-1).unbind(1)
    log_m = hd.mix(log_p, log_q, 0.5)[0]
    state, prompt_end = torch.zeros(1, dtype=torch.long), torch.tensor([1])
    tokens, want = [2, 1, 2, 0, 1], [log_p, log_m, log_m, log_q, log_q]
    for step, (last, expected) in enumerate(zip([prompt_end, *torch.tensor(tokens)[:, None]], want)):
        out, state = combine(logits, last, torch.tensor([step]), state)
        torch.testing.assert_close(out, expected)


# ---- two streams against two uncached forwards ----------------------------------------------------------------------

def world(seed, words=("\\", "box", "ed{", "\\boxed", "{", "a", "b", "c")):
    """A random model over pieces of the marker, so that it writes it now and then, and ragged pairs of prompts."""
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, "<unk>"])}, unk_token="<unk>"))
    tok.decoder = decoders.Fuse()
    tokenizer, rng = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>"), random.Random(seed)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=64, initializer_range=0.4, bos_token_id=None,
                         eos_token_id=None)
    prompt = lambda: [rng.randrange(len(words)) for _ in range(rng.randint(1, 30))]
    return LlamaForCausalLM(config).eval(), tokenizer, [(prompt(), prompt()) for _ in range(9)]


@torch.no_grad()
def slow(model, tokenizer, hinted, plain, beta, new, temperature=0.0, top_p=1.0, seed=0):
    """Hinted decoding by two uncached forwards a token and the decoded text, with the sampler's random numbers."""
    ids, key = [], torch.tensor([row_key(seed, (tuple(hinted), tuple(plain)), 0)])
    for t in range(new):
        log_p, log_q = (model(torch.tensor([context + ids])).logits[:, -1].log_softmax(-1)
                        for context in (hinted, plain))
        log_m = log_q if "\\boxed{" in tokenizer.decode(ids) else hd.mix(log_p, log_q, beta)[0] if t else log_p
        ids.append(int(draw(log_m, uniform(key, torch.tensor([t])), temperature, 0, top_p)[0]))
    return ids


def fast(model, tokenizer, pairs, beta, new, rows, **how):
    combine = hd.hinted_combine(hd.marker_table(tokenizer, model.config.vocab_size), beta)
    return Sampler(model, rows, 128, streams=2)(pairs, max_new_tokens=new, stop=(), combine=combine, **how).lists()


def test_greedy_equals_the_uncached_loop():
    switched = 0
    for seed, words in ((1, ["\\box", "ed{", "a"]), (3, ["\\box", "ed{", "a", "b", "c"]),
                        (4, ["\\", "boxed", "{", "a"])):
        model, tokenizer, pairs = world(seed, words)
        want = [slow(model, tokenizer, *pair, 1.0, 24) for pair in pairs]
        for rows in (1, 4, 64):
            assert fast(model, tokenizer, pairs, 1.0, 24, rows, temperature=0) == want
        assert want[:2] == [hd.uncached(model, tokenizer, *pair, 1.0, 24) for pair in pairs[:2]]
        switched += sum("\\boxed{" in tokenizer.decode(ids[:-1]) for ids in want)
    assert switched >= 6


def test_sampled_equals_the_uncached_loop_and_does_not_depend_on_company():
    how, switched = {"temperature": 0.7, "top_p": 0.9, "seed": 5}, 0
    for seed in range(2):
        model, tokenizer, pairs = world(seed)
        want = [slow(model, tokenizer, *pair, 1.0, 30, **how) for pair in pairs]
        for rows in (1, 4, 64):
            assert fast(model, tokenizer, pairs, 1.0, 30, rows, **how) == want
        assert fast(model, tokenizer, pairs[::-1], 1.0, 30, 3, **how) == want[::-1]
        switched += sum("\\boxed{" in tokenizer.decode(ids[:-1]) for ids in want)
    assert switched >= 4


def test_beta_0_is_the_hinted_stream_and_lambda_1_the_plain_one():
    model, tokenizer, pairs = world(0, words=("a", "b", "c", "d", "e", "f", "g"))       # no marker can be written
    alone = Sampler(model, 64, 128)
    hinted, plain = zip(*pairs)
    for how in ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}):
        first = [ids[:1] for ids in fast(model, tokenizer, pairs, 1e9, 1, 64, **how)]
        if not how["temperature"]:
            want = alone(hinted, max_new_tokens=30, stop=(), **how).lists()
            assert fast(model, tokenizer, pairs, 0.0, 30, 64, **how) == want
            started = [prompt + token for prompt, token in zip(plain, first)]
            rest = alone(started, max_new_tokens=29, stop=(), **how).lists()
            assert fast(model, tokenizer, pairs, 1e9, 30, 64, **how) == [a + b for a, b in zip(first, rest)]
        else:                                       # the random numbers are the pair's: compare distributions
            one = Sampler(model, 64, 128, streams=2)
            combine = hd.hinted_combine(hd.marker_table(tokenizer, model.config.vocab_size), 0.0)
            got = one(pairs, max_new_tokens=20, stop=(), combine=combine, **how)
            for i, prompt in enumerate(hinted):
                ids = torch.tensor([prompt + got.tokens[i].tolist()])
                with torch.no_grad():
                    logp, entropy = token_stats(model, ids, torch.ones_like(ids), how["temperature"])
                torch.testing.assert_close(got.logp[i], logp[0, len(prompt) - 1:], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(got.entropy[i], entropy[0, len(prompt) - 1:], atol=1e-4, rtol=1e-4)


# ---- the end of a text ----------------------------------------------------------------------------------------------

def test_repetition_is_what_counting_finds():
    rng = random.Random(0)
    cut = Counter()
    for _ in range(150):
        loop = [rng.randrange(50) for _ in range(rng.choice([1, 2, 7, 29, 31, 40]))]
        tokens = [rng.randrange(50) for _ in range(rng.randint(0, 60))] + loop * rng.randint(1, 300 // len(loop))
        seen, want = Counter(), None
        for end in range(30, len(tokens) + 1):
            seen[tuple(tokens[end - 30:end])] += 1
            if seen[tuple(tokens[end - 30:end])] == 5:
                want = end
                break
        every, got, length = rng.choice([1, 4, 8]), None, 0
        while got is None and length < len(tokens):
            length = min(length + every, len(tokens))
            got = hd.repetition(tokens[:length])
        assert got == want
        cut[want is None] += 1
    assert min(cut.values()) > 20


def test_a_looping_text_is_cut():
    model, tokenizer, pairs = world(0)
    combine = hd.hinted_combine(hd.marker_table(tokenizer, model.config.vocab_size), 0.0)
    sampler, how = Sampler(model, 4, 256, streams=2), {"max_new_tokens": 200, "stop": (), "temperature": 0}
    samples = sampler(pairs, combine=combine, halt=hd.repetition, **how)
    whole = sampler(pairs, combine=combine, **how)
    for ids, text in zip(samples.lists(), whole.lists()):
        assert ids == text[:hd.repetition(ids) or 200]
        assert not any(hd.repetition(ids[:t]) for t in range(len(ids)))
    assert not samples.finished.any() and min(map(len, samples.lists())) < 200


# ---- contexts -------------------------------------------------------------------------------------------------------

def test_only_the_hinted_context_holds_the_solution(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    problem = word_problems(1)[0]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": problem["problem"]}]
    for question in (problem["problem"], chat):
        for solution in (problem["solution"], [problem["solution"], "another one"]):
            hinted, plain = hd.contexts(tokenizer, {"problem": question, "solution": solution})
            assert plain == prompt_ids(tokenizer, question)
            text, end = tokenizer.decode(hinted), "<|im_start|>assistant\n"
            assert problem["solution"] in text and problem["problem"] in text and text.endswith(end)
            assert "another one" not in text and problem["solution"] not in tokenizer.decode(plain)
            assert ("Be brief." in text) == isinstance(question, list)
            analysis, _ = hd.contexts(tokenizer, {"problem": question, "solution": solution}, analysis=True)
            assert tokenizer.decode(analysis).endswith(end + "# Analysis\n") and "# CoT" in tokenizer.decode(analysis)
    assert hd.contexts(tokenizer, {**problem, "solution": None})[0] == []
    row, tok = toy.problems("train", 1)[0], toy.tokenizer()
    assert hd.contexts(tok, row)[0] == toy.hint_prompt(tok, row["problem"], row["solution"])


def flags(*argv):
    return parse_flags(hd.Flags, [str(a) for a in argv], hd.TOY)


@pytest.mark.parametrize("new", [40, 10**6])
def test_the_analysis_comes_before_the_text(tiny_checkpoint, new):
    """A random model writes no heading: its analysis ends at its share, and the retelling goes on under the heading."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model.config.max_position_embeddings = 600
    problems = word_problems(3)
    rewriter = hd.Rewriter(model, tokenizer, problems, flags("--data", "x", "--analysis", "--max_new_tokens", new))
    pairs = [hd.contexts(tokenizer, p, True) for p in problems]
    for (before, plain), (after, same) in zip(pairs, rewriter.analysed(pairs)):
        added = tokenizer.decode(after[len(before):])
        assert same == plain and after[:len(before)] == before and added.endswith("\n\n# CoT\n") and len(added) > 9
        assert len(after) < 600
    assert [row["source"] for row in rewriter.hinted(problems, 3.0)] == ["hinted"] * 3


# ---- the pipeline ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def retold(tmp_path_factory):
    """A run of the pipeline on the toy with a few awkward problems: (out, problems)."""
    folder = tmp_path_factory.mktemp("retold")
    problems = toy.problems("train", 40) + toy.problems("easy", 8)
    problems[3]["solution"] = None
    problems[5]["answer"], problems[5]["solution"] = "77", None
    problems[7]["solution"] = [problems[7]["solution"], "think"]
    (folder / "in.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    hd.main(flags("--data", folder / "in.jsonl", "--out", folder / "out", "--save_every", 8, "--max_new_tokens", 64))
    return folder, problems


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pipeline_keeps_what_is_right(retold):
    folder, problems = retold
    rows, data = rows_of(folder / "out/trajectories.jsonl"), rows_of(folder / "out/data.jsonl")
    assert [row["problem"] for row in rows] == [p["problem"] for p in problems]
    assert data == [row for row in rows if not row["dropped"]] and len(data) > 36
    assert all(reward(row["solution"], row["answer"]) == 1 and row["finish"] == "stop" for row in data)
    sources = Counter(row["source"] for row in data)
    assert sources["own"] >= 4 and sources["hinted"] >= 20
    assert rows[5]["dropped"] == "no demonstration"
    for row in rows[:40]:
        if row["source"] == "hinted" and not row["dropped"]:
            assert row["solution"].startswith("think")
    report = json.loads((folder / "out/summary.json").read_text())
    assert sum(report["counts"].values()) == len(problems)
    loaded = load_problems(folder / "out/data.jsonl", require=("solution", "answer"))
    assert [p["solution"] for p in loaded] == [row["solution"] for row in data]


def test_pipeline_reports_phi_of_the_plain_context(retold):
    folder, _ = retold
    model, tokenizer = toy.base_model()
    for row in rows_of(folder / "out/data.jsonl")[:6]:
        prompt = prompt_ids(tokenizer, row["problem"])
        response = tokenizer(row["solution"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)
        phi = log_p.gather(1, torch.tensor(response)[:, None])[:, 0] - (log_p.exp() * log_p).sum(-1)
        assert row["tokens"] == len(response)
        assert row["mean_phi"] == pytest.approx(phi.mean().item(), abs=2e-4)
        for bound in (-1, -3, -5):
            assert row[f"phi>{bound}"] == pytest.approx((phi > bound).double().mean().item(), abs=1e-4)


def test_a_killed_run_resumes_to_the_same_bytes(retold, tmp_path):
    folder, _ = retold
    argv = ["--data", folder / "in.jsonl", "--out", tmp_path / "run", "--save_every", 8, "--max_new_tokens", 64]
    process = subprocess.Popen([sys.executable, ROOT / "hinted_decode.py", *map(str, argv)], stderr=subprocess.DEVNULL)
    path, deadline = tmp_path / "run/trajectories.jsonl", time.time() + 120
    while process.poll() is None and time.time() < deadline and not (path.exists() and path.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(path.read_bytes().splitlines()) < 48 and not (tmp_path / "run/data.jsonl").exists()
    with open(path, "a") as file:
        file.write('{"problem": "half a li')           # what a kill in the middle of a write leaves
    with pytest.raises(InputError, match="--resume"):
        hd.main(flags(*argv))
    with pytest.raises(InputError, match="flags"):
        hd.main(flags(*argv, "--resume", "--beta", 1))
    hd.main(flags(*argv, "--resume"))
    for name in ("trajectories.jsonl", "data.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_texts_are_compared(tmp_path, capsys):
    hd.main(flags("--problems", 24, "--betas", 0, 1e6, "--out", tmp_path / "run"))
    table = json.loads((tmp_path / "run/summary.json").read_text())["table"]
    assert list(table) == ["demonstrations", "hinted, beta 0", "hinted, beta 1e+06", "own, T 0.3", "own, T 1"]
    phi, right = ({name: row[key] for name, row in table.items()} for key in ("mean_phi", "right"))
    assert phi["demonstrations"] < phi["hinted, beta 0"] < 0.1 and right["demonstrations"] == 1
    assert right["hinted, beta 1e+06"] < 0.5 < right["hinted, beta 0"]         # the plain stream alone is lost
    assert "demonstrations" in capsys.readouterr().out


# ---- rounds ---------------------------------------------------------------------------------------------------------

def test_steps_learn_from_equal_numbers_of_tokens():
    rows = [([1], [2] * n) for n in (1, 5, 40)]
    for step in range(20):
        count = sum(len(answer) for _, answer in hd.token_batch(rows, 200, step, 0))
        assert 200 <= count < 240
    assert hd.token_batch(rows, 200, 1, 0) == hd.token_batch(rows, 200, 1, 0) != hd.token_batch(rows, 200, 2, 0)


def test_rounds_resume_to_the_same_weights(tmp_path):
    argv = ["--problems", 24, "--rounds", 3, "--steps", 7, "--eval_data", tmp_path / "eval.jsonl"]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(p) + "\n" for p in toy.problems("easy", 8)))
    hd.main(flags(*argv, "--out", tmp_path / "whole"))
    run = [sys.executable, ROOT / "hinted_decode.py", *argv, "--out", tmp_path / "killed"]
    process = subprocess.Popen([str(a) for a in run], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path, deadline = tmp_path / "killed/checkpoint", time.time() + 120
    while process.poll() is None and time.time() < deadline and not path.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hd.main(flags(*argv, "--out", tmp_path / "killed", "--resume"))
    weights = [(tmp_path / name / "checkpoint/model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    metrics = [[(row["step"], row["round"], row["nll"]) for row in rows_of(tmp_path / name / "metrics.jsonl")]
               for name in ("whole", "killed")]
    assert metrics[0] == metrics[1] and [row[1] for row in metrics[0]] == [1, 1, 2, 2, 3, 3, 3]
    rounds = [rows_of(tmp_path / f"whole/round-{r}.jsonl") for r in (1, 2, 3)]
    problems = [row["problem"] for rows in rounds for row in rows]
    assert len(set(problems)) == len(problems) >= 20                                     # every problem once


def test_bad_input_is_one_sentence(tmp_path, tiny_checkpoint):
    for argv, words in ((["--rounds", 9, "--steps", 8], "--rounds 9"), (["--gate", "cubic"], "cubic"),
                        (["--beta", "-1"], "--beta"), (["--data", tmp_path / "none.jsonl"], "none.jsonl"),
                        (["--model", tmp_path / "none"], "--model")):
        with pytest.raises(InputError, match=words):
            hd.main(flags(*argv, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    rows = [{**word_problems(1)[0], "solution": "x " * 3000}, word_problems(2)[1]]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", tiny_checkpoint, "--data", tmp_path / "long.jsonl", "--max_new_tokens", 8]
    hd.main(flags(*argv, "--out", tmp_path / "run"))
    assert [row["dropped"] for row in rows_of(tmp_path / "run/trajectories.jsonl")] == ["length"]
    with pytest.raises(InputError, match="longer than"):
        (tmp_path / "long.jsonl").write_text(json.dumps(rows[0]))
        hd.main(flags(*argv, "--out", tmp_path / "other"))
