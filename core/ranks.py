"""The processes of one job: torchrun starts several copies of a command, rank 0 prints and writes for all of them.

    torchrun --nproc-per-node 2 -m gemma2.cli.main rlhf ...

A command that starts its own processes (posttrain/launch) gives them a folder, in which each leaves a word about how
it ended, and says nothing; the command that started them reads these words, and says once for all what was wrong. The
launcher ends all processes at the first failure: one that said its line itself could be ended just before. For the same
reason rank 0 leaves its word before the others hear of an error, not after it has cleaned up.

A single process does not import torch. Rank 0 alone opens outputs, logs, and makes the decisions that depend on the
disk, and sends them to the others; if it fails, they end silently with the same exit code. If another rank fails,
torchrun notices and ends the rest.

Where ranks only exchange values through `Ranks` (evaluation, generation), `Ranks.agreed` makes one error of all: a rank
that fails sends its error in place of its next value, so the others hear of it at theirs; rank 0 raises it, whichever
rank had it, and the others end silently with its exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from . import errors
from .errors import Gemma2Error, SystemRefusal, UsageError, refusal

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALONE",
    "FOLDER",
    "LAUNCHER",
    "WAIT",
    "LastWord",
    "ProcessBug",
    "RankEnd",
    "Ranks",
    "announced",
    "announced_here",
    "follow_launcher",
    "is_launched",
    "is_main",
    "join",
    "last_words",
    "leave_job",
    "leave_word",
    "make_room",
]

S = TypeVar("S")
T = TypeVar("T")
FOLDER = "GEMMA2_LAUNCH"  # variable with the folder of the words, in processes that a command has started
UNSET = "unset RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, or start the command with torchrun, which sets them"
LAUNCHER = "GEMMA2_LAUNCHER"  # variable with the number of the process that has started them
PR_SET_PDEATHSIG = 1  # prctl(2)
WAIT = timedelta(days=1)  # of ranks for rank 0, which may ask a server or write; a dead one is noticed at once
ROOM = 1 << 16  # bytes of a word: a disk that is full by the time of an error takes what is there already
TRACE = 20_000  # characters of a traceback that a word keeps, the last ones
HEARD = "_every_rank_knows"  # attribute of an error that was exchanged


@dataclass(frozen=True)
class LastWord:
    """How a process ended, for the command that started it.

    kind   error: a clear error, by `name` of its class; bug: with a traceback; lost: another process was gone;
           followed: rank 0 had ended the job
    code   exit code
    trace  traceback of a bug
    """

    kind: Literal["error", "bug", "lost", "followed"]
    code: int
    name: str = ""
    what: str = ""
    hint: str = ""
    where: str = ""
    trace: str = ""

    @classmethod
    def of(cls, error: Gemma2Error) -> LastWord:
        """That of a clear error."""
        return cls("error", error.exit_code, type(error).__name__, error.what, error.hint, error.where)


class ProcessBug(Exception):
    """A bug in one of the processes that this command has started; `trace` is its traceback."""

    def __init__(self, what: str, trace: str) -> None:
        super().__init__(what)
        self.trace = trace


def is_launched() -> bool:
    """Whether a command of this package has started this process as one of several."""
    return FOLDER in os.environ and os.environ.get(LAUNCHER) != str(os.getpid())  # which has them for its children


def make_room(folder: Path, ranks: Iterable[int]) -> None:
    """Prepare the words of these processes."""
    for rank in ranks:
        _aside(folder, str(rank)).write_text(" " * ROOM, encoding="utf-8")  # JSON may end with blanks


def _aside(folder: Path, rank: str) -> Path:
    return folder / f"end-{rank}.tmp"


def leave_word(word: LastWord) -> bool:
    """Leave a word for the command that has started this process, and return whether that will say it.

    Not so where none has started it, or the word cannot be written. The first word counts.
    """
    if not is_launched():
        return False
    aside = _aside(Path(os.environ[FOLDER]), os.environ.get("RANK", "0"))
    place = aside.with_suffix(".json")
    try:
        if not place.exists():
            text = json.dumps(asdict(replace(word, trace=word.trace[-TRACE:])), ensure_ascii=False)
            with aside.open("r+b") as file:
                file.write(text.encode(errors="backslashreplace"))
            aside.replace(place)
    except OSError:  # the command is gone, or its disk is full
        return False
    return True


def leave_job(code: int = 0) -> None:
    """End this process with this exit code, if it is one of several that have met; else return.

    What Python runs at its end is run. The interpreter is not taken down: a thread of gloo that notices meanwhile that
    another process is gone may abort this one, whose work is done. NCCL warns of processes that do not part from it;
    after a failure they must not try, since that waits for what the others have begun.
    """
    torch = sys.modules.get("torch")
    if torch is None or announced() == 1 or not torch.distributed.is_initialized():
        return
    if code == 0 and torch.distributed.get_backend() == "nccl":
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
    """The number of processes that the launcher announced, 1 without one.

    Raises UsageError for a variable of the launcher that holds no number, which would be a traceback in torch or
    accelerate at the first place that reads it, or that does not fit the others.
    """
    size = _number("WORLD_SIZE", 1, 1)
    rank = _number("RANK", 0, 0)
    if rank >= size:
        raise UsageError(f"the environment variable RANK is {rank}, and WORLD_SIZE says {size}", UNSET)
    _number("LOCAL_RANK", -1, -1)  # read by accelerate, in a single process too
    if size > 1:
        _number("MASTER_PORT", 1, 1, 65535)
    return size


def announced_here() -> int:
    """The number of processes on this machine; without a word about it, all of them."""
    return _number("LOCAL_WORLD_SIZE", announced(), 1)


def _number(name: str, default: int, least: int, most: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    number = int(text) if re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text) else None
    if number is None or number < least or (most is not None and number > most):
        raise UsageError(f"the environment variable {name} is {text!r}", UNSET)
    return number


class RankEnd(SystemExit):
    """Ends a process whose rank 0 has said why; the only SystemExit that this package raises inside a command."""


@dataclass(frozen=True)
class Failure:
    """The error of one rank, as the others get it in place of a value."""

    kind: str  # name of a class of core/errors.py
    what: str
    hint: str
    where: str
    code: int

    @classmethod
    def of(cls, error: Exception) -> Failure | None:
        """That of an error that a user can fix; None for a bug, which keeps its traceback."""
        if isinstance(error, Gemma2Error):
            return cls(type(error).__name__, error.what, error.hint, error.where, error.exit_code)
        line = refusal(error)
        if line is None:
            return None
        what, _, hint = line.partition("; ")
        return cls("SystemRefusal", what, hint, "", SystemRefusal.exit_code)

    def error(self) -> Gemma2Error:
        """The error again, marked as one that every rank knows."""
        kind: type[Gemma2Error] = getattr(errors, self.kind, Gemma2Error)
        made = kind(self.what, self.hint, self.where)
        setattr(made, HEARD, True)
        return made

    def word(self) -> LastWord:
        """The word about it."""
        return LastWord("error", self.code, self.kind, self.what, self.hint, self.where)


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
        """Run `work` on rank 0 and return its result on every rank. An expected failure in it ends every rank."""
        if self.size == 1:
            return work()
        if not self.is_main:
            return cast("T", self._exchange(None)[0])
        try:
            value = work()
        except Exception as error:
            self._tell(error)
            raise
        self._exchange(value)
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank. For small values: they are pickled."""
        return [value] if self.size == 1 else cast("list[T]", self._exchange(value))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Make an expected failure of any rank inside the block the failure of all; the end of the block is awaited.

        Only for blocks in which ranks exchange nothing but values of this class: another exchange, such as that of
        gradients, would be met by an error that the others cannot read.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            self.barrier()
        except Exception as error:
            self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        """Send an error in place of the next value. A rank but 0 ends here."""
        failure = None if getattr(error, HEARD, False) else Failure.of(error)
        if failure is not None:
            if self.is_main:
                leave_word(failure.word())
            with suppress(Gemma2Error):  # rank 0's own, which it is about to raise
                self._exchange(failure)
            setattr(error, HEARD, True)

    def _exchange(self, value: object) -> list[object]:
        """Return what each rank gave. If one gave an error, rank 0 raises the first one, and the others end."""
        values = self._every(value)
        failure = next((one for one in values if isinstance(one, Failure)), None)
        if failure is None:
            return values
        if self.is_main:
            leave_word(failure.word())
            raise failure.error()
        raise RankEnd(failure.code)

    def _every(self, value: object) -> list[object]:
        """The values of all ranks, by rank."""
        import torch

        values: list[object] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=Patient.group)
        return values

    def share(self, count: int) -> slice:
        """Return this rank's part of `count` items; the parts of all ranks in order cover them."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def dealt(self, items: Sequence[S], work: Callable[[S], T]) -> Iterator[T]:
        """Yield `work(item)` of every item, in order, on every rank; the ranks compute one item each, in turns."""
        for start in range(0, len(items), self.size):
            own = items[start : start + self.size][self.rank : self.rank + 1]
            for results in self.gather([work(item) for item in own]):
                yield from results

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self.gather(None)


ALONE = Ranks()


class Patient:
    """The group in which ranks exchange values: it waits for WAIT, tensors for as long as torch's default.

    Rank 0 alone reads the digests of a checkpoint, writes a result, asks a server; that may take longer than the ten
    minutes after which NCCL ends a job.
    """

    group: torch.distributed.ProcessGroup | None = None
    world: object = None  # the group of all processes in which it was made


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
    if Patient.world is not torch.distributed.group.WORLD:
        Patient.world = torch.distributed.group.WORLD
        Patient.group = torch.distributed.new_group(timeout=WAIT)  # a collective, in which all are by now
    return Ranks(state.process_index, state.num_processes)
