"""The effect of the pipeline over seeds: SFT over base, distillation over SFT, WARP over both, in standard errors.

    python bench/effect.py [--seeds 0 1 2] [--out runs/effect]

Runs `gemma2 quickstart` once per seed (seeds fixed beforehand; a finished run is not repeated) and reads the figures of
its final table. The error of a difference is the root of the summed squares of both standard errors: the policies
answer the same prompts with common random numbers, so this overstates it.
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


def points_of(directory: Path) -> dict[str, dict[str, Any]]:
    """base, SFT, distilled and the slerp of each WARP iteration, by name."""
    points = json.loads((directory / "warp" / "front" / "front.json").read_text(encoding="utf-8"))["points"]
    named = {point["title"]: point for point in points if "title" in point}
    return named | {f"WARP {point['iteration']}": point for point in points if point["kind"] == "slerp"}


def gain(after: dict[str, Any], before: dict[str, Any], metric: str) -> tuple[float, float]:
    """Difference of the means, and the same in standard errors."""
    difference = after[metric] - before[metric]
    return difference, difference / math.hypot(after[f"{metric}_se"], before[f"{metric}_se"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/effect"))
    options = parser.parse_args()
    gemma2 = str(Path(sys.executable).with_name("gemma2"))
    lines, held = [], True
    for seed in options.seeds:
        directory = options.out / f"seed-{seed}"
        started = time.monotonic()
        subprocess.run(
            [gemma2, "quickstart", "--seed", str(seed), "--out", str(directory), "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - started
        points = points_of(directory)
        last = max(name for name in points if name.startswith("WARP"))
        for after, before in (("SFT", "base"), ("distilled", "SFT"), (last, "distilled")):
            cells = []
            for metric in METRICS:
                difference, errors = gain(points[after], points[before], metric)
                cells.append(f"{difference:+.3f} ({errors:+.1f} SE)")
            judged = max(gain(points[after], points[before], metric)[1] for metric in ("judge", "accuracy"))
            held &= gain(points[after], points[before], "reward")[1] > LIMIT and judged > LIMIT
            lines.append(f"| {seed} | {after} - {before} | {' | '.join(cells)} | {seconds:.0f} |")
    print(f"| seed | difference | {' | '.join(METRICS)} | seconds |")
    print("| --- " * (len(METRICS) + 3) + "|")
    print("\n".join(lines))
    print(f"\nreward, and judge or accuracy, above {LIMIT:g} standard errors on every seed: {'yes' if held else 'NO'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
