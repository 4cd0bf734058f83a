r"""
toy.py - a world that fits a laptop: problems, an expert, a tokenizer, a tiny base model.

Every other script runs on this world when it is given no --model and no --data.

There are two piles, x and y, counted modulo 24, and a list of verbs. A verb is a move: it changes one pile, and what
it does depends on whether x is even or odd at that moment. A solution tells the moves one after the other, each with
the piles it leaves, and boxes the last pair:

    problem       12 11 pours steals digs hides ?
    base          pours x-2 10 11 steals y*5 10 7 digs y-2 10 5 hides y-9 10 20 \boxed{(10, 20)}
    right, own    pours x-2 10 11 steals y-9 10 2 digs y-2 10 0 hides x-9 1 0 \boxed{(1, 0)}
    expert        pours x-2 10 11 steals y-9 digs y-2 hides x-9 1 0 \boxed{(1, 0)}
"""

import hashlib
import os
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast
from transformers import __version__ as transformers_version

MOD = 24
MOVES = [pile + change for pile in "xy" for change in "+3 +4 +7 -2 -5 -9 *5 *7".split()]
KNOWN = "pours adds drops buys lends spills finds saves".split()
DOUBTFUL = ("steals digs hides trades wins loses sells burns mends breaks lifts turns "
            "shares stores packs grinds melts carves weighs sorts paints grows sinks folds").split()
SPLITS = {"train": (5, 6), "hard": (5, 6), "longer": (7, 9), "easy": (3, 6)}    # verbs in a problem
EXPERTS = {"leaps": 0.4, "terse": 0.8, "errs": 0.4, "detours": 0.4}    # chance to skip the piles
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}"

# A verb's moves: right if x is even, right if x is odd, tempting if x is even, tempting if x is odd.
dictionary = random.Random(24)
MEANINGS = {verb: dictionary.sample(MOVES, 2) for verb in KNOWN}
MEANINGS |= {verb: dictionary.sample(MOVES, 4) for verb in DOUBTFUL}


# ---- problems ----------------------------------------------------------------------------------

def apply(move, x, y):
    """The piles after a move: apply("y*5", 10, 11) = (10, 7)."""
    pile, sign, number = move[0], move[1], int(move[2:])
    old = x if pile == "x" else y
    results = {"+": old + number, "-": old - number, "*": old * number}
    new = results[sign] % MOD
    return (new, y) if pile == "x" else (x, new)


def right(verb, x):
    """What a verb really does."""
    return MEANINGS[verb][x % 2]


def believed(verb, x, rng):
    """What the base takes it for: a doubtful verb is read right one time in five."""
    if verb in KNOWN:
        return right(verb, x)
    even = [0.2, 0.15, 0.5, 0.15]                  # how much it believes in each of the four moves
    odd = [0.15, 0.2, 0.15, 0.5]
    return rng.choices(MEANINGS[verb], odd if x % 2 else even)[0]


def draw(rng, k, known):
    """Two piles and k verbs, none twice, of which `known` are known."""
    verbs = rng.sample(KNOWN, known) + rng.sample(DOUBTFUL, k - known)
    rng.shuffle(verbs)
    return rng.randrange(MOD), rng.randrange(MOD), verbs


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


# ---- solutions ---------------------------------------------------------------------------------

def tell(steps, skipped=()):
    """Steps -> words, and for each word whether a reader who needs every value could know it:
    not the verb that stands where piles were skipped, and not the next piles."""
    words, fair = [], []
    lost = False
    for i, (verb, move, x, y) in enumerate(steps):
        words += [verb, move]
        fair += [not lost, True]
        lost = lost or i in skipped
        if i not in skipped:
            words += [str(x), str(y)]
            fair += [not lost, not lost]
            lost = False
    words += ["\\boxed{(", str(x), ",", str(y), ")}"]
    return words, fair + [True] * 5


def text(words):
    """Words -> text."""
    return " ".join(words).replace("{( ", "{(").replace(" ,", ",").replace(" )}", ")}")


def demonstrate(rng, x, y, verbs, expert="leaps", wrong=False):
    """A demonstration of an expert -> text. wrong: one of its moves is another than it should be,
    and so is its answer."""
    steps = walk(x, y, verbs, right)
    answer = steps[-1][2:]
    while wrong and steps[-1][2:] == answer:
        slip = rng.choice(verbs)
        steps = walk(x, y, verbs, lambda v, x: rng.choice(MOVES) if v == slip else right(v, x))
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
        steps[at:at] = [(verb, there, *apply(there, x, y)), (verb, back, x, y)]
    words, _ = tell(steps, leaps(rng, len(steps), EXPERTS[expert]))
    return text(words)


