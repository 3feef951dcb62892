"""What an output was made from, back to its roots, read from the manifests on the way: `gemma2 lineage`. Torch-free.

A parent is followed where its weights are those that were used; where it is not there, or has other weights, the graph
says so and ends. Rows count too: a data file of an output (generate, filter, reward pairs, pareto) leads to what that
was made from. Files that no manifest describes, hub models and directories without a manifest are roots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError
from gemma2.core.outputs.digests import digest_input, digest_weights
from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.core.outputs.safetensors_header import weight_files

from .graph.graph import graph_of
from .graph.render import Edge, Node
from .plots.values import short_hash

__all__ = ["Lineage", "Origin", "final_output", "read_lineage"]

PIPELINE = "pipeline.json"
COLLECTIONS = ("quickstart", "warp", "pipeline")  # commands whose output is a folder of outputs
THREADS = min(8, os.cpu_count() or 1)  # for weights that no manifest vouches for


@dataclass(frozen=True)
class Origin:
    """One thing that the result was made from, or the result.

    kind    output (of a command), model (a directory without a manifest), hub, file
    digest  of the weights or of the file, as they were used; of an output without weights, of its first data file
    note    what is wrong with it; "" when it is there and unchanged
    """

    id: str
    name: str
    kind: str
    path: str
    command: str = ""
    digest: str = ""
    note: str = ""


@dataclass(frozen=True)
class Lineage:
    """`origins` in topological order, the result last; `uses` are (what is used, by what, in which role) by id."""

    result: str
    origins: Sequence[Origin]
    uses: Sequence[tuple[str, str, str]]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        edges = [{"source": source, "target": target, "role": role} for source, target, role in self.uses]
        return {"result": self.result, "nodes": [asdict(origin) for origin in self.origins], "edges": edges}

    def drawn(self) -> tuple[list[Node], list[Edge]]:
        """For reporting.dag."""
        nodes = [
            Node(
                origin.id,
                origin.name,
                " ".join(text for text in (origin.command, short_hash(origin.digest)[:7]) if text),
                origin.note,
                "\n".join(text for text in (origin.path, origin.digest) if text),
            )
            for origin in self.origins
        ]
        return nodes, [Edge(*use) for use in self.uses]


# --- where to begin -------------------------------------------------------------------------------------------------


def final_output(directory: Path) -> Path:
    """The output that a directory stands for: itself, or of a pipeline its last stage.

    Raises InputError for what is neither, and for a pipeline that ends in several results.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory", "give the output of a gemma2 command, or a model")
    manifest = read_manifest(directory)
    if not (directory / PIPELINE).is_file() and manifest and manifest.get("command") not in COLLECTIONS:
        return directory
    ends = pipeline_ends(directory)
    if len(ends) == 1:
        return ends[0]
    if ends:
        names = ", ".join(path.relative_to(directory).as_posix() for path in ends[:8])
        raise InputError(f"{directory} is a pipeline with several results", f"name one of them: {names}")
    if manifest or weight_files(directory):
        return directory
    raise InputError(f"{directory} holds no {MANIFEST} and no model", "give the output of a gemma2 command, or a model")


def pipeline_ends(directory: Path) -> list[Path]:
    """The finished stages that no other uses; of several, the one called `model`."""
    stages = (read_json(directory / PIPELINE) or {}).get("stages")
    stages = stages if isinstance(stages, Mapping) else {}
    described = [stage for stage in stages.values() if isinstance(stage, Mapping)]
    needed = {name for stage in described for name in stage.get("needs") or () if isinstance(name, str)}
    places = [inside(directory, name) for name in stages if name not in needed]
    found = [place for place in places if place and (place / MANIFEST).is_file()]
    models = [place for place in found if place.name == "model"]
    if not found:
        models = [path.parent for at in ("model", "*/model") for path in sorted(directory.glob(f"{at}/{MANIFEST}"))]
    return models if len(models) == 1 else found or models


def inside(directory: Path, name: str) -> Path | None:
    """The folder of a stage, where its name stays inside the pipeline's."""
    parts = Path(name).parts
    return directory / name if parts and not Path(name).is_absolute() and ".." not in parts else None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is none. Raises InputError when it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__})", "name a stage of the pipeline") from error
    return found if isinstance(found, dict) else None


# --- the walk -------------------------------------------------------------------------------------------------------


def read_lineage(directory: Path) -> Lineage:
    """The graph of what `directory`, an output or a model, was made from.

    Raises InputError when `directory` itself is neither, or its manifest cannot be read.
    """
    start = final_output(directory).resolve()
    read_manifest(start)
    walk = Walk()
    result = walk.output(start)
    while walk.waiting:
        walk.follow(walk.waiting.pop(0))
    names = named(walk.found)
    nodes = [Node(key, key) for key in walk.found]
    order = list(graph_of(nodes, [Edge(*use) for use in walk.uses]).nodes)
    ids = {key: f"n{i}" for i, key in enumerate(order)}
    origins = [replace(walk.found[key], id=ids[key], name=names[key]) for key in order]
    uses = [(ids[source], ids[target], role) for source, target, role in walk.uses]
    return Lineage(ids[result], origins, uses)


