"""Proofs about sampler.py on the CPU: the samples are the model's, in whatever batch they came."""
import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import recompute_activations
from transformers import (BloomConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config,
                          GPTNeoXConfig, GptOssConfig, LlamaConfig, Llama4TextConfig, MambaConfig,
                          MistralConfig, MixtralConfig, NemotronConfig, Phi3Config, PhiConfig,
                          PhimoeConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3NextConfig)
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import sampler as sampler_module
from sampler import Call, Sample, Sampler, Slots, draw, invert, truncate, uniforms

V = 64
SHAPE = dict(vocab_size=V, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
QWEN2 = Qwen2Config(**SHAPE)
MQA = {**SHAPE, "num_key_value_heads": 1}
MHA = {**SHAPE, "num_key_value_heads": 4}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6,
             "long_factor": [4.0] * 6, "original_max_position_embeddings": 40}
LLAMA4 = {**SHAPE, "head_dim": 12, "intermediate_size_mlp": 64, "num_local_experts": 2,
          "num_experts_per_tok": 1, "no_rope_layers": [1, 0], "floor_scale": 64}
ARCHITECTURES = {
    "qwen2": QWEN2,
    "qwen2 tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 window unused": Qwen2Config(**SHAPE, use_sliding_window=False, sliding_window=6),
    "qwen3": Qwen3Config(**SHAPE, head_dim=20),
    "llama": LlamaConfig(**MHA),
    "llama mqa": LlamaConfig(**MQA),
    "mistral": MistralConfig(**SHAPE, sliding_window=64),
    "mistral window": MistralConfig(**SHAPE, sliding_window=6),
    "gemma2 window, caps": Gemma2Config(**SHAPE, head_dim=16, sliding_window=6,
                                        attn_logit_softcapping=2.0),
    "gemma3 window": Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 3}, head_dim=16,
                                      sliding_window=6, layer_types=[
                                          "sliding_attention", "full_attention",
                                          "sliding_attention"]),
    "gpt_oss window, sinks": GptOssConfig(
        **SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "phi3 long rope": Phi3Config(**SHAPE, pad_token_id=0, original_max_position_embeddings=40,
                                 rope_parameters=LONG_ROPE),
    "llama4 full": Llama4TextConfig(**LLAMA4, layer_types=["full_attention"] * 2),
    "llama4 chunks": Llama4TextConfig(**LLAMA4, attention_chunk_size=40, layer_types=[
        "chunked_attention", "full_attention"]),
    "gemma": GemmaConfig(**MQA, head_dim=16),
    "gemma3": Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 6}, head_dim=16, sliding_window=64,
                               layer_types=["sliding_attention"] * 5 + ["full_attention"]),
    "gpt2": GPT2Config(vocab_size=V, n_embd=48, n_layer=2, n_head=4),
    "phi": PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "phi3": Phi3Config(**SHAPE, pad_token_id=0, sliding_window=64),
    "gpt_neox": GPTNeoXConfig(**SHAPE, rotary_pct=0.25),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=32,
                                shared_expert_intermediate_size=32),
}


def build(config=QWEN2, seed=0, scale=3.0):
    """A random model with weights large enough to have opinions."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.mul_(scale)
        if "sinks" in name:
            p.data.uniform_(-1, 3)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def ragged(lengths=(1, 9, 3, 17, 5, 12, 2), seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=g).tolist() for n in lengths]


def tokens(samples):
    return [sample.tokens for sample in samples]


def finished(samples):
    return [sample.finished for sample in samples]


def greedy(model, prompt, budget, stop=()):
    """What generate says, cut after the first stop token."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=budget)
    out = out[0, len(prompt):].tolist()
    ends = [i for i, token in enumerate(out) if token in stop]
    return out[:ends[0] + 1] if ends else out


