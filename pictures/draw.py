"""draw.py - the pictures of the README, as plain SVG from what the scripts log.

    python pictures/draw.py curves runs/prefix_rft runs/rft --out pictures/curves.svg
    python pictures/draw.py curves runs/idft --keys nll phi gamma --out idft.svg
    python pictures/draw.py bars runs/compare/compare.jsonl --key toy-hard --out pictures/bars.svg
    python pictures/draw.py bars runs/idft/compare.jsonl --by loss wrong --key toy-hard --out idft_bars.svg

curves: a panel for every key of metrics.jsonl, a colour for every run; thin is what was logged, thick its running
mean over a tenth of the run. bars: a row for every arm; the bar is the mean over seeds, the whisker plus and minus
one standard deviation, a dot one seed. The ground stays transparent; every colour stands out (contrast at least 3,
text 4) on white and on GitHub's dark.
"""

import argparse
import json
import math
import statistics
import sys
from html import escape
from pathlib import Path

WIDTH, CHAR = 800, 7                                                # pixels; a character of 13 px text is about 7 wide
TEXT, DOT, FLOOR = "#6e7781", "#c96a10", "#e5534b"
DASHES = ["", "9 4", "4 6", "12 4 3 4"]                                # where two runs coincide, both are seen
COLOURS = ["#2f81f7", "#c96a10", "#2a9d58", "#9a67ea", "#d1478f", "#917a18", "#1793a5", "#e5534b"]
TITLES = {"reward": "reward without prefix", "reward_hybrid": "reward with prefix", "prefix_share": "prefix share of demonstration"}
GUESSING = 1 / 24                                                   # the toy's answers are numbers modulo 24


class InputError(ValueError):
    """Something the user gave is wrong: one sentence."""


def read(path):
    """The rows of a JSONL file, a list of dicts."""
    rows, number = [], 1
    try:
        for number, row in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            rows.append(json.loads(row))
            if not isinstance(rows[-1], dict):
                raise ValueError
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, name what a run or --compare has written") from None
    except ValueError:
        raise InputError(f"{path} line {number} is no JSON object: remove that line") from None
    return rows


def numbers(path, rows, key):
    """row[key] of the rows that have it. InputError if one is not a number."""
    found = [row[key] for row in rows if row.get(key) is not None]
    if not all(isinstance(y, (int, float)) and abs(y) < 1e15 for y in found):
        raise InputError(f"{path}: {key} is not a number in every row, choose another key")
    return found


def missing(flag, rows):
    keys = sorted({key for row in rows for key in row})
    return InputError(f"{flag}: no row has it, the keys are {', '.join(keys) or 'none'}")


# ---- shapes ------------------------------------------------------------------------------------------------

def text(x, y, string, anchor="start", size=13, colour=TEXT):
    style = f'text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(string)}</text>'


def line(points, colour=TEXT, width=1.0, extra='stroke-opacity="0.35"'):
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="{width}" {extra}/>'


def dash(run):
    return f'stroke-linejoin="round" stroke-dasharray="{DASHES[run % len(DASHES)]}"'


def page(height, title, parts):
    """A whole SVG; title is what a screen reader says."""
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                      f'height="{height}" role="img" font-family="system-ui, sans-serif">',
                      f"<title>{escape(title)}</title>", *parts, "</svg>\n"])


def ticks(low, high):
    """Three to six round numbers that cover low to high; 0, 0.25, ..., 1 for shares."""
    if 0 <= low and 0.4 < high <= 1:
        return [0, 0.25, 0.5, 0.75, 1]
    high = high if high > low else low + 1
    power = 10 ** math.floor(math.log10(high - low))
    step = next(power * m for m in (0.2, 0.5, 1, 2) if (high - low) / (power * m) <= 5)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


# ---- pictures ----------------------------------------------------------------------------------------------

def panel(left, right, top, bottom, title, series, steps):
    """One pair of axes. series: [(number of the run, steps, values)]."""
    ys = [y for _, _, values in series for y in values]
    y_marks, x_marks = ticks(min(ys), max(ys)), [x for x in ticks(0, max(steps, 2)) if x <= steps]
    at_x = lambda x: left + (right - left) * x / steps
    at_y = lambda y: bottom - (bottom - top) * (y - y_marks[0]) / (y_marks[-1] - y_marks[0])
    parts = [text(left, top - 14, title)]
    for y in y_marks:
        parts += [line([(left, at_y(y)), (right, at_y(y))]), text(left - 6, at_y(y) + 4, f"{y:.4g}", "end", 12)]
    parts += [text(at_x(x), bottom + 18, f"{x:g}", "middle", 12) for x in x_marks]
    for run, xs, values in series:
        half = len(values) // 20
        means = [statistics.fmean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]
        parts.append(line([(at_x(x), at_y(y)) for x, y in zip(xs, values)], COLOURS[run]))
        parts.append(line([(at_x(x), at_y(y)) for x, y in zip(xs, means)], COLOURS[run], 2.5, dash(run)))
    return parts


