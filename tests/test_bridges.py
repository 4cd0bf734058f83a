"""The bridges: what leaves this repository must do there what it does here. What needs accelerate,
trl or verl is skipped where it is not installed."""

import ast
import copy
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, word_problems
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import idft
import prefix_rft
import toy
from bridges import check
from bridges.check import printed
from ddt import response_stats
from eval import demo_ids, load_model, load_problems, prompt_ids, stop_ids
from sampler import Sampler

CPU = torch.device("cpu")
N, ROOM = 4, 100                        # rollouts of a problem, longest response

# Solutions of very unequal length; and problems with two solutions, with none, with one too long.
UNEQUAL = []
for i, problem in enumerate(word_problems(8)):
    UNEQUAL.append(problem | {"solution": problem["solution"] * (1 + i % 4)})
PROBLEMS = word_problems(12)
PROBLEMS[3]["solution"] = [PROBLEMS[3]["solution"], "It is \\boxed{3}."]
PROBLEMS[5]["solution"] = None
PROBLEMS[7]["solution"] = PROBLEMS[7]["solution"] * 4


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


needs_trainer = needs("accelerate")
needs_trl = needs("trl", "datasets", "accelerate")
needs_verl = needs("verl", "transfer_queue", "ray", "tensordict")


def test_prefix_rft_in_trl_has_at_most_60_lines_of_code():
    text = (ROOT / "bridges" / "trl_prefix_rft.py").read_text()
    prose = set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and number not in prose and not line.strip().startswith("#"):
            code.append(line)
    assert 20 < len(code) <= 60


# ---- one step of plain gradient descent, lr 1: the change of the weights is the gradient ---------

def sgd(kind, out, **more):
    return kind(str(out), max_steps=1, optim="sgd", learning_rate=1.0,
                lr_scheduler_type="constant", weight_decay=0.0, use_cpu=True, report_to="none",
                save_strategy="no", disable_tqdm=True, logging_strategy="no", **more)


def trl_sgd(kind, out, **more):
    return sgd(kind, out, bf16=False, gradient_checkpointing=False, **more)


def distance(one, other):
    weights = other.state_dict()
    return max((p - weights[name]).abs().max().item() for name, p in one.state_dict().items())


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- IDFT ---------------------------------------------------------------------------------------

def own_idft_step(model, tokenizer, loss):
    """The yardstick: a copy of the model after one step of idft.py."""
    ours = copy.deepcopy(model)
    rows = idft.demonstration_rows(ours, tokenizer, UNEQUAL, 8192)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    idft.supervised_step(ours, optimizer, rows, 1.0, idft.Flags(loss=loss))
    return ours


@needs_trainer
@pytest.mark.parametrize("loss", ["sft", "idft"])
def test_trainer_takes_our_step_for_every_micro_batching(tiny_checkpoint, tmp_path, loss):
    from bridges.trainer import idft_trainer
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    ours = own_idft_step(model, tokenizer, loss)
    assert distance(model, ours) > 1e-3
    for accumulation in (1, 4):
        args = sgd(TrainingArguments, tmp_path, per_device_train_batch_size=8 // accumulation,
                   gradient_accumulation_steps=accumulation)
        theirs = copy.deepcopy(model)
        idft_trainer(theirs, tokenizer, UNEQUAL, args, loss=loss).train()
        assert distance(theirs, ours) < 1e-6

    # Divided by the tokens of each micro-batch it is another step: the test above can fail.
    theirs = copy.deepcopy(model)
    trainer = idft_trainer(theirs, tokenizer, UNEQUAL, args)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: (
        idft.compute_loss(outputs, labels, loss=loss) / 4)
    trainer.train()
    assert distance(theirs, ours) > 2e-5


@needs_trainer
def test_trainer_goes_on_from_a_checkpoint(tiny_checkpoint, tmp_path):
    from bridges import trainer
    weights = []
    for name, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-1")):
        model, tokenizer = load_model(tiny_checkpoint, CPU)
        args = TrainingArguments(
            str(tmp_path / name), max_steps=2, save_steps=1, learning_rate=1e-2, use_cpu=True,
            per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
            resume_from_checkpoint=checkpoint and str(checkpoint))
        trainer.main(model, tokenizer, UNEQUAL, args)
        weights.append(model)
    assert not (tmp_path / "resumed" / "checkpoint-1").exists()
    assert distance(*weights) == 0 and distance(weights[0], load_model(tiny_checkpoint, CPU)[0]) > 0


@needs_trl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_trl_sft_takes_our_step(tiny_checkpoint, tmp_path, accumulation):
    import datasets
    import trl
    from bridges.trainer import examples
    from bridges.trl_sft import IDFTTrainer
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    rows = datasets.Dataset.from_list(examples(model, tokenizer, UNEQUAL))

    def step(Trainer, **more):
        args = trl_sgd(trl.SFTConfig, tmp_path, per_device_train_batch_size=8 // accumulation,
                       gradient_accumulation_steps=accumulation)
        theirs = copy.deepcopy(model)
        Trainer(theirs, args, train_dataset=rows, processing_class=tokenizer, **more).train()
        return theirs

    for loss in ("idft", "sft"):
        theirs = step(IDFTTrainer, weighting={"loss": loss})
        assert distance(theirs, own_idft_step(model, tokenizer, loss)) < 1e-6
    # plain SFTTrainer and our loss="sft" agree
    assert distance(step(trl.SFTTrainer), own_idft_step(model, tokenizer, "sft")) < 1e-6


