"""
gpu.py - what a GPU makes of this repository: every part prints as it goes and survives another's failure.

    kernels     versions, and the attention kernels that are chosen
    shapes      milliseconds of prompt attention at a new shape and at a known one, cuDNN on and off
    attention   one layer's attention to the slab, by each path, against its floor
    draw        drawing a token: plain, top-p by candidates, top-p by sorting everything
    step        kernels of one decoding step, launched one by one and replayed from a graph
    roofline    decoding at 1.5B shape against `generate` and against what memory allows
    stats       token_stats of 8k tokens: seconds, peak memory
    update      Prefix-RFT by stages, with the update's MFU and peak memory, at 0.5B and 1.5B shape
    toy         Prefix-RFT on the toy with large batches

A floor is bytes that must be read, the weights once and the live keys and values once, divided by the bandwidth of a
plain copy measured here. MFU counts 6 operations a parameter and token, and 989 TFLOP/s (H100, H200 in bf16).

    python -m experiments.gpu                     all parts on a CUDA GPU: some ten minutes
    python -m experiments.gpu --part roofline     one of them
    python -m experiments.gpu --dry               all of it at toy sizes on the CPU: does it run?
"""

import sys
import time
import traceback
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import idft
import prefix_rft
import toy
from ddt import response_stats
from eval import InputError, flag, greedy_accuracy, new_sampler, run_script
from sampler import Sampler, Slots, attention, draw

SHAPES = {      # hidden, MLP, layers, heads, kv heads: those of Qwen2.5; "dry" for the CPU
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "dry": (64, 128, 2, 4, 2),
}
PEAK_FLOPS = 989e12


def random_model(name, device, dtype):
    hidden, mlp, layers, heads, kv_heads = SHAPES[name]
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512 if name == "dry" else 151936, hidden_size=hidden,
                         intermediate_size=mlp, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads,
                         max_position_embeddings=32768, tie_word_embeddings=True)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def timed(f):
    """Run f with the device drained before and after -> wall seconds, what f returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def seconds(f, rounds=3):
    """The shortest of some runs after a first one."""
    f()
    return min(timed(f)[0] for _ in range(rounds))


def bandwidth(device, dry):
    """Bytes a second that a plain copy reads and writes."""
    source = torch.zeros(2**20 if dry else 2**30, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 10)


def peak_memory():
    """GB allocated at most since the last call, and a new start."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


# ---- the parts: each is told the device, the precision of a sampler there, and whether to be quick ------------------

def kernels(device, dtype, dry):
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"CUDA {torch.version.cuda}, cuDNN attention {torch.backends.cuda.cudnn_sdp_enabled()}")
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, copies {bandwidth(device, dry) / 1e12:.2f} TB/s")
    for kind in (torch.float32, dtype):
        model = random_model("dry", device, kind)
        sampler = Sampler(model, rows=8, length=64)
        with torch.profiler.profile() as profile:
            sampler([[5] * 20], n=8, max_new_tokens=3, stop=())
        names = [event.key[:90] for event in profile.key_averages()]
        print(f"{kind}:")
        for name in names:
            if "attention" in name or "flash" in name or "fmha" in name:
                print("   ", name)


def shapes(device, dtype, dry):
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        first, again = [], []
        for i in range(2 if dry else 20):
            q = torch.randn(8, 12, (8 if dry else 1000) + 7 * i, 128, device=device, dtype=dtype)
            run = lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            first.append(time.perf_counter() - start)
            again.append(seconds(run))
        torch.backends.cuda.enable_cudnn_sdp(False)
        print(f"cuDNN {str(cudnn):5}: a new shape {1e3 * sum(first) / len(first):8.2f} ms, "
              f"a known one {1e3 * sum(again) / len(again):8.3f} ms")