def curves(runs, keys):
    """The SVG of `keys` over the steps of `runs` (directories)."""
    files = [Path(run) / "metrics.jsonl" for run in runs]
    logs = [read(file) for file in files]
    parts, x, y = [], 8, 20
    for i, run in enumerate(runs):                                  # the legend
        name = Path(run).resolve().name
        if x + 40 + CHAR * len(name) > WIDTH:
            x, y = 8, y + 20
        parts += [line([(x, y - 4), (x + 26, y - 4)], COLOURS[i], 2.5, dash(i)), text(x + 32, y, name)]
        x += 60 + CHAR * len(name)
    steps = max(1, *(max(numbers(file, log, "step"), default=0) for file, log in zip(files, logs)))
    for i, key in enumerate(keys):
        series = []
        for run, (file, log) in enumerate(zip(files, logs)):
            rows = [row for row in log if row.get(key) is not None and row.get("step") is not None]
            if rows:
                series.append((run, numbers(file, rows, "step"), numbers(file, rows, key)))
        if not series:
            raise missing(f"--keys {key}", sum(logs, []))
        left, right = WIDTH * i / len(keys) + 34, WIDTH * (i + 1) / len(keys) - 14
        parts += panel(left, right, y + 46, y + 226, TITLES.get(key, key), series, steps)
    parts.append(text(WIDTH / 2, y + 262, "step", "middle", 12))
    return page(y + 270, f"{', '.join(keys)} of {', '.join(Path(run).resolve().name for run in runs)}", parts)


def bars(path, key, by, title, only=()):
    """The SVG of row[key], a bar for each value of row[by], in the order of `only` or, if it is empty, of the file."""
    arms = {}
    rows = [row for row in read(path) if row.get(key) is not None]
    for row, value in zip(rows, numbers(path, rows, key)):
        arms.setdefault(", ".join(str(row.get(name)) for name in by), []).append(value)
    if not arms:
        raise missing(f"--key {key}", read(path))
    absent = [arm for arm in only if arm not in arms]
    if absent:
        raise InputError(f"--only {absent[0]}: {path} has no such bar, it has {'; '.join(arms)}")
    arms = {arm: arms[arm] for arm in only or arms}
    marks = ticks(0, max(map(max, arms.values())))
    left, right, top, bottom = 16 + CHAR * max(map(len, arms)), WIDTH - 100, 50, 50 + 30 * len(arms)
    at = lambda value: left + (right - left) * min(max(value, 0), marks[-1]) / marks[-1]
    parts = [text(left, 20, title or key)]
    for mark in marks:
        parts += [line([(at(mark), top), (at(mark), bottom)]), text(at(mark), bottom + 18, f"{mark:.4g}", "middle", 12)]
    if key.startswith("toy-") or key == "pass@1":
        parts += [line([(at(GUESSING), top), (at(GUESSING), bottom)], FLOOR, 1.5, 'stroke-dasharray="4 3"'),
                  text(at(GUESSING) + 4, top - 6, "guessing, 1/24", size=12, colour=FLOOR)]
    for i, (arm, values) in enumerate(arms.items()):
        y, mean, std = top + 15 + 30 * i, statistics.fmean(values), statistics.stdev(values) if values[1:] else 0
        width, said = at(mean) - left, f"{mean:.2f} ± {std:.2f}" if values[1:] else f"{mean:.2f}"
        parts += [text(left - 8, y + 4, arm, "end"), text(right + 12, y + 4, said),
                  f'<rect x="{left}" y="{y - 8}" width="{width:.1f}" height="16" fill="{COLOURS[0]}" fill-opacity="0.5"/>']
        if values[1:]:
            ends = at(mean - std), at(mean + std)
            parts += [line([(x0, y - h), (x1, y + h)], COLOURS[0], 2, "") for x0, x1, h in
                      ((*ends, 0), (ends[0], ends[0], 5), (ends[1], ends[1], 5))]
        parts += [f'<circle cx="{at(value):.1f}" cy="{y}" r="2.5" fill="{DOT}"/>' for value in values]
    means = ", ".join(f"{arm} {statistics.fmean(values):.2f}" for arm, values in arms.items())
    return page(bottom + 28, f"{key}: {means}", parts)


def error(message):
    raise InputError(message)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True)
    lines, rows = kinds.add_parser("curves", allow_abbrev=False), kinds.add_parser("bars", allow_abbrev=False)
    lines.add_argument("runs", nargs="+", help="directories with a metrics.jsonl")
    lines.add_argument("--keys", nargs="+", default=list(TITLES), help="what to draw, a panel each")
    rows.add_argument("file", help="the compare.jsonl of prefix_rft.py or idft.py --compare")
    rows.add_argument("--key", default="toy-hard", help="what to draw: toy-hard, toy-longer, toy-easy, pass@1, pass@8")
    rows.add_argument("--by", nargs="+", default=["arm"], help="what names a bar: arm, or loss wrong")
    rows.add_argument("--only", nargs="+", default=[], help="draw these bars, in this order; none given: all")
    rows.add_argument("--title", default="", help="written above the bars instead of --key")
    for kind in (lines, rows):
        kind.add_argument("--out", required=True, help="the SVG file")
    parser.error = lines.error = rows.error = error
    try:
        flags = parser.parse_args()
        if flags.kind == "curves" and len(flags.runs) > len(COLOURS):
            raise InputError(f"{len(flags.runs)} runs are too many for one picture, give at most {len(COLOURS)}")
        svg = (curves(flags.runs, flags.keys) if flags.kind == "curves" else
               bars(flags.file, flags.key, flags.by, flags.title, flags.only))
        Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.out).write_text(svg, encoding="utf-8")
    except (InputError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
