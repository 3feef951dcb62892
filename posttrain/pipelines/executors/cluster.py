"""Stages as tasks of a Ray cluster: an existing one (`--ray-address`), or one that is started on this machine.

Ray places each stage where its CPUs and GPUs are free, and runs it in a separate process. The folder of the pipeline
and its inputs must be on a disk that every node has: outputs and logs are written there, as by the local executor. A
stage whose worker or node is lost ends like one whose process was killed: it is tried again as often as its `retries`
say, from its last checkpoint. Ray itself is spoken to by a process next to this one (ray_driver.py); if that ends, the
cluster is lost, and so is this run: the same command goes on.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from gemma2.core.errors import InputError, UsageError
from gemma2.core.interrupts import allow
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import Resources

from .fork_server import launch
from .jobs import Event, Job, Outcome
from .processes import GRACE

__all__ = ["RayExecutor"]


class RayExecutor:
    """At most `jobs` stages at once, placed by their CPUs and GPUs."""

    def __init__(self, jobs: int = 1, address: str | None = None) -> None:
        self.jobs = jobs
        self.address = address
        self.running: set[str] = set()
        self.driver: tuple[subprocess.Popen[bytes], Connection] | None = None
        self.largest = os.cpu_count() or 1  # CPUs of a node
        self.gpus = 0  # of the cluster

    def prepare(self, commands: Sequence[str]) -> None:
        """Join the cluster, or start one here; workers import what these commands need."""
        if importlib.util.find_spec("ray") is None:
            raise UsageError("--executor ray needs Ray", "install gemma2[ray]")
        if self.address and self.address.startswith("ray://"):
            raise UsageError(
                f"--ray-address {self.address} is Ray's client, which knows no streams",
                "start gemma2 on a node of the cluster with --ray-address auto",
            )
        self.close()
        module = f"{__package__}.ray_driver"
        self.driver = launch(module, "drive", self.address, list(commands), errors=subprocess.DEVNULL)
        try:
            kind, *rest = self.driver[1].recv()
        except (EOFError, OSError) as error:
            raise self._lost("it ended while it was joined") from error
        if kind == "refused":
            where = f"at {self.address}" if self.address else "can be started here"
            raise InputError(f"no Ray cluster {where}: {rest[0]}", "start one with `ray start --head`")
        self.largest, self.gpus = rest

    def cpus(self, wanted: int | None) -> int:
        """Threads of a stage: what it asks for, else its share of this machine's cores that the largest node has."""
        return wanted or max(1, min((os.cpu_count() or 1) // self.jobs, self.largest))

    def check(self, stage: str, wanted: Resources) -> None:
        """Nothing is refused here: clusters grow. A stage that waits for what no node has says so."""
        return None

    def has_room(self, command: str, wanted: Resources) -> bool:
        """Whether one more stage may be handed to Ray."""
        return len(self.running) < self.jobs

    def start(self, job: Job, wanted: Resources) -> None:
        """Hand a job to Ray."""
        if self.driver is None:
            self.prepare([job.command])
        gpus = wanted.gpus if wanted.gpus is not None else int(COMMANDS[job.command].accelerated and self.gpus > 0)
        self.running.add(job.stage)
        if self.driver is not None:
            with suppress(OSError):  # it is gone: poll says so
                self.driver[1].send((job, gpus))

    def poll(self, seconds: float) -> tuple[list[tuple[str, Event]], dict[str, Outcome]]:
        """(messages of running stages, outcomes of those that ended), after at most `seconds`.

        Raises InputError when the cluster is lost.
        """
        events: list[tuple[str, Event]] = []
        ended: dict[str, Outcome] = {}
        if self.driver is None:
            return events, ended
        control = self.driver[1]
        try:
            while control.poll(0 if events or ended else seconds):
                kind, *rest = control.recv()
                if kind == "event":
                    events.append((rest[0], rest[1]))
                elif kind == "ended":
                    ended[rest[0]] = rest[1]
                    self.running.discard(rest[0])
                else:
                    raise self._lost(rest[0])
        except (EOFError, OSError) as error:
            raise self._lost("its head ended, or cannot be reached") from error
        return events, ended

    def _lost(self, why: str) -> InputError:
        where = self.address or "on this machine"
        return InputError(
            f"the Ray cluster {where} was lost: {why}",
            "look at `ray status`, start the cluster again, and give the same command: it goes on",
        )

    def stop(self) -> None:
        """End every running stage: it keeps its last checkpoint, and cleans up. Leave the cluster."""
        if self.driver is None:
            return
        process, control = self.driver
        allow(GRACE + 15)
        control.close()
        try:
            process.wait(GRACE + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.driver = None
        self.running.clear()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self.stop()
