"""Which rows share a batch: rows of similar length, so that eager attention computes little padding.

Rows are shuffled, cut into stretches of 50 batches, sorted by length inside each stretch and cut into batches, and the
batches are shuffled. Deviation from transformers' `group_by_length`: the order is a function of seed and epoch (theirs
follows the global random state, which a resume does not restore), and batches do not run from long to short.

Several processes share the rows of each batch. accelerate completes the last one of an epoch with rows that were
trained on already; here a filler takes their places, a row without anything to learn, so that each optimizer step has
the rows that it has in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.utils.data import Sampler

from .seeds import derived_seed

__all__ = ["GroupedByLength", "LengthSampler", "length_grouped_order"]

STRETCH = 50  # batches that are sorted by length together


def length_grouped_order(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """A permutation of the rows whose consecutive slices of `batch_size` hold rows of similar length.

    A batch that is not full comes last, so that all others stay aligned.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    size = STRETCH * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), size):
        stretch = sorted(shuffled[start : start + size], key=lengths.__getitem__)
        batches += [stretch[i : i + batch_size] for i in range(0, len(stretch), batch_size)]
    full, rest = [b for b in batches if len(b) == batch_size], [b for b in batches if len(b) < batch_size]
    order = torch.randperm(len(full), generator=generator).tolist()
    return [row for batch in [*(full[i] for i in order), *rest] for row in batch]


class Epochs(Protocol):
    """Which rows an epoch holds."""

    def __len__(self) -> int: ...

    def rows(self, epoch: int) -> list[int]: ...


class LengthSampler(Sampler[int]):
    """Yields rows in `length_grouped_order`, another order for every epoch; `set_epoch` is called by the trainer.

    epochs: which rows come; without it, every row once. together: rows that all processes take at once; more than 1
    if the last entry of `lengths` is a filler, which completes the last ones of an epoch.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, epochs: Epochs | None = None, together: int = 1
    ) -> None:
        self.lengths = lengths if together == 1 else lengths[:-1]
        self.together = together
        self.batch_size = batch_size
        self.seed = seed
        self.epochs = epochs
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        rows = len(self.lengths if self.epochs is None else self.epochs)
        return -(-rows // self.together) * self.together

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        rows = list(range(len(self.lengths))) if self.epochs is None else self.epochs.rows(self.epoch)
        order = length_grouped_order([self.lengths[row] for row in rows], self.batch_size, generator)
        fillers = [len(self.lengths)] * (len(self) - len(rows))
        return iter([*(rows[place] for place in order), *fillers])


class GroupedByLength:
    """Mixin for a Trainer whose training set has a column `length` (tokens): optimizer batches of similar rows.

    `epochs`, where a trainer sets it, says which rows of the training set an epoch holds. With several processes the
    last row of the training set is the filler.
    """

    epochs: Epochs | None = None

    def _run_epoch(self, *arguments: object, **options: object) -> None:
        """An epoch; none after the last step, where a run goes on that was killed while its result was written."""
        state = self.state  # type: ignore[attr-defined]
        if state.global_step >= state.max_steps:
            self.control.should_training_stop = True  # type: ignore[attr-defined]
        else:
            super()._run_epoch(*arguments, **options)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: object = None) -> LengthSampler:
        args = self.args  # type: ignore[attr-defined]
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = self.train_dataset["length"][:]  # type: ignore[attr-defined]
        together = args.train_batch_size * args.world_size if args.world_size > 1 else 1
        return LengthSampler(lengths, batch_size, args.seed, self.epochs, together)
