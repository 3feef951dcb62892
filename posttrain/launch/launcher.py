"""Starts the processes of a command under torch's launcher, and ends as they end: one line, one exit code.

    gemma2 sft ... --gpus 8     this process waits; eight more run `python -m gemma2.cli.main sft ... --gpus 8`

The launcher is the one behind torchrun (torch.distributed.launcher): on one machine the processes meet at a port that
is free, on several at the head's. Rank 0 has the terminal; what the others write to stderr is shown only if they fail.
If one ends, the launcher ends the rest. Each process leaves a word about its end (core/ranks.py) and says nothing, so
that one line is said here, of the process that was the cause, and torch's own report is left out.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core import errors
from gemma2.core.errors import EndedElsewhere, Gemma2Error, InputError, UsageError
from gemma2.core.interrupts import Signals
from gemma2.core.ranks import FOLDER, LAUNCHER, LastWord, ProcessBug, last_words, make_room
from gemma2.posttrain.runs.machine import CHOICE

from .nodes import Meeting

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

__all__ = ["Processes", "check_torch", "run_processes"]

WORKER = ("-m", "gemma2.cli.main")
WAIT = 900  # seconds in which the machines of a job have to meet
END = 30  # seconds that the launcher gives to the other processes when one has ended, or to all at a signal
MORE = 10  # seconds after these in which this process ends by itself
THREADS = "OMP_NUM_THREADS"
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
GO_ON = "start it again; a run that has a checkpoint goes on with --resume"
# Signals with which a system, or a fault, ends a process; the launcher itself ends the others with SIGTERM, and after
# END seconds with SIGKILL.
KILLED = frozenset({signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE})


@dataclass(frozen=True)
class Processes:
    """What is started on this machine.

    words  the command line after `gemma2`
    keys   the GPUs, one for each process, as CUDA_VISIBLE_DEVICES calls them
    """

    words: Sequence[str]
    keys: Sequence[str]
    meeting: Meeting = field(default_factory=Meeting)

    @property
    def first(self) -> int:
        """The rank of the first process on this machine."""
        return self.meeting.node * len(self.keys)


@dataclass(frozen=True)
class Ended:
    """A process that failed. `code` is below 0 for a signal."""

    rank: int
    pid: int
    code: int
    stderr: str


class ProcessEnd(Gemma2Error):
    """A process of a command ended by a signal, or without a word."""

    def __init__(self, what: str, hint: str = "", code: int = 1) -> None:
        super().__init__(what, hint)
        self.exit_code = code


def check_torch() -> None:
    """Raise InputError for a torch that cannot use the GPUs of this machine, or cannot join them."""
    import torch

    if not torch.distributed.is_available():
        raise InputError("this torch is built without torch.distributed", "install a build of torch that has it")
    if not torch.accelerator.is_available():
        raise InputError(
            f"torch {torch.__version__} sees no GPU, and the driver lists some",
            "install the build of torch for these GPUs and this driver, see pytorch.org",
        )
    if (torch.version.cuda or torch.version.hip) and not torch.distributed.is_nccl_available():
        raise InputError(
            f"torch {torch.__version__} is built without NCCL, which joins several GPUs",
            "install a build of torch that has it, or give --gpus 1",
        )


def run_processes(processes: Processes) -> int:
    """Start the processes, wait for their end, and return 0, the exit code of processes that did their work.

    Raises the error that a process has left a word about, ProcessBug for a bug, ProcessEnd for a process that was
    killed, InputError where the machines do not meet.
    """
    with _silent_sockets():
        check_torch()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with tempfile.TemporaryDirectory(prefix="gemma2-launch-") as name:
        folder = Path(name)
        os.environ |= {FOLDER: name, LAUNCHER: str(os.getpid())}
        os.environ[CHOICE] = ",".join(processes.keys)
        os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // len(processes.keys))))
        logging.disable(logging.CRITICAL)  # of the launcher; the processes are others
        Signals.least = END + MORE
        make_room(folder, range(processes.first, processes.first + len(processes.keys)))
        try:
            elastic_launch(_settings(processes, folder), sys.executable)(*WORKER, *processes.words)
            return 0
        except ChildFailedError as error:
            found = {
                rank: Ended(rank, failure.pid, failure.exitcode, _stderr(folder, failure.local_rank))
                for rank, failure in error.failures.items()
            }
            raise cause(found, last_words(folder), alone=processes.meeting.nodes == 1) from None
        except (RuntimeError, OSError) as error:
            raise _no_meeting(processes.meeting, error) from error
        finally:
            logging.disable(logging.NOTSET)
            del os.environ[FOLDER], os.environ[LAUNCHER]


@contextmanager
def _silent_sockets() -> Iterator[None]:
    """A block that imports torch, whose sockets then do not write their stacks while machines meet: one line says it.

    torch reads the variable at its import; the processes do not get it.
    """
    if LOG_LEVEL in os.environ:
        yield
        return
    os.environ[LOG_LEVEL] = "FATAL"
    try:
        yield
    finally:
        del os.environ[LOG_LEVEL]


def _settings(processes: Processes, folder: Path) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    meeting, count = processes.meeting, len(processes.keys)
    hidden = {local: Std.ERR for local in range(count) if processes.first + local > 0}
    alone = meeting.nodes == 1
    return LaunchConfig(
        min_nodes=meeting.nodes,
        max_nodes=meeting.nodes,
        nproc_per_node=count,
        run_id=f"gemma2-{os.getpid()}" if alone else "gemma2",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else meeting.place,  # 0: a port that is free
        rdzv_configs={} if alone else {"rank": meeting.node, "timeout": WAIT},
        local_addr="localhost" if alone else None,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=hidden),
        signals_to_handle="",  # ours stay: they raise once, and wait for what cleans up
        shutdown_timeout=END,
    )


def cause(ended: Mapping[int, Ended], words: Mapping[int, LastWord], alone: bool = True) -> Exception:
    """Return the error of a command whose processes have failed.

    ended  those that failed on this machine, by rank, those that the launcher then ended included
    words  what the processes have left about their ends
    alone  whether this machine has all processes

    What was said comes before what was seen: a process that waits for one that is gone may be in native code, where
    the launcher ends it with SIGKILL.
    """
    for rank, word in sorted(words.items()):
        if word.kind in ("error", "bug"):
            return _again(rank, word)
    killed = [one for one in ended.values() if -one.code in KILLED and one.rank not in words]  # else on its way out
    if killed:
        return _killed(killed)
    for rank, word in sorted(words.items(), key=lambda item: item[1].kind != "followed"):
        if word.kind == "followed":
            where, why = ("", GO_ON) if alone else (", on another machine,", "it says why where it runs")
            followed = EndedElsewhere(f"rank 0{where} has ended the job with exit code {word.code}", why)
            followed.exit_code = word.code
            return followed
        return _again(rank, word)
    one = min(ended.values(), key=lambda one: one.code < 0)
    return ProcessEnd(
        f"rank {one.rank} (process {one.pid}) ended with exit code {one.code} and left no word{_wrote(one)}",
        GO_ON,
        abs(one.code) if one.code > 0 else 128 - one.code,
    )


def _killed(ended: Sequence[Ended]) -> ProcessEnd:
    """The line for processes that were ended by a signal; with SIGKILL the launcher has ended all of them but one."""
    faults = [one for one in ended if one.code != -signal.SIGKILL] or ended
    who = " or ".join(f"rank {one.rank} (process {one.pid})" for one in sorted(faults, key=lambda one: one.rank))
    first = faults[0]
    name = signal.Signals(-first.code).name
    why = ", which a system without free memory sends" if name == "SIGKILL" else _wrote(first)
    return ProcessEnd(f"{who} was ended by {name}{why}", GO_ON, 128 - first.code)


def _wrote(one: Ended) -> str:
    """The end of what a process has written to stderr, as an addition to a line."""
    tail = " ".join(one.stderr.split())[-300:]
    return f"; it wrote: {tail}" if tail else ""


def _again(rank: int, word: LastWord) -> Exception:
    """The error that a process had, as one of this process, with its rank where others may not have had the same."""
    if word.kind == "bug":
        return ProcessBug(word.what, word.trace)
    kind = getattr(errors, word.name, Gemma2Error)
    alike = rank == 0 or issubclass(kind, UsageError)  # the command line is that of all: the first to see it says so
    what = word.what if alike else f"rank {rank}: {word.what}"
    made: Gemma2Error = kind(what, word.hint, word.where)
    return made if made.exit_code == word.code else ProcessEnd(made.what, made.hint, word.code)


def _stderr(folder: Path, local: int) -> str:
    """What a process has written to stderr, if it was not on the terminal."""
    texts = [
        path.read_text(encoding="utf-8", errors="replace") for path in folder.glob(f"*/attempt_0/{local}/stderr.log")
    ]
    return "".join(texts)


def _no_meeting(meeting: Meeting, error: Exception) -> Gemma2Error:
    """The line for machines, or processes, that could not meet. Raises the error if it is of another kind."""
    text = " ".join(str(error).split())
    place = meeting.place
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UsageError(
            f"the port {place} of the head is taken", "set PET_MASTER_PORT to another one, on each machine"
        )
    if meeting.nodes > 1 and "Ping failed" in text:
        return UsageError(
            f"another program answers at {place}, the port of the head ({text[:120]})",
            "set PET_MASTER_PORT to another one, on each machine",
        )
    network = type(error).__name__ == "DistNetworkError"  # torch's, of whatever the socket was refused
    if meeting.nodes > 1 and (network or any(word in text for word in ("imed out", "clients joined", "connect"))):
        return InputError(
            f"the {meeting.nodes} machines did not meet at {place} within {WAIT} s ({text[:120]})",
            f"see that the command was started on each, and that each reaches {place}; PET_MASTER_PORT is another port",
        )
    raise error
