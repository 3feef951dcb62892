"""A line on the terminal while a command's modules are imported, which takes seconds; gone when there is more to read.

Imports nothing that takes time: it is the first thing that a command shows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["clear", "show"]

SILENT = {"-h", "--help", "-q", "--quiet", "--version", "--show-completion", "--install-completion"}
_shown = False


def show(words: Sequence[str]) -> None:
    """Write the line, on a terminal, unless the command line asks for silence or for a page."""
    global _shown  # there is one terminal
    plain = os.environ.get("TERM") == "dumb" or os.environ.get("RANK", "0") != "0"
    if not words or words[0].startswith("-") or SILENT & {*words} or plain or not sys.stderr.isatty():
        return
    _shown = True
    sys.stderr.write(f"gemma2 {words[0]}: checking the inputs")
    sys.stderr.flush()


def clear() -> None:
    """Take the line away, before anything else is written to the terminal."""
    global _shown
    if _shown:
        _shown = False
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
