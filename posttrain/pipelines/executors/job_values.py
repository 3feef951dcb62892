"""A stage as it is passed to another process, what that process says, and how it ended: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma2.core.json_files import JsonMapping

__all__ = ["STOPPED", "Event", "Job", "Outcome", "on_node"]

Event = tuple[
    Any, ...
]  # ("task", id, label, total, unit) | ("advance", id, amount, fields) | ("end", id) | (kind, text)


@dataclass(frozen=True)
class Job:
    """A stage as it is passed to another process: plain values only. Paths are relative to `folder`."""

    stage: str
    command: str
    options: JsonMapping
    out: str
    log: str
    resume: bool
    force: bool
    folder: str
    modules: tuple[str, ...]  # sys.path of the caller: where reward functions are found
    cpus: int
    permissions: Mapping[str, str] = field(default_factory=dict)  # hosts and keys that the caller allowed
    gpus: tuple[str, ...] | None = None  # of CUDA_VISIBLE_DEVICES; None leaves it as it is
    processes: int = 1  # on each machine
    nodes: int = 1  # machines
    node: int = 0  # the number of this machine
    head: str = ""  # HOST:PORT of machine 0, where the executor knows it; else the job's environment says it

    @property
    def is_gang(self) -> bool:
        """Whether several processes run it together."""
        return self.processes > 1 or self.nodes > 1


@dataclass(frozen=True)
class Outcome:
    """The end of a job.

    code       0 done, 1 - 3 as for every command, 143 stopped, -N ended by signal N or lost
    error      the one line of an expected failure
    traceback  of a bug
    """

    code: int
    summary: JsonMapping | None = None
    error: str = ""
    traceback: str = ""


STOPPED = Outcome(143, error="stopped")


def on_node(job: Job, node: int, head: str = "") -> Job:
    """The part of a job that machine number `node` does; it has a separate log."""
    log = str(Path(job.log).with_suffix(f".node-{node}.log")) if node else job.log
    return replace(job, node=node, head=head, log=log)
