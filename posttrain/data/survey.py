"""What a data set holds and how it will be read: for `gemma2 data inspect`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject

from .own_form import Kind, kind_of_rows, rows_of_kind
from .reading import Reading, RowOptions
from .rows import Conversation, Pair, Prompt
from .shapes.turns import Message, check_order, fold_system
from .sources import Row, data_files

if TYPE_CHECKING:
    from .chat import ChatFormat  # imports transformers

__all__ = ["survey"]

SEVERAL_LINES = re.compile(r":\d+-\d+$")  # the place of such a record of a table
PLACES = 3  # bad rows of one kind that are named


def survey(
    path: Path, options: RowOptions, chat: ChatFormat | None = None, kind: Kind | None = None, shown: int = 3
) -> JsonObject:
    """Counts, shapes, lengths, what is not read, the kinds of bad rows, and the first `shown` rows as rendered.

    chat  renders and measures in tokens; without it Gemma's turns are shown and lengths are in characters

    Raises InputError for a path without rows, and for a column of `--columns` that no row has.
    """
    kind = kind or kind_of_rows(path, Reading(options))
    long = 0

    def watched(row: Row) -> Row:
        nonlocal long
        long += SEVERAL_LINES.search(row.where) is not None
        return row

    reading = Reading(options, watched)
    lengths: list[int] = []
    turns: Counter[int] = Counter()
    rendered: list[JsonObject] = []
    for row in rows_of_kind(path, kind, reading):
        text = None
        with reading.usable(row):
            text, length = _rendered(row, chat)
        if text is None:
            continue
        lengths.append(length)
        turns[len(_messages(row))] += 1
        if len(rendered) < shown:
            silent = sorted(row.masked) if isinstance(row, Conversation) else []
            rendered.append({"where": row.where, "text": text, "not_learned": silent})
    reading.check_columns()
    tally = reading.tallies[path]
    errors: defaultdict[str, list[str]] = defaultdict(list)
    for where, bad in reading.skipped.items():
        errors[f"{_without_place(bad.error, where)}; {bad.hint}"].append(where)
    kinds = sorted(errors.items(), key=lambda found: -len(found[1]))
    found: JsonObject = {
        "path": str(path),
        "files": [str(file) for file in data_files(path)],
        "kind": kind,
        "shapes": dict(tally.shapes),
        "rows": len(lengths),
        "bad_rows": len(reading.skipped),
        "first_error": reading.first_error(),
        "errors": [{"rows": len(places), "first": places[:PLACES], "error": error} for error, places in kinds],
        "messages": dict(sorted(turns.items())),
        "unread_files": tally.aside,
        "unread_keys": dict(tally.keys),
        "unread_columns": dict(tally.unread),
        "notes": dict(tally.notes),
        "ignored_keys_without_use": reading.keys_without_use(),
        "records_of_several_lines": long,
    }
    if lengths:
        found["tokens" if chat is not None else "characters"] = _quantiles(lengths)
    return found | {"rendered": rendered}


def _messages(row: Prompt | Conversation | Pair) -> list[Message]:
    return [*row.prompt, *row.chosen] if isinstance(row, Pair) else row.messages


def _rendered(row: Prompt | Conversation | Pair, chat: ChatFormat | None) -> tuple[str, int]:
    """The text that a model sees and its length; of a pair the chosen side. Raises InputError if it is refused."""
    messages = _messages(row)
    if chat is not None:
        if isinstance(row, Prompt):
            ids = chat.prompt_ids(messages)
        else:
            unlearned = row.unlearned if isinstance(row, Conversation) else ()
            ids = chat.example(messages, "eot", unlearned=unlearned)[0]
        return "".join(chat.token_text(i) for i in ids), len(ids)
    turns = fold_system([message | {"content": message["content"].strip()} for message in messages])
    check_order(turns, ends_with=None if isinstance(row, Prompt) else "assistant")
    if isinstance(row, Prompt) and turns[-1]["role"] != "user":
        raise InputError("the prompt ends with a model turn", "end it with a user message")
    return _gemma(turns, is_prompt=isinstance(row, Prompt)), sum(len(turn["content"]) for turn in turns)


def _gemma(turns: Sequence[Message], is_prompt: bool) -> str:
    """The turns as Gemma's template writes them."""
    names = {"assistant": "model"}
    text = "".join(
        f"<start_of_turn>{names.get(turn['role'], turn['role'])}\n{turn['content']}<end_of_turn>\n" for turn in turns
    )
    return f"<bos>{text}" + ("<start_of_turn>model\n" if is_prompt else "")


def _without_place(error: str, where: str) -> str:
    return error.removeprefix(f"{where}: ")


def _quantiles(lengths: list[int]) -> JsonObject:
    ordered = sorted(lengths)
    places = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in places.items()}
