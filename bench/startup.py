"""How long a help page takes, against a floor measured in the same run: an interpreter that imports nothing.

    python bench/startup.py [--runs 7]

One table: wall time (median and fastest) and CPU time (median) of `gemma2 --help` and of every `gemma2 COMMAND --help`,
rounds interleaved so that a busy moment of the machine hits all of them alike. The limit is 0.3 s for every page's
median wall time, on a machine with nothing else to do; where the CPU time is far below, the machine was busy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from typer.core import TyperGroup

from gemma2.cli.app import COMMANDS, load

LIMIT = 0.3  # seconds


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


def seconds(command: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU time of one process, start to end."""
    started, before = time.perf_counter(), os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="rounds; the median of at least 5 counts")
    options = parser.parse_args()
    runs = max(options.runs, 5)
    lines = command_lines()
    for command in lines.values():
        seconds(command)  # fills the file cache
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in lines}
    for _ in range(runs):
        for name, command in lines.items():
            times[name].append(seconds(command))
    width = max(map(len, lines))
    medians = {name: statistics.median(wall for wall, _ in found) for name, found in times.items()}
    floor = next(iter(medians.values()))
    print(f"{'':<{width}}  median s  fastest s  CPU s  over floor")
    for name, median in medians.items():
        fastest, cpu = min(times[name])[0], statistics.median(cpu for _, cpu in times[name])
        print(f"{name:<{width}}  {median:8.3f}  {fastest:9.3f}  {cpu:5.3f}  {median / floor:9.1f}x")
    slow = [name for name, median in medians.items() if median > LIMIT]
    print(f"\nlimit {LIMIT} s, median of {runs}: {'held by all' if not slow else 'missed by ' + ', '.join(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
