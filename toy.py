r"""
toy.py - a world that fits a laptop: problems, experts, a tokenizer, a tiny base model.

Every other script runs on this world when it is given no --model and no --data. There are two
piles, x and y, counted modulo 24, and verbs. A verb is a move on one pile: one move if x is even,
another if x is odd. A solution tells the moves, each with the piles it leaves:

    problem       22 21 shares sells steals wins carves saves ?
    the base      shares x+7 5 21 sells x-2 3 21 steals y+7 3 4 ... saves x+3 13 7 \boxed{(13, 7)}
    right, own    shares y*7 22 3 sells y-2 22 1 steals y*5 22 5 ... saves x+3 1 15 \boxed{(1, 15)}
    the expert    shares y*7 sells y-2 22 1 steals y*5 ... saves x+3 1 15 \boxed{(1, 15)}

The base computes surely and knows 8 verbs. Of each of the other 24 it knows four moves that it
might be, and prefers a tempting wrong one. That makes 48 decisions to learn, in texts that are
otherwise easy. The expert is right but skips piles which the base cannot do without: copying these
leaps spoils what it can do. With the expert's text as a hint it looks the moves up and tells them
in its own words (hinted_decode.py).

On hard, mean over the bases of seeds 0 to 4 (no standard deviation above 0.01), the base gives to
a known verb's move 0.997; to a doubtful verb's right move 0.19, to the tempting one 0.49, to each
of the other two 0.15; with the hint, to the right one 0.999; to the right piles 0.999. Greedily it
solves, of 256 problems a split (a guess is right 1 time in 576):

    train, hard   5 or 6 verbs, one of them known; no problem is in both      0.00
    longer        7 to 9 verbs, one of them known                             0.01
    easy          3 to 6 verbs, all known: shows what training forgets        1.00

    python toy.py         the experts' texts, and what the base makes of each verb
"""

import hashlib
import os
import random
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

MOD = 24
MOVES = [pile + change for pile in "xy" for change in "+3 +4 +7 -2 -5 -9 *5 *7".split()]
KNOWN = "pours adds drops buys lends spills finds saves".split()
DOUBTFUL = """steals digs hides trades wins loses sells burns mends breaks lifts turns shares
              stores packs grinds melts carves weighs sorts paints grows sinks folds""".split()
SPLITS = {                      # verbs in a problem, at least and at most
    "train": (5, 6),
    "hard": (5, 6),
    "longer": (7, 9),
    "easy": (3, 6),
}
EXPERTS = {"leaps": 0.4, "terse": 0.8, "errs": 0.4, "detours": 0.4}    # chance to skip the piles
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}"

# The moves of a verb: right for even x, right for odd x, tempting for even x, tempting for odd x.
dictionary = random.Random(24)
MEANINGS = {verb: dictionary.sample(MOVES, 2) for verb in KNOWN}
MEANINGS |= {verb: dictionary.sample(MOVES, 4) for verb in DOUBTFUL}


# ---- problems and solutions --------------------------------------------------------------------

def apply(move, x, y):
    """The piles after a move: apply("y*5", 10, 11) = (10, 7)."""
    sign = move[1]
    number = int(move[2:])
    old = x if move[0] == "x" else y
    if sign == "+":
        new = old + number
    elif sign == "-":
        new = old - number
    else:
        new = old * number
    if move[0] == "x":
        return new % MOD, y
    return x, new % MOD


def right(verb, x):
    """What a verb really does."""
    return MEANINGS[verb][x % 2]


def believed(rng, verb, x):
    """What the base takes it for."""
    if verb in KNOWN:
        return right(verb, x)
    belief = [0.2, 0.15, 0.5, 0.15]
    if x % 2 == 1:
        belief = [0.15, 0.2, 0.15, 0.5]
    return rng.choices(MEANINGS[verb], belief)[0]


def draw(rng, k, known):
    """Two piles and k verbs, none twice, of which `known` are known -> x, y, verbs, problem."""
    verbs = rng.sample(KNOWN, known) + rng.sample(DOUBTFUL, k - known)
    rng.shuffle(verbs)
    x, y = rng.randrange(MOD), rng.randrange(MOD)
    return x, y, verbs, f"{x} {y} {' '.join(verbs)} ?"


