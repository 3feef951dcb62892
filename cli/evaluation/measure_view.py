"""The result of a built-in measure on the screen: a table of its figures, and what they were measured with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma2.cli.terminal.console import Console
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunResult

from .results_view import compared_lines

__all__ = ["shown"]

FIGURES = ("metrics", "stderr", "low", "high", "rows_of_metric", "n", "metric")


def shown(result: RunResult, progress: Progress) -> RunResult:
    """Print a result for people; with --json, or for another reader, it stays as it is."""
    if not isinstance(progress, Console) or progress.as_json:
        return result
    document = result.summary
    progress.table(list(_lines(document)))
    for name, task in document["tasks"].items():
        said = "  ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in _settings(task))
        progress.text(f"{name}: {said}")
    for line in compared_lines(document):
        progress.text(line)
    return RunResult(result.out, {})


def _lines(document: JsonMapping) -> Iterator[dict[str, object]]:
    others = {"against": document.get("tasks_against", {})}
    for name, task in document["tasks"].items():
        for of, found in {
            "model": task,
            **{key: tasks[name] for key, tasks in others.items() if name in tasks},
        }.items():
            for metric, value in found["metrics"].items():
                low, high = (found[end].get(metric) for end in ("low", "high"))
                line: dict[str, object] = {"task": name, "metric": metric.replace("_", " ")}
                if "tasks_against" in document:
                    line["model"] = document[of]["name"]
                line |= {"value": value, "95 % interval": "-" if low is None else f"{low:.4g} .. {high:.4g}"}
                yield line | {"rows": found.get("rows_of_metric", {}).get(metric, found["n"])}


def _settings(task: JsonObject) -> Iterator[tuple[str, object]]:
    for key, value in task.items():
        if key not in FIGURES and value not in (None, 0, "") and not isinstance(value, Mapping):
            yield key, value


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
