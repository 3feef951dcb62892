"""Files of a finished output compared with the digests in its manifest: a file that was edited since is not believed.

Only small files that decide a result are checked here (points of a front, evaluations of a run, the index of a cache);
an output that was copied or moved passes. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import MANIFEST, read_manifest

__all__ = ["changed_files", "check_recorded", "remake"]


def changed_files(directory: Path, names: Sequence[str]) -> list[str]:
    """Those of the files that exist and have another digest than the manifest records; not files without a record."""
    files = (read_manifest(directory) or {}).get("files", {})
    recorded = {name: record.get("digest") for name, record in files.items() if isinstance(record, dict)}
    return [
        name
        for name in names
        if recorded.get(name) and (directory / name).is_file() and digest_file(directory / name) != recorded[name]
    ]


def check_recorded(directory: Path, names: Sequence[str], fix: str) -> None:
    """Refuse an output of which one of these files was changed. Raises InputError with this fix."""
    changed = changed_files(directory, names)
    if changed:
        raise InputError(
            f"{directory / changed[0]} was changed after it was written: its digest is not the one in {MANIFEST}", fix
        )


def remake(command: str, directory: Path) -> str:
    """The fix that makes an output again with its own settings."""
    return f"restore it, or make it again: gemma2 {command} --config {directory} --out {directory} --force"