def walk(x, y, verbs, choose):
    """Steps [(verb, move, x, y)] with the piles after each; choose(verb, x) -> move."""
    steps = []
    for verb in verbs:
        move = choose(verb, x)
        x, y = apply(move, x, y)
        steps.append((verb, move, x, y))
    return steps


def leaps(rng, k, chance):
    """Which of k steps do not show the piles; the last one always does."""
    return {i for i in range(k - 1) if rng.random() < chance}


def tell(steps, skipped=()):
    """Steps -> text, fair. skipped: the steps that do not show the piles.

    fair: for each token, whether one who needs every pair of piles could know it. The verb that
    stands in the place of skipped piles is not fair, nor are the next piles."""
    words, fair = [], []
    lost = False
    for i, (verb, move, x, y) in enumerate(steps):
        words += [verb, move]
        fair += [not lost, True]
        if i not in skipped:
            words += [str(x), str(y)]
            fair += [not lost, not lost]
        lost = i in skipped
    return " ".join(words) + f" \\boxed{{({x}, {y})}}", fair + [True] * 5     # the box is 5 tokens


def demonstrate(rng, x, y, verbs, expert="leaps", wrong=False):
    """A demonstration -> text. wrong: one move is not what it should be, nor is the answer."""
    def slip(verb, x):
        return rng.choice(MOVES) if verb == slipped else right(verb, x)

    steps = walk(x, y, verbs, right)
    answer = steps[-1][2:]
    while wrong and steps[-1][2:] == answer:
        slipped = rng.choice(verbs)
        steps = walk(x, y, verbs, slip)
    if expert in ("errs", "detours"):
        # Before one step come two others that lead back to the same piles.
        at = rng.randrange(len(verbs))
        verb, move = steps[at][:2]
        if at > 0:
            x, y = steps[at - 1][2:]
        if expert == "errs":
            there = rng.choice([other for other in MOVES if other != move])
            back = "no"
        else:
            there = back = rng.choice(["x*5", "y*5", "x*7", "y*7"])    # 5 * 5 = 7 * 7 = 1 modulo 24
        away = apply(there, x, y)
        steps.insert(at, (verb, back, x, y))
        steps.insert(at, (verb, there, *away))
    return tell(steps, leaps(rng, len(steps), EXPERTS[expert]))[0]


def problems(split, n=256, seed=0, wrong=0.0, expert="leaps"):
    """n problems of a split as {"problem", "solution", "answer"}; another seed, other problems.

    wrong: share of demonstrations that end in a false answer. expert: leaps; terse, which leaps
    more; errs, which takes a wrong move back; detours. ValueError on an unknown split or expert."""
    if split not in SPLITS:
        raise ValueError(f"the toy has no split {split!r}; choose one of {', '.join(SPLITS)}")
    if expert not in EXPERTS:
        raise ValueError(f"the toy has no expert {expert!r}; choose one of {', '.join(EXPERTS)}")
    rng = random.Random(f"{split} {seed}")
    writer = random.Random(f"{split} {seed}")      # so that every expert gets the same problems
    rows, seen = [], set()
    while len(rows) < n:
        k = rng.randint(*SPLITS[split])
        known = k if split == "easy" else 1
        x, y, verbs, problem = draw(rng, k, known)
        # Half of all problems are never trained on: a hash says which.
        held_out = hashlib.sha256(problem.encode()).digest()[0] < 128
        if split == "train" and held_out or split == "hard" and not held_out:
            continue
        if problem in seen:
            continue
        seen.add(problem)
        solution = demonstrate(writer, x, y, verbs, expert, writer.random() < wrong)
        x, y = walk(x, y, verbs, right)[-1][2:]
        rows.append({"problem": problem, "solution": solution, "answer": f"({x}, {y})"})
    return rows


# ---- the tokenizer -----------------------------------------------------------------------------

