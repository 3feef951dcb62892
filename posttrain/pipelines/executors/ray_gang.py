"""A stage on several nodes of a Ray cluster: a placement group with a bundle on each node, and a task in each bundle.

    STRICT_SPREAD    every bundle on another node; on one node Ray's own placement of a task keeps its GPUs together
    head             address of bundle 0's node, and a port that is free there
    task i           runs the stage's command with `--nodes`, as number i; posttrain/launch joins them at the head

A task that fails and says why ends the others, and its outcome is that of the stage. One that only says that another is
gone, or that rank 0 has ended the job elsewhere, may come first: the others then get CAUSE seconds to say why, and what
says most counts (job_values.chosen). When all succeed, the outcome is that of number 0, which writes the output.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

from .job_values import CAUSE, Event, Job, Outcome, chosen, of_node, on_node

__all__ = ["RayGang", "meeting_place"]

TICK = 1.0  # seconds between two looks at whether the nodes are free, or whether to stop


def meeting_place() -> str:
    """HOST:PORT of this node, free at this moment; in a Ray worker."""
    import ray

    host = str(ray.util.get_node_ip_address())
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.bind((host, 0))
        return f"{host}:{found.getsockname()[1]}"


class RemoteTask(Protocol):
    """A remote function of Ray whose result is a stream."""

    def options(self, **words: object) -> RemoteTask: ...
    def remote(self, job: Job, commands: Sequence[str]) -> Iterable[object]: ...


@dataclass
class RayGang:
    """A stage of several nodes that was handed to Ray.

    ray, task  the library, and the remote function that runs a job on a node
    """

    ray: ModuleType
    task: RemoteTask
    job: Job
    gpus: int
    commands: Sequence[str]
    generators: list[Iterable[object]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    failed: dict[int, Outcome] = field(default_factory=dict)  # how nodes have failed, in the order of their ends
    ended: set[int] = field(default_factory=set)  # nodes
    ending: threading.Event = field(default_factory=threading.Event)  # the tasks were cancelled
    timer: threading.Timer | None = None  # since the first failure, if that was no cause
    outcome: Outcome | None = None  # of number 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, begun: Callable[[], None], send: Callable[[Event], None]) -> Outcome | None:
        """Place the tasks and follow them to their end; None where `stop` came first.

        begun  is called when the nodes are found
        send   gets the messages of number 0
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        bundle: dict[str, float] = {"CPU": self.job.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        group = placement_group([bundle] * self.job.nodes, strategy="STRICT_SPREAD")
        try:
            ready = group.ready()
            while not self.ray.wait([ready], timeout=TICK)[0]:
                if self.stopped.is_set():
                    return None
            begun()
            self._start(group)
            threads = [
                threading.Thread(target=self._follow, args=(node, generator, send), daemon=True)
                for node, generator in enumerate(self.generators)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            if self.timer is not None:
                self.timer.cancel()
            with suppress(Exception):  # of a cluster that is gone
                remove_placement_group(group)
        return None if self.stopped.is_set() else self._result()

    def _start(self, group: object) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        def placed(node: int) -> PlacementGroupSchedulingStrategy:
            return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=node)

        there = self.ray.remote(num_cpus=self.job.cpus, max_retries=0)(meeting_place)
        head = self.ray.get(there.options(scheduling_strategy=placed(0)).remote())
        for node in range(self.job.nodes):
            task = self.task.options(
                num_cpus=self.job.cpus,
                num_gpus=self.gpus,
                scheduling_strategy=placed(node),
                name=f"{self.job.stage} on node {node}",
            )
            self.generators.append(task.remote(on_node(self.job, node, head), self.commands))

    def _follow(self, node: int, generator: Iterable[object], send: Callable[[Event], None]) -> None:
        """Read the messages of one node to their end."""
        from ray.exceptions import RayError, RayTaskError

        found: Outcome | str = "without a word"
        try:
            for reference in generator:
                message = self.ray.get(reference)
                if isinstance(message, Outcome):
                    found = message
                elif isinstance(message, tuple) and node == 0:
                    with suppress(OSError):  # the pipeline is gone
                        send(message)
        except RayTaskError as error:  # of ours, or gemma2 is missing there
            if not isinstance(found, Outcome):
                line = (str(error).strip().splitlines() or [""])[-1]
                text = f"a Ray worker cannot run it: {line}; install gemma2 on every node"
                found = Outcome(1, error=text)
        except RayError as error:
            if not isinstance(found, Outcome):
                found = type(error).__name__
        with self.lock:
            self._end(node, found)

    def _end(self, node: int, found: Outcome | str) -> None:
        """Note how the task of a node has ended: its outcome, or how Ray has lost it."""
        self.ended.add(node)
        if isinstance(found, str):
            if self.ending.is_set():  # we cancelled it
                return
            self.failed[node] = Outcome(-1, error=f"the worker on node {node} was lost ({found})")
        elif found.code:
            self.failed[node] = of_node(node, found)
        elif node == 0:
            self.outcome = found
        if self.ending.is_set() or not self.failed:
            return
        if any(one.is_cause for one in self.failed.values()):
            self._cancel()
        elif self.timer is None:
            self.timer = threading.Timer(CAUSE, self._cancel)
            self.timer.daemon = True
            self.timer.start()

    def _cancel(self, force: bool = False) -> None:
        """End the tasks that have not ended."""
        self.ending.set()
        for node, generator in enumerate(self.generators):
            if node not in self.ended:
                with suppress(Exception):  # of a cluster that is gone
                    self.ray.cancel(generator, force=force)

    def stop(self, force: bool = False) -> None:
        """End the tasks: as Ctrl-C does, or with their workers. `run` returns when they have ended."""
        self.stopped.set()
        self._cancel(force)

    def _result(self) -> Outcome:
        if self.failed:
            return chosen(self.failed.values())
        return self.outcome or Outcome(-1, error="its worker was lost")