def uncached(model, prompt, budget):
    """The likeliest tokens by whole forwards."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(budget):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(logits.argmax().item())
    return ids[len(prompt):]


def teacher_forced(model, prompt, response, temperature):
    """logp and entropy of the response by one uncached forward, two lists."""
    ids = torch.tensor([prompt + response], device=model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1:-1].float()
    log_p = (logits / temperature).log_softmax(-1)
    logp = log_p.gather(1, ids[0, len(prompt):, None])[:, 0]
    return logp.tolist(), (-(log_p.exp() * log_p).sum(-1)).tolist()


@pytest.fixture(scope="module")
def model():
    return build()


# ---- the same tokens as generate -----------------------------------------------------------------

WINDOWS = ["mistral window", "gemma2 window, caps", "gemma3 window", "gpt_oss window, sinks"]


@pytest.mark.parametrize("name", WINDOWS)
def test_behind_a_window_greedy_is_that_of_the_uncached_forward(name):
    model, prompts = build(ARCHITECTURES[name]), ragged()
    got = Sampler(model, rows=3, length=40)(prompts, max_new_tokens=14, stop=(), temperature=0.0)
    assert tokens(got) == [uncached(model, prompt, 14) for prompt in prompts]
    for prompt, sample in zip(prompts, got):
        logp, entropy = teacher_forced(model, prompt, sample.tokens, 1.0)
        assert sample.logp == pytest.approx(logp, abs=1e-5)
        assert sample.entropy == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_a_loop(window, cap, with_sinks, kv_heads):
    """One query head, one token, one column at a time; prompts first, then a token in the slab."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=g) for heads in (4, kv_heads, kv_heads))
    sinks = torch.randn(4, generator=g) if with_sinks else None
    slots = Slots(build(), 3, 1, 12)
    rows = torch.tensor([[2], [0]])
    layer = SimpleNamespace(layer_idx=0)
    options = dict(scaling=0.3, sliding_window=window, softcap=cap, s_aux=sinks, slots=slots)

    def loop(row, head, last):
        scores = {}
        for column in range(last + 1):
            if window is None or column > last - window:
                score = 0.3 * q[row, head, last] @ k[row, head * kv_heads // 4, column]
                scores[column] = cap * torch.tanh(score / cap) if cap else score
        exps = {column: score.exp() for column, score in scores.items()}
        total = sum(exps.values()) + (sinks[head].exp() if with_sinks else 0)
        return sum(e / total * v[row, head * kv_heads // 4, c] for c, e in exps.items())

    call = Call(rows, torch.arange(8)[None], 8)
    got, _ = sampler_module.slab_attention(
        layer, q[:, :, :8], k[:, :, :8], v[:, :, :8], None, call=call, **options)
    for row in range(2):
        for head in range(4):
            for token in range(8):
                want = loop(row, head, token)
                assert torch.allclose(got[row, token, head], want, atol=1e-5)

    # Slots in use come first: rows 0 to 2 of the slab, of which row 1 is new.
    one = torch.tensor([1, 1, 0])
    at = torch.tensor([[8], [0], [8]])
    call = Call(torch.arange(3)[:, None], at, 12, used=at[:, 0].int() + 1)
    got, _ = sampler_module.slab_attention(
        layer, q[one, :, 8:], k[one, :, 8:], v[one, :, 8:], None, call=call, **options)
    for head in range(4):
        for slab_row, row in ((0, 1), (2, 0)):
            assert torch.allclose(got[slab_row, 0, head], loop(row, head, 8), atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate(name):
    model, prompts = build(ARCHITECTURES[name]), ragged()
    stop = greedy(model, prompts[3], 14)[3:7:3]     # tokens that occur: rows end at different times
    want = [greedy(model, p, 14, stop) for p in prompts]
    got = Sampler(model, rows=3, length=40)(prompts, max_new_tokens=14, stop=stop, temperature=0.0)
    assert tokens(got) == want
    assert finished(got) == [row[-1] in stop for row in want]
    # it tests something
    assert len({len(row) for row in want}) > 1 and len({t for row in want for t in row}) > 4


def test_greedy_in_bf16_is_the_models_own_choice():
    """In bf16 the order of a sum matters. So no token that teacher forcing finds clearly worse."""
    model, prompts = build().to(torch.bfloat16), ragged()
    got = Sampler(model, rows=3, length=40)(prompts, max_new_tokens=14, stop=(), temperature=0.0)
    for prompt, sample in zip(prompts, got):
        ids = torch.tensor([prompt + sample.tokens])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1:-1].float()
        chosen = logits.gather(1, ids[0, len(prompt):, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 0.05 * logits.abs().max()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 10, 1.0), (1.3, 0, 0.8), (0.0, 0, 1.0)])
def test_statistics_equal_teacher_forcing_after_refill_and_shrink(model, temperature, top_k, top_p):
    prompts = ragged()
    got = Sampler(model, rows=4, length=64)(prompts, n=3, max_new_tokens=30, stop=range(6), seed=5,
                                           temperature=temperature, top_k=top_k, top_p=top_p)
    assert len(got) == 21 and (temperature == 0 or len({len(sample.tokens) for sample in got}) > 3)
    for r, sample in enumerate(got):
        logp, entropy = teacher_forced(model, prompts[r // 3], sample.tokens, temperature or 1.0)
        assert sample.logp == pytest.approx(logp, abs=1e-5)
        assert sample.entropy == pytest.approx(entropy, abs=1e-5)
        assert not any(t < 6 for t in sample.tokens[:-1])
        assert (sample.tokens[-1] < 6) == sample.finished


def test_prefix_continuation_is_the_concatenated_prompt(model):
    prompt, sampler = ragged()[1], Sampler(model, rows=4, length=64)
    whole = sampler([prompt], max_new_tokens=20, stop=(), temperature=0.0)[0].tokens
    budgets = [20 - k for k in range(20)]
    rest = sampler([prompt + whole[:k] for k in range(20)], max_new_tokens=budgets,
                   stop=(), temperature=0.0)
    assert [whole[:k] + sample.tokens for k, sample in enumerate(rest)] == [whole] * 20


# ---- randomness ----------------------------------------------------------------------------------

def test_same_seed_same_samples_for_any_rows_order_and_company(model):
    prompts = ragged()

    def run(prompts, rows, seed=3, n=4):
        sampler = Sampler(model, rows=rows, length=64)
        return tokens(sampler(prompts, n=n, max_new_tokens=16, stop=range(4), seed=seed))

    want = run(prompts, 64)
    assert all(run(prompts, rows) == want for rows in (1, 5, 13))
    backwards = run(prompts[::-1], 6)
    assert [row for i in range(7) for row in backwards[4 * (6 - i):4 * (6 - i) + 4]] == want
    assert run(prompts[2:3], 2) == want[8:12]
    assert run(prompts, 3, n=2) == [want[4 * i + j] for i in range(7) for j in range(2)]
    # a prompt listed twice goes on counting
    assert run([prompts[2], prompts[2]], 3, n=2) == want[8:12]
    assert run(prompts, 64, seed=4) != want and run(prompts, 64, seed=-3) != want
    assert len({tuple(row) for row in want[4:8]}) == 4              # samples of one prompt differ


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(model):
    sampler = Sampler(model, rows=3, length=64)
    short, long = (tokens(sampler(ragged(), max_new_tokens=new, stop=())) for new in (5, 16))
    assert [row[:5] for row in long] == short


def test_two_runs_are_bitwise_equal_and_leave_the_global_generators_alone(model):
    sampler = Sampler(model, rows=5, length=64)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    a, b = (sampler(ragged(), n=3, max_new_tokens=20, stop=range(4), seed=9) for _ in range(2))
    assert a == b
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == np.random.get_state()[1].tolist()


def chi_square(counts, p):
    expected = p * counts.sum()
    return ((counts - expected) ** 2 / expected)[p > 0].sum().item()


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 7, 1.0),
                                                       (1.0, 0, 0.7), (1.5, 12, 0.9)])
def test_frequencies_follow_the_distribution(model, temperature, top_k, top_p):
    prompt, n = ragged()[1], 6000
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), use_cache=False).logits[:, -1].float() / temperature
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    p = logits.softmax(-1)[0]
    got = Sampler(model, rows=1000, length=16)([prompt], n=n, max_new_tokens=1, stop=(),
                                               temperature=temperature, top_k=top_k, top_p=top_p)
    counts = torch.bincount(torch.tensor(tokens(got))[:, 0], minlength=V).float()
    assert not counts[p == 0].any()
    freedom = int((p > 0).sum()) - 1
    # four standard deviations
    assert chi_square(counts, p) < freedom + 4 * (2 * freedom) ** 0.5


