"""Every file of a lineage on the disk against the digests that manifests record: `gemma2 verify`.

    what an output records of its files    size and digest of the bytes
    what its users record of it            tensors, and every other file that decides (core/outputs/model_identity.py)

No remembered digest is asked: every file is read from the disk (disk_reading.py), once, whoever records it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.digests import INDEX
from gemma2.core.outputs.manifest import own_files
from gemma2.core.outputs.model_identity import deciding_files
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.progress import SILENT, Progress

from .disk_reading import DEFAULT_THREADS, FileRead, read_files, store_model, weights_of
from .recorded import PIPELINE, Gathered, RecordedOutput, Use, gather

__all__ = ["Fault", "Remark", "Verification", "plan_verify", "verify"]

FaultKind = Literal["damaged", "gone", "manifest unreadable", "input changed"]
RemarkKind = Literal["not recorded", "without a digest", "input not on disk", "unfinished", "other record"]


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was recorded.

    output           the directory: of an output, or of an input that no manifest describes
    file             in it; "weights" for the tensors of a model; "" for all of it
    recorded, found  digests; `found` is the cause where a file cannot be read, and "" where it is gone
    used_by          the output whose record differs, of an input that changed
    """

    kind: FaultKind
    output: Path
    file: str = ""
    recorded: str = ""
    found: str = ""
    recorded_bytes: int | None = None
    found_bytes: int | None = None
    used_by: Path | None = None


@dataclass(frozen=True)
class Remark:
    """Something that is worth knowing, and no fault."""

    kind: RemarkKind
    output: Path
    file: str = ""


@dataclass(frozen=True)
class Verification:
    """The result. bytes, seconds: of the reading."""

    gathered: Gathered
    faults: tuple[Fault, ...] = ()
    remarks: tuple[Remark, ...] = ()
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def broken(self) -> list[Path]:
        """The outputs whose own files or manifest are not as they were written, in the order of the lineage."""
        places = {fault.output for fault in self.faults if fault.kind != "input changed"}
        return [path for path in self.gathered.outputs if path in places]

    def counts(self) -> dict[str, int]:
        """Number of faults by kind."""
        kinds = [fault.kind for fault in self.faults]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def document(self) -> JsonObject:
        """The result as a JSON document."""
        faulty = {fault.output for fault in self.faults}
        outputs = [
            {"output": str(path), "command": one.command, "ok": path not in faulty}
            for path, one in self.gathered.outputs.items()
        ]
        return {
            "ok": not self.faults,
            "outputs": outputs,
            "faults": [{**asdict(fault)} for fault in self.faults],
            "remarks": [{**asdict(remark)} for remark in self.remarks],
            "files": self.files,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "bytes_per_second": self.bytes / self.seconds if self.seconds else None,
        }


def verify(
    paths: Iterable[Path],
    *,
    within: Collection[Path] | None = None,
    threads: int = DEFAULT_THREADS,
    progress: Progress = SILENT,
) -> Verification:
    """Read every file of the lineage of these outputs, and compare.

    within  compare only these outputs of the lineage, and what is recorded of them and by them

    Raises InputError for a path that neither is nor holds an output.
    """
    gathered = gather(paths)
    if within is not None:
        kept = {path: output for path, output in gathered.outputs.items() if path in within}
        uses = [use for use in gathered.uses if use.user in kept or any(use.path.is_relative_to(one) for one in kept)]
        gathered = Gathered(kept, uses)
    started = time.monotonic()
    wanted = dict.fromkeys(path for part in (_own(gathered), _used(gathered)) for path in part)
    models = {use.path for use in gathered.uses if use.current and use.is_model}
    read = read_files(wanted, threads, progress, [path for place in models for path in _weights_in(place)])
    seconds = time.monotonic() - started
    comparison = _Comparison(gathered, read)
    comparison.all()
    _correct_memory(comparison.faults, models, threads)
    whole = {(one.stamp, one.digest): one.size for one in read.values() if one.digest}
    return Verification(
        gathered, (*comparison.faults,), (*comparison.remarks,), len(whole), sum(whole.values()), seconds
    )


def plan_verify(paths: Iterable[Path]) -> JsonObject:
    """What `verify` would read: outputs, files, bytes. Raises InputError like it."""
    gathered = gather(paths)
    wanted = dict.fromkeys(path for part in (_own(gathered), _used(gathered)) for path in part)
    sizes = {
        (found.st_dev, found.st_ino): found.st_size for path in wanted if path.is_file() for found in [path.stat()]
    }
    return {"outputs": len(gathered.outputs), "files": len(sizes), "bytes_to_read": sum(sizes.values())}


