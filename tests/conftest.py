"""What all tests share: the repository root on the path, and a small random model on disk that looks like a real one."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def word_problems(n, seed=0):
    """n arithmetic word problems as {"problem", "solution", "answer"}."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        name, thing = rng.choice(["Ada", "Emmy", "Sofia", "Alan", "Kurt"]), rng.choice(["apples", "books", "coins", "stamps"])
        a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 9)
        rows.append({"problem": f"{name} has {a} {thing} and buys {b} more. How many {thing} are in {c} such collections?",
                     "solution": f"{name} has {a} + {b} = {a + b} {thing}.\nIn {c} collections there are {c} * {a + b} = "
                                 f"{c * (a + b)} {thing}.\nThe answer is \\boxed{{{c * (a + b)}}}.",
                     "answer": str(c * (a + b))})
    return rows


def make_tokenizer(texts, vocab_size=1000):
    """A byte-level BPE trained on texts, with a ChatML template, as Qwen2's is."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    return tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Directory of a small random Qwen2 and its tokenizer, written by save_pretrained."""
    rows = word_problems(300)
    if GSM8K.exists():
        rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:1000]]
    tokenizer = make_tokenizer([row["problem"] + "\n" + row["solution"] for row in rows])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
