"""The sampler on a CUDA GPU: graphs and flash attention change no token, and no step waits for the host."""
import copy

import pytest
import torch

import sampler
from sampler import Sampler, Slab
from test_sampler import ARCHITECTURES, blend, build, greedy, ragged, teacher_forced

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HALF = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)    # for flash


def on_gpu(name="qwen2", dtype=torch.float32, **shape):
    config = copy.deepcopy(ARCHITECTURES[name])
    for key, value in shape.items():
        setattr(config, key, value)
    return build(config).to("cuda", dtype)


def eager(model, **kw):
    plain = Sampler(model, **kw)
    plain.graphs = None
    return plain


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_greedy_equals_generate(name):
    model, prompts = on_gpu(name), ragged()
    got = Sampler(model, rows=3, length=40)(prompts, max_new_tokens=14, stop=(), temperature=0.0)
    assert got.lists() == [greedy(model, p, 14) for p in prompts]


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_bf16_logp_is_near_the_trainers(name):
    """Tolerance: 0.05 nats on average over tokens, the size of bf16 rounding of logits of a few units."""
    model, prompts = on_gpu(name, torch.bfloat16, **HALF), ragged()
    got = Sampler(model, rows=4, length=64)(prompts, n=4, max_new_tokens=30, stop=())
    gaps = []
    for r, row in enumerate(got.lists()):
        with torch.no_grad():
            logp, _ = teacher_forced(model, prompts[r // 4], row, 1.0)
        gaps.append((got.logp[r] - logp).abs())
    assert torch.cat(gaps).mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", [1, 2])
def test_graph_replay_equals_eager(dtype, streams):
    model, prompts = on_gpu("qwen2", dtype, **HALF), ragged()
    more = {} if streams == 1 else {"combine": blend}
    if streams == 2:
        prompts = list(zip(prompts, ragged((4,) * 7, seed=2)))
    kw = dict(rows=8, length=64, streams=streams)
    graphs = Sampler(model, **kw)
    a, b = (s(prompts, n=3, max_new_tokens=24, stop=range(3), seed=3, **more)
            for s in (graphs, eager(model, **kw)))
    assert graphs.graphs
    first = (a.mask & b.mask)[:, 0]
    assert torch.allclose(a.logp[first, 0], b.logp[first, 0], atol=1e-4 if dtype == torch.float32 else 0.2)
    if dtype == torch.float32:
        assert a.lists() == b.lists() and torch.allclose(a.entropy, b.entropy, atol=1e-4)


def test_graphs_stay_valid_when_weights_change_in_place():
    model, prompts = on_gpu(), ragged()
    graphs = Sampler(model, rows=8, length=64, dtype=torch.bfloat16)        # a twin, refreshed by sync
    graphs(prompts, max_new_tokens=10, stop=())
    captured = dict(graphs.graphs)
    for p in model.parameters():
        p.data.mul_(0.7)
    graphs.sync(model)
    got = graphs(prompts, max_new_tokens=10, stop=(), temperature=0.0)
    assert all(graphs.graphs[key] is value for key, value in captured.items())
    anew = Sampler(model, rows=8, length=64, dtype=torch.bfloat16)
    want = anew(prompts, max_new_tokens=10, stop=(), temperature=0.0)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.logp, want.logp)


def test_graphs_are_dropped_when_weights_move():
    model, prompts = on_gpu(), ragged()
    graphs = Sampler(model, rows=8, length=64)
    graphs(prompts, max_new_tokens=10, stop=())
    for p in model.parameters():
        p.data = p.data * 0.7
    want = [greedy(model, p, 10) for p in prompts]
    assert graphs(prompts, max_new_tokens=10, stop=(), temperature=0.0).lists() == want


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_varlen_attention_equals_masked_sdpa(name, monkeypatch):
    if not sampler.VARLEN:
        pytest.skip("this torch has no varlen_attn with seqused_k")
    model, prompts = on_gpu(name, torch.bfloat16, **HALF), ragged()
    run = lambda s: s(prompts, n=2, max_new_tokens=1, stop=())
    flash = eager(model, rows=16, length=64)
    a = run(flash)
    assert flash.slab.varlen
    monkeypatch.setattr(sampler, "flash", lambda k, v: False)
    masked = eager(model, rows=16, length=64)
    b = run(masked)
    assert not masked.slab.varlen
    assert torch.allclose(a.entropy, b.entropy, atol=0.1)
    # and the attention alone, where rounding is all that may differ
    g = torch.Generator("cuda").manual_seed(0)
    slabs = [Slab(6, 40), Slab(6, 40)]
    k, v = (torch.randn(6, 2, 30, 64, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(2))
    q = torch.randn(6, 4, 30, 64, device="cuda", dtype=torch.bfloat16, generator=g)
    pos, window, out = torch.tensor([0, 3, 29, 12, 7, 1], device="cuda"), (None, 5), []
    for slab, fits in zip(slabs, (True, False)):
        monkeypatch.setattr(sampler, "flash", lambda k, v: fits)
        slab.prefill(torch.arange(6, device="cuda")).attend(0, q, k, v, 0.125, None)
        slab.decode(pos, 40)
        out.append([slab.attend(0, q[:, :, :1], k[:, :, :1], v[:, :, :1], 0.125, w).float() for w in window])
    assert all(torch.allclose(a, b, atol=2e-2) for a, b in zip(*out))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}])
def test_no_step_waits_for_the_host(how, monkeypatch):
    model, prompts = on_gpu("qwen2", torch.bfloat16, **HALF), ragged()
    graphs, plain = Sampler(model, rows=8, length=64), eager(model, rows=8, length=64)
    for s in (graphs, plain):
        s(prompts, n=2, max_new_tokens=12, stop=(), **how)                  # captures, and warms libraries up
    advance, steps = Sampler.advance, []

    def watched(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.append(1)
            return advance(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Sampler, "advance", watched)
    for s in (graphs, plain):
        s(prompts, n=2, max_new_tokens=12, stop=(), **how)
    assert len(steps) >= 24


def test_samples_do_not_depend_on_rows():
    model, prompts = on_gpu(), ragged()
    few, many = (Sampler(model, rows=rows, length=64) for rows in (3, 14))
    few, many = (s(prompts, n=2, max_new_tokens=16, stop=range(4), seed=2).lists() for s in (few, many))
    assert few == many
