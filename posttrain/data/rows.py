"""Rows as training sees them: prompts, conversations and preference pairs, in TRL's column names, checked. Torch-free.

    prompts         {"prompt": TEXT | MESSAGES}
    conversations   {"prompt": TEXT | MESSAGES, "completion": TEXT | MESSAGES}  or  {"messages": MESSAGES}
    pairs           {"prompt": TEXT | MESSAGES, "chosen": TEXT | MESSAGES, "rejected": TEXT | MESSAGES}
                    or, the prompt implied, {"chosen": ..., "rejected": ...} with a common beginning: of messages the
                    first equal ones, of texts the words up to where they part

MESSAGES is a list of {"role": ..., "content": TEXT}; as prompts serve {"messages": MESSAGES} too that end with a user
turn. Columns that are not read stay in `extra`. Every refusal names file, line, the fault and the fix. Where rows
come from is the matter of `sources.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject

from .sources import Row, iter_rows, kind

__all__ = [
    "Conversation",
    "Pair",
    "Prompt",
    "conversation_of",
    "located",
    "pair_of",
    "prompt_of",
    "read_conversations",
    "read_pairs",
    "read_prompts",
    "split",
]

Message = dict[str, str]
ASKED = ("question", "instruction", "query", "input")  # other names under which data sets have their prompts


@dataclass(frozen=True)
class Prompt:
    """A prompt that a model is to answer."""

    where: str
    messages: list[Message]
    extra: JsonObject = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key of a question: the messages before the first model turn."""
        return _key(self.messages)


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from: its model turns from message `learn_from` on."""

    where: str
    messages: list[Message]
    learn_from: int = 0
    truncated: bool = False  # the last turn ran into the length limit
    extra: JsonObject = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key of a question: the messages before the first model turn."""
        return _key(self.messages)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. `margin`: by how much the chosen one is better, in units of the reward."""

    where: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    margin: float | None = None
    extra: JsonObject = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key of a question: the messages before the first model turn."""
        return _key(self.prompt)


Keyed = TypeVar("Keyed", Prompt, Conversation, Pair)


