"""
language.py - the comparisons once more, with a pretrained language model and real words.

The model is SmolLM2-135M-Instruct. A problem is a circle of five people; each tells one other.
Warmed up on a few problems of one hop ("easy"), which teach the form of an answer, the base stops
after one hop where two are asked for ("hard"). A guess is right in one case of four.

    problem     Jim tells Paul. George tells Carl. Paul tells Nick. Nick tells George. Carl tells
                Jim. / Paul has news. Who hears it second?
    expert      Paul tells Nick, Nick tells George. \\boxed{George}
    foreign     Nick from Paul, George from Nick: \\boxed{George}

Every arm learns from the same number of sequences in the same number of optimizer steps, and is
tuned as sweep.py says. The first arms learn from the expert, those of TEXTS from the foreign one:
as it is, self-distilled (beta 0), or retold by hinted decoding.

    hard, easy      greedy accuracy on problems of two hops and of one
    general         nll of answers to GSM8K which the model wrote before the warm-up: what is
                    forgotten of everything else
    phi             of the texts that were learnt from, a mean over tokens, under the base

    python -m experiments.language --seeds 3
    python -m experiments.language --seeds 3 --arms sft prefix_rft --model DIRECTORY --general FILE
"""

import copy
import random
from dataclasses import dataclass

import torch

import hinted_decode
import idft
import prefix_rft
from ddt import cll, response_stats
from eval import (BENCHMARKS, flag, greedy_accuracy, load_model, load_problems, new_sampler,
                  prompt_ids, run_script, stop_ids)
from sampler import Sampler
from experiments import rl, sweep

NAMES = """Adam Alex Alice Andrew Anna Anne Arthur Ben Carl Charles Chris Daniel David Edward Emily
Frank Fred George Henry Jack Jacob James Jane Jim John Kim Lily Louis Luke Maria Mark Martin Mary
Max Michael Nick Paul Peter Robert Sam Sarah Simon Thomas Tim Tom Victor William""".split()
HOPS = {"easy": 1, "hard": 2}
ORDINALS = {1: "first", 2: "second"}
PEOPLE = 5

# What all arms share: batches of rollouts, problems a batch, rollouts a problem, optimizer steps a
# batch. A supervised arm takes as many steps of as many sequences (rl.budget).
COMMON = {"steps": 12, "batch": 8, "n": 4, "mini_batches": 2}
PROBLEMS = 96                                    # a policy arm sees each once
MAX_NEW_TOKENS = 24
LENGTH = 96                                      # room for a prompt and an answer, in tokens
GRID = (3e-5, 1e-4)                              # where the search begins; it grows at its edges
SFT_LR = 3e-5                                    # what is best for sft

METHODS = {
    "base": {"lr": 0.0, "steps": 0},
    "sft": {"supervised": 1.0, "loss": "sft"},
    "dft": {"supervised": 1.0, "loss": "dft"},
    "idft": {"supervised": 1.0, "loss": "idft"},
    "idft, gamma_max 1": {"supervised": 1.0, "loss": "idft", "gamma_max": 1.0},
    "rft": {"method": "rft"},
    "prefix_rft": {"method": "prefix_rft"},
    # Each half has a rate of its own; that of the second is tuned.
    "sft_rft": {"supervised": 0.5, "loss": "sft", "sft_lr": SFT_LR, "method": "rft"},
    "luffy": {"method": "luffy"},
}
FOREIGN = {"supervised": 1.0, "loss": "sft", "voice": "foreign"}
HINTED = {**FOREIGN, "hint": 3.0}
TEXTS = {
    "raw": FOREIGN,
    "hinted": HINTED,
    # At one rate, so that only the texts differ.
    "raw, rate of sft": {**FOREIGN, "tune_like": "sft"},
    "self-distilled, rate of sft": {**FOREIGN, "hint": 0.0, "tune_like": "sft"},
    "hinted, rate of sft": {**HINTED, "tune_like": "sft"},
}
ARMS = {**METHODS, **TEXTS}
COLUMNS = {"hard": "hard", "easy": "easy", "general": "general", "texts": "texts", "phi": "phi",
           "optimizer steps": "optimizer_steps", "tokens trained": "tokens_trained",
           "tokens sampled": "tokens_sampled", "seconds": "seconds"}


# ---- the task -----------------------------------------------------------------------------------

def new_problem(hops, rng, voice):
    """One problem, in the form of eval.load_problems; a chat, to do without a system's words."""
    circle = rng.sample(NAMES, PEOPLE)
    pairs = list(zip(circle, circle[1:] + circle[:1]))
    facts = [f"{teller} tells {hearer}." for teller, hearer in pairs]
    rng.shuffle(facts)
    question = f"{circle[0]} has news. Who hears it {ORDINALS[hops]}?"

    # The same path in two voices.
    answer = circle[hops]
    if voice == "expert":
        path = [f"{teller} tells {hearer}" for teller, hearer in pairs[:hops]]
        solution = ", ".join(path) + f". \\boxed{{{answer}}}"
    else:
        path = [f"{hearer} from {teller}" for teller, hearer in pairs[:hops]]
        solution = ", ".join(path) + f": \\boxed{{{answer}}}"
    chat = [{"role": "system", "content": ""},
            {"role": "user", "content": " ".join(facts) + "\n" + question}]
    return {"problem": chat, "solution": solution, "answer": answer}


def new_problems(split, n, seed, voice="expert"):
    """n problems of a split, easy or hard."""
    rng = random.Random(f"{split} {seed}")
    return [new_problem(HOPS[split], rng, voice) for _ in range(n)]


# ---- the base -----------------------------------------------------------------------------------

