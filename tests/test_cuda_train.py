"""Training on a GPU: float32 weights under bf16 arithmetic, a bf16 twin that samples, the same steps as on a CPU."""

import copy
import json

import pytest
import torch
from test_idft import small_model as small_qwen2
from test_idft import small_rows
from test_prefix_rft import base, flags, hand_rows, roll, small_model  # noqa: F401 (base is a fixture)
from transformers import Qwen2Config, Qwen2ForCausalLM

import idft
import prefix_rft
import toy
from kill import logged
from sampler import Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def vector(tensors):
    return torch.cat([t.detach().float().flatten().cpu() for t in tensors])


def moved_share(model, rows, lr):
    """The share of weights with a gradient that one AdamW step changes."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = idft.new_optimizer(model, weight_decay=0.0)
    idft.supervised_step(model, optimizer, rows, lr, loss="sft")
    moment = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    changed = vector(p != old for p, old in zip(model.parameters(), before))
    learning = vector(m.abs() > 1e-5 for m in moment)
    return (changed * learning).sum() / learning.sum()


def test_a_step_of_1e6_moves_float32_weights_and_is_lost_on_bf16_ones():
    model = small_qwen2().to(CUDA)
    assert moved_share(copy.deepcopy(model), small_rows(), 1e-6) > 0.95
    assert moved_share(copy.deepcopy(model).to(torch.bfloat16), small_rows(), 1e-6) < 0.05


def test_arithmetic_is_bf16_and_everything_kept_is_float32():
    model, kinds = small_qwen2().to(CUDA), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    optimizer = idft.new_optimizer(model)
    idft.supervised_step(model, optimizer, small_rows(), 1e-3)
    assert set(kinds) == {torch.bfloat16}
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert {t.dtype for t in [*model.parameters(), *moments]} == {torch.float32}


@pytest.mark.parametrize("loss", ["sft", "dft", "idft"])
def test_a_supervised_step_is_that_of_the_cpu(loss):
    """bf16 rounds each product to 8 bits: 3 % of the gradient's norm."""
    def gradient(device, micro_tokens=10**6):
        model = small_qwen2().to(device)
        before = vector(model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        metrics = idft.supervised_step(model, optimizer, small_rows(), 1.0, loss, clip=1e9, micro_tokens=micro_tokens)
        return before - vector(model.parameters()), metrics

    (cpu, cpu_metrics), (gpu, metrics), (cut, _) = gradient("cpu"), gradient(CUDA), gradient(CUDA, 60)
    assert (cpu - gpu).norm() < 0.1 * cpu.norm() and (cut - gpu).norm() < 0.05 * gpu.norm()
    assert metrics["nll"] == pytest.approx(cpu_metrics["nll"], rel=0.02) and metrics["tokens"] == cpu_metrics["tokens"]


@pytest.mark.parametrize("settings", [{}, {"prefix_loss": "luffy"}, {"prefix_loss": "sft"},
                                      {"prefix_loss": "all", "advantage": "code"}])
def test_an_update_is_that_of_the_cpu(settings):
    """Not with entropy clipping by a hair's breadth: which token is the last of the top 20 % may differ."""
    def change(device):
        model = small_model().to(device)
        before = vector(model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        metrics = prefix_rft.update(model, optimizer, hand_rows(), flags(**settings), None)
        return vector(model.parameters()) - before, metrics

    (cpu, _), (gpu, metrics) = change("cpu"), change(CUDA)
    similarity = torch.nn.functional.cosine_similarity(cpu, gpu, dim=0)
    assert similarity > (0.97 if settings else 0.9) and metrics["clip_share"] == 0 and metrics["updates"] == 1


def test_activation_checkpointing_saves_memory_and_changes_little():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                                         num_attention_heads=8, num_key_value_heads=2)).to(CUDA).eval()
    rows = [([5] * 10, [i % 900 + 20 for i in range(1014)]) for _ in range(8)]

    def step():
        other = copy.deepcopy(model)
        if checkpointed:
            idft.checkpoint_activations(other)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        idft.supervised_step(other, torch.optim.SGD(other.parameters(), lr=1.0), rows, 1.0, clip=1e9)
        gradient = vector(p - q for p, q in zip(model.parameters(), other.parameters()))
        return torch.cuda.max_memory_allocated() - before, gradient

    checkpointed = False
    memory, plain = step()
    checkpointed = True
    less, recomputed = step()
    print(f"peak above the weights: {memory / 2 ** 30:.2f} GiB, with recomputation {less / 2 ** 30:.2f} GiB")
    assert less < memory / 2 and (plain - recomputed).norm() < 0.02 * plain.norm()