def layer_attention(device, dtype, dry):
    rate = bandwidth(device, dry)
    sizes = [(4, 32)] if dry else [(8, 1024), (64, 1024), (64, 4096), (256, 1024), (256, 4096)]
    print("  rows  context   masked us   flash us   floor us")
    for rows, context in sizes:
        slots = Slots(SimpleNamespace(device=device), rows, 1, context, context)
        slots.target, slots.reach, slots.shared = None, context, None
        slots.pos += context - 1
        q = torch.randn(rows, 12, 1, 128, device=device, dtype=dtype)
        k = torch.randn(rows, 2, 1, 128, device=device, dtype=dtype)
        slots.attend(0, q, k, k, 0.1)
        flash, times = slots.flash, []
        for slots.flash in (False, True):
            slots.shared = None
            usable = flash or not slots.flash
            times.append(1e6 * seconds(lambda: slots.attend(0, q, k, k, 0.1), 20) if usable else 0)
        floor = 2 * rows * context * 2 * 128 * k.element_size() / rate
        print(f"{rows:6}{context:9}{times[0]:12.0f}{times[1]:11.0f}{1e6 * floor:11.0f}")


def drawing(device, dtype, dry):
    vocabulary = 2048 if dry else 151936
    print("  rows   plain ms   top-p ms   sorting everything ms")
    for rows in (4,) if dry else (64, 256):
        logits, u = 3 * torch.randn(rows, vocabulary, device=device), torch.rand(rows, device=device)
        plain = seconds(lambda: draw(logits, u, 1.0))
        some = seconds(lambda: draw(logits, u, 0.6, top_p=0.95))
        everything = seconds(lambda: draw(logits, u, 0.6, top_p=0.95, candidates=vocabulary))
        print(f"{rows:6}{1e3 * plain:11.3f}{1e3 * some:11.3f}{1e3 * everything:24.3f}")


def step(device, dtype, dry):
    model = random_model("dry" if dry else "1.5B", device, dtype)
    rows, context = (4, 32) if dry else (64, 1024)
    with attention(model, "slab"):
        slots = Slots(model, rows, 1, context, context)
        slots.read([([5] * (context - 1), row) for row in range(rows)])
        slots.pos += context - 1
        eager = seconds(lambda: slots.forward(rows, context))
        with torch.profiler.profile() as profile:
            slots.forward(rows, context)
        on_device = [event for event in profile.events() if "CUDA" in str(event.device_type)]
        replay = seconds(lambda: slots.replay(rows, context))
    print(f"{rows} rows, context {context}: {len(on_device)} kernels, one by one {1e3 * eager:.2f} ms, "
          f"replayed {1e3 * replay:.2f} ms")


def roofline(device, dtype, dry):
    model = random_model("dry" if dry else "1.5B", device, dtype)
    rate = bandwidth(device, dry)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize
    few, many = (2, 6) if dry else (32, 160)
    print(" batch  context  tokens/s  ms/step  roofline  generate ms")
    for batch in (4,) if dry else (64, 256):
        for context in (24,) if dry else (1024, 4096):
            prompt = [7 * i % 500 for i in range(context)]
            sampler = Sampler(model, rows=batch, length=context + many)
            ids = torch.tensor([prompt] * batch, device=device)

            def ours(new):
                sampler([prompt], batch, new, ())

            def theirs(new):
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                               min_new_tokens=new, do_sample=True, top_k=0)

            # differences of two lengths leave the prompt and the capture out
            once = (seconds(lambda: ours(many), 1) - seconds(lambda: ours(few), 1)) / (many - few)
            floor = (weights + batch * context * token) / rate
            print(f"{batch:6}{context:9}{batch / once:10.0f}{1e3 * once:9.2f}{floor / once:10.0%}",
                  end="", flush=True)
            slow = (seconds(lambda: theirs(18), 1) - seconds(lambda: theirs(2), 1)) / 16
            print(f"{1e3 * slow:13.2f}")


def stats(device, dtype, dry):
    model = random_model("dry" if dry else "0.5B", device, torch.float32)
    if device.type == "cuda":
        idft.checkpoint_activations(model)
    length = 64 if dry else 2048
    rows = [([5], [i % 500 for i in range(length - 1)]) for _ in range(4)]

    def run():
        logp, entropy = response_stats(model, rows)
        (logp + entropy).sum().backward()

    peak_memory()
    print(f"{4 * length} tokens, forward and backward: {seconds(run, 1):.3f} s, peak {peak_memory():.1f} GB")


