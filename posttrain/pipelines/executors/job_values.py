"""A stage as it is passed to another process, what that process says, and how it ended: plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gemma2.core.json_files import JsonMapping

__all__ = ["CAUSE", "STOPPED", "Event", "Job", "Outcome", "chosen", "of_node", "on_node"]

# Seconds for the other machines of a stage to say why it failed, after one has said only that another is gone. The
# launcher of a machine needs a second or two where its processes end at SIGTERM, and half a minute where they hang.
CAUSE = 15.0
# Of outcomes that are kept, which says most about a failure; see Outcome.
KINDS = ("", "followed", "lost", "stopped")

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
    kind       of a failure whose cause is elsewhere. followed: rank 0, on another machine, has ended the job with this
               code; lost: a process on another machine was gone; stopped: by a signal. "" for every other end
    """

    code: int
    summary: JsonMapping | None = None
    error: str = ""
    traceback: str = ""
    kind: Literal["", "followed", "lost", "stopped"] = ""

    @property
    def is_cause(self) -> bool:
        """Whether it says why a stage failed, and not only that it did."""
        return self.code != 0 and not self.kind


STOPPED = Outcome(143, error="stopped", kind="stopped")


def on_node(job: Job, node: int, head: str = "") -> Job:
    """The part of a job that machine number `node` does; it has a separate log."""
    log = str(Path(job.log).with_suffix(f".node-{node}.log")) if node else job.log
    return replace(job, node=node, head=head, log=log)


def of_node(node: int, outcome: Outcome) -> Outcome:
    """The outcome of machine number `node`, whose error names it where others may not have had the same."""
    return replace(outcome, error=f"node {node}: {outcome.error}") if node and outcome.error else outcome


def chosen(failures: Iterable[Outcome]) -> Outcome:
    """Return the outcome of a stage of several machines, of which these have failed in this order.

    That is the cause where one has said it; the first of several that say as much.
    """
    return min(failures, key=lambda one: KINDS.index(one.kind))
