"""Links in a model directory that lead out of it: an output would take in the file that they point to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gemma2.core.errors import InputError

__all__ = ["refuse_irregular", "refuse_outside_links"]


def refuse_irregular(directory: Path, names: Iterable[str]) -> None:
    """Raise InputError for an entry of these names that is not a file: a link to nothing, a pipe, a folder.

    The libraries take it as missing, and something else in its place.
    """
    for name in names:
        path = directory / name
        if os.path.lexists(path) and not path.is_file():
            what = f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "is not a file"
            raise InputError(f"{path} {what}", "restore the file, or remove it")


def refuse_outside_links(directory: Path, names: Iterable[str]) -> None:
    """Raise InputError for a file of these names that is a link out of the directory.

    A model in the hub's cache may link to the blobs of its repository: `models--*/snapshots/* -> models--*/blobs`.
    """
    names = tuple(names)
    refuse_irregular(directory, names)
    home = directory.resolve()
    cache = home.parents[1] if len(home.parents) > 1 and home.parent.name == "snapshots" else None
    for name in names:
        path = directory / name
        if not path.is_symlink():
            continue
        target = path.resolve()
        blobs = cache is not None and cache.name.startswith("models--") and target.is_relative_to(cache / "blobs")
        if not target.is_relative_to(home) and not blobs:
            raise InputError(f"{path} is a link to a file elsewhere", "copy the file into the model's directory")
