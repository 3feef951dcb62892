"""Rows read as the command will read them, before anything is loaded: shape, chat template, length. Torch-free.

A data set of up to some thousand rows is read whole; of a larger one the first rows of every file and others at random.
A row that the command would refuse is refused here, with its file and line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.posttrain.data.chat import ChatFormat, EndOfTurn
from gemma2.posttrain.data.examples import context_of, example_of, longer_hint, refuse_overlong
from gemma2.posttrain.data.own_form import Kind, kind_of_rows, rows_of_kind
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Conversation, Pair, Prompt
from gemma2.posttrain.data.sources import RowSample, count_rows, data_files, no_rows
from gemma2.posttrain.evaluation.built_in.documents import each_document, is_one_text
from gemma2.posttrain.evaluation.built_in.question_rows import each_choice_row, each_question
from gemma2.posttrain.runs.inputs import paths_of
from gemma2.posttrain.schemas import (
    DistillCacheConfig,
    DistillConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    PairsConfig,
    ParetoConfig,
    ProbeConfig,
    RewardConfig,
    RewardEvalConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.distill import FixedDataFields
from gemma2.posttrain.schemas.fields import RowFields
from gemma2.posttrain.schemas.measures import ChoicesConfig, PerplexityConfig, QaConfig, WinRateConfig

__all__ = ["RowsFound", "RowsToRead", "read_rows", "rows_to_read"]

FIRST, DRAWN = 500, 2500  # rows of one data set
SHOWN = 160  # tokens of the row that a plan shows
# Field -> what its rows are read as; "any": pairs or conversations, whichever they are; "rows": as they stand.
Measured = Literal["questions", "choices", "documents"]
Read = Literal["conversations", "pairs", "prompts", "any", "rows"] | Measured
PROMPTS: Mapping[str, Read] = {"prompts": "prompts", "heldout": "prompts"}
LEARNED: Mapping[str, Read] = {"data": "conversations", "eval_data": "conversations"}
PAIRS: Mapping[str, Read] = {"data": "pairs"}
# The fields of each command, and the field of the model whose chat template renders them.
FIELDS: dict[type[Config], tuple[Mapping[str, Read], str]] = {
    FilterConfig: ({"data": "rows"}, ""),
    GenerateConfig: (PROMPTS, "teacher"),
    SftConfig: (LEARNED, "model"),
    DistillConfig: ({**PROMPTS, **LEARNED}, "model"),
    DistillCacheConfig: (LEARNED, "teacher"),
    RewardConfig: (PAIRS, "model"),
    ProbeConfig: (PAIRS, "model"),
    RewardEvalConfig: (PAIRS, "models"),
    RewardScoreConfig: ({"data": "any"}, "model"),
    PairsConfig: (PROMPTS, "model"),
    RlhfConfig: (PROMPTS, "policy"),
    WarpConfig: (PROMPTS, "sft"),
    EvalConfig: (PROMPTS, "sft"),
    ParetoConfig: (PROMPTS, "sft"),
    PerplexityConfig: ({"perplexity": "documents"}, ""),
    QaConfig: ({"qa": "questions"}, "model"),
    ChoicesConfig: ({"choices": "choices"}, "model"),
    WinRateConfig: (PROMPTS, "model"),
}
MEASURED: dict[str, Callable[[Path, Reading], Iterator[Prompt]]] = {
    "questions": each_question,
    "choices": each_choice_row,
    "documents": each_document,
}
# Any: the three kinds of rows.
Render = Callable[[Any], list[int]]


@dataclass
class RowsFound:
    """What one data set holds.

    rows     of all files; `checked` of them were read
    lengths  tokens of the checked rows: of the whole conversation, of the longer side of a pair
    over     checked rows above the length limit; `cuts`: they are cut there, not dropped
    first    the first row as rendered
    """

    flag: str
    path: Path
    kind: str
    rows: int = 0
    checked: int = 0
    lengths: list[int] = field(default_factory=list)
    limit: int | None = None
    cuts: bool = False
    skipped: int = 0
    unread: tuple[str, ...] = ()
    first: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether every row was read."""
        return self.rows == self.checked

    def add(self, ids: list[list[int]], chat: ChatFormat | None) -> None:
        """Take the token ids of one more row, of a pair those of both sides."""
        if not ids or chat is None:
            return
        self.lengths.append(max(map(len, ids)))
        self.first = self.first or "".join(chat.token_text(i) for i in ids[0][:SHOWN])

    @property
    def over(self) -> int:
        """Checked rows above the length limit."""
        return 0 if self.limit is None else sum(length > self.limit for length in self.lengths)

    @property
    def mean(self) -> float:
        """Tokens per row that is kept, at most the limit; NaN where no tokenizer was at hand."""
        limit = self.limit or math.inf
        kept = [min(length, self.limit or length) for length in self.lengths if self.cuts or length <= limit]
        return sum(kept) / len(kept) if kept else math.nan

    @property
    def kept_share(self) -> float:
        """Share of the rows that are learned: neither left out as bad nor dropped as too long."""
        dropped = 0.0 if self.cuts or not self.lengths else self.over / len(self.lengths)
        return (1 - self.skipped / max(1, self.checked)) * (1 - dropped)

    def row(self) -> JsonObject:
        """The line of a plan."""
        ordered = sorted(self.lengths)

        def quantile(share: float) -> int | None:
            return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None

        found: JsonObject = {
            "data": f"--{self.flag.replace('_', '-')} {self.path}",
            "read_as": self.kind,
            "rows": self.rows,
            "checked": self.checked,
            "tokens_median": quantile(0.5),
            "tokens_95": quantile(0.95),
            "tokens_max": ordered[-1] if ordered else None,
        }
        found |= {"over_max_length": round(self.over / len(ordered), 4)} if self.limit and ordered else {}
        found |= {"bad_rows_skipped": self.skipped} if self.skipped else {}
        return found | ({"columns_not_read": list(self.unread)} if self.unread else {})


