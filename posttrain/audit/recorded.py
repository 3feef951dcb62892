"""The outputs of a lineage on the disk with their records, and what each says of its inputs. Reads manifests only.

A lineage begins at outputs, or at all outputs in a folder, and goes back through their parents and data. An input that
an output holds leads to that output; one that no manifest describes (a hub model, a user's file) ends there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import CHECKPOINTS, MANIFEST, SCHEMA_VERSION, read_manifest
from gemma2.posttrain.pipelines.state import read_state

__all__ = [
    "FOLDERS",
    "GIVE",
    "PIPELINE",
    "Gathered",
    "RecordedOutput",
    "Use",
    "entries",
    "gather",
    "outputs_in",
    "recorded_output",
]

GIVE = "give the output of a gemma2 command, or the folder of a pipeline"
LOGS = "logs"
PIPELINE = "pipeline"  # the command of a folder that holds only outputs
FOLDERS = ("warp", PIPELINE)  # commands whose output holds outputs that other commands made


@dataclass(frozen=True)
class RecordedOutput:
    """An output on the disk. manifest: empty where it cannot be read, and `problem` says why."""

    path: Path
    manifest: JsonMapping
    problem: str = ""

    @property
    def command(self) -> str:
        """The command that made it."""
        return str(self.manifest.get("command") or "")

    @property
    def files(self) -> dict[str, JsonMapping]:
        """Name -> size and digest of every file that it records."""
        found = self.manifest.get("files")
        entries = found.items() if isinstance(found, Mapping) else ()
        return {str(name): entry for name, entry in entries if isinstance(entry, Mapping)}

    @property
    def is_current(self) -> bool:
        """Whether its inputs are recorded as this version compares them."""
        return self.manifest.get("schema_version") == SCHEMA_VERSION


@dataclass(frozen=True)
class Use:
    """What an output records of one input.

    path     as recorded, or where the configuration names it if it is not there any more
    content  name of a part ("weights", a file; "" of a data file) -> digest
    current  whether this version records and compares inputs in the same way
    """

    user: Path
    role: str
    path: Path
    content: Mapping[str, str]
    current: bool = True

    @property
    def is_model(self) -> bool:
        """Whether the input is the directory of a model."""
        return "" not in self.content


@dataclass
class Gathered:
    """outputs: by path. uses: what they record of their inputs."""

    outputs: dict[Path, RecordedOutput] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)


def gather(paths: Iterable[Path]) -> Gathered:
    """Return the lineage of outputs, or of all outputs in folders such as that of a pipeline.

    Raises InputError for a path that neither is nor holds an output.
    """
    found = Gathered()
    waiting: list[Path] = []
    lost: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is not a directory", GIVE)
        places = [*outputs_in(path)] or [*_owner(path)]
        if not places:
            raise InputError(f"{path} holds no {MANIFEST}: nothing records what its files should be", GIVE)
        waiting += places
        lost |= {place.resolve(): problem for place, problem in _lost(path)}
    while waiting:
        place = waiting.pop(0).resolve()
        if place in found.outputs:
            continue
        output = found.outputs[place] = recorded_output(place)
        uses = [*_uses(output)]
        found.uses += uses
        waiting += [owner for use in uses for owner in _owner(use.path)]
    found.outputs |= {place: RecordedOutput(place, {}, problem) for place, problem in lost.items()}
    return found


def _lost(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the stages that a pipeline finished whose output, or whose manifest, is not there; and what is gone."""
    try:
        stages = (read_state(folder) or {}).get("stages", {})
    except InputError:  # it is for people and reports: the manifests say what is done
        return
    for name, stage in stages.items():
        place = folder / name
        if isinstance(stage, Mapping) and stage.get("status") == "complete" and not (place / MANIFEST).is_file():
            yield place, f"{place / MANIFEST if place.is_dir() else place} is gone"


def outputs_in(folder: Path) -> Iterator[Path]:
    """Yield every directory with a manifest in a folder, itself included, without hidden ones and checkpoints."""
    seen: set[Path] = set()
    for root, folders, names in os.walk(folder, followlinks=True):  # a stage may be a link to another output
        place = Path(root).resolve()
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in (CHECKPOINTS, LOGS))
        if MANIFEST in names:
            yield Path(root)


def recorded_output(place: Path) -> RecordedOutput:
    """Return the output in a directory; a manifest that cannot be read is its problem."""
    try:
        return RecordedOutput(place, {**(read_manifest(place) or {})})
    except InputError as error:
        return RecordedOutput(place, {}, error.what)


def entries(record: JsonMapping, key: str) -> list[JsonMapping]:
    """Return the records in the list under a key; malformed ones are left out."""
    found = record.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def _uses(output: RecordedOutput) -> Iterator[Use]:
    """Yield what an output records of its inputs."""
    for parent in entries(output.manifest, "parents"):
        files = parent.get("files")
        content = {str(key): str(digest) for key, digest in (files if isinstance(files, Mapping) else {}).items()}
        yield _use(output, parent, {"weights": str(parent.get("weights") or ""), **content})
    for source in entries(output.manifest, "data"):
        yield _use(output, source, {"": str(source.get("digest") or "")})


def _use(output: RecordedOutput, record: JsonMapping, content: JsonObject) -> Use:
    place = Path(os.path.normpath(output.path / str(record.get("path") or "").replace("\0", "?")))
    if not place.exists():
        place = next((path for path in _configured(output.manifest, place.name) if path.exists()), place)
    return Use(output.path, str(record.get("role") or ""), place, content, output.is_current)


def _configured(manifest: JsonMapping, name: str) -> Iterator[Path]:
    """Yield the absolute paths of this name in a configuration: a moved output still finds its inputs there."""
    config = manifest.get("config")
    for value in config.values() if isinstance(config, Mapping) else ():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and os.path.isabs(text) and "\0" not in text:
                yield from (path for path in (Path(text), Path(text, name)) if path.name == name)


def _owner(path: Path) -> Sequence[Path]:
    """Return the output that holds a file or a directory, by its manifest; none if no manifest lists it."""
    place = path.resolve()
    for folder in (place, *place.parents):
        if not (folder / MANIFEST).is_file():
            continue
        output = recorded_output(folder)
        inside = place.relative_to(folder).as_posix()
        held = any(name == inside or name.startswith(f"{inside}/") for name in output.files)
        return [folder] if folder == place or held or output.problem else []
    return []
