"""reward.py as a reward function of TRL's GRPOTrainer, on any number of GPUs (written against TRL 1.16).

TRL calls it with the completions (texts, or chat message lists if the prompts are chats) and with every further column
of the dataset, so the answers come as the column `answer`. The flags below make GRPO the Dr.GRPO of `prefix_rft.py
--method rft`; TRL has no hybrid rollouts. All flags of GRPOConfig apply:

    torchrun --nproc_per_node 8 -m bridges.trl_grpo Qwen/Qwen2.5-Math-1.5B train.jsonl --output_dir runs/trl_grpo \
        --loss_type dr_grpo --scale_rewards none --beta 0 --num_generations 8 \
        --max_completion_length 3000 --mask_truncated_completions --learning_rate 1e-6 --lr_scheduler_type constant \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 16 --bf16 --use_vllm --vllm_mode colocate
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
    rows = []
    for p in problems:
        plain = isinstance(p["problem"], str)
        chat = [{"role": "user", "content": p["problem"] + INSTRUCTION}] if plain else p["problem"]
        text = "\n".join(turn["content"] for turn in chat) + "\n"
        rows.append({"prompt": chat if tokenizer.chat_template else text, "answer": p["answer"]})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    name, data, *flags = sys.argv[1:]
    args = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(flags)[0]
    model, tokenizer = load_model(name, "cpu")                          # the Trainer moves it
    rows = dataset(tokenizer, load_problems(data))
    trainer = GRPOTrainer(model, answer_reward, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
