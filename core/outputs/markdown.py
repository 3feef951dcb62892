"""Markdown that can hold any text, and text without traces of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from .hub import SNAPSHOT
from .safetensors_header import printable

__all__ = ["code", "escaped", "fenced", "shown", "table", "without_paths"]

# A model directory in the hub's cache; addresses and paths of this machine inside a text.
ADDRESS = re.compile(r"\w+://\S+")
PLACE = re.compile(r"(?:(?<![\w:./])~?/|(?:\.\./)+)(?:[^\s/,+]+/)*(?P<name>[^\s/,+]+)/?")


def shown(value: object) -> object:
    """Return a setting without traces of this machine: paths become names, addresses are left out."""
    if isinstance(value, Mapping):
        return {str(key): shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


def without_paths(text: str) -> str:
    """Return `shown` of a text."""
    found = SNAPSHOT.search(text)
    if found:
        return f"{found['owner']}/{found['name']}@{found['revision']}"
    if text.startswith(("/", "~/", "../")):
        return PurePosixPath(text).name
    return PLACE.sub(lambda match: match["name"], ADDRESS.sub("(an address)", text))


def code(text: str) -> str:
    """Return a code span that can hold any text."""
    text = printable(text)
    ticks = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (ticks + 1)
    pad = " " if ticks else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def fenced(text: str, language: str) -> str:
    """Return a code block that can hold any text."""
    ticks = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of plain text."""
    lines = [[*map(escaped, columns)], ["---"] * len(columns), *([*map(escaped, row)] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Return text for a line, escaped so that it means nothing to Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", printable(text))
