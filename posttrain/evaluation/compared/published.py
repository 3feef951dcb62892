"""The published rows of Gemma 2 and its peers, next to which a result of the suite is shown.

`posttrain/evaluation/published.json` holds every value with its source, table and report version. The sources disagree:
the report (version 3, 2024-10-02), the blog post of June 2024, which shows the report's first version, and the model
cards. A table takes one source; a value that it does not state is the report's, and a footnote says both, and every
disagreement among the values shown.

Instruction-tuned models have their own rows (Table 17: MMLU and MBPP). No other few-shot row of theirs is published, so
the other tasks have no peer: a tuned model is never shown next to a pre-trained row as if they were alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gemma2.core.json_files import JsonMapping, JsonObject, read_json

__all__ = [
    "DEFAULT",
    "SOURCES",
    "PublishedColumns",
    "PublishedValue",
    "published_columns",
    "published_values",
    "shape_of",
    "task_label",
]

FILE = Path(__file__).parent.parent / "published.json"
SOURCES = ("v3", "blog", "card")
DEFAULT = "v3"
NAMED = {"v3": "report v3", "blog": "blog of June 2024", "card": "model card"}
OURS = ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b")
TUNED = "-it"
ELSEWHERE = "*"  # mark of a value that the source asked for does not state


@dataclass(frozen=True)
class PublishedValue:
    """One cell of a published table. value: per cent. shots: None where the source states none for it here."""

    model: str
    tuned: bool
    task: str
    value: float
    source: str
    version: str
    table: str
    shots: int | None = None
    note: str = ""


@dataclass(frozen=True)
class PublishedColumns:
    """The published part of a table of results.

    columns  id -> heading of each model, Gemma 2 first
    cells    (task, id) -> the value
    marks    (task, id) -> the marks of the value's footnotes
    notes    mark -> footnote: one for each model with something to say, and * for values of another source
    further  a sentence without a mark
    """

    source: str
    tuned: bool
    columns: Mapping[str, str]
    cells: Mapping[tuple[str, str], PublishedValue]
    marks: Mapping[tuple[str, str], tuple[str, ...]]
    notes: Mapping[str, str]
    further: tuple[str, ...] = ()


@cache
def _file() -> JsonObject:
    return read_json(FILE)


@cache
def published_values() -> tuple[PublishedValue, ...]:
    """Every value of the file."""
    return tuple(PublishedValue(**entry) for entry in _file()["values"])


def task_label(task: str) -> str:
    """The name of a task as tables write it; an unknown one unchanged."""
    return str(_file()["tasks"].get(task, task))


def published_columns(
    tasks: Sequence[str], tuned: bool = False, source: str = DEFAULT, size: str = ""
) -> PublishedColumns:
    """The published columns for these tasks, with footnotes.

    tuned: whether our model is instruction-tuned. size: "2B", "9B" or "27B" moves that Gemma 2 to the front.
    """
    ids = sorted(OURS, key=lambda model: model != f"gemma-2-{size.lower()}")
    if not tuned:
        ids += [model for model in _file()["models"] if model not in ids]
    found = {(task, model): _chosen(model, task, tuned, source) for task in tasks for model in ids}
    cells = {place: value for place, value in found.items() if value is not None}
    shown = [model for model in ids if any(place[1] == model for place in cells)]
    marks: dict[tuple[str, str], tuple[str, ...]] = {}
    notes: dict[str, str] = {}
    for model in shown:
        said: list[str] = []
        for place, value in cells.items():
            if place[1] != model:
                continue
            own = list(_notes(value))
            said += [text for text in own if text not in said]
            elsewhere = (ELSEWHERE,) if value.source != source else ()
            marks[place] = (*((str(len(notes) + 1),) if own else ()), *elsewhere)
        if said:
            notes[str(len(notes) + 1)] = f"{heading(model, tuned)}: {'; '.join(said)}."
    if any(ELSEWHERE in found for found in marks.values()):
        notes[ELSEWHERE] = f"Of the {NAMED[DEFAULT]}: the {NAMED[source]} is not recorded to state it."
    return PublishedColumns(
        source,
        tuned,
        {model: heading(model, tuned) for model in shown},
        cells,
        {place: found for place, found in marks.items() if found},
        notes,
        tuple(_without_peers(tasks, cells)) if tuned else (),
    )


def _without_peers(tasks: Sequence[str], cells: Mapping[tuple[str, str], PublishedValue]) -> Iterator[str]:
    without = [task_label(task) for task in tasks if not any(place[0] == task for place in cells)]
    if without:
        yield (
            f"No few-shot row of an instruction-tuned Gemma 2 is published for {', '.join(without)}; rows of "
            "pre-trained models are not its peers and are left out."
        )


def heading(model: str, tuned: bool) -> str:
    """The heading of a model's column."""
    return f"{_file()['models'][model]}{TUNED if tuned else ''}"


def _of(model: str, task: str, tuned: bool) -> dict[str, PublishedValue]:
    """The values of one cell, by source."""
    return {v.source: v for v in published_values() if (v.model, v.task, v.tuned) == (model, task, tuned)}


def _chosen(model: str, task: str, tuned: bool, source: str) -> PublishedValue | None:
    found = _of(model, task, tuned)
    return found.get(source) or found.get(DEFAULT)


def _notes(value: PublishedValue) -> Iterator[str]:
    """What is to be said of a value: that sources disagree, and the notes of the values that are named."""
    label = task_label(value.task)
    found = _of(value.model, value.task, value.tuned)
    differ = len({one.value for one in found.values()}) > 1
    if differ:
        yield f"{label} {', '.join(f'{found[key].value:.1f} in the {NAMED[key]}' for key in SOURCES if key in found)}"
    for one in found.values():
        if one.note and (one is value or differ):
            yield f"{f'{label} in the {NAMED[one.source]}: ' if one.source != DEFAULT else ''}{one.note}"


def shape_of(config: JsonMapping) -> JsonObject:
    """`shape`: hidden size and layers by a model's config.json; `size`: "2B", "9B" or "27B" if it is one of them."""
    shape = [config.get("hidden_size"), config.get("num_hidden_layers")]
    size = next((str(name) for name, one in _file()["shapes"].items() if one == shape), "")
    return {"shape": shape, **({"size": size} if size else {})}
