"""What a pipeline costs beside its work: checking, skipping, starting stages; and what two stages at once save.

    python bench/pipeline.py [QUICKSTART] [--rounds 3]

QUICKSTART is a finished output of `gemma2 quickstart`; it is made when it is not there. Medians over the rounds.

    check       seconds to check the quickstart's pipeline whole, in an interpreter of its own, start-up included
    skip        seconds of a run in which every stage is skipped, start-up included
    overhead    seconds per stage beyond its work: a chain of stages, less the server's start (a chain of one), against
                the same functions called one after the other in one warm process
    side by side    wall seconds of M = 2 RL runs with --jobs 2 over those with --jobs 1, one thread each
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

GEMMA2 = str(Path(sys.executable).with_name("gemma2"))
CHAIN = 6  # stages
RL = {"steps": 40, "prompts_per_step": 8, "n": 4, "mu": 0.05, "learning_rate": 3e-4, "warmup_steps": 5}
RL |= {"temperature": 1.0, "max_new_tokens": 28, "eval_every": 40, "eval_prompts": 64, "save_every": 40}


def seconds(words: list[str]) -> float:
    """Wall time of one command line."""
    started = time.perf_counter()
    subprocess.run([GEMMA2, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def median(rounds: int, measured: Callable[[], float]) -> float:
    """Median over the rounds."""
    return statistics.median(measured() for _ in range(rounds))


def write(path: Path, stages: dict[str, Any]) -> str:
    """A pipeline file."""
    path.write_text(yaml.safe_dump({"resources": {"cpus": 1}, "stages": stages}, sort_keys=False), encoding="utf-8")
    return str(path)


def run(file: str, jobs: int = 1) -> float:
    """Wall time of a pipeline from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(["pipeline", "run", file, "--out", f"{folder}/out", "--jobs", str(jobs), "--quiet"])


def chain(kind: str, source: Path, count: int) -> dict[str, Any]:
    """Stages with hardly any work, each after the one before it."""
    stages: dict[str, Any] = {}
    for i in range(count):
        before = [f"s{i - 1}"] if i else []
        if kind == "merge":
            options: dict[str, Any] = {"models": [str(source / "sft")]}
            stages[f"s{i}"] = {"command": "merge passthrough", "options": options, "after": before}
        else:
            options = {**RL, "steps": 1, "eval_prompts": 2, "policy": str(source / "distilled"), **inputs(source)}
            stages[f"s{i}"] = {"command": "rlhf", "options": options, "after": before}
    return stages


def inputs(source: Path) -> dict[str, Any]:
    """What RL reads."""
    models = source / "models"
    files = {"prompts": str(models / "prompts.jsonl"), "heldout": str(models / "heldout.jsonl")}
    return {**files, "reward": [str(source / "reward")]}


def directly(kind: str, source: Path, count: int) -> float:
    """Seconds per stage of the same functions in this process, after one that pays for the imports."""
    import torch

    from gemma2.posttrain.pipelines.compile import with_method
    from gemma2.posttrain.runs.commands import COMMANDS
    from gemma2.posttrain.runs.run_directory import RunOptions

    torch.set_num_threads(1)
    took = []
    for i, stage in enumerate(chain(kind, source, count + 1).values()):
        command = COMMANDS[stage["command"]]
        config = command.schema.model_validate(with_method(stage["command"], stage["options"]))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            command.run(config, RunOptions(Path(folder) / f"s{i}"), _silent())
            took.append(time.perf_counter() - started)
    return statistics.median(took[1:])


def _silent() -> Any:
    from gemma2.core.progress import SILENT

    return SILENT


def overhead(kind: str, source: Path, place: Path, rounds: int) -> tuple[float, float]:
    """(seconds per stage beyond its work, seconds of its work)."""
    long, short = (write(place / f"{kind}-{n}.yaml", chain(kind, source, n)) for n in (CHAIN + 1, 1))
    per_stage = statistics.median((run(long) - run(short)) / CHAIN for _ in range(rounds))
    work = directly(kind, source, CHAIN)
    return per_stage - work, work


def side_by_side(source: Path, place: Path, rounds: int) -> list[tuple[float, float]]:
    """(wall seconds with one job, with two), per round, of two RL runs beyond the start of the pipeline."""
    options = {**RL, "policy": str(source / "distilled"), **inputs(source)}
    file = write(place / "two.yaml", {"rl": {"command": "rlhf", "options": options, "matrix": {"seed": [1, 2]}}})
    return [(run(file, 1), run(file, 2)) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, nargs="?", default=Path("quickstart"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source, rounds = options.quickstart, options.rounds
    seconds(["quickstart", "--out", str(source)])  # what is there is skipped
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        dry = ["pipeline", "run", "quickstart", "--out", f"{folder}/q", "--dry-run"]
        print(f"check: {median(rounds, lambda: seconds(dry)):.2f} s (asked: under 1)")
        print(f"skip: {median(rounds, lambda: seconds(['quickstart', '--out', str(source)])):.2f} s (asked: under 2)")
        for kind in ("merge", "rlhf"):
            extra, work = overhead(kind, source, place, rounds)
            print(f"overhead of a {kind} stage: {extra:.2f} s beside {work:.2f} s of work (asked: under 1)", flush=True)
        pairs = side_by_side(source, place, rounds)
        ratio = statistics.median(two / one for one, two in pairs)
        told = ", ".join(f"{one:.1f} -> {two:.1f}" for one, two in pairs)
        print(f"side by side: {ratio:.2f} of the sequential time ({told} s; asked: 0.65)")


if __name__ == "__main__":
    main()
