"""Proofs about sampler.py on the CPU: the samples are the model's, whatever the batch they were drawn in."""
import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (BloomConfig, Gemma2Config, Gemma3TextConfig, GPT2Config, GPTNeoXConfig,
                          GptOssConfig, LlamaConfig, MambaConfig, MistralConfig, MixtralConfig, Phi3Config,
                          PhimoeConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config)
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

sys.path.insert(0, str(Path(__file__).parent.parent))
from sampler import Sampler, draw, row_key, truncate, uniform

V = 64
SHAPE = dict(vocab_size=V, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)
QWEN2 = Qwen2Config(**SHAPE)
ARCHITECTURES = {
    "qwen2": QWEN2,
    "qwen2 window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=6),
    "gemma3": Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 6}, head_dim=16, sliding_window=6,
                               layer_types=["sliding_attention"] * 5 + ["full_attention"]),
    "gpt2": GPT2Config(vocab_size=V, n_embd=48, n_layer=2, n_head=4),
    "phi3": Phi3Config(**SHAPE, pad_token_id=0, sliding_window=6),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=6),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=32,
                                shared_expert_intermediate_size=32),
}


def build(config=QWEN2, seed=0, scale=3.0):
    """A random model with weights large enough to have opinions."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(scale)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def ragged(lengths=(1, 9, 3, 17, 5, 12, 2), seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=g).tolist() for n in lengths]


def greedy(model, prompt, budget, stop=()):
    """What generate says, cut after the first stop token."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=budget)
    out = out[0, len(prompt):].tolist()
    ends = [i for i, token in enumerate(out) if token in stop]
    return out[:ends[0] + 1] if ends else out


def teacher_forced(model, prompt, response, temperature):
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1:-1].float()
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, ids[0, len(prompt):, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture(scope="module")
def model():
    return build()


# ---- the same tokens as generate ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate(name):
    if name in ("gpt2", "qwen2_moe") and transformers.__version__ < "5":
        pytest.skip("before transformers 5 its attention takes no keywords")
    model, prompts = build(ARCHITECTURES[name]), ragged()
    stop = greedy(model, prompts[3], 14)[3:7:3]     # two tokens that occur: rows end at different times
    want = [greedy(model, p, 14, stop) for p in prompts]
    got = Sampler(model, rows=3, length=40)(prompts, max_new_tokens=14, stop=stop, temperature=0.0)
    assert got.lists() == want
    assert got.finished.tolist() == [row[-1] in stop for row in want]
    assert len({len(row) for row in want}) > 1 and len({t for row in want for t in row}) > 4      # it tests


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 10, 1.0), (1.3, 0, 0.8),
                                                       (0.0, 0, 1.0)])
