"""How long a help page takes, against a floor measured in the same run: an interpreter that imports nothing.

    python bench/startup.py [--runs 7] [--peer "/path/to/trl sft --help"] [--peer ...]

One table: wall time (median and fastest) and CPU time (median) of `gemma2 --help` and of every `gemma2 COMMAND --help`,
rounds interleaved so that a busy moment of the machine hits all of them alike. The limit is 0.3 s for every page's
median wall time, on a machine with nothing else to do; where the CPU time is far below, the machine was busy.

`--peer` adds the help page of another tool, from a separate environment, timed in the same rounds. Next to the pages:
a typo in a recipe and on the command line until it is answered, and `gemma2 config check` of a pipeline.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from typer.core import TyperGroup

from gemma2.cli.app import COMMANDS, load
from gemma2.configs import recipes

LIMIT = 0.3  # seconds
ANSWER = 1.0  # seconds until a typo is answered
PEER_RUNS = 3


def command_lines() -> dict[str, list[str]]:
    """What is timed, by the name it has in the table."""
    gemma2 = str(Path(sys.executable).with_name("gemma2"))
    names = [""]
    for name in COMMANDS:
        command = load(name)
        children = command.commands if isinstance(command, TyperGroup) else ()
        names += [name, *(f"{name} {child}" for child in children)]
    lines = {" ".join(["gemma2", *name.split(), "--help"]): [gemma2, *name.split(), "--help"] for name in names}
    return {"python -c pass (the floor)": [sys.executable, "-c", "pass"]} | lines


def answers(folder: Path) -> dict[str, list[str]]:
    """Command lines with a typo, and the check of a pipeline with one: none imports torch."""
    gemma2 = str(Path(sys.executable).with_name("gemma2"))
    recipe, pipeline = folder / "recipe.yaml", folder / "pipeline.yaml"
    recipe.write_text("learning_rat: 1e-4\n", encoding="utf-8")
    pipeline.write_text(recipes()["align"].read_text(encoding="utf-8").replace("patience", "patence"), encoding="utf-8")
    inputs = ["--model", "m", "--data", "d", "--out", "o"]
    return {
        "a typo in a recipe of sft": [gemma2, "sft", "--config", str(recipe), *inputs],
        "a typo in a flag of rlhf": [gemma2, "rlhf", "--polcy", "p"],
        "config check of align with a typo": [gemma2, "config", "check", str(pipeline)],
    }


def seconds(command: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU time of one process, start to end."""
    started, before = time.perf_counter(), os.times()
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    assert ended.returncode == 0 or command[-1] != "--help", f"{shlex.join(command)} failed"
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="rounds; the median of at least 5 counts")
    parser.add_argument("--peer", action="append", default=[], help="command line of another tool's help page")
    options = parser.parse_args()
    runs = max(options.runs, 5)
    pages = command_lines()
    peers = {f"{Path(line.split()[0]).name} {' '.join(line.split()[1:])}": shlex.split(line) for line in options.peer}
    with tempfile.TemporaryDirectory() as folder:
        lines = pages | answers(Path(folder)) | peers
        for command in lines.values():
            seconds(command)  # fills the file cache
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in lines}
        for number in range(runs):
            for name, command in lines.items():
                if name not in peers or number < PEER_RUNS:
                    times[name].append(seconds(command))
    width = max(map(len, lines))
    medians = {name: statistics.median(wall for wall, _ in found) for name, found in times.items()}
    floor = next(iter(medians.values()))
    print(f"{'':<{width}}  median s  fastest s  CPU s  over floor")
    for name, median in medians.items():
        fastest, cpu = min(times[name])[0], statistics.median(cpu for _, cpu in times[name])
        print(f"{name:<{width}}  {median:8.3f}  {fastest:9.3f}  {cpu:5.3f}  {median / floor:9.1f}x")
    slow = [name for name in medians if medians[name] > (LIMIT if name in pages else ANSWER) and name not in peers]
    limits = f"limit of a page {LIMIT} s, of an answer {ANSWER:g} s"
    print(f"\n{limits}, median of {runs}: {'held by all' if not slow else 'missed by ' + ', '.join(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
