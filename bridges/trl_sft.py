"""
trl_sft.py - IDFT in TRL's SFTTrainer, on any number of GPUs (TRL 1.16).

SFTTrainer takes compute_loss_func, too, but announces that 2.0 will not, and reads every batch
twice then. The compute_loss of its parent, Trainer, calls the function once and knows how to divide
over micro-batches and GPUs. Leave --use_liger_kernel off, it never makes the logits.

The command line stands in bridges/README.md.
"""

from functools import partial

from bridges.packages import TRL, need

need(["accelerate", "trl", "datasets"], TRL)

from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

import idft
from bridges.trainer import examples, run_bridge


class IDFTTrainer(SFTTrainer):
    """SFTTrainer with the loss of idft.py. weighting: keywords of idft.compute_loss (loss, beta,
    gamma_min, gamma_max, strength)."""

    def __init__(self, *args, weighting={}, **kwargs):
        super().__init__(*args, **kwargs)
        self.compute_loss_func = partial(idft.compute_loss, **weighting)

    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)


def main(model, tokenizer, problems, args):
    rows = examples(model, tokenizer, problems, args.max_length)
    trainer = IDFTTrainer(model, args, train_dataset=Dataset.from_list(rows),
                          processing_class=tokenizer)
    trainer.train(args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    run_bridge(main, SFTConfig, require=("solution",))