def test_uniform_numbers_are_uniform_and_unrelated():
    samples = [Sample(texts=((5,),), number=number, budget=250) for number in range(400)]
    u = torch.stack([uniforms(0, sample) for sample in samples])            # (samples, steps)
    assert 0 <= u.min() and u.max() < 1 and u.dtype == torch.float32
    counts = torch.histc(u, 100, 0, 1)
    assert chi_square(counts, torch.full((100,), 0.01)) < 99 + 4 * (2 * 99) ** 0.5
    # neighbours in step and sample
    for other in (u.roll(1, 0), u.roll(1, 1), u.roll((1, 1), (0, 1))):
        both = torch.stack([u.flatten(), other.flatten()])
        assert torch.corrcoef(both)[0, 1].abs() < 4 / u.numel() ** 0.5


@pytest.mark.parametrize("V", [5, 256, 300, 5000])
def test_two_levels_of_cumulative_sums_are_one(V):
    g = torch.Generator().manual_seed(0)
    p = torch.rand(200, V, generator=g, dtype=torch.float64) ** 3
    p[:, V // 3:V // 2] = 0
    u = torch.rand(200, generator=g, dtype=torch.float64)
    cdf = p.cumsum(-1)
    want = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    assert torch.equal(invert(p, u), want)


@pytest.mark.parametrize("top_k, top_p", [
    (0, 0.9), (5, 1.0), (20, 0.5), (0, 1e-6), (1, 0.5), (5000, 0.3), (0, 0.999)])
@pytest.mark.parametrize("candidates", [1024, 3000])
def test_truncation_is_that_of_transformers(top_k, top_p, candidates):
    logits = 2 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.linspace(0, 0.01, 3000)           # nearly flat: a wide nucleus
    want = logits
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    kept, ids, fits = truncate(logits.softmax(-1), top_k, top_p, candidates)
    got = torch.zeros_like(logits).scatter_(-1, ids, kept)
    assert fits.all() or (candidates == 1024 and not top_k and not fits[0])
    got, want = got[fits], want[fits]
    # at most a token at the edge, where rounding decides
    assert ((got > 0) != want.isfinite()).sum() <= 2
    assert torch.allclose(got / got.sum(-1, keepdim=True), want.softmax(-1), atol=1e-3)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_candidates_draw_what_the_full_sort_draws(top_p):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3000, generator=g) * torch.linspace(0.1, 9, 40)[:, None]
    u = torch.rand(40, generator=g)
    some, all_of_them = (draw(logits, u, 1.0, top_p=top_p, candidates=count)
                         for count in (256, 3000))
    fits = some[3]
    assert fits.any() and not fits.all() and all_of_them[3].all()
    assert all(torch.equal(a[fits], b[fits]) for a, b in zip(some, all_of_them))


def test_a_block_whose_nucleus_was_wider_than_the_candidates_is_drawn_again(monkeypatch):
    """With 2 candidates the first block is drawn twice, with 64 none: the same samples."""
    run = lambda: Sampler(build(), rows=4, length=64)(
        ragged(), n=3, max_new_tokens=20, stop=range(4), top_p=0.95)
    want, counts, advance = run(), [], Slots.advance

    def counting(self, *args):
        counts.append(self.candidates)
        return advance(self, *args)

    monkeypatch.setattr(sampler_module, "CANDIDATES", 2)
    monkeypatch.setattr(Slots, "advance", counting)
    assert tokens(run()) == tokens(want)
    # one block twice, then the whole call by the full sort
    assert counts[0] == 2 and set(counts[1:]) == {V}


