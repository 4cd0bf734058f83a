"""ddt.py: statistics against double precision, limit cases, many architectures, and memory not used."""
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddt  # noqa: E402
import eval  # noqa: E402
import toy  # noqa: E402

INF = math.inf


def loop(logits, target):
    """log p(y), H and V of one token, in Python's double precision."""
    top = max(logits)
    log_sum = math.log(sum(math.exp(z - top) for z in logits))
    log_p = [z - top - log_sum for z in logits]
    entropy = -sum(math.exp(l) * l for l in log_p if l > -700)
    variance = sum(math.exp(l) * (l + entropy) ** 2 for l in log_p if l > -700)
    return log_p[target], entropy, variance


# ---- the mathematics ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0.01, 1, 30, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_a_double_precision_loop(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 7, 33, generator=generator) * scale).to(dtype)
    logits[0, 0, 5:] = -INF
    targets = torch.randint(5, (5, 7), generator=generator)
    logp, entropy = ddt.logp_entropy(logits, targets)
    variance = ddt.varentropy(logits)
    assert logp.dtype == entropy.dtype == variance.dtype == torch.float32
    for b in range(5):
        for t in range(7):
            expected = loop(logits[b, t].tolist(), targets[b, t].item())
            got = [logp[b, t].item(), entropy[b, t].item(), variance[b, t].item()]
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_limits():
    uniform, certain = torch.zeros(50), torch.tensor([0.0, -INF, -INF])
    logp, entropy = ddt.logp_entropy(uniform, torch.tensor(3))
    assert entropy.item() == pytest.approx(math.log(50)) and ddt.cll(logp, entropy).abs() < 1e-5
    assert ddt.varentropy(uniform) < 1e-9
    assert [x.item() for x in ddt.logp_entropy(certain, torch.tensor(0))] == [0, 0]
    assert [x.item() for x in ddt.logp_entropy(certain, torch.tensor(1))] == [-INF, 0]
    assert ddt.varentropy(certain) == 0