# ---- reinforcement learning in TRL --------------------------------------------------------------

def parity(ids):
    """A reward that every response has for certain, and about half of them earn."""
    return float(sum(ids) % 2)


def write(rng, eos):
    """A response by a random hand; some end, some do not, some are too long behind a prefix."""
    ids = rng.integers(5, 200, rng.integers(2, ROOM)).tolist()
    return ids + [eos] if rng.random() < 0.7 else ids


class StandIn:
    """What GRPOTrainer asks of its vLLM: responses, and their log-probabilities."""

    def __init__(self, trainer, rng):
        self.trainer, self.rng, self.asked = trainer, rng, []

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        assert num_generations == 1
        self.asked += prompts
        written = [write(self.rng, self.trainer._tokenizer.eos_token_id) for _ in prompts]
        logps = []
        for prompt, ids in zip(prompts, written):
            with torch.no_grad():
                logp, _ = response_stats(self.trainer.model, [(prompt, ids)])
            logps.append([[value] for value in logp.tolist()])
        return None, written, logps, None


def trl_step(checkpoint, out, name="PrefixRFTTrainer", generator="hand", **settings):
    """One step of a trainer of ours in TRL. Every process leaves its rollouts in `out`."""
    import bridges.trl_prefix_rft as bridge
    model, tokenizer = load_model(checkpoint, CPU)
    args = trl_sgd(bridge.PrefixRFTConfig, out, num_generations=N, max_completion_length=ROOM,
                   loss_type="dr_grpo", scale_rewards="none", beta=0.0,
                   vllm_importance_sampling_mode="token_truncate", **settings)
    prepared = prefix_rft.prepare_problems(tokenizer, PROBLEMS, ROOM)
    rows = bridge.dataset(tokenizer, PROBLEMS)
    rows = rows.add_column("demos", [problem["demos"] for problem in prepared])
    rollouts = []

    def reward(prompts, completion_ids, **_):
        prefixes = getattr(trainer, "prefixes", [[]] * len(prompts))
        for prompt, ids, prefix in zip(prompts, completion_ids, prefixes):
            rollouts.append({"prompt": prompt_ids(tokenizer, prompt), "ids": ids, "prefix": prefix})
        return [parity(ids) for ids in completion_ids]

    trainer = getattr(bridge, name)(model, reward, args, train_dataset=rows,
                                    processing_class=tokenizer)
    rank = trainer.accelerator.process_index
    rng = np.random.default_rng(rank)
    eos = tokenizer.eos_token_id
    if generator == "hand":
        from trl import GRPOTrainer
        plain = GRPOTrainer._generate_single_turn
        GRPOTrainer._generate_single_turn = lambda self, prompts, *rest: (
            [write(rng, eos)[:ROOM] for _ in prompts], None)
    if generator == "vllm":
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = StandIn(trainer, rng)
    try:
        trainer.train()
    finally:
        if generator == "hand":
            GRPOTrainer._generate_single_turn = plain
    Path(out, f"rollouts{rank}.json").write_text(json.dumps(rollouts))
    if rank == 0:
        trainer.save_model()
    return trainer


def own_step(checkpoint, out, **flags):
    """One step of prefix_rft.update on the rollouts in `out` -> model, metrics, rollouts."""
    model, tokenizer = load_model(checkpoint, CPU)
    rollouts = []
    for path in sorted(Path(out).glob("rollouts*.json")):
        for row in json.loads(path.read_text()):
            finished = row["ids"][-1] == tokenizer.eos_token_id
            L = len(row["prefix"])
            assert row["ids"][:L] == row["prefix"]
            rollouts.append(prefix_rft.Rollout(
                row["prompt"], row["ids"], "", prefix_length=L, demo_length=L, finished=finished,
                reward=parity(row["ids"]) * finished))
    flags = prefix_rft.Flags(n=N, mini_batches=1, lr=1.0, max_new_tokens=ROOM, **flags)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = prefix_rft.update(model, optimizer, rollouts, flags)
    return model, metrics, rollouts


