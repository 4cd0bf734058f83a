"""
toy.py - a world that fits a laptop: arithmetic problems, an expert, a tokenizer, a tiny base model.

Every other script runs on this world when it is given no --model and no --data. It is small (111 thousand parameters,
pre-trained in about a minute on one core) and hard in the way real post-training is hard: the base model *can*
reason, but hardly ever does.

A problem is a start value and k labelled operations, all modulo 24. The answer goes into a box:

    problem            17 a +3 b *5 c -2 ?
    base's own style   think 17 a +3 20 b *5 4 c -2 2 \\boxed{2}     every step shows its value
    the expert         think 17 a +3 b *5 4 c -2 2 \\boxed{2}        right, but leaps: two operations, then a value
    what it blurts     \\boxed{9}                                    a guess: right 1 time in 24, 0.042

Pre-training shows the model, by plain next-token loss on everything after the problem:
  1. first 80 % of the steps: clean worked examples of 1 to 9 operations, without loss on the opening word `think`:
     the model learns how to reason, not when;
  2. throughout, a quarter of the text: retellings - problem, expert solution, then the same solution in the base's
     own style. hinted_decode.py needs this skill;
  3. last 20 %: what the web looks like. Easy problems come worked. Of the others half are sloppy worked examples, again
     without loss on `think`, in which 10 % of the values are wrong and before each step there is a 60 % chance to give
     up and box the answer; the rest are, 97 times in 100, the bare boxed answer.

So on hard problems the base opens with `think` a few times in a hundred and then rarely gets to the end. Reinforcement
learning alone has little to reinforce, supervised learning copies leaps that the model cannot do, and a prefix of
a demonstration puts the model just where its own skill takes over.

Accuracy of the base, 256 problems a split; mean and standard deviation over base models of seeds 0 to 4; guessing
gives 0.042:

    split    operations                                        greedy           temperature 1    opens with `think`
    train    4 to 7       what training sees
    hard     4 to 7       held out: no problem is in both      0.037 +- 0.011   0.041 +- 0.003   0.025 +- 0.010
    longer   8 to 9       longer than any training problem     0.046 +- 0.013   0.037 +- 0.005   0.026 +- 0.015
    easy     1 to 2       shows what training forgets          0.997 +- 0.007   0.599 +- 0.084   0.772 +- 0.060

    python toy.py         print the four kinds of text, pre-train the base, show what it would write
"""

import hashlib
import os
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)
from transformers import __version__ as transformers_version

MOD = 24
LABELS = "abcdefghijkl"
OPERATIONS = [f"+{i}" for i in range(1, 10)] + [f"-{i}" for i in range(1, 10)] + ["*5", "*7"]
SPLITS = {"train": (4, 7), "hard": (4, 7), "longer": (8, 9), "easy": (1, 2)}         # operations in a problem
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}"
LEAP = 0.5                                                                           # how often the expert leaps


# ---- problems and solutions --------------------------------------------------------------------------------

def apply(value, operation):
    """One step modulo 24: apply(20, "*5") = 4."""
    number = int(operation[1:])
    return (value * number if operation[0] == "*" else value + number if operation[0] == "+" else value - number) % MOD


def draw(rng, k):
    """A start value and k operations."""
    return rng.randrange(MOD), [rng.choice(OPERATIONS) for _ in range(k)]


def problem_text(start, operations):
    return " ".join([str(start)] + [f"{label} {op}" for label, op in zip(LABELS, operations)] + ["?"])


def solution_text(rng, start, operations, leap=0.0, wrong=0.0, give_up=0.0):
    """A worked solution. leap: chance to skip a value; wrong: chance that a value is false (the rest builds on it);
    give_up: chance, before each step, to box the true answer at once."""
    answer = start
    for op in operations:
        answer = apply(answer, op)
    words, value, skipped = ["think", str(start)], start, False
    for i, (label, op) in enumerate(zip(LABELS, operations)):
        if rng.random() < give_up:
            return " ".join(words + [f"\\boxed{{{answer}}}"])
        value = apply(value, op)
        if rng.random() < wrong:
            value = (value + rng.randrange(1, MOD)) % MOD
        skipped = not skipped and i + 1 < len(operations) and rng.random() < leap
        words += [label, op] + ([] if skipped else [str(value)])
    return " ".join(words + [f"\\boxed{{{value}}}"])


