"""The manifest of an output (`gemma2.json`): what made it, from what, and the size and digest of every file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError
from gemma2.core.json_files import write_json

from .hashing import digest_file

__all__ = [
    "CHECKPOINTS",
    "MANIFEST",
    "SCHEMA_VERSION",
    "STATE",
    "now",
    "read_manifest",
    "require_complete",
    "versions",
    "write_manifest",
]

MANIFEST = "gemma2.json"
# What a run needs only until it is complete: no part of the output.
STATE, CHECKPOINTS = "run.json", "checkpoints"
SCHEMA_VERSION = 1
# Only what identifies the arithmetic: an allowlist, so that nothing about the user or the machine's paths leaks.
RECORDED_PACKAGES = ("gemma2", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "numpy", "numba")


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result's bytes."""
    from importlib import metadata

    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, or None where there is none.

    Raises InputError when the file is there and is no manifest.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "check its permissions") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
        raise InputError(f"{path} is not readable JSON ({type(error).__name__})", "make the output again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files", {}), dict):
        raise InputError(f"{path} is not a gemma2 manifest", "make the output again")
    return manifest


def require_complete(directory: Path, role: str) -> None:
    """Refuse a directory that a gemma2 command began and did not finish."""
    manifest = read_manifest(directory)
    if manifest is not None and manifest.get("status") != "complete":
        raise InputError(
            f"{role} {directory} is an unfinished output (status {str(manifest.get('status'))[:60]!r})",
            "finish it with --resume, or name a complete directory",
        )


def own_files(directory: Path) -> Iterator[Path]:
    """The files of an output; a directory inside it that has a manifest of its own is an output by itself."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in (STATE, CHECKPOINTS):
            continue
        if path.is_dir():
            if not (path / MANIFEST).exists():
                yield from own_files(path)
        elif path.name != MANIFEST:
            yield path


def write_manifest(
    directory: Path, manifest: Mapping[str, Any], digests: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Write `gemma2.json` with size and digest of every file beside it. The last thing written to an output.

    digests  of files whose digest is known, by name; None leaves a file's digest out
    """
    files: dict[str, Any] = {}
    for path in own_files(directory):
        name = str(path.relative_to(directory))
        digest = digests[name] if digests and name in digests else digest_file(path)
        files[name] = {"size": path.stat().st_size, **({"digest": digest} if digest else {})}
    document = {"schema_version": SCHEMA_VERSION, "gemma2": metadata_version(), **manifest, "files": files}
    write_json(directory / MANIFEST, document)
    return document


def metadata_version() -> str:
    """The version of this package, or "source" in a checkout that is not installed."""
    from importlib import metadata  # 15 ms that --help does not pay

    try:
        return metadata.version("gemma2")
    except metadata.PackageNotFoundError:
        return "source"