def assert_equal_steps(checkpoint, out):
    """TRL's step is ours; a step that keeps the whole prefix is not, so the test can fail."""
    before, tokenizer = load_model(checkpoint, CPU)
    theirs, _ = load_model(str(out), CPU)
    ours, metrics, rollouts = own_step(checkpoint, out)
    control, all_kept, _ = own_step(checkpoint, out, prefix_loss="all")
    print(f"moved {distance(before, ours):.1e}, differ {distance(theirs, ours):.1e}, "
          f"control {distance(theirs, control):.1e}, kept {metrics['prefix_kept']}")
    assert distance(before, ours) > 3e-3
    assert distance(theirs, ours) < 1e-6
    assert distance(theirs, control) > 3e-4
    assert 0 < metrics["prefix_kept"] < all_kept["prefix_kept"]

    # The rollouts have what the step is about: whole groups, prefixes on the last of each,
    # unfinished responses, responses cut at the budget.
    assert len(rollouts) == 3 * N
    for i, rollout in enumerate(rollouts):
        assert rollout.prompt == rollouts[i // N * N].prompt
        assert (rollout.prefix_length > 0) <= (i % N == N - 1)
        assert len(rollout.response) <= ROOM
    assert {rollout.finished for rollout in rollouts} == {True, False}
    return rollouts


@needs_trl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("generator, accumulation", [("hand", 1), ("hand", 4), ("vllm", 3),
                                                     ("model", 2)])
def test_trl_takes_our_step_with_prefixes(tiny_checkpoint, tmp_path, generator, accumulation):
    trainer = trl_step(tiny_checkpoint, tmp_path, generator=generator,
                       per_device_train_batch_size=12 // accumulation,
                       gradient_accumulation_steps=accumulation)
    rollouts = assert_equal_steps(tiny_checkpoint, tmp_path)
    if generator == "vllm":             # it went on from the prefixes
        starts = [r.prompt + r.response[:r.prefix_length] for r in rollouts]
        assert trainer.vllm_generation.asked == starts


@needs_trl
def test_two_processes_take_our_step(tiny_checkpoint, tmp_path):
    """Six rollouts in each, so the second group of four straddles them; two micro-batches."""
    torchrun(__file__, tiny_checkpoint, tmp_path)
    rollouts = assert_equal_steps(tiny_checkpoint, tmp_path)
    assert rollouts[4].prompt == rollouts[7].prompt


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_trl_grpo_takes_the_step_of_method_rft(tiny_checkpoint, tmp_path):
    trl_step(tiny_checkpoint, tmp_path, name="RFTTrainer", per_device_train_batch_size=4,
             gradient_accumulation_steps=3)
    theirs, _ = load_model(str(tmp_path), CPU)
    ours, _, rollouts = own_step(tiny_checkpoint, tmp_path, **prefix_rft.METHODS["rft"])
    before, _ = load_model(tiny_checkpoint, CPU)
    assert distance(before, ours) > 3e-3
    assert distance(theirs, ours) < 1e-6

    # That an unfinished response earns nothing matters here.
    assert any(not r.finished and parity(r.response) for r in rollouts)


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_prefixes_depend_on_the_place_and_the_step_and_are_for_training(tiny_checkpoint, tmp_path):
    trainer = trl_step(tiny_checkpoint, tmp_path, per_device_train_batch_size=12)
    demos = [list(range(100, 160)), list(range(200, 230))]
    rows = [{"demos": demos} for _ in range(12)] + [{"demos": []} for _ in range(12)]
    trainer.model.train()
    one = trainer.draw_prefixes(rows)
    assert one == trainer.draw_prefixes(rows)
    for i, prefix in enumerate(one):
        assert bool(prefix) == (i < 12 and i % N == N - 1)
        assert not prefix or any(prefix == demo[:len(prefix)] for demo in demos)
    assert len({len(prefix) for prefix in one}) > 2
    trainer.state.global_step += 1
    assert one != trainer.draw_prefixes(rows)

    # in evaluation there are none, and responses are scored all the same
    trainer.model.eval()
    assert trainer.draw_prefixes(rows) == [[]] * 24
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * N)
    assert batch["advantages"].shape == batch["completion_ids"].shape


@needs_trl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [True, False])
def test_trl_grpo_reads_our_prompts_and_asks_our_reward(tiny_checkpoint, tmp_path, monkeypatch,
                                                        template):
    import trl

    import bridges.trl_grpo as bridge
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    if not template:
        tokenizer.chat_template = None
    problems = word_problems(2)
    problems[1]["problem"] = [{"role": "user", "content": problems[1]["problem"]}]
    seen, asked = [], []

    def spy(responses, answers):
        seen.append((responses, answers))
        return [0.0] * len(responses)

    class Spy(bridge.RFTTrainer):
        def _generate_single_turn(self, ids, *rest):
            asked.extend(ids)
            return super()._generate_single_turn(ids, *rest)

    monkeypatch.setattr(bridge, "rewards", spy)
    args = trl_sgd(trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=8)
    bridge.train(Spy, model, tokenizer, bridge.dataset(tokenizer, problems), args)
    (responses, answers), = seen
    assert len(responses) == 8 and all(isinstance(text, str) for text in responses)
    assert sorted(answers) == sorted(4 * [problem["answer"] for problem in problems])
    expected = {tuple(prompt_ids(tokenizer, problem["problem"])) for problem in problems}
    assert {tuple(ids) for ids in asked} == expected


@needs_trl
def test_answers_in_texts_and_in_chats():
    from bridges.trl_grpo import answer_reward
    texts = ["so \\boxed{\\frac12}", "\\boxed{3}", "no box"]
    chats = [[{"role": "assistant", "content": text}] for text in [*texts, None]]
    assert answer_reward(texts, answer=["0.5", "4", "1"], prompts=["?"] * 3) == [1.0, 0.0, 0.0]
    assert answer_reward(completions=chats, answer=["0.5", "4", "1", "2"]) == [1.0, 0.0, 0.0, 0.0]


# ---- the printed lines --------------------------------------------------------------------------

# What a CPU without vLLM needs; sizes.
CPU_FLAGS = ["--use_cpu", "--ddp_backend", "gloo", "--bf16", "False", "--report_to", "none",
             "--gradient_checkpointing", "False"]
SMALLER = {"--nproc_per_node": "2", "--max_steps": "2", "--per_device_train_batch_size": "2",
           "--gradient_accumulation_steps": "2", "--steps_per_generation": "4",
           "--max_completion_length": "24"}
VLLM = ["--use_vllm", "--vllm_mode", "--vllm_importance_sampling_mode"]


