"""A pretrained language model: what the toy shows holds of it, and every script takes a step on it.
Skipped unless the environment variable SMOLLM2 names a checkpoint, as smollm2.py makes one; the
comparison that experiments/language.py makes with it is tested without."""

import copy
import json
import os
import re
import shutil

import pytest
import torch

import ddt
import eval as evaluation
import hinted_decode
import idft
import prefix_rft
from conftest import run_here, word_problems                            # puts the root on the path
from ddt import all_stats, cll, response_stats
from eval import load_model, new_sampler, prompt_ids, stop_ids
from experiments import language
from reward import reward
from sampler import Sampler

CHECKPOINT = os.environ.get("SMOLLM2", "")
on_smollm2 = pytest.mark.skipif(not os.path.isdir(CHECKPOINT),
                                reason="the variable SMOLLM2 names no checkpoint")


@pytest.fixture(scope="module")
def smollm2():
    return load_model(CHECKPOINT, torch.device("cpu"))


@on_smollm2
@torch.no_grad()
def test_greedy_texts_are_those_of_a_plain_loop(smollm2):
    """Ragged prompts side by side, cached, against one text at a time that is read anew for every
    token."""
    model, tokenizer = smollm2
    prompts = [prompt_ids(tokenizer, row["problem"]) for row in word_problems(3)]
    sampler, room = new_sampler(model, prompts, 16)
    samples = sampler(prompts, 1, room, stop_ids(model, tokenizer), temperature=0)
    for prompt, sample in zip(prompts, samples):
        ids = list(prompt)
        for token in sample.tokens:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert sample.tokens == ids[len(prompt):]


@on_smollm2
@torch.no_grad()
def test_phi_is_zero_on_average_in_own_text_and_lower_in_hotter(smollm2):
    """The sum of phi is a martingale of variance sum V: within four of its standard errors of 0."""
    model, tokenizer = smollm2
    prompts = [prompt_ids(tokenizer, row["problem"]) for row in word_problems(32)]
    stop = stop_ids(model, tokenizer)
    sampler, _ = new_sampler(model, prompts, 40)
    samples = sampler(prompts, 1, 40, stop, seed=0)
    rows = [(prompt, sample.tokens) for prompt, sample in zip(prompts, samples)]
    logp, entropy, variance = response_stats(model, rows, stats=all_stats)

    # What the sampler says of its tokens is what a plain reading says.
    sampled = torch.tensor([value for sample in samples for value in sample.logp])
    torch.testing.assert_close(logp, sampled, atol=2e-3, rtol=0)
    phi = cll(logp, entropy)
    assert len(phi) > 1000
    assert phi.sum().abs() <= 4 * variance.sum().sqrt()
    # And it spreads as the theory says, to a quarter.
    assert 0.75 < (phi ** 2).sum() / variance.sum() < 1.25

    samples = sampler(prompts[:8], 1, 24, stop, temperature=1.5)
    rows = [(prompt, sample.tokens) for prompt, sample in zip(prompts, samples)]
    logp, entropy, variance = response_stats(model, rows, stats=all_stats)
    assert cll(logp, entropy).sum() < -4 * variance.sum().sqrt()


@on_smollm2
@torch.no_grad()
def test_hinted_decoding_of_two_problems(smollm2):
    """Batched and cached, greedy, it is the ten-line loop."""
    model, tokenizer = smollm2
    problems = word_problems(2)
    pairs = [hinted_decode.contexts(tokenizer, row) for row in problems]
    sampler, room = new_sampler(model, pairs, 8, streams=2)
    size = model.get_input_embeddings().num_embeddings
    table = hinted_decode.marker_table(tokenizer, size)
    stop = stop_ids(model, tokenizer)
    samples = sampler(pairs, 1, room, stop, temperature=0,
                      combine=hinted_decode.hinted_combine(table, 0.5))
    for (hinted, plain), sample in zip(pairs, samples):
        alone = hinted_decode.uncached(model, tokenizer, hinted, plain, 0.5, 8, stop)
        assert sample.tokens == alone


