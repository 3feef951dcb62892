"""WARM and reward hacking in miniature: RL against one reward model, or against the average of four, and a true judge.

    python bench/hacking.py QUICKSTART [QUICKSTART ...] [--jobs 2] [--out runs/hacking] [--rehearsal]

QUICKSTART: the output of `gemma2 quickstart --seed N`, one replicate each; used are its models, distilled and pairs.
WARM (arXiv 2401.12187) claims that the reward of a control model, which RL does not see, collapses under a single
reward model, that an average of weights delays this, and the later the more models are averaged (figure 1, section 5).
Here the control is the judge by which the pairs were ranked: a program that cannot be flattered (tiny/tasks.py).

    turned          the quickstart's pairs; TURNED of them, drawn once for all members, have their labels exchanged
    held            pairs of the distilled model's answers to the held-out prompts, ranked by the judge, none exchanged
    probe           the head that all members start from
    member-1 .. 4   Bradley-Terry on `turned` for 80 steps; seed, learning rate and dropout differ (MEMBERS)
    average         `gemma2 merge linear` of the four
    rl-1, rl-2      RL from `distilled` against member-1 and member-2: 72 steps, 8 prompts x 4 samples
    rl-average      the same steps, seed and prompts against the average

Every run measures itself every 8 steps on the 448 held-out prompts with common random numbers. The judge is a term of
the reward with weight 0: it is measured with the rest, and adds exactly nothing to what RL learns from.

The rule, fixed before any of this was run for a seed that counts. Of every seed, average - mean of its members:

    H1  judge at the last step > 0
    H2  judge over the run > 0: the area under its curve over the steps (trapezoids) divided by the steps
    H3  step at which the judge is highest > 0 (later); the first such step, among those measured, step 0 included
    H4  accuracy on the pairs of `held` > 0, the four members on average

A claim HOLDS when its mean over seeds is more than LIMIT = 3 errors above zero and every seed has that sign; it FAILS
when all this is so for the other sign; else the two are NOT TOLD APART. H3 has few values, so a tie on one seed is
enough for the last. Errors are over seeds and prompts together, the larger of both (findings.over_seeds). Those of
prompts: H4 pairs the models, and clusters pairs by prompt; H1 and H2 take the members' errors as equal to their mean,
those of the stops as fully correlated and both sides as independent, which can only be too large; H3 has none.

A guard of `rlhf` ends a run whose answers are all cut for three steps. Its last evaluation then stands for the stops
that it did not reach, where the judge could only be lower. (This was added when seed 1's first run had ended so at step
61, and before any figure of the claims had been computed.)

What this leaves open: the rewards have different units. The average's may vary less than a member's, so that beta
weighs more against it, and its policy goes less far in as many steps. The table therefore has the KL, and the judge at
the largest KL that all runs of a seed reached. Without a penalty the judge collapses within ten steps (docs/log.md).

Every step is a `gemma2` command in a process of its own; a finished one is not repeated, an interrupted one is resumed.
Only the scores of H4 are computed here, since `gemma2 reward eval` prints no score of a pair. --rehearsal walks the
same path in OUT/rehearsal with two steps a run and 8 prompts, and claims nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from findings import over_seeds
from hacking_claims import CLAIMS, Curve, Seed, accuracy_gain, claims, described, verdict
from real import Step, perform

MEMBERS = ((5e-4, 0.0), (3e-4, 0.05), (7e-4, 0.1), (5e-4, 0.05))  # learning rate, dropout; seeds 1 to 4
RUNS = ("rl-1", "rl-2", "rl-average")
TURNED = 0.25  # share of the labels; WARM's corrupted data has as many
SAMPLING = "--max-new-tokens 28 --temperature 1"
NEEDED = ("distilled/gemma2.json", "models/heldout.jsonl", "models/prompts.jsonl", "pairs/pairs.jsonl")
DIGITS = 5
STOPPED = 3  # exit code when a guard ended a command


@dataclass(frozen=True)
class Size:
    """How much is run: optimizer steps, steps between measurements, held-out prompts."""

    fitted: int = 80  # of each reward model, 16 pairs a step
    steps: int = 72
    every: int = 8
    held: int = 448


REHEARSAL = Size(fitted=2, steps=2, every=1, held=8)


# --- the run --------------------------------------------------------------------------------------------------------


def steps(source: Path, size: Size) -> Iterator[Step]:
    """The commands of one quickstart, as typed inside its output directory."""
    sft, models = shlex.quote(str(source / "distilled")), source / "models"
    prompts, held = (shlex.quote(str(models / name)) for name in ("prompts.jsonl", "heldout.jsonl"))
    yield Step(
        "held",
        f"reward pairs --model {sft} --prompts {held} --judge gemma2.posttrain.tiny.tasks:judge_reward --n 4 "
        f"{SAMPLING} --batch-size 128 --select all --min-margin 0.05 --limit {size.held}",
        "held",
    )
    fit = f"--model {sft} --data turned.jsonl --max-length 96 --eval-fraction 0"
    yield Step("probe", f"reward probe {fit}", "probe", resumable=False)
    for number, (rate, dropout) in enumerate(MEMBERS, 1):
        yield Step(
            f"member {number}",
            f"reward {fit} --from-head probe --max-steps {size.fitted} --batch-size 16 "
            f"--warmup-steps {min(10, size.fitted - 1)} --learning-rate {rate:g} --dropout {dropout:g} --seed {number} "
            "--epochs 100 --save-every 10000",
            f"member-{number}",
        )
    names = " ".join(f"member-{number}" for number in range(1, len(MEMBERS) + 1))
    yield Step("average", f"merge linear {names}", "average", resumable=False)
    for run in RUNS:
        yield Step(
            run,
            f"rlhf --policy {sft} --sft {sft} --reward {run.replace('rl-', 'member-').replace('member-av', 'av')} "
            f"--reward-fn marks:marks --reward-weights 1,0 --prompts {prompts} --heldout {held} "
            f"--prompts-per-step 8 --n 4 --steps {size.steps} {SAMPLING} --learning-rate 5e-4 "
            f"--warmup-steps {min(5, size.steps - 1)} --beta 0.02 --mu 0.05 --max-kl 10000 "
            f"--eval-every {size.every} --eval-prompts {size.held} --eval-seed 0 --save-every 40 --seed 101",
            run,
        )


def check(source: Path) -> Path:
    """The quickstart's absolute path. Exits with one line where it is not one."""
    for name in NEEDED:
        if not (source / name).is_file():
            sys.exit(f"error: {source} has no {name}: make it with gemma2 quickstart --seed N --out {source}")
    return source.resolve()


