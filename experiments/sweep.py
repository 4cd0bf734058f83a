"""
sweep.py - the one loop behind every comparison: tune each arm alone, then report five seeds.

An arm is a dict of settings. Its learning rate is the one of GRID that does best on tuning problems
of its own, with a base model and training problems of seed 5; where several are equally good, a
second set of tuning problems decides, then the smaller rate. Only then come seeds 0 to 4, each with
its own base, training problems and samples, all measured on the same test problems. An arm with
"tune_like" inherits the rate of another arm, and the table says so.

"seconds" are seconds of one core that the run itself used, not of the clock on the wall.

Every run is one line of experiments/results/NAME.jsonl; what stands there is not run again. So a
stopped comparison goes on, and two processes may share one file if each has its own --arms.

    python -m experiments.rl                       everything, one thread
    python -m experiments.rl --arms sft rft        only these arms
    python -m experiments.rl --table               print what there is, run nothing
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import toy
from eval import InputError, evaluate, flag, greedy_accuracy, read_rows

GRID = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 5
SEEDS = (0, 1, 2, 3, 4)
SPLITS = ("hard", "longer", "easy")
LOOK_EVERY = 20                                  # optimizer steps between points of a curve


# ---- rows on disk -------------------------------------------------------------------------------

def load_results(path):
    """The rows of a results file, [] if there is none. InputError for a line that is no row."""
    if not path.exists():
        return []
    return [row for _, row in read_rows(path)]


def add_result(path, row):
    """Append one line in one write: two processes may add to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())


def agrees(row, job):
    """Whether a row is the result of a job."""
    for key, value in job.items():
        if row[key] != value:
            return False
    return True


# ---- tuning, then seeds -------------------------------------------------------------------------

def new_job(name, arms, common, stage, lr, seed):
    """What tells one run from every other. common: settings that all arms share."""
    settings = {**common, **arms[name]}
    settings.pop("tune_like", None)
    return {"arm": name, "stage": stage, "lr": lr, "seed": seed, "settings": settings}


def result(path, run, job):
    """The row of one job: what stands in path, or else what run(settings, lr, seed, stage), a dict
    of figures, returns now."""
    for row in load_results(path):
        if agrees(row, job):
            return row
    # Not there yet.
    start = time.process_time()
    figures = run(job["settings"], job["lr"], job["seed"], job["stage"])
    seconds = round(time.process_time() - start, 1)
    row = {**job, **figures, "seconds": seconds}
    add_result(path, row)
    print(f"{job['arm']}, {job['stage']}, lr {job['lr']:g}, seed {job['seed']}: {seconds} s",
          flush=True)
    return row


def tune(path, run, name, arms, common, grid=GRID):
    """The learning rate of an arm. An arm that learns nothing has "lr" among its settings."""
    if "lr" in arms[name]:
        return arms[name]["lr"]
    # An arm that inherits looks at the runs of its parent, or makes them.
    parent = arms[name].get("tune_like", name)
    best = None
    for lr in grid:
        row = result(path, run, new_job(parent, arms, common, "tune", lr, TUNING_SEED))
        score = (row["valid"], row["valid_2"])
        if best is None or score > best[0]:            # of equals the first, the smaller rate
            best = (score, lr)
    return best[1]


def sweep(path, run, arms, common, flags, columns, grid=GRID):
    """Tune and report the arms that --arms names (none named: all), then print the table."""
    names = flags.arms or list(arms)
    for name in names:
        if name not in arms:
            raise InputError(f"--arms {name} is unknown, choose from {', '.join(arms)}")
    if not flags.table:
        for name in names:
            # First the rate, on seed 5 and tuning problems; only then what is reported.
            lr = tune(path, run, name, arms, common, grid)
            for seed in SEEDS[:flags.seeds]:
                result(path, run, new_job(name, arms, common, "report", lr, seed))
    print_table(path, names, arms, common, columns)


# ---- measuring ----------------------------------------------------------------------------------

