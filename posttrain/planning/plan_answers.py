"""What `gemma2 plan` says of a command, as one document: memory by part, verdicts, disk, time. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.schemas.config import Config

from .disk import disk_of
from .durations import Trial, duration
from .learning import Sizes
from .memory import Lengths, MemoryPlace, MemoryPlan, memory_of
from .verdicts import CARDS, GB, Verdict, judge

__all__ = ["PlanFacts", "PlanQuestion", "answer", "gpu_bytes"]

GIB = 2.0**30
SPLIT = (
    "a sum only: no command splits a model over GPUs yet; rlhf gives each process of torchrun a whole one, "
    "the others run on one GPU"
)
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", re.IGNORECASE)


@dataclass(frozen=True)
class PlanQuestion:
    """What a plan is asked besides the command: a GPU in bytes, how many of them, a rate of tokens."""

    gpu: float | None = None
    devices: int = 1
    throughput: float | None = None
    measure: bool = False


@dataclass(frozen=True)
class PlanFacts:
    """What is known of a command: its models, its longest rows, its tokens and steps, and this machine."""

    config: Config
    sizes: Sizes
    lengths: Lengths
    tokens: float
    steps: int | None
    here: MemoryPlace


def gpu_bytes(text: str) -> float:
    """Return the bytes of `24GB`, `24` (10^9 each) or `24GiB`. Raises UsageError."""
    found = SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--gpu {text} is not the memory of a GPU", "give a number of GB, such as 24GB")
    return float(found[1]) * (GIB if (found[2] or "").lower() == "gib" else GB)


def answer(facts: PlanFacts, question: PlanQuestion, trial: Trial | None = None) -> JsonObject:
    """Return memory, verdicts, disk and time of a command; of one that runs no model its tokens alone."""
    found: JsonObject = {}
    place = _asked(question, _devices(facts, question)) if question.gpu is not None else facts.here
    verdicts = [_row(verdict) for verdict in _verdicts(facts, question)]
    memory = memory_of(facts.config, facts.sizes, place, facts.lengths) if verdicts else None
    if memory is not None:
        found["memory"] = {"place": named(place), **_memory(memory)}
        found["verdicts"] = verdicts
    else:
        found["memory_note"] = "not computed for this command, or for a model of unknown size"
    parts = disk_of(facts.config, facts.sizes)
    if parts and all(math.isfinite(part.bytes) for part in parts):
        found["disk"] = {part.name: _gib(part.bytes) for part in parts}
    return found | {"time": duration(facts.config, facts.tokens, facts.steps, question.throughput, trial)}


def _devices(facts: PlanFacts, question: PlanQuestion) -> int:
    """The GPUs that a command uses today, each with a whole model."""
    return question.devices if isinstance(facts.config, RlhfConfig) else 1


def _asked(question: PlanQuestion, devices: int, gpu: float | None = None, split: bool = False) -> MemoryPlace:
    capacity = question.gpu if gpu is None else gpu
    return MemoryPlace("accelerator", devices, split, math.inf if capacity is None else capacity)


def _verdicts(facts: PlanFacts, question: PlanQuestion) -> Iterator[Verdict]:
    """This machine, then the GPU that was asked about or the usual ones; with several devices whole and split."""
    cards: Sequence[float] = [question.gpu] if question.gpu is not None else [size * GB for size in CARDS]
    places = [] if question.gpu is not None else [facts.here]
    for card in cards:
        places.append(_asked(question, _devices(facts, question), card))
        if question.devices > 1:
            places.append(_asked(question, question.devices, card, split=True))
    for place in places:
        verdict = judge(facts.config, facts.sizes, place, facts.lengths)
        if verdict is not None:
            yield replace(verdict, flags=()) if place.full_shard else verdict


def named(place: MemoryPlace) -> str:
    """Return a place in words."""
    if place.kind == "cpu":
        return "this machine, main memory"
    size = f"GPU of {place.capacity / GB:.4g} GB" if math.isfinite(place.capacity) else "GPU"
    if place.devices == 1:
        return size
    return f"{place.devices} x {size}, {'split' if place.full_shard else 'whole'}"


def _memory(plan: MemoryPlan) -> JsonObject:
    phases = [
        {"phase": one.name, "gib": _gib(one.bytes), "parts": {part.name: _gib(part.bytes) for part in one.parts}}
        for one in plan.phases
    ]
    return {"peak": plan.peak.name, "peak_gib": _gib(plan.peak.bytes), "phases": phases}


def _row(verdict: Verdict) -> JsonObject:
    """One verdict as a line of a table."""
    row: JsonObject = {
        "place": named(verdict.place),
        "has_gib": _gib(verdict.place.capacity),
        "needs_gib": _gib(verdict.needed),
        "peak": verdict.phase,
        "fits": verdict.fits,
        "largest_micro_batch": verdict.micro_batch if verdict.fits else None,
        "flags": " ".join(verdict.flags) or None,
        "then_gib": None if verdict.needed_then is None else _gib(verdict.needed_then),
    }
    return row | ({"note": SPLIT} if verdict.place.full_shard else {})


def _gib(count: float) -> float:
    return float(f"{count / GIB:.5g}")
