"""
draw.py - the pictures, as plain SVG: transparent ground, ink that is read on white and on black.

    python -m experiments.draw                    learning curves of five methods, from
                                                  results/rl.jsonl, and the tokens of one
                                                  demonstration: experiments/pictures/*.svg
    python -m experiments.draw runs/prefix_rft    what a run logged: runs/prefix_rft/dynamics.svg
"""

import argparse
import math
import statistics
import sys
from html import escape
from pathlib import Path

import torch

import toy
from ddt import cll, response_stats
from eval import InputError, demo_ids, load_model, prompt_ids, read_log, write_file
from experiments.sweep import load_results

INK = "#6e7781"                                                # readable on white and on black
COLOURS = ["#2f81f7", "#c96a10", "#2a9d58", "#9a67ea", "#d1478f"]
WIDTH = 800
METHODS = {"prefix_rft": "Prefix-RFT", "sft_rft": "SFT-then-RFT", "luffy": "LUFFY", "sft": "SFT",
           "rft": "RFT"}

# A panel each, of what a run has logged: {title: {name of the line: key of metrics.jsonl}}.
DYNAMICS = {
    "reward": {"with prefix": "reward_hybrid", "without": "reward"},
    "entropy, nats": {"": "entropy"},
    "response, tokens": {"": "length"},
    "prefix tokens": {"given": "prefix_tokens", "kept": "prefix_kept"},
    "gradient norm": {"": "grad_norm"},
    "share of the demonstration": {"mean": "prefix_share", "at least": "low"},
    "-log p, nats": {"": "nll"},
    "phi, nats": {"": "phi"},
    "gamma of IDFT": {"": "gamma"},
}


# ---- shapes -------------------------------------------------------------------------------------

def text(x, y, words, colour=INK, anchor="start", size=13, extra=""):
    return (f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
            f'font-size="{size}" {extra}>{escape(words)}</text>')


def shape(points, extra):
    """A line through points (x, y), or with a fill a polygon."""
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{where}" stroke-linejoin="round" {extra}/>'


