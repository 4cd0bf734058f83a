"""The pictures: what is drawn is what was logged, every reader can see it, and bad input is refused in one sentence."""

import importlib.util
import json
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("draw", ROOT / "pictures" / "draw.py")
draw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw)
SVG = "{http://www.w3.org/2000/svg}"


def run(*argv):
    return subprocess.run([sys.executable, ROOT / "pictures" / "draw.py", *map(str, argv)], capture_output=True, text=True)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shapes(svg):
    """The picture as (polylines {colour: [(width, points)]}, texts, rectangles, circles)."""
    root = ElementTree.fromstring(svg)
    lines = {}
    for node in root.iter(SVG + "polyline"):
        points = [tuple(map(float, point.split(","))) for point in node.get("points").split()]
        lines.setdefault(node.get("stroke"), []).append((float(node.get("stroke-width")), points))
    assert all(0 <= x <= 800 for found in lines.values() for _, points in found for x, _ in points)
    return lines, list(root.iter(SVG + "text")), list(root.iter(SVG + "rect")), list(root.iter(SVG + "circle"))


def scale(texts, anchor, axis, between=(0, 1e9)):
    """The straight line through an axis' tick labels: pixels -> value."""
    marks = []
    for node in texts:
        if node.get("text-anchor") == anchor and node.get("font-size") == "12" and re.fullmatch(r"[-+.\de]+", node.text):
            if between[0] <= float(node.get("x")) <= between[1]:
                marks.append((float(node.get(axis)) - (4 if axis == "y" else 0), float(node.text)))
    (p0, v0), (p1, v1) = marks[0], marks[-1]
    return lambda pixel: v0 + (pixel - p0) * (v1 - v0) / (p1 - p0)


def test_curves_draw_what_was_logged(tmp_path):
    reward = {"one": [0.1, 0.4, 0.2, 0.9], "two": [0.0, 0.05, 0.1, 1.0]}
    for name, values in reward.items():
        rows = [{"step": 0, "accuracy": {"toy-hard": 0.1}}]                              # what opens and closes every log
        rows += [{"step": i + 1, "reward": y, "reward_hybrid": None if name == "two" else y / 2} for i, y in enumerate(values)]
        write(tmp_path / name / "metrics.jsonl", rows + [{"step": 4, "accuracy": {}}])
    out = tmp_path / "new" / "curves.svg"
    done = run("curves", tmp_path / "one", tmp_path / "two", "--keys", "reward", "reward_hybrid", "--out", out)
    assert done.returncode == 0 and not done.stderr
    lines, texts, _, _ = shapes(out.read_text())
    x_of, y_of = scale(texts, "middle", "x", (0, 390)), scale(texts, "end", "y", (0, 390))
    for colour, values in zip(draw.COLOURS, reward.values()):
        for width in (1.0, 2.5):                                                         # so short a run is its own running mean
            points = next(points for w, points in lines[colour] if w == width and len(points) == 4)
            assert [x_of(x) for x, _ in points] == pytest.approx([1, 2, 3, 4], abs=0.02)
            assert [y_of(y) for _, y in points] == pytest.approx(values, abs=0.005)
    assert len([1 for _, points in lines[draw.COLOURS[1]] if len(points) == 4]) == 2     # run two has no hybrids: one panel only
    assert {"one", "two", "reward without prefix", "reward with prefix", "step"} <= {node.text for node in texts}


def test_the_thick_line_is_a_running_mean(tmp_path):
    values = [(i * 37 % 100) / 100 for i in range(100)]
    write(tmp_path / "metrics.jsonl", [{"step": i, "reward": y} for i, y in enumerate(values)])
    lines, texts, _, _ = shapes(draw.curves([tmp_path], ["reward"]))
    thick = next(points for width, points in lines[draw.COLOURS[0]] if width == 2.5 and len(points) == 100)
    y_of = scale(texts, "end", "y")
    for i in (0, 3, 50, 99):
        assert y_of(thick[i][1]) == pytest.approx(statistics.fmean(values[max(0, i - 5):i + 6]), abs=0.005)


