"""A suite's result on the screen: our line next to the published rows, footnotes, and the comparison of `--against`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma2.cli.terminal.console import Console
from gemma2.core.json_files import JsonMapping

from .measure_view import show_measure

if TYPE_CHECKING:
    from gemma2.posttrain.evaluation.compared.published import PublishedColumns
    from gemma2.posttrain.evaluation.compared.result_table import Line

__all__ = ["show_results"]

FIXED = 58  # columns of a line without its published part
GAP = 2
WIDEST = 200


def show_results(document: JsonMapping, source: str, console: Console) -> None:
    """Print the table of results.json, of a suite with published rows and footnotes, and how it compares."""
    from gemma2.posttrain.evaluation.compared.against import comparison_lines

    if "suite" in document:
        _show_suite(document, source, console)
    else:
        show_measure(document, console)
    for line in comparison_lines(document):
        console.text(line)


def _show_suite(document: JsonMapping, source: str, console: Console) -> None:
    from gemma2.posttrain.evaluation.compared.result_table import result_table

    table = result_table(document, source)
    shown = list(_fitting(table.published, console.width(WIDEST)))
    console.table([_row(line, table.published, shown, table.model) for line in table.lines])
    if len(shown) < len(table.published.columns):
        rest = [name for key, name in table.published.columns.items() if key not in shown]
        console.text(f"A wider terminal also shows {', '.join(rest)}.")
    used = {mark for (_, key), marks in table.published.marks.items() if key in shown for mark in marks}
    for mark, note in table.published.notes.items():
        if mark in used:
            console.text(f"[{mark}] {note}")
    for note in table.notes:
        console.text(note)


def _fitting(published: PublishedColumns, width: int) -> Iterator[str]:
    """The columns that fit, in order; the first always."""
    used = FIXED
    for key, name in published.columns.items():
        used += len(name) + GAP
        if used > width and used > FIXED + len(name) + GAP:
            return
        yield key


def _row(line: Line, published: PublishedColumns, shown: list[str], model: str) -> dict[str, str]:
    ends = "" if line.low is None or line.high is None else f" ({line.low:.1f} to {line.high:.1f})"
    row = {"task": line.title, "metric": line.metric, "rows": f"{line.rows:,}", model: f"{line.value:.1f}{ends}"}
    for key in shown:
        value = published.cells.get((line.task, key))
        marks = "".join(f"[{mark}]" for mark in published.marks.get((line.task, key), ()))
        row[published.columns[key]] = f"{value.value:.1f}{marks}" if value is not None and line.shown else ""
    return row
