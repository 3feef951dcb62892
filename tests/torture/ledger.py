"""The figures of `make torture`: each part prints and keeps what it counted; the last step writes docs/reliability.md.

python tests/torture/ledger.py LEDGER docs/reliability.md     the table between its two marks, from a ledger
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from waiting import clock

BEGIN, END = "<!-- torture: begin -->", "<!-- torture: end -->"


def times(count: int) -> int:
    """The promised number of trials, or the share of it that GEMMA2_TORTURE_SHARE asks for; at least one."""
    return max(round(count * float(os.environ.get("GEMMA2_TORTURE_SHARE", "1"))), 1)


def record(part: str, figures: Mapping[str, int | float], seconds: float) -> None:
    """Print the figures of one part, and append them to the ledger that GEMMA2_TORTURE_LEDGER names.

    part      what was done to what, as the first column of the table: "kill -9 of training commands"
    figures   what was counted -> how often, as the table shows it
    seconds   how long the part took
    """
    sys.stdout.write(f"\n{part}: {_shown(figures)} ({seconds:.0f} s)\n")
    if ledger := os.environ.get("GEMMA2_TORTURE_LEDGER"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
        entry = {"part": part, "test": test, "figures": dict(figures), "seconds": round(seconds, 1)}
        with Path(ledger).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@contextmanager
def recorded(part: str) -> Iterator[dict[str, int]]:
    """Count into the dictionary that this yields; it is recorded when the block ends without an exception."""
    figures: dict[str, int] = {}
    begin = clock()
    yield figures
    record(part, figures, clock() - begin)


def _shown(figures: Mapping[str, int | float]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in figures.items())


def table(lines: list[str]) -> str:
    """The rows of a ledger as Markdown; what was recorded under one part several times is added up."""
    entries: dict[str, dict[str, Any]] = {}
    for entry in map(json.loads, lines):
        held = entries.setdefault(entry["part"], entry | {"figures": Counter(), "seconds": 0.0})
        held["figures"].update(entry["figures"])
        held["seconds"] += entry["seconds"]
    rows = [
        f"| {part} | {_shown(entry['figures'])} | {entry['seconds']:.0f} | `{entry['test']}` |"
        for part, entry in entries.items()
    ]
    total = sum(entry["seconds"] for entry in entries.values())
    share = os.environ.get("GEMMA2_TORTURE_SHARE", "1")
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    head = f"Last run: {datetime.date.today()}, {machine}, share {share}, {total:.0f} s of tests."
    return "\n".join([head, "", "| done | counted | seconds | test |", "| --- | --- | --- | --- |", *rows])


def main() -> None:
    """Put the table of a ledger between the marks of a page."""
    ledger, page = map(Path, sys.argv[1:])
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"error: {page} has no marks {BEGIN} and {END} for the table")
    filled = f"{BEGIN}\n{table(ledger.read_text(encoding='utf-8').splitlines())}\n{END}"
    page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: filled, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
