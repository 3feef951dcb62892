"""The two ends of a pipeline's stages on a Ray cluster: the process that speaks to Ray, and the task on a node.

    pipeline <-- connection --> driver process <-- stream of a task --> Ray worker <-- pipe --> process of the stage

Ray ends its driver with a C++ abort when the cluster is lost, prints to stdout, and installs handlers of signals: so
the driver is a process next to the pipeline (`drive`). A task (`run_stage`) is a generator whose items are the stage's
messages and, at last, its outcome. They belong to the driver: no other node holds anything of a stage that runs.

A worker keeps a fork server (processes.py) that has imported torch once, and forks a process for each stage. Ray keeps
idle workers, one for each CPU of a node; the memory of a stage is gone with its process.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gemma2.core.errors import OutputError
from gemma2.core.outputs.staging import locked

from .jobs import Event, Job, Outcome
from .processes import GRACE, LocalExecutor, work
from .ray_gang import RayGang

__all__ = ["drive", "run_stage"]

TICK = 0.5  # seconds between two looks at what waits
ALIVE = 5.0  # seconds between two looks at whether the node of the driver is there
FREE = 30.0  # seconds in which a lost stage lets go of its output: it ends with its worker, which looks at its node
PLACED = 3.0  # seconds in which Ray places a stage that fits
BUSY = 30.0  # seconds after which a stage that fits says that it waits
OBJECTS = 100 * 1024**2  # bytes of Ray's object store where we start it; messages of stages do not go through it
BEGUN = "begun"  # the first message of a task

_warm: LocalExecutor | None = None  # of a worker


def run_stage(job: Job, commands: Sequence[str]) -> Iterator[Event | Outcome | str]:
    """Run one job of a pipeline that consists of these commands; in a Ray worker."""
    import ray

    global _warm
    raylet = os.getppid()
    yield BEGUN
    if _warm is None:
        _warm = LocalExecutor(1, gpus=())
        _warm.prepare(commands)
    gpus = tuple(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", ())))
    done = False
    try:
        _warm.begin(job.stage, work, replace(job, gpus=gpus))
        while not done:
            events, ended = _warm.poll(0.2)
            for _, event in events:
                yield event
            if os.getppid() != raylet:
                os._exit(1)  # Ray starts the stage on another node: this one must not go on, and ends with its pipe
            for outcome in ended.values():
                done = True
                yield outcome
    finally:
        if not done:  # cancelled
            _warm.close()
            _warm = None


def _wait_for_lock(out: Path) -> None:
    """Wait until a stage whose worker or node was lost has ended, so that what it leaves behind does not change."""
    until = time.monotonic() + FREE
    while time.monotonic() < until:
        try:
            with locked(out):
                return
        except OutputError:
            time.sleep(0.1)


@dataclass
class _Placed:
    """A task that was handed to Ray, or the tasks of a stage on several nodes."""

    generator: Any
    thread: threading.Thread
    cpus: int
    gpus: int
    since: float
    begun: bool = False
    warned: bool = False
    gang: RayGang | None = None

    @property
    def nodes(self) -> int:
        """How many nodes it takes."""
        return self.gang.job.nodes if self.gang is not None else 1


def drive(descriptor: int, address: str | None, commands: Sequence[str]) -> None:
    """The main function of the driver process: requests are (job, GPUs); the end of the connection ends all stages.

    Answers: ("ready", CPUs of the largest node, GPUs of the cluster) or ("refused", why) first; then
    ("event", stage, event), ("ended", stage, outcome), ("lost", why).
    """
    control = Connection(descriptor)
    try:
        driver = Driver(control, address, commands)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        with suppress(OSError):
            control.send(("refused", " ".join(str(error).split())))
        return
    driver.run()


LOOPBACK = "127.0.0.1"  # of our own cluster: whoever reaches Ray's ports may run code


def _close_to_others() -> None:
    """Make the cluster that this process starts one of this machine and this user: loopback, and a secret token.

    Ray 2.60 replaces a loopback address of the node by one that other machines reach, and has no switch against that.
    """
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # read at its import
    services: Any = importlib.import_module("ray._private.services")
    services.resolve_ip_for_localhost = lambda host: host


class Driver:
    """Hands jobs to Ray and passes on what they say."""

    def __init__(self, control: Connection, address: str | None, commands: Sequence[str]) -> None:
        if not address:
            _close_to_others()
        import ray

        local: dict[str, Any] = {
            "_node_ip_address": LOOPBACK,
            "num_cpus": os.cpu_count(),
            "include_dashboard": False,
            "object_store_memory": OBJECTS,
        }
        given = {} if address else local
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **given)
        self.ray: Any = ray
        self.here = ray.get_runtime_context().get_node_id()  # the node that this process speaks to
        self.control = control
        self.commands = tuple(commands)
        self.placed: dict[str, _Placed] = {}
        self.lock = threading.Lock()  # of the connection
        # No max_calls: a worker stays, also one that had GPUs; they are free again when the stage's process ends.
        self.task = ray.remote(max_calls=0, max_retries=0, num_returns="streaming")(run_stage)

    def run(self) -> None:
        """Serve until the pipeline closes the connection, or the cluster is lost."""
        try:
            self._send("ready", max((cpus for cpus, _ in self._nodes()), default=1), sum(g for _, g in self._nodes()))
            while self._is_there():
                until = time.monotonic() + ALIVE
                while time.monotonic() < until:
                    if self.control.poll(TICK):
                        self._place(*self.control.recv())
                    self._say_why_stages_wait()
        except (EOFError, OSError):  # the pipeline has ended, or wants all to end
            self._stop()
        with suppress(Exception):  # of a cluster that is gone
            self.ray.shutdown()
        os._exit(0)

    def _send(self, *message: object) -> None:
        with self.lock:
            self.control.send(message)

    def _nodes(self) -> list[tuple[int, int]]:
        """(CPUs, GPUs) of every node."""
        found = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in found]

    def _is_there(self) -> bool:
        """Whether the node that this process speaks to lives. Without its head Ray ends this process after a minute."""
        if any(node["NodeID"] == self.here and not node["Alive"] for node in self.ray.nodes()):
            self._send("lost", "its node on this machine ended")
            return False
        return True

    def _place(self, job: Job, gpus: int) -> None:
        if job.nodes > 1:
            gang = RayGang(self.ray, self.task, job, gpus, self.commands)
            thread = threading.Thread(target=self._follow_gang, args=(gang,), daemon=True)
            self.placed[job.stage] = _Placed(None, thread, job.cpus, gpus, time.monotonic(), gang=gang)
            thread.start()
            return
        task = self.task.options(num_cpus=job.cpus, num_gpus=gpus, name=job.stage)
        generator = task.remote(job, self.commands)
        thread = threading.Thread(
            target=self._follow, args=(job.stage, Path(job.folder, job.out), generator), daemon=True
        )
        self.placed[job.stage] = _Placed(generator, thread, job.cpus, gpus, time.monotonic())
        thread.start()

    def _follow(self, stage: str, out: Path, generator: Any) -> None:  # noqa: ANN401
        """Pass on the messages of a stage until its end."""
        from ray.exceptions import LocalRayletDiedError, NodeDiedError, RayError, RayTaskError

        outcome: Outcome | None = None
        why = "without a word"
        try:
            for reference in generator:
                message = self.ray.get(reference)
                self.placed[stage].begun = True
                if isinstance(message, Outcome):
                    outcome = message
                elif message != BEGUN:
                    self._send("event", stage, message)
        except RayTaskError as error:  # of ours, or gemma2 is missing there
            line = (str(error).strip().splitlines() or [""])[-1]
            outcome = outcome or Outcome(1, error=f"a Ray worker cannot run it: {line}; install gemma2 on every node")
        except RayError as error:
            why = type(error).__name__
            here = isinstance(error, NodeDiedError) and self.here in str(error)
            if here or isinstance(error, LocalRayletDiedError):  # Ray lists the node as alive for 15 s more
                with suppress(OSError):
                    self._send("lost", "its node on this machine ended")
                return
        except OSError:  # the pipeline is gone
            return
        if outcome is None:
            _wait_for_lock(out)
            outcome = Outcome(-1, error=f"its worker was lost ({why})")
        with suppress(OSError):
            self._send("ended", stage, outcome)

    def _follow_gang(self, gang: RayGang) -> None:
        """Run a stage on several nodes to its end."""
        from ray.exceptions import RayError

        job = gang.job

        def begun() -> None:
            self.placed[job.stage].begun = True

        try:
            outcome = gang.run(begun, lambda event: self._send("event", job.stage, event))
        except RayError as error:  # while it was placed
            outcome = Outcome(-1, error=f"a node of it was lost ({type(error).__name__})")
        if outcome is None:
            return
        if outcome.code < 0:
            _wait_for_lock(Path(job.folder, job.out))
        with suppress(OSError):
            self._send("ended", job.stage, outcome)

    def _say_why_stages_wait(self) -> None:
        for stage, one in self.placed.items():
            waited = time.monotonic() - one.since
            if one.begun or one.warned or waited < PLACED:
                continue
            nodes = self._nodes()
            asked = f"{one.cpus} CPUs" + (f" and {one.gpus} GPUs" if one.gpus else "")
            if sum(cpus >= one.cpus and gpus >= one.gpus for cpus, gpus in nodes) < one.nodes:
                have = ", ".join(f"{cpus} and {gpus}" for cpus, gpus in nodes) or "no node"
                few = "no node of the Ray cluster has" if one.nodes == 1 else f"fewer than {one.nodes} nodes have"
                what = f"waits for {asked}, which {few} (CPUs and GPUs of its nodes: {have})"
                text = f"stage {stage} {what}; add a node, or lower the stage's resources"
            elif waited >= BUSY:
                where = "a node" if one.nodes == 1 else f"{one.nodes} nodes"
                text = f"stage {stage} waits until {asked} of {where} are free"
            else:
                continue
            one.warned = True
            self._send("event", stage, ("warn", text))

    def _stop(self) -> None:
        """End every stage as Ctrl-C does on one machine; what does not end is killed with its worker."""
        left = [one for one in self.placed.values() if one.thread.is_alive()]
        until = time.monotonic() + GRACE
        for force in (False, True):
            for one in left:
                with suppress(Exception):  # of a cluster that is gone
                    if one.gang is not None:
                        one.gang.stop(force)
                    else:
                        self.ray.cancel(one.generator, force=force)
            for one in left:
                one.thread.join(max(0.0, until - time.monotonic()))
            left = [one for one in left if one.thread.is_alive()]
            until += 5.0
