"""The files of an output as its manifest lists them, with those of the outputs in it: what is copied, in which order.

Files first, the manifest of each output after its files, the outermost last: a copy that was broken off has no
manifest at its top, and no command takes it for an output. Files that no manifest lists (checkpoints, logs, notes of a
user) stay where they are.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.manifest import MANIFEST, Manifest, read_manifest

__all__ = ["ListedFile", "check_names", "manifests_in", "parsed"]


@dataclass(frozen=True)
class ListedFile:
    """A file of an output. name: relative to the outermost output; digest: empty where nothing has read the file."""

    name: str
    size: int
    digest: str


def manifests_in(directory: Path) -> Iterator[str]:
    """The manifests of an output and of the outputs in it, relative, inner ones first."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from (f"{path.name}/{name}" for name in manifests_in(path))
    if (directory / MANIFEST).is_file():
        yield MANIFEST


def parsed(text: bytes, place: str) -> Manifest:
    """Return the manifest in a text of others. Raises InputError for one that is not, or of an unfinished output."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / MANIFEST).write_bytes(text)
        try:
            found = read_manifest(Path(name))
        except InputError as error:
            raise InputError(error.what.replace(name, place), "push the output again") from error
    if found is None or found.get("status") != "complete":
        raise InputError(f"{place} is not a complete output", "finish it, then push it again")
    return found


def files_of(manifest: Manifest, folder: str) -> Iterator[ListedFile]:
    """The files that a manifest in a folder lists. Raises InputError for a record that is not one."""
    for name, record in manifest.get("files", {}).items():
        size, digest = record.get("size"), record.get("digest", "")
        if not isinstance(size, int) or not isinstance(digest, str):
            raise InputError(f"{folder or '.'}/{MANIFEST}: the record of {name!r} is not one", "push the output again")
        yield ListedFile(posixpath.join(folder, name), size, digest)


def check_names(names: Iterable[str], place: str) -> None:
    """Raise InputError for a name that leads out of its folder, or that could stand for another one there."""
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or "\0" in name or {"", ".", ".."} & {*parts}:
            raise InputError(f"{place} lists the file {name!r}, which is outside of it", "it is not an output of ours")