def _correct_memory(faults: Iterable[Fault], done: Collection[Path], threads: int) -> None:
    """Store the digests of models that are damaged and that nobody has asked about: the remembered ones are of before.

    Without this, a model that rots is taken for what it was by the next command that reads it.
    """
    models = {(fault.output / fault.file).parent for fault in faults if fault.kind == "damaged"} - {*done}
    for directory in models:
        files = _weights_in(directory)
        read = read_files([*files, *_index_of(directory)], threads, with_tensors=files)
        store_model(directory, files, read, weights_of(files, read, directory / INDEX))


def _weights_in(directory: Path) -> list[Path]:
    return weight_files(directory) if directory.is_dir() else []


def _index_of(directory: Path) -> list[Path]:
    return [index] if (index := directory / INDEX).is_file() else []


def _own(gathered: Gathered) -> Iterator[Path]:
    for output in gathered.outputs.values():
        yield from (output.path / name for name in output.files)
        if _weights_in(output.path):
            yield from _files_of_model(output.path)


def _used(gathered: Gathered) -> Iterator[Path]:
    for use in (use for use in gathered.uses if use.current):
        yield from _files_of_model(use.path) if use.is_model else [use.path]


def _files_of_model(directory: Path) -> Iterator[Path]:
    """Yield what decides what a model directory computes."""
    if directory.is_dir():
        yield from (*_weights_in(directory), *_index_of(directory), *deciding_files(directory))


@dataclass
class _Comparison:
    """Compares what was read with what is recorded; collects faults and remarks."""

    gathered: Gathered
    read: Mapping[Path, FileRead]
    faults: list[Fault] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    weights: dict[Path, str] = field(default_factory=dict)

    def all(self) -> None:
        """Compare everything."""
        for output in self.gathered.outputs.values():
            self._output(output)
        reported = {fault.output / fault.file for fault in self.faults}
        for use in self.gathered.uses:
            self._use(use, reported)

    def _output(self, output: RecordedOutput) -> None:
        if output.problem:
            self.faults.append(Fault("manifest unreadable", output.path, found=output.problem))
            return
        if output.manifest.get("status") != "complete":
            self.remarks.append(Remark("unfinished", output.path))
        if not output.is_current and output.command != PIPELINE:
            self.remarks.append(Remark("other record", output.path))
        for name, entry in output.files.items():
            self._file(output.path, name, entry.get("size"), str(entry.get("digest") or ""))
        if output.command != PIPELINE:  # such a folder holds logs and reports, which it does not record
            names = (path.relative_to(output.path).as_posix() for path in own_files(output.path))
            self.remarks += [Remark("not recorded", output.path, name) for name in names if name not in output.files]

    def _file(self, place: Path, name: str, size: object, digest: str) -> None:
        found = self.read[place / name]
        sizes = (size if isinstance(size, int) else None), (None if found.problem else found.size)
        if found.problem:
            kind: FaultKind = "gone" if found.gone else "damaged"
            self.faults.append(Fault(kind, place, name, digest, "" if found.gone else found.problem, *sizes))
        elif (digest and found.digest != digest) or size != found.size:
            self.faults.append(Fault("damaged", place, name, digest, found.digest, *sizes))
        elif not digest:
            self.remarks.append(Remark("without a digest", place, name))

    def _weights(self, directory: Path) -> str:
        """The digest of a model's tensors as they are on the disk; "" without weights, or with broken ones."""
        if directory not in self.weights:
            files = _weights_in(directory)
            found = weights_of(files, self.read, directory / INDEX) if files else ""
            store_model(directory, files, self.read, found)
            self.weights[directory] = found
        return self.weights[directory]

    def _use(self, use: Use, reported: Collection[Path]) -> None:
        if not use.path.exists():
            if use.path.resolve() in reported:
                return
            self.remarks.append(Remark("input not on disk", use.path))
            return
        if not use.current:
            return
        place = use.path.resolve()
        if not use.is_model:
            if place not in reported:
                self._part(use, use.path.parent, use.path.name, use.content[""], _found(self.read[use.path]))
            return
        if not any(path.parent == place and path.match("*.safetensors*") for path in reported):
            self._part(use, use.path, "weights", use.content.get("weights", ""), self._weights(use.path))
        for name, digest in {**_none_of(use.content), **self._deciding(use.path)}.items():
            if (place / name) not in reported:
                self._part(use, use.path, name, use.content.get(name, ""), digest)

    def _deciding(self, directory: Path) -> dict[str, str]:
        found = {}
        for path in deciding_files(directory) if directory.is_dir() else ():
            read = self.read[path]
            found[path.relative_to(directory).as_posix()] = read.settings or _found(read)
        return found

    def _part(self, use: Use, output: Path, name: str, recorded: str, found: str) -> None:
        if recorded != found:
            self.faults.append(Fault("input changed", output, name, recorded, found, used_by=use.user))


def _none_of(content: Mapping[str, str]) -> dict[str, str]:
    return dict.fromkeys((name for name in content if name != "weights"), "")


def _found(read: FileRead) -> str:
    return read.digest or ("" if read.gone else read.problem)
