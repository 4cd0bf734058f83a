"""
verl_data.py - problems as the parquet files that verl reads: train.parquet with solutions for the
agent loop of bridges/verl.py, test.parquet without, because the loop is not told that it validates.

    python -m bridges.verl_data train.jsonl test.jsonl DIRECTORY
"""

import sys
from pathlib import Path

from bridges.packages import VERL, need

need(["datasets"], VERL)

from datasets import Dataset

from eval import InputError, chat_turns, demonstrations, exit_on_mistake, load_problems


def dataset_rows(problems, with_solutions):
    """Problems -> rows as verl's RLHFDataset reads them."""
    rows = []
    for index, problem in enumerate(problems):
        solutions = demonstrations(problem) if with_solutions else []
        rows.append({"data_source": "prefix_rft",
                     "prompt": chat_turns(problem["problem"]),
                     "reward_model": {"ground_truth": problem["answer"]},
                     "extra_info": {"index": index, "solutions": solutions}})
    return rows


def main(words):
    if len(words) != 3:
        raise InputError("give three: python -m bridges.verl_data train.jsonl test.jsonl DIRECTORY")
    train, test = load_problems(words[0]), load_problems(words[1])
    out = Path(words[2])
    out.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(dataset_rows(train, True)).to_parquet(out / "train.parquet")
    Dataset.from_list(dataset_rows(test, False)).to_parquet(out / "test.parquet")


if __name__ == "__main__":
    exit_on_mistake(main, sys.argv[1:])
