"""The bridges: what leaves this repository must do there what it does here. What needs accelerate or trl skips without it."""

import ast
import copy
import importlib.util
import json
import math
import subprocess
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, word_problems
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import idft
from ddt import logp_entropy
from eval import load_model, prompt_ids
from prefix_rft import advantages, entropy_clip, policy_loss

CPU = torch.device("cpu")
HAVE_VERL = importlib.util.find_spec("verl") is not None
UNEQUAL = [problem | {"solution": problem["solution"] * (1 + i % 4)} for i, problem in enumerate(word_problems(8))]


@pytest.mark.parametrize("name", ["trainer", "trl_sft", "trl_grpo", "verl"])
def test_a_bridge_has_at_most_25_lines_of_code(name):
    text = (ROOT / "bridges" / f"{name}.py").read_text()
    tree = ast.parse(text)
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in prose and line.strip()[0] != "#"]
    assert 5 < len(code) <= 25


# ---- a step of plain gradient descent, lr 1: the change of the weights is the gradient

def sgd_arguments(kind, out, accumulation, **more):
    return kind(str(out), per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, max_steps=1,
                max_grad_norm=0.0, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", weight_decay=0.0, use_cpu=True,
                report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no", **more)


def change(before, after):
    return {name: (after.state_dict()[name] - p).float() for name, p in before.state_dict().items()}


def close(one, other):
    return all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-6) for name in one)


def own_change(model, tokenizer, loss, micro_tokens=16384):
    """What one step of idft.py changes: the yardstick."""
    ours = copy.deepcopy(model)
    rows = idft.training_rows(ours, tokenizer, UNEQUAL, 8192)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    idft.supervised_step(ours, optimizer, rows, 1.0, loss, clip=1e9, micro_tokens=micro_tokens)
    return change(model, ours)


@pytest.mark.parametrize("loss", ["sft", "idft"])
def test_trainer_takes_our_step_for_every_micro_batching(tiny_checkpoint, tmp_path, loss):
    pytest.importorskip("accelerate")
    from bridges.trainer import idft_trainer
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    ours = own_change(model, tokenizer, loss)
    assert max(c.abs().max() for c in ours.values()) > 1e-3
    for accumulation in (1, 4):
        theirs = copy.deepcopy(model)
        idft_trainer(theirs, tokenizer, UNEQUAL, sgd_arguments(TrainingArguments, tmp_path, accumulation), loss=loss).train()
        assert close(change(model, theirs), ours), accumulation

    # The step does depend on it if each micro-batch is divided by its own tokens, so the test above can fail.
    theirs = copy.deepcopy(model)
    trainer = idft_trainer(theirs, tokenizer, UNEQUAL, sgd_arguments(TrainingArguments, tmp_path, 4))
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: idft.compute_loss(outputs, labels, loss=loss) / 4
    trainer.train()
    assert not close(change(model, theirs), ours)


