"""Outputs of other pipelines that a stage need not make again (`--reuse DIR`): found by their hash, linked, not copied.

An output can stand for a stage if it was made from the same (equal hashes, see provenance/origin.py) by the same
arithmetic (provenance/version_rule.py), and is whole. Its files are hard links where the disk allows that, else copies;
its manifest gets the places of this pipeline's inputs, and says where it comes from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, write_json
from gemma2.core.outputs.manifest import CHECKPOINTS, MANIFEST, SCHEMA_VERSION, read_manifest
from gemma2.core.outputs.staging import staged_output
from gemma2.posttrain.provenance.origin import hash_of, origin_of
from gemma2.posttrain.provenance.output_state import broken_files
from gemma2.posttrain.provenance.version_rule import deciding_changes
from gemma2.posttrain.runs.commands import output_hash
from gemma2.posttrain.schemas.config import Config

__all__ = ["NO_SHELF", "Shelf", "take"]

DEEPEST = 8  # folders below a directory that is searched
SKIPPED = ("logs", CHECKPOINTS)


@dataclass(frozen=True)
class Shelf:
    """The outputs below some directories."""

    directories: Sequence[Path] = ()
    found: dict[str, Path | None] = field(default_factory=dict, compare=False)  # hash -> what stands for it

    @cached_property
    def outputs(self) -> dict[str, list[Path]]:
        """Hash -> outputs, in the order of the directories."""
        found: dict[str, list[Path]] = {}
        for directory in self.directories:
            for path, manifest in _outputs(directory.resolve(), DEEPEST):
                found.setdefault(output_hash(manifest), []).append(path)
        return found

    def output_for(self, command: str, config: Config, out: Path) -> Path | None:
        """Return a whole output of the same work by the same arithmetic, other than `out`; None without one."""
        if not self.directories:
            return None
        wanted = hash_of(origin_of(command, config, out), type(config))
        if wanted not in self.found:
            there = (path for path in self.outputs.get(wanted, ()) if path != out.resolve())
            self.found[wanted] = next((path for path in there if _is_whole(path, command)), None)
        return self.found[wanted]


NO_SHELF = Shelf()


def _outputs(directory: Path, depth: int) -> Iterator[tuple[Path, JsonMapping]]:
    """Yield every complete output below a directory, but none inside another one."""
    try:
        manifest = read_manifest(directory)
        inside = sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
    except (InputError, OSError):
        return
    if manifest is not None and _is_usable({**manifest}):
        yield directory, {**manifest}
    if depth:
        for path in inside:
            if not path.name.startswith(".") and path.name not in SKIPPED:
                yield from _outputs(path, depth - 1)


def _is_usable(manifest: JsonMapping) -> bool:
    """Whether a manifest is of a finished output of this version, with files that stay in its directory."""
    names = manifest.get("files") or {}
    complete = manifest.get("status") == "complete" and manifest.get("schema_version") == SCHEMA_VERSION
    return complete and bool(names) and all(map(_is_inside, names))


def _is_inside(name: str) -> bool:
    """Whether a name in a manifest stays in its directory: a manifest is data, and may say anything."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _is_whole(path: Path, command: str) -> bool:
    """Whether an output is all there by the arithmetic of now, and its manifest lists all of it.

    One that holds other outputs (those of `tiny` and `warp`) does not list them, and is made again.
    """
    manifest = read_manifest(path)
    if manifest is None or any(path.glob(f"*/{MANIFEST}")) or deciding_changes(command, {**manifest}):
        return False
    return next(iter(broken_files(manifest, path)), None) is None


def take(source: Path, command: str, config: Config, out: Path) -> JsonObject:
    """Put the output in `source` at `out`, in the place of what is there; return its manifest. Raises OutputError."""
    manifest: JsonObject = {**(read_manifest(source) or {})}
    origin = origin_of(command, config, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with staged_output(out, force=True) as temporary:
        for name in manifest["files"]:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            if (source / name).is_file():  # a picture may be gone
                _link(source / name, temporary / name)
        places = {key: origin[key] for key in ("parents", "data")}
        reused = os.path.relpath(source.resolve(), out.resolve())
        manifest = {**manifest, **places, "reused_from": reused}
        write_json(temporary / MANIFEST, manifest)
    return manifest


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