def update(device, dtype, dry):
    print("shape  response  sync s  rollout s  update s   MFU  peak GB")
    for name in ("dry",) if dry else ("0.5B", "1.5B"):
        for length in (16,) if dry else (2048, 8192):
            model = random_model(name, device, torch.float32)
            if device.type == "cuda":
                idft.checkpoint_activations(model)
            optimizer = idft.new_optimizer(model)
            sampler = Sampler(model, rows=64, length=200 + length, dtype=dtype)
            prompts = [[5 + i] * 200 for i in range(2 if dry else 8)]
            peak_memory()
            sync, _ = timed(lambda: sampler.sync(model))
            rollout, samples = timed(lambda: sampler(prompts, 8, length, ()))

            # no stop tokens: all responses are as long as they may be; half of the last is a prefix
            rollouts = []
            for i, sample in enumerate(samples):
                one = prefix_rft.Rollout(prompts[i // 8], sample.tokens, "", reward=float(i % 2))
                if i % 8 == 7:
                    one.prefix_length, one.demo_length = length // 2, length
                rollouts.append(one)
            flags = prefix_rft.Flags(n=8, max_new_tokens=length)
            took, _ = timed(lambda: prefix_rft.update(model, optimizer, rollouts, flags))
            flops = 6 * sum(p.numel() for p in model.parameters()) * len(samples) * (200 + length)
            print(f"{name:6}{length:9}{sync:8.2f}{rollout:11.1f}{took:10.1f}"
                  f"{flops / took / PEAK_FLOPS:6.0%}{peak_memory():9.1f}", flush=True)


def large_toy(device, dtype, dry):
    model, tokenizer = toy.base_model(0)
    model.to(device)
    flags = prefix_rft.Flags(batch=2 if dry else 128, steps=1 if dry else 30, lr=1e-3, max_new_tokens=96)
    train = toy.problems("train", 8 if dry else 4096)
    problems = prefix_rft.prepare_problems(tokenizer, train, flags.max_new_tokens)
    prompts = [problem["prompt"] for problem in problems]
    sampler, _ = new_sampler(model, prompts, 128, rows=16 if dry else 1024)
    tests = {"hard": toy.problems("hard", 8 if dry else 256)}
    optimizer = idft.new_optimizer(model)
    state = {"step": 0, "bad": 0}
    before = greedy_accuracy(model, tokenizer, tests, 96, sampler=sampler)
    took, _ = timed(lambda: prefix_rft.train_policy(model, tokenizer, problems, flags, sampler,
                                                    optimizer, state))
    sampler.sync(model)
    after = greedy_accuracy(model, tokenizer, tests, 96, sampler=sampler)
    print(f"{flags.steps} steps of {flags.batch} x {flags.n} rollouts: {took / flags.steps:.2f} s a step; "
          f"greedy accuracy {before} -> {after}")


PARTS = {"kernels": kernels, "shapes": shapes, "attention": layer_attention, "draw": drawing,
         "step": step, "roofline": roofline, "stats": stats, "update": update, "toy": large_toy}


@dataclass
class Flags:
    part: Literal[("all", *PARTS)] = flag("all", "one part alone")
    dry: bool = flag(False, "toy sizes on the CPU")


def main(flags):
    if not flags.dry and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA GPU on this machine: take --dry, or another machine")
    device, dtype = ("cpu", torch.float32) if flags.dry else ("cuda", torch.bfloat16)
    failed = []
    for name, part in PARTS.items():
        if flags.part not in ("all", name):
            continue
        print(f"\n---- {name}", flush=True)
        start = time.perf_counter()
        try:
            part(torch.device(device), dtype, flags.dry)
        except Exception:
            failed.append(name)
            traceback.print_exc()
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main, Flags)
