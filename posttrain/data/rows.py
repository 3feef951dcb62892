"""Rows as training sees them: prompts, conversations and preference pairs, checked. Torch-free.

    Prompt          what a model is to answer
    Conversation    turns of which some are learned
    Pair            a prompt with a better and a worse answer

`shapes/` has the shapes that rows have in files, `sources.py` the files, and `reading.py` reads whole data sets and
counts what it leaves out. Every refusal names file, line, the fault and the fix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject

from .shapes.preferences import pair_shape
from .shapes.recognise import Shaped, conversation_shape, prompt_shape
from .shapes.turns import Message, TurnError
from .sources import Row, kind

__all__ = [
    "Conversation",
    "Message",
    "Pair",
    "Prompt",
    "conversation_of",
    "located",
    "pair_of",
    "prompt_of",
    "split",
]


@dataclass(frozen=True)
class Prompt:
    """A prompt that a model is to answer."""

    where: str
    messages: list[Message]
    extra: JsonObject = field(default_factory=dict)
    shape: str = "prompt"
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The key of a question: the messages before the first model turn."""
        return _key(self.messages)


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from: its model turns from message `learn_from` on, without those that are masked."""

    where: str
    messages: list[Message]
    learn_from: int = 0
    truncated: bool = False  # the last turn ran into the length limit
    extra: JsonObject = field(default_factory=dict)
    masked: frozenset[int] = frozenset()  # numbers of the messages that the row itself excludes from learning
    shape: str = "messages"
    notes: tuple[str, ...] = ()

    @property
    def unlearned(self) -> frozenset[int]:
        """The numbers of the model turns that are context only."""
        return self.masked | frozenset(range(self.learn_from))

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
    shape: str = "pair"
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The key of a question: the messages before the first model turn."""
        return _key(self.prompt)


Keyed = TypeVar("Keyed", Prompt, Conversation, Pair)


def prompt_of(row: Row, ignored: Collection[str] = ()) -> Prompt:
    """The prompt of a row, in whatever column is known to hold one.

    ignored  keys of messages that are left out

    Raises InputError for a row without a prompt, or with an empty one.
    """
    shaped = prompt_shape(row, ignored)
    _require_words(row, shaped.turns.messages)
    return Prompt(row.where, shaped.turns.messages, row.extra(*shaped.read), shaped.shape, shaped.notes)


def conversation_of(row: Row, ignored: Collection[str] = (), empty: bool = False) -> Conversation:
    """The conversation of a row.

    ignored  keys of messages that are left out
    empty    whether an empty prompt and empty model turns are accepted, by those who do not learn them

    Raises InputError for a row without one, TurnError for turns that cannot be learned.
    """
    shaped = conversation_shape(row, ignored)
    found = Conversation(
        row.where,
        shaped.turns.messages,
        shaped.answer or 0,
        row.columns.get("finish_reason") == "length",
        row.extra(*shaped.read, "finish_reason"),
        shaped.turns.masked,
        shaped.shape,
        shaped.notes,
    )
    if not empty:
        if shaped.answer is not None:
            _require_words(row, found.messages[: found.learn_from])
        _require_answers(found, shaped)
    return found


def pair_of(row: Row, ignored: Collection[str] = ()) -> Pair:
    """The preference pair of a row. Raises InputError with file and line if it is not one."""
    shaped = pair_shape(row, ignored)
    _require_words(row, shaped.prompt)
    return Pair(
        row.where,
        shaped.prompt,
        shaped.chosen,
        shaped.rejected,
        _flag(row, "chosen_truncated"),
        _flag(row, "rejected_truncated"),
        _number(row, "margin"),
        row.extra(*shaped.read, "chosen_truncated", "rejected_truncated", "margin"),
        shaped.shape,
        (shaped.note,) if shaped.note else (),
    )


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


def _require_words(row: Row, prompt: list[Message]) -> None:
    if not any(message["content"].strip() for message in prompt):
        raise InputError(f"{row.where}: the prompt is empty", "remove the row, or write a prompt")


def _require_answers(conversation: Conversation, shaped: Shaped) -> None:
    """Refuse an empty turn among those that are learned."""
    for index, message in enumerate(conversation.messages):
        learned = message["role"] == "assistant" and index not in conversation.unlearned
        if learned and not message["content"].strip():
            place = "the answer" if shaped.answer is not None else f"message {index + 1}, of the assistant,"
            raise TurnError(
                f"{conversation.where}: {place} is empty", "remove such rows: gemma2 filter, or --on-bad-row skip"
            )


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
