"""The rows of a task: DIR/TASK.jsonl, one object per line with id, split and the task's columns. Torch-free.

A row that does not fit is an error with its line: a benchmark without some of its rows is another benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.posttrain.data.sources import rows_of

from .task import Doc, SuiteTask

__all__ = ["TaskRows", "read_rows", "rows_file"]

SPLITS = ("train", "dev", "validation", "test")


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task.

    evaluated  in the order of the groups' first rows, then of the file
    examples   by group, the rows that examples are taken from
    split      of the evaluated rows; `fewshot_split`: of the examples
    """

    task: SuiteTask
    evaluated: list[Doc]
    examples: Mapping[str, list[Doc]]
    split: str
    fewshot_split: str
    groups: list[str] = field(default_factory=list)

    @property
    def shares_rows(self) -> bool:
        """Whether examples come from the evaluated rows, without the row itself."""
        return self.split == self.fewshot_split


def rows_file(data: Path, task: SuiteTask) -> Path:
    """The file of a task. Raises InputError if it is missing."""
    path = data / f"{task.task}.jsonl"
    if not data.is_dir():
        raise InputError(f"--data {data} is not a directory", "gemma2 eval data --out DIR writes one")
    if not path.is_file():
        named = sorted(file.stem for file in data.glob("*.jsonl"))
        hint = f"--tasks {','.join(named)} runs what is there" if named else "gemma2 eval data --out DIR writes it"
        raise InputError(f"--data {data} has no {path.name}", hint)
    return path


def read_rows(data: Path, task: SuiteTask, limit: int | None = None) -> TaskRows:
    """The rows of a task; `limit` keeps the first of each group. Raises InputError for rows that cannot be used."""
    path = rows_file(data, task)
    by_split: dict[str, list[Doc]] = {}
    seen: dict[tuple[str, str], str] = {}
    for where, doc in _checked(path, task):
        place = (str(doc["split"]), str(doc["id"]))
        if place in seen:
            raise InputError(f"{where}: the id {doc['id']!r} is also that of {seen[place]}", "give each row its own id")
        seen[place] = where
        by_split.setdefault(place[0], []).append(doc)
    split = next((name for name in task.test_splits if name in by_split), None)
    if split is None:
        have = ", ".join(f"{len(rows)} of {name}" for name, rows in by_split.items()) or "none"
        raise InputError(
            f"{path} has no row of split {' or '.join(task.test_splits)} (rows: {have})",
            f'write "split": "{task.test_splits[0]}" into the rows to evaluate',
        )
    source = next((name for name in task.fewshot_splits if name in by_split and name != split), split)
    return _arranged(path, task, by_split, (split, source), limit)


def _arranged(
    path: Path, task: SuiteTask, by_split: Mapping[str, list[Doc]], splits: tuple[str, str], limit: int | None
) -> TaskRows:
    split, source = splits
    groups = _grouped(task, by_split[split])
    examples = _grouped(task, by_split[source])
    for name, docs in groups.items():
        have = len(examples.get(name, ())) - (split == source)
        needed = task.num_fewshot + task.spare_shot * (split != source)
        if have < needed:
            of_group = f" of {name!r}" if name else ""
            raise InputError(
                f"{path}: {needed} examples are needed, {source}{of_group} has {max(have, 0)} other rows",
                f'add rows with "split": "{task.fewshot_splits[0]}"',
            )
        assert docs
    evaluated = [doc for docs in groups.values() for doc in docs[:limit]]
    return TaskRows(task, evaluated, examples, split, source, [*groups])


def _grouped(task: SuiteTask, docs: list[Doc]) -> dict[str, list[Doc]]:
    groups: dict[str, list[Doc]] = {}
    for doc in docs:
        groups.setdefault(task.group_of(doc), []).append(doc)
    return groups


def _checked(path: Path, task: SuiteTask) -> Iterator[tuple[str, Doc]]:
    for row in rows_of([path]):
        doc = dict(row.columns)
        for name, kind in {"id": "id", "split": "split", **task.columns}.items():
            if name not in doc:
                raise InputError(
                    f"{row.where} has no column '{name}'",
                    f"{task.task} needs {', '.join(['id', 'split', *task.columns])}",
                )
            fault = _fault(doc, name, kind)
            if fault:
                raise InputError(f"{row.where}: {name} {fault[0]}", fault[1])
        yield str(row.where), doc


def _fault(doc: Doc, name: str, kind: str | int) -> tuple[str, str] | None:
    """(what, fix) of one value; None if it fits."""
    value = doc[name]
    if kind == "id":
        fits = isinstance(value, str | int) and not isinstance(value, bool)
        return None if fits else ("is neither a text nor a whole number", "give each row its own id")
    if kind == "split":
        return None if value in SPLITS else (f"is {value!r}", f"use one of {', '.join(SPLITS)}")
    if kind in ("text", "blank"):
        if not isinstance(value, str) or not value.strip():
            return "is not a text", "write a text"
        return ("has no _", "mark the place of the choices with _") if kind == "blank" and "_" not in value else None
    if kind == "index":
        choices = doc.get("choices")
        count = len(choices) if isinstance(choices, list) else 0
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
        return (
            None if fits else (f"{value!r} is not an index of its {count} choices", f"write 0 to {max(count - 1, 0)}")
        )
    least, more = int(str(kind).rstrip("+")), str(kind).endswith("+")
    texts = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    fits = isinstance(value, list) and texts and (len(value) >= least if more else len(value) == least)
    return None if fits else (f"are not {least}{' or more' * more} texts", "write a list of texts")
