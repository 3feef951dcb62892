"""The command lines that advice names for a file whose bytes are not rows yet: another encoding, other line ends."""

from __future__ import annotations

from pathlib import Path

from .folders import COMPRESSED

__all__ = ["iconv", "line_feeds"]


def iconv(path: str, encoding: str) -> str:
    """What makes UTF-8 of a file."""
    return f"convert it, as with iconv -f {encoding} -t UTF-8 {path} > utf8-{Path(path).name}"


def line_feeds(where: str) -> str:
    """What makes lines of a file whose lines end with a carriage return alone; `where`: file:line."""
    path = Path(where.rpartition(":")[0])
    if path.suffix.lower() in COMPRESSED:
        return "unpack it, and end its lines with line feeds"
    return f"end its lines with line feeds, as with tr '\\r' '\\n' < {path} > lines-{path.name}"