@dataclass
class Walk:
    """What was found so far, by key; keys of outputs whose manifests are still to be read."""

    found: dict[str, Origin] = field(default_factory=dict)
    uses: list[tuple[str, str, str]] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def add(self, origin: Origin, key: str) -> str:
        """Remember it, once."""
        self.found.setdefault(key, origin)
        return key

    def output(self, path: Path) -> str:
        """A directory that is as it was when it was used. Raises InputError for a manifest that cannot be read."""
        key = str(path)
        if key in self.found:
            return key
        digest = digest_weights(path, THREADS) if weight_files(path) else ""
        manifest = read_manifest(path)
        if manifest is None:
            return self.add(Origin("", path.name, "model", key, "", digest), key)
        status = str(manifest.get("status"))
        self.waiting.append(key)
        command = str(manifest.get("command") or "")
        digest = digest or first_digest(manifest)
        return self.add(
            Origin("", path.name, "output", key, command, digest, "" if status == "complete" else status), key
        )

    def follow(self, key: str) -> None:
        """Read the parents and the data of an output."""
        directory = Path(key)
        manifest = read_manifest(directory) or {}
        for parent in entries(manifest, "parents"):
            self.use(self.parent(directory, parent, manifest), key, str(parent.get("role") or ""))
        for source in entries(manifest, "data"):
            path = Path(os.path.normpath(directory / str(source.get("path"))))
            role = path.stem.partition("-")[0] if path.stem.startswith("data-") else path.stem
            self.use(self.data(path, str(source.get("digest"))), key, role)

    def use(self, source: str, target: str, role: str) -> None:
        if (source, target, role) not in self.uses:
            self.uses.append((source, target, role))

    def parent(self, directory: Path, parent: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
        """A model that was used: followed where it is unchanged."""
        used = str(parent.get("weights") or "")
        place = Path(os.path.normpath(directory / str(parent.get("path"))))
        if parent.get("hub"):
            name = str(parent["hub"])
            return self.add(Origin("", name, "hub", "", "", used), f"hub {name}")
        for path in [place, *configured(manifest)]:
            if state_of(path) == (used, ""):
                return self.output(path)
        there, problem = state_of(place)
        note = problem or f"changed: weights {short_hash(there)}"
        # By its weights: two results that were made from the same lost model share it.
        return self.add(Origin("", place.name, "model", str(place), "", used, note), f"{used} {place}")

    def data(self, path: Path, used: str) -> str:
        """A data file that was used; the output that it lies in, where it does."""
        try:
            there = digest_input(path, THREADS) if path.is_file() else ""
            if there == used and (path.parent / MANIFEST).is_file():
                return self.output(path.parent)
            problem = f"changed: {short_hash(there)}" if there else "not there"
        except (OSError, InputError):
            there, problem = "", "cannot be read"
        note = "" if there == used else problem
        return self.add(Origin("", path.name, "file", str(path), "", used, note), f"{used} {path}")


def entries(manifest: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The records under a key, as far as they are some."""
    found = manifest.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def configured(manifest: Mapping[str, Any]) -> Iterator[Path]:
    """The directories that a configuration names: an output that was moved still finds its parents there."""
    config = manifest.get("config")
    for value in config.values() if isinstance(config, Mapping) else ():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and os.path.isabs(text) and "\0" not in text:
                yield Path(os.path.normpath(text))


def state_of(path: Path) -> tuple[str, str]:
    """The digest of a directory's weights, and what is wrong with it: one of them is ""."""
    try:
        if not path.is_dir():
            return "", "not there"
        read_manifest(path)
        return (digest_weights(path, THREADS), "") if weight_files(path) else ("", "has no weights")
    except InputError:
        return "", f"{MANIFEST} cannot be read"
    except OSError:
        return "", "cannot be read"


def first_digest(manifest: Mapping[str, Any]) -> str:
    """Of an output without weights: the digest of its first file of rows or points."""
    files = manifest.get("files")
    for name, entry in sorted(files.items()) if isinstance(files, Mapping) else ():
        if name.endswith((".jsonl", ".json")) and isinstance(entry, Mapping) and entry.get("digest"):
            return str(entry["digest"])
    return ""


def named(origins: Mapping[str, Origin]) -> dict[str, str]:
    """What each is called, by its key: the path below the folder that holds all outputs, outside it in full."""
    outputs = [origin.path for origin in origins.values() if origin.kind == "output"]
    common = os.path.commonpath(outputs or ["/"])
    if common in outputs:
        common = os.path.dirname(common)
    names = {}
    for key, origin in origins.items():
        path = origin.path
        below = path.startswith(common.rstrip("/") + "/") and common != "/"
        names[key] = os.path.relpath(path, common) if path and below else path or origin.name
    return names
