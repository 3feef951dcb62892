"""The directories that a merge reads, by role, without reading a weight: models, their adapters' models, the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.hub import locate_model
from gemma2.core.outputs.manifest import ParentRecord, read_manifest
from gemma2.merging.methods.request import FILES, MergeRequest, file_named
from gemma2.merging.methods.table import METHODS

__all__ = ["ADAPTED", "InputPlace", "common_parent", "input_places", "merge_files", "merge_places", "seeks_base"]

InputPlace = tuple[str, Path]  # role in the merge, directory
ADAPTED = "adapter-base"  # the role of a model that an adapter belongs to
# Roles of a parent that a model was trained from.
INIT_ROLES = ("policy-init", "policy", "model")


def merge_places(request: MergeRequest) -> list[InputPlace]:
    """Return role and directory of every model that a merge reads, in the order of its manifest: first the base.

    The base is the one that the request names, else the one that the method finds in the models' manifests.
    Raises InputError for an adapter whose model is not found.
    """
    models = [place for name in request.models for place in input_places(name, "input", request.base)]
    base = request.base
    if base is None and seeks_base(request):
        base = common_parent([path for role, path in models if role == "input"])[1]
    return [*(input_places(base, "base") if base is not None else ()), *models]


def merge_files(request: MergeRequest) -> list[tuple[str, Path]]:
    """Return option and path of every file, besides models, that a merge reads."""
    named = [(option, getattr(request, option)) for option in FILES]
    return [(option, path) for option, choice in named if choice is not None and (path := file_named(choice))]


def input_places(name: Path, role: str, base: Path | None = None) -> list[InputPlace]:
    """Return the directories of one input: a model; or an adapter and the model that it belongs to.

    Reads no header of a model. Raises InputError.
    """
    model, plus, adapter = str(name).rpartition("+")
    if plus and model and adapter and not name.exists():
        return [(role, locate_model(adapter, role)), (ADAPTED, locate_model(model, role))]
    path = locate_model(name, role)
    if not (path / "adapter_config.json").is_file():
        return [(role, path)]
    from gemma2.merging.inputs.adapter import is_adapter, open_adapter  # numba: half of the time of a check
    from gemma2.merging.inputs.resolve import model_of

    return [(role, path), (ADAPTED, model_of(open_adapter(path, role), base))] if is_adapter(path) else [(role, path)]


def seeks_base(request: MergeRequest) -> bool:
    """Whether the method takes the models' common parent as its base where none is named."""
    return METHODS[request.method].base in ("sought", "optional")


def common_parent(models: Sequence[Path]) -> tuple[str | None, Path | None]:
    """Return the model that the manifests of all the models record as their init.

    Its recorded path (None if they do not agree), and its directory (None if it is gone or has changed).
    """
    records = [_init_of(path) for path in models]
    first = records[0]
    if first is None or any(record is None or record["weights"] != first["weights"] for record in records):
        return None, None
    for model, record in zip(models, records, strict=True):
        path = (model.resolve() / record["path"]).resolve() if record else None
        if path is not None and path.is_dir() and digest_weights(path) == first["weights"]:
            return first["path"], path
    return first["path"], None


def _init_of(path: Path) -> ParentRecord | None:
    """Return the record of the one parent that a model was trained from; None if there is not exactly one."""
    parents = (read_manifest(path) or {}).get("parents")
    if not isinstance(parents, list):
        return None
    inits = [parent for parent in parents if isinstance(parent, dict) and parent.get("role") in INIT_ROLES]
    # A record that is not a path of this system, or that cannot be printed, is ignored.
    if len(inits) != 1 or not all(str(inits[0].get(key, "\0")).isprintable() for key in ("path", "weights")):
        return None
    if not all(isinstance(inits[0].get(key), str) for key in ("path", "weights")):
        return None
    return inits[0]
