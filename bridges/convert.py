"""
Other people's data formats -> ours, {"problem", "solution", "answer"}, one JSON object a line.

    python bridges/convert.py in.jsonl out.jsonl          a JSONL file, a JSON array or hf://...

    alpaca             instruction, input, output
    TRL                messages; prompt and completion or chosen, also as conversations
    verl, LUFFY        prompt, target, reward_model {ground_truth}
    multiple choice    ARC (question, choices {text, label}, answerKey), MMLU (choices, answer),
                       MMLU-Pro (options, answer_index), GPQA (Question, Correct Answer, ...)

Options get the letters A, B, C ... and the answer becomes a letter. GPQA names the right option
first: its options are shuffled, by a generator seeded with the question. A row that would have
neither solution nor answer stops the program, and no file is ever overwritten.
"""

import os
import random
import sys
from pathlib import Path

# As a script Python looks for modules beside this file, in bridges/; eval.py lies one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import (ALIASES, InputError, blame, exit_on_mistake, first_alias, is_chat, read_rows,
                  to_problem, write_rows)


def convert(row):
    """A row in one of these formats, or in ours -> {"problem", "solution", "answer"}, unchecked.

    A row that lacks a key of its format raises what Python raises."""
    problem, solution, answer = [first_alias(row, key) for key in ALIASES]
    if solution is None:
        solution = row.get("target") or row.get("chosen")                # LUFFY, TRL's preferences
    if answer is None and isinstance(row.get("reward_model"), dict):     # verl
        answer = row["reward_model"]["ground_truth"]

    # Multiple choice
    if "Correct Answer" in row:                                          # GPQA
        right = row["Correct Answer"]
        options = [right] + [row[f"Incorrect Answer {i}"] for i in (1, 2, 3)]
        random.Random(row["Question"]).shuffle(options)
        problem, answer = lettered(row["Question"], options, right)
    elif isinstance(row.get("choices"), dict):                           # ARC: labels A-D or 1-4
        right = row["choices"]["label"].index(row["answerKey"])
        problem, answer = lettered(problem, row["choices"]["text"], right)
    elif row.get("options"):                                             # MMLU-Pro
        problem, answer = lettered(problem, row["options"], row.get("answer_index", answer))
    elif row.get("choices"):                                             # MMLU
        problem, answer = lettered(problem, row["choices"], answer)

    # Demonstrations
    elif problem is None and "messages" in row:                          # TRL
        problem, solution = split_chat(row["messages"])
    elif problem is None and "chosen" in row:                            # a preference, all of it
        problem, solution = split_chat(row["chosen"])
    elif problem is None and "instruction" in row:                       # alpaca
        problem, solution = row["instruction"], row["output"]
        if row.get("input"):
            problem += "\n" + row["input"]
    elif isinstance(solution, list) and isinstance(solution[-1], dict):  # TRL, a conversation
        before, solution = split_chat(solution)
        if solution is None:
            raise InputError("the completion does not end with an assistant's turn")
        if before:
            problem = problem + before
    return {"problem": problem, "solution": solution, "answer": answer}


def split_chat(turns):
    """A chat -> (what precedes the assistant's last turn, that turn's text), (all of it, None) if a
    user has the last word."""
    if not is_chat(turns):
        raise InputError('it must hold a chat: [{"role": "user", "content": "..."}]')
    if turns[-1]["role"] != "assistant":
        return turns, None
    return turns[:-1], turns[-1]["content"]


def lettered(question, options, right):
    """Multiple choice -> (problem, letter). right: an index from 0, an option or a letter; what
    could be two of these is read in this order."""
    if not isinstance(question, str):
        raise InputError("it has options and no question")
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        raise InputError("the options must be a list of 2 to 26")
    for value in [*options, right]:
        if type(value) not in (str, int, float):
            raise InputError(f"the options and the answer must be texts or numbers, not {value}")
    # Whatever right is, it becomes an index
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options)])
    if right not in range(len(options)):
        if right in options:
            right = options.index(right)
        elif right in letters:
            right = letters.index(right)
        else:
            raise InputError(f"answer {right} is no index, no option, no letter to {letters[-1]}")
    lines = [question.strip(), ""]
    for letter, option in zip(letters, options):
        lines.append(f"{letter}. {str(option).strip()}")
    lines += ["", "Answer with the letter of the right option."]
    return "\n".join(lines), letters[right]


def main(argv):
    if len(argv) != 2:
        raise InputError("give two files: python bridges/convert.py in.jsonl out.jsonl")
    if os.path.lexists(argv[1]):
        raise InputError(f"{argv[1]} exists already: name another file")
    problems = []
    for place, row in read_rows(argv[0]):
        with blame(f"{place} is not as its format has it", f"; its keys are: {', '.join(row)}",
                   (AttributeError, KeyError, TypeError, ValueError)):
            problem = to_problem(convert(row))
            if problem["solution"] is None and problem["answer"] is None:
                raise InputError("it would have neither solution nor answer")
        problems.append(problem)
    if not problems:
        raise InputError(f"{argv[0]} is empty")
    write_rows(argv[1], problems)
    print(f"{argv[1]}: {len(problems)} problems")


if __name__ == "__main__":
    exit_on_mistake(main, sys.argv[1:])
