"""ddt.py: statistics against double precision, limits, many architectures, memory not used."""

import copy
import json
import math
import pickle
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers
from conftest import make_tokenizer, recompute_activations, refusal, run_here
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddt
import toy
from eval import demo_ids, prompt_ids

INF = math.inf


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def loop(logits, target):
    """log p(y), H and V of one token, in Python's double precision."""
    top = max(logits)
    log_sum = math.log(sum(math.exp(z - top) for z in logits))
    log_p = [z - top - log_sum for z in logits]
    entropy = -sum(math.exp(l) * l for l in log_p if l > -700)
    variance = sum(math.exp(l) * (l + entropy) ** 2 for l in log_p if l > -700)
    return log_p[target], entropy, variance


# ---- the mathematics ----------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0.01, 1, 30, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_a_double_precision_loop(scale, dtype):
    logits = (torch.randn(5, 7, 33, generator=seeded(0)) * scale).to(dtype)
    logits[0, 0, 5:] = -INF
    targets = torch.randint(5, (5, 7), generator=seeded(1))
    found = ddt.all_stats(logits, targets)
    assert {x.dtype for x in found} == {torch.float32}
    for b in range(5):
        for t in range(7):
            expected = loop(logits[b, t].tolist(), targets[b, t].item())
            assert [x[b, t].item() for x in found] == pytest.approx(expected, rel=1e-5, abs=1e-5)


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
    """Against float64 autograd of the plain definitions, banned words (logit -inf) left out."""
    logits = torch.randn(6, 11, generator=seeded(1)) * scale
    logits[:, 11 - banned:] = -INF
    targets = torch.randint(11 - banned, (6,), generator=seeded(2))
    weights = torch.randn(3, 6, generator=seeded(3))

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


def test_varentropy_gradient_with_banned_words():
    logits = torch.tensor([0.3, -1.0, 2.0, -INF], requires_grad=True)
    ddt.varentropy(logits).backward()
    exact = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    log_p = exact.log_softmax(-1)
    (log_p.exp() * (log_p - (log_p.exp() * log_p).sum()) ** 2).sum().backward()
    assert torch.allclose(logits.grad, torch.cat([exact.grad.float(), torch.zeros(1)]), atol=1e-6)


def test_phi_has_mean_zero_and_variance_v_under_the_model_itself():
    """The theorem, exactly: sum over every possible token, no sampling."""
    logits = torch.randn(4, 20, generator=seeded(2)) * 2
    p = logits.softmax(-1)
    every = torch.arange(20).expand(4, 20)
    phi = ddt.cll(*ddt.logp_entropy(logits[:, None].expand(4, 20, 20), every))
    assert (p * phi).sum(-1).abs().max() < 1e-5
    assert torch.allclose((p * phi ** 2).sum(-1), ddt.varentropy(logits), rtol=1e-4)


def test_phi_of_foreign_text_is_the_difference_of_entropies_minus_the_divergence():
    logits, other = torch.randn(2, 30, generator=seeded(3))
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    phi = ddt.cll(*ddt.logp_entropy(logits.expand(30, 30), torch.arange(30)))
    expected = -(p * log_p).sum() + (q * log_q).sum() - (q * (log_q - log_p)).sum()
    assert (q * phi).sum().item() == pytest.approx(expected.item(), abs=1e-5)
    assert ((logits / 0.5).softmax(-1) * phi).sum() > 0.1       # colder: more typical than own text


# ---- the sequence test --------------------------------------------------------------------------

def test_sequence_test_is_calibrated_and_finds_foreign_text():
    generator = seeded(4)
    logits = torch.randn(2000, 60, 12, generator=generator) * 2

    def test(drawn_from):
        p = drawn_from.softmax(-1).view(-1, 12)
        tokens = torch.multinomial(p, 1, generator=generator).view(2000, 60)
        phi = ddt.cll(*ddt.logp_entropy(logits, tokens))
        return ddt.sequence_test(phi, ddt.varentropy(logits), torch.ones_like(phi))

    z, p = test(logits)
    assert abs(z.mean()) < 0.1 and 0.95 < z.std() < 1.05
    assert 0.03 < (p < 0.05).float().mean() < 0.07
    z, p = test(logits / 2)                                     # hotter
    assert z.mean() < -2 and (p < 0.05).float().mean() > 0.5
    assert test(logits * 2)[0].mean() > 2                       # colder


