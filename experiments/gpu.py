"""
gpu.py - what a GPU makes of this repository. Parts print as they go; one may fail without the rest.

    kernels     versions, and the attention kernels that are chosen
    shapes      milliseconds of prompt attention at a new shape and at a known one, cuDNN on and off
    attention   one layer's attention to the slab, by each path, against its floor
    draw        drawing a token: plain, top-p by candidates, top-p by sorting everything
    step        a decoding step, launched kernel by kernel and replayed from a graph; the capture
    roofline    decoding at 1.5B shape against `generate` and against its floor
    stats       token_stats of 8k tokens: seconds, peak memory
    update      Prefix-RFT by stages, MFU of the update, peak memory; 0.5B and 1.5B, 2k and 8k
    toy         Prefix-RFT on the toy with large batches
    memory      what should fit on which card, with and without --offload: arithmetic, no GPU needed

A floor is bytes that must be read, weights once and live keys and values once, divided by the
bandwidth of a plain copy measured here. MFU counts 6 operations a parameter and token, and 989
TFLOP/s (H100 and H200 in bf16).

    python -m experiments.gpu                     all parts on a CUDA GPU: some ten minutes
    python -m experiments.gpu --part roofline     one of them
    python -m experiments.gpu --part memory       a table of what fits, on any machine
    python -m experiments.gpu --dry               all of them at toy sizes on the CPU: do they run?
"""

import itertools
import math
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
from ddt import CHUNK, response_stats
from eval import InputError, flag, greedy_accuracy, new_sampler, run_script
from sampler import Call, Sampler, Slots, attention, draw, replay, slab_attention

# vocabulary, hidden, MLP, layers, heads, kv heads: those of Qwen2.5, and some for the CPU
SHAPES = {
    "0.5B": (151936, 896, 4864, 24, 14, 2),
    "1.5B": (151936, 1536, 8960, 28, 12, 2),
    "3B": (151936, 2048, 11008, 36, 16, 2),
    "7B": (152064, 3584, 18944, 28, 28, 4),
    "dry": (512, 64, 128, 2, 4, 2),
}
CARDS = [24, 48, 80, 141]        # GB
PEAK_FLOPS = 989e12
GPU = SimpleNamespace(
    device=torch.device("cuda"), dtype=torch.bfloat16, small="0.5B", large="1.5B",
    copy=2**30, shapes=20, length=1000, vocabulary=151936, rows=[64, 256], contexts=[1024, 4096],
    few=32, many=160, stats=2048, models=["0.5B", "1.5B"], responses=[2048, 8192], prompts=8,
    batch=128, steps=30, problems=4096)
DRY = SimpleNamespace(
    device=torch.device("cpu"), dtype=torch.float32, small="dry", large="dry",
    copy=2**20, shapes=2, length=8, vocabulary=2048, rows=[4], contexts=[24],
    few=2, many=6, stats=64, models=["dry"], responses=[16], prompts=2,
    batch=2, steps=1, problems=8)