@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("banned", [0, 3])
def test_gradients_equal_double_precision(scale, banned):
    """Both gradients, against float64 autograd of the plain definitions (the banned words left out of it)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 11, generator=generator) * scale
    logits[:, 11 - banned:] = -INF
    targets = torch.randint(11 - banned, (6,), generator=generator)
    weights = torch.randn(3, 6, generator=generator)

    ours = logits.clone().requires_grad_()
    logp, entropy = ddt.logp_entropy(ours, targets)
    (weights[0] * logp + weights[1] * entropy + weights[2] * logp * entropy).sum().backward()

    exact = logits[:, :11 - banned].double().requires_grad_()
    log_p = exact.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logp = log_p[torch.arange(6), targets]
    (weights[0] * logp + weights[1] * entropy + weights[2] * logp * entropy).sum().backward()
    tolerance = 1e-5 * max(1, scale / 100)
    assert torch.allclose(ours.grad[:, :11 - banned], exact.grad.float(), rtol=1e-4, atol=tolerance)
    assert (ours.grad[:, 11 - banned:] == 0).all()


def test_varentropy_gradient_is_finite_with_banned_words():
    logits = torch.tensor([0.3, -1.0, 2.0, -INF], requires_grad=True)
    ddt.varentropy(logits).backward()
    exact = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    log_p = exact.log_softmax(-1)
    (log_p.exp() * (log_p - (log_p.exp() * log_p).sum()) ** 2).sum().backward()
    assert torch.allclose(logits.grad, torch.cat([exact.grad.float(), torch.zeros(1)]), atol=1e-6)


def test_phi_has_mean_zero_and_variance_v_under_the_model_itself():
    """The theorem, exactly: sum over every possible token, no sampling."""
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(2)) * 2
    p = logits.softmax(-1)
    tokens = torch.arange(20).expand(4, 20)
    phi = ddt.cll(*ddt.logp_entropy(logits[:, None].expand(4, 20, 20), tokens))  # (4, 20): phi of every token
    assert (p * phi).sum(-1).abs().max() < 1e-5
    assert torch.allclose((p * phi ** 2).sum(-1), ddt.varentropy(logits), rtol=1e-4)


def test_phi_of_foreign_text_is_the_difference_of_entropies_minus_the_divergence():
    generator = torch.Generator().manual_seed(3)
    logits, other = torch.randn(30, generator=generator), torch.randn(30, generator=generator)
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    phi = ddt.cll(*ddt.logp_entropy(logits.expand(30, 30), torch.arange(30)))
    expected = -(p * log_p).sum() + (q * log_q).sum() - (q * (log_q - log_p)).sum()
    assert (q * phi).sum().item() == pytest.approx(expected.item(), abs=1e-5)
    colder = (logits / 0.5).softmax(-1)  # low temperature: more typical than the model's own text
    assert (colder * phi).sum() > 0.1


def test_divergence_of_tempered_text_is_exact_from_any_token():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 2
    for temperature in (0.3, 1.0, 1.7):
        log_p, log_q = logits.log_softmax(-1), (logits / temperature).log_softmax(-1)
        expected = (log_q.exp() * (log_q - log_p)).sum()
        entropy_q = -(log_q.exp() * log_q).sum()
        for y in range(30):
            got = ddt.tempered_divergence(log_p[y], log_q[y], entropy_q, temperature)
            assert got.item() == pytest.approx(expected.item(), abs=1e-4)


# ---- the sequence test -------------------------------------------------------------------------------------

def test_sequence_test_is_calibrated_and_finds_foreign_text():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2000, 60, 12, generator=generator) * 2

    def test(drawn_from):
        tokens = torch.multinomial(drawn_from.softmax(-1).view(-1, 12), 1, generator=generator).view(2000, 60)
        phi = ddt.cll(*ddt.logp_entropy(logits, tokens))
        return ddt.sequence_test(phi, ddt.varentropy(logits), torch.ones_like(phi, dtype=torch.bool))

    z, p = test(logits)
    assert abs(z.mean()) < 0.1 and 0.95 < z.std() < 1.05
    assert 0.03 < (p < 0.05).float().mean() < 0.07
    z, p = test(logits / 2)  # hotter: less likely than the model's own
    assert z.mean() < -2 and (p < 0.05).float().mean() > 0.5
    z, p = test(logits * 2)
    assert z.mean() > 2


def test_sequence_test_by_hand():
    phi = torch.tensor([[1.0, -3.0, math.nan], [0.0, 0.0, -INF], [-1.0, 5.0, 5.0]])
    variance = torch.tensor([[1.0, 3.0, math.nan], [0.0, 0.0, 9.0], [0.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0]]).bool()
    z, p = ddt.sequence_test(phi, variance, mask)
    assert z.tolist() == [-1, 0, -INF]  # masked NaN is not read; certain and right; impossible
    assert p.tolist() == pytest.approx([0.31731, 1, 0], abs=1e-4)


# ---- token_stats: any model, any padding -------------------------------------------------------------------

SMALL = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
             bos_token_id=2)
OLD = dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=1)
MODELS = {  # what makes each different stands beside it
    "Qwen2": dict(SMALL, tie_word_embeddings=True),
    "Llama": dict(SMALL, tie_word_embeddings=False),
    "Gemma2": dict(SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=8),  # 3 tanh(z / 3)
    "Gemma3Text": dict(SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "Granite": dict(SMALL, logits_scaling=4.0),  # z / 4
    "Cohere": dict(SMALL, logit_scale=0.3),  # 0.3 z
    "Phi": SMALL,  # a head with a bias
    "GPTNeoX": {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")},
    "GPT2": OLD,  # learned positions: wrong position_ids would show
    "GPTJ": dict(OLD, rotary_dim=4),
    "OPT": {**{k: v for k, v in SMALL.items() if k != "head_dim"}, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "Bloom": dict(vocab_size=101, hidden_size=32, n_layer=2, n_head=4),  # no positions at all
    "Olmo": SMALL,
    "Starcoder2": SMALL,
    "Mixtral": dict(SMALL, num_local_experts=4, output_router_logits=True),
    "Llama4Text": dict(SMALL, num_local_experts=2, intermediate_size_mlp=32),  # get_decoder does not find it
    "Mamba": dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4),  # no attention
}


def build(name, **changes):
    """A tiny model of an architecture, weights and biases all random."""
    config = getattr(transformers, f"{name}Config")(**{**MODELS[name], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plain(model, ids, temperature):
    """The textbook way: all logits at once. ids (1, T) -> logp, entropy, varentropy (T-1,)"""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature
    return (*ddt.logp_entropy(logits, ids[0, 1:]), ddt.varentropy(logits))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(ddt, "CHUNK", {"cpu": 3 * 101})  # three tokens at a time


@pytest.mark.parametrize("name", MODELS)
def test_token_stats_equal_the_plain_forward(name, small_chunks):
    """Values of three texts (full, padded right, padded left) and the gradient of every parameter."""
    model = build(name)
    ids = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 8:] = mask[2, :5] = False
    weights = torch.randn(3, 3, 11, generator=torch.Generator().manual_seed(6))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stats = torch.stack(ddt.token_stats(model, ids, mask, 0.7, varentropy=True))  # (3 statistics, B, T-1)
    real = mask[:, 1:] & mask[:, :-1]
    assert stats.dtype == torch.float32 and (stats[:, ~real] == 0).all()
    ours = gradients((weights * stats ** 2).sum())

    expected, loss = [], 0
    for b in range(3):
        alone = torch.stack(plain(model, ids[b, mask[b]][None], 0.7))  # (3 statistics, tokens)
        assert torch.allclose(stats[:, b, real[b]], alone, atol=1e-4)
        loss = loss + (weights[:, b, real[b]] * alone ** 2).sum()
    expected = gradients(loss)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-3), name
    with torch.no_grad():
        again = torch.stack(ddt.token_stats(model, ids, mask, 0.7, varentropy=True))
    assert torch.allclose(again, stats, atol=1e-6)


def test_only_wanted_tokens_are_computed(small_chunks):
    model = build("Qwen2")
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids, dtype=torch.bool)
    want = mask.clone()
    want[:, :4] = False  # the prompt
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // 101))
    with torch.no_grad():
        every, some, none = (ddt.token_stats(model, ids, mask, want=w) for w in (None, want, want & False))
    assert sum(seen) == 16 + 10 + 0 and max(seen) == 3
    for all_values, values, zeros in zip(every, some, none):
        assert torch.equal(values[:, 3:], all_values[:, 3:]) and (values[:, :3] == 0).all()
        assert zeros.shape == values.shape and (zeros == 0).all()
    sum(x.sum() for x in ddt.token_stats(model, ids, mask, want=want & False)).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_a_small_batch_is_cut_as_well():
    model = build("Qwen2")
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(7))
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // 101))
    ddt.token_stats(model, ids, torch.ones_like(ids))
    assert seen == [4, 4, 4, 4]


def test_training_mode_activation_checkpointing_and_the_model_left_as_it_was(small_chunks):
    model = build("Qwen2").train()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = {id(module): set(vars(module)) for module in model.modules()}
    gradients = []
    for activation_checkpointing in (False, True):
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            before = {id(module): set(vars(module)) for module in model.modules()}
        model.zero_grad()
        logp, entropy = ddt.token_stats(model, ids, mask)
        (logp + entropy ** 2).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert before == {id(module): set(vars(module)) for module in model.modules()} and model.training
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_low_precision_autocast_gives_float32_statistics(small_chunks):
    model = build("Qwen2")
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        stats = ddt.token_stats(model, ids, mask, temperature=0.7)
        logits = model(input_ids=ids).logits[:, :-1]
    assert logits.dtype == torch.bfloat16
    for ours, expected in zip(stats, ddt.logp_entropy(logits.float() / 0.7, ids[:, 1:])):
        assert ours.dtype == torch.float32 and torch.allclose(ours, expected, atol=1e-4)
    sum(x.sum() for x in stats).backward()  # computed again outside autocast, and still under it
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_model_without_a_head_is_refused_by_name():
    ids = torch.ones(1, 4, dtype=torch.long)
    model = build("Qwen2")
    classifier = transformers.Qwen2ForSequenceClassification(model.config)
    for headless, name in ((model.model, "Qwen2Model"), (classifier, "Qwen2ForSequenceClassification")):
        with pytest.raises(ValueError, match=name):
            ddt.token_stats(headless, ids, ids)


# ---- memory ------------------------------------------------------------------------------------------------

class MemoryMeter(TorchDispatchMode):
    """Follows every tensor made inside it: the .largest, and the .peak of all alive at once, in bytes."""

    def __init__(self):
        super().__init__()
        self.alive, self.largest, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_the_logits_of_a_batch_never_exist(monkeypatch):
    """Vocabulary 20,000, 512 tokens: float32 logits are 41 MB. Forward and backward stay far below that."""
    V = 20_000
    monkeypatch.setattr(ddt, "CHUNK", {"cpu": 16 * V})  # 16 tokens at a time, 1.3 MB
    model = build("Qwen2", vocab_size=V, hidden_size=8, intermediate_size=8, num_attention_heads=1,
                  num_key_value_heads=1, max_position_embeddings=256)
    ids = torch.randint(3, 100, (2, 257), generator=torch.Generator().manual_seed(10))
    mask = torch.ones_like(ids, dtype=torch.bool)
    logits, chunk, head = 4 * 512 * V, 4 * 16 * V, 4 * 8 * V

    def measure(stats):
        with MemoryMeter() as meter:
            logp, entropy = stats()
            (logp + entropy).sum().backward()
        return meter

    model.zero_grad()
    ours = measure(lambda: ddt.token_stats(model, ids, mask))
    model.zero_grad()
    textbook = measure(lambda: ddt.logp_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:]))
    assert textbook.largest >= logits and textbook.peak > 3 * logits  # the meter sees what it is meant to see
    assert ours.largest <= chunk
    assert ours.peak < 8 * chunk + 4 * head + 3e6 < logits / 2


def test_logp_entropy_keeps_two_copies_of_the_logits():
    logits = torch.zeros(64, 20_000, requires_grad=True)
    with MemoryMeter() as meter:
        logp, entropy = ddt.logp_entropy(logits, torch.zeros(64, dtype=torch.long))
        kept = sum(size for reference, size in meter.alive.values() if not reference.expired())
    assert kept < 2.1 * 4 * logits.numel()


# ---- the chapter -------------------------------------------------------------------------------------------

def test_discriminants_by_hand():
    own, foreign = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])
    assert ddt.auroc(own, foreign) == pytest.approx((3 + 1.5) / 6)  # 1 > 0; 2 > 0, 2 = 2; 3 > 0, 3 > 2
    assert ddt.snr(own, foreign) == pytest.approx(1 / math.sqrt((2 / 3 + 1) / 2))


def test_read_is_token_stats_of_each_response_alone():
    model = build("Qwen2")
    generator = torch.Generator().manual_seed(11)
    prompts, responses = ([torch.randint(3, 100, (n,), generator=generator).tolist() for n in lengths]
                          for lengths in ((3, 7, 2), (5, 1, 8)))
    *stats, mask = ddt.read(model, prompts, responses, 0.7, rows=2)
    assert mask.sum(1).tolist() == [5, 1, 8]
    for r, (prompt, response) in enumerate(zip(prompts, responses)):
        alone = plain(model, torch.tensor([prompt + response]), 0.7)
        for ours, expected in zip(stats, alone):
            assert torch.allclose(ours[r, mask[r]], expected[len(prompt) - 1:], atol=1e-5)
            assert (ours[r, ~mask[r]] == 0).all()


def test_sequence_statistics_by_hand():
    logp, entropy = torch.tensor([[-4.0, -1.0, 0.0]]), torch.tensor([[0.5, 1.5, 0.0]])
    mask = torch.tensor([[True, True, False]])
    row = {key: value.item() for key, value in ddt.sequence_statistics(logp, entropy, entropy, mask).items()}
    z = -3 / math.sqrt(2)
    assert row == pytest.approx({
        "tokens": 2, "mean_logp": -2.5, "mean_entropy": 1.0, "total_phi": -3.0, "mean_phi": -1.5,
        "phi<-1": 0.5, "phi<-3": 0.5, "phi<-5": 0.0, "phi>0": 0.5, "z": z, "p": math.erfc(-z / math.sqrt(2))})


def test_pieces_of_characters_that_span_tokens():
    """A byte-level tokenizer without merges: one token a byte, and yet no broken character is shown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    words = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "caf\u00e9 \U0001f600\n<b>"
    words = ddt.pieces(tokenizer, tokenizer(text).input_ids)
    assert "".join(words) == text and len(words) == len(text.encode())
    assert words[3:5] == ["", "\u00e9"]