def test_statistics_equal_teacher_forcing_after_refill_and_shrink(model, temperature, top_k, top_p):
    prompts = ragged()
    got = Sampler(model, rows=4, length=64)(prompts, n=3, max_new_tokens=30, stop=range(6), seed=5,
                                           temperature=temperature, top_k=top_k, top_p=top_p)
    lengths = got.mask.sum(-1)
    assert got.tokens.shape == got.mask.shape == got.logp.shape == got.entropy.shape and len(got.tokens) == 21
    assert temperature == 0 or lengths.unique().numel() > 3
    for r, row in enumerate(got.lists()):
        with torch.no_grad():
            logp, entropy = teacher_forced(model, prompts[r // 3], row, temperature or 1.0)
        assert torch.allclose(got.logp[r, :lengths[r]], logp, atol=1e-5)
        assert torch.allclose(got.entropy[r, :lengths[r]], entropy, atol=1e-5)
        assert not got.tokens[r, lengths[r]:].any() and not got.logp[r, lengths[r]:].any()
        assert not any(t < 6 for t in row[:-1]) and (row[-1] < 6) == got.finished[r]


def test_prefix_continuation_is_the_concatenated_prompt(model):
    prompt = ragged()[1]
    sampler = Sampler(model, rows=4, length=64)
    whole = sampler([prompt], max_new_tokens=20, stop=(), temperature=0.0).lists()[0]
    rest = sampler([prompt + whole[:k] for k in range(20)], max_new_tokens=[20 - k for k in range(20)],
                   stop=(), temperature=0.0).lists()
    assert [whole[:k] + tail for k, tail in enumerate(rest)] == [whole] * 20


# ---- randomness --------------------------------------------------------------------------------------------

def test_same_seed_same_samples_for_any_rows_order_and_company(model):
    prompts = ragged()
    draws = lambda prompts, rows, seed=3, n=4: Sampler(model, rows=rows, length=64)(
        prompts, n=n, max_new_tokens=16, stop=range(4), seed=seed).lists()
    want = draws(prompts, 64)
    assert all(draws(prompts, rows) == want for rows in (1, 5, 13))
    backwards = draws(prompts[::-1], 6)
    assert [row for i in range(7) for row in backwards[4 * (6 - i):4 * (6 - i) + 4]] == want
    assert draws(prompts[2:3], 2) == want[8:12]
    assert [row for row in draws(prompts, 3, n=2)] == [want[4 * i + j] for i in range(7) for j in range(2)]
    assert draws([prompts[2], prompts[2]], 3, n=2) == want[8:12]    # a prompt listed twice goes on counting
    assert draws(prompts, 64, seed=4) != want
    assert len({tuple(row) for row in want[4:8]}) == 4                      # samples of one prompt differ


def test_two_runs_are_bitwise_equal_and_leave_the_global_generator_alone(model):
    sampler = Sampler(model, rows=5, length=64)
    before = torch.get_rng_state()
    a, b = (sampler(ragged(), n=3, max_new_tokens=20, stop=range(4), seed=9) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))
    assert torch.equal(before, torch.get_rng_state())


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
    counts = torch.bincount(got.tokens[:, 0], minlength=V).float()
    assert not counts[p == 0].any()
    freedom = int((p > 0).sum()) - 1
    assert chi_square(counts, p) < freedom + 4 * (2 * freedom) ** 0.5       # four standard deviations


def test_uniform_numbers_are_uniform_and_unrelated():
    keys = torch.tensor([row_key(0, ((5,),), j) for j in range(400)])
    u = torch.stack([uniform(keys, torch.full_like(keys, t)) for t in range(250)])         # (steps, rows)
    assert 0 < u.min() and u.max() < 1 and u.dtype == torch.float32
    counts = torch.histc(u, 100, 0, 1)
    assert chi_square(counts, torch.full((100,), 0.01)) < 99 + 4 * (2 * 99) ** 0.5
    for other in (u.roll(1, 0), u.roll(1, 1), u.roll((1, 1), (0, 1))):      # neighbours in step and row
        assert torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1].abs() < 4 / u.numel() ** 0.5


@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (5, 1.0), (20, 0.5), (0, 1e-6), (1, 0.5), (5000, 0.3),
                                          (0, 0.999)])
def test_truncation_is_that_of_transformers(top_k, top_p):
    logits = 2 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.linspace(0, 0.01, 3000)           # nearly flat: the nucleus is most of the vocabulary
    want = logits
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    got = truncate(logits.softmax(-1), top_k, top_p)
    assert ((got > 0) != want.isfinite()).sum() <= 2    # at most a token at the edge, where rounding decides
    assert torch.allclose(got / got.sum(-1, keepdim=True), want.softmax(-1), atol=1e-3)


def test_draw_gives_a_token_even_of_a_broken_model():
    for temperature in (0.0, 1.0):
        token, _, _ = draw(torch.full((2, 5), torch.nan), torch.full((2,), 0.5), temperature)
        assert ((token >= 0) & (token < 5)).all()


def test_draw_stays_in_the_support_at_both_ends():
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 300:310] = 0
    for u in (2.0**-24, 1 - 2.0**-24):
        token, logp, entropy = draw(logits, torch.full((2,), u), 1.0)
        assert ((token >= 300) & (token < 310)).all()
        assert torch.allclose(entropy, torch.tensor(10.0).log()) and torch.allclose(logp, -entropy)


# ---- the slab ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_poisoned_columns_change_nothing(name, monkeypatch):
    model = build(ARCHITECTURES[name])
    run = lambda: sampler(ragged(), n=2, max_new_tokens=16, stop=range(4), seed=2).lists()
    sampler = Sampler(model, rows=4, length=64)
    want = run()
    for pair in sampler.slab.layers.values():           # what an earlier call left behind, NaN included
        for x in pair:
            x.fill_(torch.nan)
    assert run() == want
    advance = Sampler.advance

    def poisoned(self, *args):
        for pair in self.slab.layers.values():          # what lies beyond a row's own tokens
            for x in pair:
                for row, pos in enumerate(self.pos.flatten().tolist()):
                    x[row, :, pos:] = 50.0
        return advance(self, *args)

    monkeypatch.setattr(Sampler, "advance", poisoned)
    assert run() == want


