"""What the user types: one line with history and arrows, or several between triple quotes."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from gemma2.core.home import cache_folder

__all__ = ["InputLines"]

QUOTES = '"""'
LINES_KEPT = 1000


class InputLines:
    """Reads from the terminal. With `readline`, which Python nearly always has, lines can be edited and recalled."""

    def __init__(self) -> None:
        self.history: Path | None = None
        self.readline = None
        with suppress(ImportError):
            import readline

            self.readline = readline
        if self.readline is not None:
            self.history = cache_folder("chat") / "history"
            with suppress(OSError):
                self.readline.read_history_file(self.history)
            self.readline.set_history_length(LINES_KEPT)

    def line(self, prompt: str, begin: str = "") -> str:
        """One line without its end; with `begin` there to be edited. Raises EOFError at Ctrl-D."""
        if begin and self.readline is not None:
            module = self.readline
            module.set_startup_hook(lambda: module.insert_text(begin.replace("\n", " ")))
        try:
            return input(prompt)
        finally:
            if self.readline is not None:
                self.readline.set_startup_hook()

    def message(self, prompt: str, begin: str = "") -> str:
        """A line, or several: from one that begins with triple quotes to one that ends with them."""
        first = self.line(prompt, begin)
        if not first.lstrip().startswith(QUOTES):
            return first
        rest = first.lstrip().removeprefix(QUOTES)
        lines = [rest]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self.line("... "))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def keep(self) -> None:
        """Write the history, readable by its owner alone."""
        if self.readline is None or self.history is None or not sys.stdin.isatty():
            return
        with suppress(OSError):
            self.history.parent.mkdir(parents=True, exist_ok=True)
            self.history.touch(mode=0o600)
            self.readline.write_history_file(self.history)
