"""IDFT in TRL's SFTTrainer, on any number of GPUs (written against TRL 1.16).

SFTTrainer takes compute_loss_func=functools.partial(idft.compute_loss, ...), too, but announces that 2.0 will not, and
reads every batch twice then. The compute_loss of its parent, Trainer, calls the function once and knows how to divide
over micro-batches and GPUs. Leave --use_liger_kernel off, it never makes the logits. All flags of SFTConfig apply:

    torchrun --nproc_per_node 8 -m bridges.trl_sft Qwen/Qwen2.5-Math-1.5B-Instruct train.jsonl --output_dir runs/trl_sft \
        --learning_rate 2e-5 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_length 4096 --bf16
"""

import sys
from functools import partial

from datasets import Dataset
from transformers import HfArgumentParser, Trainer
from trl import SFTConfig, SFTTrainer

import idft
from bridges.trainer import examples
from eval import load_model, load_problems


class IDFTTrainer(SFTTrainer):
    """SFTTrainer with the loss of idft.py; `weighting` are keywords of idft.token_weight (loss, beta, gamma_min, ...)."""

    def __init__(self, *args, weighting={}, **kwargs):
        super().__init__(*args, **kwargs)
        self.compute_loss_func = partial(idft.compute_loss, **weighting)

    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)


if __name__ == "__main__":
    name, data, *flags = sys.argv[1:]
    args = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(flags)[0]
    model, tokenizer = load_model(name, "cpu")                          # the Trainer moves it
    rows = examples(model, tokenizer, load_problems(data, require=("solution",)), args.max_length)
    trainer = IDFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
