"""The processes of one job: torchrun starts several copies of a command, rank 0 speaks and writes for all of them.

    torchrun --nproc-per-node 2 -m gemma2.cli.main rlhf ...

Torch-free until there are several. Rank 0 alone opens outputs, logs and decides what depends on the disk, and tells the
others; where it fails, they end with the same exit code and without a word. A rank that fails alone is torchrun's to
notice: it ends the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import Gemma2Error, UsageError

__all__ = ["ALONE", "Ranks", "announced", "is_main", "join"]

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process speaks for the job; reads nothing but the environment."""
    return os.environ.get("RANK", "0") == "0"


def announced() -> int:
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of its job."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank. An expected error of it ends every rank."""
        if self.size == 1:
            return work()
        result: tuple[Any, int] = (None, 0)
        failure: Gemma2Error | None = None
        if self.is_main:
            try:
                result = (work(), 0)
            except Gemma2Error as error:
                failure, result = error, (None, error.exit_code)
        value, code = self._broadcast(result)
        if failure is not None:
            raise failure
        if code:
            raise SystemExit(code)
        return value

    def gather(self, value: T) -> list[T]:
        """What every rank holds, by rank, on every rank. Small things: they are pickled."""
        if self.size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def share(self, count: int) -> slice:
        """The part of `count` things that is this rank's; all parts in order are the whole."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def barrier(self) -> None:
        """Wait for the others."""
        self.gather(None)

    def _broadcast(self, value: Any) -> Any:
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Ranks()


def join(command: str) -> Ranks:
    """Meet the other processes of this job, where there are any.

    Raises UsageError when the launcher announced several processes and they did not meet: some launchers start one
    process and say so to nobody.
    """
    expected = announced()
    if expected == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != expected:
        raise UsageError(
            f"{command}: WORLD_SIZE is {expected} and {state.num_processes} process(es) have met",
            "start it with torchrun --nproc-per-node N -m gemma2.cli.main",
        )
    return Ranks(state.process_index, state.num_processes)