def read_prompts(path: Path, limit: int | None = None, column: str = "prompt") -> list[Prompt]:
    """The prompts of a data path, at most `limit`; `column` holds them. Raises InputError at the first bad row."""
    return _not_empty([prompt_of(row, column) for row in iter_rows(path, limit)], path)


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a data path. Raises InputError at the first bad row."""
    return _not_empty([conversation_of(row) for row in iter_rows(path)], path)


def read_pairs(path: Path, limit: int | None = None) -> list[Pair]:
    """The preference pairs of a data path, at most `limit`. Raises InputError at the first bad row."""
    return _not_empty([pair_of(row) for row in iter_rows(path, limit)], path)


def prompt_of(row: Row, column: str = "prompt") -> Prompt:
    """The prompt of a row: its `column`, else `messages` that end with a user turn."""
    name = "messages" if column not in row.columns and "messages" in row.columns else column
    messages = _prompt(row, name)
    if name == "messages" and messages[-1]["role"] != "user":
        raise InputError(
            f"{row.where}: 'messages' end with a turn of the {messages[-1]['role']}", "end a prompt with a user message"
        )
    return Prompt(row.where, messages, row.extra(name))


def conversation_of(row: Row) -> Conversation:
    """The conversation of a row: `messages`, or `prompt` and `completion`."""
    truncated = row.columns.get("finish_reason") == "length"
    if "messages" in row.columns:
        messages = _messages(row, "messages", "user")
        return Conversation(row.where, messages, truncated=truncated, extra=row.extra("messages"))
    if not {"prompt", "completion"} & row.columns.keys():
        what = f"{row.where}: neither 'messages' nor 'prompt' and 'completion'"
        misspelt = (name for name in ("completion", "prompt") if difflib.get_close_matches(name, row.columns, n=1))
        raise InputError(what, _rename(next(misspelt, "messages"), row.columns))
    prompt, completion = _prompt(row), _messages(row, "completion", "assistant")
    return Conversation(row.where, prompt + completion, len(prompt), truncated, row.extra("prompt", "completion"))


def split(rows: list[Keyed], fraction: float, seed: int) -> tuple[list[Keyed], list[Keyed]]:
    """(training, held-out) rows, in file order. A row's side follows from `seed` and its prompt alone, so that it does
    not depend on the other rows, and no prompt is on both sides. With `fraction` > 0 at least one prompt is held out
    where there are two."""
    place = {row.key: _uniform(seed, row.key) for row in rows}
    heldout: set[str] = set()
    if fraction > 0 and len(place) > 1:
        first, last = min(place, key=place.__getitem__), max(place, key=place.__getitem__)
        heldout = ({key for key, u in place.items() if u < fraction} | {first}) - {last}
    return [row for row in rows if row.key not in heldout], [row for row in rows if row.key in heldout]


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put `"file:line"` in front of what an InputError says."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error.what}", error.hint) from error


def _not_empty(rows: list[Any], path: Path) -> list[Any]:
    if not rows:
        raise InputError(f"{path} has no rows", "write one JSON object per line")
    return rows


def _prompt(row: Row, column: str = "prompt") -> list[Message]:
    messages = _messages(row, column, "user")
    if not any(message["content"].strip() for message in messages):
        raise InputError(f"{row.where}: the prompt is empty", "remove the row, or write a prompt")
    return messages


def pair_of(row: Row) -> Pair:
    """The preference pair of a row. Raises InputError with file and line if it is not one."""
    chosen, rejected = _messages(row, "chosen", "assistant"), _messages(row, "rejected", "assistant")
    if "prompt" in row.columns:
        prompt = _prompt(row)
    elif isinstance(row.columns["chosen"], str) != isinstance(row.columns["rejected"], str):
        raise InputError(f"{row.where}: of 'chosen' and 'rejected' one is a text", "write two texts, or two lists")
    elif isinstance(row.columns["chosen"], str):
        prompt, chosen, rejected = _common_words(row)
    else:
        prompt, chosen, rejected = _common_beginning(row, chosen, rejected)
    return Pair(
        row.where,
        prompt,
        chosen,
        rejected,
        _flag(row, "chosen_truncated"),
        _flag(row, "rejected_truncated"),
        _number(row, "margin"),
        row.extra("prompt", "chosen", "rejected", "chosen_truncated", "rejected_truncated", "margin"),
    )


def _common_beginning(
    row: Row, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise InputError(f"{row.where}: 'chosen' and 'rejected' share no prompt", "add the column 'prompt'")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _common_words(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """Two texts parted behind the last word that they share, so that each keeps at least one word.

    As TRL's `extract_prompt`, which parts them at the first character that differs, also inside a word.
    """
    meant = difflib.get_close_matches("prompt", row.columns, n=1) or [name for name in ASKED if name in row.columns]
    if meant:  # a column of that name is the prompt, and not what two answers happen to begin with
        raise InputError(f"{row.where}: no 'prompt'", f"rename '{meant[0]}' to 'prompt'")
    chosen, rejected = row.columns["chosen"].rstrip(), row.columns["rejected"].rstrip()
    shared = sum(1 for _ in takewhile(lambda letters: letters[0] == letters[1], zip(chosen, rejected, strict=False)))
    end = max((place for place, letter in enumerate(chosen[:shared]) if letter.isspace()), default=0)
    prompt = chosen[:end].rstrip()
    if not prompt.strip():
        raise InputError(f"{row.where}: 'chosen' and 'rejected' share no prompt", "add the column 'prompt'")
    better, worse = ([{"role": "assistant", "content": text[len(prompt) :]}] for text in (chosen, rejected))
    return [{"role": "user", "content": prompt}], better, worse


def _messages(row: Row, column: str, role: str) -> list[Message]:
    """A column as messages; a plain text is one message of `role`."""
    value = _required(row, column)
    if isinstance(value, str):
        return [{"role": role, "content": _text(row, column, value)}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{row.where}: '{column}' is {kind(value)}", "write a text, or a list of messages")
    return [_message(row, f"{column}[{index}]", item) for index, item in enumerate(value)]


def _message(row: Row, place: str, item: object) -> Message:
    if not isinstance(item, dict):
        raise InputError(f"{row.where}: '{place}' is {kind(item)}", 'write {"role": ..., "content": ...}')
    for name in ("role", "content"):
        if name not in item:
            raise InputError(f"{row.where}: '{place}' has no '{name}'", _rename(name, item))
        if not isinstance(item[name], str):
            raise InputError(f"{row.where}: '{place}.{name}' is {kind(item[name])}", "write a text")
    return {"role": item["role"], "content": _text(row, place, item["content"])}


def _text(row: Row, place: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{row.where}: '{place}' holds half of a surrogate pair", "write the whole character"
        ) from error
    return text


def _required(row: Row, column: str) -> Any:  # noqa: ANN401
    if column not in row.columns:
        raise InputError(f"{row.where}: no '{column}'", _rename(column, row.columns))
    return row.columns[column]


def _rename(column: str, present: Iterable[str]) -> str:
    """The hint for a missing name: most often it is misspelt."""
    near = difflib.get_close_matches(column, present, n=1)
    return f"rename '{near[0]}' to '{column}'" if near else f"add '{column}' to {', '.join(present) or 'the empty row'}"


def _flag(row: Row, column: str) -> bool:
    value = row.columns.get(column, False)
    if not isinstance(value, bool):
        raise InputError(f"{row.where}: '{column}' is {kind(value)}", "write true or false")
    return value


def _number(row: Row, column: str) -> float | None:
    value = row.columns.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise InputError(f"{row.where}: '{column}' is {kind(value)}", "write a finite number")
    return float(value)


def _key(messages: list[Message]) -> str:
    ours = [m["role"] in ("assistant", "model") for m in messages]
    asked = messages[: ours.index(True)] if True in ours else messages
    return json.dumps([[m["role"], m["content"].strip()] for m in asked], ensure_ascii=False)


def _uniform(seed: int, key: str) -> float:
    """A number in [0, 1) that follows from the seed and the text."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56