# ---- the bf16 twin

def twin_of(base, max_new_tokens=40):
    model, tokenizer = copy.deepcopy(base[0]).to(CUDA), base[1]
    problems = prefix_rft.prepare(tokenizer, toy.problems("easy", 8), 1.0, 0)
    settings = flags(max_new_tokens=max_new_tokens, rows=16)
    return model, problems, prefix_rft.rollout_sampler(model, tokenizer, problems, {}, settings)


def test_the_twin_follows_sync(base):  # noqa: F811
    model, problems, sampler = twin_of(base)
    assert sampler.model.dtype == torch.bfloat16 and model.dtype == torch.float32
    prompts = [p["prompt"] for p in problems]
    greedy = lambda s: s(prompts, max_new_tokens=24, stop=(1,), temperature=0.0).lists()
    first = greedy(sampler)
    stale = vector(sampler.model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * p.std() * torch.randn_like(p) if p.dim() > 1 else 0)
    assert torch.equal(vector(sampler.model.parameters()), stale)                             # not before
    assert greedy(sampler) == first
    sampler.sync(model)
    assert torch.equal(vector(sampler.model.parameters()), vector(p.to(torch.bfloat16) for p in model.parameters()))
    after = greedy(sampler)                                                    # the captured graphs see the new weights
    assert after != first and after == greedy(Sampler(model, 16, sampler.length, dtype=torch.bfloat16))


def test_log_probs_of_the_sampler_are_the_trainers(base):  # noqa: F811
    """Two ways of rounding to bf16, the twin's weights and autocast's products. Tolerance: 0.02 nats on average, 0.3 at
    worst, and the mean difference, which would bias the ratio, within 0.01."""
    model, problems, sampler = twin_of(base)
    prompts = [p["prompt"] for p in problems]
    samples = sampler(prompts, n=8, max_new_tokens=24, stop=(1,), temperature=1.0, seed=0)
    rows = [(prompts[r // 8], tokens) for r, tokens in enumerate(samples.lists())]
    ids, mask, response = idft.pad(rows, CUDA)
    with torch.no_grad(), idft.precision(CUDA):
        logp, entropy = prefix_rft.token_stats(model, ids, mask, want=response)
    ours = logp[response[:, 1:]], entropy[response[:, 1:]]
    for trainer, twin in zip(ours, (samples.logp[samples.mask], samples.entropy[samples.mask])):
        difference = trainer - twin.to(trainer)
        size = difference.abs()
        print(f"mean {difference.mean():+.4f}, mean size {size.mean():.4f}, largest {size.max():.3f} nats")
        assert size.mean() < 0.02 and size.max() < 0.3 and difference.mean().abs() < 0.01


# ---- whole runs

def test_a_run_on_the_gpu_trains_resumes_and_is_evaluated(base, tmp_path):  # noqa: F811
    base[0].save_pretrained(tmp_path / "base"), base[1].save_pretrained(tmp_path / "base")
    for name, split, n in (("train", "train", 12), ("test", "easy", 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy.problems(split, n)))
    argv = ["--model", tmp_path / "base", "--data", tmp_path / "train.jsonl", "--eval_data", tmp_path / "test.jsonl",
            "--device", "cuda", "--steps", 4, "--batch", 4, "--n", 4, "--max_new_tokens", 32, "--lr", 1e-3,
            "--save_every", 2, "--eval_every", 2, "--checkpoint_activations"]
    run = lambda *more: prefix_rft.run(prefix_rft.main, prefix_rft.Flags, [str(a) for a in [*argv, *more]])
    run("--out", tmp_path / "run")
    rows = logged(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4] and sum(row.get("updates", 0) for row in rows) > 0
    run("--out", tmp_path / "run", "--resume")
    assert [row["step"] for row in logged(tmp_path / "run")] == [0, 1, 2, 3, 4, 4]
    supervised = ["--model", tmp_path / "run" / "checkpoint", "--data", tmp_path / "train.jsonl", "--device", "cuda",
                  "--steps", 3, "--batch", 4, "--out", tmp_path / "sft"]
    idft.run(idft.main, idft.Flags, [str(a) for a in supervised])
    assert [row["step"] for row in logged(tmp_path / "sft")] == [0, 1, 2, 3, 3]
