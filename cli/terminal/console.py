"""Output to the user: results on stdout, progress and notes on stderr. Only this module prints.

A terminal gets rich bars and tables; a pipe gets plain lines without ANSI; `--json` gets one JSON document.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from gemma2.core.json_files import JsonMapping, finite
from gemma2.core.progress import Task
from gemma2.core.shown import visible, visible_json
from gemma2.core.sizes import size

from . import opening

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress as Display
    from rich.progress import TaskID

    from .watch_view import ViewLine

__all__ = ["Console"]

PLAIN_INTERVAL = 15.0  # seconds between progress lines outside a terminal


def _size(amount: float, unit: str) -> str:
    return size(amount) if unit == "bytes" else f"{amount:,.0f}"


def _value(value: object) -> str:
    """A value as text for people: numbers with four significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return "  ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_value(item) for item in value)
    return str(value)


def _write_line(text: str) -> None:
    """Write a line to stderr. A reader that has closed the pipe (`2>&1 | head`) does not stop the work."""
    opening.clear()
    try:
        sys.stderr.write(visible(text) + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        # The rest of the buffer would fail again when the interpreter shuts down, with exit code 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _as_json(document: object, indent: int | None = None) -> str:
    try:
        text = json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:  # a number that is not finite
        text = json.dumps(finite(document), indent=indent, ensure_ascii=False, default=str)
    return visible_json(text)


def _is_table(value: object) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def _plain(text: str) -> str:
    """Text of others inside of rich's markup: its brackets are text, and what steers the terminal is escaped."""
    from rich.markup import escape

    return escape(visible(text))


class _PlainTask:
    """Progress as one line every PLAIN_INTERVAL seconds, for logs and pipes."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.fields: dict[str, float | str] = {}
        self.started = self.last_line = time.monotonic()
        self._lock = Lock()

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        with self._lock:  # merges advance it from several threads
            self.done += amount
            self.fields |= fields
            if time.monotonic() - self.last_line >= PLAIN_INTERVAL:
                self.write()

    def write(self) -> None:
        self.last_line = time.monotonic()
        elapsed = self.last_line - self.started
        of = f" of {_size(self.total, self.unit)}" if self.total else ""
        live = "".join(f", {key} {_value(value)}" for key, value in self.fields.items())
        _write_line(f"{self.label}: {_size(self.done, self.unit)}{of} {self.unit} in {elapsed:.0f} s{live}")


class _RichTask:
    """One row of a rich progress display."""

    def __init__(self, display: Display, identifier: TaskID, unit: str) -> None:
        self.display, self.identifier, self.unit = display, identifier, unit
        self.fields: dict[str, float | str] = {}
        self.done = 0.0
        self._lock = Lock()

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        with self._lock:
            self.done += amount
            self.fields |= fields
        live = "  ".join(f"[dim]{_plain(key)}[/] {_plain(_value(value))}" for key, value in self.fields.items())
        self.display.update(self.identifier, advance=amount, live=live)

    def end(self, failed: bool = False) -> None:
        """End the row. What is finished is full, also where less was to do than was known at the start."""
        self.display.stop_task(self.identifier)
        if failed:
            self.display.update(self.identifier, failed=True)
        else:
            self.display.update(self.identifier, total=self.done, completed=self.done)


class Console:
    """Implements `Progress` and prints results. With `quiet`, only warnings and errors go to stderr."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.interactive = sys.stderr.isatty() and not quiet
        self._display: Display | None = None
        self._live: Live | None = None

    @contextmanager
    def task(self, label: str, total: float | None, unit: str) -> Iterator[Task]:
        if self.quiet or not self.interactive:
            line = _PlainTask(label, total, unit)
            if self.quiet:
                line.last_line = float("inf")
            yield line
            if not self.quiet and line.last_line != line.started:
                line.write()
            return
        opening.clear()
        inner = self._display is not None
        with self._shared_display() as display:
            identifier = display.add_task(_plain(label), total=total, live="", unit=unit, failed=False)
            task = _RichTask(display, identifier, unit)
            try:
                yield task
            except BaseException:
                task.end(failed=True)
                raise
            else:
                task.end()
            finally:
                if inner:  # else the rows of a long job would fill the screen
                    display.remove_task(identifier)

    @contextmanager
    def _shared_display(self) -> Iterator[Display]:
        """The one live display that nested tasks share: rich allows only one per terminal."""
        if self._display is not None:
            yield self._display
            return
        from rich.console import Console as RichConsole

        from .display import progress_display

        with progress_display(RichConsole(stderr=True)) as display:
            self._display = display
            try:
                yield display
            finally:
                self._display = None

    def note(self, text: str) -> None:
        if not self.quiet:
            self._say(text, style="")

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}", style="yellow")

    def _say(self, text: str, style: str) -> None:
        if self.interactive:
            opening.clear()
            from rich.console import Console as RichConsole

            console = self._display.console if self._display is not None else RichConsole(stderr=True)
            console.print(visible(text), style=style, markup=False, highlight=False)
        else:
            _write_line(text)

    def width(self, most: int) -> int:
        """The columns for a drawing in characters: `most`, or fewer on a terminal that is narrower."""
        return min(most, shutil.get_terminal_size().columns) if sys.stdout.isatty() else most

    def heading(self, text: str) -> None:
        """Print a line that opens a stage of a longer job."""
        if not self.quiet:
            self._say(f"\n{text}", style="bold")

    def result(self, document: JsonMapping, out: Path | None = None) -> None:
        """Print the result of a command: a two-column table, or with --json the document itself.

        The table leaves out lists of records, and what is empty; the document has them.
        """
        if self.as_json:
            self.json({"out": str(out) if out else None, **document} if out else document)
            return
        empty: tuple[object, ...] = (None, "", [], {})
        shown = {key: value for key, value in document.items() if value not in empty and not _is_table(value)}
        rows = [(key.replace("_", " "), _value(value)) for key, value in shown.items()]
        if out is not None:
            rows.append(("output", str(out)))
        opening.clear()
        width = max((len(key) for key, _ in rows), default=0)
        for key, value in rows:
            sys.stdout.write(visible(f"{key:<{width}}  {value}") + "\n")

    def json(self, document: object) -> None:
        """Print one JSON document on stdout."""
        opening.clear()
        sys.stdout.write(_as_json(document, indent=2) + "\n")

    def json_line(self, document: object) -> None:
        """Print a JSON document on one line of stdout, at once: one of several."""
        opening.clear()
        sys.stdout.write(_as_json(document) + "\n")
        sys.stdout.flush()

    @contextmanager
    def redrawn(self) -> Iterator[None]:
        """While the block runs, `redraw` replaces what it drew before on stdout, a terminal; the last one stays."""
        from rich.console import Console as RichConsole
        from rich.live import Live

        opening.clear()
        with Live(console=RichConsole(highlight=False), auto_refresh=False, vertical_overflow="crop") as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def redraw(self, lines: Sequence[ViewLine]) -> None:
        """Draw lines in place of those before, inside `redrawn`."""
        from .watch_view import as_text

        if self._live is not None:
            self._live.update(as_text(lines), refresh=True)

    def text(self, text: str) -> None:
        """Print text that is itself the result, such as a plot in characters."""
        opening.clear()
        sys.stdout.write(visible(text.rstrip("\n")) + "\n")

    def table(self, rows: Sequence[Mapping[str, object]], title: str = "") -> None:
        """Print a table: rich on a terminal, aligned columns in a pipe. Columns are the keys of the rows."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[visible(_value(row.get(column))) for column in columns] for row in rows]
        if sys.stdout.isatty():
            from .display import rich_table

            opening.clear()
            rich_table(_plain(title), [_plain(column) for column in columns], cells)
            return
        widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
        lines = [title] if title else []
        for row in [columns, *cells]:
            lines.append("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        self.text("\n".join(lines))
