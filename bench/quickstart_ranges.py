"""The quickstart over seeds and over ways to round: the table of README, as ranges.

    python bench/quickstart_ranges.py --out runs/effect            # runs what is missing, then prints the table
    python bench/quickstart_ranges.py --out runs/effect --no-run   # prints the table of what is there
    python bench/quickstart_ranges.py --roundings                  # with seed 0 twice more, rounded differently

Ten seeds on this machine, which bench/effect.py leaves in the same place; a run is kept. With --roundings also seed 0
with the instruction sets of other kinds of processors: without vector instructions in PyTorch (and SSE4.1 in oneDNN),
with AVX2 in both. These round in another order, as another processor would; they are no replacement for one.

The table is made from the summary.json of every run. Rewards are those of reward models that differ between runs, so
their zero means nothing: the reward is given as the gain over the policy from which RL started. A range is the
smallest and the largest value over the runs, not an interval.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

Runs = dict[str, tuple[int, dict[str, str]]]  # name -> seed, environment
RUNS: Runs = {f"seed-{seed}": (seed, {}) for seed in range(10)}
ROUNDINGS: Runs = {
    "seed-0-no-vectors": (0, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE",
                              "OMP_NUM_THREADS": "1"}),
    "seed-0-avx2": (0, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}),
}  # fmt: skip
COLUMNS = (
    ("reward over the start of RL", "gain", 1.0, 2),
    ("KL, nats", "kl", 1.0, 2),
    ("judge", "judge", 1.0, 3),
    ("accuracy, %", "accuracy", 100.0, 1),
    ("length, tokens", "length", 1.0, 1),
)
Row = Mapping[str, object]


def run_missing(out: Path, runs: Runs) -> None:
    """Run every quickstart that has no summary."""
    for name, (seed, variables) in runs.items():
        if not (out / name / "summary.json").is_file():
            words = [str(Path(sys.executable).parent / "gemma2"), "quickstart", "--seed", str(seed)]
            subprocess.run([*words, "--out", str(out / name)], check=True, env={**os.environ, **variables})


def read_runs(out: Path, runs: Runs) -> dict[str, Mapping[str, object]]:
    """The summaries that are there, by the name of their run."""
    files = {name: out / name / "summary.json" for name in runs}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def titled(summary: Mapping[str, object]) -> dict[str, Row]:
    """The rows of a run by what is compared over runs: label, or role where the label differs from run to run."""
    rows: dict[str, Row] = {}
    found = summary["rows"]
    assert isinstance(found, list)
    start = next(row["reward"] for row in found if "where RL started" in row["role"])
    for row in found:
        title = "best single run" if "best single run" in row["role"] else row["label"]
        if not row["role"].startswith("chosen") or (title.startswith("SLERP") and "η" not in title):
            rows[title] = {**row, "gain": row["reward"] - start}
        if "chosen" in row["role"]:
            rows["chosen model"] = {**row, "gain": row["reward"] - start}
    return rows


def table(summaries: Sequence[Mapping[str, object]]) -> str:
    """The Markdown table: for every policy and figure the smallest and the largest value over the runs."""
    runs = [titled(summary) for summary in summaries]
    titles = [
        title for title in dict.fromkeys(title for rows in runs for title in rows) if all(title in r for r in runs)
    ]
    lines = ["| policy | " + " | ".join(name for name, *_ in COLUMNS) + " |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for title in titles:
        cells = [spread([rows[title].get(key) for rows in runs], scale, digits) for _, key, scale, digits in COLUMNS]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def spread(values: Sequence[object], scale: float, digits: int) -> str:
    """`0.83 to 0.85`, or one number where all are alike; a dash where one is missing."""
    known = [float(value) * scale for value in values if isinstance(value, int | float)]
    if len(known) < len(values):
        return "–"
    low, high = (f"{end:.{digits}f}".replace("-", "−") for end in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


def sentence(summaries: Sequence[Mapping[str, object]]) -> str:
    """In how many runs the chosen model gains over the best single run, by the intervals of the runs."""
    gains = [summary["chosen"] for summary in summaries]
    more = less = 0
    values = []
    for gain in gains:
        assert isinstance(gain, dict)
        more += (gain.get("reward_over_single_low") or 0) > 0
        less += (gain.get("reward_over_single_high") or 0) < 0
        values.append(gain.get("reward_over_single"))
    return (
        f"Over the best single run at no more KL the chosen model's reward differs by {spread(values, 1.0, 2)}; a gain "
        f"could be shown in {more} of {len(gains)} runs, a loss in {less}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart over seeds and ways to round, as ranges.")
    parser.add_argument("--out", type=Path, default=Path("runs/effect"))
    parser.add_argument("--no-run", action="store_true", help="only print the table of what is there")
    parser.add_argument("--roundings", action="store_true", help="seed 0 twice more, as other processors round")
    options = parser.parse_args()
    runs = RUNS | ROUNDINGS if options.roundings else RUNS
    if not options.no_run:
        run_missing(options.out, runs)
    found = read_runs(options.out, runs)
    if not found:
        sys.exit(f"error: {options.out} holds no run; leave out --no-run")
    print(f"{len(found)} runs: {', '.join(found)}\n\n{table(list(found.values()))}\n\n{sentence(list(found.values()))}")


if __name__ == "__main__":
    main()
