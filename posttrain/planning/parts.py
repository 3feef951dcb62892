"""What a plan of memory is made of: parts in phases, and the place that they have to fit into. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["BASELINES", "Lengths", "MemoryPlan", "Part", "Phase", "Place", "phase"]

Kind = Literal["cpu", "accelerator"]

# Bytes that a process needs before it has a model, by kind of place. CPU: measured by bench/plan.py, by training a model
# of a few thousand weights with torch, transformers and trl. Accelerator: CUDA context and workspaces, not measured.
BASELINES: dict[Kind, float] = {"cpu": 0.60 * 2**30, "accelerator": 0.80 * 2**30}


@dataclass(frozen=True)
class Part:
    """One use of memory: its name, and bytes on each device."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Phase:
    """What is in memory at the same time, at the peak of one phase of a command."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        """The sum of all parts."""
        return math.fsum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of a command in the order in which they run. Without a model there is none."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda one: one.bytes)


@dataclass(frozen=True)
class Place:
    """Where a command runs.

    kind        what holds the models: main memory or accelerators
    devices     processes, one per device
    full_shard  whether weights, gradients and optimizer are split among the devices (FSDP), instead of repeated on each
    capacity    bytes of one device
    baseline    bytes that the libraries take on each device before there is a model
    """

    kind: Kind = "cpu"
    devices: int = 1
    full_shard: bool = False
    capacity: float = math.inf
    baseline: float | None = None

    @property
    def library_baseline(self) -> float:
        """Bytes that the libraries take: those given, else the usual ones of this kind of place."""
        return BASELINES[self.kind] if self.baseline is None else self.baseline

    @property
    def shards(self) -> int:
        """Number of devices that share one copy of the weights."""
        return self.devices if self.full_shard else 1


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest rows, as far as the data are known; None: the limits of the configuration count.

    row     longest row that is trained on or scored, prompt included
    prompt  longest prompt that is answered
    """

    row: int | None = None
    prompt: int | None = None


def phase(name: str, parts: Iterable[tuple[str, float]]) -> Phase:
    """Return a phase of the parts that are not empty; parts of one name are added up."""
    sums: dict[str, float] = {}
    for part, size in parts:
        sums[part] = sums.get(part, 0.0) + size
    return Phase(name, tuple(Part(part, size) for part, size in sums.items() if size != 0))
