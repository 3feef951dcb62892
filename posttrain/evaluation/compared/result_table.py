"""The table of a suite's result: one line per task and metric, our value with its interval, the published rows. Pure.

Values are per cent. The interval is Student's t from the standard error in the result. What makes a result another
quantity than the published one (few-shot examples from another split, a limit of rows, the format) is said below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gemma2.core.json_files import JsonMapping
from gemma2.posttrain.evaluation.intervals import confidence_interval

from .published import DEFAULT, PublishedColumns, published_columns

__all__ = ["Line", "Table", "is_tuned", "result_table"]

PERCENT = 100.0
# How the Open LLM Leaderboard v1 states each task, which the published shots follow.
STATED = {
    "mmlu": ("acc", "mean of 57 subjects"),
    "arc_challenge": ("acc_norm", ""),
    "gsm8k": ("strict-match", ""),
    "winogrande": ("acc", ""),
    "hellaswag": ("acc_norm", ""),
}
DEVIATIONS = {
    "mmlu": "MMLU is the mean of the subjects' accuracies, as the leaderboard states it; acc_by_size counts every row "
    "alike, as lm-eval's group does.",
    "gsm8k": "GSM8K's strict-match reads the number after ####, as the leaderboard does; flexible-extract the last "
    "number of the answer.",
}
METRIC = "The report states shots, not metrics: these are the Open LLM Leaderboard v1's, whose shots are the same."
FORMATS = (
    "MMLU moves with the format of its prompt: standard deviation over 12 formats 2.1 (2B), 0.9 (9B), 1.0 (27B) points."
)


@dataclass(frozen=True)
class Line:
    """A line of the table: value, low and high in per cent; `shown`: published rows are of this metric."""

    task: str
    title: str
    metric: str
    rows: int
    value: float
    low: float | None
    high: float | None
    shown: bool


@dataclass(frozen=True)
class Table:
    """All lines, the published part with its footnotes, and what is to be said of the result itself."""

    model: str
    lines: tuple[Line, ...]
    published: PublishedColumns
    notes: tuple[str, ...]


def is_tuned(document: JsonMapping) -> bool:
    """Whether a result is of an instruction-tuned model: measured in the chat format, or named so."""
    named = str(document["model"].get("name", "")).rpartition("/")[2]
    return bool(document.get("settings", {}).get("chat")) or named.endswith("-it")


def result_table(document: JsonMapping, source: str = DEFAULT) -> Table:
    """The table of results.json."""
    tasks = document["tasks"]
    known = [name for name in tasks if name in STATED]
    model = document["model"]
    part = published_columns(known, is_tuned(document), source, str(model.get("size", "")))
    lines = [line for name, found in tasks.items() for line in _lines(name, found)]
    return Table(str(model["name"]), tuple(lines), part, (*part.further, *_notes(document, known)))


def _lines(name: str, found: JsonMapping) -> Iterator[Line]:
    shots = f", {found['shots']}-shot" if found.get("shots") is not None else ""
    for metric, value in found["metrics"].items():
        error, n = found["stderr"].get(metric), int(found["n"])
        ends = confidence_interval(value, error, n, (0.0, 1.0)) if error is not None else None
        low, high = (PERCENT * end for end in ends) if ends else (None, None)
        stated = STATED.get(name, ("", ""))[0] == metric
        title = f"{found.get('title', name)}{shots}"
        yield Line(name, title, metric, n, PERCENT * value, low, high, stated)


def _notes(document: JsonMapping, known: list[str]) -> Iterator[str]:
    for name, found in document["tasks"].items():
        yield from (f"{found.get('title', name)}: {note}." for note in found.get("notes", ()))
    if limit := document.get("settings", {}).get("limit"):
        yield f"Only the first {limit} rows of each task, in MMLU of each subject: not the published data sets."
    for name in known:
        if name in DEVIATIONS:
            yield DEVIATIONS[name]
    if known:
        yield METRIC
    if "mmlu" in known:
        yield FORMATS
