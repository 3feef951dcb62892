"""The difference of two models: norms, distances and angles per layer or tensor, in one streamed pass over the weights.

With d = b - a, and with a base the task vectors u = a - base, v = b - base (so that v - u = d too):
relative difference |d| / |a|; sin^2(angle / 2) = (|d|^2 - (|a| - |b|)^2) / (4 |a| |b|).
This form keeps the small angles between models of one init, which the arc cosine of a dot product loses.

The angle between task vectors is the one that SLERP uses (WARP, arXiv 2406.16768v1, section 3.2 and figure 10).
Sums run in fp64 (`distances`). Memory does not grow with the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import atan2, degrees, fsum, sqrt
from pathlib import Path
from typing import Literal

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.core.rounding import is_still, relative_change
from gemma2.merging.inputs.checkpoint import Checkpoint, Reader
from gemma2.merging.inputs.compatibility import (
    check_model,
    check_same_architecture,
    check_same_tensors,
    check_same_tokenizer,
)
from gemma2.merging.inputs.config_keys import TIE
from gemma2.merging.inputs.output_heads import copies_of, same_heads
from gemma2.merging.inputs.resolve import open_input
from gemma2.merging.kernels.native import announced
from gemma2.merging.plan.merge_plan import group_of
from gemma2.merging.streaming.group_report import FAR, NARROW, WIDE

from .distances import Distances, Sums

__all__ = ["Difference", "ModelDifference", "diff_models", "plan_diff"]


@dataclass(frozen=True)
class Difference:
    """Two models in one group of tensors. `task_...` describe the task vectors; without a base they are None.

    relative  norm of the difference over the norm of a; None if a is zero
    largest   the largest |difference| of an element
    angle     degrees between the weights; None if one is zero, like `cosine`
    """

    group: str
    parameters: int
    norm_a: float
    norm_b: float
    norm_difference: float
    relative: float | None
    largest: float
    cosine: float | None
    angle: float | None
    norm_base: float | None = None
    task_norm_a: float | None = None
    task_norm_b: float | None = None
    task_cosine: float | None = None
    task_angle: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelDifference:
    """The whole comparison: `groups` by the requested granularity, `total` over all tensors, `sums` by tensor."""

    a: Path
    b: Path
    base: Path | None
    granularity: str
    sums: Mapping[str, Sums]
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Difference, ...]:
        """One row per group, in the order of the layers."""
        if self.granularity == "tensor":
            return tuple(self.over(name, [name]) for name in self.sums)
        members: dict[str, list[str]] = {}
        for name in self.sums:
            members.setdefault(group_of(name), []).append(name)
        return tuple(self.over(group, names) for group, names in members.items())

    @property
    def total(self) -> Difference:
        """The row of all tensors together."""
        return self.over("total", list(self.sums))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Suspicious figures, one line each."""
        return tuple(_judge(self.groups, self.total, self.still))

    @property
    def still(self) -> Mapping[str, float]:
        """Models whose change is rounding -> its relative size: a, b against the base; without a base b against a."""
        places = {"model a": (4, 3), "model b": (5, 3)} if self.base else {"model b": (2, 0)}
        found = {
            name: relative_change((part.squares[moved], part.squares[start]) for part in self.sums.values())
            for name, (moved, start) in places.items()
        }
        return {name: size for name, size in found.items() if size is not None and is_still(size)}

    def over(self, group: str, names: Sequence[str]) -> Difference:
        """Return the row of any set of tensors as one group. The angle of task vectors that are rounding is None."""
        parts = [self.sums[name] for name in names]
        squares = [fsum(column) for column in zip(*(part.squares for part in parts), strict=True)]
        parameters, largest = sum(part.parameters for part in parts), max(part.largest for part in parts)
        row = _difference(group, parameters, squares, largest, self.base is not None)
        return replace(row, task_cosine=None, task_angle=None) if self.base and self.still else row

    def as_dict(self) -> JsonObject:
        """Return the comparison for JSON."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            "base": str(self.base) if self.base else None,
            "granularity": self.granularity,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "groups": [asdict(group) for group in self.groups],
            "total": asdict(self.total),
        }


def diff_models(
    a: Path,
    b: Path,
    *,
    base: Path | None = None,
    granularity: Literal["layer", "tensor"] = "layer",
    threads: int = 2,
    progress: Progress = SILENT,
) -> ModelDifference:
    """Compare two models, and with `base` their task vectors. Writes nothing.

    Each is a directory, a hub id, or a LoRA adapter, whose model is the one that it records, else `base`.
    Raises InputError for models that cannot be compared, or that hold NaN or Inf.
    """
    models, said = _comparable(a, b, base)
    names = list(models[0].tensors)
    total = sum(model.tensors[name].nbytes for model in models for name in names)
    with (
        announced(progress.note),
        Reader.open(models) as reader,
        progress.task("diff", total=total, unit="bytes") as task,
    ):
        sums = {}
        for name, found in Distances(models, reader, threads).run(names):
            sums[name] = found
            task.advance(sum(model.tensors[name].nbytes for model in models))
    notes = (*said, *_notes(models))
    return ModelDifference(a=a, b=b, base=base, granularity=granularity, sums=sums, notes=notes)


def plan_diff(a: Path, b: Path, base: Path | None = None) -> JsonObject:
    """What a comparison would read, from headers alone. Raises InputError for models that cannot be compared."""
    models, _ = _comparable(a, b, base)
    names = list(models[0].tensors)
    return {
        "tensors": len(names),
        "parameters": sum(models[0].tensors[name].count for name in names),
        "bytes_to_read": sum(model.tensors[name].nbytes for model in models for name in names),
    }


def _comparable(a: Path, b: Path, base: Path | None) -> tuple[list[Checkpoint], list[str]]:
    """(models, notes on what differs besides the weights)."""
    named = {"model a": a, "model b": b} | ({"base": base} if base else {})
    models = [open_input(path, role, base) for role, path in named.items()]
    for model in models:
        check_model(model)
    models, _, notes = same_heads(models, models[0], allowed=(TIE,))
    for other in models[1:]:
        found = check_same_architecture(models[0], other, allowed=("*",))
        notes += [f"{one.key} differs: {one.values(models[0].role, other.role)}" for one in found]
        check_same_tensors(models[0], other)
    return models, notes


def _difference(group: str, parameters: int, squares: Sequence[float], largest: float, based: bool) -> Difference:
    """Return one row from the six sums of `Sums`."""
    a, b, apart, base, first, second = (sqrt(square) for square in squares)
    cosine, angle = _angle(a, b, apart)
    row = Difference(
        group=group,
        parameters=parameters,
        norm_a=a,
        norm_b=b,
        norm_difference=apart,
        relative=apart / a if a else None,
        largest=largest,
        cosine=cosine,
        angle=angle,
    )
    if not based:
        return row
    cosine, angle = _angle(first, second, apart)
    return replace(row, norm_base=base, task_norm_a=first, task_norm_b=second, task_cosine=cosine, task_angle=angle)


def _angle(a: float, b: float, apart: float) -> tuple[float | None, float | None]:
    """Return cosine and degrees between vectors of lengths a and b, `apart` from each other; None if one is zero."""
    if not a or not b:
        return None, None
    half = min(max((apart - (a - b)) * (apart + (a - b)) / (4 * a * b), 0.0), 1.0)  # sin^2 of half the angle
    return 1 - 2 * half, degrees(2 * atan2(sqrt(half), sqrt(1 - half)))


def _notes(models: Sequence[Checkpoint]) -> Iterator[str]:
    """Differences that are worth a note but do not prevent the comparison."""
    yield from (f"{line}: compared once" for line in copies_of(models))
    kinds = {model.role: sorted({tensor.dtype for tensor in model.tensors.values()}) for model in models}
    if len({tuple(kind) for kind in kinds.values()}) > 1:
        shown = ", ".join(f"{role} is {' and '.join(kind)}" for role, kind in kinds.items())
        yield f"{shown}: part of the difference is rounding"
    for other in models[1:]:
        try:
            check_same_tokenizer(models[0], other)
        except InputError as error:
            yield error.what


def _judge(groups: Sequence[Difference], total: Difference, still: Mapping[str, float]) -> Iterator[str]:
    """Lines for `ModelDifference.warnings`."""
    if total.norm_difference == 0:
        yield f"the models are identical: all {total.parameters:,} parameters are equal"
        return
    based = total.norm_base is not None
    start, angles = ("the base", ", and no angle is shown") if based else ("model a", "")
    for name, size in still.items():
        if size:
            yield f"{name} does not differ from {start}: its change is {size:.1g} of the norm, rounding{angles}"
    same = [group.group for group in groups if group.norm_difference == 0]
    if same:
        yield f"{len(same)} of {len(groups)} groups are identical, {same[0]} for one"
    if total.norm_base is None:
        if total.relative is not None and total.relative > FAR:
            yield (f"the difference is {total.relative:.3g} of the norm of a: these models hardly have a common parent")
        return
    for name, length in (("a", total.task_norm_a), ("b", total.task_norm_b)):
        if length == 0:
            yield f"model {name} is identical to the base: it has no task vector"
        elif length is not None and length > FAR * total.norm_base:
            yield (
                f"model {name} is far from the base: its task vector has norm {length:.4g}, the base "
                f"{total.norm_base:.4g}; is the base its ancestor?"
            )
    yield from _odd_angles(groups)


def _odd_angles(groups: Sequence[Difference]) -> Iterator[str]:
    angles = {group.group: group.task_angle for group in groups if group.task_angle is not None}
    narrow = {name: angle for name, angle in angles.items() if angle < NARROW}
    wide = {name: angle for name, angle in angles.items() if angle > WIDE}
    for found, words, extreme in ((narrow, f"under {NARROW:.0f}", min), (wide, f"over {WIDE:.0f}", max)):
        if found:
            worst = extreme(found, key=lambda name: angles[name])
            yield (
                f"task vectors are {words} degrees apart in {len(found)} of {len(groups)} groups, most so in {worst} "
                f"({found[worst]:.1f})"
            )
