"""What a user asks of a merge, and the plain numbers that it comes down to for one tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from gemma2.core.errors import UsageError
from gemma2.core.outputs.safetensors_header import printable

from .parameters import Number, Schedule, value_at

__all__ = ["DTYPES", "Granularity", "MergeRequest", "Settings", "Slice", "settings_at"]

Granularity = Literal["layer", "tensor", "model"]

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def default_threads() -> int:
    """One more than there are cores, since one waits for the disk; at most 9."""
    return min(os.cpu_count() or 1, 8) + 1


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A run of layers of the output, stacked after those of the slices before it.

    layers   per model of the slice: (index into the request's models, first layer, end layer), all of one length
    base     the layers of the base that they are compared with; those of the first model when None
    changes  fields of the request that differ in this slice; per-model fields follow the slice's models
    """

    layers: tuple[tuple[int, int, int], ...]
    base: tuple[int, int] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """One merge as the user asks for it. A Number is a float, or a Schedule over tensors.

    method       a name in METHODS
    models       directories of models or adapters, MODEL+ADAPTER, or hub ids; their order counts for slerp and warp of
                 three or more, and for ema
    base         the init that task vectors start from, or that the result is interpolated to (liti)
    t            slerp of two models: 0 is the first, 1 the second; 1/2 when None
    etas         liti and warp: share of the merged model, 0 is the base; several give one output each
    weights      one per model; None is the method's own: uniform, or 1 each for sums of task vectors
    decay        ema: of the recursion over the checkpoints; None is their uniform average
    scale        of the merged task vector (lambda in the papers); passthrough: of the weights
    density      share of a task vector's elements that is kept; one, or one per model
    gamma        breadcrumbs: share of the largest elements that is dropped; one, or one per model
    epsilon      della: half of the spread of the keep probability over the ranks; one, or one per model
    normalize    divide by the sum of the weights that take part; None is the method's own
    rescale      dare, della: divide what is kept by its keep probability; None is yes
    seed         dare, della: of the random masks
    iterations   karcher: most steps
    tolerance    karcher: radians; a shorter step is the last
    granularity  what shares coefficients or a threshold: a transformer layer, a tensor, or the whole model; None is
                 the method's own
    slices       layers of the output taken from layers of the models; () is all layers one to one
    tokenizer    whose tokenizer and vocabulary the output has: "base", "union", a model's path; None needs equal ones
    dtype        of the output: bfloat16, float16 or float32; that of the first model when None
    threads      that read, compute and write side by side; one more than cores, at most 9: one waits for the disk
    """

    method: str
    models: tuple[Path, ...]
    base: Path | None = None
    t: Number | None = None
    etas: tuple[Number, ...] = ()
    weights: tuple[Number, ...] | None = None
    decay: float | None = None
    scale: Number | None = None
    density: tuple[Number, ...] | None = None
    gamma: tuple[Number, ...] | None = None
    epsilon: tuple[Number, ...] | None = None
    normalize: bool | None = None
    rescale: bool | None = None
    seed: int = 0
    iterations: int | None = None
    tolerance: float | None = None
    granularity: Granularity | None = None
    slices: tuple[Slice, ...] = ()
    tokenizer: str | None = None
    dtype: str | None = None
    threads: int = field(default_factory=default_threads)

    def options(self) -> dict[str, Any]:
        """What was asked for, without the paths: recorded in the manifest."""
        skipped = {"models", "base", "threads", "slices"}
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in skipped}
        given = {name: value for name, value in values.items() if value is not None and value != ()}
        parts = {"slices": [_plain(vars(part)) for part in self.slices]} if self.slices else {}
        return {name: _plain(value) for name, value in given.items()} | parts


def _plain(value: Any) -> Any:
    """A value as JSON has it: schedules as their rules."""
    if isinstance(value, Schedule):
        rules = [{"points": list(rule.points), "pattern": rule.pattern} for rule in value.rules]
        return {"rules": rules, "default": value.default}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of a request for one tensor; the fields mean the same. Per-model fields have one entry per model."""

    t: float | None = None
    etas: tuple[float, ...] = ()
    weights: tuple[float, ...] | None = None
    decay: float | None = None
    scale: float | None = None
    density: tuple[float, ...] | None = None
    gamma: tuple[float, ...] | None = None
    epsilon: tuple[float, ...] | None = None
    normalize: bool | None = None
    rescale: bool | None = None
    seed: int = 0
    iterations: int | None = None
    tolerance: float | None = None


PER_MODEL = ("weights", "density", "gamma", "epsilon")


def settings_at(request: MergeRequest, name: str, depth: float) -> Settings:
    """The request's numbers for one tensor at its depth in [0, 1]. Raises UsageError where no rule gives a value."""
    values: dict[str, Any] = {}
    for item in fields(Settings):
        value = getattr(request, item.name)
        if isinstance(value, tuple):
            value = tuple(_at(number, item.name, name, depth) for number in value)
            if item.name in PER_MODEL and len(value) == 1:
                value *= len(request.models)
        elif isinstance(value, Schedule):
            value = _at(value, item.name, name, depth)
        values[item.name] = value
    return Settings(**values)


def _at(number: Number, parameter: str, name: str, depth: float) -> float:
    value = value_at(number, name, depth)
    if value is None:
        raise UsageError(
            f"no rule of {parameter} fits the tensor {printable(name)}", "add a value without a filter as the last one"
        )
    return value
