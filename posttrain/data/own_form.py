"""Rows of any shape in the suite's own form, and the kind of data that a file holds."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import chain, count
from math import isfinite
from pathlib import Path
from typing import Literal

from gemma2.core.errors import InputError, OutputError
from gemma2.core.json_files import JsonObject, parse_json
from gemma2.core.outputs.text_file import write_text
from gemma2.core.yaml_files import closest

from .files.folders import COMPRESSED, SUFFIXES
from .reading import Reading, RowOptions
from .rows import Conversation, Pair, Prompt, conversation_of, prompt_of
from .shapes.recognise import LISTS, Ambiguous, conversation_shape, present, prompt_shape
from .sources import ColumnNames, Row, data_files, no_rows, to_line

__all__ = ["Kind", "check_converted", "convert_rows", "kind_of_rows", "own_form", "plan_reading", "rows_of_kind"]

Kind = Literal["conversations", "pairs", "prompts"]


def kind_of_rows(path: Path, reading: Reading) -> Kind:
    """What a data path holds, by the columns of its first row that can be read at all.

    Raises InputError for a path without rows.
    """
    for row in reading.rows(path):
        columns = present(row)
        if {"chosen", "rejected"} & columns.keys():
            return "pairs"
        try:
            turns = conversation_shape(row, reading.ignored).turns
        except Ambiguous:
            return "conversations"  # which is then refused with what to choose, as training refuses it
        except InputError:
            return "prompts" if _has_a_prompt(row) else "conversations"
        return "prompts" if turns.messages[-1]["role"] == "user" else "conversations"
    if reading.skipped:
        raise InputError(f"no row of {path} can be read, the first: {reading.first_error()}", "see docs/data.md")
    raise no_rows(path)


def _has_a_prompt(row: Row) -> bool:
    try:
        prompt_shape(row)
    except InputError:
        return False
    return True


def rows_of_kind(path: Path, kind: Kind, reading: Reading) -> Iterator[Prompt | Conversation | Pair]:
    """The rows of a data path, read as `kind`, streamed. Raises InputError at a bad row, unless it is skipped."""
    if kind == "pairs":
        return reading.each_pair(path)
    if kind == "conversations":
        return reading.each_conversation(path)
    return reading.each_prompt(path)


def own_form(row: Prompt | Conversation | Pair) -> JsonObject:
    """A row in the form that docs/data.md begins with; its other columns stay, renamed where a name is taken."""
    if isinstance(row, Pair):
        ours: JsonObject = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
        ours |= {"margin": row.margin} if row.margin is not None else {}
        for name in ("chosen_truncated", "rejected_truncated"):
            ours |= {name: True} if getattr(row, name) else {}
    elif isinstance(row, Prompt):
        ours = {"prompt": row.messages}
    else:
        ours = _conversation(row)
    return ours | {f"{name}_of_row" if name in ours else name: value for name, value in row.extra.items()}


def _conversation(row: Conversation) -> JsonObject:
    cut: JsonObject = {"finish_reason": "length"} if row.truncated else {}
    if row.learn_from and not row.masked:
        return {"prompt": row.messages[: row.learn_from], "completion": row.messages[row.learn_from :]} | cut
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    messages: list[JsonObject] = [dict(message) for message in row.messages]
    for index in row.unlearned.intersection(answers):
        messages[index]["weight"] = 0
    return {"messages": messages} | cut


def check_converted(path: Path, out: Path, force: bool = False) -> None:
    """Raise OutputError for an `out` that exists or is read, InputError for one that is not a JSON lines file."""
    if out.exists() and not force:
        raise OutputError(f"--out {out} exists", "choose another --out, or replace it with --force")
    if any(out.resolve() == file.resolve() for file in data_files(path)):
        raise OutputError(f"--out {out} and the data {path} overlap", "choose another --out")
    if out.suffix != ".jsonl":
        raise InputError(f"--out {out} is not a .jsonl file", f"write to {_plain_lines(out)}")


def _plain_lines(out: Path) -> Path:
    """A free name for JSON lines, near to the one that was given."""
    base = out.with_suffix("") if out.suffix.lower() in COMPRESSED else out
    base = base.with_suffix("") if base.suffix.lower() in SUFFIXES else base
    endings = chain(("", "-converted"), (f"-{number}" for number in count(2)))
    named = (base.with_name(f"{base.name}{ending}.jsonl") for ending in endings)
    return next(path for path in named if not path.exists())


def plan_reading(path: Path, options: RowOptions, kind: Kind | None = None) -> JsonObject:
    """What reading a data path takes: its files, their bytes, and what its first row is taken for.

    Raises InputError for a path without rows.
    """
    files = data_files(path)
    bytes_to_read = sum(file.stat().st_size for file in files)
    return {
        "files": len(files),
        "bytes_to_read": bytes_to_read,
        "read_as": kind or kind_of_rows(path, Reading(options)),
    }


def convert_rows(
    path: Path,
    out: Path,
    options: RowOptions,
    to: Kind | None = None,
    parse_json: Collection[str] = (),
    force: bool = False,
) -> tuple[JsonObject, Reading]:
    """Write the rows of a data path to `out` as JSON lines in the suite's own form; (counts, reading).

    to          what the rows are read as; default: what they are
    parse_json  columns whose texts are the JSON, or the Python notation, of a value

    Raises InputError at the first bad row, unless it is skipped; OutputError for an `out` that exists.
    """
    check_converted(path, out, force)
    theirs = ColumnNames(options.columns).theirs
    parsed = {*parse_json, *(ours for ours, name in theirs.items() if name in parse_json)}
    present_names: set[str] = set()

    def with_values(row: Row) -> Row:
        present_names.update(row.columns)
        return _with_values(row, parsed)

    reading = Reading(options, with_values)
    kind = to or kind_of_rows(path, reading)
    rows: Iterator[Prompt | Conversation | Pair]
    if to == "prompts":
        rows = reading.each(path, lambda row: _asked(row, reading.ignored))
    else:
        rows = rows_of_kind(path, kind, reading)
    nulls: Counter[str] = Counter()
    lines = [to_line(_without_nan(own_form(row), nulls)) for row in rows]
    reading.check_columns()  # before anything is written
    if not lines:
        raise InputError(f"no row of {path} can be converted", reading.first_error() or "give a file with rows")
    for name in parse_json:
        if not {name, *(ours for ours, their in theirs.items() if their == name)} & present_names:
            raise InputError(f"--parse-json: no row of {path} has a column {name!r}", closest(name, present_names))
    counts: JsonObject = {"rows": len(lines), "kind": kind} | ({"nan_as_null": dict(nulls)} if nulls else {})
    write_text(out, b"".join(lines).decode())
    return counts, reading


def _without_nan(row: JsonObject, nulls: Counter[str]) -> JsonObject:
    """The row with null for NaN and infinity, which JSON does not have; the columns are counted in `nulls`."""
    found: JsonObject = {}
    for name, value in row.items():
        found[name] = _finite(value)
        if found[name] is not value:
            nulls[name] += 1
    return found


def _finite(value: object) -> object:
    """A value with null for numbers that are not finite; the same object if all of them are."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        inside = {key: _finite(item) for key, item in value.items()}
        return inside if any(inside[key] is not item for key, item in value.items()) else value
    if isinstance(value, list):
        items = [_finite(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def _asked(row: Row, ignored: Collection[str]) -> Prompt:
    """The prompt of a row: its own, or what stands in front of the last model turn of its conversation."""
    if not set(LISTS) & present(row).keys():
        return prompt_of(row, ignored)
    sides = {name: row.columns[name] for name in ("chosen", "rejected") if name in row.columns}
    found = conversation_of(Row(row.where, row.extra(*sides)), ignored, empty=True)  # the prompt of a pair is one too
    end = len(found.messages) - 1 if found.messages[-1]["role"] == "assistant" else len(found.messages)
    return Prompt(row.where, found.messages[:end], found.extra | sides, found.shape, found.notes)


def _with_values(row: Row, names: Collection[str]) -> Row:
    columns = dict(row.columns)
    for name in names:
        text = columns.get(name)
        if not isinstance(text, str):
            continue
        try:
            columns[name] = parse_json(text)
        except ValueError:
            try:
                columns[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError) as error:
                what = f"{row.where}: '{name}' is not the JSON of a value ({error})"
                raise InputError(what, "write the list of messages as JSON") from error
    return Row(row.where, columns)