@on_smollm2
def test_every_script_takes_a_step(tmp_path, capsys, monkeypatch):
    """Measured, trained, trained further, evaluated: each goes on from what the one before left."""
    monkeypatch.chdir(tmp_path)
    with open("data.jsonl", "w") as file:
        for row in word_problems(2):
            file.write(json.dumps(row) + "\n")
    data = ["--data", "data.jsonl"]
    trained = ["--eval_data", "", "--steps", 1]

    run_here(ddt, "--model", CHECKPOINT, *data, "--max_new_tokens", 16)
    assert "demonstrations" in capsys.readouterr().out
    run_here(hinted_decode, "--model", CHECKPOINT, *data, "--no_analysis", "--max_new_tokens", 24)
    assert "2 problems" in capsys.readouterr().out
    run_here(idft, "--model", CHECKPOINT, *data, *trained, "--batch", 2)
    run_here(prefix_rft, "--model", "runs/idft/checkpoint", *data, *trained, "--batch", 1,
             "--mini_batches", 1, "--n", 2, "--max_new_tokens", 64)
    shutil.rmtree("runs/idft")                                             # 1.6 GB
    run_here(evaluation, "--model", "runs/prefix_rft/checkpoint", *data, "--max_new_tokens", 24)
    shutil.rmtree("runs/prefix_rft")
    assert "data" in capsys.readouterr().out


# ---- the comparison in language -----------------------------------------------------------------

def test_the_answer_follows_from_the_facts_and_cannot_be_read_off():
    """Walked anew from the words of the problem, in either voice; and the circle has no end at
    which somebody could be recognised."""
    for voice in ("expert", "foreign"):
        for problem in language.new_problems("hard", 20, 0, voice):
            facts, question = problem["problem"][1]["content"].split("\n")
            tells = dict(fact.split(" tells ") for fact in facts[:-1].split(". "))
            assert sorted(tells) == sorted(tells.values())
            person = question.split()[0]
            walked = [person]
            for _ in range(language.HOPS["hard"]):
                walked.append(tells[walked[-1]])
            assert problem["answer"] == walked[-1]
            words = re.findall("[A-Z][a-z]+", problem["solution"])
            pairs = list(zip(walked, walked[1:]))
            told = list(zip(words[0:4:2], words[1:4:2]))
            assert told == (pairs if voice == "expert" else [(b, a) for a, b in pairs])
            assert reward(problem["solution"], problem["answer"]) == 1.0


def test_demonstrations_are_retold_at_the_beta_of_the_arm(tiny_checkpoint, monkeypatch):
    model, tokenizer = load_model(tiny_checkpoint, torch.device("cpu"))
    seen, mix = [], hinted_decode.hinted_combine
    monkeypatch.setattr(hinted_decode, "hinted_combine",
                        lambda table, beta, gate: seen.append(beta) or mix(table, beta, gate))
    problems = language.new_problems("hard", 3, 0, "foreign")
    assert language.retell(model, tokenizer, problems, 0.0, seed=0) == []      # a random model
    monkeypatch.setattr(hinted_decode, "kept", lambda rows: rows)
    rows = language.retell(model, tokenizer, problems, 3.0, seed=0)
    assert seen == [0.0, 3.0]
    assert [row["problem"] for row in rows] == [problem["problem"] for problem in problems]
    assert all(row["source"] == "hinted" for row in rows)


def test_every_arm_learns_from_as_many_sequences_in_as_many_steps(tiny_checkpoint, monkeypatch):
    base, tokenizer = load_model(tiny_checkpoint, torch.device("cpu"))
    monkeypatch.setattr(language, "MAX_NEW_TOKENS", 64)        # this tokenizer spells more
    monkeypatch.setattr(language, "retell", lambda model, tokenizer, problems, beta, seed: problems)
    for name, arm in language.ARMS.items():
        if name == "base":
            continue
        arm = {**language.COMMON, "steps": 2, "batch": 2, "n": 2, **arm}
        model = copy.deepcopy(base)
        sampler = Sampler(model, 64, 512, dtype=torch.bfloat16)
        spent = language.train(model, tokenizer, sampler, arm, 1e-2, seed=0)
        assert spent["sequences"] == 8
        # A batch of rollouts that are all wrong, as here, teaches nothing: no step.
        supervised = arm.get("supervised", 0)
        assert spent["optimizer_steps"] >= 4 * supervised
        if arm.get("supervised") == 1:
            changed = [not torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters())]
            assert all(changed), name
