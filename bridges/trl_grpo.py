"""reward.py as a reward function of TRL's GRPOTrainer, on any number of GPUs (written against TRL 1.16).

TRL calls it with the completions (texts, or chat message lists if the prompts are chats) and with every further column of the dataset, so
the answers come as the column `answer`. The flags below make GRPO the Dr.GRPO of `prefix_rft.py --method rft`; TRL has no hybrid rollouts.

    accelerate launch --num_processes 8 -m bridges.trl_grpo Qwen/Qwen2.5-Math-1.5B train.jsonl --output_dir runs/trl_grpo \
        --loss_type dr_grpo --scale_rewards none --beta 0 --num_generations 8 --max_completion_length 3000 \
        --mask_truncated_completions --learning_rate 1e-6 --lr_scheduler_type constant --bf16 --use_vllm
"""

import sys

from datasets import Dataset
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from eval import INSTRUCTION, load_model, load_problems
from reward import rewards


def answer_reward(completions, answer, **_):
    """1.0 for every completion whose \\boxed{} means the same as its answer, else 0.0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] or "" for c in completions]
    return rewards(texts, answer)


def dataset(tokenizer, problems):
    """Rows {"prompt", "answer"}, the prompt such that TRL makes of it the tokens that eval.prompt_ids would."""
    chats = [p["problem"] if isinstance(p["problem"], list) else [{"role": "user", "content": p["problem"] + INSTRUCTION}] for p in problems]
    prompts = chats if tokenizer.chat_template else ["\n".join(turn["content"] for turn in chat) + "\n" for chat in chats]
    return Dataset.from_list([{"prompt": prompt, "answer": p["answer"]} for prompt, p in zip(prompts, problems)])


if __name__ == "__main__":
    name, data, *flags = sys.argv[1:]
    args = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(flags)[0]
    model, tokenizer = load_model(name, "cpu")                          # the Trainer moves it
    trainer = GRPOTrainer(model, answer_reward, args, train_dataset=dataset(tokenizer, load_problems(data)), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