def smaller(words, checkpoint, data, out):
    """A printed line with a checkpoint on disk for the Hub id, CPU flags, and smaller sizes."""
    words = list(words)
    for i, word in enumerate(words):
        if word in SMALLER:
            words[i + 1] = SMALLER[word]
        if word == "--output_dir":
            words[i + 1] = str(out)
        if word.startswith("Qwen/"):
            words[i:i + 2] = [str(checkpoint), str(data)]
    for name in VLLM:
        if name in words:
            i = words.index(name)
            del words[i:i + (1 if name == "--use_vllm" else 2)]
    steps = [] if "--max_steps" in words else ["--max_steps", "2"]
    flags = CPU_FLAGS if words[0] == "torchrun" else CPU_FLAGS[:1] + CPU_FLAGS[3:7]
    return words + steps + flags


def run_printed(words):
    command = [sys.executable] + words[1:]
    if words[0] == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"] + words[1:]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """A file with rows as GSM8K has them."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    with open(path, "w") as file:
        for problem in word_problems(40):
            answer = f"{problem['solution']}\n#### {problem['answer']}"
            file.write(json.dumps({"question": problem["problem"], "answer": answer}) + "\n")
    return path


@needs_trl
def test_the_printed_lines_run(tiny_checkpoint, gsm8k, tmp_path):
    """All of them; Prefix-RFT from the checkpoint that IDFT left, as the text proposes."""
    lines = printed("python -m bridges.trainer") + printed("torchrun")
    names = [re.search(r"bridges\.(\w+)", " ".join(line))[1] for line in lines]
    assert names == ["trainer", "trl_sft", "trl_grpo", "trl_prefix_rft", "trl_prefix_rft"]
    assert "toy" in lines[4]            # that one is run for its figures
    before, tokenizer = load_model(tiny_checkpoint, CPU)
    for line, name in zip(lines[:4], names):
        checkpoint = tmp_path / "trl_sft" if name == "trl_prefix_rft" else tiny_checkpoint
        done = run_printed(smaller(line, checkpoint, gsm8k, tmp_path / name))
        assert done.returncode == 0, (name, done.stderr[-3000:])
        model, again = load_model(str(tmp_path / name), CPU)
        assert again.chat_template == tokenizer.chat_template
        if name in ("trainer", "trl_sft"):              # a random model earns no reward
            assert distance(before, model) > 0


@needs_trainer
@pytest.mark.parametrize("words, said", [
    ([], "the following arguments are required: model, data"),
    (["toy", "missing.jsonl", "--output_dir", "out"],
     "missing.jsonl cannot be read: [Errno 2] No such file"),
    (["nowhere", "{data}", "--output_dir", "out"], "--model nowhere is no directory"),
    (["toy", "{data}", "--output_dir", "out", "--no_flag", "1"], "--no_flag"),
    (["toy", "{data}", "--output_dir", "out", "--resume_from_checkpoint", "nowhere"],
     "--resume_from_checkpoint nowhere holds no trainer_state.json"),
    (["toy", "{data}", "--output_dir", "out", "--warmup_steps", "-1"], "warmup_steps")])
def test_a_mistake_is_one_sentence(gsm8k, tmp_path, monkeypatch, capsys, words, said):
    from bridges import trainer
    words = [word.replace("{data}", str(gsm8k)) for word in words]
    monkeypatch.setattr(sys, "argv", ["bridges.trainer", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        trainer.run_bridge(trainer.main, TrainingArguments, require=("solution",))
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, missing, said", [
    ("trainer", ["accelerate"], "pip install accelerate"),
    ("trl_sft", ["trl"], "pip install trl==1.16.0 datasets"),
    ("trl_grpo", ["datasets"], "pip install trl==1.16.0 datasets"),
    ("trl_prefix_rft", ["trl", "datasets"], "pip install trl==1.16.0 datasets"),
    ("verl", ["verl", "tensordict"], 'pip install "verl[vllm]==0.9.1" sympy'),
    ("verl_data", ["datasets"], 'pip install "verl[vllm]==0.9.1" sympy')])
