"""The sampler on a CUDA GPU: graphs and flash attention change no token, no step waits."""
import copy

import pytest
import torch
from test_sampler import (ARCHITECTURES, acted_flash, blend, build, greedy, ragged, teacher_forced,
                          tokens)

import sampler as sampler_module
from sampler import Sampler, Slots

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HALF = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)


def on_gpu(name="qwen3", dtype=torch.float32, **shape):
    config = copy.deepcopy(ARCHITECTURES[name])
    for key, value in shape.items():
        setattr(config, key, value)
    return build(config).to("cuda", dtype)


@pytest.fixture
def eager(monkeypatch):
    """Flash attention without graphs, on request."""
    return lambda: monkeypatch.setattr(sampler_module, "replay", Slots.forward)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_greedy_equals_generate(name):
    model, prompts = on_gpu(name), ragged()
    got = Sampler(model, rows=3, length=40)(prompts, max_new_tokens=14, stop=(), temperature=0.0)
    assert tokens(got) == [greedy(model, p, 14) for p in prompts]


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_bf16_logp_is_near_the_trainers(name):
    """0.05 nats on average over tokens: the size of bf16 rounding of logits of a few units."""
    model, prompts = on_gpu(name, torch.bfloat16, **HALF), ragged()
    got = Sampler(model, rows=4, length=64)(prompts, n=4, max_new_tokens=30, stop=())
    gaps = []
    for r, sample in enumerate(got):
        logp, _ = teacher_forced(model, prompts[r // 4], sample.tokens, 1.0)
        gaps += [abs(a - b) for a, b in zip(sample.logp, logp)]
    assert sum(gaps) / len(gaps) < 0.05


@pytest.mark.parametrize("streams", [1, 2])
def test_graph_replay_equals_eager(streams, eager):
    """The first token of every sample: later ones differ once rounding has chosen another."""
    model, prompts = on_gpu("qwen3", torch.bfloat16, **HALF), ragged()
    more = {} if streams == 1 else {"combine": blend}
    if streams == 2:
        prompts = list(zip(prompts, ragged((4,) * 7, seed=2)))
    sampler = Sampler(model, rows=8, length=64, streams=streams)
    run = lambda: sampler(prompts, n=3, max_new_tokens=24, stop=range(3), seed=3, **more)
    graphs = run()
    eager()
    for a, b in zip(graphs, run()):
        assert a.logp[0] == pytest.approx(b.logp[0], abs=0.2)
        assert a.entropy[0] == pytest.approx(b.entropy[0], abs=0.1)


def test_graphs_are_used_and_their_memory_is_freed(monkeypatch):
    captured, capture = [], sampler_module.capture

    def watched(slots, size):
        graph, logits = capture(slots, size)
        captured.append(graph is not None)
        return graph, logits

    monkeypatch.setattr(sampler_module, "capture", watched)
    sampler = Sampler(on_gpu("qwen3", torch.bfloat16, **HALF), rows=32, length=2048)
    sampler(ragged(), max_new_tokens=4, stop=())
    before = torch.cuda.memory_allocated()
    sampler(ragged(), n=5, max_new_tokens=1500, stop=())
    assert len(captured) > 2 and all(captured)
    assert torch.cuda.memory_allocated() < before + 2**20


@pytest.mark.parametrize("moved", [False, True])
def test_graphs_see_the_weights_of_the_call(moved):
    model, prompts = on_gpu(**HALF), ragged()
    sampler = Sampler(model, rows=8, length=64, dtype=torch.bfloat16)       # a twin
    sampler(prompts, max_new_tokens=10, stop=())
    for p in model.parameters():
        p.data = p.data * 0.7 if moved else p.data.mul_(0.7)
    sampler.sync(model)
    anew = Sampler(model, rows=8, length=64, dtype=torch.bfloat16)
    got, want = (s(prompts, max_new_tokens=10, stop=(), temperature=0.0) for s in (sampler, anew))
    assert got == want


@pytest.mark.parametrize("heads, kv_heads, dim",
                         [(4, 2, 64), (12, 2, 128), (4, 4, 64), (8, 1, 256)])
def test_the_kernel_does_what_its_stand_in_does(heads, kv_heads, dim):
    """The operator itself, on ragged rows of a slab, against the stand-in of the CPU tests."""
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(6, heads, dim, device="cuda", dtype=torch.bfloat16, generator=g)
    k, v = torch.randn(2, 6 * 300, kv_heads, dim, device="cuda", dtype=torch.bfloat16, generator=g)
    start = torch.arange(7, device="cuda", dtype=torch.int32)
    used = torch.tensor([1, 300, 17, 128, 129, 2], device="cuda", dtype=torch.int32)
    more = dict(scale=0.1, seqused_k=used)
    got, want = (f(q, k, v, start, start * 300, 1, 300, 0.0, False, False, **more)[0].float()
                 for f in (torch.ops.aten._flash_attention_forward, acted_flash))
    assert got.shape == want.shape and torch.allclose(got, want, atol=2e-2)


def test_flash_attention_equals_masked(monkeypatch):
    model, prompts = on_gpu("qwen3", torch.bfloat16, **HALF), ragged()
    sampler, used = Sampler(model, rows=16, length=64), []
    flash, fits = sampler_module.attend_flash, sampler_module.flash_fits
    monkeypatch.setattr(sampler_module, "attend_flash",
                        lambda *args: used.append(1) or flash(*args))
    run = lambda: [sample.entropy[0] for sample in sampler(prompts, n=2, max_new_tokens=1, stop=())]
    a = run()
    monkeypatch.setattr(sampler_module, "flash_fits", lambda q, k, v: not fits(q, k, v))
    count = len(used)
    assert count and run() == pytest.approx(a, abs=0.1) and len(used) == count


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}])
@pytest.mark.parametrize("graphs", [True, False])
def test_no_step_waits_for_the_host(how, graphs, eager, monkeypatch):
    model, prompts = on_gpu("qwen3", torch.bfloat16, **HALF), ragged()
    sampler = Sampler(model, rows=8, length=64)
    if not graphs:
        eager()
    sampler(prompts, n=2, max_new_tokens=12, stop=(), **how)                # warms libraries up
    replay, draw, steps = sampler_module.replay, sampler_module.draw, []

    def watched(f, captures):
        def run(*args):
            steps.append(1)
            torch.cuda.set_sync_debug_mode("default" if captures(args) else "error")
            try:
                return f(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return run

    # the first replay of a size captures, which may wait
    fresh = lambda args: graphs and not args[0].graphs.get(8)
    monkeypatch.setattr(sampler_module, "replay", watched(replay, fresh))
    monkeypatch.setattr(sampler_module, "draw", watched(draw, lambda args: False))
    sampler(prompts, n=2, max_new_tokens=12, stop=(), **how)
    assert len(steps) >= 48


def test_samples_do_not_depend_on_rows():
    model, prompts = on_gpu(), ragged()
    few, many = (Sampler(model, rows=rows, length=64) for rows in (3, 14))
    few, many = (tokens(s(prompts, n=2, max_new_tokens=16, stop=range(4), seed=2))
                 for s in (few, many))
    assert few == many
