"""Families that the sampler refuses can still be trained: their statistics and gradients are those
of every text alone, however a batch is padded and cut."""

import copy

import pytest
import torch
from conftest import small_model
from test_prefix_rft import sgd

import idft
from experiments.families import MORE, greedy, largest_difference, tiny_config, tiny_model

RECURRENT = ["mamba", "qwen3_next", "granitemoehybrid"]


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_model_is_refused_by_the_sampler_and_its_statistics_are_exact(kind):
    model = tiny_model(tiny_config(kind, MORE.get(kind, {})))
    assert "idft.py trains it where no --eval_data is asked for" in greedy(model)
    assert largest_difference(model, "right") < 1e-4


def test_a_recurrent_model_learns_the_same_from_any_micro_batches():
    model = tiny_model(tiny_config("mamba", {}))
    rows = [([5, 6], [7, 8, 9]), ([9], [4] * 12), ([7, 7, 7, 7, 7], [3, 5]), ([8], [6])]
    moved = []
    for micro_tokens in (1, 1000):
        other = copy.deepcopy(model)
        idft.supervised_step(other, sgd(other.parameters()), rows, 1.0,
                             idft.Flags(micro_tokens=micro_tokens))
        moved.append(torch.cat([(p - q).flatten() for p, q in
                                zip(model.parameters(), other.parameters())]))
    assert moved[0].norm() > 0 and torch.allclose(*moved, atol=1e-5)


def test_the_table_says_when_texts_differ(monkeypatch):
    model = small_model("qwen2", vocab_size=128)
    assert greedy(model) == "7 of 7 equal" and largest_difference(model, "left") < 1e-4
    import sampler
    monkeypatch.setattr(sampler.Slots, "advance", lambda self, B, ahead, *_: (
        [[5] * ahead] * B, [[0.0] * ahead] * B, [[0.0] * ahead] * B))
    assert greedy(model).startswith("0 of 7")
