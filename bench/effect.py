"""The effect of the pipeline over seeds, in standard errors: SFT, distillation, RL and WARP, merging over single runs.

    python bench/effect.py [--seeds 0 1 ... 9] [--at-once 2] [--out runs/effect]

Runs `gemma2 quickstart` once per seed (seeds fixed beforehand; a finished run is not repeated) and reads the figures of
its final table. The error of a difference is the root of the summed squares of both standard errors: the policies
answer the same prompts with common random numbers, so this overstates it.

Distillation has a control: the SFT model trained for as many more steps on the teacher's data, at the learning rate of
the recipe's SFT. Whether a gain is distillation's or that of any further training is the difference to that one.

What merging adds is the row "chosen - single": the chosen point of WARP against the best single run at no more KL, as
the quickstart's own headline has it, paired over the prompts. The rule, fixed before any of the ten seeds was run: the
quickstart shows WARP when that reward is more than two errors above zero on at least eight seeds of ten, and the judge,
which RL never sees, is above zero on at least eight and by more than two errors over all. The chosen model has two
iterations of RL behind it, a single run one; bench/science.py has the run of as many steps.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

METRICS = ("reward", "judge", "accuracy")
LIMIT = 3.0  # standard errors
SHOWN = 2.0  # standard errors of what merging adds
SHARE = 0.8  # of the seeds that must show it
MERGING = "chosen - single"
COMPARED = (("SFT", "base"), ("distilled", "SFT"), ("distilled", "SFT for longer"))


def points_of(directory: Path) -> dict[str, dict[str, Any]]:
    """base, SFT, distilled and the slerp of each WARP iteration, by name."""
    points = json.loads((directory / "warp" / "front" / "front.json").read_text(encoding="utf-8"))["points"]
    named = {point["title"]: point for point in points if "title" in point}
    return named | {f"WARP {point['iteration']}": point for point in points if point["kind"] == "slerp"}


def control(gemma2: str, directory: Path, seed: int) -> dict[str, Any]:
    """The SFT model after as many more steps of SFT as distillation took, measured as the points of the front are."""
    front = json.loads((directory / "warp" / "front" / "gemma2.json").read_text(encoding="utf-8"))["config"]
    sft = json.loads((directory / "sft" / "gemma2.json").read_text(encoding="utf-8"))["config"]
    steps = json.loads((directory / "distilled" / "gemma2.json").read_text(encoding="utf-8"))["config"]["steps"]
    longer = directory / "sft-longer"
    if not longer.exists():
        same = ["--learning-rate", sft["learning_rate"], "--max-length", sft["max_length"], "--warmup-steps", 5]
        inputs = ["--model", directory / "sft", "--data", directory / "clean", "--out", longer]
        words = [gemma2, "sft", *inputs, *same, "--max-steps", steps, "--seed", seed + 1, "--quiet"]
        subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)
    inputs = ["--model", longer, "--sft", directory / "distilled", "--reward", directory / "reward"]
    inputs += ["--prompts", directory / "models" / "heldout.jsonl", "--judge-fn", front["judge_fn"]]
    same = [
        word
        for key in ("temperature", "max_new_tokens", "n", "seed")
        for word in (f"--{key.replace('_', '-')}", front[key])
    ]
    words = [gemma2, "eval", *inputs, *same, "--json", "--quiet"]
    found: dict[str, Any] = json.loads(subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE).stdout)
    return found


def gain(after: dict[str, Any], before: dict[str, Any], metric: str) -> tuple[float, float]:
    """Difference of the means, and its standard error."""
    return after[metric] - before[metric], math.hypot(after[f"{metric}_se"], before[f"{metric}_se"])


def over_single(directory: Path) -> list[tuple[float, float]]:
    """What the chosen model gains over the best single run at no more KL: (difference, error) by metric."""
    chosen = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["chosen"]
    return [(chosen[f"{metric}_over_single"], chosen[f"{metric}_over_single_se"]) for metric in METRICS]


def shows(rows: list[list[tuple[float, float]]]) -> bool:
    """Whether merging's gain holds by the rule above: metrics by seed, reward first, then the judge."""
    reward, judge = ([row[place] for row in rows] for place in (0, 1))
    seen = sum(value > SHOWN * error for value, error in reward)
    agrees = sum(value > 0 for value, _ in judge)
    mean, error = sum(value for value, _ in judge) / len(rows), math.hypot(*(one for _, one in judge)) / len(rows)
    return min(seen, agrees) >= SHARE * len(rows) and mean > SHOWN * error


def cell(difference: float, error: float) -> str:
    """A difference with its size in standard errors."""
    return f"{difference:+.3f} ({difference / error:+.1f} SE)"


def measured(gemma2: str, directory: Path, seed: int) -> dict[str, dict[str, Any]]:
    """The points of one seed; the quickstart runs where it has not."""
    command = [gemma2, "quickstart", "--seed", str(seed), "--out", str(directory), "--jobs", "1", "--json", "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return points_of(directory) | {"SFT for longer": control(gemma2, directory, seed)}


def timed(gemma2: str, directory: Path, seed: int) -> tuple[dict[str, dict[str, Any]], float]:
    """The points of a seed, and the seconds that they took."""
    started = time.monotonic()
    return measured(gemma2, directory, seed), time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--at-once", type=int, default=2, help="seeds at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/effect"))
    options = parser.parse_args()
    gemma2 = str(Path(sys.executable).with_name("gemma2"))
    gains: dict[str, list[list[tuple[float, float]]]] = {}  # comparison -> seed -> metric
    print(f"| seed | difference | {' | '.join(METRICS)} | seconds |\n| --- {'| --- ' * (len(METRICS) + 2)}|")
    with ThreadPoolExecutor(options.at_once) as pool:
        found = pool.map(lambda seed: (seed, *timed(gemma2, options.out / f"seed-{seed}", seed)), options.seeds)
        for seed, points, seconds in found:
            last = max(name for name in points if name.startswith("WARP"))
            rows = {
                f"{after} - {before}": [gain(points[after], points[before], metric) for metric in METRICS]
                for after, before in (*COMPARED, (last, "distilled"))
            }
            for name, row in {**rows, MERGING: over_single(options.out / f"seed-{seed}")}.items():
                gains.setdefault(name, []).append(row)
                cells = " | ".join(cell(*one) for one in row)
                print(f"| {seed} | {name} | {cells} | {seconds:.0f} |", flush=True)
    for name, rows in gains.items():
        columns = list(zip(*rows, strict=True))
        means = [sum(difference for difference, _ in column) / len(rows) for column in columns]
        errors = [math.hypot(*(error for _, error in column)) / len(rows) for column in columns]
        cells = (cell(mean, error) for mean, error in zip(means, errors, strict=True))
        print(f"| all | {name} | {' | '.join(cells)} | |")
    held = all(
        reward[0] > LIMIT * reward[1] and max(judge[0] / judge[1], accuracy[0] / accuracy[1]) > LIMIT
        for name, rows in gains.items()
        if not name.startswith(("distilled", MERGING))  # whose gain is about the error of one seed: shown, not asserted
        for reward, judge, accuracy in rows
    )
    print(f"\nSFT and WARP: reward, and judge or accuracy, {LIMIT:g} SE up on every seed: {'yes' if held else 'NO'}")
    merged = shows(gains[MERGING])
    print(f"WARP's choice over the best single run at no more KL, by the rule: {'yes' if merged else 'NO'}")
    return 0 if held and merged else 1


if __name__ == "__main__":
    sys.exit(main())
