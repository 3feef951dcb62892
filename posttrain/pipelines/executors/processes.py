"""Stages as processes of this machine, forked from a server that has imported the libraries once (fork_server.py).

Each stage is a separate process: its memory is gone with it, and a crash is the stage's alone. The server may be
killed at any moment. Stages that run go on and are watched without it; one that was about to start is asked of a new
server, at most RESTARTS times in a row. A stage never runs twice at once: it counts as running until its process is
gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from gemma2.core.errors import UsageError
from gemma2.core.interrupts import POKE, allow
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import Resources

from .fork_server import ForkServer
from .jobs import Event, Job, Outcome, execute

__all__ = ["GRACE", "LocalExecutor", "visible_gpus"]

GRACE = 60.0  # seconds that a stage gets to clean up before it is killed
POKES = 0.5  # seconds between two reminders of a stage that is being ended
RESTARTS = 3  # servers in a row that are started for a stage and end before it has begun


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; without torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(name.strip() for name in given.split(",") if name.strip() not in ("", "-1"))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False)
    count = len([line for line in listed.stdout.splitlines() if line.startswith("GPU ")])
    return tuple(map(str, range(count)))


@dataclass
class _Running:
    """A stage at work.

    number    of the request to the server
    pipe      between us and the stage; its other end closes when the process, and every helper, is gone
    work      (function, arguments)
    pid       None until the server has forked it
    watch     descriptor that becomes readable when the process ends (Linux); read when the server ended before it
    orphan    its server is gone, so that nobody reports its exit code
    reported  when its outcome came
    """

    number: int
    pipe: Connection
    gpus: tuple[str, ...]
    work: tuple[Any, tuple[Any, ...]]
    pid: int | None = None
    watch: int | None = None
    orphan: bool = False
    closed: bool = False
    outcome: Outcome | None = None
    reported: float = 0.0

    def send(self, number: int) -> None:
        """Send a signal."""
        with suppress(ProcessLookupError):
            if self.watch is not None:
                signal.pidfd_send_signal(self.watch, number)
            elif self.pid is not None:
                os.kill(self.pid, number)

    def is_alive(self) -> bool:
        """Whether its process is there."""
        if self.watch is not None:
            return not wait([self.watch], 0)
        if self.pid is None:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def discard(self) -> None:
        """Throw away what has arrived, be it half a message: an interrupt may have come while one was read."""
        with suppress(OSError):
            while not self.closed and self.pipe.poll():
                self.closed = not os.read(self.pipe.fileno(), 1 << 16)

    def release(self) -> None:
        """Close what belongs to it here."""
        self.pipe.close()
        if self.watch is not None:
            os.close(self.watch)


class LocalExecutor:
    """At most `jobs` stages at once, each with exclusive use of the GPUs that it asked for."""

    def __init__(self, jobs: int = 1, gpus: tuple[str, ...] | None = None) -> None:
        self.jobs = jobs
        self.gpus = list(visible_gpus() if gpus is None else gpus)
        self.total = len(self.gpus)
        self.running: dict[str, _Running] = {}
        self.server: ForkServer | None = None
        self.modules: list[str] = []
        self.asked = 0  # requests to servers so far
        self.lost = 0  # servers in a row that have ended before they forked anything

    def prepare(self, commands: Iterable[str]) -> None:
        """Start the server, which imports what these commands need, while the caller goes on."""
        modules = {f"gemma2.posttrain.{COMMANDS[name].module}" for name in commands}
        heavy = any(COMMANDS[name].accelerated for name in commands)
        self.close()  # an earlier one may have imported less
        self.modules = [*(["torch"] if heavy else []), *sorted(modules)]
        self.server = ForkServer(self.modules)

    def cpus(self, wanted: int | None) -> int:
        """Threads of a stage."""
        return wanted or max(1, (os.cpu_count() or 1) // self.jobs)

    def check(self, stage: str, wanted: Resources) -> None:
        """Refuse a stage that asks for more GPUs than there are, or for several machines."""
        if (wanted.nodes or 1) > 1:
            raise UsageError(
                f"stages.{stage}.resources.nodes = {wanted.nodes}: --executor local has this machine alone",
                "give --executor slurm or ray, or ask for 1",
            )
        if (wanted.gpus or 0) > self.total:
            raise UsageError(
                f"stages.{stage}.resources.gpus = {wanted.gpus}: this machine has {self.total}", "ask for fewer"
            )

    def wanted_gpus(self, command: str, wanted: Resources) -> int:
        """GPUs of a stage: what it asks for, else one where it runs a network and there is one."""
        return wanted.gpus if wanted.gpus is not None else int(COMMANDS[command].accelerated and self.total > 0)

    def has_room(self, command: str, wanted: Resources) -> bool:
        """Whether one more stage can start."""
        return len(self.running) < self.jobs and self.wanted_gpus(command, wanted) <= len(self.gpus)

    def start(self, job: Job, wanted: Resources) -> None:
        """Start a job. There must be room."""
        count = self.wanted_gpus(job.command, wanted)
        own, self.gpus = tuple(self.gpus[:count]), self.gpus[count:]
        self.begin(job.stage, work, replace(job, gpus=own if self.total else None), gpus=own)

    def begin(self, stage: str, function: Any, *arguments: Any, gpus: tuple[str, ...] = ()) -> None:  # noqa: ANN401
        """Call `function(*arguments, pipe)` in a process of the stage."""
        if self.server is None:
            self.server = ForkServer(self.modules)
        self.asked += 1
        pipe = self.server.fork(self.asked)
        self.running[stage] = _Running(self.asked, pipe, gpus, (function, arguments))

    def poll(self, seconds: float) -> tuple[list[tuple[str, Event]], dict[str, Outcome]]:
        """(messages of running stages, outcomes of those that ended), after at most `seconds`."""
        ready = self._wait(seconds)
        events: list[tuple[str, Event]] = []
        ended: dict[str, Outcome] = {}
        for stage, one in self.running.items():
            self._drain(stage, one, events)
        if self.server is not None and self.server.control in ready:
            self._hear(events, ended)
        for stage, one in self.running.items():
            if one.orphan and (one.watch in ready or (one.watch is None and (one.closed or one.outcome))):
                ended.setdefault(stage, _lost(None))
            elif one.outcome and time.monotonic() > one.reported + GRACE:  # it hangs while it ends
                _kill_group(one.pid)
                ended.setdefault(stage, one.outcome)
        for stage in ended:
            one = self.running[stage]
            self._drain(stage, one, events)
            if one.outcome is None:
                _kill_group(one.pid)  # its helpers, which would go on writing
            ended[stage] = one.outcome or ended[stage]
            self._forget(stage)
        return events, ended

    def _wait(self, seconds: float) -> set[Any]:
        """What has something to say, after at most `seconds`."""
        ends: list[Connection | int] = [one.pipe for one in self.running.values() if not one.closed]
        ends += [one.watch for one in self.running.values() if one.orphan and one.watch is not None]
        if self.server is not None:
            ends.append(self.server.control)
        if not ends:
            time.sleep(seconds)
        return set(wait(ends, seconds)) if ends else set()

    def _hear(self, events: list[tuple[str, Event]], ended: dict[str, Outcome]) -> None:
        """Read the messages of the server."""
        server = self.server
        try:
            while server is not None and server.control.poll():
                kind, number, value = server.control.recv()
                found = [stage for stage, one in self.running.items() if one.number == number]
                for stage in found:  # none: it was given up before
                    if kind == "forked":
                        self._forked(self.running[stage], value)
                    elif kind == "ended":
                        ended[stage] = _lost(value)
                    else:
                        ended[stage] = Outcome(1, error=f"its process cannot be started: {value}; lower --jobs")
        except (EOFError, OSError):
            self._lost_server(events, ended)

    def _forked(self, one: _Running, pid: int) -> None:
        """Give a process its work."""
        self.lost = 0
        one.pid = pid
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):  # it has ended
                one.watch = os.pidfd_open(pid)
        with suppress(OSError):  # it has ended
            one.pipe.send(sys.path)
            one.pipe.send(one.work)

    def _lost_server(self, events: list[tuple[str, Event]], ended: dict[str, Outcome]) -> None:
        """Go on after the server's end: its children are watched, what had not begun is asked of another one."""
        code = None
        if self.server is not None:
            code = self.server.code()
            self.server.close()
            self.server = None
        self.lost += 1
        how = _lost(code).error.removeprefix("its process ")
        for stage, one in list(self.running.items()):
            if one.pid is not None or stage in ended:
                one.orphan = True
            elif self.lost > RESTARTS:
                what = f"the process that starts stages {how}, {self.lost} times in a row"
                ended[stage] = Outcome(1, error=f"{what}; free memory, lower --jobs, or run the stage by hand")
            else:
                events.append((stage, ("warn", f"the process that starts stages {how}; it is started again")))
                one.release()
                function, arguments = one.work
                self.begin(stage, function, *arguments, gpus=one.gpus)

    def _drain(self, stage: str, one: _Running, events: list[tuple[str, Event]]) -> None:
        """Read every message that has arrived."""
        try:
            while not one.closed and one.pipe.poll():
                message = one.pipe.recv()
                if isinstance(message, Outcome):
                    one.outcome, one.reported = message, time.monotonic()
                else:
                    events.append((stage, message))
        except (EOFError, OSError):
            one.closed = True

    def _forget(self, stage: str) -> None:
        one = self.running.pop(stage)
        one.release()
        self.gpus += one.gpus

    def stop(self) -> None:
        """End every running stage: it keeps its last checkpoint, and cleans up."""
        allow(GRACE + 5)
        for stage, one in list(self.running.items()):
            if one.pid is None:  # it has not begun, and ends when its pipe does
                self._forget(stage)
            one.send(signal.SIGTERM)
        begin = poked = time.monotonic()
        while (left := [one for one in self.running.values() if one.is_alive()]) and time.monotonic() < begin + GRACE:
            for one in left:
                one.discard()  # a stage that writes into a full pipe would wait
            time.sleep(0.02)
            if time.monotonic() - poked >= POKES:  # a stage may have begun to wait just before SIGTERM
                poked = time.monotonic()
                for one in left:
                    one.send(POKE)
        for one in left:
            _kill_group(one.pid)
        for stage in list(self.running):
            self._forget(stage)

    def close(self) -> None:
        """End what runs, and the server, also while it imports."""
        self.stop()
        if self.server is not None:
            self.server.close()
            self.server = None


