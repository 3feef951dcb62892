"""gemma2.json: whether an output of this suite is complete, unchanged, and knows its parents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import MANIFEST, Manifest, read_manifest
from gemma2.core.outputs.promised import fault_of
from gemma2.core.outputs.safetensors_header import printable

from .finding import Check, Depth, Diagnosis, fine, problem, warning
from .subject import ADAPTER, OUTPUT, POLICY, REWARD, Subject

__all__ = ["CHECKS"]

ALL = frozenset({POLICY, REWARD, ADAPTER, OUTPUT})


def _record(subject: Subject) -> Manifest | None:
    if not (subject.path / MANIFEST).exists():
        return None
    try:
        return read_manifest(subject.path)
    except InputError:
        return None


def _complete(subject: Subject) -> Iterator[Diagnosis]:
    if not (subject.path / MANIFEST).exists():
        return
    fault = fault_of(subject.path)
    if fault:
        yield problem(f"it {fault}", "make it again: --resume, or gemma2 verify --fix")
    else:
        record = _record(subject) or Manifest()
        yield fine(f"made by gemma2 {printable(str(record.get('command')))}")


def _digests(subject: Subject) -> Iterator[Diagnosis]:
    record = _record(subject)
    if record is None or fault_of(subject.path):
        return
    files = record.get("files", {})
    recorded = {name: one["digest"] for name, one in files.items() if one.get("digest")}
    changed = sorted(name for name, digest in recorded.items() if digest_file(subject.path / name) != digest)
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        yield problem(f"{printable(changed[0])}{more} changed after it was made", "restore it, or gemma2 verify --fix")
    else:
        yield fine(f"{len(recorded)} files as recorded")


def _parents(subject: Subject) -> Iterator[Diagnosis]:
    record = _record(subject)
    if record is None:
        return
    parents = record.get("parents", [])
    gone = [one["path"] for one in parents if "path" in one and not (subject.path / Path(one["path"])).exists()]
    if gone:
        yield warning(f"made from {printable(gone[0])}, which is gone: it cannot be made again", "keep its parents")
    elif parents:
        yield fine(f"{len(parents)} parents found")


CHECKS = (
    Check("manifest", "an output of gemma2: complete, every file with its size", Depth.QUICK, ALL, _complete),
    Check("digests", "every file with its recorded digest", Depth.FULL, ALL, _digests),
    Check("parents", "the models that it was made from are there", Depth.QUICK, ALL, _parents),
)