def test_two_processes_take_the_step_of_one(tiny_checkpoint, tmp_path):
    """The command lines of the bridges, on two CPU processes: their gradients are averaged, the result must be the same step."""
    pytest.importorskip("accelerate")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in UNEQUAL))
    flags = ["--max_steps", 1, "--max_grad_norm", 0, "--optim", "sgd", "--learning_rate", 1.0, "--lr_scheduler_type", "constant", "--use_cpu",
             "--report_to", "none", "--save_strategy", "no", "--ddp_backend", "gloo", "--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2]
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    ours = own_change(model, tokenizer, "idft")
    for name in ["trainer"] + ["trl_sft"] * (importlib.util.find_spec("trl") is not None):
        more = ["--bf16", "False", "--gradient_checkpointing", "False"] * (name == "trl_sft")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", f"bridges.{name}",
                   tiny_checkpoint, data, "--output_dir", tmp_path / name, *flags, *more]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True, timeout=300)
        trained, _ = load_model(str(tmp_path / name), CPU)
        assert close(change(model, trained), ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_trl_sft_takes_our_step(tiny_checkpoint, tmp_path, accumulation):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from bridges.trainer import examples
    from bridges.trl_sft import IDFTTrainer
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    rows = datasets.Dataset.from_list(examples(model, tokenizer, UNEQUAL))
    args = partial(sgd_arguments, trl.SFTConfig, tmp_path, accumulation, gradient_checkpointing=False, bf16=False)
    for loss in ("idft", "sft"):
        theirs = copy.deepcopy(model)
        IDFTTrainer(theirs, args(), train_dataset=rows, processing_class=tokenizer, weighting={"loss": loss}).train()
        assert close(change(model, theirs), own_change(model, tokenizer, loss))

    theirs = copy.deepcopy(model)                                        # plain SFTTrainer and our loss="sft" agree
    trl.SFTTrainer(theirs, args(), train_dataset=rows, processing_class=tokenizer).train()
    assert close(change(model, theirs), own_change(model, tokenizer, "sft"))

    theirs = copy.deepcopy(model)                                        # so does its own argument, as long as it takes one
    trl.SFTTrainer(theirs, args(), train_dataset=rows, processing_class=tokenizer, compute_loss_func=idft.compute_loss).train()
    assert close(change(model, theirs), own_change(model, tokenizer, "idft"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [True, False])
def test_trl_grpo_asks_our_reward(tiny_checkpoint, tmp_path, monkeypatch, template):
    trl = pytest.importorskip("trl")
    import bridges.trl_grpo as bridge
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    problems = word_problems(2)
    seen = []

    def spy(responses, answers):
        seen.append((responses, answers))
        return [float(i % 2) for i in range(len(responses))]

    monkeypatch.setattr(bridge, "rewards", spy)
    args = sgd_arguments(trl.GRPOConfig, tmp_path, 1, num_generations=4, max_completion_length=8, loss_type="dr_grpo", scale_rewards="none",
                         beta=0.0, bf16=False, gradient_checkpointing=False)
    before = copy.deepcopy(model)
    trainer = trl.GRPOTrainer(model, bridge.answer_reward, args, train_dataset=bridge.dataset(tokenizer, problems), processing_class=tokenizer)
    asked = []
    generate = type(trainer)._generate_single_turn
    monkeypatch.setattr(type(trainer), "_generate_single_turn", lambda self, ids, *rest: asked.extend(ids) or generate(self, ids, *rest))
    trainer.train()
    (responses, answers), = seen
    assert len(responses) == 8 and all(isinstance(text, str) for text in responses)
    assert sorted(answers) == sorted(4 * [p["answer"] for p in problems])
    assert {tuple(ids) for ids in asked} == {tuple(prompt_ids(tokenizer, p["problem"])) for p in problems}
    assert max(c.abs().max() for c in change(before, model).values()) > 0


def test_answers_in_texts_and_in_chats(monkeypatch):
    for name, members in {"trl": ("GRPOConfig", "GRPOTrainer"), "datasets": ("Dataset",)}.items():
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**dict.fromkeys(members)))
    from bridges.trl_grpo import answer_reward
    texts = ["so \\boxed{\\frac12}", "\\boxed{3}", "no box"]
    chats = [[{"role": "assistant", "content": text}] for text in texts] + [[{"role": "assistant", "content": None}]]
    assert answer_reward(completions=texts, answer=["0.5", "4", "1"], prompts=["?"] * 3, trainer_state=None) == [1.0, 0.0, 0.0]
    assert answer_reward(completions=chats, answer=["0.5", "4", "1", "2"]) == [1.0, 0.0, 0.0, 0.0]
    sys.modules.pop("bridges.trl_grpo")


# ---- verl: its two registries, as verl/trainer/ppo/core_algos.py has them

@pytest.fixture
def verl_bridge(monkeypatch):
    """bridges.verl, and what it put into the registries. The keywords of the calls below are those of verl 0.9.1."""
    if HAVE_VERL:
        core = importlib.import_module("verl.trainer.ppo.core_algos")
    else:
        core = types.ModuleType("verl.trainer.ppo.core_algos")
        core.ADV_ESTIMATOR_REGISTRY, core.POLICY_LOSS_REGISTRY = {}, {}
        core.register_adv_est = lambda name: lambda f: core.ADV_ESTIMATOR_REGISTRY.setdefault(name, f)
        core.register_policy_loss = lambda name: lambda f: core.POLICY_LOSS_REGISTRY.setdefault(name, f)
        for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", core)
    bridge = importlib.import_module("bridges.verl")
    yield core.ADV_ESTIMATOR_REGISTRY["prefix_rft"], core.POLICY_LOSS_REGISTRY["prefix_rft"], bridge
    if not HAVE_VERL:
        del sys.modules["bridges.verl"]