def test_draw_gives_a_token_even_of_a_broken_model():
    for temperature in (0.0, 1.0):
        token, *_ = draw(torch.full((2, 5), torch.nan), torch.full((2,), 0.5), temperature)
        assert ((token >= 0) & (token < 5)).all()


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_draw_stays_in_the_support_at_both_ends(top_p):
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 300:310] = 0
    for u in (0.0, 1 - 2.0**-24):
        token, logp, entropy, _ = draw(logits, torch.full((2,), u), 1.0, top_p=top_p)
        assert ((token >= 300) & (token < 310)).all()
        assert torch.allclose(entropy, torch.tensor(10.0).log()) and torch.allclose(logp, -entropy)


# ---- the slab ------------------------------------------------------------------------------------

def poison(slots, first):
    """Fill all columns from first[row] on with 50."""
    for x in (*slots.keys.values(), *slots.values.values()):
        for row, column in enumerate(first):
            x[row, column:] = 50.0


def test_poisoned_columns_change_nothing(model, monkeypatch):
    """What lies beyond a row's own tokens, and in rows that nobody uses, is never looked at."""
    sampler = Sampler(model, rows=4, length=64)
    want = sampler(ragged(), n=2, max_new_tokens=16, stop=range(4), seed=2)
    forward = Slots.forward

    def poisoned(self, B):
        poison(self, self.pos.flatten().tolist())
        return forward(self, B)

    monkeypatch.setattr(Slots, "forward", poisoned)
    assert tokens(sampler(ragged(), n=2, max_new_tokens=16, stop=range(4), seed=2)) == tokens(want)


def test_each_prompt_is_read_once(model):
    """n samples of a prompt, over refills, cost one prefill while one of them is in the slab."""
    read = []
    sampler = Sampler(model, rows=8, length=64)
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True)
    sampler(ragged((9, 17)), n=16, max_new_tokens=12, stop=range(6))
    hook.remove()
    assert sum(rows for rows, columns in read if columns > 1) == 2


def test_weights_may_change_between_calls(model):
    model = copy.deepcopy(model)
    sampler, prompts = Sampler(model, rows=4, length=64), ragged()
    sampler(prompts, max_new_tokens=8, stop=())
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    want = [greedy(model, p, 8) for p in prompts]
    assert tokens(sampler(prompts, max_new_tokens=8, stop=(), temperature=0.0)) == want
    sampler.sync(model)                                 # without a twin nothing to do
    assert tokens(sampler(prompts, max_new_tokens=8, stop=(), temperature=0.0)) == want


@pytest.mark.parametrize("name", ["qwen2", "qwen2 tied"])
def test_twin_follows_the_weights_in_place(name):
    model = build(ARCHITECTURES[name])
    sampler = Sampler(model, rows=4, length=64, dtype=torch.bfloat16)
    assert sampler.model is not model
    assert sampler.model.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters())
    assert sampler.model.model.rotary_emb.inv_freq.dtype == torch.float32
    addresses = [p.data_ptr() for p in sampler.model.parameters()]
    for p in model.parameters():
        p.data.mul_(0.9)
    run = lambda s: s(ragged(), max_new_tokens=8, stop=(), seed=1)
    stale = run(sampler)
    sampler.sync(model)
    fresh = run(sampler)
    assert fresh == run(Sampler(model, rows=4, length=64, dtype=torch.bfloat16)) and fresh != stale
    assert addresses == [p.data_ptr() for p in sampler.model.parameters()]


# ---- edges ---------------------------------------------------------------------------------------

def test_stop_as_first_token_and_budgets(model):
    prompts, sampler = ragged((1, 1, 6)), Sampler(model, rows=2, length=64)
    first = [greedy(model, p, 1) for p in prompts]
    ends = {t for row in first for t in row}
    got = sampler(prompts, max_new_tokens=9, stop=ends, temperature=0.0)
    assert tokens(got) == first and all(finished(got))
    got = sampler(prompts, max_new_tokens=1, stop=(), temperature=0.0)
    assert tokens(got) == first and not any(finished(got))
    got = sampler(prompts, n=2, max_new_tokens=[5, 0, 2], stop=(), temperature=0.0)
    assert [len(sample.tokens) for sample in got] == [5, 5, 0, 0, 2, 2] and not any(finished(got))
    got = sampler(prompts, max_new_tokens=0)
    assert all(sample.tokens == sample.logp == sample.entropy == [] for sample in got)
    assert not any(finished(got))
    got = sampler(ragged((40,)), max_new_tokens=24, stop=())                # exactly full
    assert len(got[0].tokens) == 24


def test_stop_defaults_to_the_models_own(model):
    model = copy.deepcopy(model)
    token = greedy(model, ragged()[1], 5)[2]
    for eos in (token, [V - 1, token]):
        model.generation_config.eos_token_id = eos
        got = Sampler(model, length=64)([ragged()[1]], max_new_tokens=9, temperature=0.0)
        assert got[0].tokens[-1] == token and got[0].finished