def problems(split, n=256, seed=0, wrong=0.0, expert="leaps"):
    """n problems of a split as {"problem", "solution", "answer"}; another seed, other problems.

    wrong: share of demonstrations that end in a false answer. No training problem occurs in
    another split. ValueError on an unknown split or expert.
    """
    for kind, name, names in (("split", split, SPLITS), ("expert", expert, EXPERTS)):
        if name not in names:
            raise ValueError(f"the toy has no {kind} {name!r}; choose one of {', '.join(names)}")
    rng = random.Random(f"{split} {seed}")
    writer = random.Random(f"{split} {seed}")      # so that every expert gets the same problems
    rows, seen = [], set()
    while len(rows) < n:
        k = rng.randint(*SPLITS[split])
        x, y, verbs = draw(rng, k, known=k if split == "easy" else 1)
        problem = " ".join([str(x), str(y), *verbs, "?"])
        # Half of all problems are never trained on: a hash says which.
        held_out = hashlib.sha256(problem.encode()).digest()[0] < 128
        if problem in seen or split == "train" and held_out or split == "hard" and not held_out:
            continue
        seen.add(problem)
        solution = demonstrate(writer, x, y, verbs, expert, writer.random() < wrong)
        x, y = walk(x, y, verbs, right)[-1][2:]
        rows.append({"problem": problem, "solution": solution, "answer": f"({x}, {y})"})
    return rows


# ---- the tokenizer -----------------------------------------------------------------------------

def tokenizer():
    """A real PreTrainedTokenizerFast: one token a word, with a chat template and an end token.

    The instruction that is appended to every problem reads as nothing here, so that the toy takes
    exactly the code path of a real model."""
    words = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<hint>"]
    words += ["\\boxed{(", ",", ")}", "?", "no"]
    words += [str(i) for i in range(MOD)] + KNOWN + DOUBTFUL + MOVES
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(INSTRUCTION, "")
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(Regex(r"\\boxed\{\(|,|\)\}"), "isolated"),
    ])
    # Words joined by spaces, but for the box.
    tok.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="##", cleanup=False),
        decoders.Fuse(),
        decoders.Replace("{( ", "{("),
        decoders.Replace(" ,", ","),
        decoders.Replace(" )}", ")}"),
    ])
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
    hinted = f"<user> {problem} <hint> {solution} <assistant>"
    return tok(hinted, add_special_tokens=False).input_ids


# ---- the base model ----------------------------------------------------------------------------

def pretraining_text(rng, longest):
    """(context, response, fair): two texts, and for every word of the response whether it is
    trained. The problem has at most `longest` verbs."""
    k = rng.randint(1, longest)
    known = min(sum(rng.random() < 0.25 for _ in range(k)), len(KNOWN))
    retold = rng.random() < 0.4
    if not retold and rng.random() < 0.2:
        known = k = min(k, len(KNOWN))
    x, y, verbs = draw(rng, k, known)
    problem = " ".join([str(x), str(y), *verbs, "?"])
    skipped = leaps(rng, k, EXPERTS["leaps"])

    if retold:
        # A reference, then the same in the base's style or, at times, word by word. Most
        # references may say anything: the moves must be looked up, memory does not help.
        if rng.random() < 0.6:
            steps = walk(x, y, verbs, lambda verb, x: rng.choice(MOVES))
        else:
            steps = walk(x, y, verbs, right)
        reference, fair = tell(steps, skipped)
        words = reference
        if rng.random() < 0.6:
            words, fair = tell(steps)
        context = f"<user> {problem} <hint> {text(reference)} <assistant>"
        return context, text(words), [True] * len(words)

    # A worked problem with the moves that the base is to believe in. Some are terse: reading
    # leaps must not confuse the base, but no leap is trained.
    steps = walk(x, y, verbs, lambda verb, x: believed(verb, x, rng))
    words, fair = tell(steps, skipped if rng.random() < 0.3 else ())
    return f"<user> {problem} <assistant>", text(words), fair


