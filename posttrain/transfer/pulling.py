"""`gemma2 pull`: an output from another file system, verified by the digests in its manifest.

It is built in a hidden sibling (`.NAME.pull`) and appears at its place in one rename. A pull that was broken off leaves
that folder, and the same command goes on: what is there with the right digest is not fetched again.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.limits import JSON_BYTES
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import MANIFEST, Manifest
from gemma2.core.outputs.staging import check_output, check_partial, check_space, locked, publish
from gemma2.core.progress import SILENT, Progress

from .listed_files import ListedFile, check_names, files_of, parsed
from .remote_folder import RemoteFolder, open_remote

__all__ = ["Incoming", "fetched", "plan_pull", "pull_output"]


@dataclass(frozen=True)
class Incoming:
    """An output that is to be fetched. texts: its manifests by name, inner ones first; `manifest` is the outermost."""

    remote: RemoteFolder
    manifest: Manifest
    files: tuple[ListedFile, ...]
    texts: dict[str, bytes]

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(file.size for file in self.files)


def plan_pull(uri: str, out: Path, force: bool = False) -> JsonObject:
    """Return what a pull would fetch. Raises as `pull_output` before it fetches."""
    found = _look(_source_of(uri, out, force))
    check_space(out, found.bytes)
    return {
        "plan": f"pull {uri} to {out}, nothing was fetched",
        "command": found.manifest.get("command"),
        "files": len(found.files),
        "bytes": found.bytes,
    }


def pull_output(uri: str, out: Path, force: bool = False, progress: Progress = SILENT) -> JsonObject:
    """Fetch an output with the outputs in it to `out`; return what was fetched and what was here already.

    Raises InputError for a URI without a complete output and for a file that is not as its manifest says, OutputError
    for an unusable `out`.
    """
    found = _look(_source_of(uri, out, force))
    with locked(out):
        check_output(out, force)  # again: another process may have published it just before
        with fetched(found, out, progress) as (place, summary):
            publish(place, out, force)
    return {"uri": uri, "command": found.manifest.get("command"), **summary}


def _source_of(uri: str, out: Path, force: bool) -> RemoteFolder:
    """Open the URI. Raises OutputError for an unusable `out`, one that overlaps with the URI for example."""
    remote = open_remote(uri)
    check_output(out, force, {"URI": remote.local} if remote.local else None)
    return remote


def look_at_remote(uri: str) -> Incoming:
    """Return the output at a URI as its manifests describe it. Raises InputError if it is not complete."""
    return _look(open_remote(uri))


@contextmanager
def fetched(found: Incoming, out: Path, progress: Progress) -> Iterator[tuple[Path, JsonObject]]:
    """Fetch into the hidden sibling of `out`, which the caller holds; yield it, whole, and what was fetched.

    The block takes the folder away; an exception in it leaves it for the next attempt.
    """
    check_space(out, found.bytes)
    place = out.with_name(f".{out.name}.pull")
    check_partial(place)
    place.mkdir(exist_ok=True)
    _drop_others(place, {file.name for file in found.files})
    count = total = 0
    with progress.task(f"pull {posixpath.basename(found.remote.path)}", total=found.bytes, unit="bytes") as task:
        for file in found.files:
            if _is_here(file, place):
                task.advance(file.size)
                continue
            _fetch(file, found.remote, place, task.advance)
            count, total = count + 1, total + file.size
    if undigested := sum(not file.digest for file in found.files):
        progress.warn(f"{found.remote.uri}: {undigested} files have no digest in its manifest; their sizes are right")
    for name, text in found.texts.items():
        (place / name).write_bytes(text)
    yield place, {"files": len(found.files), "fetched_files": count, "fetched_bytes": total}


def _look(remote: RemoteFolder) -> Incoming:
    names = remote.names()
    if MANIFEST not in names:
        raise InputError(
            f"{remote.uri} has no {MANIFEST}: it is missing, or its push was broken off",
            "give the URI of an output, or finish its push",
        )
    check_names(names, remote.uri)
    manifests = sorted((name for name in names if posixpath.basename(name) == MANIFEST), key=lambda n: -n.count("/"))
    texts = {name: remote.text(name, JSON_BYTES) for name in manifests}
    found = {name: parsed(text, f"{remote.uri}/{name}") for name, text in texts.items()}
    files = tuple(file for name, one in found.items() for file in files_of(one, posixpath.dirname(name)))
    check_names((file.name for file in files), remote.uri)
    for file in files:
        if file.name not in names:
            raise InputError(f"{remote.uri} is not whole: {file.name} is missing", "push the output again")
    return Incoming(remote, found[MANIFEST], files, texts)


def _drop_others(place: Path, wanted: set[str]) -> None:
    """Remove what an earlier pull of something else has left."""
    for folder, _, names in os.walk(place):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() or path.relative_to(place).as_posix() not in wanted:
                path.unlink()
    for folder, names, _ in os.walk(place):
        for name in names:
            if (path := Path(folder, name)).is_symlink():
                path.unlink()


def _is_here(file: ListedFile, place: Path) -> bool:
    path = place / file.name
    if not file.digest or not path.is_file() or path.stat().st_size != file.size:
        return False
    return digest_file(path) == file.digest


def _fetch(file: ListedFile, remote: RemoteFolder, place: Path, seen: Callable[[int], None]) -> None:
    target = place / file.name
    digest = remote.fetch(file.name, target, seen)
    if target.stat().st_size != file.size or (file.digest and digest != file.digest):
        target.unlink()
        raise InputError(f"{remote.uri}/{file.name} is not as its manifest says", "push the output again")


def move_into(place: Path, target: Path) -> None:
    """Move a fetched output, without its outermost manifest, into a run directory; nothing of it is left."""
    (place / MANIFEST).unlink()
    for path in place.iterdir():
        path.rename(target / path.name)
    shutil.rmtree(place)
