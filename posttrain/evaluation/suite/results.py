"""results.json and results.csv of a run, from its samples. Torch-free.

    accuracy = right / rows;   standard error = sqrt(a (1 - a) / (n - 1))                      (as lm-eval's)

MMLU is given twice: `acc` is the mean of its subjects' accuracies, as the Open LLM Leaderboard states it, `acc_by_size`
counts every row alike, as lm-eval's group does. The standard error of the first is that of a mean of independent means.
No time, path or machine is in these files: the same work gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gemma2.core.json_files import JsonMapping, JsonObject, read_json, write_json

from .task_rows import TaskRows

__all__ = ["VERSION", "read_results", "task_result", "write_results"]

VERSION = 1  # of results.json
RESULTS, TABLE = "results.json", "results.csv"


def task_result(rows: TaskRows, samples: Iterable[JsonMapping]) -> JsonObject:
    """The figures of one task."""
    task = rows.task
    by_group: dict[str, list[Mapping[str, int]]] = {}
    truncated = 0
    for sample in samples:
        by_group.setdefault(str(sample["group"]), []).append(sample["correct"])
        truncated += bool(sample.get("cut"))
    graded = [row for group in by_group.values() for row in group]
    metrics, errors = {}, {}
    for name in task.metrics:
        values = [row[name] for row in graded]
        metrics[name], errors[name] = _mean(values), _error(values)
    found: JsonObject = {
        "title": task.title,
        "n": len(graded),
        "metric": task.metric,
        "metrics": metrics,
        "stderr": errors,
        "shots": task.num_fewshot,
        "split": rows.split,
        "fewshot_from": rows.fewshot_split,
        "truncated": truncated,
        "notes": _notes(rows, truncated),
    }
    if task.group:
        name = task.metric
        groups = {group: [row[name] for row in items] for group, items in sorted(by_group.items())}
        metrics[f"{name}_by_size"], errors[f"{name}_by_size"] = metrics[name], errors[name]
        means = [_mean(values) for values in groups.values()]
        metrics[name] = _mean(means)
        errors[name] = math.sqrt(sum(_error(values) ** 2 for values in groups.values())) / len(groups)
        found["groups"] = {group: {"n": len(values), name: _mean(values)} for group, values in groups.items()}
    return found


def _notes(rows: TaskRows, truncated: int) -> list[str]:
    task, notes = rows.task, []
    if rows.fewshot_split != task.fewshot_splits[0]:
        other = ", without the row itself" if rows.shares_rows else ""
        notes.append(f"few-shot from {rows.fewshot_split}{other}: the data have no split {task.fewshot_splits[0]}")
    if rows.split != task.test_splits[0]:
        notes.append(f"measured on {rows.split}: the data have no split {task.test_splits[0]}")
    if truncated:
        notes.append(f"{truncated} rows were longer than the context and cut on the left")
    return notes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[int]) -> float:
    """Standard error of a mean; 0 for one row."""
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))


def write_results(out: Path, document: JsonMapping) -> None:
    """Write results.json and results.csv."""
    write_json(out / RESULTS, document)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "metric", "value", "stderr", "n", "shots", "fewshot_from"])
    for name, found in document["tasks"].items():
        for metric, value in found["metrics"].items():
            error = found["stderr"][metric]
            writer.writerow([name, metric, value, error, found["n"], found["shots"], found["fewshot_from"]])
    (out / TABLE).write_text(text.getvalue(), encoding="utf-8")


def read_results(out: Path) -> JsonObject:
    """results.json of a finished run. Raises InputError."""
    return read_json(out / RESULTS, "give an output of gemma2 eval --suite")
