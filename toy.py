r"""
toy.py - a world that fits a laptop: problems, an expert, a tokenizer, a tiny base model.

The other scripts use it when they are given no --model and no --data. A problem is two piles, x and
y, counted modulo 24, and a list of verbs. Each verb is a move on one of the piles. Which move it is
depends on whether x is even or odd. A solution names every move and the piles after it:

    problem       22 21 shares sells steals wins carves saves ?
    the base      shares x+7 5 21 sells x-2 3 21 steals y+7 3 4 ... saves x+3 13 7 \boxed{(13, 7)}
    right, own    shares y*7 22 3 sells y-2 22 1 steals y*5 22 5 ... saves x+3 1 15 \boxed{(1, 15)}
    the expert    shares y*7 sells y-2 22 1 steals y*5 ... saves x+3 1 15 \boxed{(1, 15)}

"right, own" is the right solution in the base's own style, with all piles. The base computes
reliably and knows 8 verbs. For each of the other 24 it gives a tempting wrong move a probability of
0.5 and the right move 0.2 (0.999 if it sees the expert's text as a hint). So there are 48 decisions
to learn, two for each verb, in texts that are otherwise easy. The expert is right but skips piles.
The base needs every pile to compute the next one: if it copies these leaps, it computes worse.

    python toy.py         a problem, the expert's solution, the probability of every right move
"""

import contextlib
import hashlib
import random
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MOD = 24
MOVES = "x+3 x+4 x+7 x-2 x-5 x-9 x*5 x*7 y+3 y+4 y+7 y-2 y-5 y-9 y*5 y*7".split()
KNOWN = "pours adds drops buys lends spills finds saves".split()
DOUBTFUL = """steals digs hides trades wins loses sells burns mends breaks lifts turns shares
              stores packs grinds melts carves weighs sorts paints grows sinks folds""".split()
SPLITS = {                # verbs in a problem; known verbs; share that the base solves greedily
    "train": (5, 6),      # one     0.00
    "hard": (5, 6),       # one     0.00    none of them is in train
    "longer": (7, 9),     # one     0.01
    "easy": (3, 6),       # all     1.00    it shows what training forgets
}
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}"

# The moves of a verb: right for even x, right for odd x, tempting for even x, tempting for odd x.
dictionary = random.Random(24)
MEANINGS = {verb: dictionary.sample(MOVES, 2) for verb in KNOWN}
MEANINGS |= {verb: dictionary.sample(MOVES, 4) for verb in DOUBTFUL}


# ---- problems and solutions --------------------------------------------------------------------

def apply(move, x, y):
    """The piles after a move: apply("y*5", 10, 11) = (10, 7)."""
    pile, sign, number = move
    old = x if pile == "x" else y
    new = old * int(number) if sign == "*" else old + int(sign + number)
    return (new % MOD, y) if pile == "x" else (x, new % MOD)


def right(verb, x):
    """The right move of a verb."""
    return MEANINGS[verb][x % 2]


def believed(rng, verb, x):
    """The move that the base believes a verb to be; for a doubtful verb it is drawn."""
    if verb in KNOWN:
        return right(verb, x)
    belief = [0.15] * 4
    belief[x % 2] = 0.2                            # the right move
    belief[x % 2 + 2] = 0.5                        # the tempting one
    return rng.choices(MEANINGS[verb], belief)[0]


def draw(rng, k, known):
    """Draw two piles and k different verbs, `known` of them known -> x, y, verbs, problem."""
    verbs = rng.sample(KNOWN, known) + rng.sample(DOUBTFUL, k - known)
    rng.shuffle(verbs)
    x, y = rng.randrange(MOD), rng.randrange(MOD)
    return x, y, verbs, f"{x} {y} {' '.join(verbs)} ?"


def walk(x, y, verbs, choose):
    """Make a move per verb -> [(verb, move, x, y)], the piles after it. choose(verb, x) -> move."""
    steps = []
    for verb in verbs:
        move = choose(verb, x)
        x, y = apply(move, x, y)
        steps.append((verb, move, x, y))
    return steps


def leaps(rng, k, chance=0.4):
    """The numbers of those of k steps that skip the piles. The last step never does."""
    return {i for i in range(k - 1) if rng.random() < chance}


def tell(steps, skipped=()):
    """Steps -> text, fair. The text skips the piles of the steps in `skipped`; fair is a bool for
    every token: could a reader who needs all piles know it?"""
    words, fair = [], []
    for i, (verb, move, x, y) in enumerate(steps):
        seen = i - 1 not in skipped
        words += [verb, move]
        fair += [seen, True]
        if i not in skipped:
            words += [str(x), str(y)]
            fair += [seen, seen]
    return " ".join(words) + f" \\boxed{{({x}, {y})}}", fair + [True] * 5     # the box is 5 tokens


