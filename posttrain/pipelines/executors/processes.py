"""Stages as processes of this machine, forked from a server that has imported the libraries once.

A new interpreter takes 6 to 8 s to import torch, transformers and trl; a fork of a process that has them takes 0.2 s.
The server (multiprocessing's forkserver) imports and does nothing else, so there are no threads and no CUDA in it when
it forks. Each stage is a separate process: its memory is gone with it, and a crash is the stage's alone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from gemma2.core.errors import UsageError
from gemma2.core.interrupts import POKE, allow
from gemma2.posttrain.runs.commands import COMMANDS

from .jobs import Event, Job, Outcome, execute

__all__ = ["LocalExecutor", "visible_gpus"]

GRACE = 60.0  # seconds that a stage gets to clean up before it is killed
POKES = 0.5  # seconds between two reminders of a stage that is being ended


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
    """A stage at work: its process, and the pipe that it speaks through."""

    process: ForkServerProcess
    pipe: Connection
    gpus: tuple[str, ...]
    outcome: Outcome | None = None


class LocalExecutor:
    """At most `jobs` stages at once, each with exclusive use of the GPUs that it asked for."""

    def __init__(self, jobs: int = 1, gpus: tuple[str, ...] | None = None) -> None:
        self.jobs = jobs
        self.gpus = list(visible_gpus() if gpus is None else gpus)
        self.total = len(self.gpus)
        self.running: dict[str, _Running] = {}
        self.context: Any = None

    def prepare(self, commands: Iterable[str]) -> None:
        """Start the server, which imports what these commands need, while the caller goes on."""
        modules = {f"gemma2.posttrain.{COMMANDS[name].module}" for name in commands}
        heavy = any(COMMANDS[name].accelerated for name in commands)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*(["torch"] if heavy else []), *sorted(modules)])
        from multiprocessing import forkserver

        forkserver.ensure_running()

    def cpus(self, wanted: int | None) -> int:
        """Threads of a stage."""
        return wanted or max(1, (os.cpu_count() or 1) // self.jobs)

    def check(self, stage: str, wanted: int | None) -> None:
        """Refuse a stage that asks for more GPUs than there are."""
        if (wanted or 0) > self.total:
            raise UsageError(
                f"stages.{stage}.resources.gpus = {wanted}: this machine has {self.total}", "ask for fewer"
            )

    def wanted_gpus(self, command: str, wanted: int | None) -> int:
        """GPUs of a stage: what it asks for, else one where it runs a network and there is one."""
        return wanted if wanted is not None else int(COMMANDS[command].accelerated and self.total > 0)

    def has_room(self, command: str, wanted: int | None) -> bool:
        """Whether one more stage can start."""
        return len(self.running) < self.jobs and self.wanted_gpus(command, wanted) <= len(self.gpus)

    def start(self, job: Job, wanted: int | None) -> None:
        """Start a job. There must be room."""
        count = self.wanted_gpus(job.command, wanted)
        own, self.gpus = tuple(self.gpus[:count]), self.gpus[count:]
        job = Job(**{**vars(job), "gpus": own if self.total else None})
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_work, args=(job, sender), name=job.stage)
        process.start()
        sender.close()
        self.running[job.stage] = _Running(process, receiver, own)

    def poll(self, seconds: float) -> tuple[list[tuple[str, Event]], dict[str, Outcome]]:
        """(messages of running stages, outcomes of those that ended), after at most `seconds`."""
        # A pipe may be held open by helpers that a killed stage leaves behind, so its end is watched too.
        waiting: list[Connection | int] = [
            end for one in self.running.values() for end in (one.pipe, one.process.sentinel)
        ]
        ready = set(wait(waiting, seconds)) if waiting else set()
        events: list[tuple[str, Event]] = []
        ended: dict[str, Outcome] = {}
        for stage, one in list(self.running.items()):
            closed = one.pipe in ready and self._drain(stage, one, events)
            if closed or one.process.sentinel in ready:
                one.process.join(GRACE)
                self._drain(stage, one, events)
                ended[stage] = one.outcome or _lost(one.process.exitcode)
                if one.outcome is None:
                    _kill_group(one.process.pid)  # its helpers, which would go on writing
                self._forget(stage)
        return events, ended

    def _drain(self, stage: str, one: _Running, events: list[tuple[str, Event]]) -> bool:
        """Read every message that has arrived. True when the process has closed its end."""
        try:
            while one.pipe.poll():
                message = one.pipe.recv()
                if isinstance(message, Outcome):
                    one.outcome = message
                else:
                    events.append((stage, message))
        except (EOFError, OSError):
            return True
        return False

    def _forget(self, stage: str) -> None:
        one = self.running.pop(stage)
        one.pipe.close()
        self.gpus += one.gpus

    def stop(self) -> None:
        """End every running stage: it keeps its last checkpoint, and cleans up."""
        allow(GRACE + 5)
        for one in self.running.values():
            one.process.terminate()
        begin = poked = time.monotonic()
        for stage, one in list(self.running.items()):
            while one.process.is_alive() and time.monotonic() < begin + GRACE:
                self._drain(stage, one, [])  # a stage that writes into a full pipe would wait
                one.process.join(0.05)
                if time.monotonic() - poked >= POKES:  # a stage may have begun to wait just before SIGTERM
                    poked = time.monotonic()
                    for other in self.running.values():
                        _poke(other.process)
            if one.process.is_alive():
                _kill_group(one.process.pid)
                one.process.join()
            self._forget(stage)

    def close(self) -> None:
        """Nothing is left to close: the server ends with this process."""
        self.stop()


def _lost(code: int | None) -> Outcome:
    """The outcome of a process that ended without a message."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        likely = ": out of memory?" if name == "SIGKILL" else ""
        return Outcome(code, error=f"its process was ended by {name}{likely}")
    return Outcome(-1, error=f"its process ended with exit code {code} and without a word")


def _poke(process: ForkServerProcess) -> None:
    """Wake the main thread of a stage, so that it hears of a signal that came before."""
    if process.is_alive() and process.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, POKE)


def _kill_group(pid: int | None) -> None:
    """End a stage and the processes that it has started."""
    if pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _work(job: Job, pipe: Connection) -> None:
    """The main function of a stage's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the pipeline, which stops its stages
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    follow_parent()
    pipe.send(execute(job, pipe.send))
    pipe.close()


def follow_parent() -> None:
    """End at once, with all helpers, when the pipeline's process is gone: orphans would hold the locks of outputs.

    The process becomes the leader of a new process group, which its helpers join.
    """
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        wait([sentinel])
        _kill_group(os.getpid())

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
