"""What a merge will read, compute and write. What can be refused is refused here, before a tensor is read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, open_checkpoint
from .compatibility import (
    check_model,
    check_same_architecture,
    check_same_tensors,
    check_same_tokenizer,
    tied_copies,
)
from .errors import InputError, OutputError, UsageError
from .header import ITEM_BYTES
from .methods import DTYPES, METHODS, MergeRequest, Method, check_request
from .outputs import check_output, digest_weights, read_manifest

__all__ = ["Group", "MergePlan", "group_of", "plan_merge"]

# How training commands name the policy that they start from in a manifest's list of parents.
INIT_ROLES = ("policy-init", "policy", "model")
LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.\d+(?=\.)")


@dataclass(frozen=True)
class Group:
    """Tensors that share one set of coefficients."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A merge that was checked and can be carried out. `operands` are the base, where there is one, and the models."""

    request: MergeRequest
    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    groups: tuple[Group, ...]
    layout: dict[str, tuple[str, tuple[int, ...]]]  # of the output: dtype and shape by name, in the order of the file
    outputs: tuple[Path, ...]
    tied: dict[str, str]  # stored copies of tied tensors, and what they repeat
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> Method:
        """The entry of METHODS."""
        return METHODS[self.request.method]

    @property
    def operands(self) -> tuple[Checkpoint, ...]:
        """The inputs in the order of the coefficients."""
        return (*((self.base,) if self.base else ()), *self.models)

    @property
    def output_bytes(self) -> int:
        """Weights of one output."""
        return sum(prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.layout.values())

    @property
    def input_bytes(self) -> int:
        """Weights that are merged, of all inputs; adaptive methods read them twice."""
        return sum(model.tensors[name].nbytes for model in self.operands for name in self.layout)

    def describe(self) -> dict[str, Any]:
        """The plan for a dry run."""
        return {
            **self.request.options(),
            "vectors": f"task vectors from {self.base.path}" if self.base else "the weights themselves",
            "models": [str(model.path) for model in self.models],
            "outputs": [str(path) for path in self.outputs],
            "parameters": sum(prod(shape) for _, shape in self.layout.values()),
            "tensors": len(self.layout),
            "groups": [group.name for group in self.groups],
            "passes": 2 if self.method.adaptive else 1,
            "bytes_to_read": self.input_bytes * (2 if self.method.adaptive else 1),
            "bytes_to_write": self.output_bytes * len(self.outputs),
            "notes": list(self.notes),
        }


def plan_merge(request: MergeRequest, out: Path, force: bool = False) -> MergePlan:
    """Check a merge completely. Raises UsageError, InputError or OutputError; touches nothing.

    The plan's request has its base and its defaults filled in.
    """
    request = check_request(request)
    models = tuple(open_checkpoint(path, f"model {i + 1}") for i, path in enumerate(request.models))
    request, notes = _find_base(request, models)
    base = open_checkpoint(request.base, "base") if request.base else None
    everyone = [*models, *([base] if base else [])]
    for model in everyone:
        check_model(model)
    for other in everyone[1:]:
        check_same_architecture(models[0], other)
        check_same_tensors(models[0], other)
        check_same_tokenizer(models[0], other)
    tied = tied_copies(models[0])
    dtype = DTYPES[request.dtype] if request.dtype else None
    merged = {name: tensor for name, tensor in models[0].tensors.items() if name not in tied}
    plan = MergePlan(
        request=request,
        base=base,
        models=models,
        groups=_groups(merged, request.granularity),
        layout={name: (dtype or tensor.dtype, tensor.shape) for name, tensor in merged.items()},
        outputs=_outputs(request, out),
        tied=tied,
        notes=(*notes, *(f"{copy} repeats {name}: merged and written once" for copy, name in tied.items())),
    )
    _check_outputs(plan, force)
    return plan


def group_of(name: str) -> str:
    """The group of a tensor: its transformer layer, or for the embedding, the final norm and the head itself.

    WARP applies SLERP "independently to the 28 layers" and is silent about the rest; each of these is its own group.
    """
    layer = LAYER.match(name)
    path = layer.group() if layer else name.rsplit(".", 1)[0]
    return path.removeprefix("model.")


def _groups(names: Iterable[str], granularity: str) -> tuple[Group, ...]:
    groups: dict[str, list[str]] = {}
    for name in names:
        key = {"layer": group_of(name), "tensor": name, "model": "model"}[granularity]
        groups.setdefault(key, []).append(name)
    return tuple(Group(name, tuple(tensors)) for name, tensors in groups.items())


def _outputs(request: MergeRequest, out: Path) -> tuple[Path, ...]:
    """One output, or for several etas one directory for each below `out`."""
    if len(request.etas) < 2:
        return (out,)
    return tuple(out / f"eta-{f'{eta:.2f}' if round(eta, 2) == eta else repr(eta)}" for eta in request.etas)


def _check_outputs(plan: MergePlan, force: bool) -> None:
    """Place, overlap with inputs, and room on the disk."""
    inputs = {model.role: model.path for model in plan.operands}
    for out in plan.outputs:
        check_output(out, force, inputs)
    parent = plan.outputs[0].absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = plan.output_bytes * len(plan.outputs), shutil.disk_usage(parent).free
    if needed > free:
        raise OutputError(
            f"the output needs {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free",
            "free some space, or choose another --out",
        )


def _find_base(request: MergeRequest, models: Sequence[Checkpoint]) -> tuple[MergeRequest, list[str]]:
    """The request with the recorded common parent as its base, where the method wants one and none is named."""
    sought = METHODS[request.method].base in ("sought", "optional")
    if request.base is not None or not sought:
        return request, []
    base = common_parent(models)
    if base is not None:
        return replace(request, base=base), [f"base: {base}, the parent that all models record"]
    if METHODS[request.method].base == "sought":
        raise UsageError(
            f"merge {request.method} needs the init of the models, and they record no common parent", "name it: --base"
        )
    return request, []


def common_parent(models: Sequence[Checkpoint]) -> Path | None:
    """The model that all the models' manifests record as what they were trained from; None when they do not.

    Raises InputError when they agree but it is gone or has changed.
    """
    records = [_init_of(model.path) for model in models]
    first = records[0]
    if first is None or any(record is None or record["weights"] != first["weights"] for record in records):
        return None
    for model, record in zip(models, records, strict=True):
        path = (model.path.resolve() / record["path"]).resolve() if record else None
        if path is not None and path.is_dir() and digest_weights(path) == first["weights"]:
            return path
    raise InputError(
        f"the models record {first['path']} as their common parent, but it is not there with the same weights",
        "name it: --base",
    )


def _init_of(path: Path) -> dict[str, str] | None:
    """The record {role, path, weights} of the one parent that a model was trained from."""
    parents = (read_manifest(path) or {}).get("parents")
    if not isinstance(parents, list):
        return None
    inits = [parent for parent in parents if isinstance(parent, dict) and parent.get("role") in INIT_ROLES]
    if len(inits) != 1 or not all(isinstance(inits[0].get(key), str) for key in ("path", "weights")):
        return None
    return inits[0]