def page(height, title, parts):
    """A whole SVG; title is what a screen reader says."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" font-family="system-ui, sans-serif">')
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>\n"])


def ticks(low, high):
    """Round numbers, at most seven, the first at or below low, the last at or above high."""
    if high == low:
        high = low + 1
    power = 10 ** math.floor(math.log10(high - low))
    for step in (0.2 * power, 0.5 * power, power, 2 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= 6:
            break
    return [i * step for i in range(first, last + 1)]


def panel(box, title, lines, bands=()):
    """A pair of axes. box: left, right, top, bottom in pixels; lines: (name, [(x, y)]); bands:
    (low, high) lists of points behind the line of the same number."""
    left, right, top, bottom = box
    points = []
    for _, line in lines:
        points += line
    for low, high in bands:
        points += low + high
    xs, ys = zip(*points)
    x_ticks = ticks(0, max(xs))
    y_ticks = ticks(min(0, *ys), max(ys))

    def place(x, y):
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    # The grid.
    parts = []
    for y in y_ticks:
        ends = [place(x_ticks[0], y), place(x_ticks[-1], y)]
        parts.append(shape(ends, f'stroke="{INK}" stroke-opacity="0.3"'))
        parts.append(text(left - 7, ends[0][1] + 4, f"{y:.4g}", anchor="end", size=12))
    for x in x_ticks:
        parts.append(text(place(x, 0)[0], bottom + 18, f"{x:g}", anchor="middle", size=12))

    # The title, and in the same row from the right the names of the lines in their colours.
    parts.append(text(left, top - 14, title))
    end = right
    for i, (name, _) in reversed(list(enumerate(lines))):
        parts.append(text(end, top - 14, name, COLOURS[i], anchor="end", extra='font-weight="600"'))
        end -= 8.5 * len(name) + 14

    # Bands lie below lines.
    for i, (low, high) in enumerate(bands):
        around = [place(x, y) for x, y in low + high[::-1]]
        parts.append(shape(around, f'fill="{COLOURS[i]}" fill-opacity="0.16" stroke="none"'))
    for i, (_, line) in enumerate(lines):
        extra = f'fill="none" stroke="{COLOURS[i]}" stroke-width="2.2"'
        parts.append(shape([place(x, y) for x, y in line], extra))
    return parts


# ---- pictures -----------------------------------------------------------------------------------

def curves(rows):
    """Greedy accuracy on hard problems over 40 batches: the mean of all seeds, and a band that
    holds every one. rows: those of rl.jsonl."""
    lines, bands = [], []
    for arm, name in METHODS.items():
        seeds = [row["curve"] for row in rows if row["arm"] == arm and row["stage"] == "report"]
        if not seeds:
            continue
        # All seeds were measured at the same steps.
        mean, low, high = [], [], []
        for points in zip(*seeds):
            step, values = points[0][0], [accuracy for _, accuracy in points]
            mean.append((step, statistics.mean(values)))
            low.append((step, min(values)))
            high.append((step, max(values)))
        lines.append((name, mean))
        bands.append((low, high))
    if not lines:
        raise InputError("experiments/results/rl.jsonl has no curve: run python -m experiments.rl")
    parts = panel((40, WIDTH - 16, 44, 330), "accuracy on hard problems", lines, bands)
    below = "batches of 128 sequences, two optimizer steps each"
    parts.append(text(WIDTH / 2, 368, below, anchor="middle"))
    return page(380, "Learning curves of " + ", ".join(name for name, _ in lines), parts)


def dynamics(rows, name):
    """What a run has logged, a panel for every row of DYNAMICS that it has."""
    parts, count = [], 0
    for title, keys in DYNAMICS.items():
        # Only what this run has logged; None stands where there was nothing to measure.
        lines = []
        for label, key in keys.items():
            line = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if line:
                lines.append((label, line))
        if lines:
            left, top = 46 + 400 * (count % 2), 40 + 220 * (count // 2)
            parts += panel((left, left + 338, top, top + 140), title, lines)
            count += 1
    if not count:
        raise InputError(f"{name}/metrics.jsonl has nothing to draw: name the --out of a run")
    return page(220 * math.ceil(count / 2) + 10, f"Training dynamics of {name}", parts)


def tokens(words, phi, entropy):
    """A text, token by token: the redder, the lower phi; the longer the bar below, the higher the
    entropy. words: list of str; phi, entropy: lists of floats, nats."""
    red, blue = "#e5534b", COLOURS[0]
    parts = [text(8, 20, "phi below 0: the model would not have written it", red),
             text(WIDTH - 8, 20, "entropy: the model has a choice", blue, anchor="end")]
    x, y = 8, 54
    for word, value, unsure in zip(words, phi, entropy):
        # A word needs 9 pixels a character; what does not fit goes to the next row.
        width = 9 * len(word) + 10
        if x + width > WIDTH - 8:
            x, y = 8, y + 54
        depth = min(1, max(0, -value) / 8)
        parts.append(f'<rect x="{x}" y="{y - 17}" width="{width}" height="24" rx="3" fill="{red}" '
                     f'fill-opacity="{0.5 * depth:.2f}"/>')
        parts.append(text(x + width / 2, y, word, anchor="middle", size=15,
                          extra='font-family="ui-monospace, monospace"'))
        parts.append(f'<rect x="{x + 3}" y="{y + 10}" width="{width - 6}" '
                     f'height="{12 * min(unsure, 2):.1f}" fill="{blue}"/>')
        x += width + 3
    return page(y + 44, "A demonstration, every token with its phi and entropy", parts)


def demonstration():
    """The picture of the first training problem's demonstration under the toy's base."""
    model, tokenizer = load_model("toy", torch.device("cpu"))
    problem = toy.problems("train")[0]
    ids = demo_ids(tokenizer, problem["solution"])
    with torch.no_grad():
        row = (prompt_ids(tokenizer, problem["problem"]), ids)
        logp, entropy = response_stats(model, [row])
    words = [tokenizer.decode([token]) for token in ids]
    return tokens(words, cll(logp, entropy).tolist(), entropy.tolist())


def main(run=None):
    pictures = {}
    if run:
        path = Path(run) / "metrics.jsonl"
        if not path.exists():
            raise InputError(f"{path} is missing: name the --out of a run")
        pictures[Path(run) / "dynamics.svg"] = dynamics(read_log(path), Path(run).resolve().name)
    else:
        here = Path(__file__).parent
        pictures[here / "pictures" / "tokens.svg"] = demonstration()
        pictures[here / "pictures" / "curves.svg"] = curves(load_results(here / "results/rl.jsonl"))
    for path, svg in pictures.items():
        path.parent.mkdir(exist_ok=True)
        write_file(path, svg)
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("run", nargs="?", help="the --out of a run")
    try:
        main(parser.parse_args().run)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
