"""
voices.py - the same problems told in several voices: how foreign is a text, and is it right?

The demonstration, the same retold by hinted decoding at several beta (0 is self-distillation), and
the model's own answers at temperature 1. phi and its shares above -1, -3 and -5 are means over
tokens under the plain context; in the model's own voice phi is zero. Choose a beta whose texts are
right and have phi near zero.

    python -m experiments.voices
    python -m experiments.voices --model DIR --data train.jsonl --problems 32 --max_new_tokens 400
"""

from dataclasses import dataclass

import numpy as np

import hinted_decode
from eval import (InputError, demo_ids, demonstrations, flag, load_model, load_problems,
                  pick_device, printable, prompt_ids, run_script)
from hinted_decode import kept, show
from sampler import Sample


@dataclass
class Flags:
    model: str = flag("toy", "toy, a checkpoint directory or a Hub id")
    data: str = flag("toy", "problems and demonstrations: toy, a JSON(L) file or hf://...")
    problems: int = flag(256, "how many of its problems to use", 1)
    betas: list[float] = flag([0.0, 3.0, 30.0, 300.0], "retell at each of these", 0)
    analysis: bool = flag(True, "let the model analyse the reference first [code]")
    max_new_tokens: int = flag(1024, "longest text, longest analysis", 1)
    rows: int = flag(64, "texts written side by side", 1)
    seed: int = flag(0, "of the toy and of sampling", 0)
    device: str = flag("auto", "auto, cpu or cuda")


def main(flags):
    problems = load_problems(flags.data, ("solution",), flags.seed)[:flags.problems]
    model, tokenizer = load_model(flags.model, pick_device(flags.device), flags.seed)
    if flags.analysis and "<hint>" in tokenizer.get_vocab():
        raise InputError("--analysis: the toy can retell but not analyse, add --no_analysis")
    retelling = hinted_decode.Flags(analysis=flags.analysis, max_new_tokens=flags.max_new_tokens,
                                    rows=flags.rows, seed=flags.seed)
    writer = hinted_decode.Writer(model, tokenizer, problems, retelling)
    problems = writer.problems

    # The same problems in every voice.
    prompts, demos = [], []
    for problem in problems:
        prompts.append(prompt_ids(tokenizer, problem["problem"]))
        demos.append(Sample(demo_ids(tokenizer, demonstrations(problem)[0]), finished=True))
    voices = {"demonstration": writer.judge(problems, demos, "demonstration")}
    for beta in flags.betas:
        voices[f"hinted, beta {beta:g}"] = writer.retell(problems, beta)
    own = writer.write(writer.alone, prompts, temperature=1.0)
    voices["own, T = 1"] = writer.judge(problems, own, "own")

    # The problem whose texts differ most.
    def different(i):
        return len({rows[i]["solution"] for rows in voices.values()})
    shown = max(range(len(problems)), key=different)
    print(printable(f"{problems[shown]['problem']}    answer: {problems[shown]['answer']}"))
    for voice, rows in voices.items():
        show(voice, rows[shown])

    print(f"\n{len(problems)} problems".ljust(21) + "phi   phi>-1  phi>-3  phi>-5   right  tokens")
    for voice, rows in voices.items():
        lengths = [row["tokens"] for row in rows]
        line = f"{voice:17}"
        for name in ("mean_phi", "phi>-1", "phi>-3", "phi>-5"):
            of_texts = [row[name] for row in rows]
            line += f"{np.average(of_texts, weights=lengths):8.3f}"
        right = len(kept(rows)) / len(rows)
        print(line + f"{right:8.3f}{np.mean(lengths):8.1f}")


if __name__ == "__main__":
    run_script(main, Flags, hinted_decode.TOY)
