"""Answers on the terminal while they are drawn: one model as a stream, two in columns or one under the other."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma2.core.shown import visible

if TYPE_CHECKING:
    from gemma2.posttrain.chat.speaker import Spoken

__all__ = ["Answered", "Screen"]

WIDE = 100  # columns from which two answers stand next to each other
ENDS = {"length": "cut at max_new_tokens", "context": "the context is full", "stopped": "stopped"}


@dataclass
class Answered:
    """An answer and how it ended: "stop", "length", "context", or "stopped" by the user."""

    text: str = ""
    end: str = ""


class Screen:
    """Where answers go. Control characters of a model are escaped; without a terminal there is no ANSI.

    silent  nothing is shown: the answers are read from what `one` and `two` return
    """

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.plain = (
            silent or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb" or "NO_COLOR" in os.environ
        )

    def write(self, text: str) -> None:
        """Text as it is, at once."""
        if self.silent:
            return
        sys.stdout.write(text)
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """A line that is not an answer."""
        self.write(f"{visible(text)}\n" if self.plain else f"\x1b[2m{visible(text)}\x1b[0m\n")

    def heading(self, name: str) -> None:
        """The name of a model above its answer."""
        self.write(f"{visible(name)}:\n" if self.plain else f"\x1b[1m{visible(name)}\x1b[0m\n")

    def one(self, pieces: Iterator[Spoken], stopped: Callable[[], bool]) -> Answered:
        """Stream an answer."""
        found = Answered()
        for piece in pieces:
            found.text += piece.text
            self.write(_shown(piece.text))
            if piece.end:
                found.end = piece.end
                break
            if stopped():
                found.end = "stopped"
                break
        self.write("\n")
        self._end(found)
        return found

    def two(
        self, names: Sequence[str], streams: Sequence[Iterator[Spoken]], stopped: Callable[[], bool]
    ) -> list[Answered]:
        """Answers of two models: next to each other on a wide terminal, else one under the other."""
        width = shutil.get_terminal_size().columns
        if self.plain or width < WIDE:
            found = []
            for name, stream in zip(names, streams, strict=True):
                self.heading(name)
                found.append(self.one(stream, stopped))
                if found[-1].end == "stopped":
                    break
            return [*found, *(Answered(end="stopped") for _ in names[len(found) :])]
        return self._columns(names, streams, stopped, (width - 3) // 2)

    def _columns(
        self, names: Sequence[str], streams: Sequence[Iterator[Spoken]], stopped: Callable[[], bool], width: int
    ) -> list[Answered]:
        """Draw from both in turn; the lines that have changed are written again."""
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        found = [Answered() for _ in names]

        def table() -> Table:
            grid = Table(box=None, padding=(0, 1), expand=True)
            for name in names:
                grid.add_column(Text(visible(name)), ratio=1)
            grid.add_row(*(Text(_shown(one.text)) for one in found))
            return grid

        with Live(table(), console=Console(highlight=False), refresh_per_second=8, transient=True) as live:
            while any(not one.end for one in found) and not stopped():
                for one, stream in zip(found, streams, strict=True):
                    if not one.end:
                        piece = next(stream)
                        one.text, one.end = one.text + piece.text, piece.end
                live.update(table())
        for one in found:
            one.end = one.end or "stopped"
        self._settled(names, found, width)
        for one in found:
            self._end(one)
        return found

    def _settled(self, names: Sequence[str], found: Sequence[Answered], width: int) -> None:
        """The finished columns, which stay in the scrollback."""
        sides = [[visible(name), *_wrapped(_shown(one.text), width)] for name, one in zip(names, found, strict=True)]
        for number in range(max(map(len, sides))):
            left, right = (side[number] if number < len(side) else "" for side in sides)
            self.write(f"{left:<{width}} | {right}".rstrip() + "\n")

    def _end(self, found: Answered) -> None:
        if found.end in ENDS:
            if self.plain:  # stdout has the answer and nothing else
                sys.stderr.write("" if self.silent else f"({ENDS[found.end]})\n")
            else:
                self.say(f"({ENDS[found.end]})")


def _shown(text: str) -> str:
    """Text of a model, line breaks kept, other control characters escaped."""
    return "\n".join(visible(line) for line in text.split("\n"))


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, width, replace_whitespace=False, drop_whitespace=False) or [""]
    return lines