@pytest.mark.parametrize("prompts, more, says", [
    ([], {}, "0 prompts"),
    ([[5], []], {"n": 2}, "prompt 1 is empty"),
    ([[5] * 10, [5] * 60], {}, "prompt 1: 60 tokens and 8 new ones do not fit length=64"),
    ([[5, V]], {}, "prompt 0 .*vocabulary 64"),
    ([[5, -1]], {}, "prompt 0 .*vocabulary"),
    ([[5], [6]], {"max_new_tokens": [1]}, "2 prompts and 1 values"),
    ([[5], [6]], {"max_new_tokens": [1, -2]}, "prompt 1"),
    ([[5]], {"n": 0}, "n=0"), ([[5]], {"temperature": -1.0}, "temperature=-1"),
    ([[5]], {"top_p": 0.0}, "top_p=0"), ([[5]], {"top_k": -1}, "top_k=-1"),
])
def test_bad_requests_name_the_prompt(model, prompts, more, says):
    with pytest.raises(ValueError, match=says):
        Sampler(model, rows=2, length=64)(prompts, **{"max_new_tokens": 8, "stop": (), **more})


def test_a_table_of_positions_limits_the_length():
    model = build(GPT2Config(vocab_size=V, n_embd=48, n_layer=2, n_head=4, n_positions=32))
    sampler = Sampler(model, length=2048)
    assert sampler.length == 32
    assert len(sampler([[5] * 20], max_new_tokens=12, stop=())[0].tokens) == 12
    # the first of these is done early, and runs past the table until the host looks
    beside = sampler([[5] * 30, [6] * 3], max_new_tokens=[2, 25], stop=(), temperature=0.0)
    assert tokens(beside) == [greedy(model, [5] * 30, 2), greedy(model, [6] * 3, 25)]
    with pytest.raises(ValueError, match="length=32"):
        sampler([[5] * 21], max_new_tokens=12, stop=())


@pytest.mark.parametrize("config, says", [
    (LlamaConfig(**SHAPE, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
     "Llama.*dynamic rope"),
    (Phi3Config(**SHAPE, pad_token_id=0, original_max_position_embeddings=31,
                rope_parameters={**LONG_ROPE, "original_max_position_embeddings": 31}),
     "Phi3.*long rope .*more than 31 tokens.*lower --max_new_tokens"),
    (Llama4TextConfig(**LLAMA4, attention_chunk_size=8, layer_types=["chunked_attention"] * 2),
     "Llama4.*in chunks .*more than 8 tokens"),
    (Llama4TextConfig(**{**LLAMA4, "floor_scale": 32}, layer_types=["full_attention"] * 2),
     "Llama4.*scaled by position .*more than 31 tokens"),
    (MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
     r"Mamba.*layers \(.*\) keep more than .*idft.py trains it where no --eval_data"),
    (Qwen3NextConfig(**SHAPE, head_dim=12, num_experts=2, layer_types=[
        "linear_attention", "full_attention"]), r"Qwen3Next.*\(linear_attention\) keep more than"),
    (NemotronConfig(**SHAPE), "Nemotron.*its layers keep the keywords of a call"),
    (BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4), "Bloom.*AttentionInterface"),
])
def test_what_the_slab_cannot_serve_is_refused_by_name(config, says):
    with pytest.raises(ValueError, match=says):
        Sampler(build(config), rows=2, length=32)


@pytest.mark.parametrize("name, length", [("phi3 long rope", 40), ("llama4 full", 63),
                                          ("llama4 chunks", 40)])
def test_up_to_a_length_they_are_served(name, length):
    """The longest text is the longest that is equal; one more token is refused."""
    model, prompt = build(ARCHITECTURES[name]), ragged((17,))[0]
    got = Sampler(model, rows=1, length=length)([prompt], max_new_tokens=length - 17, stop=(),
                                                temperature=0.0)
    assert tokens(got) == [uncached(model, prompt, length - 17)]
    with pytest.raises(ValueError, match=f"more than {length} tokens"):
        Sampler(model, rows=1, length=length + 1)


def test_models_that_do_not_read_the_slab_are_refused_in_bf16_too():
    """There the logits alone would not tell: a small random model may ignore its context."""
    model = build(BloomConfig(vocab_size=V, hidden_size=48, n_layer=2, n_head=4), scale=1.0)
    with pytest.raises(ValueError, match="Bloom"):
        Sampler(model.to(torch.bfloat16), rows=2, length=32)


def test_a_model_without_opinions_is_served_and_a_broken_one_shows():
    model = build()
    model.lm_head.weight.data.zero_()
    [sample] = Sampler(model, rows=1, length=32)([[3, 4]], max_new_tokens=4)
    assert sample.entropy == pytest.approx([np.log(V)] * 4)
    _, logp, entropy, _ = draw(torch.full((1, V), torch.nan), torch.zeros(1), 1.0)
    assert logp.isnan().all() and entropy.isnan().all()


@pytest.mark.parametrize("config", [MistralConfig(**SHAPE), QWEN2])
def test_a_layer_with_an_unknown_option_is_refused_where_it_calls(config, monkeypatch):
    """A window or a cap that no config names, as remote code may have it, and what is unknown."""
    model = build(config)
    for option, says in (({"sliding_window": 5}, "off by"), ({"softcap": 1.0}, "off by"),
                         ({"bias": 30.0}, "attention with bias")):
        plain = sampler_module.slab_attention
        AttentionInterface = transformers.AttentionInterface
        AttentionInterface.register("slab", lambda *args, **kw: plain(*args, **{**kw, **option}))
        try:
            with pytest.raises(ValueError, match=f"{type(model).__name__}.*{says}"):
                Sampler(model, rows=2, length=32)
        finally:
            AttentionInterface.register("slab", plain)


