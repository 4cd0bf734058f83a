"""
sweep.py - the one loop behind every comparison: tune each arm alone, then report five seeds.

An arm is a dict of settings. Its learning rate is the one that does best on tuning problems of its
own, with a base model and training problems of seed 5. Three rates are tried first. While the best
lies at an edge of what was tried, the next rate is tried, too: no pick is the edge of a grid. The
score is accuracy on hard problems, then on a second set of them; below 0.05 that is noise, and easy
problems are added. Only then come seeds 0 to 4, each with its own base, training problems and
samples, all measured on the same test problems. An arm with "tune_like" inherits what was found for
another arm, and the table says so.

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

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
GRID = (3e-4, 1e-3, 3e-3)                        # where the search begins
SHARES = (0.25, 0.5, 0.75)                       # of supervised steps, if an arm has two stages
TUNING_SEED = 5
SEEDS = (0, 1, 2, 3, 4)
SPLITS = ("hard", "longer", "easy")
LOOK_EVERY = 10                                  # batches between points of a curve


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
        if key not in row or row[key] != value:
            return False
    return True


# ---- tuning, then seeds -------------------------------------------------------------------------

def new_job(name, arms, common, stage, tuned, seed):
    """What tells one run from every other. common: settings that all arms share; tuned: what was
    found for this arm, its "lr" and maybe more."""
    settings = {**common, **arms[name], **tuned}
    settings.pop("tune_like", None)
    lr = settings.pop("lr", None)
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


def score(row):
    """How good a tuning run was; of two scores the larger wins. Below 0.05 accuracy on hard
    problems tells little, so there accuracy on easy problems is added: what destroys the model
    does not win by a right answer more."""
    learnt = row["valid"] >= 0.05
    accuracy = row["valid"] if learnt else row["valid"] + row.get("valid_easy", 0.0)
    return learnt, accuracy, row["valid_2"]


def neighbours(tuned):
    """What lies one step away from `tuned` in one of its settings."""
    near = []
    for name, value in tuned.items():
        values = SHARES if name == "supervised" else RATES
        place = values.index(value)
        for other in values[max(0, place - 1):place + 2]:
            near.append({**tuned, name: other})
    return near


def tune(path, run, name, arms, common, grid=GRID):
    """What does best for an arm: {"lr": rate}, and for one of two stages also "sft_lr", the rate of
    the first, and "supervised", its share of the steps. An arm that learns nothing has its "lr"."""
    if "lr" in arms[name]:
        return {}
    # An arm that inherits looks at the runs of its parent, or makes them.
    name = arms[name].get("tune_like", name)
    candidates = [{"lr": lr} for lr in grid]
    if arms[name].get("two_stages"):
        candidates = []
        for sft_lr in grid:
            for lr in grid:
                candidates.append({"lr": lr, "sft_lr": sft_lr, "supervised": 0.5})

    # Until the best has been compared with all its neighbours.
    scores, tried = [], []
    while candidates:
        for tuned in candidates:
            row = result(path, run, new_job(name, arms, common, "tune", tuned, TUNING_SEED))
            scores.append(score(row))
            tried.append(tuned)
        best = tried[scores.index(max(scores))]                    # of equals the first
        candidates = [tuned for tuned in neighbours(best) if tuned not in tried]
    return best


def sweep(path, run, arms, common, flags, columns, grid=GRID):
    """Tune and report the arms that --arms names (none named: all), then print the table."""
    names = flags.arms or list(arms)
    for name in names:
        if name not in arms:
            raise InputError(f"--arms {name} is unknown, choose from {', '.join(arms)}")
    if not flags.table:
        for name in names:
            # First the rate, on seed 5 and tuning problems; only then what is reported.
            tuned = tune(path, run, name, arms, common, grid)
            for seed in SEEDS[:flags.seeds]:
                result(path, run, new_job(name, arms, common, "report", tuned, seed))
    print_table(path, names, arms, common, columns)


# ---- measuring ----------------------------------------------------------------------------------

def measure(model, tokenizer, stage, max_new_tokens, sampler=None, n=0):
    """The figures of a trained model. At the stage "tune" greedy accuracy on three sets of tuning
    problems, else on hard, longer and easy, and, if n, pass@1, 2, 4, ... n on 64 hard problems."""
    if stage == "tune":
        sets = {"valid": toy.problems("hard", seed=101), "valid_2": toy.problems("hard", seed=102),
                "valid_easy": toy.problems("easy", seed=103)}
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
    hard and 128 easy problems -> the curves [[step, accuracy]]; of the hard ones the mean height
    and the first step at 0.5; and how many easy ones are right when 0.3 of the hard ones are."""
    problems = {"hard": toy.problems("hard", 128), "easy": toy.problems("easy", 128)}
    curve, easy, reached = [], [], None
    for step in range(steps + 1):
        if step % LOOK_EVERY == 0 or step == steps:
            accuracy = greedy_accuracy(model, tokenizer, problems, max_new_tokens, sampler=sampler)
            curve.append([step, accuracy["hard"]])
            easy.append([step, accuracy["easy"]])
            if reached is None and accuracy["hard"] >= 0.5:
                reached = step
        if step < steps:
            learn(step)
    return {"curve": curve, "easy_curve": easy, "auc": area(curve), "steps_to_half": reached,
            "easy_at_0.3": value_at(0.3, curve, easy)}


def area(curve):
    """Mean height of a curve of straight lines between its points [x, y]."""
    width = curve[-1][0] - curve[0][0]
    if width == 0:
        return curve[0][1]
    total = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        total += (x1 - x0) * (y0 + y1) / 2
    return total / width


def value_at(level, curve, other):
    """Where `curve` first reaches `level`, the height of `other` there; None if it never does. Both
    are [[x, y]] with the same x, and straight between their points."""
    for i, (_, height) in enumerate(curve):
        if height >= level:
            if i == 0:
                return other[0][1]
            before = curve[i - 1][1]
            share = (level - before) / (height - before)
            return other[i - 1][1] + share * (other[i][1] - other[i - 1][1])
    return None


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


def tuned_cell(row, arm):
    """What was tuned for an arm, as the table says it."""
    if "lr" in arm:
        return "-"
    cell = f"{row['lr']:.0e}"
    if arm.get("two_stages"):
        share = row["settings"]["supervised"]
        cell = f"{row['settings']['sft_lr']:.0e} for {share:.0%}, then {cell}"
    if "tune_like" in arm:
        cell += f" (of {arm['tune_like']})"
    return cell


def print_table(path, names, arms, common, columns):
    """Markdown, a line an arm, from the rows of path. columns: {title: key of the rows}."""
    print(f"\n| arm | lr | seeds | {' | '.join(columns)} |")
    print("|" + " --- |" * (len(columns) + 3))
    rows = load_results(path)
    for name in names:
        settings = new_job(name, arms, common, "report", {}, None)["settings"]
        # Two processes may have done the same run: one row a seed.
        by_seed = {}
        for row in rows:
            reported = row["arm"] == name and row["stage"] == "report"
            if reported and agrees(row["settings"], settings):
                by_seed[row["seed"]] = row
        if not by_seed:
            continue
        some = next(iter(by_seed.values()))
        cells = [name, tuned_cell(some, arms[name]), str(len(by_seed))]
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
