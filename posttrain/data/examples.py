"""Rows to token ids and loss masks, and what becomes of rows over the length limit.

A row that is cut ends in the middle: what is left of its model turns is learned, an end of turn that was cut away is
not. Every row that is cut or dropped is listed with its file and line. No advice exceeds the context of the model,
the most positions that it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gemma2.core.errors import InputError
from gemma2.core.json_files import load_json
from gemma2.core.progress import Progress

from .chat import ChatFormat, EndOfTurn
from .reading import Reading
from .rows import Conversation
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "IGNORED",
    "Cut",
    "Example",
    "Overlong",
    "RowLimits",
    "context_of",
    "example_of",
    "longer_hint",
    "refuse_overlong",
    "report_overlong",
    "to_dataset",
    "tokenise",
]

IGNORED = -100  # label of a position without loss
SHOWN = 3  # rows that a warning names


class RowLimits(Protocol):
    """The fields of a configuration that concern rows."""

    @property
    def max_length(self) -> int: ...

    @property
    def on_overlong(self) -> Literal["drop", "truncate", "error"]: ...

    @property
    def end_of_turn(self) -> EndOfTurn: ...


@dataclass(frozen=True)
class Example:
    """One tokenised row: ids and, equally long, which of them are learned."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class Cut:
    """A row over the length limit: its place, its tokens, and how many of them are learned from (0: dropped)."""

    where: str
    tokens: int
    kept: int


@dataclass(frozen=True)
class Overlong:
    """The fate of rows over the length limit."""

    rows: tuple[Cut, ...] = ()

    @property
    def dropped(self) -> int:
        """Rows that were left out."""
        return sum(row.kept == 0 for row in self.rows)

    @property
    def truncated(self) -> int:
        """Rows that lost their end."""
        return sum(row.kept > 0 for row in self.rows)

    def __add__(self, other: Overlong) -> Overlong:
        return Overlong(self.rows + other.rows)

    def write(self, path: Path) -> None:
        """One line of JSON per row; no file without rows."""
        lines = [
            json.dumps({**vars(row), "action": "truncated" if row.kept else "dropped"}, ensure_ascii=False) + "\n"
            for row in self.rows
        ]
        if lines:
            path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def tokenise(
    rows: Sequence[Conversation], chat: ChatFormat, config: RowLimits, reading: Reading, what: str = "rows"
) -> tuple[list[Example], Overlong]:
    """Render and mask every row; rows over `config.max_length` are handled as `config.on_overlong` says.

    what  the rows are called in an error

    Raises InputError with file and line for a row that is too long under `error`, and for one that the chat template
    refuses, unless `reading` skips bad rows.
    """
    examples: list[Example] = []
    overlong: list[Cut] = []
    for row in rows:
        example = None
        with reading.usable(row):
            example = example_of(row, chat, config)
        if example is None:
            continue
        tokens = len(example.ids)
        if tokens > config.max_length:
            refuse_overlong(row, tokens, config, chat)
            example = Example(example.ids[: config.max_length], example.mask[: config.max_length])
            dropped = config.on_overlong == "drop" or not any(example.mask)
            overlong.append(Cut(row.where, tokens, 0 if dropped else config.max_length))
            if dropped:
                continue
        examples.append(example)
    if rows and not examples and not overlong:
        raise InputError(f"none of {len(rows)} rows can be learned", "see docs/data.md for what is read")
    if rows and not examples:
        fault = f"all {len(rows)} {what} are longer than --max-length {config.max_length}"
        raise InputError(fault, longer_hint([cut.tokens for cut in overlong], _positions_behind(chat.tokenizer)))
    return examples, Overlong(tuple(overlong))


def refuse_overlong(row: Conversation, tokens: int, config: RowLimits, chat: ChatFormat) -> None:
    """Raise InputError for a row above the limit where `config.on_overlong` says so."""
    if config.on_overlong == "error" and tokens > config.max_length:
        what = f"{row.where}: {tokens} tokens, more than --max-length {config.max_length}"
        hint = longer_hint([tokens], _positions_behind(chat.tokenizer))
        raise InputError(what, f"{hint}, or choose --on-overlong drop")


def example_of(row: Conversation, chat: ChatFormat, config: RowLimits) -> Example:
    """A row as it is, of any length. Model turns of `row.unlearned` are context."""
    ids, mask = chat.example(row.messages, config.end_of_turn, row.truncated, row.unlearned)
    if not any(mask):
        raise InputError("no turn of the row is learned", "remove it, or give one turn the weight 1")
    return Example(ids, mask)


def context_of(model: Path) -> int | None:
    """`max_position_embeddings` of a model directory; None for another folder, and for a model without a limit."""
    try:
        config = load_json(model / "config.json")
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    inner = config.get("text_config")  # of a model with a vision tower
    found = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def _positions_behind(tokenizer: Tokenizer) -> int | None:
    """The context of the model whose directory a tokenizer was loaded from."""
    place = getattr(tokenizer, "name_or_path", "")  # empty for one that was made in memory
    return context_of(Path(place)) if place else None


def longer_hint(tokens: Iterable[int], context: int | None) -> str:
    """What to do about rows of these lengths, all above --max-length: the limit that takes most of them."""
    fitting = [length for length in tokens if context is None or length <= context]
    if fitting:
        return f"raise it: --max-length {max(fitting)}"
    return f"shorten the rows: the model's context is {context}"


def report_overlong(overlong: Overlong, total: int, config: RowLimits, progress: Progress, what: str = "rows") -> None:
    """Nothing is cut or dropped in silence."""
    for verb, chosen in (
        ("dropped", [row.where for row in overlong.rows if not row.kept]),
        ("truncated", [row.where for row in overlong.rows if row.kept]),
    ):
        if chosen:
            named = ", ".join(chosen[:SHOWN]) + (", ..." if len(chosen) > SHOWN else "")
            limit = f"longer than --max-length {config.max_length}"
            progress.warn(f"{len(chosen)} of {total} {what} are {limit} and were {verb} ({named})")


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """Columns of TRL's trainer, and `length` (tokens) for the sampler."""
    from datasets import Dataset  # a second of imports, which checks of the rows need not wait for

    columns: dict[str, list[Any]] = {
        "input_ids": [example.ids for example in examples],
        "labels": [
            [i if learned else IGNORED for i, learned in zip(example.ids, example.mask, strict=True)]
            for example in examples
        ],
        "length": [len(example.ids) for example in examples],
    }
    return Dataset.from_dict(columns)
