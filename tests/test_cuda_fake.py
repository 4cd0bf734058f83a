"""The sampler and the training step on a GPU that is not there: torch built for CUDA runs them with
fake tensors, which have a shape, a type and a device, but no values. So a tensor on the wrong device
raises, and whatever waits for a value is counted."""

import contextlib
import copy

import pytest
import torch
from test_prefix_rft import sgd
from test_sampler import ARCHITECTURES, blend, ragged
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, GenerationConfig

import idft
import sampler as sampler_module
from sampler import Sample, Slots, attention, draw

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs torch built for CUDA")
TEXTS = ragged((9, 3, 9))
HALF = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


@pytest.fixture
def waits(monkeypatch):
    """Fake tensors from here on; the list of all that a host waited for."""
    waits = []

    def waiting(name, answer):
        def wait(self, *args):
            if self.is_cuda:
                waits.append(name)
            return answer(self)
        return wait

    for name, answer in {"item": 17, "__bool__": True, "__int__": 17, "__float__": 1.0}.items():
        monkeypatch.setattr(torch.Tensor, name, waiting(name, lambda x, answer=answer: answer))
    monkeypatch.setattr(FakeTensor, "tolist", waiting("tolist", lambda x: []))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield waits


def fake_model(name, dtype=torch.bfloat16, **shape):
    config = copy.deepcopy(ARCHITECTURES[name])
    for key, value in shape.items():
        setattr(config, key, value)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def filled(model, streams=1):
    """Three slots of four, filled."""
    slots = Slots(model, 4, streams, 40)
    samples = [Sample(texts=(tuple(text),) * streams, budget=20) for text in TEXTS]
    slots.fill([], samples, seed=0)
    return slots, samples


@pytest.mark.parametrize("name, flash", [
    ("qwen3", True), ("qwen3", False), ("gemma3 window", True), ("gemma2 window, caps", False),
    ("gpt_oss window, sinks", False)])
def test_everything_is_on_the_device_and_no_token_waits(name, flash, waits, monkeypatch):
    if not flash:
        monkeypatch.setattr(sampler_module, "flash_fits", lambda q, k, v: False)
    monkeypatch.setattr(sampler_module, "replay", Slots.forward)        # nothing to capture
    model = fake_model(name, **HALF)
    with attention(model, "slab"):
        slots, busy = filled(model)
        assert set(slots.flash.values()) == {flash}
        assert {x.device.type for x in (*slots.fields, *slots.keys.values())} == {"cuda"}
        for how in ((1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (1.0, 0, 0.9)):
            counts = []
            for ahead in (2, 6):
                waits.clear()
                slots.advance(3, ahead, how, None)
                counts.append(len(waits))
            assert counts[0] == counts[1]               # per look, not per token
        busy[0].done = True
        slots.close_ranks(busy)
        assert len(busy) == 2


def test_two_streams(waits, monkeypatch):
    monkeypatch.setattr(sampler_module, "replay", Slots.forward)
    model = fake_model("qwen3", **HALF)
    with attention(model, "slab"):
        slots, _ = filled(model, streams=2)
        counts = []
        for ahead in (2, 6):
            waits.clear()
            slots.advance(3, ahead, (1.0, 0, 1.0), blend)
            counts.append(len(waits))
    assert counts[0] == counts[1]


def test_the_number_of_transfers_does_not_grow_with_the_samples(waits, monkeypatch):
    """What goes to the device in `fill`: tokens and positions, random numbers, texts, their rows."""
    model, made, tensor = fake_model("qwen3", **HALF), [], torch.tensor

    def counting(*args, **kwargs):
        made.append("device" in kwargs)
        return tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", counting)
    counts = []
    with attention(model, "slab"):
        for number in (2, 12):
            made.clear()
            slots = Slots(model, 12, 1, 40)
            samples = [Sample(texts=((5, 6, 7 + i),), budget=9) for i in range(number)]
            slots.fill([], samples, seed=0)
            counts.append(sum(made))
    assert counts == [2, 2]


def test_a_tensor_on_the_wrong_device_and_a_wait_would_show(waits):
    with torch.device("cuda"):
        logits, u = torch.zeros(3, 50), torch.zeros(3)
    draw(logits, u, 1.0)
    with pytest.raises(RuntimeError, match="device"):
        draw(logits, u.cpu(), 1.0)
    before = len(waits)
    if logits.sum() > 0:
        logits.max().item()
    assert len(waits) == before + 2


def test_a_micro_batch_of_a_training_step_waits_once(waits, monkeypatch):
    """The forward pass with recomputed activations, and the step: fake tensors have no backward
    pass, nor autocast, without a card. All rows are as long, so that a mask selects everything,
    since nobody knows what it selects of fake tensors."""
    plain = torch.Tensor.__getitem__

    def select_all(self, index):
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
            return self.flatten(0, index.dim() - 1)
        return plain(self, index)

    monkeypatch.setattr(torch.Tensor, "__getitem__", select_all)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    counts = []
    for copies in (1, 3):
        model = fake_model("qwen3", torch.float32, **HALF)
        idft.checkpoint_activations(model)
        rows = [([5], [6, 7, 8, 9, 10])] * 4 * copies
        waits.clear()
        idft.supervised_step(model, sgd(model.parameters()), rows, 1e-3,
                             idft.Flags(micro_tokens=24))
        counts.append(len(waits))
    # What is logged, once a step; and for every micro-batch, whether it is padded on the left.
    assert counts[1] - counts[0] == 2
