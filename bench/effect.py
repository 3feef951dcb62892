"""The effect of the pipeline over seeds: SFT over base, distillation over SFT, WARP over both, in standard errors.

    python bench/effect.py [--seeds 0 1 2] [--out runs/effect]

Runs `gemma2 quickstart` once per seed (seeds fixed beforehand; a finished run is not repeated) and reads the figures of
its final table. The error of a difference is the root of the summed squares of both standard errors: the policies
answer the same prompts with common random numbers, so this overstates it.

Distillation has a control: the SFT model trained for as many more steps on the teacher's data, at the learning rate of
the recipe's SFT. Whether a gain is distillation's or that of any further training is the difference to that one.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METRICS = ("reward", "judge", "accuracy")
LIMIT = 3.0  # standard errors
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


def cell(difference: float, error: float) -> str:
    """A difference with its size in standard errors."""
    return f"{difference:+.3f} ({difference / error:+.1f} SE)"


def measured(gemma2: str, directory: Path, seed: int) -> dict[str, dict[str, Any]]:
    """The points of one seed; the quickstart runs where it has not."""
    command = [gemma2, "quickstart", "--seed", str(seed), "--out", str(directory), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return points_of(directory) | {"SFT for longer": control(gemma2, directory, seed)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/effect"))
    options = parser.parse_args()
    gemma2 = str(Path(sys.executable).with_name("gemma2"))
    gains: dict[str, list[list[tuple[float, float]]]] = {}  # comparison -> seed -> metric
    print(f"| seed | difference | {' | '.join(METRICS)} | seconds |\n| --- {'| --- ' * (len(METRICS) + 2)}|")
    for seed in options.seeds:
        started = time.monotonic()
        points = measured(gemma2, options.out / f"seed-{seed}", seed)
        seconds = time.monotonic() - started
        last = max(name for name in points if name.startswith("WARP"))
        for after, before in (*COMPARED, (last, "distilled")):
            row = [gain(points[after], points[before], metric) for metric in METRICS]
            gains.setdefault(f"{after} - {before}", []).append(row)
            print(
                f"| {seed} | {after} - {before} | {' | '.join(cell(*one) for one in row)} | {seconds:.0f} |", flush=True
            )
    for name, rows in gains.items():
        columns = list(zip(*rows, strict=True))
        means = [sum(difference for difference, _ in column) / len(rows) for column in columns]
        errors = [math.hypot(*(error for _, error in column)) / len(rows) for column in columns]
        cells = (cell(mean, error) for mean, error in zip(means, errors, strict=True))
        print(f"| all | {name} | {' | '.join(cells)} | |")
    held = all(
        reward[0] > LIMIT * reward[1] and max(judge[0] / judge[1], accuracy[0] / accuracy[1]) > LIMIT
        for name, rows in gains.items()
        if not name.startswith("distilled")  # whose gain is about the error of one seed: shown, not asserted
        for reward, judge, accuracy in rows
    )
    print(f"\nSFT and WARP: reward, and judge or accuracy, {LIMIT:g} SE up on every seed: {'yes' if held else 'NO'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
