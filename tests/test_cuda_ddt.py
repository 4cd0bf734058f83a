"""token_stats on a GPU: the same numbers as the plain forward, at a fraction of its memory."""
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddt  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def build(vocab_size, hidden_size=64, layers=2):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2)).cuda()


@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_equal_the_plain_forward(autocast, monkeypatch):
    model = build(1000)
    monkeypatch.setattr(ddt, "CHUNK", {"cuda": 1000 * 7})
    ids = torch.randint(1000, (3, 40), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids, dtype=torch.bool)

    def values_and_gradients(stats):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logp, entropy = stats()
        assert logp.dtype == entropy.dtype == torch.float32
        (logp.sum() + (entropy ** 2).sum()).backward()
        return [logp, entropy, *(p.grad for p in model.parameters())]

    ours = values_and_gradients(lambda: ddt.token_stats(model, ids, mask))
    textbook = values_and_gradients(lambda: ddt.logp_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:]))
    for a, b in zip(ours, textbook):
        assert (a - b).norm() <= (2e-2 if autocast else 1e-4) * b.norm()


def test_memory_at_the_vocabulary_of_qwen():
    """8,192 tokens, vocabulary 151,936: one copy of the logits is 5 GB, and the plain way needs several."""
    model = build(151_936, hidden_size=256)
    ids = torch.randint(1000, (4, 2049), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids, dtype=torch.bool)

    def peak(stats):
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            logp, entropy = stats()
        (logp + entropy).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    ours = peak(lambda: ddt.token_stats(model, ids, mask))
    print(f"peak above the weights: {ours / 2 ** 30:.2f} GiB")
    assert ours < 2 * 2 ** 30
    if torch.cuda.mem_get_info()[0] > 40 * 2 ** 30:
        textbook = peak(lambda: ddt.logp_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:]))
        print(f"the plain way: {textbook / 2 ** 30:.2f} GiB")
        assert ours < textbook / 5
