"""On a GPU: token_stats at a fraction of the plain way's memory, float32 weights under bf16
arithmetic, a bf16 twin that samples, and the same steps as on a CPU."""

import copy
import json

import pytest
import torch
from conftest import run_here, small_model
from kill import logged
from test_idft import small_rows
from test_prefix_rft import flags, hand_rollouts, learning, sgd
from transformers import Qwen2Config, Qwen2ForCausalLM

import ddt
import idft
import prefix_rft
import toy
from eval import new_sampler
from sampler import Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def qwen(vocab_size, hidden_size=64, layers=2, **more):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, **more)).to(CUDA)


def vector(tensors):
    return torch.cat([t.detach().float().flatten().cpu() for t in tensors])


# ---- token_stats --------------------------------------------------------------------------------

@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_equal_the_plain_forward(autocast, monkeypatch):
    model = qwen(1000)
    monkeypatch.setattr(ddt, "CHUNK", {"cpu": 7000, "cuda": 7000})
    ids = torch.randint(1000, (3, 40), generator=torch.Generator().manual_seed(0)).to(CUDA)

    def values_and_gradients(stats):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logp, entropy = stats()
        assert logp.dtype == entropy.dtype == torch.float32
        (logp.sum() + (entropy ** 2).sum()).backward()
        return [logp, entropy, *(p.grad for p in model.parameters())]

    ours = values_and_gradients(lambda: ddt.token_stats(model, ids, torch.ones_like(ids)))
    textbook = values_and_gradients(
        lambda: ddt.logp_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:]))
    for a, b in zip(ours, textbook):
        assert (a - b).norm() <= (2e-2 if autocast else 1e-4) * b.norm()


def test_memory_at_the_vocabulary_of_qwen():
    """8,192 tokens, vocabulary 151,936: a copy of the logits is 5 GB, the plain way needs several;
    ours a few chunks of 1 GB and the head's gradient."""
    model = qwen(151_936, hidden_size=256)
    ids = torch.randint(1000, (4, 2049), generator=torch.Generator().manual_seed(0)).to(CUDA)

    def peak(stats):
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            logp, entropy = stats()
        (logp + entropy).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    ours = peak(lambda: ddt.token_stats(model, ids, torch.ones_like(ids)))
    print(f"peak above the weights: {ours / 2 ** 30:.2f} GiB")
    assert ours < 8 * 2 ** 30
    if torch.cuda.mem_get_info()[0] > 40 * 2 ** 30:
        textbook = peak(
            lambda: ddt.logp_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:]))
        print(f"the plain way: {textbook / 2 ** 30:.2f} GiB")
        assert ours < textbook / 2


# ---- steps --------------------------------------------------------------------------------------

def moved_share(model, rows, lr):
    """The share of weights with a gradient that one AdamW step changes."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = idft.new_optimizer(model)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    idft.supervised_step(model, optimizer, rows, lr, idft.Flags(loss="sft"))
    moment = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    changed = vector(p != old for p, old in zip(model.parameters(), before))
    learning = vector(m.abs() > 1e-5 for m in moment)
    return (changed * learning).sum() / learning.sum()


def test_a_step_of_1e6_moves_float32_weights_and_is_lost_on_bf16_ones():
    model = small_model("qwen2").to(CUDA)
    assert moved_share(copy.deepcopy(model), small_rows(), 1e-6) > 0.95
    assert moved_share(model.to(torch.bfloat16), small_rows(), 1e-6) < 0.05


def test_arithmetic_is_bf16_and_everything_kept_is_float32():
    model, kinds = small_model("qwen2").to(CUDA), []
    projection = model.model.layers[0].mlp.down_proj
    projection.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    optimizer = idft.new_optimizer(model)
    idft.supervised_step(model, optimizer, small_rows(), 1e-3, idft.Flags())
    assert set(kinds) == {torch.bfloat16}
    moments = [state[key] for state in optimizer.state.values()
               for key in ("exp_avg", "exp_avg_sq")]
    assert {t.dtype for t in [*model.parameters(), *moments]} == {torch.float32}


@pytest.mark.parametrize("loss", ["sft", "dft", "idft"])
def test_a_supervised_step_is_that_of_the_cpu(loss):
    """bf16 rounds each product to 8 bits: 3 % of the gradient's norm."""
    def step(device, micro_tokens=10**6):
        model = small_model("qwen2").to(device)
        before = vector(model.parameters())
        metrics = idft.supervised_step(model, sgd(model.parameters()), small_rows(), 1.0,
                                       idft.Flags(loss=loss, micro_tokens=micro_tokens))
        return before - vector(model.parameters()), metrics

    (cpu, cpu_metrics), (gpu, metrics), (cut, _) = step("cpu"), step(CUDA), step(CUDA, 60)
    assert (cpu - gpu).norm() < 0.1 * cpu.norm() and (cut - gpu).norm() < 0.05 * gpu.norm()
    assert metrics["nll"] == pytest.approx(cpu_metrics["nll"], rel=0.02)
    assert metrics["tokens"] == cpu_metrics["tokens"]


@pytest.mark.parametrize("settings", [{}, {"method": "luffy"}, {"method": "static"},
                                      {"prefix_loss": "all", "advantage": "code"}])
