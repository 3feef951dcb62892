"""Stages as tasks of a Ray cluster: an existing one (`--ray-address`), or one that is started on this machine.

Ray places each stage where its CPUs and GPUs are free, and runs it in a separate worker process. The folder of the
pipeline and its inputs must be on a disk that every node has: outputs and logs are written there, as by the local
executor. A stage sends its progress through a small actor. A stage whose worker or node is lost ends like
one whose process was killed: it is tried again as often as its `retries` say, from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from gemma2.core.errors import InputError, UsageError
from gemma2.core.interrupts import allow
from gemma2.core.json_files import JsonObject
from gemma2.posttrain.runs.commands import COMMANDS

from .jobs import Event, Job, Outcome, execute

__all__ = ["RayExecutor"]

TELL = 0.5  # seconds between two polls of the messages of stages
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 60.0  # seconds that stages get to clean up before their workers are ended


class Mailbox:
    """The actor that carries the messages of stages to the pipeline."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Event]] = []

    def put(self, stage: str, event: Event) -> None:
        self.events.append((stage, event))

    def take(self) -> list[tuple[str, Event]]:
        taken, self.events = self.events, []
        return taken


def run_job(job: Job, mailbox: Any) -> Outcome:  # noqa: ANN401
    """Run one job in a worker."""
    return execute(job, lambda event: mailbox.put.remote(job.stage, event))


class RayExecutor:
    """At most `jobs` stages at once, placed by their CPUs and GPUs."""

    def __init__(self, jobs: int = 1, address: str | None = None) -> None:
        self.jobs = jobs
        self.address = address
        self.running: JsonObject = {}  # stage -> Ray's reference to its task
        self.ray: Any = None
        self.mailbox: Any = None
        self.looked = 0.0

    def _start(self) -> None:
        """Join the cluster, or start one here."""
        if self.ray is not None:
            return
        try:
            import ray
        except ImportError as error:
            raise UsageError("--executor ray needs Ray", "install gemma2[ray]") from error
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a stage without GPUs sees none of them
        local: JsonObject = {} if self.address else {"num_cpus": os.cpu_count(), "include_dashboard": False}
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"no Ray cluster at {self.address}: {error}", "start one with `ray start --head`"
            ) from error
        for number, handler in handlers.items():  # Ray installs handlers of signals; ours stay in place
            signal.signal(number, handler)
        self.ray = ray
        self.mailbox = ray.remote(num_cpus=0)(Mailbox).remote()

    def prepare(self, commands: Sequence[str]) -> None:
        """Join the cluster; workers import what they need."""
        self._start()

    def cpus(self, wanted: int | None) -> int:
        """Threads of a stage: what it asks for, else its share of this machine's cores."""
        return wanted or max(1, (os.cpu_count() or 1) // self.jobs)

    def check(self, stage: str, wanted: int | None) -> None:
        """Nothing is refused here: clusters grow, so only Ray knows whether it can place a stage."""
        return None

    def has_room(self, command: str, wanted: int | None) -> bool:
        """Whether one more stage may be handed to Ray."""
        return len(self.running) < self.jobs

    def start(self, job: Job, wanted: int | None) -> None:
        """Hand a job to Ray."""
        self._start()
        there = float(self.ray.cluster_resources().get("GPU", 0.0))
        gpus = wanted if wanted is not None else int(COMMANDS[job.command].accelerated and there > 0)
        fresh = self.ray.remote(max_calls=1)(run_job)  # a process for each stage, whose memory is gone with it
        task = fresh.options(num_cpus=job.cpus, num_gpus=gpus, max_retries=0, name=job.stage)
        self.running[job.stage] = task.remote(job, self.mailbox)

    def poll(self, seconds: float) -> tuple[list[tuple[str, Event]], dict[str, Outcome]]:
        """(messages of running stages, outcomes of those that ended), after at most `seconds`."""
        references = {reference: stage for stage, reference in self.running.items()}
        done = self.ray.wait([*references], num_returns=1, timeout=seconds)[0] if references else []
        events: list[tuple[str, Event]] = []
        if done or time.monotonic() - self.looked >= TELL:
            self.looked = time.monotonic()
            events = self.ray.get(self.mailbox.take.remote())
        ended = {references[reference]: self._outcome(reference) for reference in done}
        for stage in ended:
            del self.running[stage]
        return events, ended

    def _outcome(self, reference: object) -> Outcome:
        from ray.exceptions import RayError

        try:
            found: Outcome = self.ray.get(reference)
        except RayError as error:
            return Outcome(-1, error=f"its worker was lost ({type(error).__name__})")
        return found

    def stop(self) -> None:
        """End every running stage. Ray ends a worker without a word, as kill -9 does: the checkpoints stay."""
        allow(GRACE + 5)
        references = list(self.running.values())
        for reference in references:
            self.ray.cancel(reference, force=True)
        if references:
            self.ray.wait(references, num_returns=len(references), timeout=GRACE)
        self.running.clear()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.ray is not None:
            self.stop()
            self.ray.shutdown()
            self.ray = None
