"""
voices.py - the same problems told in several voices: how foreign is a text, and is it right?

The demonstration, the same retold by hinted decoding at several beta (0 is self-distillation), and
the toy's own answers at temperature 1. phi, and its shares above -1, -3 and -5, are means over
tokens under the plain context; in the model's own voice phi is zero.

    python -m experiments.voices
"""

import numpy as np
import torch

import hinted_decode
import toy
from eval import demo_ids, load_model, printable, prompt_ids
from sampler import Sample


def main(count=256, betas=(0.0, 3.0, 30.0, 300.0)):
    flags = hinted_decode.Flags(**hinted_decode.TOY)
    model, tokenizer = load_model("toy", torch.device("cpu"))
    problems = toy.problems("train", count)
    writer = hinted_decode.Writer(model, tokenizer, problems, flags)

    # The same problems in every voice.
    prompts, demos = [], []
    for problem in problems:
        prompts.append(prompt_ids(tokenizer, problem["problem"]))
        demos.append(Sample(demo_ids(tokenizer, problem["solution"]), finished=True))
    voices = {"demonstration": writer.judge(problems, demos, "demonstration")}
    for beta in betas:
        flags.beta = beta
        voices[f"hinted, beta {beta:g}"] = writer.retell(problems)
    own = writer.write(writer.alone, prompts, temperature=1.0)
    voices["own, T = 1"] = writer.judge(problems, own, "own")

    # The problem whose texts differ most.
    def different(i):
        return len({rows[i]["solution"] for rows in voices.values()})
    shown = max(range(len(problems)), key=different)
    print(f"{problems[shown]['problem']}    answer: {problems[shown]['answer']}")
    for voice, rows in voices.items():
        print(f"\n{voice}, mean phi {rows[shown]['mean_phi']:+.2f}")
        print("    " + printable(rows[shown]["solution"]))

    print(f"\n{len(problems)} problems".ljust(21) + "phi   phi>-1  phi>-3  phi>-5   right  tokens")
    for voice, rows in voices.items():
        lengths = [row["tokens"] for row in rows]
        line = f"{voice:17}"
        for name in ("mean_phi", "phi>-1", "phi>-3", "phi>-5"):
            of_texts = [row[name] for row in rows]
            line += f"{np.average(of_texts, weights=lengths):8.3f}"
        right = len(hinted_decode.kept(rows)) / len(rows)
        print(line + f"{right:8.3f}{np.mean(lengths):8.1f}")


if __name__ == "__main__":
    main()
