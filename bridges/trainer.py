"""
trainer.py - IDFT in transformers.Trainer, on any number of GPUs: one argument, compute_loss_func.

The Trainer counts the target tokens of the whole optimizer step, on all GPUs, and hands them over
as num_items_in_batch; so the loss is divided once, whatever --per_device_train_batch_size and
--gradient_accumulation_steps are. Needs `pip install accelerate`.

The command lines, of this and of the other bridges, stand in bridges/README.md; a test runs them.
"""

from functools import partial
from pathlib import Path

from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Trainer, TrainingArguments

import idft
from bridges.packages import TRAINER, TRL_VLLM, need
from eval import InputError, blame, exit_on_mistake, load_model, load_problems, refuse

need(["accelerate"], TRAINER)


def run_bridge(main, Config, require):
    """python -m bridges.X MODEL DATA, and flags of the dataclass Config -> calls main(model,
    tokenizer, problems, args). require: keys that every problem must have. A user's mistake becomes
    one sentence and exit code 2."""
    parser = HfArgumentParser(Config, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("model", help="toy, a checkpoint directory or a Hub id")
    parser.add_argument("data", help="toy, a JSON(L) file or hf://owner/name/file.jsonl")

    def run():
        with blame("the flags", errors=(ValueError, TypeError)):       # that contradict each other
            args, given = parser.parse_args_into_dataclasses(look_for_args_file=False)
        if getattr(args, "use_vllm", False):
            need(["vllm"], TRL_VLLM)
        check_checkpoint(args.resume_from_checkpoint)
        problems = load_problems(given.data, require, args.seed)
        model, tokenizer = load_model(given.model, "cpu")            # the Trainer moves it
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        main(model, tokenizer, problems, args)

    exit_on_mistake(run)


def check_checkpoint(folder):
    """InputError unless a run of the Trainer can go on from `folder`; None is a new run."""
    if folder is not None and not (Path(folder) / "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {folder} holds no trainer_state.json: give a "
                         "folder checkpoint-N in the --output_dir of an earlier run")


def examples(model, tokenizer, problems, max_tokens=8192):
    """Problems with solutions -> a list of {"input_ids", "labels"}; the prompt is read only (-100),
    the end of the text is learnt."""
    rows = []
    for prompt, response in idft.demonstration_rows(model, tokenizer, problems, max_tokens):
        labels = [-100] * len(prompt) + response
        rows.append({"input_ids": prompt + response, "labels": labels})
    return rows


def idft_trainer(model, tokenizer, problems, args, **weighting):
    """A Trainer that learns the solutions of `problems` by IDFT. weighting: keywords of
    idft.compute_loss (loss, beta, gamma_min, gamma_max, strength)."""
    return Trainer(model, args, train_dataset=examples(model, tokenizer, problems),
                   data_collator=DataCollatorForSeq2Seq(tokenizer),
                   compute_loss_func=partial(idft.compute_loss, **weighting))


def main(model, tokenizer, problems, args):
    trainer = idft_trainer(model, tokenizer, problems, args)
    trainer.train(args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    run_bridge(main, TrainingArguments, require=("solution",))
