"""The processes of one job: torchrun starts several copies of a command, rank 0 prints and writes for all of them.

    torchrun --nproc-per-node 2 -m gemma2.cli.main rlhf ...

A command that starts its own processes (posttrain/launch) gives them a folder, in which each leaves a word about how
it ended; the command that started them reads these words, and says once for all what was wrong.

A single process does not import torch. Rank 0 alone opens outputs, logs, and makes the decisions that depend on the
disk, and sends them to the others; if it fails, they end silently with the same exit code. If another rank fails,
torchrun notices and ends the rest.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

from .errors import Gemma2Error, UsageError

__all__ = [
    "ALONE",
    "FOLDER",
    "LastWord",
    "Ranks",
    "announced",
    "follow_launcher",
    "is_launched",
    "is_main",
    "join",
    "last_words",
    "leave_job",
    "leave_word",
]

T = TypeVar("T")
FOLDER = "GEMMA2_LAUNCH"  # variable with the folder of the words, in processes that a command has started
LAUNCHER = "GEMMA2_LAUNCHER"  # variable with the number of the process that has started them
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class LastWord:
    """How a process ended, for the command that started it.

    kind   error: a clear error, by `name` of its class; bug: with a traceback; lost: another process was gone;
           followed: rank 0 had ended the job
    code   exit code
    """

    kind: Literal["error", "bug", "lost", "followed"]
    code: int
    name: str = ""
    what: str = ""
    hint: str = ""


def is_launched() -> bool:
    """Whether a command of this package has started this process as one of several."""
    return FOLDER in os.environ


def leave_word(word: LastWord) -> None:
    """Leave a word for the command that has started this process, if one has; the first word counts."""
    if is_launched():
        with suppress(OSError):  # the command is gone, or its disk is full: it will say that there was no word
            place = Path(os.environ[FOLDER], f"end-{os.environ.get('RANK', '0')}.json")
            if not place.exists():
                aside = place.with_suffix(".tmp")
                aside.write_text(json.dumps(asdict(word)), encoding="utf-8")
                aside.replace(place)


def leave_job() -> None:
    """End this process, if it is one of several that have met, at the end of a command that succeeded.

    What Python runs at its end is run. The interpreter is not taken down: a thread of gloo that notices meanwhile that
    another process is gone may abort this one, whose work is done. NCCL warns of processes that do not part from it.
    """
    torch = sys.modules.get("torch")
    if announced() == 1 or torch is None or not torch.distributed.is_initialized():
        return
    if torch.distributed.get_backend() == "nccl":
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def last_words(folder: Path) -> dict[int, LastWord]:
    """Return the words that processes have left, by rank."""
    return {
        int(path.stem.removeprefix("end-")): LastWord(**json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("end-*.json"))
    }


def follow_launcher() -> None:
    """End with SIGTERM when the command that has started this process is killed (Linux; elsewhere nothing)."""
    if not is_launched() or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it was killed before this
        os.kill(os.getpid(), signal.SIGTERM)


def is_main() -> bool:
    """Whether this process prints and writes for the job; reads only the environment."""
    return os.environ.get("RANK", "0") == "0"


def announced() -> int:
    """The number of processes that the launcher announced."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class RankEnd(SystemExit):
    """Ends a process whose rank 0 has said why; the only SystemExit that this package raises inside a command."""


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
        """Run `work` on rank 0 and return its result on every rank. A Gemma2Error that it raises ends every rank."""
        if self.size == 1:
            return work()
        result: tuple[T | None, int] = (None, 0)
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
            raise RankEnd(code)
        return cast("T", value)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank. For small values: they are pickled."""
        if self.size == 1:
            return [value]
        import torch

        values: list[T | None] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return cast("list[T]", values)

    def share(self, count: int) -> slice:
        """Return this rank's part of `count` items; the parts of all ranks in order cover them."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self.gather(None)

    def _broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Ranks()


def join(command: str) -> Ranks:
    """Connect to the other processes of this job, if there are any.

    Raises UsageError if the launcher announced several processes and they did not connect: some launchers announce
    several and start one.
    """
    expected = announced()
    if expected == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not (torch.cuda.is_available() or torch.xpu.is_available()))
    if state.num_processes != expected:
        raise UsageError(
            f"{command}: WORLD_SIZE is {expected}, but {state.num_processes} process(es) have connected",
            "start it with torchrun --nproc-per-node N -m gemma2.cli.main",
        )
    return Ranks(state.process_index, state.num_processes)
