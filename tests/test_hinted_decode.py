"""Proofs about hinted_decode.py: the mixture, the marker, the two streams against the uncached
loop, the end of a text, the analysis, the pipeline and its resume."""

import dataclasses
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
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hinted_decode as hd
import toy
from conftest import ROOT, make_tokenizer, word_problems
from eval import InputError, load_model, load_problems, parse_flags, prompt_ids
from experiments import online, voices
from reward import reward
from sampler import Sample, Sampler

pytestmark = pytest.mark.usefixtures("toy_base")         # the toy's pipeline wants its base

INF = float("inf")


# ---- the mixture --------------------------------------------------------------------------------

def mix_by_hand(log_p, log_q, beta, mode):
    """One position, word by word."""
    h = -sum(math.exp(x) * x for x in log_p if x > -INF) / math.log(len(log_p))
    lam = {"linear": min(1, max(0, beta * h)), "sigmoid": 1 / (1 + math.exp(-beta * (h - 0.5))),
           "piecewise": 0 if h < 0.3 else 1 if h > 0.7 else (h - 0.3) / 0.4}[mode]
    log_m = []
    for x, y in zip(log_p, log_q):
        log_m.append((0 if lam == 1 else (1 - lam) * x) + (0 if lam == 0 else lam * y))
    return log_m, lam


@pytest.mark.parametrize("mode", ["linear", "sigmoid", "piecewise"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0, 300.0])
def test_mix_is_the_formula(mode, beta):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 11, generator=rng) * torch.tensor([0.1, 1, 9])[:, None, None]
    logits[0, :, 0, 3:] = -INF                     # tokens that one stream, or both, rule out
    logits[1, :, 1, :4] = -INF
    logits[:, :, 2, 5:9] = -INF
    logits[0, :, 3, 1:] = -INF                     # p is sure: what q rules out must not make a NaN
    logits[1, :, 3, 0] = -INF
    log_p, log_q = logits.log_softmax(-1)
    log_m, lam = hd.mix(log_p, log_q, beta, mode)
    assert log_m.shape == (3, 5, 11) and lam.shape == (3, 5)
    for i in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        p, q = log_p[*i].double().tolist(), log_q[*i].double().tolist()
        want, share = mix_by_hand(p, q, beta, mode)
        assert lam[*i].item() == pytest.approx(share, abs=2e-5)
        if min(share, 1 - share) > 1e-4 or share in (0, 1):
            torch.testing.assert_close(log_m[*i], torch.tensor(want), atol=1e-3, rtol=1e-3)


def test_mix_at_its_ends():
    log_p, log_q = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    log_p[0, 2], log_q[1, 3] = -INF, -INF
    assert torch.equal(hd.mix(log_p, log_q, 0.0)[0], log_p)
    assert torch.equal(hd.mix(log_p, log_q, 1e9)[0], log_q)         # at any positive entropy
    even = torch.full((9,), 1 / 9).log()                            # h = 1
    assert hd.mix(even, log_q[0], 0.25)[1].item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="linear"):
        hd.mix(log_p, log_q, 1.0, "cubic")


def test_logits_are_as_good_as_log_probabilities():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)) * 3
    log_m, lam = hd.mix(*logits, 1.5)
    want, share = hd.mix(*logits.log_softmax(-1), 1.5)
    torch.testing.assert_close(lam, share)
    torch.testing.assert_close(log_m.softmax(-1), want.softmax(-1))


def test_the_two_exceptions():
    """The first token is the hinted stream's; behind the marker all are the plain one's."""
    log_p, log_q = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    first, boxed = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]]).bool()
    log_m = hd.next_token(log_p, log_q, 0.7, first, boxed)
    mixed, _ = hd.mix(log_p, log_q, 0.7)
    assert torch.equal(log_m, torch.stack([log_p[0], log_q[1], mixed[2], log_q[3]]))
    one = hd.next_token(log_p[0], log_q[0], 0.7, first[0], boxed[0])          # without a batch
    assert torch.equal(one, log_p[0])


# ---- the marker ---------------------------------------------------------------------------------