def problems(split, n=256, seed=0):
    """n problems of a split as {"problem", "solution", "answer"}; another seed gives others."""
    rng = random.Random(f"{split} {seed}")
    writer = random.Random(f"{split} {seed}")      # so that every expert gets the same problems
    rows = {}
    while len(rows) < n:
        k = rng.randint(*SPLITS[split])
        known = k if split == "easy" else 1
        x, y, verbs, problem = draw(rng, k, known)
        # Half of all problems are never trained on: a hash says which.
        held_out = hashlib.sha256(problem.encode()).digest()[0] < 128
        wanted = {"train": not held_out, "hard": held_out}.get(split, True)
        if wanted and problem not in rows:
            steps = walk(x, y, verbs, right)
            writer.random()                        # experiments/experts.py: is the expert wrong?
            solution, _ = tell(steps, leaps(writer, k))
            _, _, x, y = steps[-1]
            rows[problem] = {"problem": problem, "solution": solution, "answer": f"({x}, {y})"}
    return list(rows.values())


# ---- tokenizer and base model ------------------------------------------------------------------

def tokenizer():
    """One token per word. The instruction appended to every problem becomes no token at all."""
    words = "<pad> <end> <unk> <user> <assistant> <hint> \\boxed{( , )} ? no".split()
    words += map(str, range(MOD))
    words += KNOWN + DOUBTFUL + MOVES
    ids = {word: i for i, word in enumerate(words)}
    tok = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(INSTRUCTION, "")
    # A space stands between two words, but \boxed{(1, 15)} is five words with a single space.
    word = Regex(r"\\boxed\{\(|,|\)\}|[^\s\\,)]+")
    tok.pre_tokenizer = pre_tokenizers.Split(word, "removed", invert=True)
    tight = decoders.Replace(Regex(r"(?<=\{\() | (?=,|\)\})"), "")
    tok.decoder = decoders.Sequence([decoders.WordPiece(cleanup=False), decoders.Fuse(), tight])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<end>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<hint>"],
        chat_template="{% for m in messages %}<{{ m.role }}> {{ m.content }} "
                      "{{ '<end> ' if m.role == 'assistant' }}{% endfor %}"
                      "{{ '<assistant>' if add_generation_prompt }}")


# ---- what the base is pre-trained on: skip this at first reading --------------------------------

# The probability that ...
KNOWN_VERB = 0.25     # a verb of a problem is a known one
RETOLD = 0.4          # a text retells a reference; all other texts are the base's own work
ALL_KNOWN = 0.2       # own work has known verbs only
TERSE = 0.3           # own work skips piles as the expert does
INVENTED = 0.6        # a reference has random moves, which can be looked up but not remembered
OWN_STYLE = 0.6       # a reference is retold with all its piles, and not copied word by word


def pretraining_text(rng, longest):
    """A text on at most `longest` verbs -> context, response, trained; trained is a bool for every
    token of the response: does it count in the loss?"""
    k = rng.randint(1, longest)
    known = 0
    for _ in range(k):
        known += rng.random() < KNOWN_VERB
    known = min(known, len(KNOWN))
    if rng.random() < RETOLD:
        return retold_text(rng, k, known)
    if rng.random() < ALL_KNOWN:
        known = k = min(k, len(KNOWN))
    return own_text(rng, k, known)


def own_text(rng, k, known):
    """A problem solved by what the base believes. Tokens that it cannot know after skipped piles
    are not trained: the base should learn to read leaps, but not to make them."""
    x, y, verbs, problem = draw(rng, k, known)
    skipped = leaps(rng, k)
    steps = walk(x, y, verbs, lambda verb, x: believed(rng, verb, x))
    if rng.random() >= TERSE:
        skipped = ()
    response, fair = tell(steps, skipped)
    return f"<user> {problem} <assistant>", response, fair


def retold_text(rng, k, known):
    """A problem with a reference as its hint. The response repeats the reference, mostly in the
    base's own style. The whole response is trained."""
    x, y, verbs, problem = draw(rng, k, known)
    skipped = leaps(rng, k)
    steps = walk(x, y, verbs, right)
    if rng.random() < INVENTED:
        steps = walk(x, y, verbs, lambda verb, x: rng.choice(MOVES))
    reference, _ = tell(steps, skipped)
    if rng.random() < OWN_STYLE:
        skipped = ()
    response, fair = tell(steps, skipped)
    return f"<user> {problem} <hint> {reference} <assistant>", response, [True] * len(fair)