def test_a_missing_package_is_one_sentence(monkeypatch, capsys, name, missing, said):
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith("bridges.")]:
        monkeypatch.delitem(sys.modules, module)               # imported when all was there
    monkeypatch.setattr(sys, "argv", [name, "toy", "toy"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"bridges.{name}", run_name="__main__")
    assert caught.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and error.endswith(said)
    for package in missing:
        assert package in error


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_a_missing_vllm_is_one_sentence(gsm8k, tmp_path, monkeypatch, capsys):
    import trl
    from bridges import trl_grpo
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(sys, "argv", ["trl_grpo", "toy", str(gsm8k), "--output_dir",
                                      str(tmp_path / "out"), "--bf16", "False", "--use_vllm"])
    with pytest.raises(SystemExit) as caught:
        trl_grpo.run_bridge(trl_grpo.main, trl.GRPOConfig, require=("answer",))
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: vllm is not installed here: pip install trl[vllm]==1.16.0 datasets"


# ---- into your own run --------------------------------------------------------------------------

OWN_RUNS = re.findall(r"```python\n(.*?)```", (ROOT / "bridges" / "README.md").read_text(), re.S)


def test_what_is_pasted_into_your_own_run_names_what_exists():
    """Without TRL: short, valid, and of our files only what they define."""
    assert len(OWN_RUNS) == 2
    for block in OWN_RUNS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                source = (ROOT / f"{node.module.replace('.', '/')}.py").read_text()
                defined = {n.name for n in ast.parse(source).body if hasattr(n, "name")}
                assert {alias.name for alias in node.names} <= defined


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_your_own_grpo_script_gets_prefixes(tiny_checkpoint, tmp_path):
    import datasets
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    seen = []

    def reward(completion_ids, solution, **_):
        for ids, prefix, text in zip(completion_ids, yours["trainer"].prefixes, solution):
            assert ids[:len(prefix)] == prefix == demo_ids(tokenizer, text)[:len(prefix)]
            seen.append(len(prefix))
        return [parity(ids) for ids in completion_ids]

    rows = []
    for problem in word_problems(6):
        prompt = [{"role": "user", "content": problem["problem"]}]
        rows.append({"prompt": prompt, "solution": problem["solution"]})
    yours = {"model": model, "tokenizer": tokenizer, "reward": reward,
             "dataset": datasets.Dataset.from_list(rows)}
    yours["settings"] = trl_sgd(lambda out, **settings: settings, tmp_path, num_generations=4,
                                max_completion_length=ROOM, per_device_train_batch_size=8)
    exec(OWN_RUNS[0].replace('"runs/own"', f'"{tmp_path}", **settings'), yours)
    assert [L > 0 for L in seen] == [False, False, False, True] * 2
    assert yours["trainer"].state.global_step == 1


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_your_own_sft_script_learns_by_idft(tiny_checkpoint, tmp_path):
    """IDFT there is idft.py's; TRL's loss_type="dft" is our loss="dft", and another step."""
    import datasets
    import trl
    from bridges.trl_sft import IDFTTrainer
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    rows = []
    for problem in UNEQUAL:                          # as TRL has them; it adds the end of the text
        prompt = tokenizer.decode(prompt_ids(tokenizer, problem["problem"]))
        rows.append({"prompt": prompt, "completion": problem["solution"]})

    def script(**more):
        args = trl_sgd(trl.SFTConfig, tmp_path, per_device_train_batch_size=8, **more)
        return {"model": copy.deepcopy(model), "tokenizer": tokenizer, "args": args,
                "dataset": datasets.Dataset.from_list(rows)}

    yours = script()
    exec(OWN_RUNS[1], yours)
    assert distance(yours["model"], own_idft_step(model, tokenizer, "idft")) < 1e-6

    theirs, ours = script(loss_type="dft"), script()
    for Trainer, run, more in ((trl.SFTTrainer, theirs, {}),
                               (IDFTTrainer, ours, {"weighting": {"loss": "dft"}})):
        Trainer(run["model"], run["args"], train_dataset=run["dataset"],
                processing_class=tokenizer, **more).train()
    assert distance(theirs["model"], ours["model"]) < 1e-6
    assert distance(theirs["model"], yours["model"]) > 1e-4


# ---- real engines -------------------------------------------------------------------------------

@pytest.mark.parametrize("engine", ["trl", "verl"])
def test_a_real_engine_takes_our_step(engine):
    """Minutes. The environments are those of bridges/README.md, under "The check"."""
    variable = f"{engine.upper()}_PYTHON"
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name the python of an environment with {engine}")
    done = subprocess.run([os.environ[variable], "-m", "bridges.check", engine], cwd=ROOT,
                          capture_output=True, text=True, timeout=3000)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    words = [line.split()[:2] for line in done.stdout.splitlines()[2:]]
    assert words == [["good", name] for name in CHECKS]


CHECKS = ["prefixes", "kept", "ratio", "one", "control", "sync"]


def leave_rollouts(path, model, tokenizer, step=0):
    """What an engine leaves for bridges.check: here prefix_rft.py's own rollouts."""
    flags = prefix_rft.Flags(n=check.N, max_new_tokens=check.ROOM, seed=step, steps=10)
    problems = prefix_rft.prepare_problems(tokenizer, toy.problems("train", 8), check.ROOM)
    rollouts = prefix_rft.sample_rollouts(Sampler(model), tokenizer, problems, flags, step,
                                          stop_ids(model, tokenizer))
    rows = []
    for r in rollouts:
        rows.append({"prompt": r.prompt, "response": r.response, "prefix": r.prefix_length,
                     "reward": parity(r.response), "ratio": torch.ones(len(r.response))})
    _, done = check.own_update(model, rows)
    for row, r in zip(rows, done):
        row["adv"] = r.adv
    torch.save(rows, path)


@pytest.fixture(scope="module")
def engine(small_base, tmp_path_factory):
    """A folder as an engine leaves it when everything is right."""
    folder = tmp_path_factory.mktemp("engine")
    model, tokenizer = small_base
    for step, name in enumerate(["base", "first", "second"]):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        leave_rollouts(folder / f"rollouts{step + 1}.pt", model, tokenizer, step)
        model, _ = check.own_update(model, torch.load(folder / f"rollouts{step + 1}.pt"))
    return folder


def spoil(name, rows, folder, weights):
    """Make one thing wrong."""
    hybrid = next(r for r in rows[0] if r["prefix"])
    if name == "prefixes":
        hybrid["response"][0] += 1
    if name == "kept":
        hybrid["adv"][:hybrid["prefix"]] = 1.0
    if name == "ratio":
        hybrid["ratio"][0] = 1.3
    if name == "one":
        base, _ = load_model(str(folder / "base"), CPU)
        check.own_update(base, rows[0], "all")[0].save_pretrained(weights[0])
    if name == "sync":
        rows[1] = rows[0]


@pytest.mark.parametrize("spoilt", ["nothing", "prefixes", "kept", "ratio", "one", "sync"])
def test_the_check_finds_what_is_wrong(engine, tmp_path, spoilt):
    folder = tmp_path / "engine"
    shutil.copytree(engine, folder)
    weights = [folder / "first", folder / "second"]
    rows = [torch.load(folder / f"rollouts{step}.pt") for step in (1, 2)]
    spoil(spoilt, rows, folder, weights)
    for step in (1, 2):
        torch.save(rows[step - 1], folder / f"rollouts{step}.pt")
    lines = check.compare(folder, weights, toy.tokenizer(), toy.problems("train", 8))
    assert [name.split()[0] for _, name, _ in lines] == CHECKS
    bad = [name.split()[0] for good, name, _ in lines if not good]
    assert bad[:1] == ([] if spoilt == "nothing" else [spoilt]), lines


# ---- verl ---------------------------------------------------------------------------------------

class Queue:
    """verl's TransferQueue in memory: {key: {field: value}}, and what it is told of a key."""

    def __init__(self):
        self.rows, self.tags = {}, {}

    async def async_kv_put(self, key, partition_id, tag):
        self.tags[key] = tag

    async def async_kv_batch_put(self, keys, fields, tags, partition_id):
        self.kv_batch_put(keys, partition_id, fields)
        self.tags |= dict(zip(keys, tags))

    def kv_batch_put(self, keys, partition_id, fields):
        from transfer_queue import KVBatchMeta
        for i, key in enumerate(keys):
            row = self.rows.setdefault(key, {})
            row |= {name: fields[name][i] for name in fields.keys()}
        return KVBatchMeta(keys=keys, partition_id=partition_id, tags=[{}] * len(keys))

    def kv_batch_get(self, keys, partition_id, select_fields):
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict
        rows = []
        for key in keys:
            rows.append({name: self.rows[key][name] for name in select_fields
                         if name in self.rows[key]})
        return list_of_dict_to_tensordict(rows)


class Server:
    """verl's client of the inference servers: responses by a random hand."""

    def __init__(self, eos, with_logps):
        self.eos, self.with_logps, self.asked = eos, with_logps, []
        self.rng = np.random.default_rng(0)

    async def generate(self, prompt_ids, sampling_params, **_):
        from verl.workers.rollout.replica import TokenOutput
        self.asked.append(list(prompt_ids))
        ids = write(self.rng, self.eos)[:ROOM]
        return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids) if self.with_logps else None)