def test_each_prompt_is_read_once(model):
    """n samples of a prompt, spread over refills, cost one prefill while one of them is still in the slab."""
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
    assert sampler(prompts, max_new_tokens=8, stop=(), temperature=0.0).lists() == want
    sampler.sync(model)                                 # without a twin nothing to do
    assert sampler(prompts, max_new_tokens=8, stop=(), temperature=0.0).lists() == want


def test_twin_follows_the_weights_in_place(model):
    model = copy.deepcopy(model)
    sampler = Sampler(model, rows=4, length=64, dtype=torch.bfloat16)
    assert sampler.model is not model
    assert sampler.model.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert sampler.model.model.rotary_emb.inv_freq.dtype == torch.float32
    addresses = [p.data_ptr() for p in sampler.model.parameters()]
    for p in model.parameters():
        p.data.mul_(0.9)
    stale = sampler(ragged(), max_new_tokens=8, stop=(), seed=1)
    sampler.sync(model)
    fresh = sampler(ragged(), max_new_tokens=8, stop=(), seed=1)
    anew = Sampler(model, rows=4, length=64, dtype=torch.bfloat16)
    again = anew(ragged(), max_new_tokens=8, stop=(), seed=1)
    assert torch.equal(fresh.logp, again.logp) and not torch.equal(fresh.logp, stale.logp)
    assert addresses == [p.data_ptr() for p in sampler.model.parameters()]


# ---- edges -------------------------------------------------------------------------------------------------

def test_stop_as_first_token_and_budgets(model):
    prompts, sampler = ragged((1, 1, 6)), Sampler(model, rows=2, length=64)
    first = [greedy(model, p, 1) for p in prompts]
    got = sampler(prompts, max_new_tokens=9, stop={t for row in first for t in row}, temperature=0.0)
    assert got.lists() == first and got.finished.all()
    got = sampler(prompts, max_new_tokens=1, stop=(), temperature=0.0)
    assert got.lists() == first and not got.finished.any() and got.tokens.shape == (3, 1)
    got = sampler(prompts, n=2, max_new_tokens=[5, 0, 2], stop=(), temperature=0.0)
    assert [len(row) for row in got.lists()] == [5, 5, 0, 0, 2, 2] and not got.finished.any()
    got = sampler([ragged((40,))[0]], max_new_tokens=24, stop=())           # exactly full
    assert got.mask.sum() == 24


def test_stop_defaults_to_the_models_own(model):
    model = copy.deepcopy(model)
    token = greedy(model, ragged()[1], 5)[2]
    for eos in (token, [V - 1, token]):
        model.generation_config.eos_token_id = eos
        got = Sampler(model, length=64)([ragged()[1]], max_new_tokens=9, temperature=0.0)
        assert got.lists()[0][-1] == token and got.finished.all()


@pytest.mark.parametrize("prompts, more, says", [
    ([], {}, "no prompts"),
    ([[5], []], {"n": 2}, r"row 2 \(prompt 1\) is empty"),
    ([[5] * 10, [5] * 60], {}, r"row 1 \(prompt 1\).*60 tokens and 8 new ones do not fit length=64"),
    ([[5, V]], {}, "row 0 .*vocabulary of 64"),
    ([[5, -1]], {}, "row 0 .*vocabulary"),
    ([[5], [6]], {"max_new_tokens": [1]}, "2 prompts but 1 values"),
    ([[5], [6]], {"max_new_tokens": [1, -2]}, "row 1"),
    ([[5]], {"n": 0}, "n=0"), ([[5]], {"temperature": -1.0}, "temperature=-1"),
    ([[5]], {"top_p": 0.0}, "top_p=0"), ([[5]], {"top_k": -1}, "top_k=-1"),
])
def test_bad_requests_name_the_row(model, prompts, more, says):
    with pytest.raises(ValueError, match=says):
        Sampler(model, rows=2, length=64)(prompts, **{"max_new_tokens": 8, "stop": (), **more})


