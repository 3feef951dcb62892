"""What a plan of memory is made of: parts in phases, and the place that they have to fit into. Pure.

On a CPU the allocator of the C library gives blocks of 32 MiB and more back to the system when they are freed, and
keeps smaller ones for later use (mallopt(3), M_MMAP_THRESHOLD). So a process holds the most that its small blocks ever
took, at every later moment, and a share for the gaps between them: what of it is not in use is the part `allocator
slack`. The caching allocator of an accelerator keeps everything, in blocks that it cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BASELINES",
    "Bytes",
    "Kind",
    "Lengths",
    "MemoryPart",
    "MemoryPlace",
    "MemoryPlan",
    "Moment",
    "Phase",
    "Sum",
    "blocks",
    "settled",
]

Kind = Literal["cpu", "accelerator"]

RECORDS = 5 * 2**20  # bytes of rows, metrics and the trainer's own objects in a short run, measured with it
GIVEN_BACK = 2**25  # bytes: blocks of this size and more are given back when they are freed
FINE = 2**22  # bytes: blocks below this size
# Gaps in what the C library keeps, as a share of it, from mallinfo2 at the peak of runs of bench/plan.py: 0.10 to 0.25
# where all weights are trained. With adapters 0.4 to 0.9, if blocks are fine: gradients and moments stay between them.
GAPS, GAPS_OF_ADAPTERS = 0.15, 0.35
# Of an accelerator's memory that comes and goes, the share in pieces too small to use. Not measured.
CUT = 0.05
PASSING = frozenset({"activations", "logits", "KV cache", "gradients", "copies of weights for decoding"})
# Bytes that a process needs before it has a model. CPU: measured by bench/plan.py, by training a tiny model
# with torch, transformers and trl. Accelerator: CUDA context and workspaces, not measured.
BASELINES: dict[Kind, float] = {"cpu": 0.50 * 2**30, "accelerator": 0.80 * 2**30}


@dataclass(frozen=True)
class MemoryPart:
    """One use of memory: its name, and bytes on each device."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Phase:
    """What is in memory at the same time, at the peak of one phase of a command."""

    name: str
    parts: tuple[MemoryPart, ...]

    @property
    def bytes(self) -> float:
        """The sum of all parts."""
        return math.fsum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of a command, in the order in which they run."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda one: one.bytes)


@dataclass(frozen=True)
class MemoryPlace:
    """Where a command runs.

    kind        what holds the models: main memory or accelerators
    devices     processes, one per device
    full_shard  whether weights, gradients, optimizer, anchor and frozen models are divided among the devices (fsdp),
                instead of repeated on each (ddp)
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


@dataclass(frozen=True)
class Bytes:
    """Memory in use: in blocks that are given back when they are freed, and in small blocks, which are kept.

    fine  of the small blocks those below 4 MiB
    """

    large: float = 0.0
    small: float = 0.0
    fine: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.large + other.large, self.small + other.small, self.fine + other.fine)

    def __mul__(self, factor: float) -> Bytes:
        return Bytes(self.large * factor, self.small * factor, self.fine * factor)

    @property
    def total(self) -> float:
        """Bytes of all blocks."""
        return self.large + self.small


Sum = list[tuple[str, Bytes]]


def blocks(size: float, count: float = 1.0) -> Bytes:
    """Return `count` blocks of `size` bytes."""
    return Bytes(size * count) if size >= GIVEN_BACK else Bytes(0.0, size * count, size * count * (size < FINE))


@dataclass(frozen=True)
class Moment:
    """What is in memory at one moment of a phase; amounts of one name are added up."""

    phase: str
    parts: Sequence[tuple[str, Bytes]]

    def sums(self) -> dict[str, Bytes]:
        """The amounts by name."""
        found: dict[str, Bytes] = {}
        for name, amount in self.parts:
            found[name] = found.get(name, Bytes()) + amount
        return found

    @property
    def whole(self) -> Bytes:
        """The sum of all parts."""
        return sum((amount for _, amount in self.parts), Bytes())


def settled(moments: Iterable[Moment], place: MemoryPlace, adapters: bool = False) -> MemoryPlan:
    """Return the phases of these moments, of each the largest one, with what the allocator keeps.

    adapters  whether adapters are trained
    """
    found = list(moments)
    more = GAPS_OF_ADAPTERS if adapters else 0.0
    kept = max(((1 + GAPS) * one.whole.small + more * one.whole.fine for one in found), default=0.0)
    kept *= place.kind == "cpu"
    largest: dict[str, Moment] = {}
    for moment in found:
        before = largest.get(moment.phase)
        if before is None or _size(moment, kept) > _size(before, kept):
            largest[moment.phase] = moment
    return MemoryPlan(tuple(_phase(moment, kept, place) for moment in largest.values()))


def _size(moment: Moment, kept: float) -> float:
    return moment.whole.large + max(kept, moment.whole.small)


def _phase(moment: Moment, kept: float, place: MemoryPlace) -> Phase:
    parts = [MemoryPart(name, amount.total) for name, amount in moment.sums().items()]
    if place.kind == "cpu":
        slack = max(0.0, kept - moment.whole.small)
    else:
        slack = CUT * math.fsum(part.bytes for part in parts if part.name in PASSING)
    parts += [MemoryPart("allocator slack", slack), MemoryPart("rows and records", RECORDS)]
    return Phase(
        moment.phase, (MemoryPart("library baseline", place.library_baseline), *(p for p in parts if p.bytes > 0))
    )