class Reward:
    """verl's reward worker: its own reward manager, and our compute_score without its maths."""

    def __init__(self, tokenizer, monkeypatch):
        import bridges.verl as bridge
        from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
        self.compute_score, self.seen = self, []
        monkeypatch.setattr(bridge, "reward", lambda text, truth: parity(text.encode()))
        self.manager = object.__new__(NaiveRewardManager)
        self.manager.tokenizer, self.manager.compute_score = tokenizer, bridge.compute_score
        self.manager.is_async_reward_score, self.manager.reward_router_address = False, None

    async def remote(self, data):
        import asyncio
        self.manager.loop = asyncio.get_running_loop()
        return await self.manager.run_single(copy.deepcopy(data))    # as on its way through Ray


def verl_config(words=()):
    """verl's configuration, by its own means."""
    import verl
    from hydra import compose, initialize_config_dir
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides=list(words))


def verl_rollouts(checkpoint, monkeypatch, with_logps=False, validate=False, step=3):
    """Rollouts of three PROBLEMS by verl's worker -> the queue, what the server was asked."""
    import asyncio

    import bridges.verl
    import verl.trainer.ppo.v1.agent_loop_tq as module
    from bridges.verl_data import dataset_rows
    queue = Queue()
    monkeypatch.setattr(module, "tq", queue)
    _, tokenizer = load_model(checkpoint, CPU)
    config = verl_config([
        f"actor_rollout_ref.rollout.n={N}", f"actor_rollout_ref.rollout.val_kwargs.n={N}",
        f"data.max_response_length={ROOM}",
        "actor_rollout_ref.actor.optim.total_training_steps=10"])
    worker = object.__new__(module.AgentLoopWorkerTQ.__ray_metadata__.modified_class)
    worker.config, worker.tokenizer, worker.processor = config, tokenizer, None
    worker.hf_model_type, worker.dataset_cls, worker.tools = "qwen2", None, []
    worker.mm_processor_kwargs, worker.distillation_enabled = {}, False
    worker.llm_client = Server(tokenizer.eos_token_id, with_logps)
    worker.reward_loop_worker_handles = [Reward(tokenizer, monkeypatch)]

    async def run():
        for row in dataset_rows(PROBLEMS[:3], with_solutions=not validate):
            row["raw_prompt"] = row.pop("prompt")
            row |= {"uid": f"u{row['extra_info']['index']}", "agent_name": "prefix_rft",
                    "global_steps": step, "index": row["extra_info"]["index"]}
            trajectory = {"step": step, "sample_index": 0, "rollout_n": 0, "validate": validate}
            await worker._run_prompt(row, {}, trajectory)
            assert queue.tags[row["uid"]] == {"status": "finished"}

    asyncio.run(run())
    return queue, worker.llm_client.asked


