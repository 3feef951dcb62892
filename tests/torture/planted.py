"""What tests plant in a process of the zygote before its command begins: `before=planted.call("ready", marker)`."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from waiting import lasting, pause

DAY = 86400.0
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGURG, signal.SIGCHLD)


def call(function: str, *arguments: object) -> str:
    """The source that calls a function of this module."""
    words = ", ".join(repr(str(one) if isinstance(one, Path) else one) for one in arguments)
    return f"import planted\nplanted.{function}({words})\n"


def ready(marker: str) -> None:
    """A file says that the command has its handlers of signals."""
    from gemma2.core.interrupts import Signals

    first = Signals.install

    def install(self: Signals) -> None:
        first(self)
        Path(marker).touch()

    Signals.install = install  # type: ignore[method-assign]


def slow_end(seconds: float) -> None:
    """An interrupted command takes so long to clean up."""
    from gemma2.core.outputs import staging

    release = staging._release

    def slowly(descriptors: list[int], path: Path) -> None:
        going = lasting(seconds)
        while going():
            pause(0.01)
        release(descriptors, path)

    staging._release = slowly


def kill_at_checkpoint(step: int) -> None:
    """SIGKILL as soon as the checkpoint of a step is complete."""
    from gemma2.posttrain.training import trainer

    mark = trainer.mark_complete

    def marked(checkpoint: Path, *ranks: object) -> None:
        mark(checkpoint, *ranks)
        if int(checkpoint.name.rpartition("-")[2]) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.mark_complete = marked


def kill_at_records(count: int) -> None:
    """SIGKILL as soon as a journal has been appended to so often."""
    from gemma2.posttrain.generation.journal import Journal

    append, done = Journal.append, []

    def appended(self: Journal, records: object) -> None:
        append(self, records)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.append = appended  # type: ignore[method-assign,assignment]


def longest_file(size: int) -> None:
    """Every write beyond this size of a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def clock(ahead: float, looks: int) -> None:
    """The clock is ahead by so many seconds, and is set back by a day after so many looks at it."""
    from gemma2.core.outputs import manifest

    seconds, nanoseconds, seen = time.time, time.time_ns, []

    def error() -> float:
        seen.append(1)
        return ahead - (DAY if len(seen) > looks else 0.0)

    time.time = lambda: seconds() + error()
    time.time_ns = lambda: nanoseconds() + int(error() * 1e9)
    moved = lambda zone: datetime.now(zone) + timedelta(seconds=error())  # noqa: E731
    manifest.datetime = SimpleNamespace(now=moved)  # type: ignore[attr-defined]


class _Forked:
    """What Popen offers, as far as a fork server needs it."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def kill(self) -> None:
        """End it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds: float | None = None) -> int:
        """Wait for its end."""
        going = lasting(float("inf") if seconds is None else seconds)
        while self.poll() is None:
            if not going():
                raise subprocess.TimeoutExpired("server", seconds or 0.0)
            pause(0.002)
        assert self.returncode is not None
        return self.returncode


def forked_stages() -> None:
    """A pipeline forks the server of its stages from itself, in place of a new interpreter that imports for 7 s."""
    from gemma2.posttrain.pipelines.executors import fork_server

    def launch(module: str, function: str, modules: Sequence[str]) -> tuple[_Forked, Connection]:
        ours, theirs = multiprocessing.Pipe()
        pid = os.fork()
        if pid:
            theirs.close()
            return _Forked(pid), ours
        try:  # as a new interpreter begins: without our signals and files
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            for number in NUMBERS:
                signal.signal(number, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(theirs.fileno(), 3)
            os.closerange(4, 1024)
            fork_server.serve(3, modules)
        finally:
            os._exit(1)

    fork_server.launch = launch  # type: ignore[assignment]