@dataclass(frozen=True)
class RowsToRead:
    """One data set of a command, and the settings that decide what is read of it.

    model   whose chat template renders the rows; None for a server, which has its own
    most    rows that the command reads at most, from the beginning; None for all
    limits  settings of rows to learn from; None for other rows
    """

    flag: str
    path: Path
    read: Read
    model: Path | None
    columns: tuple[str, ...]
    ignore_keys: tuple[str, ...]
    on_bad_row: Literal["error", "skip"]
    most: int | None
    max_length: int | None
    limits: Limits | None


@dataclass(frozen=True)
class Limits:
    """Settings of rows to learn from, as `RowLimits` has them."""

    max_length: int
    on_overlong: Literal["drop", "truncate", "error"]
    end_of_turn: EndOfTurn


def rows_to_read(config: Config) -> list[RowsToRead]:
    """Every data set that a command reads."""
    fields, template = FIELDS.get(type(config), ({}, ""))
    if not isinstance(config, RowFields) or not fields:
        return []
    remote = isinstance(config, GenerateConfig) and config.engine == "openai"
    model = None if remote else next(iter(paths_of(config, template)), None)
    limits = None
    if isinstance(config, SftConfig | FixedDataFields):
        limits = Limits(config.max_length, config.on_overlong, config.end_of_turn)
    longest = getattr(config, "max_length", None)
    rest = (config.columns, config.ignore_keys, config.on_bad_row)
    return [
        RowsToRead(name, path, read, model, *rest, _most_rows(config, name), longest, limits)
        for name, read in fields.items()
        for path in paths_of(config, name)
    ]


def _most_rows(config: Config, name: str) -> int | None:
    limit = getattr(config, "eval_prompts" if name == "heldout" else "limit", None)
    return limit if isinstance(limit, int) and not isinstance(config, WarpConfig) else None


def _kind(task: RowsToRead) -> Kind | Measured | Literal["rows"]:
    if task.read != "any":
        return task.read
    kind = kind_of_rows(task.path, Reading(task))
    return "conversations" if kind == "prompts" else kind  # which says that the answer is missing


def _read_as(kind: Kind | Measured, path: Path, reading: Reading) -> Iterator[Prompt | Conversation | Pair]:
    if kind == "questions" or kind == "choices" or kind == "documents":
        return MEASURED[kind](path, reading)
    return rows_of_kind(path, kind, reading)