def test_bars_draw_mean_deviation_and_seeds(tmp_path):
    rows = [{"arm": "sft", "lr": 0.1, "seed": 5, "valid": 0.9}]                           # tuning: not reported
    data = {"sft": [0.1, 0.3, 0.2], "prefix <rft> & co": [0.9, 1.0, 0.95], "one seed": [0.5]}
    rows += [{"arm": arm, "lr": 0.1, "seed": seed, "toy-hard": y, "pass@8": 0.0} for arm, ys in data.items() for seed, y in enumerate(ys)]
    out = tmp_path / "bars.svg"
    assert run("bars", write(tmp_path / "compare.jsonl", rows), "--title", "greedy", "--out", out).returncode == 0
    lines, texts, rects, circles = shapes(out.read_text())
    x_of = scale(texts, "middle", "x")
    names = [node.text for node in texts if node.get("text-anchor") == "end"]
    assert names == list(data) and len(rects) == 3 and "greedy" in {node.text for node in texts}
    whiskers = [points for width, points in lines[draw.COLOURS[0]] if width == 2 and points[0][1] == points[1][1]]
    for ys, rect in zip(data.values(), rects):
        left = float(rect.get("x"))
        assert x_of(left) == pytest.approx(0, abs=0.005)
        assert x_of(left + float(rect.get("width"))) == pytest.approx(statistics.fmean(ys), abs=0.005)
        middle = float(rect.get("y")) + 8
        assert sorted(x_of(float(c.get("cx"))) for c in circles if float(c.get("cy")) == middle) == pytest.approx(sorted(ys), abs=0.005)
        ends = [[x_of(x) for x, _ in points] for points in whiskers if points[0][1] == middle]
        if len(ys) > 1:
            low, high = statistics.fmean(ys) - statistics.stdev(ys), statistics.fmean(ys) + statistics.stdev(ys)
            assert ends == [pytest.approx([low, min(high, 1)], abs=0.005)]
        else:
            assert not ends
    assert "0.20 ± 0.10" in {node.text for node in texts} and "0.50" in {node.text for node in texts}
    (_, floor), = [(w, points) for w, points in lines[draw.FLOOR]]
    assert x_of(floor[0][0]) == x_of(floor[1][0]) == pytest.approx(1 / 24, abs=0.002)


def test_bars_by_other_names_and_beyond_one(tmp_path):
    rows = [{"loss": loss, "wrong": wrong, "nll": 3.0 + wrong} for loss in ("sft", "idft") for wrong in (0.0, 0.3)]
    _, texts, rects, _ = shapes(draw.bars(write(tmp_path / "c.jsonl", rows), "nll", ["loss", "wrong"], ""))
    assert [node.text for node in texts if node.get("text-anchor") == "end"] == ["sft, 0.0", "sft, 0.3", "idft, 0.0", "idft, 0.3"]
    some = ["idft, 0.3", "sft, 0.0"]
    chosen = shapes(draw.bars(tmp_path / "c.jsonl", "nll", ["loss", "wrong"], "", some))[1]
    assert [node.text for node in chosen if node.get("text-anchor") == "end"] == some
    x_of = scale(texts, "middle", "x")
    assert [x_of(float(r.get("x")) + float(r.get("width"))) for r in rects] == pytest.approx([3, 3.3, 3, 3.3], abs=0.02)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.1), (-0.02, 0.03), (3, 3), (0, 7), (0, 500), (1e-6, 3e-6), (-5, -1)])
def test_ticks_are_few_and_cover(low, high):
    marks = draw.ticks(low, high)
    assert 2 <= len(marks) <= 7 and marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12
    assert marks == sorted(set(marks))


def contrast(colour, ground):
    def luminance(colour):
        channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
    low, high = sorted((luminance(colour), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_colours_stand_out_in_light_and_dark(ground):
    assert contrast(draw.TEXT, ground) > 4
    assert all(contrast(colour, ground) > 3 for colour in [*draw.COLOURS, draw.DOT, draw.FLOOR])


GOOD = {"step": 1, "reward": 0.5, "reward_hybrid": 0.5, "prefix_share": 0.5}


@pytest.mark.parametrize("text, argv, says", [
    ("", ["curves", "nowhere"], "nowhere"),
    ("", ["curves", "run"], "--keys reward"),
    (json.dumps(GOOD) + "\n{half", ["curves", "run"], "line 2"),
    (json.dumps(GOOD) + "\n[1]", ["curves", "run"], "line 2"),
    (json.dumps(GOOD), ["curves", "run", "--keys", "nll"], "prefix_share"),                # says which keys there are
    (json.dumps(GOOD | {"reward": "high"}), ["curves", "run"], "reward"),
    (json.dumps(GOOD | {"reward": float("nan")}), ["curves", "run"], "reward"),
    (json.dumps(GOOD | {"step": "one"}), ["curves", "run"], "step"),
    (json.dumps(GOOD), ["curves"] + ["run"] * 9, "at most 8"),
    ('{"arm": "sft", "valid": 1}', ["bars", "run/metrics.jsonl"], "--key toy-hard"),
    ('{"arm": "sft", "toy-hard": []}', ["bars", "run/metrics.jsonl"], "toy-hard"),
    ('{"arm": "sft", "toy-hard": 1}', ["bars", "run/metrics.jsonl", "--only", "dft"], "sft"),
    ("", ["bars", "run"], "run"),
    ("", ["pies", "run"], "pies"),
    ("", ["curves", "run", "--size", "3"], "--size"),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, text, argv, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    done = run(*argv, "--out", "new/picture.svg")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr
    assert not (tmp_path / "new").exists() and not done.stdout


def test_help_names_both_pictures():
    done = run("--help")
    assert done.returncode == 0 and "curves" in done.stdout and "bars" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "pictures").glob("*.svg")), ids=lambda path: path.name)
def test_committed_pictures_are_small_and_well_formed(path):
    assert ElementTree.parse(path).getroot().tag == SVG + "svg" and path.stat().st_size < 150_000