def read_general(model, tokenizer, problems):
    """What the pretrained model answers to problems of another kind, as rows."""
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    sampler, _ = new_sampler(model, prompts, 48)
    samples = sampler(prompts, 1, 48, stop_ids(model, tokenizer), seed=0)
    return [(prompt, sample.tokens) for prompt, sample in zip(prompts, samples)]


def warm_up(model, tokenizer):
    """Six steps of eight easy problems, the same for all arms and seeds."""
    problems = prefix_rft.prepare_problems(tokenizer, new_problems("easy", 48, 1000),
                                           MAX_NEW_TOKENS)
    flags = idft.Flags(loss="sft", lr=5e-5, steps=6, batch=8)
    learn = rl.supervised_steps(model, problems, flags)
    for step in range(flags.steps):
        learn(step)


@torch.no_grad()
def mean_phi(model, rows):
    logp, entropy = response_stats(model, rows)
    return cll(logp, entropy).mean().item()


@torch.no_grad()
def mean_nll(model, rows):
    logp, _ = response_stats(model, rows)
    return -logp.mean().item()


# ---- one arm ------------------------------------------------------------------------------------

def retell(model, tokenizer, problems, beta, seed):
    """The demonstrations retold; what comes out wrong is left out."""
    flags = hinted_decode.Flags(beta=beta, analysis=False, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    writer = hinted_decode.Writer(model, tokenizer, problems, flags)
    return hinted_decode.kept(writer.retell(writer.problems, beta))


def policy_flags(arm, steps, lr, seed):
    """prefix_rft.Flags of an arm for `steps` batches of rollouts."""
    return prefix_rft.Flags(method=arm["method"], **rl.METHODS[arm["method"]], lr=lr, seed=seed,
                            steps=steps, batch=arm["batch"], n=arm["n"],
                            mini_batches=arm["mini_batches"], max_new_tokens=MAX_NEW_TOKENS)


def train(model, tokenizer, sampler, arm, lr, seed):
    """Train one arm -> what it took."""
    problems = new_problems("hard", PROBLEMS, seed, arm.get("voice", "expert"))
    if "hint" in arm:
        problems = retell(model, tokenizer, problems, arm["hint"], seed)
    texts = len(problems)
    problems = prefix_rft.prepare_problems(tokenizer, problems, MAX_NEW_TOKENS)
    phi = mean_phi(model, [(problem["prompt"], problem["demos"][0]) for problem in problems[:32]])

    # Batches of demonstrations come first, then batches of rollouts; most arms have one kind.
    reading, exploring, size = rl.budget(arm)
    learn, sequences = [], 0
    if reading:
        flags = idft.Flags(loss=arm["loss"], gamma_max=arm.get("gamma_max", 2.0),
                           lr=arm.get("sft_lr", lr), seed=seed,
                           steps=reading * arm["mini_batches"], batch=size)
        step = rl.supervised_steps(model, problems, flags)
        learn += [(step, i) for i in range(flags.steps)]
        sequences += flags.steps * flags.batch
    if exploring:
        flags = policy_flags(arm, exploring, lr, seed)
        step = rl.policy_steps(model, tokenizer, problems, flags, sampler, arm["method"])
        learn += [(step, i) for i in range(flags.steps)]
        sequences += flags.steps * flags.batch * flags.n
    assert sequences == arm["steps"] * arm["batch"] * arm["n"]             # as every other arm

    # As on a GPU, matrices are multiplied in bfloat16 where the CPU can: half of the time.
    torch.set_float32_matmul_precision("medium")
    spent = {"tokens_trained": 0, "tokens_sampled": 0, "optimizer_steps": 0}
    for step, i in learn:
        for name, amount in zip(spent, step(i)):
            spent[name] += amount
    torch.set_float32_matmul_precision("highest")
    return {"texts": texts, "phi": phi, "sequences": sequences, **spent}


def measure(model, tokenizer, sampler, general, stage):
    """The figures of a trained model: at the stage "tune" on problems of its own."""
    if stage == "tune":
        sets = {"valid": new_problems("hard", 32, 101), "valid_2": new_problems("hard", 16, 102),
                "valid_easy": new_problems("easy", 16, 103)}
        return greedy_accuracy(model, tokenizer, sets, MAX_NEW_TOKENS, sampler=sampler)
    sets = {"hard": new_problems("hard", 64, 104), "easy": new_problems("easy", 32, 105)}
    accuracy = greedy_accuracy(model, tokenizer, sets, MAX_NEW_TOKENS, sampler=sampler)
    return {**accuracy, "general": mean_nll(model, general)}


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags(sweep.Flags):
    model: str = flag("HuggingFaceTB/SmolLM2-135M-Instruct", "a directory or a Hub id")
    general: str = flag("gsm8k", "problems of another kind: gsm8k, a JSON(L) file or hf://...")


def main(flags):
    if not flags.table:
        base, tokenizer = load_model(flags.model, torch.device("cpu"))
        base.set_attn_implementation("eager")                  # quicker than sdpa for 60 tokens
        problems = load_problems(BENCHMARKS.get(flags.general, flags.general))[:8]
        general = read_general(base, tokenizer, problems)
        warm_up(base, tokenizer)

    def run(arm, lr, seed, stage):
        # As on a GPU, a copy in bfloat16 writes all samples.
        model = copy.deepcopy(base)
        sampler = Sampler(model, 64, LENGTH, dtype=torch.bfloat16)
        spent = train(model, tokenizer, sampler, arm, lr, seed) if arm["steps"] else {}
        return {**spent, **measure(model, tokenizer, sampler, general, stage)}

    path = sweep.results_file(flags, "language")
    sweep.sweep(path, run, ARMS, COMMON, flags, COLUMNS, GRID)


if __name__ == "__main__":
    run_script(main, Flags)