def problems(split, n=256, seed=0, wrong=0.0):
    """n problems (default 256) of a split as {"problem", "solution", "answer"}; another seed, other problems.

    wrong: share of demonstrations that end in a false answer. No training problem occurs in another split.
    ValueError on an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"the toy has no split {split!r}; choose one of {', '.join(SPLITS)}")
    rng, rows, seen = random.Random(f"{split} {seed}"), [], set()
    while len(rows) < n:
        start, operations = draw(rng, rng.randint(*SPLITS[split]))
        text = problem_text(start, operations)
        held_out = hashlib.sha256(text.encode()).digest()[0] < 128           # half of all problems are never trained on
        if text in seen or (split in ("train", "hard") and held_out == (split == "train")):
            continue
        seen.add(text)
        value = start
        for op in operations:
            value = apply(value, op)
        solution = solution_text(rng, start, operations, leap=LEAP)
        if rng.random() < wrong:                                             # a slip, carried on to a false answer
            while f"\\boxed{{{value}}}" in solution:
                solution = solution_text(rng, start, operations, leap=LEAP, wrong=1 / len(operations))
        rows.append({"problem": text, "solution": solution, "answer": str(value)})
    return rows


# ---- the tokenizer -----------------------------------------------------------------------------------------

def tokenizer():
    """A real PreTrainedTokenizerFast: one token a word, `\\boxed{` and `}` split off, a chat template, an end token.

    The instruction that is appended to every problem reads as nothing here, so that the toy takes exactly the code
    path of a real model."""
    words = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<hint>", "think", "\\boxed{", "}", "?"]
    words += [str(i) for i in range(MOD)] + list(LABELS) + OPERATIONS
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(INSTRUCTION, "")
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                 pre_tokenizers.Split(Regex(r"\\boxed\{|\}"), "isolated")])
    tok.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(),
                                     decoders.Replace("\\boxed{ ", "\\boxed{"), decoders.Replace(" }", "}")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>", pad_token="<pad>", unk_token="<unk>",
                                   additional_special_tokens=["<user>", "<assistant>", "<hint>"],
                                   clean_up_tokenization_spaces=False)
    fast.chat_template = ("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} "
                          "{% if m['role'] == 'assistant' %}<end> {% endif %}{% endfor %}"
                          "{% if add_generation_prompt %}<assistant>{% endif %}")
    return fast


def hint_prompt(tok, problem, solution):
    """The hinted context: token ids of problem and reference solution, up to where the model's own telling begins."""
    return tok.encode(f"<user> {problem} <hint> {solution} <assistant>", add_special_tokens=False)


# ---- the base model ----------------------------------------------------------------------------------------

def pretraining_text(rng, progress):
    """(context, response, whether its first token is trained) at a point `progress` in [0, 1) of pre-training."""
    web = progress >= 0.8
    easy = web and rng.random() < 0.25
    start, operations = draw(rng, rng.randint(1, 2 if easy else min(9, 2 + int(16 * progress))))     # short ones first
    problem, own = problem_text(start, operations), solution_text(rng, start, operations)
    if rng.random() < 0.25:                                                                          # a retelling
        expert = solution_text(rng, start, operations, leap=LEAP)
        return f"<user> {problem} <hint> {expert} <assistant>", own, True
    context = f"<user> {problem} <assistant>"
    if not web or easy:
        return context, own, easy
    if rng.random() < 0.5:                                                                           # sloppy
        return context, solution_text(rng, start, operations, wrong=0.1, give_up=0.6), False
    return context, own if rng.random() < 0.03 else own[own.index("\\boxed"):], True                 # a bare guess


