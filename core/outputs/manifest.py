"""The manifest of an output (`gemma2.json`): what made it, from what, and the size and digest of every file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TypedDict, cast

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject, load_json, read_json, write_json

from .hashing import digest_file

__all__ = [
    "CHECKPOINTS",
    "MANIFEST",
    "SCHEMA_VERSION",
    "STATE",
    "DataRecord",
    "FileRecord",
    "Manifest",
    "ParentRecord",
    "now",
    "read_manifest",
    "read_state",
    "remove_temporaries",
    "require_complete",
    "versions",
    "write_manifest",
]

MANIFEST = "gemma2.json"
# A run needs these only until it is complete: they are not part of the output.
STATE, CHECKPOINTS = "run.json", "checkpoints"
# Of `write_json` and `write_text`; of safetensors, which writes `.tmpAB12cd` first.
TEMPORARY = re.compile(r"\..+\.tmp(-\d+)?|\.tmp\w{6}")
SCHEMA_VERSION = 2  # 2: parents record every file that decides, data the option that names them
# An allowlist of the packages that identify the arithmetic, so that nothing about the user or the machine leaks.
RECORDED_PACKAGES = (
    *("gemma2", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "tokenizers", "jinja2"),
    *("numpy", "numba", "datasets", "vllm", "bitsandbytes"),
)


class FileRecord(TypedDict, total=False):
    """A file of an output. `digest` is missing where nothing has read the file."""

    size: int
    digest: str


class ParentRecord(TypedDict, total=False):
    """A model that an output was made from.

    role     in the command: model, policy, base, input, reward, ...
    path     relative to the output
    hub      `owner/name@revision` of a model from the hub's cache
    weights  digest of all tensors
    files    every other file that decides, by name: its digest, or the settings that it holds, as JSON
    """

    role: str
    path: str
    hub: str
    weights: str
    files: dict[str, str]


class DataRecord(TypedDict, total=False):
    """A data file that an output was made from.

    role  the option that names it
    path  relative to the output
    """

    role: str
    path: str
    digest: str


class Manifest(TypedDict, total=False):
    """`gemma2.json`. A merge records no seed, code, processes and hardware.

    gemma2     version of this package
    config     settings of the command, defaults included
    code       of every Python function that the configuration names: module -> digest of its source, of that module
               and of those of the user that it imports
    processes  number of processes of the job
    hardware   kind of machine; of a command that loaded torch the device and the versions of what is below torch
    precision  dtypes of what is trained, of what is frozen, of products and of heads, by these names
    versions   of the packages that decide the bytes of the result
    arithmetic number of this package's own arithmetic in the command (posttrain/provenance/version_rule.py)
    continued  where a run went on with other versions: when, and package -> [before, after]
    started    UTC, ISO 8601, as `ended`
    status     "complete"
    summary    figures of the result, by name
    files      by path relative to the output
    """

    schema_version: int
    gemma2: str
    command: str
    config: JsonObject
    parents: list[ParentRecord]
    data: list[DataRecord]
    code: dict[str, dict[str, str]]
    seed: int | None
    processes: int
    versions: dict[str, str]
    arithmetic: int
    continued: list[JsonObject]
    hardware: JsonObject
    precision: JsonObject
    started: str
    ended: str
    status: str
    summary: JsonObject
    files: dict[str, FileRecord]


# The kinds of values that every reader of a record relies on; what they hold is checked where it is read.
CONTAINERS: Mapping[str, type] = {
    **dict.fromkeys(("config", "code", "versions", "summary", "files"), dict),
    **dict.fromkeys(("parents", "data"), list),
}
OF_RECORDS = ("files", "code", "parents", "data")  # whose values are objects themselves


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result's bytes."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a directory, or None if it is missing.

    The types of single values are checked by their readers: the file may have been edited.
    Raises InputError if the file exists and is not a manifest.
    """
    path = directory / MANIFEST
    try:
        manifest = load_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "check its permissions") from error
    except InputError:  # not a regular file, or too large
        raise
    except ValueError as error:  # also bytes that are not UTF-8, and numbers of thousands of digits
        raise InputError(f"{path} is not readable JSON ({type(error).__name__})", "make the output again") from error
    fault = _fault_of(manifest)
    if fault:
        raise InputError(f"{path} is not a gemma2 manifest: {fault}", "make the output again")
    return cast("Manifest", manifest)


def read_state(partial: Path) -> JsonObject:
    """Return the record of an interrupted run (`run.json`). Raises InputError for one that no resume can use."""
    path = partial / STATE
    found = read_json(path, "start over with --force")
    fault = _fault_of(found)
    if fault:
        raise InputError(f"{path} is not the record of a run: {fault}", "start over with --force")
    return found


def _fault_of(record: object) -> str:
    """What is wrong with the kinds of a record's values; empty if nothing is."""
    if not isinstance(record, dict):
        return "it is not an object"
    for key, kind in CONTAINERS.items():
        value: object = record.get(key)
        if value is None:
            continue
        if not isinstance(value, dict | list) or not isinstance(value, kind):
            return f"{key} is not {'an object' if kind is dict else 'a list'}"
        entries = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        if key in OF_RECORDS and not all(isinstance(entry, dict) for entry in entries):
            return f"{key} holds something else than objects"
    return ""


def require_complete(directory: Path, role: str) -> None:
    """Refuse a directory that a gemma2 command began and did not finish. Raises InputError."""
    manifest = read_manifest(directory)
    if manifest is not None and manifest.get("status") != "complete":
        raise InputError(
            f"{role} {directory} is an unfinished output (status {str(manifest.get('status'))[:60]!r})",
            "finish it with --resume, or name a complete directory",
        )


def own_files(directory: Path) -> Iterator[Path]:
    """The files of an output, without subdirectories that have their own manifest: these are separate outputs."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in (STATE, CHECKPOINTS):
            continue
        if path.is_dir():
            if not (path / MANIFEST).exists():
                yield from own_files(path)
        elif path.name != MANIFEST:
            yield path


def remove_temporaries(directory: Path) -> None:
    """Remove files of an output that a killed process had not renamed yet: ours, and those of safetensors."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path.name != CHECKPOINTS and not path.name.startswith(".") and not (path / MANIFEST).exists():
                remove_temporaries(path)
        elif TEMPORARY.fullmatch(path.name):
            path.unlink()


def write_manifest(
    directory: Path, manifest: Mapping[str, object], digests: Mapping[str, str | None] | None = None
) -> Manifest:
    """Write `gemma2.json` with size and digest of every file next to it; return it. It is an output's last file.

    digests  known digests, by file name; None leaves a file's digest out
    """
    files: dict[str, FileRecord] = {}
    for path in own_files(directory):
        name = str(path.relative_to(directory))
        digest = digests[name] if digests and name in digests else digest_file(path)
        files[name] = {"size": path.stat().st_size, **({"digest": digest} if digest else {})}
    document = {"schema_version": SCHEMA_VERSION, "gemma2": metadata_version(), **manifest, "files": files}
    write_json(directory / MANIFEST, document)
    return cast("Manifest", document)


def metadata_version() -> str:
    """Return the version of this package, or "source" in a checkout that is not installed."""
    from importlib import metadata  # takes 15 ms, which --help must not pay

    try:
        return metadata.version("gemma2")
    except metadata.PackageNotFoundError:
        return "source"
