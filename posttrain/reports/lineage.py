"""The lineage of an output back to its roots, read from manifests: `gemma2 lineage`. Torch-free.

A parent is followed if its weights are those that were used; if it is missing or has other weights, the graph says so
and ends there. Rows count too: a data file in an output (generate, filter, reward pairs, pareto) is followed to the
sources of that output. Files that no manifest describes, hub models and directories without a manifest are roots.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, load_json
from gemma2.core.outputs.digests import digest_input, digest_weights
from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.core.outputs.safetensors_header import weight_files

from .graph.graph import graph_of
from .graph.render import Edge, Node
from .plots.values import short_hash

__all__ = ["Lineage", "Origin", "final_output", "read_lineage"]

PIPELINE = "pipeline.json"
COLLECTIONS = ("quickstart", "warp", "pipeline")  # commands whose output is a folder of outputs
THREADS = min(8, os.cpu_count() or 1)  # for weights whose digest no manifest records


@dataclass(frozen=True)
class Origin:
    """A source of the result, or the result itself.

    kind    output (of a command), model (a directory without a manifest), hub, file
    digest  of the weights or the file at the time of use; for an output without weights, of its first data file
    note    the problem with it; "" if it exists unchanged
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
    """`origins` in topological order, the result last; `uses` are (id used, id of the user, role)."""

    result: str
    origins: Sequence[Origin]
    uses: Sequence[tuple[str, str, str]]

    def document(self) -> JsonObject:
        """The lineage as a JSON document."""
        edges = [{"source": source, "target": target, "role": role} for source, target, role in self.uses]
        return {"result": self.result, "nodes": [asdict(origin) for origin in self.origins], "edges": edges}

    def drawn(self) -> tuple[list[Node], list[Edge]]:
        """The lineage as nodes and edges to draw."""
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
    """The output that a directory stands for: itself, or the last stage of a pipeline.

    Raises InputError if it is neither an output nor a pipeline, or a pipeline with several results.
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
    """The finished stages that no other stage uses; the one named `model` if it is among them."""
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
    """The folder of a stage, or None if its name leads outside the folder of the pipeline."""
    parts = Path(name).parts
    return directory / name if parts and not Path(name).is_absolute() and ".." not in parts else None


def read_json(path: Path) -> JsonObject | None:
    """The JSON object in a file, or None if it is missing. Raises InputError if the file cannot be read."""
    try:
        found = load_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__})", "name a stage of the pipeline") from error
    return found if isinstance(found, dict) else None


# --- the walk -------------------------------------------------------------------------------------------------------


def read_lineage(directory: Path) -> Lineage:
    """The lineage of `directory`, an output or a model.

    Raises InputError if `directory` is neither, or its manifest cannot be read.
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
    """Origins found so far by key, and the keys of outputs whose manifests are still to be read."""

    found: dict[str, Origin] = field(default_factory=dict)
    uses: list[tuple[str, str, str]] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def add(self, origin: Origin, key: str) -> str:
        """Store an origin under its key, unless the key is known; returns the key."""
        self.found.setdefault(key, origin)
        return key

    def output(self, path: Path) -> str:
        """Add a directory that is unchanged since its use; returns its key. Raises InputError for a bad manifest."""
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
        """Add the parents and the data of an output."""
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

    def parent(self, directory: Path, parent: JsonMapping, manifest: JsonMapping) -> str:
        """Add a model that was used, to be followed if it is unchanged; returns its key."""
        used = str(parent.get("weights") or "")
        place = Path(os.path.normpath(directory / str(parent.get("path"))))
        if parent.get("hub"):
            name = str(parent["hub"])
            return self.add(Origin("", name, "hub", "", "", used), f"hub {name}")
        for path in [place, *configured(manifest)]:
            if state_of(path) == (used, ""):
                return self.output(path)
        present, problem = state_of(place)
        note = problem or f"changed: weights {short_hash(present)}"
        # The key has the weights, so that two results made from the same lost model share one node.
        return self.add(Origin("", place.name, "model", str(place), "", used, note), f"{used} {place}")

    def data(self, path: Path, used: str) -> str:
        """Add a data file that was used, or the output that contains it; returns its key."""
        try:
            present = digest_input(path, THREADS) if path.is_file() else ""
            if present == used and (path.parent / MANIFEST).is_file():
                return self.output(path.parent)
            problem = f"changed: {short_hash(present)}" if present else "not there"
        except (OSError, InputError):
            present, problem = "", "cannot be read"
        note = "" if present == used else problem
        return self.add(Origin("", path.name, "file", str(path), "", used, note), f"{used} {path}")


def entries(manifest: JsonMapping, key: str) -> list[JsonMapping]:
    """The records in the list under a key; malformed ones are left out."""
    found = manifest.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def configured(manifest: JsonMapping) -> Iterator[Path]:
    """Yield the absolute paths in a configuration: a moved output still finds its parents there."""
    config = manifest.get("config")
    for value in config.values() if isinstance(config, Mapping) else ():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and os.path.isabs(text) and "\0" not in text:
                yield Path(os.path.normpath(text))


def state_of(path: Path) -> tuple[str, str]:
    """The digest of a directory's weights, and the problem with it; one of the two is ""."""
    try:
        if not path.is_dir():
            return "", "not there"
        read_manifest(path)
    except InputError:
        return "", f"{MANIFEST} cannot be read"
    try:
        return (digest_weights(path, THREADS), "") if weight_files(path) else ("", "has no weights")
    except InputError:
        return "", "has broken weights"
    except OSError:
        return "", "cannot be read"


def first_digest(manifest: JsonMapping) -> str:
    """The digest of an output's first file of rows or points, for outputs without weights."""
    files = manifest.get("files")
    for name, entry in sorted(files.items()) if isinstance(files, Mapping) else ():
        if name.endswith((".jsonl", ".json")) and isinstance(entry, Mapping) and entry.get("digest"):
            return str(entry["digest"])
    return ""


def named(origins: Mapping[str, Origin]) -> dict[str, str]:
    """Name of each origin by key: the path relative to the folder that holds all outputs, outside it the full path."""
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
