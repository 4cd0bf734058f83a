"""What all tests share: the root on the path, small models that look like real ones, scripts run in
process, and the toy's base model, which is pre-trained beside the other tests."""

import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


# ---- the toy's base model -----------------------------------------------------------------------

pretraining = None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Tests that need the base come last."""
    items.sort(key=lambda item: "toy_base" in item.fixturenames)


def pytest_collection_finish(session):
    """Pre-training takes minutes on one core, so it starts at once, in a process beside the tests,
    which leaves the model in the user's cache. Without a test that needs it nothing starts."""
    global pretraining
    wanted = any("toy_base" in item.fixturenames for item in session.items)
    if wanted and not session.config.option.collectonly:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pretraining = subprocess.Popen(
            [sys.executable, "-c", "import toy; toy.base_model(0)"], cwd=ROOT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pytest_sessionfinish():
    if pretraining:
        pretraining.kill()              # does nothing if it is done


@pytest.fixture(scope="session")
def toy_base():
    """toy.base_model(0), as soon as it is there. Tests that train it train a copy."""
    import toy
    pretraining.wait()
    return toy.base_model(0)


# ---- small models -------------------------------------------------------------------------------

def small_model(kind="llama", seed=0, vocab_size=40, **config):
    """Random, two layers, with weights so wide that no two tokens look alike."""
    Config, Model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM),
                     "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(Config(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **config)).eval()


def recompute_activations(model):
    """In the backward pass, by whatever name this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


def word_problems(n, seed=0):
    """n arithmetic word problems as {"problem", "solution", "answer"}."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        name = rng.choice(["Ada", "Emmy", "Sofia", "Alan", "Kurt"])
        thing = rng.choice(["apples", "books", "coins", "stamps"])
        a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 9)
        rows.append({"problem": f"{name} has {a} {thing} and buys {b} more. "
                                f"How many {thing} are in {c} such collections?",
                     "solution": f"{name} has {a} + {b} = {a + b} {thing}.\nIn {c} collections "
                                 f"there are {c} * {a + b} = {c * (a + b)} {thing}.\n"
                                 f"The answer is \\boxed{{{c * (a + b)}}}.",
                     "answer": str(c * (a + b))})
    return rows


def make_tokenizer(texts, vocab_size=1000):
    """A byte-level BPE trained on texts, with a ChatML template, as Qwen2's is."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    return tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Directory of a small random Qwen2 and its tokenizer, written by save_pretrained."""
    texts = [row["problem"] + "\n" + row["solution"] for row in word_problems(300)]
    tokenizer = make_tokenizer(texts)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def small_base():
    """A toy base after seconds of pre-training: it writes texts that end. Train only copies."""
    import toy
    return toy.pretrain(seed=0, steps=60)


@pytest.fixture
def slabs(monkeypatch):
    """The widths of all samplers that are built, one after the other."""
    import eval
    widths = []

    class Spy(eval.Sampler):
        def __init__(self, model, rows, *more):
            widths.append(rows)
            super().__init__(model, rows, *more)

    monkeypatch.setattr(eval, "Sampler", Spy)
    return widths


@pytest.fixture(autouse=True)
def one_thread():
    """A resumed run takes as many threads as it began with; the next test has one again."""
    yield
    torch.set_num_threads(1)


# ---- scripts ------------------------------------------------------------------------------------

def run_here(script, *argv):
    """`python script.py argv` in this process. script: the module."""
    import eval
    with mock.patch.object(sys, "argv", [script.__name__, *(str(a) for a in argv)]):
        eval.run_script(script.main, script.Flags, getattr(script, "TOY", {}),
                        getattr(script, "METHODS", {}))


def refusal(capsys, script, *argv):
    """The one sentence with which a script refuses; the bars before it wiped themselves out."""
    with pytest.raises(SystemExit) as stop:
        run_here(script, *argv)
    assert stop.value.code == 2
    line = capsys.readouterr().err.rstrip().splitlines()[-1].split("\r")[-1]
    assert line.startswith("error: ")
    return line