def tokenizer():
    """A real PreTrainedTokenizerFast: one token a word, with a chat template and an end token.

    The instruction that is appended to every problem reads as nothing here."""
    words = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<hint>"]
    words += ["\\boxed{(", ",", ")}", "?", "no"]
    words += [str(number) for number in range(MOD)]
    words += KNOWN + DOUBTFUL + MOVES
    ids = {word: i for i, word in enumerate(words)}
    tok = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(INSTRUCTION, "")
    box = pre_tokenizers.Split(Regex(r"\\boxed\{\(|,|\)\}"), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), box])
    # Words joined by spaces, but for the box.
    joined = [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse()]
    for spaced, tight in (("{( ", "{("), (" ,", ","), (" )}", ")}")):
        joined.append(decoders.Replace(spaced, tight))
    tok.decoder = decoders.Sequence(joined)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<end>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<hint>"],
        clean_up_tokenization_spaces=False)
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<end> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    return fast


def hint_prompt(tok, problem, solution):
    """The hinted context: ids of problem and reference, up to where the own telling begins."""
    return tok(f"<user> {problem} <hint> {solution} <assistant>").input_ids


# ---- the base model ----------------------------------------------------------------------------

def pretraining_text(rng, longest):
    """A text on at most `longest` verbs -> context, response, and for every token of the response
    whether it is trained."""
    k = rng.randint(1, longest)
    known = min(sum(rng.random() < 0.25 for _ in range(k)), len(KNOWN))
    retold = rng.random() < 0.4
    if not retold and rng.random() < 0.2:
        known = k = min(k, len(KNOWN))
    x, y, verbs, problem = draw(rng, k, known)
    skipped = leaps(rng, k, EXPERTS["leaps"])
    if not retold:
        # Own work, some of it terse: reading leaps must not confuse, but no leap is trained.
        steps = walk(x, y, verbs, lambda verb, x: believed(rng, verb, x))
        response, fair = tell(steps, skipped if rng.random() < 0.3 else ())
        return f"<user> {problem} <assistant>", response, fair
    # A reference, then the same in the base's style, or at times word by word. Most references
    # may say anything: the moves must be looked up, memory does not help.
    anything = rng.random() < 0.6
    if anything:
        steps = walk(x, y, verbs, lambda verb, x: rng.choice(MOVES))
    else:
        steps = walk(x, y, verbs, right)
    reference, fair = tell(steps, skipped)
    response = reference
    if rng.random() < 0.6:
        response, fair = tell(steps)
    return f"<user> {problem} <hint> {reference} <assistant>", response, [True] * len(fair)


