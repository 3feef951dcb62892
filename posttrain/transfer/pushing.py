"""`gemma2 push`: outputs to a folder of another file system, URI/NAME for each, verified there by their digests.

    a file there with the right size and digest    is left
    any other                                      is sent, read back, and compared
    gemma2.json                                    comes last

A push that was broken off has no manifest there, so nothing takes it for an output; the same command goes on.
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.limits import JSON_BYTES
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.outputs.promised import fault_of
from gemma2.core.progress import SILENT, Progress

from .listed_files import ListedFile, files_of, manifests_in, parsed
from .remote_folder import RemoteFolder, open_remote

__all__ = ["plan_push", "push_outputs"]

VERIFY = "make it again, or see what `gemma2 verify --fix` says"


@dataclass(frozen=True)
class Outgoing:
    """An output that is to be copied. texts: its manifests, by name, inner ones first."""

    place: Path
    name: str
    files: Sequence[ListedFile]
    texts: dict[str, bytes]

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(file.size for file in self.files)


def plan_push(uri: str, outputs: Sequence[Path]) -> JsonObject:
    """Return what a push would copy, without a connection. Raises as `push_outputs` for what is here."""
    _check_places(open_remote(uri), outputs)
    rows = [
        {"output": str(one.place), "uri": _joined(uri, one.name), "files": len(one.files), "bytes": one.bytes}
        for one in _outgoing(outputs)
    ]
    plan = f"push {len(rows)} outputs to {uri}, nothing was sent"
    return {"plan": plan, "bytes": sum(_of(rows, "bytes")), "outputs": rows}


def push_outputs(uri: str, outputs: Sequence[Path], force: bool = False, progress: Progress = SILENT) -> JsonObject:
    """Copy outputs; return what was sent and what was there already.

    Raises InputError for an output that is incomplete or not as its manifest says, OutputError for another output in
    its place (without `force`), and for a file that is not read back as it was sent.
    """
    remote = open_remote(uri)
    _check_places(remote, outputs)
    outgoing = _outgoing(outputs)
    if remote.local is None and remote.size(MANIFEST) is not None:
        raise OutputError(f"{uri} is an output, into which nothing is copied", "give the folder that is to hold both")
    rows = [_push(one, remote.below(one.name), force, progress) for one in outgoing]
    return {"sent_files": sum(_of(rows, "sent_files")), "sent_bytes": sum(_of(rows, "sent_bytes")), "outputs": rows}


def _of(rows: Sequence[JsonObject], key: str) -> list[int]:
    return [row[key] for row in rows]


def _joined(uri: str, name: str) -> str:
    return f"{uri.rstrip('/')}/{name}"


def _check_places(remote: RemoteFolder, outputs: Sequence[Path]) -> None:
    """Refuse arguments in the order of `cp`, a folder in an output, and a copy that would meet what it is made from.

    Raises UsageError for the order, OutputError for the folder.
    """
    here = remote.local
    last = _as_given(outputs[-1])
    if here is not None and (here / MANIFEST).is_file() and fault_of(outputs[-1]):
        words = shlex.join(["gemma2", "push", last, remote.uri, *map(str, outputs[:-1])])
        raise UsageError(f"{remote.uri} is an output, and {last} is not one", f"the URI comes first: {words}")
    if here is None:
        return
    for folder in (here, *here.parents):
        if (folder / MANIFEST).is_file():
            raise OutputError(
                f"{remote.uri} is in the output {folder}, into which nothing is copied"
                if folder != here
                else f"{remote.uri} is an output, into which nothing is copied",
                "the URI comes first, then the outputs: give the folder that is to hold the copies",
            )
    for place in outputs:
        source, target = place.resolve(), here / _name(place)
        if target == source or target in source.parents or source in target.parents:
            raise OutputError(f"{_joined(remote.uri, _name(place))} and the output {place} overlap", "give another URI")


def _as_given(place: Path) -> str:
    """An argument as it was typed: a path has one slash where the address of a store has two."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*):/(?=[^/])", r"\1://", str(place))


