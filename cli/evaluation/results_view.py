"""A suite's result on the screen: our line next to the published rows, footnotes, and the comparison of `--against`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gemma2.cli.terminal.console import Console
from gemma2.core.json_files import JsonMapping

from .measure_view import show_measure

if TYPE_CHECKING:
    from gemma2.posttrain.evaluation.compared.published import Beside
    from gemma2.posttrain.evaluation.compared.result_table import Line

__all__ = ["show_results"]

FIXED = 58  # columns of a line without its published part
GAP = 2
WIDEST = 200


def show_results(document: JsonMapping, source: str, console: Console) -> None:
    """Print the table of results.json, of a suite with published rows and footnotes, and how it compares."""
    if "suite" in document:
        _show_suite(document, source, console)
    else:
        show_measure(document, console)
    for line in compared_lines(document):
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


def compared_lines(document: JsonMapping) -> Iterator[str]:
    """What `--against` found: a line per task, the flipped rows, the rows that only one result has."""
    from gemma2.posttrain.evaluation.compared.against import sentence

    compared: Mapping[str, JsonMapping] = document.get("compared", {})
    if not compared:
        return
    yield f"\nAgainst {document['against']['name']}, row by row:"
    for name, found in compared.items():
        title = document["tasks"].get(name, {}).get("title", name)
        clusters = f", {found['clusters']} subjects" if found["clusters"] < found["n"] else ""
        unit, scale = ("points", 100.0) if found["higher_is_better"] else ("nats per token", 1.0)
        yield f"  {title} ({found['metric']}{clusters}): {sentence(found, unit, scale, found['higher_is_better'])}"
        if mean := found.get("by_groups"):
            ends = f" (95 %: {100 * mean['low']:+.1f} to {100 * mean['high']:+.1f})" if mean["low"] is not None else ""
            yield f"    mean of the subjects: {100 * mean['difference']:+.1f} points{ends}"
        for word, key in (("up", "first_gained"), ("down", "first_lost")):
            if found[key]:
                yield f"    first {word}: {', '.join(found[key])}"
        for key, words in (
            ("only_ours", "rows only here"),
            ("only_theirs", "rows only there"),
            ("other_prompts", "rows with another prompt there"),
        ):
            if found[key]:
                yield f"    {found[key]:,} {words}"
    if document.get("not_compared"):
        yield f"  only in one of the two: {', '.join(document['not_compared'])}"


def _fitting(published: Beside, width: int) -> Iterator[str]:
    """The columns that fit, in order; the first always."""
    used = FIXED
    for key, name in published.columns.items():
        used += len(name) + GAP
        if used > width and used > FIXED + len(name) + GAP:
            return
        yield key


def _row(line: Line, published: Beside, shown: list[str], model: str) -> dict[str, str]:
    ends = "" if line.low is None or line.high is None else f" ({line.low:.1f} to {line.high:.1f})"
    row = {"task": line.title, "metric": line.metric, "rows": f"{line.rows:,}", model: f"{line.value:.1f}{ends}"}
    for key in shown:
        value = published.cells.get((line.task, key))
        marks = "".join(f"[{mark}]" for mark in published.marks.get((line.task, key), ()))
        row[published.columns[key]] = f"{value.value:.1f}{marks}" if value is not None and line.shown else ""
    return row
