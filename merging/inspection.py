"""What a model directory holds, from its headers and its manifest; no tensor data is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, open_checkpoint
from .compatibility import tied_copies
from .header import Tensor
from .outputs import read_manifest
from .plan import group_of

__all__ = ["inspect_model"]


def inspect_model(path: Path) -> dict[str, Any]:
    """Architecture, parameters, dtypes, tied weights, shards, groups of a merge, and lineage of a model directory.

    Raises InputError for a directory that is no complete model.
    """
    model = open_checkpoint(path, "model")
    copies = tied_copies(model)
    tensors = [tensor for name, tensor in model.tensors.items() if name not in copies]
    dtypes = Counter[str]()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.count
    return {
        "path": str(path),
        "architectures": model.config.get("architectures"),
        "parameters": sum(tensor.count for tensor in tensors),
        "bytes": model.nbytes,
        "dtypes": dict(dtypes),
        "tied_embeddings": model.config.get("tie_word_embeddings"),
        "tied_copies": dict(copies),
        "shards": [{"file": file.name, "bytes": file.stat().st_size} for file in model.files],
        "groups": _groups(tensors),
        "lineage": _lineage(model),
        "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in model.tensors.values()],
    }


def _groups(tensors: list[Tensor]) -> list[dict[str, Any]]:
    """The groups that a merge by layer would make."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(group_of(tensor.name), []).append(tensor)
    return [
        {"group": name, "tensors": len(members), "parameters": sum(tensor.count for tensor in members)}
        for name, members in groups.items()
    ]


def _lineage(model: Checkpoint) -> dict[str, Any] | None:
    """The command that made the directory and what it was made from; None without a manifest."""
    manifest = read_manifest(model.path)
    if manifest is None:
        return None
    kept = ("command", "config", "parents", "seed", "started", "ended", "status")
    return {key: manifest[key] for key in kept if key in manifest}
