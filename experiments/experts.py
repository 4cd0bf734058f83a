"""experts.py - other demonstrations of the toy's problems: wrong ones, and weaker experts."""

import random

import toy
from toy import MOVES, apply, leaps, right, tell, walk

EXPERTS = {               # chance to skip the piles of a step
    "leaps": 0.4,         # the expert of toy.py
    "terse": 0.8,
    "errs": 0.4,          # takes a wrong move and takes it back: "no"
    "detours": 0.4,       # takes a move twice, which leads back: 5 * 5 = 7 * 7 = 1 modulo 24
}


def demonstrate(rng, x, y, verbs, expert, wrong):
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
            there = back = rng.choice(["x*5", "y*5", "x*7", "y*7"])
        away = apply(there, x, y)
        steps.insert(at, (verb, back, x, y))
        steps.insert(at, (verb, there, *away))
    text, _ = tell(steps, leaps(rng, len(steps), EXPERTS[expert]))
    return text


def problems(split, n=256, seed=0, wrong=0.0, expert="leaps"):
    """toy.problems(split, n, seed) with demonstrations by another expert, of which the share
    `wrong` ends in a false answer."""
    rng = random.Random(f"{split} {seed}")
    rows = toy.problems(split, n, seed)
    for row in rows:
        x, y, *verbs, _ = row["problem"].split()
        slips = rng.random() < wrong
        row["solution"] = demonstrate(rng, int(x), int(y), verbs, expert, slips)
    return rows
