"""Why task vectors of the miniature are 56 degrees apart: the angle follows from the number of completions.

    python bench/angles.py QUICKSTART [QUICKSTART ...] [--jobs 2] [--out runs/angles]

Adam moves a weight by about the learning rate a step; a share s sqrt(B) of the step is signal that all runs have in
common (B completions a step), the rest is its own noise. While the reward climbs, after T steps

    drift = lr T sqrt(B) s,   noise = lr sqrt(T) c,   cos(angle) = 1 / (1 + (c/s)^2 / (T B))

so the angle depends on the completions T B alone, not on batch or learning rate by themselves. Three settings, fixed
beforehand: A was the quickstart's until 2026-11-30; B has an eighth of the batch, a third of the rate and as many
completions; C a quarter of the completions at about the reward of A. (c/s)^2 is taken from A of the same seed; B and C
are then predictions. Policy seeds 101 and 102, beta 0.2, mu T = 3. QUICKSTART: outputs of `gemma2 quickstart --seed N`;
each is one replicate. Differences are paired over the held-out questions; a mean has the error of the replicates.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SETTINGS = {  # prompts a step, samples of each, steps, learning rate
    "A": (8, 4, 60, 3e-4),
    "B": (2, 2, 480, 1e-4),
    "C": (2, 2, 120, 4e-4),
}
SEEDS = (101, 102)
MU_T = 3.0
SHARED = [
    "--beta",
    "0.2",
    "--warmup-steps",
    "5",
    "--temperature",
    "1",
    "--max-new-tokens",
    "28",
    "--save-every",
    "1000",
    "--eval-every",
    "1000",
]


def gemma2(*words: object) -> str:
    """Run a command; what it prints."""
    line = [sys.executable, "-m", "gemma2.cli.main", *map(str, words)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def train(source: Path, out: Path, name: str, seed: int) -> Path:
    """One policy."""
    prompts, samples, steps, rate = SETTINGS[name]
    place = out / f"{name}-{seed}"
    if not (place / "gemma2.json").exists():
        sft = source / "distilled"
        inputs = ["--policy", sft, "--sft", sft, "--reward", source / "reward"]
        inputs += ["--prompts", source / "models/prompts.jsonl", "--heldout", source / "models/heldout.jsonl"]
        size = ["--prompts-per-step", prompts, "--n", samples, "--steps", steps, "--learning-rate", rate]
        gemma2(
            "rlhf", *inputs, *size, *SHARED, "--mu", MU_T / steps, "--seed", seed, "--out", place, "--quiet", "--force"
        )
    return place


def measured(source: Path, out: Path, name: str) -> dict[str, float]:
    """Angle in the blocks, and what merging changes, of one setting."""
    members, sft = [out / f"{name}-{seed}" for seed in SEEDS], source / "distilled"
    merges = [out / f"{name}-{method}" for method in ("slerp", "linear")]
    for place, method in zip(merges, ("slerp", "linear"), strict=True):
        if not place.exists():
            base = ["--base", sft] if method == "slerp" else []
            gemma2("merge", method, *members, *base, "--out", place, "--quiet")
    front = out / f"{name}-front"
    if not front.exists():
        policies = ",".join(map(str, [*members, *merges]))
        words = ["--sft", sft, "--policies", policies, "--reward", source / "reward", "--max-new-tokens", 28]
        gemma2("pareto", *words, "--prompts", source / "models/heldout.jsonl", "--out", front, "--quiet")
    groups = json.loads(gemma2("diff", *members, "--base", sft, "--json"))["groups"]
    angles = [group["task_angle"] for group in groups if group["group"].startswith("layers.")]
    points = {point["label"]: point for point in json.loads((front / "front.json").read_text())["points"]}
    first, second, slerp, linear = (points[place.name] for place in [*members, *merges])
    both = {key: (first[key] + second[key]) / 2 for key in ("reward", "kl")}
    return {
        "angle": statistics.mean(angles),
        "reward": both["reward"],
        "kl": both["kl"],
        "reward, SLERP - members": slerp["reward"] - both["reward"],
        "KL, LERP - members": linear["kl"] - both["kl"],
    }


def predicted(angle: float, completions: int) -> float:
    """The angle after so many completions, where A's is known."""
    prompts, samples, steps, _ = SETTINGS["A"]
    noise = (1 / math.cos(math.radians(angle)) - 1) * prompts * samples * steps
    return math.degrees(math.acos(1 / (1 + noise / completions)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quickstarts", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/angles"))
    options = parser.parse_args()
    work = [
        (source, options.out / str(number), name, seed)
        for number, source in enumerate(options.quickstarts)
        for name in ("B", "A", "C")
        for seed in SEEDS
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda one: train(*one), work))
    found = {
        name: [measured(source, options.out / str(number), name) for number, source in enumerate(options.quickstarts)]
        for name in SETTINGS
    }
    print("| | completions | angle, degrees | predicted | reward | KL | reward, SLERP - members | KL, LERP - members |")
    print("| --- " * 8 + "|")
    for name, rows in found.items():
        prompts, samples, steps, _ = SETTINGS[name]
        known = [predicted(row["angle"], prompts * samples * steps) for row in found["A"]]
        cells = [name, f"{prompts * samples * steps:,}", mean_of([row["angle"] for row in rows], 1)]
        cells += ["" if name == "A" else mean_of(known, 1)]
        cells += [mean_of([row[key] for row in rows], 3) for key in list(rows[0])[1:]]
        print(f"| {' | '.join(cells)} |")


def mean_of(values: list[float], digits: int) -> str:
    """Mean, its error from the spread of the replicates, and the values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f} ({each})"


if __name__ == "__main__":
    main()
