"""
trl_grpo.py - `prefix_rft.py --method rft` in TRL's GRPOTrainer, on any number of GPUs (TRL 1.16).

TRL calls the reward with the completions (texts, or chat turns if the prompts are chats) and with
every further column of the dataset, so the right answers come as the column `answer`. The flags of
the printed line make GRPO Dr.GRPO; what no flag does is that an unfinished response earns nothing.

The command line stands in bridges/README.md.
"""

import torch

from bridges.packages import TRL, need

need(["accelerate", "trl", "datasets"], TRL)

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from bridges.trainer import run_bridge
from eval import chat_turns
from reward import rewards


def answer_reward(completions, answer, **_):
    """1.0 for every completion whose \\boxed{} means the same as its answer, else 0.0."""
    texts = []
    for completion in completions:
        if not isinstance(completion, str):
            completion = completion[-1]["content"] or ""
        texts.append(completion)
    return rewards(texts, answer)


def dataset(tokenizer, problems):
    """Rows {"prompt", "answer"}; of the prompt TRL makes the tokens that eval.prompt_ids would."""
    rows = []
    for problem in problems:
        chat = chat_turns(problem["problem"])
        text = "".join(turn["content"] + "\n" for turn in chat)
        prompt = chat if tokenizer.chat_template else text
        rows.append({"prompt": prompt, "answer": problem["answer"]})
    return Dataset.from_list(rows)


class RFTTrainer(GRPOTrainer):
    """GRPOTrainer in which a response that does not end by itself earns 0."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        reward = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finished = [ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        finished = torch.tensor(finished, dtype=torch.float, device=reward.device)      # (B,)
        return reward * self.accelerator.gather(finished)[:, None]    # (processes * B, functions)


def train(Trainer, model, tokenizer, rows, args):
    """Train on rows of dataset(), and save model and tokenizer in --output_dir."""
    trainer = Trainer(model, answer_reward, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train(args.resume_from_checkpoint)
    trainer.save_model()


def main(model, tokenizer, problems, args):
    rows = dataset(tokenizer, problems)
    train(RFTTrainer, model, tokenizer, rows, args)


if __name__ == "__main__":
    run_bridge(main, GRPOConfig, require=("answer",))
