"""Every row of a data set with its score by a reward model.

    data-00000-of-0000N.jsonl   the unchanged rows, and
        score                           of {"prompt", "completion"} and {"messages"}: of the last model turn
        chosen_score, rejected_score    of preference pairs

The score is null if a conversation is longer than the limit. A completion ends with its end of turn, but a truncated
one (`finish_reason` length, `chosen_truncated`, `rejected_truncated`) does not.

Rows are scored in chunks that depend on the data only. Each is in the journal before the next one, so that a killed run
continues with the same rows in the same batches. Several processes are dealt the batches of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from gemma2.core.errors import InputError
from gemma2.core.progress import SILENT, Progress, Task
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Message, conversation_of, located, pair_of
from gemma2.posttrain.data.sources import Row, ShardWriter, no_rows
from gemma2.posttrain.generation.journal import Journal, journal_of
from gemma2.posttrain.models.loading import default_device, load_tokenizer, quiet_libraries
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.sampler import length_batches
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.runs.together import together
from gemma2.posttrain.schemas import RewardScoreConfig

__all__ = ["run_score", "score_rows"]

CHUNK = 512  # rows between two flushes of the journal
DIGITS = 6  # of a score, after the point

Scores = list[float | None]  # of one row: one score, or two for a pair


@dataclass(frozen=True)
class RowToScore:
    """A row with a column and a conversation for each of its scores."""

    row: Row
    columns: list[str]
    conversations: list[tuple[list[Message], bool]]  # messages, whether the last one was cut


def run_score(config: RewardScoreConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Score `config.data` with `config.model` and write the rows in shards to `options.out`.

    Raises InputError with file and line for a row without a model turn, before anything is scored.
    """
    quiet_libraries()
    with together(config) as ranks, open_run("reward score", config, options, ranks=ranks) as run:
        progress = progress if ranks.is_main else SILENT
        run.origin["attention"] = settle_attention(
            config.attention, [config.model], progress, dtype=frozen_dtype(config.dtype), device=default_device()
        )
        reading = Reading(config)
        chat = ChatFormat(load_tokenizer(config.model))
        total = check_rows(config, reading, chat, progress)
        unread = reading.report(progress, run.path if ranks.is_main else None)
        with journal_of(run, "scores.jsonl") as journal:
            with progress.task("score", total=total, unit="rows") as bar:
                _fill(config, reading, journal, bar, ranks)
            summary = ranks.on_main(lambda: _write(config, run.path, reading, journal))
        if summary.overlong:
            progress.warn(f"{summary.overlong} of {total} rows are too long for the model and have no score")
        return run.finish({**summary.document(), **unread})


def _write(config: RewardScoreConfig, out: Path, reading: Reading, journal: Journal) -> _Summary:
    """Write the rows with the scores of the journal; their figures."""
    scores = chain.from_iterable(record["scores"] for record in journal.records())
    summary = _Summary()
    with ShardWriter(out, config.shard_rows) as writer:
        for scored, values in zip(_rows(config, reading), scores, strict=True):
            writer.write(scored.row.columns | dict(zip(scored.columns, values, strict=True)))
            summary.add(values)
    return summary


def check_rows(config: RewardScoreConfig, reading: Reading, chat: ChatFormat, progress: Progress) -> int:
    """Read every row before the first is scored and return their number. Warn of existing scores, to be replaced."""
    count = replaced = 0
    for scored in _rows(config, reading):
        if not _renderable(scored, reading, chat):
            continue
        count += 1
        replaced += any(name in scored.row.columns for name in scored.columns)
    if count == 0:
        raise no_rows(config.data)
    if replaced:
        progress.warn(f"{replaced} of {count} rows have scores of that name, which are replaced; see --column")
    return count


def score_rows(
    model: RewardModel, rows: Sequence[list[int]], batch_size: int, bar: Task | None = None, ranks: Ranks = ALONE
) -> Tensor:
    """Return rewards (N,) fp32 of whole conversations, on every process, and advance the bar."""
    rewards = torch.zeros(len(rows))
    batches = list(length_batches([len(row) for row in rows], batch_size))

    def score(batch: list[int]) -> list[float]:
        found: list[float] = model.score([rows[i] for i in batch], [[]] * len(batch), batch_size).tolist()
        return found

    for batch, found in zip(batches, ranks.dealt(batches, score), strict=True):
        rewards[batch] = torch.tensor(found)
        if bar is not None:
            bar.advance(len(batch))
    return rewards


