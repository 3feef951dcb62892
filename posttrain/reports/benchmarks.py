"""The benchmarks of a report: every result of `gemma2 eval` in the run, its table, figure, comparison and notes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.posttrain.evaluation.compared.against import comparison_lines
from gemma2.posttrain.evaluation.compared.figure import results_figure
from gemma2.posttrain.evaluation.compared.kept_results import is_result, read_result
from gemma2.posttrain.evaluation.compared.result_table import Table, is_tuned, result_table
from gemma2.posttrain.provenance.recorded_files import changed_files, remake

from .collect import Collected, RecordedStage
from .sections import both

__all__ = ["benchmarks"]

COLUMNS = 4  # of published models; a page is as wide as that


def benchmarks(found: Collected, gaps: list[str]) -> list[JsonObject]:
    """One entry per finished result, in the order of the stages; a result that cannot be shown becomes a gap."""
    entries: list[JsonObject] = []
    for stage in found.stages:
        if not stage.command.startswith("eval ") or stage.status != "complete" or not is_result(stage.path):
            continue
        if changed_files(stage.path, ["results.json"]):
            gaps.append(f"{stage.name}/results.json was changed and is not shown; {remake(stage.command, stage.path)}")
            continue
        try:
            entries.append(_entry(stage, read_result(stage.path), len(entries)))
        except (InputError, KeyError, TypeError, ValueError) as error:
            gaps.append(f"{stage.name}/results.json cannot be shown ({error})")
    return entries


def _entry(stage: RecordedStage, document: JsonMapping, number: int) -> JsonObject:
    model = str(document["model"]["name"])
    name = stage.name if stage.name != "." else Path(stage.path).resolve().name
    entry: JsonObject = {
        "name": name,
        "model": model,
        "compared": list(comparison_lines(document)),
        "figure": None,
        "columns": [],
        "footnotes": [],
        "notes": [],
    }
    if "suite" not in document:
        return entry | {"rows": list(_plain_rows(document))}
    table = result_table(document, str(stage.config.get("published", "v3")))
    columns = list(table.published.columns)[:COLUMNS]
    used = {mark for (_, key), marks in table.published.marks.items() if key in columns for mark in marks}
    figure = both(
        lambda narrow: results_figure(table, is_tuned(document), narrow),
        f"benchmark{number}",
        f"Per cent right of {model} on each task, next to Gemma 2's published values",
    )
    return entry | {
        "figure": figure,
        "columns": [table.published.columns[key] for key in columns],
        "rows": list(_suite_rows(table, columns)),
        "footnotes": [f"[{mark}] {note}" for mark, note in table.published.notes.items() if mark in used],
        "notes": list(table.notes),
    }


def _suite_rows(table: Table, columns: list[str]) -> Iterator[JsonObject]:
    for line in table.lines:
        cells = [table.published.cells.get((line.task, key)) if line.shown else None for key in columns]
        marks = ["".join(f"[{mark}]" for mark in table.published.marks.get((line.task, key), ())) for key in columns]
        yield {
            "task": line.title,
            "metric": line.metric,
            "value": f"{line.value:.1f}",
            "interval": _interval(line.low, line.high, 1),
            "rows": f"{line.rows:,}",
            "cells": [f"{one.value:.1f}{mark}" if one else "" for one, mark in zip(cells, marks, strict=True)],
        }


def _plain_rows(document: JsonMapping) -> Iterator[JsonObject]:
    for name, found in document["tasks"].items():
        for metric, value in found["metrics"].items():
            low, high = (found.get(end, {}).get(metric) for end in ("low", "high"))
            yield {
                "task": str(found.get("title", name)),
                "metric": metric.replace("_", " "),
                "value": "" if value is None else f"{value:.4g}",
                "interval": _interval(low, high, 3),
                "rows": f"{found['n']:,}",
                "cells": [],
            }


def _interval(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"
