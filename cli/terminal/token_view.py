"""Rows of data token by token with their loss mask: coloured text on a terminal, one line per token elsewhere.

position  id  learn|-  "text"
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence

from gemma2.core.json_files import JsonMapping

from . import opening
from .console import Console

__all__ = ["show_rows"]

# (kind of token, whether it is learned) -> styles of even and odd positions, so that token borders show.
STYLES = {
    ("text", False): ("", "dim"),
    ("text", True): ("black on green", "black on bright_green"),
    ("control", False): ("cyan", "bright_cyan"),
    ("control", True): ("black on bright_yellow", "black on yellow"),
    ("cut", False): ("dim strike", "dim strike"),
    ("cut", True): ("dim strike", "dim strike"),
}
LEGEND = (
    ("context", "text", False),
    ("learned", "text", True),
    ("control token", "control", False),
    ("learned control token", "control", True),
    ("cut off or dropped", "cut", False),
)


def show_rows(rows: Sequence[JsonMapping], console: Console) -> None:
    """Print rows of `show_tokens`; with --json they are the document."""
    if console.as_json:
        console.json(rows)
    elif sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        _coloured(rows)
    else:
        console.text("\n\n".join("\n".join([_title(row), *_lines(row)]) for row in rows))


def _title(row: JsonMapping) -> str:
    tokens, kept = row["tokens"], row["kept"]
    learned = sum(token["target"] for token in tokens[:kept])
    fate = "" if kept == len(tokens) else f", cut after {kept}" if kept else ", too long: dropped"
    return f"{row['where']}: {len(tokens)} tokens, {learned} learned{fate}"


def _lines(row: JsonMapping) -> Iterator[str]:
    for position, token in enumerate(row["tokens"]):
        mark = "cut" if position >= row["kept"] else "learn" if token["target"] else "-"
        yield f"{position:>5}  {token['id']:>6}  {mark:<5}  {json.dumps(token['text'], ensure_ascii=False)}"


def _coloured(rows: Sequence[JsonMapping]) -> None:
    from rich.console import Console as RichConsole
    from rich.text import Text

    opening.clear()
    console = RichConsole(highlight=False)
    legend = Text("  ").join(Text(f" {name} ", style=STYLES[kind, target][0]) for name, kind, target in LEGEND)
    console.print(legend)
    for row in rows:
        console.print(Text(f"\n{_title(row)}", style="bold"))
        text = Text()
        for position, token in enumerate(row["tokens"]):
            kind = "cut" if position >= row["kept"] else "control" if token["control"] else "text"
            text.append(_visible(token["text"]), STYLES[kind, token["target"]][position % 2])
        console.print(text)


def _visible(text: str) -> str:
    """A token as visible text: line ends are marked, and characters that could steer the terminal are escaped."""
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return shown.replace("\n", "⏎\n") or "∅"
