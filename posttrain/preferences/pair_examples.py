"""Preference pairs as token ids of whole conversations: rendered and checked; dropped pairs are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from gemma2.core.errors import InputError
from gemma2.core.progress import Progress
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Pair

__all__ = ["PairIds", "report_dropped", "to_dataset", "tokenise_pairs", "tokenise_split"]


@dataclass(frozen=True)
class PairIds:
    """One pair as token ids of whole conversations; `prompt` is the number of tokens of the prompt that both share."""

    chosen: list[int]
    rejected: list[int]
    prompt: int
    margin: float | None = None
    source: Pair | None = None

    @property
    def length(self) -> int:
        """Return the number of tokens of the longer side."""
        return max(len(self.chosen), len(self.rejected))


def tokenise_pairs(
    pairs: Sequence[Pair], chat: ChatFormat, max_length: int | None, reading: Reading, some_needed: bool = True
) -> tuple[list[PairIds], dict[str, int]]:
    """Render both sides of every pair. Return the usable pairs and how many were dropped, by reason.

    Raises InputError with file and line for a pair that the chat template refuses, unless `reading` skips bad rows, and
    with `some_needed` if none is left.
    """
    kept: list[PairIds] = []
    dropped = {"overlong_dropped": 0, "identical_dropped": 0}
    for pair in pairs:
        ids = None
        with reading.usable(pair):
            ids = _pair_ids(pair, chat)
        if ids is None:
            continue
        if max_length is not None and ids.length > max_length:
            dropped["overlong_dropped"] += 1
        elif ids.chosen == ids.rejected:
            dropped["identical_dropped"] += 1
        else:
            kept.append(ids)
    if some_needed and pairs and not kept:
        what = f"none of {len(pairs)} pairs is usable: {dropped['overlong_dropped']} over --max-length {max_length}"
        raise InputError(f"{what}, {dropped['identical_dropped']} with two identical sides", "check the data")
    return kept, dropped


def tokenise_split(
    training: Sequence[Pair],
    heldout: Sequence[Pair],
    chat: ChatFormat,
    max_length: int,
    reading: Reading,
    progress: Progress,
) -> tuple[list[PairIds], list[PairIds], dict[str, int]]:
    """Return the usable pairs of both sides of a split, and how many were dropped of both together; also warn of them.

    Raises InputError like `tokenise_pairs`, but without usable held-out pairs it only warns.
    """
    pairs, dropped = tokenise_pairs(training, chat, max_length, reading)
    heldout_pairs, further = tokenise_pairs(heldout, chat, max_length, reading, some_needed=False)
    dropped = {reason: count + further[reason] for reason, count in dropped.items()}
    report_dropped(dropped, len(training) + len(heldout), max_length, progress)
    if heldout and not heldout_pairs:
        progress.warn(f"none of the {len(heldout)} held-out pairs is usable: nothing is measured on them")
    return pairs, heldout_pairs, dropped


def _pair_ids(pair: Pair, chat: ChatFormat) -> PairIds:
    chosen, _ = chat.example([*pair.prompt, *pair.chosen], "eot", pair.chosen_truncated)
    rejected, _ = chat.example([*pair.prompt, *pair.rejected], "eot", pair.rejected_truncated)
    return PairIds(chosen, rejected, len(chat.prompt_ids(pair.prompt)), pair.margin, pair)


def report_dropped(dropped: dict[str, int], total: int, max_length: int | None, progress: Progress) -> None:
    """Warn of every kind of dropped pairs."""
    if dropped["overlong_dropped"]:
        what = f"are longer than --max-length {max_length}"
        progress.warn(f"{dropped['overlong_dropped']} of {total} pairs {what} and were dropped")
    if dropped["identical_dropped"]:
        progress.warn(f"{dropped['identical_dropped']} of {total} pairs have two identical sides and were dropped")


def to_dataset(pairs: Sequence[PairIds]) -> Dataset:
    """Return the columns of TRL's collator, and `length` for batches of similar pairs. No margin counts as 0."""
    columns: dict[str, list[list[int]] | list[int] | list[float]] = {
        "chosen_ids": [pair.chosen for pair in pairs],
        "rejected_ids": [pair.rejected for pair in pairs],
        "length": [pair.length for pair in pairs],
    }
    if any(pair.margin is not None for pair in pairs):
        columns["margin"] = [pair.margin or 0.0 for pair in pairs]
    return Dataset.from_dict(columns)
