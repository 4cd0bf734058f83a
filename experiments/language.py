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
from experiments import relatives, sweep

NAMES = """Adam Alex Alice Andrew Anna Anne Arthur Ben Carl Charles Chris Daniel David Edward Emily
Frank Fred George Henry Jack Jacob James Jane Jim John Kim Lily Louis Luke Maria Mark Martin Mary
Max Michael Nick Paul Peter Robert Sam Sarah Simon Thomas Tim Tom Victor William""".split()
HOPS = {"easy": 1, "hard": 2}
ORDINALS = {1: "first", 2: "second"}
PEOPLE = 5

# What all arms share: batches of rollouts, problems a batch, rollouts a problem, optimizer steps a
# batch. A supervised arm takes as many steps of as many sequences.
COMMON = {"steps": 4, "batch": 4, "n": 4, "mini_batches": 2}
MAX_NEW_TOKENS = 32
GRID = (3e-5, 1e-4)                              # where the search begins

METHODS = {
    "base": {"lr": 0.0, "steps": 0},
    "sft": {"supervised": 1.0, "loss": "sft"},
    "dft": {"supervised": 1.0, "loss": "dft"},
    "idft": {"supervised": 1.0, "loss": "idft"},
    "idft, gamma_max 1": {"supervised": 1.0, "loss": "idft", "gamma_max": 1.0},
    "rft": {"method": "rft"},
    "prefix_rft": {"method": "prefix_rft"},
    "sft_rft": {"supervised": 0.5, "loss": "sft", "method": "rft"},
    "luffy": {"method": "luffy"},
}
TEXTS = {
    "raw, sft": {"supervised": 1.0, "loss": "sft", "voice": "foreign"},
    "self-distilled, sft": {"supervised": 1.0, "loss": "sft", "voice": "foreign", "hint": 0.0},
    "hinted, sft": {"supervised": 1.0, "loss": "sft", "voice": "foreign", "hint": 3.0},
}
ARMS = {**METHODS, **TEXTS}
COLUMNS = {"hard": "hard", "easy": "easy", "general": "general", "phi": "phi",
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
    rows = demonstration_rows(model, tokenizer, new_problems("easy", 48, 1000))
    flags = idft.Flags(loss="sft", lr=5e-5, steps=6, batch=8)
    train_supervised(model, tokenizer, rows, flags)


def demonstration_rows(model, tokenizer, problems):
    return idft.demonstration_rows(model, tokenizer, problems, max_tokens=256)


def train_supervised(model, tokenizer, rows, flags):
    """idft.py's loop with a new optimizer, which it returns."""
    optimizer = idft.new_optimizer(model)
    idft.train_supervised(model, tokenizer, rows, flags, optimizer, {"step": 0, "bad": 0})
    return optimizer


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
    return hinted_decode.kept(writer.retell(writer.problems))


def policy_flags(arm, lr, seed):
    """prefix_rft.Flags of an arm that learns from rollouts in all of its batches."""
    method = {**prefix_rft.METHODS, **relatives.METHODS}[arm["method"]]
    return prefix_rft.Flags(method=arm["method"], **method, lr=lr, seed=seed, steps=arm["steps"],
                            batch=arm["batch"], n=arm["n"], mini_batches=arm["mini_batches"],
                            max_new_tokens=MAX_NEW_TOKENS)


def train(model, tokenizer, arm, lr, seed):
    """Train one arm -> what it took."""
    sequences = arm["batch"] * arm["n"] // arm["mini_batches"]             # an optimizer step
    reading = round(arm.get("supervised", 0) * arm["steps"])               # batches
    exploring = arm["steps"] - reading
    problems = new_problems("hard", 48, seed, arm.get("voice", "expert"))
    spent = {"texts": len(problems), "optimizer_steps": 0, "sequences": 0}

    if "hint" in arm:
        problems = retell(model, tokenizer, problems, arm["hint"], seed)
        spent["texts"] = len(problems)
    rows = demonstration_rows(model, tokenizer, problems)
    spent["phi"] = mean_phi(model, rows[:16])                              # before any step

    if reading:
        flags = idft.Flags(loss=arm["loss"], gamma_max=arm.get("gamma_max", 2.0), lr=lr, seed=seed,
                           steps=reading * arm["mini_batches"], batch=sequences)
        train_supervised(model, tokenizer, rows, flags)
        spent["optimizer_steps"] += flags.steps
        spent["sequences"] += flags.steps * flags.batch
    if exploring:
        flags = policy_flags({**arm, "steps": exploring}, lr, seed)
        variant = relatives.VARIANTS.get(arm["method"], {})
        problems = prefix_rft.prepare_problems(tokenizer, problems, MAX_NEW_TOKENS)
        prompts = [problem["prompt"] for problem in problems]
        sampler, _ = new_sampler(model, prompts, MAX_NEW_TOKENS)
        optimizer = idft.new_optimizer(model)
        prefix_rft.train_policy(model, tokenizer, problems, flags, sampler, optimizer,
                                {"step": 0, "bad": 0}, **variant)
        spent["optimizer_steps"] += flags.steps * flags.mini_batches
        spent["sequences"] += flags.steps * flags.batch * flags.n

    # Equal for all arms that learn, whatever they learn from.
    assert spent["optimizer_steps"] == arm["steps"] * arm["mini_batches"]
    assert spent["sequences"] == arm["steps"] * arm["batch"] * arm["n"]
    return spent


def measure(model, tokenizer, general, stage):
    """The figures of a trained model: at the stage "tune" on problems of its own."""
    if stage == "tune":
        sets = {"valid": new_problems("hard", 16, 101), "valid_2": new_problems("hard", 8, 102),
                "valid_easy": new_problems("easy", 8, 103)}
        return greedy_accuracy(model, tokenizer, sets, MAX_NEW_TOKENS)
    sets = {"hard": new_problems("hard", 32, 104), "easy": new_problems("easy", 16, 105)}
    accuracy = greedy_accuracy(model, tokenizer, sets, MAX_NEW_TOKENS)
    return {**accuracy, "general": mean_nll(model, general)}


# ---- flags and main -----------------------------------------------------------------------------

@dataclass
class Flags(sweep.Flags):
    model: str = flag("HuggingFaceTB/SmolLM2-135M-Instruct", "a directory or a Hub id")
    general: str = flag("gsm8k", "problems of another kind: gsm8k, a JSON(L) file or hf://...")


def main(flags):
    if not flags.table:
        base, tokenizer = load_model(flags.model, torch.device("cpu"))
        problems = load_problems(BENCHMARKS.get(flags.general, flags.general))[:8]
        general = read_general(base, tokenizer, problems)
        warm_up(base, tokenizer)

    def run(arm, lr, seed, stage):
        model = copy.deepcopy(base)
        spent = train(model, tokenizer, arm, lr, seed) if arm["steps"] else {}
        return {**spent, **measure(model, tokenizer, general, stage)}

    path = sweep.results_file(flags, "language")
    sweep.sweep(path, run, ARMS, COMMON, flags, COLUMNS, GRID)


if __name__ == "__main__":
    run_script(main, Flags)
