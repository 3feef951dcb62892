"""Inputs of a merge: model directories, hub ids, LoRA adapters with their base, all as checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.hub import is_hub_id
from gemma2.core.outputs.safetensors_header import printable
from gemma2.merging.remote.arrivals import ON_DISK, Arrivals

from .adapter import Adapter, check_adapter, is_adapter, open_adapter
from .checkpoint import Checkpoint, open_checkpoint
from .output_heads import with_adapted_head, without_copy
from .tied_adapter import without_tied_head

__all__ = ["model_of", "open_input"]


def open_input(name: Path, role: str, base: Path | None = None, arrivals: Arrivals = ON_DISK) -> Checkpoint:
    """Open a model, `MODEL+ADAPTER`, or an adapter alone, whose model is the one that it records, else `base`.

    Reads headers only. Raises InputError.
    """
    model, plus, adapter = str(name).rpartition("+")
    if plus and model and adapter and not name.exists():
        return _adapted(
            open_adapter(arrivals.locate(Path(adapter), role), role, arrivals),
            open_checkpoint(arrivals.locate(Path(model), role), role, arrivals),
        )
    path = arrivals.locate(name, role)
    if not is_adapter(path, arrivals):
        return without_copy(open_checkpoint(path, role, arrivals))
    found = open_adapter(path, role, arrivals)
    place = model_of(found, base, arrivals)
    return _adapted(found, open_checkpoint(place, f"the model of the adapter {path}", arrivals))


def model_of(adapter: Adapter, base: Path | None, arrivals: Arrivals = ON_DISK) -> Path:
    """Return the directory of the model that an adapter belongs to."""
    recorded = adapter.base_model_name
    if recorded is not None:
        for place in (Path(recorded), adapter.path / recorded):
            if place.is_dir():
                return place
        if base is None and is_hub_id(recorded):
            return arrivals.locate(Path(recorded), f"the model of the adapter {adapter.path}")
    if base is None:
        raise InputError(
            f"{adapter} is an adapter, and its model {printable(recorded or '(not recorded)')} was not found",
            f"name it: MODEL+{adapter.path}",
        )
    return arrivals.locate(base, "base")


def _adapted(adapter: Adapter, model: Checkpoint) -> Checkpoint:
    """Return the model with the adapter's updates, as one checkpoint named after the adapter."""
    adapter = without_tied_head(adapter, model)
    model = with_adapted_head(without_copy(model), adapter)
    check_adapter(adapter, model)
    return replace(
        model,
        role=adapter.role,
        path=adapter.path,
        origin=model.origin,
        tensors={name: adapter.replaced.get(name, tensor) for name, tensor in model.tensors.items()},
        updates=adapter.updates,
    )