def test_wrong_logits_are_refused(model, monkeypatch):
    monkeypatch.setattr(sampler_module, "attend", lambda q, *_: q * 0)
    with pytest.raises(ValueError, match="Qwen2.*its logits through the slab are off by"):
        Sampler(model, rows=2, length=32)


# ---- the model afterwards ------------------------------------------------------------------------

@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(error):
    model = build(Qwen2Config(**SHAPE, attention_dropout=0.5))
    model.set_attn_implementation("eager")
    model.train()
    model.model.layers[0].eval()
    recompute_activations(model)
    modes = [m.training for m in model.modules()]
    sampler = Sampler(model, rows=3, length=64)

    def fail(*_):
        raise error

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sampler(ragged(), max_new_tokens=6, stop=(), temperature=0.0)
        if error:
            with pytest.raises(error):
                sampler(ragged(), max_new_tokens=6, combine=fail)
        assert torch.is_autocast_enabled("cpu")
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == "eager"
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) and torch.is_grad_enabled()
    ids = torch.tensor([ragged()[1]])
    model(ids, labels=ids).loss.backward()              # still trains, by its own attention
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert tokens(got) == [greedy(model, p, 6) for p in ragged()]   # float32, without dropout
    assert sampler(ragged(), max_new_tokens=6, stop=(), temperature=0.0) == got


# ---- two streams, combine, halt ------------------------------------------------------------------