def _renderable(scored: RowToScore, reading: Reading, chat: ChatFormat) -> bool:
    """Whether the chat template takes a row. Raises InputError if it does not, unless rows are skipped."""
    try:
        with located(scored.row.where):
            for messages, _ in scored.conversations:
                chat.normalise(messages)
    except InputError as error:
        reading.skip(error, scored.row.where, scored.row.columns)
        return False
    return True


def _rows(config: RewardScoreConfig, reading: Reading) -> Iterator[RowToScore]:
    for row in reading.rows(config.data, config.limit):
        if row.where in reading.skipped:
            continue
        try:
            yield _to_score(row, config.column, reading.ignored)
        except InputError as error:
            reading.skip(error, row.where, row.columns)


def _to_score(row: Row, name: str, ignored: Collection[str]) -> RowToScore:
    if "chosen" in row.columns or "rejected" in row.columns:
        pair = pair_of(row, ignored)
        sides = [
            ([*pair.prompt, *pair.chosen], pair.chosen_truncated),
            ([*pair.prompt, *pair.rejected], pair.rejected_truncated),
        ]
        return RowToScore(row, [f"chosen_{name}", f"rejected_{name}"], sides)
    else:
        conversation = conversation_of(row, ignored, empty=True)
        if conversation.messages[-1]["role"] not in ("assistant", "model"):
            raise InputError(f"{row.where}: the last message is not the model's", "give the answer to be scored")
        return RowToScore(row, [name], [(conversation.messages, conversation.truncated)])


def _fill(config: RewardScoreConfig, reading: Reading, journal: Journal, bar: Task, ranks: Ranks) -> None:
    """Score the rows that are missing from the journal, a chunk per record."""
    done = ranks.on_main(lambda: sum(len(record["scores"]) for record in journal.records()))
    bar.advance(done)
    rows = islice(_rows(config, reading), done, None)
    model = RewardModel.from_dir(config.model, frozen_dtype(config.dtype), config.attention)
    chat = ChatFormat(model.tokenizer)
    longest = config.max_length or getattr(model.model.config, "max_position_embeddings", None)
    while chunk := list(islice(rows, CHUNK)):
        ids = _ids(chunk, chat)
        fitting = [i for i, row in enumerate(ids) if longest is None or len(row) <= longest]
        rewards = score_rows(model, [ids[i] for i in fitting], config.batch_size, ranks=ranks)
        journal.append([{"scores": _scores(chunk, ids, dict(zip(fitting, rewards.tolist(), strict=True)))}])
        bar.advance(len(chunk))


def _ids(chunk: Sequence[RowToScore], chat: ChatFormat) -> list[list[int]]:
    """The tokens of every conversation of the rows."""
    ids: list[list[int]] = []
    for scored in chunk:
        for messages, cut in scored.conversations:
            with located(scored.row.where):
                ids.append(chat.example(messages, "eot", cut)[0])
    return ids


def _scores(chunk: Sequence[RowToScore], ids: Sequence[list[int]], rewards: Mapping[int, float]) -> list[Scores]:
    """The scores of each row. rewards: by the number of a conversation, without those that are too long."""
    for i, reward in rewards.items():
        if not math.isfinite(reward):
            raise InputError(f"the reward model gives {reward} for a row of {len(ids[i])} tokens", "check its weights")
    values = iter([round(rewards[i], DIGITS) if i in rewards else None for i in range(len(ids))])
    return [[next(values) for _ in scored.conversations] for scored in chunk]


class _Summary:
    """Running figures of the scores."""

    def __init__(self) -> None:
        self.rows = self.pairs = self.overlong = self.count = 0
        self.correct = self.sum = self.squares = 0.0

    def add(self, scores: Scores) -> None:
        self.rows += 1
        values = [score for score in scores if score is not None]
        self.overlong += len(values) < len(scores)
        self.count += len(values)
        self.sum += sum(values)
        self.squares += sum(value**2 for value in values)
        if len(values) == 2:
            self.pairs += 1
            self.correct += (values[0] > values[1]) + 0.5 * (values[0] == values[1])

    def document(self) -> dict[str, float | None]:
        mean = self.sum / self.count if self.count else None
        spread = math.sqrt(max(0.0, self.squares / self.count - mean**2)) if mean is not None else None
        found: dict[str, float | None] = {"rows": self.rows, "overlong": self.overlong}
        found |= {"mean_score": mean, "std_score": spread}
        return found | ({"pairs": self.pairs, "accuracy": self.correct / self.pairs} if self.pairs else {})