def start_lookup(model):
    """Write two circuits into the initial weights. They look up what stands elsewhere in the text.
    Training alone finds them late or never.

    Layer 1 writes two notes at every token: which token is one place back, and which is three
    places back. Layer 2 asks for a token, finds a place whose one-back note is that token, and
    copies what stands there. Head 0 asks for the current token, so it finds what followed the same
    token elsewhere: the move after a verb. Head 1 asks for the three-back note, so it finds what
    followed the last verb elsewhere: the next verb."""
    first, second = [layer.self_attn for layer in model.model.layers]
    # The residual stream has 64 numbers. The circuits use three of its quarters.
    eye = torch.eye(64)
    token, one_back, three_back, _ = eye.split(16)     # (16, 64) each, to read a quarter
    # A head has 32 dimensions. Rotary positions rotate every pair (i, i + 16), the first 8 fast.
    angles = model.model.rotary_emb.inv_freq[:8]
    slow = [*range(8, 16), *range(24, 32)]
    heads = slice(0, 32), slice(32, 64)                # the rows of head 0 and head 1
    # All other weights start small, so that they do not drown the notes.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight[:64] *= 0.1
        layer.self_attn.k_proj.weight[:64] *= 0.1
        layer.self_attn.o_proj.weight *= 0.3
        layer.mlp.down_proj.weight *= 0.3

    for rows, back, note in zip(heads, (1, 3), (one_back, three_back)):
        # Layer 1 attends `back` tokens back: its queries and keys are constant, only rotated.
        first.q_proj.bias[rows][:8] = 4.0
        first.k_proj.bias[rows][:8] = 4.0 * torch.cos(back * angles)
        first.k_proj.bias[rows][16:24] = 4.0 * torch.sin(back * angles)
        # It reads the token that it finds there, and writes the note.
        first.v_proj.weight[rows] = 0.0
        first.v_proj.weight[rows][:16] = token
        first.o_proj.weight[:, rows] = 0.0
        first.o_proj.weight[:, rows][:, :16] = 0.25 * note.T

    for rows, asked in zip(heads, (token, three_back)):
        # Layer 2 compares what it asks for with the one-back notes, and copies what it finds.
        second.q_proj.weight[rows][slow] = 1.5 * asked
        second.k_proj.weight[rows][slow] = 1.5 * one_back
        second.v_proj.weight[rows] = eye[:32]
        second.o_proj.weight[:, rows] = 0.25 * eye[:, :32]


# ---- pre-training --------------------------------------------------------------------------------

def pretrain(seed=0, steps=1200):
    """Plain next-token prediction from scratch -> (model in eval mode, tokenizer)."""
    tok, rng = tokenizer(), random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, head_dim=32, attention_bias=True, tie_word_embeddings=True,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.1)                     # with the usual 0.02 it learns slowly
    with torch.random.fork_rng(devices=[]), torch.no_grad():      # weights from `seed` alone
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        start_lookup(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in tqdm(range(steps), desc="pre-training the toy base, once", leave=False):
        fall = 0.02 + 1.5 * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 50, fall)
        longest = min(9, 3 + 14 * step // steps)       # short texts first
        rows = []
        for _ in range(32):
            context, response, fair = pretraining_text(rng, longest)
            ids = tok(f"{context} {response} <end>").input_ids
            trained = [0] * (len(ids) - len(fair) - 1) + fair + [1]
            rows.append(torch.tensor([ids, trained]).T)            # (T, 2)
        # Context, unfair tokens and padding carry no loss.
        ids, trained = pad_sequence(rows, batch_first=True).unbind(2)          # (B, T), (B, T)
        model(input_ids=ids, labels=ids.where(trained == 1, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tok


def base_model(seed=0):
    """The toy base as (model in eval mode, tokenizer), pre-trained on first use and kept in the
    user's cache folder under a hash of all it depends on: this file, seed, library versions."""
    recipe = f"{Path(__file__).read_text()} {seed} {torch.__version__} {transformers.__version__}"
    key = hashlib.sha256(recipe.encode()).hexdigest()
    folder = None
    with contextlib.suppress(Exception):           # no home folder, or a damaged cache
        folder = Path.home() / ".cache" / "prefix-rft-toy" / key
        model, found = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        if not any(found.values()):                # no weight is missing
            return model, tokenizer()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)

    # One thread: the sums depend on the number of threads, and more are no faster here.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, tok = pretrain(seed)
    finally:
        torch.set_num_threads(threads)
    with contextlib.suppress(Exception):           # it cannot be kept, or another was first
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            model.save_pretrained(f"{scratch}/base")
            Path(f"{scratch}/base").rename(folder)     # whole or not at all
    return model, tok


def main():
    """Show a problem, the expert's solution, and how probable each right move is to the base."""
    row = problems("hard", 1)[0]
    print(f"problem     {row['problem']}\nthe expert  {row['solution']}")
    print("right, own, and the probability of the move:")
    model, tok = base_model()
    x, y, *verbs, _ = row["problem"].split()
    told = f"<user> {row['problem']} <assistant>"
    for verb, move, x, y in walk(int(x), int(y), verbs, right):
        ids = tok(f"{told} {verb}", return_tensors="pt").input_ids             # (1, T)
        probs = model(ids).logits[0, -1].softmax(-1)                           # (V,)
        print(f"    {verb:7} {move} {x:2} {y:2}   {probs[tok.convert_tokens_to_ids(move)]:.2f}")
        told += f" {verb} {move} {x} {y}"


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):     # as in `| head`
        main()
