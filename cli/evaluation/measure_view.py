"""The result of a built-in measure on the screen: a table of its figures, and what they were measured with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma2.cli.terminal.console import Console
from gemma2.core.json_files import JsonMapping, JsonObject

__all__ = ["show_measure"]

FIGURES = ("metrics", "stderr", "low", "high", "rows_of_metric", "n", "metric")


def show_measure(document: JsonMapping, console: Console) -> None:
    """Print the figures of a measure, and for each task what it was measured with."""
    console.table(list(_lines(document)))
    for name, task in document["tasks"].items():
        said = "  ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in _settings(task))
        if said:
            console.text(f"{name}: {said}")


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
        if key not in FIGURES and value not in (None, "") and not isinstance(value, Mapping):
            yield key, value


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