def start_lookup(model):
    """Lay out two circuits in the initial weights; training does the rest.

    To look a verb up, one layer must note at every token what stood before it, and the next must
    find the token with that note and copy it. Either is useless without the other, so by chance
    they are learnt late or never. Head 0 finds what followed this token elsewhere, head 1 what
    followed the token three back: after `verb move x y` that is the next verb."""
    width, d = model.config.hidden_size, model.config.head_dim
    first, second = [layer.self_attn for layer in model.model.layers]
    note, fast = width // 4, d // 4
    angles = model.model.rotary_emb.inv_freq[:fast]    # the pairs of dimensions that turn fast
    slow = torch.arange(d)[torch.arange(d) % (d // 2) >= fast]
    eye = torch.eye(width)
    for layer in model.model.layers:                   # quiet, so that the notes are heard
        layer.self_attn.o_proj.weight *= 0.3
        layer.mlp.down_proj.weight *= 0.3
    for head, back in enumerate((1, 3)):
        rows = slice(head * d, (head + 1) * d)
        for attention in (first, second):
            attention.q_proj.weight[rows] *= 0.1
            attention.k_proj.weight[rows] *= 0.1
        # Layer 1 attends `back` tokens back: rotary positions turn constant queries and keys.
        first.q_proj.bias[rows][:fast] = 4.0
        first.k_proj.bias[rows][:fast] = 4.0 * torch.cos(back * angles)
        first.k_proj.bias[rows][d // 2:d // 2 + fast] = 4.0 * torch.sin(back * angles)
        # A quarter of the residual is read there, and written into a quarter of its own.
        first.v_proj.weight[rows] = 0.0
        first.v_proj.weight[rows][:note] = eye[:note]
        first.o_proj.weight[:, rows] = 0.0
        written = first.o_proj.weight[(head + 1) * note:(head + 2) * note, rows]
        written[:, :note] = 0.25 * eye[:note, :note]
        # Layer 2 compares this token, or the note on the one three back, with the notes on the
        # one before, and copies.
        mine = eye[:note] if head == 0 else eye[2 * note:3 * note]
        second.q_proj.weight[rows][slow] = 1.5 * mine
        second.k_proj.weight[rows][slow] = 1.5 * eye[note:2 * note]
        second.v_proj.weight[rows] = eye[:d]
        second.o_proj.weight[:, rows] = 0.25 * eye[:, :d]


def pretrain(seed=0, steps=1200, batch=32, lr=4e-3, width=64):
    """Plain next-token prediction from scratch -> (model, tokenizer).

    A Llama with biases, which is a Qwen2 in all but name: for a checkpoint named qwen2,
    AutoTokenizer of transformers 5 would put Qwen's own tokenizer in the place of ours."""
    tok, rng = tokenizer(), random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=width // 2, attention_bias=True,
        tie_word_embeddings=True, max_position_embeddings=256,
        initializer_range=0.1,                       # the usual 0.02 learns slowly at this width
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():      # weights from `seed` alone
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        start_lookup(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for step in tqdm(range(steps), desc="pre-training the toy base, once", leave=False):
        for group in optimizer.param_groups:
            fall = 0.02 + 1.5 * (1 - step / steps)
            group["lr"] = lr * min(1, (step + 1) / 50, fall)
        # A batch of texts, short ones first; context, unfair tokens and padding carry no loss.
        ids, labels = [], []
        for _ in range(batch):
            context, response, fair = pretraining_text(rng, min(9, 3 + 14 * step // steps))
            context = tok(context).input_ids
            ids.append(torch.tensor(context + tok(response + " <end>").input_ids))
            trained = torch.tensor([False] * len(context) + fair + [True])
            labels.append(ids[-1].where(trained, -100))
        ids = pad_sequence(ids, batch_first=True, padding_value=tok.pad_token_id)      # (B, T)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)            # (B, T)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), tok


def base_model(seed=0):
    """The toy base as (model in eval mode, tokenizer), pre-trained on first use and kept in the
    user's cache folder under a hash of all it depends on: this file, seed, library versions."""
    torch.set_num_threads(1)    # for good: more are no faster here, and sums depend on how many
    versions = f"{seed} {torch.__version__} {transformers.__version__}"
    source = Path(__file__).read_bytes()
    key = hashlib.sha256(source + versions.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefix-rft-toy"
    folder = cache / key
    if not (folder / "config.json").exists():
        model, tok = pretrain(seed)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / "base"
                model.save_pretrained(made)
                tok.save_pretrained(made)
                os.rename(made, folder)              # whole or not at all, also with two programs
        except OSError:
            return model, tok                        # no place to keep it, or the other was first
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main():
    """Show the experts, and what the base makes of each verb: exact probabilities."""
    row = problems("hard", 1)[0]
    x, y, *verbs, _ = row["problem"].split()
    steps = walk(int(x), int(y), verbs, right)
    own, _ = tell(steps)
    print(f"problem    {row['problem']}\nright, own {own}")
    for expert in EXPERTS:
        print(f"{expert:10} {problems('hard', 1, expert=expert)[0]['solution']}")
    model, tok = base_model()
    plain, response = tok(f"<user> {row['problem']} <assistant>").input_ids, tok(own).input_ids
    probs = []
    for context in (plain, hint_prompt(tok, row["problem"], row["solution"])):
        with torch.no_grad():
            logits = model(torch.tensor([context + response])).logits[0, len(context) - 1:-1]
        probs.append(logits.softmax(-1)[range(len(response)), response])              # (T,)
    print("\nverb       right  probability   with the first expert's hint")
    for i, (verb, move, _, _) in enumerate(steps):
        alone, hinted = probs[0][4 * i + 1], probs[1][4 * i + 1]        # verb, move, x, y
        print(f"{verb:10} {move:6} {alone:7.2f} {hinted:13.2f}")


if __name__ == "__main__":
    main()
