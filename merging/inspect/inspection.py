"""Reports the contents of a model or adapter directory from its headers and manifest; reads no tensor data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.hub import is_hub_id, locate_model
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.safetensors_header import Tensor, weight_files
from gemma2.merging.inputs.adapter import is_adapter, open_adapter
from gemma2.merging.inputs.checkpoint import open_checkpoint
from gemma2.merging.inputs.output_heads import tied_copies
from gemma2.merging.plan.merge_plan import group_of

__all__ = ["inspect_model", "plan_inspection"]

LENGTH = 8  # bytes at the start of a file of weights that state the length of its header


def inspect_model(path: str | Path) -> JsonObject:
    """Describe a directory or a hub id: `kind` is "model" or "adapter".

    A model: architecture, parameters, dtypes, tied weights, shards, groups of a merge, lineage. An adapter: rank,
    scale, targets, and the model that it records as its base.
    Raises InputError for a directory that is not a complete model or adapter.
    """
    found = locate_model(path, "model")
    return _adapter(found) if is_adapter(found) else _model(found)


def plan_inspection(path: str | Path) -> JsonObject:
    """What `inspect_model` would read of a model or adapter: its files of weights, and the bytes of their headers.

    Of a hub id that is not in the cache nothing is known before it is fetched, which this does not do.
    """
    if is_hub_id(path):
        return {"files": [], "fetched": f"{path}, from the hub if it is not in its cache"}
    found = locate_model(path, "model")
    files = weight_files(found)
    return {"files": [file.name for file in files], "header_bytes": sum(_header_bytes(file) for file in files)}


def _header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return LENGTH + int.from_bytes(opened.read(LENGTH), "little")


def _model(path: Path) -> JsonObject:
    model = open_checkpoint(path, "model")
    copies = tied_copies(model)
    tensors = [tensor for name, tensor in model.tensors.items() if name not in copies]
    return {
        "kind": "model",
        "path": str(path),
        "architectures": model.config.get("architectures"),
        "parameters": sum(tensor.count for tensor in tensors),
        "bytes": model.nbytes,
        "dtypes": _dtypes(tensors),
        "tied_embeddings": model.config.get("tie_word_embeddings"),
        "tied_copies": dict(copies),
        "shards": [{"file": file.name, "bytes": file.stat().st_size} for file in model.files],
        "groups": _groups(tensors),
        "lineage": _lineage(path),
        "warnings": list(model.doubts),
        "tensors": _listed(model.tensors.values()),
    }


def _adapter(path: Path) -> JsonObject:
    adapter = open_adapter(path, "adapter")
    tensors = list(adapter.tensors.values())
    targets = Counter(name.removesuffix(".weight").rsplit(".", 1)[-1] for name in adapter.updates)
    return {
        "kind": "adapter",
        "path": str(path),
        "base_model": adapter.base_model_name,
        "rank": sorted({update.rank for update in adapter.updates.values()}),
        "scale": sorted({update.scale for update in adapter.updates.values()}),
        "targets": dict(targets),
        "replaced": list(adapter.replaced),
        "parameters": sum(tensor.count for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": _dtypes(tensors),
        "updates": [
            {"tensor": name, "shape": list(update.shape), "rank": update.rank, "scale": update.scale}
            for name, update in adapter.updates.items()
        ],
        "lineage": _lineage(path),
        "tensors": _listed(tensors),
    }


def _dtypes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Return the number of parameters by dtype."""
    dtypes = Counter[str]()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.count
    return dict(dtypes)


def _listed(tensors: Iterable[Tensor]) -> list[JsonObject]:
    return [{"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in tensors]


def _groups(tensors: list[Tensor]) -> list[JsonObject]:
    """Return the groups that a merge by layer would make."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(group_of(tensor.name), []).append(tensor)
    return [
        {"group": name, "tensors": len(members), "parameters": sum(tensor.count for tensor in members)}
        for name, members in groups.items()
    ]


def _lineage(path: Path) -> JsonObject | None:
    """Return the command that made the directory, its settings and parents; None without a manifest."""
    manifest: JsonMapping | None = read_manifest(path)
    if manifest is None:
        return None
    kept = ("command", "config", "parents", "seed", "started", "ended", "status")
    return {key: value for key, value in manifest.items() if key in kept}