def blend(logits, last, step, state):
    """Mostly the first stream until a token below 8 was fed, says `state`; then the other."""
    switched = state | (last < 8)
    lam = torch.where(switched.bool(), 0.8, 0.1)[:, None] + 0.005 * step[:, None]
    p, q = logits.log_softmax(-1).unbind(1)
    return (1 - lam) * p + lam * q, switched


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_two_streams_equal_an_uncached_loop(name):
    model = build(ARCHITECTURES[name])
    pairs = list(zip(ragged((9, 14, 5, 21, 3)), ragged((2, 6, 5, 1, 11), seed=2)))
    pairs[2] = (pairs[2][0], pairs[1][1])               # a text shared between two pairs
    stop, budget = (60, 61, 62), 15
    sampler = Sampler(model, rows=3, length=64, streams=2)
    got = sampler(pairs, n=2, max_new_tokens=budget, stop=stop, seed=6,
                  temperature=0.8, top_p=0.95, combine=blend)
    for r, sample in enumerate(got):
        u = uniforms(6, sample)
        texts, state, want = [list(t) for t in pairs[r // 2]], torch.zeros(1, dtype=torch.long), []
        for t in range(budget):
            with torch.no_grad():
                logits = [model(torch.tensor([text]), use_cache=False).logits[:, -1]
                          for text in texts]
            fed, step = torch.tensor([texts[0][-1]]), torch.tensor([t])
            mixed, state = blend(torch.stack(logits, 1), fed, step, state)
            token, logp, entropy, _ = draw(mixed, u[t:t + 1], 0.8, top_p=0.95)
            want.append(token.item())
            assert sample.logp[t] == pytest.approx(logp.item(), abs=1e-5)
            assert sample.entropy[t] == pytest.approx(entropy.item(), abs=1e-5)
            for text in texts:
                text.append(token.item())
            if token.item() in stop:
                break
        assert sample.tokens == want


def test_two_streams_need_pairs_and_a_combine(model):
    sampler = Sampler(model, rows=3, length=64, streams=2)
    with pytest.raises(ValueError, match="combine"):
        sampler([([5], [6])], max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler([([5], [6]), ([5], [])], max_new_tokens=4, combine=blend)
    with pytest.raises(ValueError, match="prompt 0 needs 2 texts"):
        sampler([([5],)], max_new_tokens=4, combine=blend)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_halt_cuts_where_it_says_whenever_it_is_asked(model, rows):
    """A rule stated on the text cuts the same in any batch; a sample cut short is not finished."""
    def halt(tokens):                                   # after the third token below 16
        hits = [i + 1 for i, token in enumerate(tokens) if token < 16]
        return hits[2] if len(hits) > 2 else None

    prompts, stop = ragged(), (20, 21, 22)
    sampler = Sampler(model, rows=rows, length=64)
    free = sampler(prompts, n=8, max_new_tokens=25, stop=stop, seed=8)
    cut = sampler(prompts, n=8, max_new_tokens=25, stop=stop, seed=8, halt=halt)
    want = [row[:halt(row)] for row in tokens(free)]
    assert tokens(cut) == want and tokens(cut) != tokens(free)
    assert finished(cut) == [row[-1] in stop for row in want]
    assert all(len(sample.logp) == len(sample.entropy) == len(sample.tokens) for sample in cut)
    none = sampler(prompts, max_new_tokens=9, stop=stop, halt=lambda _: 0)
    assert not any(tokens(none)) and not any(finished(none))


def test_combine_is_told_the_token_fed_and_the_step(model):
    told = []

    def watch(logits, last, step, state):
        told.append((logits.shape, last.tolist(), step.tolist(), state.tolist()))
        return logits[:, 1], state + 1

    sampler = Sampler(model, rows=3, length=64, streams=2)
    sample, = sampler([([5, 6, 7], [8, 9])], max_new_tokens=6, stop=(), combine=watch)
    assert told == [((1, 2, V), [fed], [t], [t]) for t, fed in enumerate([7, *sample.tokens[:-1]])]


# ---- what a GPU does, acted out on the CPU -------------------------------------------------------

def acted_flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None,
                window_size_left=None, seqused_k=None):
    """aten::_flash_attention_forward for ragged rows: what the kernel checks, then row by row."""
    B, heads, dim = len(cu_q) - 1, q.shape[1], q.shape[2]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape == (B, heads, dim) and k.shape == v.shape == (len(k), k.shape[1], dim)
    assert heads % k.shape[1] == 0 and dim % 8 == 0 and dim <= 256
    for x in (cu_q, cu_k, seqused_k):
        assert x.dtype == torch.int32 and x.is_contiguous()
    assert cu_q.shape == cu_k.shape == (B + 1,) and seqused_k.shape == (B,)
    assert cu_q.tolist() == list(range(B + 1)) and max_q == 1           # one query a row
    assert (seqused_k <= cu_k.diff()).all() and cu_k.diff().max() <= max_k and cu_k[-1] <= len(k)
    assert (dropout, causal, debug) == (0.0, False, False)
    out = torch.empty_like(q)
    for i, (start, used) in enumerate(zip(cu_k.tolist(), seqused_k.tolist())):
        end = start + used
        if window_size_left is not None:
            start = max(start, end - 1 - window_size_left)
        for head in range(heads):
            shared = head * k.shape[1] // heads
            scores = k[start:end, shared] @ q[i, head] * scale
            out[i, head] = scores.softmax(-1) @ v[start:end, shared]
    return out, None, None, None, None


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(sampler_module, "flash_fits", lambda q, k, v: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", acted_flash)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flash_layout_equals_masked_attention(kv_heads, window, flash, monkeypatch):
    """Three of six rows of the slab: attention over exactly the columns that each has filled."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(6, kv_heads, 30, 8, generator=g) for _ in range(2))
    q = torch.randn(6, 4, 30, 8, generator=g)
    new = [torch.randn(3, heads, 1, 8, generator=g) for heads in (4, kv_heads, kv_heads)]
    pos = torch.tensor([[0], [29], [12]])
    out = []
    for fits in (True, False):
        monkeypatch.setattr(sampler_module, "flash_fits", lambda q, k, v: fits)
        slots = Slots(build(), 6, 1, 40)
        for T, call, tensors in (
                (30, Call(torch.arange(6)[:, None], torch.arange(30)[None], 30), (q, k, v)),
                (1, Call(torch.arange(3)[:, None], pos, 40, used=pos[:, 0].int() + 1), new)):
            result, _ = sampler_module.slab_attention(
                SimpleNamespace(layer_idx=0), *tensors, None, slots=slots, call=call, scaling=0.3,
                sliding_window=window)
        assert slots.flash == {0: fits} and result.shape == (3, 1, 4, 8)
        out.append(result)
    assert torch.allclose(*out, atol=1e-5)


class ActedGraph:
    """A graph that records the `forward` made while it is captured, and replays it."""
    now = None
    captured = []

    def __enter__(self):
        ActedGraph.now = self
        ActedGraph.captured.append(self)

    def __exit__(self, *_):
        ActedGraph.now = None

    def replay(self):
        self.logits.copy_(self.call())


@pytest.fixture
def acted(monkeypatch, flash):
    """Graphs and streams that are none, on a CPU that takes itself for a GPU."""
    forward, streams = Slots.forward, ["the stream of the caller"]

    def recording(self, B):
        logits = forward(self, B).clone()
        if ActedGraph.now:
            ActedGraph.now.size, ActedGraph.now.logits = B, logits
            ActedGraph.now.call = lambda: forward(self, B)
        return logits

    monkeypatch.setattr(ActedGraph, "captured", [])
    monkeypatch.setattr(Slots, "forward", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", ActedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)


@pytest.mark.parametrize("every", [4, 32])
@pytest.mark.parametrize("name, streams", [("qwen3", 1), ("gemma3", 2), ("gemma3 window", 1)])
def test_graphs_and_flash_acted_out(name, streams, every, request):
    """Fixed memory, padded batches and the flat slab are ours: they must not change a token."""
    config = copy.deepcopy(ARCHITECTURES[name])
    config.head_dim = 16
    model, prompts = build(config), ragged()
    more = {} if streams == 1 else {"combine": blend}
    if streams == 2:
        prompts = list(zip(prompts, ragged((4,) * 7, seed=2)))

    def run(seed):
        sampler = Sampler(model, rows=12, length=64, streams=streams)
        sampler.every = every
        return sampler(prompts, n=3, max_new_tokens=18, stop=range(4), seed=seed, **more)

    want = run(4), run(5)
    request.getfixturevalue("acted")
    for seed, samples in zip((4, 5), want):
        got = run(seed)
        assert tokens(got) == tokens(samples)
        for a, b in zip(got, samples):
            assert a.logp == pytest.approx(b.logp, abs=1e-5)
    assert {graph.size for graph in ActedGraph.captured} == ({8, 12} if every == 4 else {12})


def test_prompts_of_one_token_alone_need_no_prefill_even_with_flash(request):
    model, prompts = build(Qwen3Config(**SHAPE, head_dim=16)), [[5], [9]]
    run = lambda: tokens(Sampler(model, rows=2, length=20)(prompts, n=2, max_new_tokens=9, stop=()))
    want = run()
    request.getfixturevalue("acted")
    assert run() == want


def test_free_slots_of_a_graph_read_one_column(acted, monkeypatch):
    """14 rows, then fewer: what a padded batch steps along behind them stays at position 0."""
    free, replay = [], sampler_module.replay

    def watched(slots, B):
        free.append(slots.pos[B:].flatten().tolist())
        return replay(slots, B)

    monkeypatch.setattr(sampler_module, "replay", watched)
    model = build(Qwen3Config(**SHAPE, head_dim=16))
    budgets = [3, 5, 9, 14, 17, 20, 24]
    Sampler(model, rows=14, length=64)(ragged(), n=2, max_new_tokens=budgets, stop=())
    assert len({len(positions) for positions in free}) > 3
    assert not any(any(positions) for positions in free)


def refusing_graph(*errors):
    """torch.cuda.graph that makes its own stream current, fails, and leaves it there. Raises its
    errors in turn, the later while the earlier is handled, as leaving a broken capture does."""
    class Graph:
        def __init__(self, graph):
            pass

        def __enter__(self):
            torch.cuda.set_stream("the stream of the capture")

        def __exit__(self, *_):
            try:
                raise errors[0]
            except RuntimeError:
                raise errors[-1]

    return Graph


def test_a_model_that_cannot_be_captured_is_stepped_eagerly_and_says_so(acted, monkeypatch):
    model = build(Qwen3Config(**SHAPE, head_dim=16))
    run = lambda: tokens(Sampler(model, rows=3, length=40)(
        ragged(), max_new_tokens=18, stop=range(4)))
    want = run()
    error = RuntimeError("operation not permitted when stream is capturing")
    monkeypatch.setattr(torch.cuda, "graph", refusing_graph(error))
    says = "no CUDA graph of Qwen3ForCausalLM.*not permitted"
    with pytest.warns(UserWarning, match=says) as warned:
        assert run() == want
    assert len(warned) == 1 and torch.cuda.current_stream() == "the stream of the caller"


@pytest.mark.parametrize("errors", [[torch.OutOfMemoryError("full")],
                                    [torch.OutOfMemoryError("full"),
                                     RuntimeError("capture invalidated")]])
def test_out_of_memory_in_a_capture_is_raised(acted, monkeypatch, errors):
    monkeypatch.setattr(torch.cuda, "graph", refusing_graph(*errors))
    sampler = Sampler(build(Qwen3Config(**SHAPE, head_dim=16)), rows=3, length=40)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        sampler(ragged(), max_new_tokens=18, stop=())
    assert torch.cuda.current_stream() == "the stream of the caller"


@pytest.mark.parametrize("unfit", [0, 1])
def test_a_graph_needs_flash_in_every_layer(acted, monkeypatch, unfit):
    """A head too wide for the kernel in one layer: that layer is masked, the other is not, nothing
    is captured, and the samples are the same."""
    model = build(Qwen3Config(**SHAPE, head_dim=16))
    run = lambda: Sampler(model, rows=4, length=40)(ragged(), max_new_tokens=12, stop=range(4))
    want, asked, used = run(), [], []
    assert ActedGraph.captured
    ActedGraph.captured.clear()

    def fits(q, k, v):                                  # asked for layer 0, 1, then 0, 1 again
        asked.append(len(asked) % 2 != unfit)
        return asked[-1]

    for name in ("attend", "attend_flash"):
        attend = getattr(sampler_module, name)
        monkeypatch.setattr(sampler_module, name,
                            lambda *args, name=name, f=attend: used.append(name) or f(*args))
    monkeypatch.setattr(sampler_module, "flash_fits", fits)
    assert tokens(run()) == tokens(want)
    assert set(used) == {"attend", "attend_flash"} and not ActedGraph.captured


def test_cudnn_attention_is_off_inside_a_call_only(model):
    inside = []

    def watch(logits, last, step, state):
        inside.append(torch.backends.cuda.cudnn_sdp_enabled())
        return logits[:, 0], state

    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for enabled in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            Sampler(model, rows=2, length=32)([[5, 6]], max_new_tokens=2, stop=(), combine=watch)
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert inside == [False] * 4


def test_the_demonstration_runs_in_an_empty_folder(tmp_path):
    (tmp_path / "sampler.py").write_text((ROOT / "sampler.py").read_text())
    run = subprocess.run([sys.executable, "sampler.py"], cwd=tmp_path, capture_output=True,
                         text=True, env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "6 of 6 texts are those of generate" in run.stdout


def test_the_parts_of_the_gpu_experiment_run_dry():
    """All parts, at toy sizes; the last one needs the toy's base model."""
    command = [sys.executable, "-m", "experiments.gpu", "--dry"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for part in ("kernels", "shapes", "attention", "draw", "step", "roofline", "stats", "update"):
        assert f"---- {part}\n" in run.stdout
    assert "greedy accuracy" in run.stdout