@needs_verl
@pytest.mark.parametrize("with_logps", [False, True])
def test_verl_hybrid_rollouts(tiny_checkpoint, monkeypatch, with_logps):
    queue, asked = verl_rollouts(tiny_checkpoint, monkeypatch, with_logps)
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    assert sorted(queue.rows) == sorted(f"u{i}_{k}_0" for i in range(3) for k in range(N))
    for key, row in queue.rows.items():
        problem = PROBLEMS[int(key[1])]
        L = int(row["prefix_mask"].sum())
        ids = row["responses"].tolist()
        assert row["prompts"].tolist() == prompt_ids(tokenizer, problem["problem"])
        assert row["input_ids"].tolist() == row["prompts"].tolist() + ids
        assert ids[:L] == demo_ids(tokenizer, problem["solution"])[:L]
        assert (L > 0) == key.endswith(f"_{N - 1}_0") and len(ids) <= ROOM
        assert row["prefix_mask"].tolist() == [1] * L + [0] * (len(ids) - L)
        assert row["response_mask"].tolist() == [1] * len(ids)
        assert row["prompts"].tolist() + ids[:L] in asked
        if with_logps:
            assert row["rollout_log_probs"].tolist() == [0.0] * L + [-1.0] * (len(ids) - L)
        finished = len(ids) < ROOM or ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert row["rm_scores"].sum() == finished * parity(text.encode())
    again, _ = verl_rollouts(tiny_checkpoint, monkeypatch)
    other, _ = verl_rollouts(tiny_checkpoint, monkeypatch, step=9)
    lengths = []
    for found in (queue, again, other):                # rows arrive in any order
        lengths.append({key: int(row["prefix_mask"].sum()) for key, row in found.rows.items()})
    assert lengths[0] == lengths[1] != lengths[2]


@needs_verl
def test_verl_validates_without_prefixes(tiny_checkpoint, monkeypatch):
    queue, _ = verl_rollouts(tiny_checkpoint, monkeypatch, validate=True)
    assert len(queue.rows) == 3 * N
    assert not any(row["prefix_mask"].any() for row in queue.rows.values())


def verl_batch(checkpoint, monkeypatch):
    """Rollouts with old_log_probs, entropies and advantages in the queue -> model, queue, keys, and
    the same as prefix_rft.Rollouts."""
    import bridges.verl as bridge
    import verl.trainer.ppo.v1.trainer_base as base
    from transfer_queue import KVBatchMeta
    queue, _ = verl_rollouts(checkpoint, monkeypatch)
    monkeypatch.setattr(base, "tq", queue)
    monkeypatch.setattr(bridge, "tq", queue)
    model, tokenizer = load_model(checkpoint, CPU)
    rollouts = []
    keys = sorted(queue.rows)
    for key in keys:
        row = queue.rows[key]
        row["uid"] = key.split("_")[0]
        prompt, ids = row["prompts"].tolist(), row["responses"].tolist()
        with torch.no_grad():
            row["old_log_probs"], row["entropy"] = response_stats(model, [(prompt, ids)])
        L = int(row["prefix_mask"].sum())
        rollouts.append(prefix_rft.Rollout(prompt, ids, "", prefix_length=L, demo_length=L,
                                           reward=row["rm_scores"].sum().item()))

    # What verl adds to fill a batch up: no response_mask, but the prefix_mask of another row.
    hybrid = queue.rows[keys[N - 1]]
    queue.rows["pad_0_0"] = hybrid | {
        "uid": "pad", "responses": hybrid["responses"][:1], "rm_scores": torch.zeros(1),
        "response_mask": torch.zeros(1, dtype=torch.long), "entropy": torch.full((1,), 99.0),
        "old_log_probs": torch.zeros(1)}
    trainer = object.__new__(bridge.PrefixRFTTrainer)
    trainer.config = verl_config([
        "algorithm.adv_estimator=grpo", "algorithm.norm_adv_by_std_in_grpo=False",
        f"actor_rollout_ref.rollout.n={N}"])
    batch = KVBatchMeta(keys=[*keys, "pad_0_0"], partition_id="train", tags=[{}] * (len(keys) + 1))
    batch = trainer._compute_advantage(batch, metrics={})
    assert len(batch.keys) == len(keys) + 1
    return model, queue, keys, rollouts


@needs_verl
@pytest.mark.filterwarnings("ignore")
def test_verl_takes_our_step(tiny_checkpoint, monkeypatch):
    """verl's advantage and our clipping of it, our loss in verl's words: update()'s step, for every
    number of GPUs, whose gradients are averaged."""
    from types import SimpleNamespace

    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    model, queue, keys, rollouts = verl_batch(tiny_checkpoint, monkeypatch)
    flags = prefix_rft.Flags(n=N, mini_batches=1, lr=1.0, max_new_tokens=ROOM)
    ours, control = copy.deepcopy(model), copy.deepcopy(model)
    metrics = prefix_rft.update(ours, torch.optim.SGD(ours.parameters(), 1.0), rollouts, flags)
    for r, key in zip(rollouts, keys):
        assert torch.allclose(queue.rows[key]["advantages"], r.adv, atol=1e-6)
    assert metrics["prefix_kept"] > 0 and distance(model, ours) > 3e-3
    flags.prefix_loss = "all"
    prefix_rft.update(control, torch.optim.SGD(control.parameters(), 1.0), rollouts, flags)
    assert distance(ours, control) > 3e-4

    for gpus, size in ((1, 12), (1, 5), (2, 3)):
        config = SimpleNamespace(clip_ratio=0.2, global_batch_info={
            "dp_size": gpus, "batch_num_tokens": 1, "global_batch_size": len(rollouts),
            "loss_scale_factor": ROOM})
        theirs = copy.deepcopy(model)
        for start in range(0, len(rollouts), size):
            part = slice(start, start + size)
            lengths = [len(r.response) for r in rollouts[part]]
            rows = [(r.prompt, r.response) for r in rollouts[part]]
            logp = response_stats(theirs, rows)[0].split(lengths)
            fields = [list(logp)]
            for name in ("old_log_probs", "advantages", "response_mask"):
                fields.append([queue.rows[key][name] for key in keys[part]])
            logp, old, adv, mask = (torch.nn.utils.rnn.pad_sequence(field, batch_first=True)
                                    for field in fields)
            loss, _ = get_policy_loss_fn("prefix_rft")(
                old_log_prob=old, log_prob=logp, advantages=adv, response_mask=mask.bool(),
                loss_agg_mode="seq-mean-token-sum-norm", config=config, rollout_is_weights=None)
            (loss / gpus).backward()
        torch.optim.SGD(theirs.parameters(), 1.0).step()
        assert distance(theirs, ours) < 1e-6