def read_rows(task: RowsToRead, chat: Callable[[Path], ChatFormat | None], vocabulary: int | None = None) -> RowsFound:
    """Read rows of one data set.

    chat        the chat format of a model directory; None where it cannot be had without torch
    vocabulary  rows of the embedding of the model that reads them, if known

    Raises InputError for a row that the command would refuse, UsageError for a wrong `--columns`.
    """
    path, formatted = task.path, None if task.model is None else chat(task.model)
    kind = _kind(task)
    cuts = task.limits is not None and task.limits.on_overlong == "truncate"
    found = RowsFound(task.flag, path, kind, limit=task.max_length, cuts=cuts)
    sample = RowSample(FIRST, DRAWN) if task.most is None else None
    reading = Reading(task, sample=sample)
    most = None if task.most is None else min(task.most, FIRST + DRAWN)
    if kind == "rows":
        for _ in islice(reading.rows(path), most):
            pass
    else:
        for row in islice(_read_as(kind, path, reading), most):
            with reading.usable(row):
                ids = _ids(row, formatted, task.limits)
                _check_ids(ids, vocabulary, task, formatted)
                found.add(ids, formatted)
    found.skipped = len(reading.skipped)
    if kind == "documents" and is_one_text(path):
        found.rows = found.checked = 1
        return found
    found.unread = tuple(reading.tallies[path].unread)
    if sample is None:
        found.rows = min(task.most or 0, count_rows(path))
        found.checked = min(found.rows, FIRST + DRAWN)
    else:
        files = data_files(path)
        found.rows = sum(sample.totals[file] for file in files)
        found.checked = sum(sample.counted[file] for file in files)
        if sample.is_whole(files):
            reading.check_columns()
    _require_some(found, reading, task)
    return found


def _ids(row: Prompt | Conversation | Pair, chat: ChatFormat | None, limits: Limits | None) -> list[list[int]]:
    """The token ids that a model reads of a row: one list, of a pair both sides; empty without a tokenizer."""
    if chat is None:
        return []
    if isinstance(row, Prompt):
        return [chat.prompt_ids(row.messages)]
    if isinstance(row, Pair):
        return [
            chat.example([*row.prompt, *row.chosen], "eot", row.chosen_truncated)[0],
            chat.example([*row.prompt, *row.rejected], "eot", row.rejected_truncated)[0],
        ]
    if limits is not None:
        ids = example_of(row, chat, limits).ids
        refuse_overlong(row, len(ids), limits, chat)
        return [ids]
    return [chat.example(row.messages, "eot", row.truncated, row.unlearned)[0]]


def _check_ids(ids: list[list[int]], vocabulary: int | None, task: RowsToRead, chat: ChatFormat | None) -> None:
    """Refuse a token that the embedding has no row for. A tokenizer may have some, as long as no row uses them."""
    largest = max((max(one, default=0) for one in ids), default=0)
    if vocabulary is not None and chat is not None and largest >= vocabulary:
        raise InputError(
            f"the tokenizer of {task.model} has the token {chat.token_text(largest)!r} with id {largest}, "
            f"its config.json a vocab_size of {vocabulary}",
            "give the model the tokenizer that it was trained with",
        )


def _require_some(found: RowsFound, reading: Reading, task: RowsToRead) -> None:
    """Refuse a data set of which nothing would be left."""
    path = found.path
    if found.rows == 0:
        raise no_rows(path)
    if not found.is_whole:
        return
    if found.skipped == found.rows:
        what = f"no row of {path} can be used, the first: {reading.first_error()}"
        raise InputError(what, "see docs/data.md for what is read")
    drops = found.kind != "prompts" and (task.limits is None or task.limits.on_overlong != "truncate")
    if drops and found.lengths and found.over == len(found.lengths):
        shortest = min(found.lengths)
        raise InputError(
            f"every row of {path} is longer than --max-length {found.limit}, the shortest has {shortest} tokens",
            longer_hint(found.lengths, None if task.model is None else context_of(task.model)),
        )