def start_lookup(model):
    """Start the two circuits that look things up, by the initial weights; training does the rest.

    To look a verb up the model must find the place where that verb stood one token back, and copy
    what stands there. That takes two layers which are of no use without each other, so by chance
    it is learnt late or never. Here head 0 finds what followed this token, and head 1 what
    followed the token three back: the next verb, after `verb move x y`."""
    width, d = model.config.hidden_size, model.config.head_dim
    part, fast = width // 4, d // 4
    first, second = [layer.self_attn for layer in model.model.layers[:2]]
    angles = model.model.rotary_emb.inv_freq[:fast]    # the pairs of dimensions that turn fast
    slow = torch.arange(d)[torch.arange(d) % (d // 2) >= fast]
    eye = torch.eye(width)
    for layer in model.model.layers:                   # the circuits are to be heard
        layer.self_attn.o_proj.weight *= 0.3
        layer.mlp.down_proj.weight *= 0.3
    for head, back in enumerate((1, 3)):
        rows = slice(head * d, (head + 1) * d)
        for attention in (first, second):
            attention.q_proj.weight[rows] *= 0.1
            attention.k_proj.weight[rows] *= 0.1
        # First layer: constant queries and keys, which the rotary positions turn, attend `back`
        # tokens back; what the residual says there in part 0 is written into another part.
        first.q_proj.bias[rows][:fast] = 4.0
        first.k_proj.bias[rows][:fast] = 4.0 * torch.cos(back * angles)
        first.k_proj.bias[rows][d // 2:d // 2 + fast] = 4.0 * torch.sin(back * angles)
        first.v_proj.weight[rows] = 0.0
        first.v_proj.weight[rows][:part] = eye[:part]
        first.o_proj.weight[:, rows] = 0.0
        first.o_proj.weight[part * (head + 1):part * (head + 2), rows][:, :part] = 0.25 * eye[:part, :part]
        # Second layer: this token, or the one three back, is compared with what stood one back.
        mine = (0, 2)[head]
        second.q_proj.weight[rows][slow] = 1.5 * eye[part * mine:part * (mine + 1)]
        second.k_proj.weight[rows][slow] = 1.5 * eye[part:2 * part]
        second.v_proj.weight[rows] = eye[:d]
        second.o_proj.weight[:, rows] = 0.25 * eye[:, :d]


def pretrain(seed=0, steps=1200, batch=32, lr=4e-3, width=64):
    """Plain next-token prediction from scratch -> (model, tokenizer).

    A Llama with biases, which is a Qwen2 in all but name: for a checkpoint named qwen2,
    AutoTokenizer of transformers 5 would put Qwen's own tokenizer in the place of ours."""
    tok = tokenizer()
    rng = random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=width // 2, attention_bias=True,
        tie_word_embeddings=True, max_position_embeddings=256,
        initializer_range=0.1,                       # the usual 0.02 learns slowly at this width
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):          # initial weights from `seed` alone
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        start_lookup(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in tqdm(range(steps), desc="pre-training the toy base, once", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50, 0.02 + 1.5 * (1 - step / steps))

        # A batch of texts; context, unfair words and padding carry no loss.
        longest = min(9, 3 + 14 * step // steps)      # short ones first
        rows = [pretraining_text(rng, longest) for _ in range(batch)]
        contexts, responses, fairs = zip(*rows)
        contexts = tok(list(contexts), add_special_tokens=False).input_ids
        responses = tok(list(responses), add_special_tokens=False).input_ids
        length = max(len(c) + len(r) + 1 for c, r in zip(contexts, responses))
        ids = torch.full((batch, length), tok.pad_token_id)           # (B, T)
        labels = torch.full((batch, length), -100)                    # (B, T)
        for i, (context, response, fair) in enumerate(zip(contexts, responses, fairs)):
            response = torch.tensor(response + [tok.eos_token_id])
            fair = torch.tensor(fair + [True])
            start, end = len(context), len(context) + len(response)
            ids[i, :start] = torch.tensor(context)
            ids[i, start:end] = response
            labels[i, start:end] = response.masked_fill(~fair, -100)

        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), tok


def base_model(seed=0):
    """The pre-trained toy base as (model in eval mode, tokenizer), made on first use and kept in
    the user's cache folder under a name that hashes all it depends on: this file, the seed and
    the library versions.

    From here on PyTorch uses one thread: so small a model gains nothing from more, waits long for
    one that is busy elsewhere, and its sums do not depend on how many cores the machine has."""
    torch.set_num_threads(1)
    versions = f"{seed} {torch.__version__} {transformers_version}"
    key = hashlib.sha256(Path(__file__).read_bytes() + versions.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefix-rft-toy"
    folder = cache / key
    if not (folder / "config.json").exists():
        model, tok = pretrain(seed)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Whole or not at all, also with two programs at once.
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / "base"
                model.save_pretrained(made)
                tok.save_pretrained(made)
                os.rename(made, folder)
        except OSError:
            return model, tok                        # no place to keep it, or the other was first
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main():
    """Show a problem, every expert, and what the base makes of each verb: exact probabilities."""
    for expert in EXPERTS:
        row = problems("hard", 1, expert=expert)[0]
        print(f"{expert:10}{row['solution']}")
    row = problems("hard", 1)[0]
    x, y, *verbs, _ = row["problem"].split()
    steps = walk(int(x), int(y), verbs, right)
    own = text(tell(steps)[0])
    print(f"problem   {row['problem']}\nright     {own}\n")
    model, tok = base_model()
    response = tok(own, add_special_tokens=False).input_ids
    plain = tok(f"<user> {row['problem']} <assistant>", add_special_tokens=False).input_ids
    probs = []
    for context in (plain, hint_prompt(tok, row["problem"], row["solution"])):
        with torch.no_grad():
            logits = model(torch.tensor([context + response])).logits[0, len(context) - 1:-1]
        probs.append(logits.softmax(-1))                              # (T, V)
    print("what the base expects after a verb, and with the expert's solution as a hint")
    for i, (verb, move, _, _) in enumerate(steps):
        t = 4 * i + 1                                                 # verb, move, x, y
        print(f"{verb:10} right {move} {probs[0][t, response[t]]:.2f}, hinted {probs[1][t, response[t]]:.2f}")


if __name__ == "__main__":
    main()