def random_model(name, device, dtype):
    vocabulary, hidden, mlp, layers, heads, kv_heads = SHAPES[name]
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp,
                         num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, tie_word_embeddings=name != "7B")
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(config).to(dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def drain():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(f):
    """Run f with the device drained before and after -> wall seconds, what f returns."""
    drain()
    start = time.perf_counter()
    result = f()
    drain()
    return time.perf_counter() - start, result


def seconds(f, rounds=3):
    """The shortest of some runs, after a first one that does not count."""
    f()
    times = []
    for _ in range(rounds):
        times.append(timed(f)[0])
    return min(times)


def bandwidth(size):
    """Bytes a second that a plain copy reads and writes."""
    source = torch.zeros(size.copy, dtype=torch.uint8, device=size.device)
    target = torch.zeros_like(source)
    return 2 * size.copy / seconds(lambda: target.copy_(source), 10)


def peak_memory():
    """GB allocated at most since the last call, and a new start."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


# ---- the parts -----------------------------------------------------------------------------------

def kernels(size):
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, CUDA "
          f"{torch.version.cuda}, cuDNN attention {torch.backends.cuda.cudnn_sdp_enabled()}")
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, copies {bandwidth(size) / 1e12:.2f} TB/s")
    for dtype in (torch.float32, size.dtype):
        sampler = Sampler(random_model(size.small, size.device, dtype), rows=8, length=64)
        with torch.profiler.profile() as profile:
            sampler([[5] * 20], n=8, max_new_tokens=3, stop=())
        print(f"{dtype}:")
        for event in profile.key_averages():
            if "attention" in event.key or "flash" in event.key or "fmha" in event.key:
                print("   ", event.key[:90])


def shapes(size):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        new = known = 0.0
        for i in range(size.shapes):
            q = torch.randn(8, 12, size.length + 7 * i, 128, device=size.device, dtype=size.dtype)
            run = lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)
            new += timed(run)[0]
            known += seconds(run)
        torch.backends.cuda.enable_cudnn_sdp(before)
        print(f"cuDNN {cudnn!s:5}: a new shape {1e3 * new / size.shapes:8.2f} ms, "
              f"a known one {1e3 * known / size.shapes:8.3f} ms")


def layer_attention(size):
    rate = bandwidth(size)
    print("  rows  context  path     us  floor us")
    for context in size.contexts:
        for rows in (8, *size.rows):
            slots = Slots(SimpleNamespace(device=size.device), rows, 1, context)
            slots.pos += context - 1
            used = slots.pos[:, 0].int() + 1
            call = Call(slots.numbers[:rows, None], slots.pos, context, used)
            q = torch.randn(rows, 12, 1, 128, device=size.device, dtype=size.dtype)
            k = torch.randn(rows, 2, 1, 128, device=size.device, dtype=size.dtype)
            floor = 2 * rows * context * 2 * 128 * k.element_size() / rate
            run = lambda: slab_attention(SimpleNamespace(layer_idx=0), q, k, k, None, slots=slots,
                                         call=call, scaling=0.1)
            run()
            for flash in (True, False) if slots.flash[0] else (False,):
                slots.flash[0] = flash
                took = seconds(run, 20)
                path = "flash" if flash else "masked"
                print(f"{rows:6}{context:9}  {path:7}{1e6 * took:4.0f}{1e6 * floor:10.0f}")


def drawing(size):
    print("  rows   plain ms   top-p ms   sorting everything ms")
    for rows in size.rows:
        logits = 3 * torch.randn(rows, size.vocabulary, device=size.device)
        u = torch.rand(rows, device=size.device)
        plain = seconds(lambda: draw(logits, u, 1.0))
        some = seconds(lambda: draw(logits, u, 0.6, top_p=0.95))
        everything = seconds(lambda: draw(logits, u, 0.6, 0, 0.95, size.vocabulary))
        print(f"{rows:6}{1e3 * plain:11.3f}{1e3 * some:11.3f}{1e3 * everything:24.3f}")


def step(size):
    model = random_model(size.large, size.device, size.dtype)
    rows, context = size.rows[0], size.contexts[0]
    with attention(model, "slab"):
        slots = Slots(model, rows, 1, context)
        slots.read([([5] * (context - 1), row) for row in range(rows)])
        slots.pos += context - 1
        eager = seconds(lambda: slots.forward(rows))
        with torch.profiler.profile() as profile:
            slots.forward(rows)
        # Every call of the sampler captures anew, for each number of slots that it comes by.
        capture, _ = timed(lambda: replay(slots, rows))
        replayed = seconds(lambda: replay(slots, rows))
    count = sum("CUDA" in str(event.device_type) for event in profile.events())
    print(f"{rows} rows, context {context}: {count} kernels, one by one {1e3 * eager:.2f} ms, "
          f"from a graph {1e3 * replayed:.2f} ms; capturing it {capture:.2f} s, once a call")


def roofline(size):
    model = random_model(size.large, size.device, size.dtype)
    rate = bandwidth(size)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    _, hidden, _, layers, heads, kv_heads = SHAPES[size.large]
    token = 2 * layers * kv_heads * hidden // heads * size.dtype.itemsize       # bytes of its cache
    print(" batch  context  tokens/s  ms/step  roofline  generate ms")
    for rows in size.rows:
        for context in size.contexts:
            prompt = [7 * i % 500 for i in range(context)]
            sampler = Sampler(model, rows=rows, length=context + size.many)
            ids = torch.tensor([prompt] * rows, device=size.device)

            def ours(new):
                return seconds(lambda: sampler([prompt], rows, new, ()), 1)

            def theirs(new):
                return seconds(lambda: model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                    min_new_tokens=new, do_sample=True, top_k=0), 1)

            # The difference of two lengths leaves the prompt and the capture out.
            once = (ours(size.many) - ours(size.few)) / (size.many - size.few)
            floor = (weights + rows * context * token) / rate
            print(f"{rows:6}{context:9}{rows / once:10.0f}{1e3 * once:9.2f}{floor / once:10.0%}",
                  end="", flush=True)
            print(f"{1e3 * (theirs(18) - theirs(2)) / 16:13.2f}", flush=True)


def stats(size):
    model = random_model(size.small, size.device, torch.float32)
    idft.checkpoint_activations(model)
    rows = [([5], [i % 500 for i in range(size.stats - 1)])] * 4

    def run():
        logp, entropy = response_stats(model, rows)
        (logp + entropy).sum().backward()

    peak_memory()
    took = seconds(run, 1)
    print(f"{4 * size.stats} tokens, forward and backward: {took:.3f} s, {peak_memory():.1f} GB")


def update(size):
    print("shape  response  sync s  rollout s  update s   MFU  peak GB")
    for name in size.models:
        for length in size.responses:
            model = random_model(name, size.device, torch.float32)
            idft.checkpoint_activations(model)
            optimizer = idft.new_optimizer(model)
            sampler = Sampler(model, rows=64, length=200 + length, dtype=size.dtype)
            prompts = [[5 + i] * 200 for i in range(size.prompts)]
            flags = prefix_rft.Flags(n=8, max_new_tokens=length)
            peak_memory()
            sync, _ = timed(lambda: sampler.sync(model))
            rollout, samples = timed(lambda: sampler(prompts, 8, length, ()))

            # Without stop tokens all are as long as they may be. Of every eighth, half is a prefix.
            rollouts = []
            for i, sample in enumerate(samples):
                one = prefix_rft.Rollout(prompts[i // 8], sample.tokens, "", reward=float(i % 2))
                if i % 8 == 7:
                    one.prefix_length, one.demo_length = length // 2, length
                rollouts.append(one)
            took, _ = timed(lambda: prefix_rft.update(model, optimizer, rollouts, flags))
            tokens = len(samples) * (200 + length)
            flops = 6 * sum(p.numel() for p in model.parameters()) * tokens
            print(f"{name:6}{length:9}{sync:8.2f}{rollout:11.1f}{took:10.1f}"
                  f"{flops / took / PEAK_FLOPS:6.0%}{peak_memory():9.1f}", flush=True)


def large_toy(size):
    model, tokenizer = toy.base_model(0)
    model.to(size.device)
    flags = prefix_rft.Flags(batch=size.batch, steps=size.steps, lr=1e-3, max_new_tokens=96)
    problems = toy.problems("train", size.problems)
    problems = prefix_rft.prepare_problems(tokenizer, problems, flags.max_new_tokens)
    prompts = [problem["prompt"] for problem in problems]
    sampler, _ = new_sampler(model, prompts, 128, rows=8 * size.batch)
    tests = {"hard": toy.problems("hard", size.problems // 8)}
    run = idft.Run(flags, model, tokenizer, idft.new_optimizer(model), sampler)
    before = greedy_accuracy(model, tokenizer, tests, 96, sampler=sampler)
    took, _ = timed(lambda: prefix_rft.train_policy(run, problems))
    sampler.sync(model)
    after = greedy_accuracy(model, tokenizer, tests, 96, sampler=sampler)
    print(f"{size.steps} steps of {size.batch} x {flags.n} rollouts: {took / size.steps:.2f} s "
          f"each; greedy accuracy {before} -> {after}")


def memory(name, offload, response, prompt=512):
    """GB that Prefix-RFT needs on the card -> {what: GB}, and GB of main memory for --offload.

    The update reads one row of prompt and response at a time (--micro_tokens at most that long);
    "a row" is what each of --rows takes of the sampler's slab. Not counted: CUDA's own memory and
    what the allocator loses, for which the table leaves a tenth of the card."""
    vocabulary, hidden, mlp, layers, heads, kv_heads = SHAPES[name]
    model = random_model(name, torch.device("meta"), torch.float32)
    count = sum(p.numel() for p in model.parameters())
    tokens = prompt + response

    # Of the size of the model. Without --offload: float32, the sampler's bf16 twin, the bf16 copies
    # that autocast makes in a forward pass. With it: bf16, and the largest gradient on its way.
    need = {"weights": 8 * count, "gradients": 4 * count, "moments": 8 * count}
    if offload:
        need = {"weights": 2 * count, "gradients": 2 * vocabulary * hidden, "moments": 0}

    # The residual stream in front of every layer, bf16 with --offload, else float32; what the one
    # layer that is computed again keeps (counted with saved_tensors_hooks on a CPU), and as much
    # again for its gradients.
    stream = layers * tokens * hidden * (2 if offload else 4)
    inside = tokens * 2 * (4 * mlp + (12 if offload else 17) * hidden)
    need["activations"] = stream + 2 * inside

    # token_stats holds some five float32 tensors of a chunk, and the head's gradient twice.
    chunk = min(CHUNK["cuda"], math.ceil(tokens / 4) * vocabulary)
    need["logits"] = 5 * 4 * chunk + 2 * 2 * vocabulary * hidden

    # Keys and values in bf16, of every token of a row in every layer.
    need["a row"] = tokens * layers * 2 * kv_heads * (hidden // heads) * 2
    main = 16 * count if offload else 0
    return {what: size / 1e9 for what, size in need.items()}, main / 1e9


def rows_that_fit(need, card):
    """How many responses a card of so many GB samples side by side, 64 at most; 0: no update."""
    room = 0.9 * card
    update = sum(need.values()) - need["a row"]
    if update > room:
        return 0
    # While it samples there are no gradients, activations or logits.
    return min(64, int((room - need["weights"] - need["moments"]) / need["a row"]))


def what_fits(size):
    """The table: GB on the card by part, and how many rows a card samples side by side."""
    models = ["dry"] if size.models == ["dry"] else ["0.5B", "1.5B", "3B", "7B"]
    print("GB on the card, row by row of 512 + response tokens; then how many such rows a card\n"
          "samples side by side (64 at most; - where the update does not fit).\n")
    columns = ["weights", "gradients", "moments", "activations", "logits", "a row"]
    print("model  response  offload ", *columns, " update  main memory", end="")
    print(*[f"{card:5} GB" for card in CARDS], sep="")
    for response, name, offload in itertools.product((2048, 8192), models, (False, True)):
        need, main = memory(name, offload, response)
        print(f"{name:5} {response:9}  {'yes' if offload else 'no':7} ", end="")
        for what in columns:
            print(f"{need[what]:{len(what) + 1}.2f}", end="")
        print(f"{sum(need.values()) - need['a row']:8.1f}{main:13.0f}", end="")
        print(*[f"{rows_that_fit(need, card) or '-':>8}" for card in CARDS], sep="")


PARTS = {"kernels": kernels, "shapes": shapes, "attention": layer_attention, "draw": drawing,
         "step": step, "roofline": roofline, "stats": stats, "update": update, "toy": large_toy,
         "memory": what_fits}


@dataclass
class Flags:
    part: Literal[("all", *PARTS)] = flag("all", "one part alone")
    dry: bool = flag(False, "toy sizes on the CPU")


def main(flags):
    if not flags.dry and flags.part != "memory" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA GPU on this machine: add --dry, or take another one")
    failed = []
    for name, part in PARTS.items():
        if flags.part in ("all", name):
            print(f"\n---- {name}", flush=True)
            try:
                took, _ = timed(lambda: part(DRY if flags.dry else GPU))
                print(f"({took:.0f} s)", flush=True)
            except Exception:
                failed.append(name)
                traceback.print_exc()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main, Flags)
