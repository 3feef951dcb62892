"""What `gemma2 plan` says of a command, as one document: memory by part, verdicts, disk, time. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.posttrain.schemas import StrategyFields
from gemma2.posttrain.schemas.config import Config

from .disk import disk_of
from .durations import Trial, duration
from .learning import Sizes
from .memory import Lengths, MemoryPlace, MemoryPlan, memory_of, place_for, processes_of
from .verdicts import CARDS, GB, Verdict, judge

__all__ = ["PlanFacts", "PlanQuestion", "answer", "gpu_bytes"]

GIB = 2.0**30
USUAL = 80 * GB  # of GPUs of which only the number is known
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", re.IGNORECASE)


@dataclass(frozen=True)
class PlanQuestion:
    """What a plan is asked besides the command, whose flags say how many GPUs: one in bytes, a rate of tokens."""

    gpu: float | None = None
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
    place = _asked(facts, question)
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


def _asked(facts: PlanFacts, question: PlanQuestion) -> MemoryPlace:
    """The place whose parts are shown: the GPU that was asked about, a usual one if there are several, this machine."""
    if question.gpu is None and processes_of(facts.config) == 1:
        return facts.here
    capacity = USUAL if question.gpu is None else question.gpu
    return place_for(facts.config, facts.sizes, facts.lengths, "accelerator", capacity)


def _verdicts(facts: PlanFacts, question: PlanQuestion) -> Iterator[Verdict]:
    """This machine, then the GPU that was asked about or the usual ones; several by every strategy that is open."""
    count, config = processes_of(facts.config), facts.config
    cards: Sequence[float] = [question.gpu] if question.gpu is not None else [size * GB for size in CARDS]
    places = [facts.here] if question.gpu is None and count == 1 else []
    asked = config.strategy if isinstance(config, StrategyFields) else "ddp"
    divided = {"ddp": [False], "fsdp": [True], "auto": [False, True] if count > 1 else [False]}[asked]
    places += [MemoryPlace("accelerator", count, one, card) for card in cards for one in divided]
    for place in places:
        verdict = judge(config, facts.sizes, place, facts.lengths)
        if verdict is not None:
            yield verdict


def named(place: MemoryPlace) -> str:
    """Return a place in words."""
    if place.kind == "cpu":
        return "this machine, main memory"
    size = f"GPU of {place.capacity / GB:.4g} GB" if math.isfinite(place.capacity) else "GPU"
    if place.devices == 1:
        return f"{size}, fsdp" if place.full_shard else size
    return f"{place.devices} x {size}, {'fsdp' if place.full_shard else 'ddp'}"


def _memory(plan: MemoryPlan) -> JsonObject:
    phases = [
        {"phase": one.name, "gib": _gib(one.bytes), "parts": {part.name: _gib(part.bytes) for part in one.parts}}
        for one in plan.phases
    ]
    return {"peak": plan.peak.name, "peak_gib": _gib(plan.peak.bytes), "phases": phases}


def _row(verdict: Verdict) -> JsonObject:
    """One verdict as a line of a table."""
    return {
        "place": named(verdict.place),
        "has_gib": _gib(verdict.place.capacity),
        "needs_gib": _gib(verdict.needed),
        "peak": verdict.phase,
        "fits": verdict.fits,
        "largest_micro_batch": verdict.micro_batch if verdict.fits else None,
        "flags": " ".join(verdict.flags) or None,
        "fewest_gpus": verdict.gpus,
        "then_gib": None if verdict.needed_then is None else _gib(verdict.needed_then),
    }


def _gib(count: float) -> float:
    return float(f"{count / GIB:.5g}")