def test_sequence_test_by_hand():
    phi = torch.tensor([[1.0, -3.0, math.nan], [0.0, 0.0, -INF], [-1.0, 5.0, 5.0]])
    variance = torch.tensor([[1.0, 3.0, math.nan], [0.0, 0.0, 9.0], [0.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0]]).bool()
    z, p = ddt.sequence_test(phi, variance, mask)
    assert z.tolist() == [-1, 0, -INF]      # masked NaN is not read; certain; impossible
    assert p.tolist() == pytest.approx([0.31731, 1, 0], abs=1e-4)


# ---- token_stats: any model, any padding --------------------------------------------------------

PLAIN = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
             bos_token_id=2)
SMALL = dict(PLAIN, num_key_value_heads=2, head_dim=8)
OLD = dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2,
           eos_token_id=1)
MODELS = {                                                  # what makes each different
    "Qwen2": dict(SMALL, tie_word_embeddings=True),
    "Llama": dict(SMALL, tie_word_embeddings=False),
    "Gemma2": dict(SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=8),    # 3 tanh(z / 3)
    "Gemma3Text": dict(SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "Granite": dict(SMALL, logits_scaling=4.0),             # z / 4
    "Cohere": dict(SMALL, logit_scale=0.3),                 # 0.3 z
    "Phi": SMALL,                                           # a head with a bias
    "GPTNeoX": PLAIN,
    "GPT2": OLD,                                            # learned positions
    "GPTJ": dict(OLD, rotary_dim=4),
    "OPT": dict(PLAIN, ffn_dim=48, word_embed_proj_dim=16), # a projection before the head
    "BioGpt": PLAIN,                                        # dropout in the layer's own code
    "XGLM": dict(vocab_size=101, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "Bert": dict(PLAIN, is_decoder=True),                   # a head of two layers
    "Bloom": dict(vocab_size=101, hidden_size=32, n_layer=2, n_head=4),     # no positions at all
    "Olmo": SMALL,
    "Starcoder2": SMALL,
    "Mixtral": dict(SMALL, num_local_experts=4, output_router_logits=True),
    "Llama4Text": dict(SMALL, num_local_experts=2, intermediate_size_mlp=32),   # no get_decoder
    "Mamba": dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4),
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


def plain(model, ids, temperature=1.0):
    """The textbook way: all logits at once. ids (1, T) -> logp, entropy, varentropy, (3, T-1)."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature
    return torch.stack(ddt.all_stats(logits, ids[0, 1:]))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def texts(seed, B, T):
    return torch.randint(3, 100, (B, T), generator=seeded(seed))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(ddt, "CHUNK", {"cpu": 3 * 101})         # three tokens at a time


@pytest.mark.parametrize("padding", ["right", "left and right"])
@pytest.mark.parametrize("name", MODELS)
def test_token_stats_equal_the_plain_forward(name, padding, small_chunks):
    """Values of three texts and the gradient of every parameter, as if each text stood alone."""
    model = build(name)
    ids = texts(5, 3, 12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 8:] = False
    if padding != "right":
        mask[2, :5] = False
    weights = torch.randn(3, 3, 11, generator=seeded(6))

    stats = torch.stack(ddt.token_stats(model, ids, mask, 0.7, stats=ddt.all_stats))
    real = mask[:, 1:] & mask[:, :-1]
    assert stats.dtype == torch.float32 and (stats[:, ~real] == 0).all()
    ours = gradients(model, (weights * stats ** 2).sum())

    loss = 0
    for b in range(3):
        alone = plain(model, ids[b, mask[b]][None], 0.7)
        assert torch.allclose(stats[:, b, real[b]], alone, atol=1e-4)
        loss = loss + (weights[:, b, real[b]] * alone ** 2).sum()
    expected = gradients(model, loss)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-3), name
    with torch.no_grad():
        again = torch.stack(ddt.token_stats(model, ids, mask, 0.7, stats=ddt.all_stats))
    assert torch.allclose(again, stats, atol=1e-6)


@pytest.mark.parametrize("hole, passed", [(slice(0), False), (slice(7, None), False),
                                          (slice(0, 2), True), (slice(3, 5), True)])
def test_only_padding_that_is_not_on_the_right_needs_a_mask(hole, passed):
    """A mask costs attention its fast kernel; without one numbers and gradients are the same."""
    model, ids = build("Qwen2"), texts(7, 2, 9)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, hole] = False
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    logp, entropy = ddt.token_stats(model, ids, mask)
    hook.remove()
    assert {"attention_mask", "position_ids"} & seen[0].keys() == (
        {"attention_mask", "position_ids"} if passed else set())
    ours = gradients(model, (logp + entropy ** 2).sum())

    logits = model(input_ids=ids, attention_mask=mask.long(),
                   position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0)).logits[:, :-1]
    real = mask[:, 1:] & mask[:, :-1]
    expected = ddt.logp_entropy(logits[real], ids[:, 1:][real])
    for one, other in zip((logp, entropy), expected):
        assert torch.allclose(one[real], other, atol=1e-6)
    for name, gradient in gradients(model, (expected[0] + expected[1] ** 2).sum()).items():
        assert torch.allclose(gradient, ours[name], atol=1e-5), name


def tokens_of_head(model):
    """A list to which every call of the output head adds its number of tokens."""
    seen = []
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(output.numel() // output.shape[-1]))
    return seen


def test_only_wanted_tokens_are_computed(small_chunks):
    model, ids = build("Qwen2"), texts(7, 2, 9)
    mask = torch.ones_like(ids, dtype=torch.bool)
    want = mask.clone()
    want[:, :4] = False                                         # the prompt
    seen = tokens_of_head(model)
    with torch.no_grad():
        every, some, none = (ddt.token_stats(model, ids, mask, want=w)
                             for w in (None, want, want & False))
    assert sum(seen) == 16 + 10 + 0 and max(seen) == 3
    for all_values, values, zeros in zip(every, some, none):
        assert torch.equal(values[:, 3:], all_values[:, 3:]) and (values[:, :3] == 0).all()
        assert zeros.shape == values.shape and (zeros == 0).all()
    sum(x.sum() for x in ddt.token_stats(model, ids, mask, want=want & False)).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("used", [0, 1])
def test_a_statistic_that_is_not_used_has_no_backward_pass(used):
    model, seen = build("Qwen2"), []

    def spied(logits, targets):
        found = ddt.logp_entropy(logits, targets)
        for i in (0, 1):
            found[i].register_hook(lambda gradient, i=i: seen.append((i, gradient is None)))
        return found

    ddt.response_stats(model, ragged(), stats=spied)[used].sum().backward()
    assert (used, False) in seen and (1 - used, False) not in seen


def test_a_small_batch_is_cut_as_well():
    model, ids = build("Qwen2"), texts(7, 2, 9)
    seen = tokens_of_head(model)
    ddt.token_stats(model, ids, torch.ones_like(ids))
    assert seen == [4, 4, 4, 4]
    # On a GPU every chunk is an addition to the head's bf16 gradient: few for 8k tokens of Qwen.
    assert 8192 / (ddt.CHUNK["cuda"] // 151_936) < 8


def test_training_mode_and_activation_checkpointing(small_chunks):
    model, ids = build("Qwen2").train(), texts(8, 2, 9)
    found = []
    for activation_checkpointing in (False, True):
        if activation_checkpointing:
            recompute_activations(model)
        logp, entropy = ddt.token_stats(model, ids, torch.ones_like(ids))
        found.append(gradients(model, (logp + entropy ** 2).sum()))
        assert model.training
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("hung", [False, True])
def test_the_model_is_left_as_it_was(fails, hung):
    """Also after an exception, and where a library hung its own forward on the backbone."""
    model, ids = build("Qwen2"), texts(8, 2, 9)
    if hung:
        real = model.model.forward
        model.model.forward = lambda *args, **kwargs: real(*args, **kwargs)
    before = {id(module): dict(vars(module)) for module in model.modules()}

    def broken(logits, targets):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        logp, entropy = ddt.token_stats(model, ids, torch.ones_like(ids),
                                        stats=broken if fails else ddt.logp_entropy)
        (logp + entropy).sum().backward()
    assert {id(module): dict(vars(module)) for module in model.modules()} == before
    if not hung:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
            one, other = (ddt.token_stats(m, ids, ids > 0)[0] for m in (twin, model))
            assert torch.equal(one, other)


def test_autocast_gives_float32_statistics(small_chunks):
    model, ids = build("Qwen2"), texts(9, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        stats = ddt.token_stats(model, ids, torch.ones_like(ids), temperature=0.7)
        logits = model(input_ids=ids).logits[:, :-1]
    assert logits.dtype == torch.bfloat16
    for ours, expected in zip(stats, ddt.logp_entropy(logits.float() / 0.7, ids[:, 1:])):
        assert ours.dtype == torch.float32 and torch.allclose(ours, expected, atol=1e-4)
    sum(x.sum() for x in stats).backward()      # computed again, under autocast
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_model_without_a_head_is_refused_by_name():
    ids = torch.ones(1, 4, dtype=torch.long)
    model = build("Qwen2")
    classifier = transformers.Qwen2ForSequenceClassification(model.config)
    for headless in (model.model, classifier):
        with pytest.raises(ValueError, match=type(headless).__name__):
            ddt.token_stats(headless, ids, ids)


# ---- memory -------------------------------------------------------------------------------------

class MemoryMeter(TorchDispatchMode):
    """Follows every tensor made inside it: the .largest, and the .peak of all alive, in bytes."""

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


@pytest.mark.parametrize("loss", [lambda logp, entropy: logp + entropy,
                                  lambda logp, entropy: logp, lambda logp, entropy: entropy])
def test_the_logits_of_a_batch_never_exist(loss, monkeypatch):
    """Vocabulary 20,000, 512 tokens: logits are 41 MB. Forward and backward stay far below, also
    if the loss holds one of the two numbers."""
    V = 20_000
    monkeypatch.setattr(ddt, "CHUNK", {"cpu": 16 * V})          # 16 tokens at a time, 1.3 MB
    model = build("Qwen2", vocab_size=V, hidden_size=8, intermediate_size=8, num_attention_heads=1,
                  num_key_value_heads=1, max_position_embeddings=256)
    ids = texts(10, 2, 257)
    logits, chunk, head = 4 * 512 * V, 4 * 16 * V, 4 * 8 * V

    def measure(stats):
        model.zero_grad()
        with MemoryMeter() as meter:
            loss(*stats()).sum().backward()
        return meter

    ours = measure(lambda: ddt.token_stats(model, ids, torch.ones_like(ids)))
    textbook = measure(lambda: ddt.logp_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:]))
    assert textbook.largest >= logits and textbook.peak > 2 * logits            # the meter sees it
    assert ours.largest <= chunk
    assert ours.peak < 8 * chunk + 4 * head + 3e6 < logits / 2


# ---- ragged rows --------------------------------------------------------------------------------

def ragged(lengths=((3, 5), (7, 1), (2, 8), (1, 1)), seed=11):
    generator = seeded(seed)
    return [tuple(torch.randint(3, 100, (n,), generator=generator).tolist() for n in pair)
            for pair in lengths]


@pytest.mark.parametrize("budget", [1, 10, 64, 10**9])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = torch.randint(1, 40, (50,), generator=seeded(0)).tolist()
    rows = [([5] * (length // 2), [6] * (length - length // 2)) for length in lengths]
    groups = ddt.micro_batches(rows, budget)
    assert sorted(i for group in groups for i in group) == list(range(50))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    for full, following in zip(groups, groups[1:]):     # no group closes while the next row fits
        assert (len(full) + 1) * lengths[following[0]] > budget
    assert len(ddt.micro_batches(rows, 10**9)) == 1 and ddt.micro_batches([], 5) == []


def test_pad_rows():
    ids, mask, response = ddt.pad_rows([([5, 6], [7]), ([8], [9, 10, 1])], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 1]]
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert response.tolist() == [[False, False, True, False], [False, True, True, True]]


@pytest.mark.parametrize("micro_tokens", [1, 20, 16384])
def test_response_stats_are_those_of_every_response_alone(micro_tokens):
    """In the rows' order, values and gradients; a pass has at most micro_tokens, or one row."""
    model, rows = build("Qwen2"), ragged()
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    stats = torch.stack(ddt.response_stats(model, rows, 0.7, ddt.all_stats, micro_tokens))
    hook.remove()
    assert all(B * T <= micro_tokens or B == 1 for B, T in shapes)
    ours = gradients(model, (stats ** 2).sum())
    alone = [plain(model, torch.tensor([prompt + response]), 0.7)[:, len(prompt) - 1:]
             for prompt, response in rows]
    expected = torch.cat(alone, dim=1)
    assert stats.shape == (3, 15) and torch.allclose(stats, expected, atol=1e-5)
    for name, gradient in gradients(model, (expected ** 2).sum()).items():
        assert torch.allclose(gradient, ours[name], rtol=1e-3, atol=1e-4), name
    with torch.no_grad():
        logp, entropy = ddt.response_stats(model, rows)
    assert logp.shape == entropy.shape == (15,) and not logp.requires_grad


def test_a_response_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        ddt.response_stats(build("Llama"), [([1], [2]), ([], [3, 4])])


def test_response_stats_run_under_precision(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # there need not be a GPU
        on_gpu = ddt.precision(torch.device("cuda"))
    assert on_gpu.device == "cuda" and on_gpu.fast_dtype == torch.bfloat16
    model, dtypes = build("Qwen2"), []
    model.lm_head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    ddt.response_stats(model, ragged())
    monkeypatch.setattr(ddt, "precision", lambda device: torch.autocast("cpu", torch.bfloat16))
    stats = ddt.response_stats(model, ragged())
    assert set(dtypes) == {torch.float32, torch.bfloat16} and stats[0].dtype == torch.float32


# ---- comparing texts ----------------------------------------------------------------------------

@pytest.mark.parametrize("N, M, levels", [(1, 1, 2), (7, 5, 3), (40, 30, 10**6), (30, 40, 2),
                                          (6, 9, 1)])
def test_auroc_is_the_share_of_pairs_won(N, M, levels):
    own = torch.randint(levels, (N,), generator=seeded(0)) / 3
    foreign = torch.randint(levels, (M,), generator=seeded(1)) / 3 - 0.2 * (levels > 10)
    won = [(a > b) + (a == b) / 2 for a in own.tolist() for b in foreign.tolist()]
    assert ddt.auroc(own, foreign) == pytest.approx(sum(won) / len(won), abs=1e-9)


def test_auroc_of_many_texts_holds_no_matrix_of_pairs():
    own, foreign = torch.rand(3000, generator=seeded(0)), torch.rand(2000, generator=seeded(1))
    with MemoryMeter() as meter:
        assert 0.47 < ddt.auroc(own, foreign) < 0.53
    assert meter.largest < 10 * 8 * 5000                        # the pairs are 6 million
    assert ddt.auroc(own, foreign - 1) == 1 and ddt.auroc(own - 1, foreign) == 0


def test_signal_to_noise_by_hand():
    own, foreign = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 3.0])
    assert ddt.signal_to_noise(own, foreign) == pytest.approx(1.0)      # (2 - 1) / 1


def test_signal_to_noise_is_best_at_c_1():
    """The paper's claim, in text of a model that is now sure and now not, against any words."""
    scale = 5 * torch.rand(5000, 1, generator=seeded(2))
    logits = scale * torch.randn(5000, 30, generator=seeded(1))
    own = torch.multinomial(logits.softmax(-1), 1, generator=seeded(3))[:, 0]
    foreign = torch.randint(30, (5000,), generator=seeded(4))
    own_logp, entropy = ddt.logp_entropy(logits, own)
    foreign_logp, _ = ddt.logp_entropy(logits, foreign)
    snr = {c: ddt.signal_to_noise(own_logp + c * entropy, foreign_logp + c * entropy)
           for c in (0, 0.5, 0.75, 1, 1.25, 1.5, 2)}
    assert max(snr, key=snr.get) == 1


def test_text_statistics_by_hand():
    logp, entropy = torch.tensor([[-4.0, -1.0], [0.5, 1.5]])
    numbers = ddt.text_statistics(logp, entropy, varentropy=entropy)
    z = -3 / math.sqrt(2)
    assert {name: float(value) for name, value in numbers.items()} == pytest.approx({
        "tokens": 2, "logp": -2.5, "entropy": 1.0, "phi": -1.5, "phi < -5": 0.0, "phi < -3": 0.5,
        "phi < -1": 0.5, "phi < 0": 0.5, "z": z, "p": math.erfc(-z / math.sqrt(2))})


# ---- the chapter --------------------------------------------------------------------------------

def test_the_chapter_on_a_checkpoint_and_a_file(tmp_path, capsys):
    """An untrained model with the toy's tokenizer, and a file of problems."""
    tokenizer = toy.tokenizer()
    model = build("Llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps(row) + "\n" for row in toy.problems("train", 200)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    argv = ["--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--device", "cpu",
            "--max_new_tokens", 12]
    run_here(ddt, *argv)
    shown = capsys.readouterr().out
    assert "nan" not in shown and "\033" not in shown
    means, scores, _ = re.split(r"\([bc]\)", shown)
    table = {line[:16].strip(): line[16:].split() for line in means.splitlines()}
    assert len(re.findall("    c = ", scores)) == 7

    # The theory on sampled text: mean z of own text is 0 within 4 standard errors, that of colder
    # text is above, that of hotter text below.
    cold, own, hot, _ = map(float, table["z"][::3])
    assert abs(own) < 4 / math.sqrt(200)
    assert cold > 0.5 and hot < -0.5

    # The demonstrations' means are those of each alone.
    alone = []
    for row in toy.problems("train", 200):
        prompt = prompt_ids(tokenizer, row["problem"])
        ids = torch.tensor([prompt + demo_ids(tokenizer, row["solution"])[:12]])
        with torch.no_grad():
            alone.append(plain(model, ids)[:2, len(prompt) - 1:].mean(1))
    logp, entropy = torch.stack(alone).mean(0).tolist()
    assert [float(table[name][9]) for name in ("logp", "entropy", "phi")] == pytest.approx(
        [logp, entropy, logp + entropy], abs=1e-3)
    run_here(ddt, *argv)
    assert capsys.readouterr().out == shown                     # one seed, one output


def test_a_hostile_text_does_not_reach_the_terminal(capsys):
    class Tokenizer:
        def decode(self, ids):
            return "".join([["\033[2J", " word", "\r"][i] for i in ids])

    ddt.show_tokens(Tokenizer(), [0, 1, 2, 1], torch.tensor([-9.0, -4.2, 3.0, 0.5]))
    shown = capsys.readouterr().out
    assert "\033" not in shown and "\r" not in shown
    assert "word<-4.2>" in shown and shown.endswith(" word\n") and "<+3.0>" in shown


def test_what_every_token_adds():
    """Tokens of one byte: the pieces make up the text, and no half character is shown."""
    tokenizer = make_tokenizer([], vocab_size=259)
    text = "Naïve 日本 says: 7 × 5.\n" * 3
    ids = tokenizer(text).input_ids
    assert len(ids) > len(text)                         # so characters are spread over tokens
    texts = ddt.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert texts[2] == "" and texts[3] == "ï"
    assert "\ufffd" not in "".join(ddt.token_texts(tokenizer, ids[:3]))


@pytest.mark.parametrize("argv, sentence", [
    (["--problems", "1"], "--problems"), (["--data", "single.jsonl"], "a single problem"), (["--max_new_tokens", "0"], "--max_new_tokens"),
    (["--data", "bare.jsonl"], "bare.jsonl line 1"), (["--html", "x"], "arguments: --html"),
    (["--model", "no/such/model"], "--model no/such/model")])
def test_bad_input_is_one_sentence_and_nothing_written(tmp_path, monkeypatch, capsys, argv,
                                                       sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.jsonl").write_text('{"problem": "1 a +3 ?", "answer": "4"}\n')
    (tmp_path / "single.jsonl").write_text('{"problem": "1 ?", "solution": "1", "answer": "1"}\n')
    assert sentence in refusal(capsys, ddt, *argv)
    assert len(list(tmp_path.iterdir())) == 2