def test_an_update_is_that_of_the_cpu(settings):
    """Not with entropy clipping by a hair's breadth: the last of the top 20 % may differ."""
    def change(device):
        model = small_model().to(device)
        before = vector(model.parameters())
        metrics = prefix_rft.update(model, sgd(model.parameters()), hand_rollouts(),
                                    flags(**settings), **learning(settings.get("method")))
        return vector(model.parameters()) - before, metrics

    (cpu, _), (gpu, metrics) = change("cpu"), change(CUDA)
    similarity = torch.nn.functional.cosine_similarity(cpu, gpu, dim=0)
    assert similarity > (0.97 if settings else 0.9)
    assert metrics["clipped_tokens"] == 0 and metrics["updates"] == 1


def test_activation_checkpointing_saves_memory_and_changes_little():
    model = qwen(1000, hidden_size=512, layers=12).eval()
    rows = [([5] * 10, [i % 900 + 20 for i in range(1014)]) for _ in range(8)]

    def step(checkpointed):
        other = copy.deepcopy(model)
        if checkpointed:
            idft.checkpoint_activations(other)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        idft.supervised_step(other, sgd(other.parameters()), rows, 1.0, idft.Flags())
        moved = vector(p - q for p, q in zip(model.parameters(), other.parameters()))
        return torch.cuda.max_memory_allocated() - before, moved

    memory, plain = step(False)
    less, recomputed = step(True)
    print(f"peak above the weights: {memory / 2 ** 30:.2f} GiB, recomputed {less / 2 ** 30:.2f}")
    assert less < memory / 2 and (plain - recomputed).norm() < 0.02 * plain.norm()


# ---- the bf16 twin ------------------------------------------------------------------------------

def twin_of(small_base):
    model, tokenizer = copy.deepcopy(small_base[0]).to(CUDA), small_base[1]
    prompts = [problem["prompt"]
               for problem in prefix_rft.prepare_problems(tokenizer, toy.problems("easy", 8), 40)]
    sampler, _ = new_sampler(model, prompts, 40, 16)
    return model, prompts, sampler


def test_the_twin_follows_sync(small_base):
    model, prompts, sampler = twin_of(small_base)
    assert sampler.model.dtype == torch.bfloat16 and model.dtype == torch.float32

    def greedy(sampler):
        return [s.tokens for s in sampler(prompts, max_new_tokens=24, stop=[1], temperature=0.0)]

    first = greedy(sampler)
    stale = vector(sampler.model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.add_(0.5 * p.std() * torch.randn_like(p))
    assert torch.equal(vector(sampler.model.parameters()), stale)       # not before
    assert greedy(sampler) == first
    sampler.sync(model)
    rounded = vector(p.to(torch.bfloat16) for p in model.parameters())
    assert torch.equal(vector(sampler.model.parameters()), rounded)
    after = greedy(sampler)                             # the captured graphs see the new weights
    assert after != first
    assert after == greedy(Sampler(model, 16, sampler.length, dtype=torch.bfloat16))


def test_log_probs_of_the_sampler_are_the_trainers(small_base):
    """Two ways of rounding to bf16, the twin's weights and autocast's products. Tolerance: 0.02
    nats on average, 0.3 at worst, and the mean difference, which would bias the ratio, 0.01."""
    model, prompts, sampler = twin_of(small_base)
    samples = sampler(prompts, n=8, max_new_tokens=24, stop=[1], temperature=1.0, seed=0)
    rows = [(prompts[r // 8], sample.tokens) for r, sample in enumerate(samples)]
    with torch.no_grad():
        logp, entropy = ddt.response_stats(model, rows)
    twin_logp = torch.tensor([x for sample in samples for x in sample.logp], device=CUDA)
    twin_entropy = torch.tensor([x for sample in samples for x in sample.entropy], device=CUDA)
    for difference in (logp - twin_logp, entropy - twin_entropy):
        size = difference.abs()
        print(f"mean {difference.mean():+.4f}, size {size.mean():.4f}, largest {size.max():.3f}")
        assert size.mean() < 0.02 and size.max() < 0.3 and difference.mean().abs() < 0.01


# ---- whole runs ---------------------------------------------------------------------------------

def test_a_run_on_the_gpu_trains_resumes_and_is_evaluated(small_base, tmp_path):
    for part in small_base:
        part.save_pretrained(tmp_path / "base")
    for name, split, n in (("train", "train", 12), ("test", "easy", 4)):
        lines = [json.dumps(row) + "\n" for row in toy.problems(split, n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    argv = ["--data", tmp_path / "train.jsonl", "--device", "cuda", "--batch", 4, "--lr", 1e-3]
    policy = [*argv, "--model", tmp_path / "base", "--eval_data", tmp_path / "test.jsonl",
              "--steps", 4, "--n", 4, "--max_new_tokens", 48, "--low_end", 0.9,
              "--save_every", 2, "--eval_every", 2, "--out", tmp_path / "run"]
    run_here(prefix_rft, *policy)
    rows = logged(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert sum(row.get("updates", 0) for row in rows) > 0
    run_here(prefix_rft, *policy, "--resume")
    assert [row["step"] for row in logged(tmp_path / "run")] == [0, 1, 2, 3, 4, 4]
    run_here(idft, *argv, "--model", tmp_path / "run" / "checkpoint", "--steps", 3,
             "--out", tmp_path / "sft")
    assert [row["step"] for row in logged(tmp_path / "sft")] == [0, 1, 2, 3, 3]