def test_a_table_of_positions_limits_the_length():
    if transformers.__version__ < "5":
        pytest.skip("GPT-2 hands no keywords to its attention before transformers 5")
    model = build(GPT2Config(vocab_size=V, n_embd=48, n_layer=2, n_head=4, n_positions=32))
    sampler = Sampler(model, length=2048)
    assert sampler([[5] * 20], max_new_tokens=12, stop=()).mask.sum() == 12
    # The first of these is done early, and runs past the table until the host looks.
    beside = sampler([[5] * 30, [6] * 3], max_new_tokens=[2, 25], stop=(), temperature=0.0)
    assert beside.lists() == [greedy(model, [5] * 30, 2), greedy(model, [6] * 3, 25)]
    with pytest.raises(ValueError, match="length=32"):
        sampler([[5] * 21], max_new_tokens=12, stop=())


@pytest.mark.parametrize("config, says", [
    (Gemma2Config(**SHAPE, head_dim=16), "Gemma2.*softcap"),
    (GptOssConfig(**SHAPE, head_dim=16, num_local_experts=4), "GptOss.*s_aux"),
    (LlamaConfig(**SHAPE, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "Llama.*dynamic rope"),
    (PhimoeConfig(**SHAPE, sliding_window=64, num_local_experts=4), "Phimoe"),
    (MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4), "Mamba"),
    (BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4), "Bloom"),
])
def test_what_the_slab_cannot_serve_is_refused_by_name(config, says):
    with pytest.raises(ValueError, match=says):
        Sampler(build(config), rows=2, length=32)


# ---- the model afterwards ----------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(error):
    model = build(Qwen2Config(**SHAPE, attention_dropout=0.5))
    model.set_attn_implementation("eager")
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
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
    assert [m.training for m in model.modules()] == modes and model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing and torch.is_grad_enabled()
    ids = torch.tensor([ragged()[1]])
    model(ids, labels=ids).loss.backward()              # still trains, by its own attention
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert got.lists() == [greedy(model, p, 6) for p in ragged()]       # float32, without dropout
    assert sampler(ragged(), max_new_tokens=6, stop=(), temperature=0.0).lists() == got.lists()


# ---- two streams, combine, halt ----------------------------------------------------------------------------

