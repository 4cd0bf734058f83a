"""ddt.py: statistics against loops in float64, limit cases, every kind of model, and the memory that is not used."""
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddt  # noqa: E402

INF = math.inf


def loop(logits, target):
    """log p(y), H and V of one token, in Python's double precision."""
    top = max(logits)
    log_sum = math.log(sum(math.exp(z - top) for z in logits))
    log_p = [z - top - log_sum for z in logits]
    entropy = -sum(math.exp(l) * l for l in log_p if l > -700)
    variance = sum(math.exp(l) * (l + entropy) ** 2 for l in log_p if l > -700)
    return log_p[target], entropy, variance


# ---- the mathematics ------------------------------------------------------------------------------------------------

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
    """Both gradients, against a plain float64 autograd of the definitions (the banned words left out of it)."""
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
    assert torch.allclose(ours.grad[:, :11 - banned], exact.grad.float(), rtol=1e-4, atol=1e-5 * max(1, scale / 100))
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


# ---- the sequence test ----------------------------------------------------------------------------------------------

def test_sequence_test_is_calibrated_and_finds_foreign_text():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2000, 60, 12, generator=generator) * 2

    def test(drawn_from):
        tokens = torch.multinomial(drawn_from.softmax(-1).flatten(0, 1), 1, generator=generator).view(2000, 60)
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


# ---- token_stats: any model, any padding ----------------------------------------------------------------------------

SMALL = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2)
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
        assert torch.allclose(torch.stack(ddt.token_stats(model, ids, mask, 0.7, varentropy=True)), stats, atol=1e-6)


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
        stats = ddt.token_stats(model, ids, mask)
        logits = model(input_ids=ids).logits[:, :-1]
    assert logits.dtype == torch.bfloat16
    for ours, expected in zip(stats, ddt.logp_entropy(logits, ids[:, 1:])):
        assert ours.dtype == torch.float32 and torch.allclose(ours, expected, atol=0.1)
    sum(x.sum() for x in stats).backward()  # computed again outside autocast, and still under it
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_model_without_a_head_is_refused_by_name():
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="Qwen2Model"):
        ddt.token_stats(build("Qwen2").model, ids, ids)


# ---- memory ---------------------------------------------------------------------------------------------------------

class MemoryMeter(TorchDispatchMode):
    """Follows every tensor made inside it: .largest single one and the .peak of all alive at once, in bytes."""

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
    """Vocabulary 20,000, 512 tokens: (B, T, V) logits are 41 MB in float32. Forward and backward stay far below that."""
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