def pretrain(seed=0, steps=1300, batch=32, lr=4e-3, width=64, layers=2, heads=4, ffn=192):
    """Plain next-token prediction from scratch; 1,300 steps take about a minute on one core -> (model, tokenizer).

    A Llama with biases, which is a Qwen2 in all but name: for a checkpoint named qwen2, AutoTokenizer of transformers 5
    would put Qwen's own tokenizer in the place of ours."""
    tok, rng = tokenizer(), random.Random(seed)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=heads, attention_bias=True, intermediate_size=ffn,
                         max_position_embeddings=256, tie_word_embeddings=True,
                         initializer_range=0.1,          # the usual 0.02 needs twice the steps at this width
                         eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):              # initial weights from `seed`, global state untouched
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in tqdm(range(steps), desc="pre-training the toy base, once", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50, 0.05 + 1.5 * (1 - step / steps))
        rows = [pretraining_text(rng, step / steps) for _ in range(batch)]
        contexts = tok([row[0] for row in rows], add_special_tokens=False)["input_ids"]
        responses = tok([row[1] + " <end>" for row in rows], add_special_tokens=False)["input_ids"]
        length = max(len(c) + len(r) for c, r in zip(contexts, responses))
        ids, labels = torch.full((batch, length), tok.pad_token_id), torch.full((batch, length), -100)   # (B, T)
        for i, (c, r, (_, _, train_first)) in enumerate(zip(contexts, responses, rows)):
            ids[i, :len(c) + len(r)] = torch.tensor(c + r)
            labels[i, len(c) + (not train_first):len(c) + len(r)] = torch.tensor(r[not train_first:])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), tok


def base_model(seed=0):
    """The pre-trained toy base as (model in eval mode, tokenizer), made on first use and kept in the user's cache
    folder under a name that hashes everything it depends on: this file, the seed and the library versions.

    From here on PyTorch uses one thread: so small a model gains nothing from more, waits long for one that is busy
    elsewhere, and with one thread its sums do not depend on how many cores the machine has."""
    torch.set_num_threads(1)
    versions = f"{seed} {torch.__version__} {transformers_version}"
    key = hashlib.sha256(Path(__file__).read_bytes() + versions.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefix-rft-toy"
    folder = cache / key
    if not (folder / "config.json").exists():
        model, tok = pretrain(seed)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:      # whole or not at all, also with two programs
                model.save_pretrained(Path(scratch) / "base")
                tok.save_pretrained(Path(scratch) / "base")
                os.rename(Path(scratch) / "base", folder)
        except OSError:
            return model, tok                                            # no place to keep it, or the other was first
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main():
    """Show the texts, and what the base would do with them: all exact probabilities, nothing sampled."""
    rng = random.Random(0)
    start, operations = draw(rng, 5)
    print(f"problem     {problem_text(start, operations)}\n"
          f"own style   {solution_text(rng, start, operations)}\n"
          f"expert      {solution_text(rng, start, operations, leap=LEAP)}\n"
          f"sloppy      {solution_text(rng, start, operations, wrong=0.1, give_up=0.6)}\n")
    model, tok = base_model()
    print(f"the base: {sum(p.numel() for p in model.parameters()):,} parameters\n")
    print("mean probability of      `think`   then the rest of its own solution   all of it, with the expert's hint")
    for split in SPLITS:
        rows = problems(split, 100)
        table = []
        for row in rows:
            numbers = row["problem"].split()
            own = solution_text(rng, int(numbers[0]), numbers[2::2])
            plain = tok.encode(f"<user> {row['problem']} <assistant>", add_special_tokens=False)
            response = tok.encode(own + " <end>", add_special_tokens=False)
            logp = []
            for context in (plain, hint_prompt(tok, row["problem"], row["solution"])):
                with torch.no_grad():
                    logits = model(torch.tensor([context + response])).logits[0, len(context) - 1:-1]  # (T, V)
                logp.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])   # (T,)
            table.append([logp[0][0].exp(), logp[0][1:].sum().exp(), logp[1].sum().exp()])
        print("{:22} {:9.3f} {:35.3f} {:42.3f}".format(split, *torch.tensor(table).mean(0).tolist()))


if __name__ == "__main__":
    main()