def measure(model, tokenizer, stage, max_new_tokens, sampler=None, n=0):
    """The figures of a trained model. At the stage "tune" greedy accuracy on two sets of tuning
    problems, else on hard, longer and easy, and, if n, pass@1, 2, 4, ... n on 64 hard problems."""
    if stage == "tune":
        sets = {"valid": toy.problems("hard", seed=101), "valid_2": toy.problems("hard", seed=102)}
        return greedy_accuracy(model, tokenizer, sets, max_new_tokens, sampler=sampler)
    sets = {split: toy.problems(split) for split in SPLITS}
    row = greedy_accuracy(model, tokenizer, sets, max_new_tokens, sampler=sampler)
    # Sampled as the papers sample: temperature 0.6, top-p 0.95.
    if n:
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= n]
        sampled = evaluate(model, tokenizer, toy.problems("hard", 64), n, 0.6, 0.95,
                           max_new_tokens, ks=ks, sampler=sampler)
        for k, share in sampled["pass@k"].items():
            row[f"pass@{k}"] = share
    return row


def learning_curve(model, tokenizer, steps, learn, max_new_tokens, sampler):
    """Call learn(step) for every step, and every LOOK_EVERY steps measure greedy accuracy on 128
    hard problems -> the curve [[step, accuracy]], its mean height, the first step at 0.5."""
    problems = {"hard": toy.problems("hard", 128)}
    curve, reached = [], None
    for step in range(steps + 1):
        if step % LOOK_EVERY == 0 or step == steps:
            accuracy = greedy_accuracy(model, tokenizer, problems, max_new_tokens, sampler=sampler)
            curve.append([step, accuracy["hard"]])
            if reached is None and accuracy["hard"] >= 0.5:
                reached = step
        if step < steps:
            learn(step)
    return {"curve": curve, "auc": area(curve), "steps_to_half": reached}


def area(curve):
    """Mean height of a curve of straight lines between its points [x, y]."""
    width = curve[-1][0] - curve[0][0]
    if width == 0:
        return curve[0][1]
    total = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        total += (x1 - x0) * (y0 + y1) / 2
    return total / width


# ---- the table ----------------------------------------------------------------------------------

def mean_std(values):
    """"0.52 ± 0.03", the mean and standard deviation over seeds, and of how many if some have no
    value; "-" if none has."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = statistics.mean(known)
    form = ".2f" if abs(mean) < 10 else ",.0f"
    cell = format(mean, form)
    if len(known) > 1:
        cell += f" ± {statistics.stdev(known):{form}}"
    if len(known) < len(values):
        cell += f" ({len(known)} of {len(values)})"
    return cell


def print_table(path, names, arms, common, columns):
    """Markdown, a line an arm, from the rows of path. columns: {title: key of the rows}."""
    print(f"\n| arm | lr | seeds | {' | '.join(columns)} |")
    print("|" + " --- |" * (len(columns) + 3))
    rows = load_results(path)
    for name in names:
        job = new_job(name, arms, common, "report", None, None)
        del job["lr"], job["seed"]
        # Two processes may have done the same run: one row a seed.
        by_seed = {row["seed"]: row for row in rows if agrees(row, job)}
        if not by_seed:
            continue
        cells = [name, "-", str(len(by_seed))]
        if "lr" not in arms[name]:
            cells[1] = f"{by_seed[0]['lr']:.0e}"
        if "tune_like" in arms[name]:
            cells[1] += f" (of {arms[name]['tune_like']})"
        for key in columns.values():
            cells.append(mean_std([row.get(key) for row in by_seed.values()]))
        print("| " + " | ".join(cells) + " |")


# ---- flags --------------------------------------------------------------------------------------

@dataclass
class Flags:
    arms: list[str] = flag([], "only these arms, in this order")
    seeds: int = flag(len(SEEDS), "how many of the five seeds", 1, len(SEEDS))
    table: bool = flag(False, "print the table of the runs there are, run nothing")
    results: str = flag("experiments/results", "the folder of the raw rows")


def results_file(flags, name):
    """The file of a comparison's raw rows."""
    return Path(flags.results) / f"{name}.jsonl"