def _name(place: Path) -> str:
    return Path(os.path.abspath(place)).name


def _outgoing(outputs: Sequence[Path]) -> list[Outgoing]:
    found = [_read(place) for place in outputs]
    names = [one.name for one in found]
    for one in found:
        if names.count(one.name) > 1:
            raise UsageError(f"two outputs are called {one.name}", "push them one by one, to different folders")
    return found


def _read(place: Path) -> Outgoing:
    """The files of an output. Raises InputError for one that is not complete."""
    name = _name(place)
    fault = fault_of(place) if place.is_dir() else "is not a directory"
    if fault:
        raise InputError(f"{_as_given(place)} {fault}", "push outputs that are complete")
    texts = {name: (place / name).read_bytes() for name in manifests_in(place)}
    files: list[ListedFile] = []
    for manifest, text in texts.items():
        folder = posixpath.dirname(manifest)
        if folder and (fault := fault_of(place / folder)):
            raise InputError(f"{place / folder} {fault}", "push outputs that are complete")
        files += files_of(parsed(text, str(place / manifest)), folder)
    return Outgoing(place, name, files, texts)


def _push(one: Outgoing, remote: RemoteFolder, force: bool, progress: Progress) -> JsonObject:
    _make_room(one, remote, force)
    sent: list[ListedFile] = []
    undigested = 0
    # Each byte is counted when it is sent and when it is read back.
    with progress.task(f"push {one.name}", total=2 * one.bytes, unit="bytes") as task:
        for file in one.files:
            undigested += not file.digest
            if _is_there(file, remote, task.advance):
                task.advance(file.size)
                continue
            _send(file, one.place, remote, task.advance)
            sent.append(file)
    for name, text in one.texts.items():
        if remote.size(name) != len(text) or remote.text(name, JSON_BYTES) != text:
            remote.put_whole(name, text)
            if remote.text(name, JSON_BYTES) != text:
                raise OutputError(f"{remote.uri}/{name} is not read back as it was sent", "start the command again")
    if undigested:
        progress.warn(f"{one.place}: {undigested} files have no digest in its manifest; they are as they were sent")
    return {
        "output": str(one.place),
        "uri": remote.uri,
        "files": len(one.files),
        "sent_files": len(sent),
        "sent_bytes": sum(file.size for file in sent),
    }


def _make_room(one: Outgoing, remote: RemoteFolder, force: bool) -> None:
    """Refuse a folder that holds something else; with `force` take that away, its manifests first."""
    there = remote.names()
    wanted = {file.name for file in one.files} | one.texts.keys()
    strange = [name for name in there if name not in wanted and not _is_aside(name)]
    other = MANIFEST in there and remote.text(MANIFEST, JSON_BYTES) != one.texts[MANIFEST]
    if not force and (other or strange):
        what = "another output" if other else f"{strange[0]}, which is not a file of this output"
        raise OutputError(f"{remote.uri} holds {what}", "replace it with --force, or give another URI")
    manifests = [name for name in there if posixpath.basename(name) == MANIFEST]
    if other:
        for name in sorted(manifests, key=lambda name: name.count("/")):
            remote.remove(name)
    for name in strange:
        remote.remove(name)


def _is_aside(name: str) -> bool:
    """Whether a file is a manifest that was broken off before it was renamed."""
    return posixpath.basename(name) == f".{MANIFEST}.tmp"


def _is_there(file: ListedFile, remote: RemoteFolder, seen: Callable[[int], None]) -> bool:
    """Whether a file has arrived before."""
    if not file.digest or remote.size(file.name) != file.size:
        return False
    return remote.digest(file.name, seen) == file.digest


def _send(file: ListedFile, place: Path, remote: RemoteFolder, seen: Callable[[int], None]) -> None:
    digest = remote.send(file.name, place / file.name, seen)
    if file.digest and digest != file.digest:
        raise InputError(f"{place / file.name} is not as its manifest says", VERIFY)
    if remote.digest(file.name, seen) != digest:
        raise OutputError(f"{remote.uri}/{file.name} is not read back as it was sent", "start the command again")