def sentencepiece_like():
    """As Llama's: spaces are part of a token, the first of a text is dropped, and unknown
    characters become bytes."""
    words = ["<s>", "</s>", "<unk>"] + [f"<0x{i:02X}>" for i in range(256)]
    words += [c for c in "▁abcdefoxed1\\{}"] + ["▁a", "\\box", "ed{", "▁\\", "ed"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    merges = [("▁", "a"), ("▁", "\\"), ("e", "d")]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", bos_token="<s>",
                                   unk_token="<unk>")


def byte_level():
    texts = ["x \\boxed{1} x{\\b", "{\\boxed", "$\\boxed{\\boxed{"] * 20
    return make_tokenizer(texts + [row["solution"] for row in word_problems(50)], 420)


def test_progress_is_the_longest_end_that_begins_the_marker():
    for text, want in (("", 0), ("a\\", 1), ("\\bo\\b", 2), ("\\boxed", 6), ("\\boxed{", 7),
                       ("\\boxed{3} and", 7), ("\\boxed {", 0), ("boxed{", 0), ("\\\\boxe", 5)):
        assert hd.marker_progress(text) == want


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, toy.tokenizer])
def test_the_table_finds_the_marker_wherever_token_borders_fall(make):
    tokenizer, rng = make(), random.Random(0)
    size = len(tokenizer) + 7                      # models round their vocabulary up
    table = hd.marker_table(tokenizer, size)
    assert table.shape == (8, size) and table.dtype == torch.int64 and (table[7] == 7).all()
    head = tokenizer.encode("a", add_special_tokens=False)
    useful = [i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) & set("\\boxed{")]
    found, split = 0, Counter()
    for trial in range(400):
        ids = []
        for _ in range(12):                        # any token at all, special ones among them
            ids.append(rng.choice(useful if rng.random() < 0.8 else range(len(tokenizer))))
        if trial % 2 and make is not toy.tokenizer:               # the marker, cut anywhere
            cuts = sorted(rng.sample(range(1, 7), rng.randint(0, 4)))
            pieces = ["\\boxed{"[i:j] for i, j in zip([0, *cuts], [*cuts, 7])]
            coded = [tokenizer.encode("a" + piece, add_special_tokens=False) for piece in pieces]
            if all(code[:len(head)] == head for code in coded):   # else "a" melted into the piece
                ids[6:6] = sum([code[len(head):] for code in coded], [])
                split[len(pieces)] += 1
        state = 0
        for t, token in enumerate(ids, 1):
            state = int(table[state, token])
            assert (state == 7) == ("\\boxed{" in tokenizer.decode(ids[:t]))
        found += state == 7
    assert found >= 20 and (make is toy.tokenizer or len(split) >= 4)


def test_combine_switches_at_the_right_token():
    """First token from p, then the mixture, q alone from the token after the marker on; and a
    marker at the end of the prompt does not count."""
    table = torch.tensor([[0, 1, 0], [0, 1, 7], *[[0, 0, 0]] * 5, [7, 7, 7]])   # 1, then 2
    combine = hd.hinted_combine(table, 0.5)
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    log_p, log_q = logits.log_softmax(-1).unbind(1)
    log_m, _ = hd.mix(log_p, log_q, 0.5)
    state, prompt_end = torch.zeros(1, dtype=torch.long), 1
    fed, want = [prompt_end, 2, 1, 2, 0, 1], [log_p, log_m, log_m, log_q, log_q, log_q]
    for step, (last, expected) in enumerate(zip(fed, want)):
        out, state = combine(logits, torch.tensor([last]), torch.tensor([step]), state)
        torch.testing.assert_close(out, expected)


# ---- two streams against the uncached loop -------------------------------------------------------

def small_world(seed, words):
    """A random model over pieces of the marker, which it writes now and then, and ragged pairs."""
    vocab = {word: i for i, word in enumerate([*words, "<unk>"])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, initializer_range=0.4, bos_token_id=None,
        eos_token_id=None))
    rng, pairs = random.Random(seed), []
    for _ in range(9):
        pairs.append([[rng.randrange(len(words)) for _ in range(rng.randint(1, 30))]
                      for _ in range(2)])
    return model.eval(), tokenizer, pairs


def batched(model, tokenizer, pairs, beta, new, rows, **how):
    combine = hd.hinted_combine(hd.marker_table(tokenizer, model.config.vocab_size), beta)
    sampler = Sampler(model, rows, 260, streams=2)
    return sampler(pairs, max_new_tokens=new, stop=(), combine=combine, **how)