def _lost(code: int | None) -> Outcome:
    """The outcome of a process that ended without a message."""
    if code is None:
        return Outcome(-1, error="its process was lost, as was the one that had started it: out of memory?")
    if code < 0:
        name = signal.Signals(-code).name
        likely = ": out of memory?" if name == "SIGKILL" else ""
        return Outcome(code, error=f"its process was ended by {name}{likely}")
    return Outcome(-1, error=f"its process ended with exit code {code} and without a word")


def _kill_group(pid: int | None) -> None:
    """End a stage and the processes that it has started."""
    if pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def work(job: Job, pipe: Connection) -> None:
    """The main function of a stage's process."""
    follow(pipe)

    def send(message: Event | Outcome) -> None:
        try:
            pipe.send(message)
        except OSError:  # the pipeline is gone: end as `follow` does, and leave what is on disk as it is
            _kill_group(os.getpid())

    send(execute(job, send))


def follow(pipe: Connection) -> None:
    """End at once, with all helpers, when the pipeline's process is gone: orphans would hold the locks of outputs.

    The process becomes the leader of a new process group, which its helpers join. The pipeline says nothing after the
    work, so a pipe that becomes readable has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the pipeline, which stops its stages
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.setpgid(0, 0)
    end = os.dup(pipe.fileno())

    def watch() -> None:
        wait([end])
        _kill_group(os.getpid())

    threading.Thread(target=watch, daemon=True).start()
