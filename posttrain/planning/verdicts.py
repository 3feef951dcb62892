"""Whether a command fits into a device, and the smallest change of its flags with which it does. Torch-free, pure.

    fits      <=>  memory_of(config).peak.bytes <= capacity
    change    =    flags of least cost whose memory_of fits; among them the largest micro-batch that does

Costs order the changes by how much of the result they touch: a smaller micro-batch or a copy elsewhere changes no
number but rounding, LoRA trains other weights, shorter rows are other data. Every change is a flag of the command as it
is; what no flag can do (a split over devices) is only shown as a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.schemas import LoraFields, RlFields, StrategyFields, WarpConfig
from gemma2.posttrain.schemas.config import Config

from .learning import Sizes
from .memory import memory_of
from .parts import Lengths, MemoryPlace, MemoryPlan, Phase
from .shapes import ModelShape

__all__ = ["CARDS", "GB", "Verdict", "gpus_flags", "judge", "micro_batch_field", "micro_batches"]

GB = 1e9  # bytes; a card of 24 GB has some per cent more, which its driver takes
CARDS = (24.0, 48.0, 80.0, 141.0)  # GB
LORA_RANK = 16
SHORTEST = 128  # tokens below which no length is advised
GPUS = (2, 4, 8, 16, 32, 64)
MOST_ON_A_MACHINE = 8
MOST_ROWS = 4096  # of a command whose batch is free

# One option of a choice: its cost, the fields that it sets. The first one is the configuration as it is.
Option = tuple[int, dict[str, object]]


@dataclass(frozen=True)
class Verdict:
    """The answer for one place.

    needed       bytes on each device, in its largest phase
    micro_batch  the largest that fits
    flags        of the smallest change with which it fits; empty if it fits, or nothing helps
    needed_then  bytes with these flags; where nothing helps, the least that any flags come to
    gpus         the fewest of this size that hold the command as it is, divided among them (fsdp)
    """

    place: MemoryPlace
    needed: float
    phase: str
    micro_batch: int | None = None
    flags: tuple[str, ...] = ()
    needed_then: float | None = None
    gpus: int | None = None

    @property
    def fits(self) -> bool:
        """Whether it fits as it is."""
        return self.needed <= self.place.capacity

    @property
    def advice(self) -> str:
        """The fix of a command that does not fit, in words."""
        several = gpus_flags(self.gpus) if self.gpus else ""
        if self.flags:
            return f"give {' '.join(self.flags)}" + (f", or {several}" if several else "")
        if several:
            return f"give {several}, of GPUs of this size"
        if self.needed_then is None:
            return "use a smaller model, or a machine with more"
        needed, _ = sizes_apart(self.needed_then, self.place.capacity)
        return f"no flags help, the least is {needed}: use a smaller model, or a machine with more"


@dataclass(frozen=True)
class MemoryQuestion:
    """A configuration, and what is known of its models and rows: all that its memory follows from."""

    config: Config
    shapes: Sizes
    place: MemoryPlace
    lengths: Lengths
    seen: dict[Path, ModelShape] = field(default_factory=dict)

    def sizes(self, path: Path) -> ModelShape:
        """Return the shape of a model, read once."""
        if path not in self.seen:
            self.seen[path] = self.shapes(path)
        return self.seen[path]

    @property
    def unknown(self) -> bool:
        """Whether a model that was asked for is of unknown size."""
        return any(math.isnan(shape.parameters) for shape in self.seen.values())

    def plan(self, update: dict[str, object] | None = None) -> MemoryPlan | None:
        """Return its memory with some fields changed."""
        config = self.config.model_copy(update=update) if update else self.config
        return memory_of(config, self.sizes, self.place, self.lengths)

    def peak(self, update: dict[str, object] | None = None) -> Phase:
        """Return the largest phase."""
        return cast(MemoryPlan, self.plan(update)).peak

    def fits(self, update: dict[str, object]) -> bool:
        """Whether it fits with some fields changed."""
        return self.peak(update).bytes <= self.place.capacity

    @cached_property
    def micro(self) -> list[int]:
        """The micro-batches to choose from, ascending."""
        return micro_batches(self.config, self.place.devices)


def judge(config: Config, sizes: Sizes, place: MemoryPlace, lengths: Lengths | None = None) -> Verdict | None:
    """Return whether a command fits into a place, or what would make it fit.

    None for a command without a model, and for one with a model of unknown size.
    """
    job = MemoryQuestion(config, sizes, place, lengths or Lengths())
    plan = job.plan()
    if plan is None or job.unknown:
        return None
    found = Verdict(place, plan.peak.bytes, plan.peak.name)
    if found.fits:
        return replace(found, micro_batch=_largest(job, {}))
    found, least = replace(found, gpus=_fewest_gpus(job)), found.needed
    for update in _changes(config, place):
        if not _is_valid(config, update):
            continue
        if job.fits(update) and update:
            return replace(found, flags=_flags(update), micro_batch=None, needed_then=job.peak(update).bytes)
        rows = _largest(job, update)
        if rows is not None:
            smaller = {**update, micro_batch_field(config): rows}
            return replace(found, flags=_flags(smaller), micro_batch=rows, needed_then=job.peak(smaller).bytes)
        smallest = {**update, micro_batch_field(config): job.micro[0]} if job.micro else update
        least = min(least, job.peak(smallest).bytes)
    return replace(found, needed_then=least)


# --- several GPUs -----------------------------------------------------------------------------------------------------


def _fewest_gpus(job: MemoryQuestion) -> int | None:
    """Return the fewest GPUs of the place's size over which a training fits, none of them the flags' number already."""
    config, place = job.config, job.place
    if not isinstance(config, StrategyFields) or place.kind != "accelerator" or place.devices > 1:
        return None
    for count in GPUS:
        fits = memory_of(config, job.sizes, replace(place, devices=count, full_shard=True), job.lengths)
        if _rows_of_step(config) % count == 0 and fits is not None and fits.peak.bytes <= place.capacity:
            return count
    return None


def gpus_flags(gpus: int) -> str:
    """Return the flags that ask for so many GPUs, at most eight on a machine."""
    nodes = -(-gpus // MOST_ON_A_MACHINE)
    return f"--gpus {gpus // nodes}" + (f" --nodes {nodes}" if nodes > 1 else "")


# --- micro-batches ----------------------------------------------------------------------------------------------------


def micro_batch_field(config: Config) -> str:
    """Return the field with the rows of one forward pass."""
    return "micro_batch_size" if hasattr(config, "micro_batch_size") else "batch_size"


def micro_batches(config: Config, processes: int = 1) -> list[int]:
    """Return the micro-batches that a command takes, ascending: those that its share of a batch is multiples of."""
    if not hasattr(config, "micro_batch_size"):
        return list(range(1, MOST_ROWS + 1)) if hasattr(config, "batch_size") else []
    rows = max(1, _rows_of_step(config) // processes)
    if isinstance(config, RlFields):
        rows *= config.n
    return [size for size in range(1, rows + 1) if rows % size == 0 and _is_valid(config, {"micro_batch_size": size})]


def _rows_of_step(config: Config) -> int:
    """What processes share of a step: rows, or prompts of RL, whose samples stay together."""
    if isinstance(config, RlFields):
        return config.prompts_per_step
    return int(getattr(config, "batch_size", 1))


def _largest(job: MemoryQuestion, update: dict[str, object]) -> int | None:
    """Return the largest micro-batch that fits with some fields changed: memory grows with it."""
    name, sizes = micro_batch_field(job.config), job.micro
    low, high = 0, len(sizes)  # sizes[:low] fit
    while low < high:
        middle = (low + high) // 2
        if job.fits({**update, name: sizes[middle]}):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


# --- changes ----------------------------------------------------------------------------------------------------------


def _changes(config: Config, place: MemoryPlace) -> Iterator[dict[str, object]]:
    """Yield combinations of changes, the one that touches least first, beginning with none."""
    choices = [choice(config, place) for choice in CHOICES]
    for some in sorted(product(*choices), key=lambda some: sum(cost for cost, _ in some)):
        yield {name: value for _, update in some for name, value in update.items()}


def _teacher(config: Config, place: MemoryPlace) -> list[Option]:
    options: list[Option] = [(0, {})]
    wide = getattr(config, "teacher_dtype", None) == "float32" or place.kind == "cpu"
    if wide and getattr(config, "teacher", None) is not None and hasattr(config, "teacher_dtype"):
        options.append((1, {"teacher_dtype": "bfloat16"}))
    return options


def _anchor(config: Config, place: MemoryPlace) -> list[Option]:
    options: list[Option] = [(0, {})]
    if isinstance(config, RlFields) and config.anchor == "ema" and config.anchor_memory == "gpu":
        options += [(1, {"anchor_memory": "cpu"})] if place.kind == "accelerator" else []
    return options


def _jobs(config: Config, place: MemoryPlace) -> list[Option]:
    del place
    several: list[Option] = [(1, {"jobs": 1})] if isinstance(config, WarpConfig) and config.jobs > 1 else []
    return [(0, {}), *several]


def _lora(config: Config, place: MemoryPlace) -> list[Option]:
    del place
    if not isinstance(config, LoraFields):
        return [(0, {})]
    averaged = isinstance(config, RlFields) and config.anchor == "ema" and config.lora_anchor == "dense"
    factors: list[Option] = [(4, {"lora_anchor": "factors"})] if averaged else []
    few: dict[str, object] = {"base_bits": 4} | (dict(factors[0][1]) if factors else {})
    quantised: list[Option] = [(12, few)] if config.base_bits is None else []
    if config.lora_rank:
        return [(0, {}), *factors, *quantised]
    adapters: dict[str, object] = {"lora_rank": LORA_RANK}
    return [(0, {}), (10, adapters), *((10 + cost, adapters | more) for cost, more in [*factors, *quantised])]


def _lengths(config: Config, place: MemoryPlace) -> list[Option]:
    """Shorter rows and answers, all by the same factor."""
    del place
    named = [name for name in ("max_length", "max_new_tokens") if isinstance(getattr(config, name, None), int)]
    options: list[Option] = [(0, {})]
    for halvings in range(1, 8):
        shorter = {name: max(SHORTEST, getattr(config, name) >> halvings) for name in named}
        update: dict[str, object] = {name: n for name, n in shorter.items() if n < getattr(config, name)}
        if not update or update == options[-1][1]:
            break
        options.append((20 + 4 * halvings, update))
    return options


CHOICES: Sequence[Callable[[Config, MemoryPlace], list[Option]]] = (_teacher, _anchor, _jobs, _lora, _lengths)


def _is_valid(config: Config, update: dict[str, object]) -> bool:
    """Whether the schema takes a configuration with these changes."""
    try:
        type(config).model_validate(config.model_dump() | update)
    except ValidationError:
        return False
    return True


def _flags(update: dict[str, object]) -> tuple[str, ...]:
    return tuple(word for name, value in update.items() for word in (f"--{name.replace('_', '-')}", str(value)))