def tokens_of(samples):
    return [sample.tokens for sample in samples]


WORLDS = [(1, ["\\box", "ed{", "a"]), (3, ["\\box", "ed{", "a", "b", "c"]),
          (4, ["\\", "boxed", "{", "a"])]


def test_greedy_is_the_uncached_loop():
    switched = 0
    for seed, words in WORLDS:
        model, tokenizer, pairs = small_world(seed, words)
        want = [hd.uncached(model, tokenizer, *pair, 1.0, 24) for pair in pairs]
        for rows in (2, 64):
            samples = batched(model, tokenizer, pairs, 1.0, 24, rows, temperature=0)
            assert tokens_of(samples) == want
        switched += sum("\\boxed{" in tokenizer.decode(ids[:-1]) for ids in want)
        ids = hd.uncached(model, tokenizer, *pairs[0], 1.0, 24, stop=[want[0][5]])
        assert ids == want[0][:want[0].index(want[0][5]) + 1]
    assert switched >= 6


def test_sampled_texts_have_the_mixture_s_probabilities():
    """logp and entropy of every sampled token against two forwards; the same in any company."""
    how, switched = {"temperature": 0.7, "seed": 5}, 0
    for seed, words in WORLDS:
        model, tokenizer, pairs = small_world(seed, words)
        samples = batched(model, tokenizer, pairs, 1.0, 24, 64, **how)
        for rows in (4,):
            again = batched(model, tokenizer, pairs[::-1], 1.0, 24, rows, **how)
            assert tokens_of(again[::-1]) == tokens_of(samples)
        for (hinted, plain), sample in zip(pairs, samples):
            ids, logp, entropy = sample.tokens, [], []
            with torch.no_grad():
                log_p, log_q = (model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
                                .log_softmax(-1) for prompt in (hinted, plain))
            for t, token in enumerate(ids):
                log_m = log_p[t] if t == 0 else hd.mix(log_p[t], log_q[t], 1.0)[0]
                if "\\boxed{" in tokenizer.decode(ids[:t]):
                    log_m, switched = log_q[t], switched + 1
                log_m = (log_m / 0.7).log_softmax(-1)
                logp.append(log_m[token].item())
                entropy.append(-(log_m.exp() * log_m).sum().item())
            assert sample.logp == pytest.approx(logp, abs=1e-4)
            assert sample.entropy == pytest.approx(entropy, abs=1e-4)
    assert switched > 50


def test_beta_0_is_the_hinted_stream_and_lam_1_the_plain_one():
    model, tokenizer, pairs = small_world(0, "abcdefg")          # no marker can be written
    hinted, plain = zip(*pairs)
    how = {"stop": (), "temperature": 0}
    alone = Sampler(model, 64, 128)
    want = tokens_of(alone(hinted, max_new_tokens=30, **how))
    assert tokens_of(batched(model, tokenizer, pairs, 0.0, 30, 64, temperature=0)) == want
    twice = [(ids, ids) for ids in hinted]                       # one context twice: a plain answer
    assert tokens_of(batched(model, tokenizer, twice, 3.0, 30, 64, temperature=0)) == want
    started = [prompt + text[:1] for prompt, text in zip(plain, want)]
    rest = tokens_of(alone(started, max_new_tokens=29, **how))
    got = tokens_of(batched(model, tokenizer, pairs, 1e9, 30, 64, temperature=0))
    assert got == [text[:1] + more for text, more in zip(want, rest)] != want


# ---- the end of a text --------------------------------------------------------------------------