def blend(logits, last, step, state):
    """Mostly the first stream until a token below 8 has been fed, as `state` remembers; then the second."""
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
    got = Sampler(model, rows=3, length=64, streams=2)(pairs, n=2, max_new_tokens=budget, stop=stop, seed=6,
                                                      temperature=0.8, top_p=0.95, combine=blend)
    for r, row in enumerate(got.lists()):
        key = torch.tensor([row_key(6, tuple(map(tuple, pairs[r // 2])), r % 2)])
        texts, state, want = [list(t) for t in pairs[r // 2]], torch.zeros(1, dtype=torch.long), []
        for t in range(budget):
            with torch.no_grad():
                logits = [model(torch.tensor([text]), use_cache=False).logits[:, -1] for text in texts]
            step = torch.tensor([t])
            mixed, state = blend(torch.stack(logits, 1), torch.tensor([texts[0][-1]]), step, state)
            token, logp, entropy = draw(mixed, uniform(key, step), 0.8, top_p=0.95)
            want.append(token.item())
            assert torch.allclose(got.logp[r, t], logp[0], atol=1e-5)
            assert torch.allclose(got.entropy[r, t], entropy[0], atol=1e-5)
            for text in texts:
                text.append(token.item())
            if token.item() in stop:
                break
        assert row == want


def test_two_streams_need_pairs_and_a_combine(model):
    sampler = Sampler(model, rows=3, length=64, streams=2)
    with pytest.raises(ValueError, match="combine"):
        sampler([([5], [6])], max_new_tokens=4)
    with pytest.raises(ValueError, match="row 1 "):
        sampler([([5], [6]), ([5], [])], max_new_tokens=4, combine=blend)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_halt_cuts_where_it_says_whenever_it_is_asked(model, rows):
    """A rule stated on the text gives the same cut for any batch; a row cut short is not finished."""
    def halt(tokens):                                   # after the third token below 16
        hits = [i + 1 for i, token in enumerate(tokens) if token < 16]
        return hits[2] if len(hits) > 2 else None

    prompts, stop = ragged(), (20, 21, 22)
    free = Sampler(model, rows=rows, length=64)(prompts, n=8, max_new_tokens=25, stop=stop, seed=8)
    cut = Sampler(model, rows=rows, length=64)(prompts, n=8, max_new_tokens=25, stop=stop, seed=8, halt=halt)
    want = [row[:halt(row)] for row in free.lists()]
    assert cut.lists() == want and cut.lists() != free.lists()
    assert cut.finished.tolist() == [row[-1] in stop for row in want]
    assert not cut.logp[~cut.mask].any()
    none = Sampler(model, rows=rows, length=64)(prompts, max_new_tokens=9, stop=stop, halt=lambda _: 0)
    assert not none.mask.any() and not none.finished.any()


def test_combine_is_told_the_token_fed_and_the_step(model):
    told = []

    def watch(logits, last, step, state):
        told.append((logits.shape, last.tolist(), step.tolist(), state.tolist()))
        return logits[:, 1], state + 1

    row, = Sampler(model, rows=3, length=64, streams=2)([([5, 6, 7], [8, 9])], max_new_tokens=6, stop=(),
                                                        combine=watch).lists()
    assert told == [((1, 2, V), [fed], [t], [t]) for t, fed in enumerate([7, *row[:-1]])]


# ---- what a GPU does, acted out on the CPU -----------------------------------------------------------------

def acted_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, seqused_k):
    """What torch documents of varlen_attn, one row at a time, without a mask."""
    out = []
    for i, used in enumerate(seqused_k.tolist()):
        keys, values = (x[cu_k[i]:cu_k[i] + used].transpose(0, 1) for x in (k, v))
        scores = q[cu_q[i]:cu_q[i + 1]].transpose(0, 1) @ keys.transpose(1, 2) * scale
        out.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


class ActedGraph:
    """A graph that records the `forward` made while it is captured, and replays it into the same memory."""
    now = None

    def pool(self):
        return 0

    def __enter__(self):
        ActedGraph.now = self

    def __exit__(self, *_):
        ActedGraph.now = None

    def replay(self):
        self.logits.copy_(self.call())


@pytest.fixture
def acted(monkeypatch):
    forward = Sampler.forward

    def recording(self, B, reach):
        logits = forward(self, B, reach).clone()
        if ActedGraph.now:
            ActedGraph.now.call, ActedGraph.now.logits = lambda: forward(self, B, reach), logits
        return logits

    class Stream:
        wait_stream = __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(Sampler, "forward", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", ActedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("name, streams", [("qwen2", 1), ("mistral", 1), ("gemma3", 2)])
def test_graphs_and_varlen_acted_out(name, streams, varlen, acted, monkeypatch):
    """Fixed memory, padded batches and the flat slab are logic of ours: they must not change a token."""
    model, prompts = build(ARCHITECTURES[name]), ragged()
    more = {} if streams == 1 else {"combine": blend}
    if streams == 2:
        prompts = list(zip(prompts, ragged((4,) * 7, seed=2)))
    run = lambda s, seed=4: s(prompts, n=3, max_new_tokens=18, stop=range(4), seed=seed, **more)
    want, other = (run(Sampler(model, rows=12, length=35, streams=streams), seed) for seed in (4, 5))
    if varlen:
        monkeypatch.setattr(sys.modules["sampler"], "flash", lambda k, v: True)
        monkeypatch.setattr(sys.modules["sampler"], "varlen_attn", acted_varlen, raising=False)
    graphs = Sampler(model, rows=12, length=35, streams=streams)            # just what the longest job needs
    graphs.graphs = {}
    for _ in range(2):
        got = run(graphs)
        assert got.lists() == want.lists() and torch.allclose(got.logp, want.logp, atol=1e-5)
    assert {size for size, _ in graphs.graphs} == {8, 12} and graphs.slab.varlen == varlen
    assert all(x.shape[2] == 35 for pair in graphs.slab.layers.values() for x in pair)      # it has not moved
    captured = dict(graphs.graphs)
    for pair in graphs.slab.layers.values():
        for x in pair:
            x.fill_(torch.nan)
    assert run(graphs, 5).lists() == other.lists() and graphs.graphs == captured
    for p in model.parameters():
        p.data = p.data.clone()                 # the weights moved: what was captured reads the old ones
    assert run(graphs).lists() == want.lists()
    assert all(graphs.graphs[key] is not captured[key] for key in graphs.graphs)


def test_a_model_that_cannot_be_captured_is_stepped_eagerly(model, acted, monkeypatch):
    def fail(graph, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    want, got = Sampler(model, rows=3, length=40), Sampler(model, rows=3, length=40)
    got.graphs = {}
    for _ in range(2):
        a, b = (s(ragged(), max_new_tokens=18, stop=range(4)) for s in (want, got))
        assert a.lists() == b.lists() and got.graphs is None