@needs_verl
def test_verl_loss_clips_and_weighs():
    from types import SimpleNamespace

    from bridges.verl import prefix_rft_loss
    rng = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 9, generator=rng)
    adv = torch.randn(6, 9, generator=rng)
    logp = old + 0.5 * torch.randn(6, 9, generator=rng)
    mask = torch.arange(9) < torch.randint(2, 10, (6, 1), generator=rng)
    config = SimpleNamespace(clip_ratio=0.2, global_batch_info={
        "dp_size": 1, "global_batch_size": 6, "loss_scale_factor": 48})
    expected = prefix_rft.policy_loss(logp, old, adv, 0.2)[mask].sum() / (6 * 48)
    arguments = (mask, "seq-mean-token-sum-norm", config)
    poisoned = logp.masked_fill(~mask, math.nan)
    assert torch.allclose(prefix_rft_loss(old, poisoned, adv, *arguments)[0], expected)
    half = prefix_rft_loss(old, logp, adv, *arguments, torch.full((6, 9), 0.5))[0]
    assert torch.allclose(half, expected / 2)


@needs_verl
def test_verl_reward():
    from bridges.verl import compute_score
    assert compute_score("gsm8k", "\\boxed{1,000}", "1000", {"finished": True}) == 1.0
    assert compute_score("gsm8k", "\\boxed{1,000}", "1000") == 1.0
    assert compute_score("gsm8k", "\\boxed{1,000}", "1000", {"finished": False}) == 0.0
    assert compute_score(data_source="gsm8k", solution_str="1000", ground_truth="1000") == 0.0


@needs_verl
def test_verl_reads_our_data_and_the_printed_line(tiny_checkpoint, gsm8k, tmp_path):
    """The data by our script, the flags by verl's own configuration and checks, the names by its
    registries. The run itself needs GPUs."""
    import datasets
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.utils.config import validate_config
    from verl.utils.dataset.rl_dataset import RLHFDataset

    import bridges.verl as bridge
    from bridges import verl_data
    (script,), (line,) = printed("python -m bridges.verl_data"), printed("python -m verl.trainer")
    verl_data.main([str(gsm8k), str(gsm8k), str(tmp_path / script[-1])])
    config = verl_config([word for word in line[3:]])
    assert not need_critic(config) and not need_reference_policy(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)
    assert trainer is bridge.PrefixRFTTrainer
    loss = get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    assert loss is bridge.prefix_rft_loss
    assert get_custom_reward_fn(config)("", "\\boxed{2}", "2") == 1.0
    assert trainer(config).trainer_mode == "sync"

    _, tokenizer = load_model(tiny_checkpoint, CPU)
    for path, solutions in ((config.data.train_files, 1), (config.data.val_files, 0)):
        rows = RLHFDataset(str(tmp_path / path), tokenizer, config.data)
        problems = load_problems(gsm8k)
        assert len(rows) == len(problems)
        for i in (0, 7):
            row = rows[i]
            ids = tokenizer.apply_chat_template(row["raw_prompt"], add_generation_prompt=True,
                                                return_dict=False)
            assert ids == prompt_ids(tokenizer, problems[i]["problem"])
            assert row["index"] == i and len(row["extra_info"]["solutions"]) == solutions
            assert row["reward_model"]["ground_truth"] == problems[i]["answer"]


# ---- checkpoints --------------------------------------------------------------------------------

def test_a_checkpoint_loads_in_the_auto_classes(tiny_checkpoint, tmp_path):
    model, tokenizer = load_model(tiny_checkpoint, CPU)
    idft.save_checkpoint(tmp_path, model, tokenizer, idft.new_optimizer(model), {"step": 1})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    text = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    chat = [{"role": "user", "content": "1 + 1?"}]
    assert (text.apply_chat_template(chat, tokenize=False)
            == tokenizer.apply_chat_template(chat, tokenize=False))
    assert text("Ada has 3 coins.").input_ids == tokenizer("Ada has 3 coins.").input_ids
    ids = torch.tensor([tokenizer("Ada has 3 coins.").input_ids])
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


if __name__ == "__main__":              # one of the two processes of the test above
    trl_step(sys.argv[1], sys.argv[2], per_device_train_batch_size=3, gradient_accumulation_steps=2)
