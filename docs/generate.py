"""Writes docs/commands.md from the commands' own --help pages: `make docs`.

A test compares the file with what this makes, so that no page is ever behind the code.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from typer.core import TyperGroup

from gemma2.cli.app import COMMANDS, invoke, load

TARGET = Path(__file__).with_name("commands.md")
COLUMNS = "100"  # the width of a page, whatever terminal this runs in
HEAD = """\
# Commands

Generated from `--help` by `make docs`. The options under "Output and control" mean the same everywhere.
"""


def page(command: str) -> str:
    """What `gemma2 COMMAND --help` prints into a pipe."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            invoke([*command.split(), "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def commands() -> Iterator[str]:
    """Every command in the order of the first page, each followed by its sub-commands."""
    for name in COMMANDS:
        yield name
        command = load(name)
        if isinstance(command, TyperGroup):
            yield from (f"{name} {child}" for child in command.commands)


def render() -> str:
    """The whole document."""
    sections = [HEAD, f"```\n{page('')}\n```\n"]
    sections += [f"## gemma2 {name}\n\n```\n{page(name)}\n```\n" for name in commands()]
    return "\n".join(sections)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