def test_a_hostile_text_does_not_reach_terminal_or_page():
    assert "\033[2J" not in ddt.paint("\033[2J", -9, True) and "\033" not in ddt.paint("\033[2J", -9, False)
    assert ddt.paint("word", -4.2, False) == "word<-4.2>" and ddt.paint("word", 0.5, True) == "word"
    shown = ddt.figure("own", "", ["<script>"], torch.tensor([-1.0]), torch.tensor([0.5]))
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "phi -0.50" in shown


def checkpoint_and_data(folder):
    """A directory with an untrained model and the toy's tokenizer, and a file of five problems: as flags."""
    tokenizer = toy.tokenizer()
    model = build("Qwen2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"problem": f"{i} a +3 ?", "solution": f"think {i} a +3 \\boxed{{{i + 3}}}", "answer": str(i + 3)}
            for i in range(5)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--device", "cpu"]


def test_the_chapter_on_a_checkpoint_and_a_file(tmp_path, capsys):
    flags = [*checkpoint_and_data(tmp_path), "--n", "2", "--max_new_tokens", "12", "--temperatures", "0.5"]
    eval.run(ddt.main, ddt.Flags, [*flags, "--html", f"{tmp_path}/page.html", "--out", f"{tmp_path}/new/out"])
    shown = capsys.readouterr().out
    assert "nan" not in shown and "\033" not in shown
    rows = [json.loads(line) for line in (tmp_path / "new/out/texts.jsonl").read_text().splitlines()]
    sources = Counter(row["source"] for row in rows)
    assert sources == {"sampled at T = 0.5": 10, "sampled at T = 1": 10, "demonstrations": 5}
    assert [row["problem"] for row in rows] == 2 * [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] + [0, 1, 2, 3, 4]
    assert all(row["mean_phi"] * row["tokens"] == pytest.approx(row["total_phi"], abs=1e-4) for row in rows)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 6 and "BODY" not in page and "http" not in page
    eval.run(ddt.main, ddt.Flags, flags)
    assert capsys.readouterr().out == shown  # one seed, one output


def test_the_formula_holds_on_sampled_text(tmp_path, capsys):
    """Mean phi measured at each temperature lies within its interval of H(p) - H(q) - KL(q||p)."""
    flags = [*checkpoint_and_data(tmp_path), "--n", "100", "--max_new_tokens", "20"]
    eval.run(ddt.main, ddt.Flags, flags)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.strip().startswith("sampled at T")]
    assert [row[4] for row in rows] == ["0.5", "1", "1.5"]
    for row in rows:
        formula, measured, error = map(float, row[-3:])
        assert abs(formula - measured) < 2 * error + 1e-3 and error < 0.2
    assert float(rows[0][-2]) > 0.1 and float(rows[2][-2]) < -0.1


@pytest.mark.parametrize("flags, sentence", [
    (["--html", "."], "--html"), (["--problems", "0"], "--problems"),
    (["--temperatures", "0"], "--temperatures"), (["--data", "bare.jsonl"], "bare.jsonl line 1"),
    (["--out", "bare.jsonl/x.jsonl"], "--out")])
def test_bad_input_is_one_sentence_and_nothing_written(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    Path("bare.jsonl").write_text('{"problem": "1 a +3 ?", "answer": "4"}\n')
    with pytest.raises(SystemExit) as exit:
        eval.run(ddt.main, ddt.Flags, ["--out", "new/x.jsonl", *flags])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and not captured.out
    assert sentence in captured.err and len(captured.err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bare.jsonl"]