def test_repetition_is_what_counting_finds():
    rng, cut = random.Random(0), Counter()
    for _ in range(80):
        loop = [rng.randrange(50) for _ in range(rng.choice([1, 2, 7, 29, 31, 40]))]
        tokens = [rng.randrange(50) for _ in range(rng.randint(0, 60))]
        tokens += loop * rng.randint(1, 300 // len(loop))
        seen, want = Counter(), None
        for end in range(30, len(tokens) + 1):
            gram = tuple(tokens[end - 30:end])
            seen[gram] += 1
            if seen[gram] == 5:
                want = end
                break
        every, got, length = rng.choice([1, 4, 32]), None, 0
        while got is None and length < len(tokens):
            length = min(length + every, len(tokens))
            got = hd.repetition(tokens[:length])
        assert got == want
        cut[want is None] += 1
    assert min(cut.values()) > 10


def test_a_looping_text_is_cut():
    model, tokenizer, pairs = small_world(0, "abc")
    how = {"temperature": 0}
    cut = batched(model, tokenizer, pairs, 0.0, 120, 4, halt=hd.repetition, **how)
    whole = batched(model, tokenizer, pairs, 0.0, 120, 4, **how)
    for short, long in zip(tokens_of(cut), tokens_of(whole)):
        assert short == long[:hd.repetition(short) or 120]
        assert not any(hd.repetition(short[:t]) for t in range(len(short)))
    assert not any(sample.finished for sample in cut) and min(map(len, tokens_of(cut))) < 120


# ---- contexts and the analysis ------------------------------------------------------------------

def test_only_the_hinted_context_holds_the_solution(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    problem = word_problems(1)[0]
    chat = [{"role": "system", "content": "Be brief."},
            {"role": "user", "content": problem["problem"]}]
    for question in (problem["problem"], chat):
        for analysis in (False, True):
            asked = {"problem": question, "solution": problem["solution"]}
            hinted, plain = hd.contexts(tokenizer, asked, analysis)
            text = tokenizer.decode(hinted)
            assert plain == prompt_ids(tokenizer, question)
            assert problem["solution"] in text and problem["problem"] in text
            assert problem["solution"] not in tokenizer.decode(plain)
            assert ("Be brief." in text) == isinstance(question, list)
            assert ("# CoT" in text) == analysis and text.endswith("<|im_start|>assistant\n")
    several = {**problem, "solution": [problem["solution"], "another"]}
    assert hd.contexts(tokenizer, several) == hd.contexts(tokenizer, problem)
    hinted, plain = hd.contexts(tokenizer, {**problem, "solution": None})
    assert hinted == plain
    row, tokenizer = toy.problems("train", 1)[0], toy.tokenizer()
    hinted, _ = hd.contexts(tokenizer, row)
    expected = f"<user> {row['problem']} <hint> {row['solution']} <assistant>"
    assert tokenizer.decode(hinted) == expected


def test_an_analysis_that_never_came_to_its_heading_is_dropped(tiny_checkpoint):
    """`write` is played by a script: what the model says is not what is proved here."""
    model, tokenizer = load_model(tiny_checkpoint, torch.device("cpu"))
    problems, calls = word_problems(3), []
    says = ["First line. # CoT and more", "# CoT\nat once", "It goes on and on, without an end"]
    coded = [tokenizer(text, add_special_tokens=False).input_ids for text in says]

    def write(sampler, prompts, temperature, top_p=1.0, combine=None, halt=hd.repetition):
        calls.append((prompts, sampler, temperature))
        if len(calls) == 1:                        # the analyses, handed out four tokens at a time
            samples = []
            for ids in coded:
                ends = [halt(ids[:t]) for t in [*range(4, len(ids), 4), len(ids)]]
                end = next((end for end in ends if end), len(ids))
                samples.append(Sample(ids[:end]))
            return samples
        right = [tokenizer(row["solution"], add_special_tokens=False).input_ids
                 for row in problems[:len(prompts)]]
        return [Sample(ids + [tokenizer.eos_token_id], finished=True) for ids in right]

    flags = parse_flags(hd.Flags, ["--data", "x"], hd.TOY)
    assert flags.analysis and flags.own_temperature == 0          # as released
    writer = hd.Writer(model, tokenizer, problems, dataclasses.replace(flags, max_new_tokens=64))
    writer.write = write
    rows = writer.retell(problems, 3.0)
    assert [row["dropped"] for row in rows] == ["", "", "unfinished analysis"]
    (analyses, alone, temperature), (retellings, mixed, _) = calls
    assert alone is writer.alone and temperature == 0 and mixed is writer.mixed
    assert rows[2]["solution"] == says[2]                 # the analysis itself: nothing was retold
    assert len(retellings) == 2
    for problem, hinted, (longer, plain), text in zip(problems, analyses, retellings, says):
        assert hinted == hd.contexts(tokenizer, problem, True)[0]
        assert plain == prompt_ids(tokenizer, problem["problem"])
        analysis = tokenizer.decode(longer[len(hinted):])
        assert longer[:len(hinted)] == hinted
        assert text.startswith(analysis) and analysis.rstrip().endswith("# CoT")


# ---- the pipeline -------------------------------------------------------------------------------

def parsed(*argv):
    return parse_flags(hd.Flags, [str(arg) for arg in argv], hd.TOY)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def retold(tmp_path_factory, toy_base):
    """The pipeline on the toy with some awkward problems -> its folder, the problems, its flags."""
    folder = tmp_path_factory.mktemp("retold")
    problems = toy.problems("train", 40) + toy.problems("easy", 8)
    problems[3]["solution"] = None
    problems[5] = {**problems[5], "answer": "77", "solution": None}
    problems[7]["solution"] = [problems[7]["solution"], "another"]
    (folder / "in.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    argv = ["--data", folder / "in.jsonl", "--no_analysis", "--max_new_tokens", 64, "--rows", 8]
    hd.main(parsed(*argv, "--out", folder / "out"))
    return folder, problems, argv


def test_the_pipeline_keeps_what_is_right(retold):
    folder, problems, _ = retold
    rows, data = rows_of(folder / "out/trajectories.jsonl"), rows_of(folder / "out/data.jsonl")
    assert [row["problem"] for row in rows] == [problem["problem"] for problem in problems]
    assert data == [row for row in rows if not row["dropped"]]
    for row, problem in zip(rows, problems):
        right = reward(row["solution"], row["answer"]) == 1
        assert right == (row["dropped"] == "") or row["dropped"] in ("length", "repetition")
        assert row["source"] == "hinted" or right or not problem["solution"]
    sources = Counter(row["source"] for row in data)
    assert sources["own"] >= 4 and sources["hinted"] >= 15
    assert rows[5]["source"] == "own" and rows[5]["dropped"] == "wrong answer"
    loaded = load_problems(folder / "out/data.jsonl", require=("solution", "answer"))
    assert [problem["solution"] for problem in loaded] == [row["solution"] for row in data]


def test_the_pipeline_reports_phi_of_the_plain_context(retold):
    model, tokenizer = toy.base_model()
    for row in rows_of(retold[0] / "out/data.jsonl")[:6]:
        prompt = prompt_ids(tokenizer, row["problem"])
        response = tokenizer(row["solution"], add_special_tokens=False).input_ids
        response.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        log_p = logits.double().log_softmax(-1)
        logp = log_p.gather(1, torch.tensor(response)[:, None])[:, 0]
        phi = logp - (log_p.exp() * log_p).sum(-1)
        assert row["tokens"] == len(response)
        assert row["mean_phi"] == pytest.approx(phi.mean().item(), abs=2e-4)
        for limit in (-1, -3, -5):
            assert row[f"phi>{limit}"] == pytest.approx((phi > limit).double().mean().item())


def test_a_killed_run_resumes_to_the_same_bytes(retold, tmp_path):
    folder, _, argv = retold
    argv = [*argv, "--out", tmp_path / "run"]
    run = [sys.executable, ROOT / "hinted_decode.py", *argv]
    process = subprocess.Popen([str(arg) for arg in run], stderr=subprocess.DEVNULL)
    path, deadline = tmp_path / "run/trajectories.jsonl", time.time() + 300
    while process.poll() is None and time.time() < deadline and not path.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(rows_of(path)) < 48 and not (tmp_path / "run/data.jsonl").exists()
    with pytest.raises(InputError, match="--resume"):
        hd.main(parsed(*argv))
    with pytest.raises(InputError, match="flags"):
        hd.main(parsed(*argv, "--resume", "--beta", 1))
    half = path.read_bytes()
    for text in (half.replace(b'"answer": "(', b'"answer": "(1', 1), b"{}\n", b"[[]]\n", b"{oops\n"):
        path.write_bytes(text)
        with pytest.raises(InputError, match="trajectories.jsonl"):
            hd.main(parsed(*argv, "--resume"))
    path.write_bytes(half)
    # The same problems and answers, but another solution to retell.
    data = argv[1].read_text()
    argv[1].write_text(data.replace("boxed", "boxed ", 1))
    with pytest.raises(InputError, match="--data .* is not what this run began with"):
        hd.main(parsed(*argv, "--resume"))
    argv[1].write_text(data)
    flags = tmp_path / "run/flags.json"
    kept = flags.read_text()
    flags.write_text("{oops")
    with pytest.raises(InputError, match="flags.json is damaged"):
        hd.main(parsed(*argv, "--resume"))
    flags.write_text(kept)
    hd.main(parsed(*argv, "--resume"))
    for name in ("trajectories.jsonl", "data.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_voices_are_compared(capsys):
    argv = ["--problems", "24", "--betas", "0", "1e6"]
    voices.main(parse_flags(voices.Flags, argv, hd.TOY))
    table = {}
    for line in capsys.readouterr().out.splitlines():
        *kind, phi, _, _, _, right, _ = line.split() if line.count(".") >= 6 else [0] * 6
        table[" ".join(map(str, kind))] = float(phi), float(right)
    kinds = ["demonstration", "hinted, beta 0", "hinted, beta 1e+06", "own, T = 1"]
    phi, right = zip(*[table[kind] for kind in kinds])
    assert phi[0] < phi[1] < 0.1 and right[0] == 1
    assert right[2] < 0.5 < right[1]                             # the plain stream alone is lost


@pytest.mark.parametrize("argv, words", [
    (["--gate", "cubic"], "cubic"), (["--beta", "-1"], "--beta"), (["--top_p", 0], "--top_p"),
    (["--data", "none.jsonl"], "none.jsonl"), (["--model", "none/"], "--model"),
    (["--analysis"], "--no_analysis"), (["--max_new_tokens", 250], "--max_new_tokens 250"),
    (["--resume"], "--resume")])
def test_bad_input_is_one_sentence(argv, words, tmp_path):
    with pytest.raises(InputError, match=words):
        hd.main(parsed(*argv, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_counted(tmp_path, tiny_checkpoint, capsys):
    rows = [{**word_problems(1)[0], "solution": "x " * 3000}, word_problems(2)[1]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", tiny_checkpoint, "--data", tmp_path / "in.jsonl", "--max_new_tokens", 8]
    hd.main(parsed(*argv, "--out", tmp_path / "run"))
    out = capsys.readouterr().out
    assert "1 of 2 problems are left out" in out
    assert "dropped: unfinished analysis" in out                 # the example says why
    assert "Nothing is left to learn from." in out and "--no_analysis" in out
    [row] = rows_of(tmp_path / "run/trajectories.jsonl")         # a random model has no heading
    assert row["source"] == "hinted" and row["dropped"] == "unfinished analysis"
    assert row["finish"] == "length"


# ---- online -------------------------------------------------------------------------------------

def test_an_online_step_learns_from_a_fixed_number_of_tokens():
    rows = [([1], [2] * length) for length in (1, 5, 40)]
    for step in range(20):
        count = sum(len(response) for _, response in online.token_batch(rows, 200, step, 0))
        assert 200 <= count < 240
    assert online.token_batch(rows, 200, 1, 0) == online.token_batch(rows, 200, 1, 0)
    assert online.token_batch(rows, 200, 1, 0) != online.token_batch(rows, 200, 2, 0)


def test_online_rounds_rewrite_every_problem_once(tmp_path, toy_base):
    lines = [json.dumps(problem) + "\n" for problem in toy.problems("train", 24)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    argv = ["--data", tmp_path / "in.jsonl", "--rounds", 3, "--steps", 7, "--batch_tokens", 200,
            "--no_analysis", "--max_new_tokens", 64, "--out", tmp_path / "run"]
    online.main(parse_flags(online.Flags, [str(arg) for arg in argv], online.TOY))
    steps = [row["step"] for row in rows_of(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 8))
    rounds = [rows_of(tmp_path / f"run/round-{number}.jsonl") for number in (1, 2, 3)]
    texts = [row["problem"] for rows in rounds for row in rows]
    assert len(set(texts)) == len(texts) >= 8
    before, _ = toy.base_model()
    after, _ = load_model(str(tmp_path / "run/checkpoint"), torch.device("cpu"))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    with pytest.raises(InputError, match="--rounds 9"):
        argv[3], argv[-1] = 9, tmp_path / "other"
        online.main(parse_flags(online.Flags, [str(arg) for arg in argv], online.TOY))