def a_batch(seed=0, G=3, N=4, T=10):
    """Rewards, masks and entropies of G groups of N responses, the last of each group hybrid, rows in random order."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, T + 1, (G * N,), generator=rng)
    mask = torch.arange(T) < lengths[:, None]
    hybrid = (torch.arange(G * N) % N == N - 1)
    prefix = (torch.arange(T) < (lengths // 2)[:, None]) & hybrid[:, None]
    reward = torch.randint(0, 2, (G * N,), generator=rng).float()
    return reward, hybrid, mask, prefix, torch.rand(G * N, T, generator=rng), torch.randperm(G * N, generator=rng)


def test_verl_advantage_is_ours(verl_bridge):
    estimate, _, _ = verl_bridge
    reward, hybrid, mask, prefix, entropy, order = a_batch()
    token_rewards = torch.zeros(mask.shape)
    token_rewards[torch.arange(len(mask)), mask.sum(1) - 1] = reward                      # verl puts the reward on the last token
    uid = np.array([f"prompt {i // 4}" for i in range(len(mask))], dtype=object)
    adv, _ = advantages(reward.view(3, 4), hybrid.view(3, 4))
    expected = entropy_clip(adv.view(-1, 1) * mask, prefix, entropy)
    result, returns = estimate(token_level_rewards=token_rewards[order], response_mask=mask[order].long(), index=uid[order], config=None,
                               prefix_mask=prefix[order].long(), entropy=entropy[order])
    assert torch.allclose(result, expected[order]) and torch.equal(result, returns)
    assert 0 < (result[prefix[order]] != 0).sum() <= math.ceil(0.2 * prefix.sum().item())
    plain, _ = estimate(token_level_rewards=token_rewards, response_mask=mask.long(), index=uid, config=None)
    assert torch.allclose(plain, adv.view(-1, 1) * mask)                                  # what verl hands over unasked: Dr.GRPO


def test_verl_advantage_of_groups_of_different_sizes(verl_bridge):
    estimate, _, _ = verl_bridge
    rewards, uid = torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0]]), np.array(list("aabbb"), dtype=object)
    adv, _ = estimate(token_level_rewards=rewards, response_mask=torch.ones(5, 1, dtype=torch.long), index=uid)
    assert torch.allclose(adv[:, 0], torch.tensor([1 / 2, -1 / 2, 2 / 3, -1 / 3, -1 / 3]))


def test_verl_loss_is_ours_on_any_number_of_gpus(verl_bridge):
    _, loss_of, _ = verl_bridge
    reward, _, mask, _, _, _ = a_batch()
    rng = torch.Generator().manual_seed(1)
    old, adv = -torch.rand(mask.shape, generator=rng), torch.randn(mask.shape, generator=rng)
    logp = (old + 0.5 * torch.randn(mask.shape, generator=rng)).requires_grad_()
    ours, metrics = policy_loss(logp, old, adv, mask, 12 * 48, clip=0.2)
    gradient, = torch.autograd.grad(ours, logp)
    assert metrics["clip_share"] > 0
    for gpus, part in ((1, 12), (1, 5), (2, 6), (4, 3)):                                 # each GPU sees some rows, the gradients are averaged
        config = types.SimpleNamespace(clip_ratio=0.2, loss_scale_factor=48, global_batch_info={
            "dp_size": gpus, "batch_num_tokens": int(mask.sum()), "global_batch_size": 12, "loss_scale_factor": 48})
        total = 0
        for rows in torch.arange(12).split(part):
            loss, found = loss_of(old_log_prob=old[rows], log_prob=logp[rows], advantages=adv[rows], response_mask=mask[rows],
                                  loss_agg_mode="seq-mean-token-sum-norm", config=config, rollout_is_weights=None)
            assert all(isinstance(value, float) for value in found.values())
            total = total + loss / gpus
        assert torch.allclose(torch.autograd.grad(total, logp)[0], gradient, atol=1e-7)
    halved, _ = loss_of(old_log_prob=old, log_prob=logp, advantages=adv, response_mask=mask, loss_agg_mode="", config=types.SimpleNamespace(
        clip_ratio=0.2, loss_scale_factor=48, global_batch_info={"dp_size": 1, "global_batch_size": 12}), rollout_is_weights=0.5 * torch.ones(12, 10))
    assert torch.allclose(halved, 0.5 * ours)


def test_verl_reward(verl_bridge):
    compute_score = verl_bridge[2].compute_score
    assert compute_score(data_source="gsm8k", solution_str="\\boxed{1,000}", ground_truth="1000", extra_info={"split": "train"}) == 1.0
    assert compute_score(data_source="gsm8k", solution_str="1000", ground_truth="1000") == 0.0


# ---- checkpoints

def test_a_checkpoint_loads_in_the_auto_classes(tiny_checkpoint, tmp_path):
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    rows = idft.training_rows(model, tokenizer, UNEQUAL[:2], 8192)
    optimizer = idft.new_optimizer(model)
    idft.supervised_step(model, optimizer, rows, 1e-2)
    idft.save_checkpoint(tmp_path, model, tokenizer, optimizer, {"step": 1})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    text = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    chat = [{"role": "user", "content": "1 + 1?"}]
    assert text.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert text("Ada has 3 coins.").input_ids == tokenizer("Ada has 3 coins.").input_ids
    ids = torch.tensor([rows[0][0]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    logp, _ = logp_entropy(again(ids).logits[:, :-1], ids[:, 1:])
    assert logp.isfinite().all() and again.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
