"""IDFT in transformers.Trainer (it needs `pip install accelerate`): one argument, `compute_loss_func`.

The Trainer counts the target tokens of the whole optimizer step, on all GPUs, and hands them over as num_items_in_batch;
so the loss is divided once, whatever --per_device_train_batch_size and --gradient_accumulation_steps are. Several GPUs:
torchrun, as in trl_sft.py. All flags of TrainingArguments apply:

    python -m bridges.trainer Qwen/Qwen2.5-0.5B-Instruct train.jsonl --output_dir runs/trainer --learning_rate 1e-5
"""

import sys
from functools import partial

from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Trainer, TrainingArguments

import idft
from eval import load_model, load_problems


def examples(model, tokenizer, problems, max_tokens=8192):
    """Problems with solutions -> a list of {"input_ids", "labels"}; the prompt is read only (-100), EOS learnt."""
    rows = idft.training_rows(model, tokenizer, problems, max_tokens)
    return [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in rows]


def idft_trainer(model, tokenizer, problems, args, **weighting):
    """A Trainer that learns the solutions of `problems` by IDFT. weighting: loss, beta, gamma_min, gamma_max, strength."""
    rows, collator = examples(model, tokenizer, problems), DataCollatorForSeq2Seq(tokenizer)
    return Trainer(model, args, train_dataset=rows, data_collator=collator,
                   compute_loss_func=partial(idft.compute_loss, **weighting))


if __name__ == "__main__":
    name, data, *flags = sys.argv[1:]
    args = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)[0]
    model, tokenizer = load_model(name, "cpu")                          # the Trainer moves it
    trainer = idft_trainer(model, tokenizer, load_problems(data, require=("solution",)), args)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(args.output_dir)
