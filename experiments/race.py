"""
race.py - how much faster the sampler is than `model.generate`, on one core, with a random Qwen2.

Four shapes of a batch: one row; 64 rows of one length; 192 ragged prompts whose samples end
anywhere; 8 prompts of 900 tokens with 8 samples each. The two take turns, and the best round of
each counts, in tokens that belong to a sample a second of CPU time.

    python -m experiments.race
"""

import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from eval import flag, run_script
from sampler import Sampler

STOP = range(128)       # random weights hit one of these 128 of 4,096 tokens in 32 steps or so
# prompts, their lengths from and to, samples of each, new tokens, stop tokens
CASES = {
    "1 row": (1, 32, 32, 1, 48, ()),
    "64 equal rows": (64, 32, 32, 1, 48, ()),
    "192 ragged prompts and ends": (192, 8, 48, 1, 128, STOP),
    "8 prompts of 900 tokens, n = 8": (8, 900, 900, 8, 24, ()),
}


def random_model():
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=4096, hidden_size=128, intermediate_size=384,
                         num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def random_prompts(count, shortest, longest):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(128, 4096, (length,), generator=g).tolist() for length in lengths]


def generated(model, prompts, n, new, stop, rows=64):
    """What `generate` samples in left-padded batches -> how many tokens belong to a sample."""
    jobs = [prompt for prompt in prompts for _ in range(n)]
    count = 0
    for i in range(0, len(jobs), rows):
        batch = jobs[i:i + rows]
        width = max(len(prompt) for prompt in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        real = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt):] = torch.tensor(prompt)
            real[row, width - len(prompt):] = 1
        out = model.generate(ids, attention_mask=real, max_new_tokens=new, do_sample=True,
                             temperature=1.0, top_k=0, top_p=1.0, eos_token_id=list(stop) or None)
        for row in out[:, width:].tolist():
            ends = [t + 1 for t, token in enumerate(row) if token in stop]
            count += ends[0] if ends else len(row)
    return count


def sampled(sampler, prompts, n, new, stop):
    samples = sampler(prompts, n, new, stop)
    return sum(len(sample.tokens) for sample in samples)


def main(flags):
    model = random_model()
    sampler = Sampler(model, rows=64, length=1024)
    print(f"{'tokens a second':32}{'generate':>10}{'sampler':>10}{'ratio':>8}")
    for name, (count, shortest, longest, n, new, stop) in CASES.items():
        prompts = random_prompts(count, shortest, longest)
        best = [0.0, 0.0]
        for _ in range(flags.rounds):
            for side, run in enumerate((generated, sampled)):
                start = time.process_time()
                tokens = run((model, sampler)[side], prompts, n, new, stop)
                best[side] = max(best[side], tokens / (time.process_time() - start))
        print(f"{name:32}{best[0]:10.0f}{best[1]:10.0f}{best[1] / best[0]:8.1f}", flush=True)


@dataclass
class Flags:
    rounds: int = flag(3, "of which the best counts", 1)


if __name__ == "__main__":
    run_script(main, Flags)