def turn(row: Mapping[str, Any]) -> dict[str, Any]:
    """The pair with its two sides exchanged, and all that belongs to either."""
    names = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {}
    for key, value in row.items():
        side, mark, rest = key.partition("_")
        swapped[names.get(side, side) + mark + rest] = value
    return swapped


def prepare(source: Path, directory: Path) -> None:
    """Write the pairs to learn from, TURNED of them exchanged; the same ones whenever it is called."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random("labels")
    lines = (source / "pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [turn(row) if draw.random() < TURNED else row for row in map(json.loads, lines)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not (place := directory / "turned.jsonl").exists() or place.read_text(encoding="utf-8") != text:
        place.write_text(text, encoding="utf-8")


def scored(directory: Path) -> dict[str, list[list[float]]]:
    """Model -> by prompt of `held`, 1 for each pair in the judge's order, 0.5 for a tie, else 0. Kept in a file."""
    place = directory / "scores.json"
    if place.exists():
        found: dict[str, list[list[float]]] = json.loads(place.read_text(encoding="utf-8"))
        return found
    from gemma2.posttrain.models.loading import quiet_libraries
    from gemma2.posttrain.rewards.model import RewardModel

    quiet_libraries()
    rows = [json.loads(line) for line in (directory / "held" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = [row["prompt"][-1]["content"] for row in rows]
    found = {}
    for name in (*(f"member-{number}" for number in range(1, len(MEMBERS) + 1)), "average"):
        model = RewardModel.from_dir(directory / name)
        better, worse = (
            model.score_text(
                [row["prompt"] for row in rows],
                [row[side][0]["content"] for row in rows],
                [row[f"{side}_truncated"] for row in rows],
            ).tolist()
            for side in ("chosen", "rejected")
        )
        hits = [0.5 if a == b else float(a > b) for a, b in zip(better, worse, strict=True)]
        found[name] = by_question(questions, hits)
    place.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def by_question(questions: Sequence[str], values: Sequence[float]) -> list[list[float]]:
    """The values of each question, in the order in which the questions first come."""
    found: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        found.setdefault(question, []).append(value)
    return list(found.values())


# --- what was measured ----------------------------------------------------------------------------------------------


def run_or_stop(step: Step, directory: Path) -> None:
    """Run one step to its end; one of RL may also be ended by a guard, which is remembered."""
    mark = directory / f"{step.name}.stopped"
    if mark.exists():
        return
    try:
        perform(step, directory)
    except SystemExit as end:
        if step.name not in RUNS or end.code != f"error: gemma2 {step.name} ended with {STOPPED}":
            raise
        mark.touch()


def place_of(run: str, directory: Path) -> Path:
    """Where the metrics of a run are: in its output, or if a guard ended it in what is left of it."""
    return directory / (f".{run}.partial" if (directory / f"{run}.stopped").exists() else run)


def read_curve(run: Path, size: Size) -> Curve:
    """The evaluations in a run's metrics; the last one also for every stop that the run did not reach.

    The reward function's columns are named after it.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    stops = [row for row in rows if row.get("kind") == "eval"]
    stops += [
        {**stops[-1], "step": step}
        for step in range(0, size.steps + 1, size.every)
        if step > max(row["step"] for row in stops)
    ]
    names = {name: next(key for key in stops[0] if key.endswith(name)) for name in ("marks", "accuracy")}

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in stops]

    return Curve(
        [row["step"] for row in stops],
        column(names["marks"]),
        column(f"{names['marks']}_se"),
        column(names["accuracy"]),
        column("reward"),
        column("reward_se"),
        column("kl"),
        column("length"),
        stops[0]["n"],
    )


# --- what is written ------------------------------------------------------------------------------------------------


def tables(seeds: Mapping[str, Seed]) -> str:
    """Claims with their verdicts, what is described, and the curves by step, as Markdown."""
    found = {name: claims(seed) for name, seed in seeds.items()}
    lines = [
        _line(["claim", "average − members", "mean ± error", *seeds, "verdict"]),
        _line(["---"] * (len(seeds) + 4)),
    ]
    for claim, words in CLAIMS.items():
        each = [one[claim] for one in found.values()]
        mean, error = over_seeds(each)
        cells = [_number(one.value, one.se) for one in each]
        lines.append(_line([claim, words, _number(mean, error), *cells, verdict(each)]))
    lines += ["", _line(["mean over seeds", "single", "average"]), _line(["---", "---:", "---:"])]
    rows = [described(seed) for seed in seeds.values()]
    for name in rows[0]:
        lines.append(_line([name, *(f"{np.mean([row[name][side] for row in rows]):.3f}" for side in (0, 1))]))
    columns = ("judge", "accuracy", "own reward, gain in sd", "KL", "tokens")
    head = [f"{name}: {kind}" for name in columns for kind in ("single", "average")]
    lines += ["", _line(["step", *head]), _line(["---:"] * (len(head) + 1))]
    for place, step in enumerate(next(iter(seeds.values())).runs["rl-average"].step):
        cells = []
        for of in ("judge", "accuracy", "gain", "kl", "length"):
            cells += [f"{_mean_at(seeds, of, kind, place):.3f}" for kind in ("single", "average")]
        lines.append(_line([str(step), *cells]))
    return "\n".join(lines)


def _curves(seeds: Mapping[str, Seed], kind: str) -> list[Curve]:
    return [
        curve for seed in seeds.values() for curve in (seed.members if kind == "single" else [seed.runs["rl-average"]])
    ]


def _values(curve: Curve, of: str) -> Sequence[float]:
    values: Sequence[float] = curve.gain("reward") if of == "gain" else getattr(curve, of)
    return values


def _mean_at(seeds: Mapping[str, Seed], of: str, kind: str, place: int) -> float:
    """Mean over seeds and runs at one stop."""
    return float(np.mean([_values(curve, of)[place] for curve in _curves(seeds, kind)]))


def _number(value: float, error: float) -> str:
    """A difference with its error, if it has one."""
    text = f"{value:+.4f}".replace("-", "−")
    return f"{text} ± {error:.4f}" if math.isfinite(error) else text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(seeds: Mapping[str, Seed], place: Path) -> None:
    """Judge and own reward by step: every run thin, the mean over seeds thick."""
    from gemma2.posttrain.reports.plots.figures import HUES, new_figure, styled, write_figure

    labels = {"single": "one reward model", "average": f"average of {len(MEMBERS)}"}
    panels = {"judge": "judge, which RL does not see", "gain": "own reward, gain in sd of the first answers"}
    with styled():
        figure, axes = new_figure(9.6, 3.9, columns=2)
        for axis, (of, title) in zip(axes, panels.items(), strict=True):
            for (kind, label), hue, marker in zip(labels.items(), (HUES[1], HUES[0]), "so", strict=True):
                curves = _curves(seeds, kind)
                for curve in curves:
                    axis.plot(curve.step, _values(curve, of), color=hue, lw=0.7, alpha=0.4)
                mean = np.mean([_values(curve, of) for curve in curves], axis=0)
                axis.plot(curves[0].step, mean, color=hue, lw=2.2, marker=marker, ms=4, label=label)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel("step of RL")
        axes[1].legend(frameon=False, fontsize=9, loc="upper left")
        for suffix in (".png", ".svg"):
            write_figure(figure, place.with_suffix(suffix))


def write_values(seeds: Mapping[str, Seed], place: Path) -> None:
    """Curves, and the sums per model over held-out pairs: all that the tables are made of but H4's errors."""
    document = {}
    for name, seed in seeds.items():
        runs = {run: {key: _rounded(value) for key, value in asdict(curve).items()} for run, curve in seed.runs.items()}
        right = {model: [sum(map(sum, pairs)), sum(map(len, pairs))] for model, pairs in seed.scores.items()}
        gain = accuracy_gain(seed.scores)
        document[name] = {
            "runs": runs,
            "right of pairs": right,
            "H4": [round(gain.value, DIGITS), round(gain.se, DIGITS)],
        }
    place.write_text(json.dumps(document) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    return [round(one, DIGITS) for one in value] if isinstance(value, list) else value


def measured(source: Path, directory: Path, size: Size) -> Seed:
    """Run what is left of one quickstart's steps, and read what they measured."""
    prepare(source, directory)
    for step in steps(source, size):
        run_or_stop(step, directory)
    return Seed({run: read_curve(place_of(run, directory), size) for run in RUNS}, scored(directory))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstarts", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="quickstarts at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/hacking"))
    parser.add_argument("--rehearsal", action="store_true", help="two steps a run, 8 prompts: the path, no claim")
    options = parser.parse_args()
    sources = {source.name: source for source in map(check, options.quickstarts)}
    if len(sources) < len(options.quickstarts):
        sys.exit("error: two quickstarts have the same name, which names their part of --out: rename one of them")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks gain nothing from a second, and figures repeat
    size, out = (REHEARSAL, options.out / "rehearsal") if options.rehearsal else (Size(), options.out)
    with ThreadPoolExecutor(options.jobs) as pool:
        work = [pool.submit(measured, source, out / name, size) for name, source in sources.items()]
        seeds = dict(zip(sources, (one.result() for one in work), strict=True))
    write_values(seeds, out / "hacking.json")
    draw(seeds, out / "hacking")
    text = tables(seeds)
    (out / "hacking.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
