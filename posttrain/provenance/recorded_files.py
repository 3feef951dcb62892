"""Files of a finished output compared with the digests in its manifest: a file that was edited since is not believed.

Only small files that decide a result are checked here (points of a front, evaluations of a run, the index of a cache);
an output that was copied or moved passes. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.outputs.digests import digest_input
from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.core.outputs.safetensors_header import weight_files

__all__ = ["changed_files", "check_recorded", "check_weights", "remake"]


def changed_files(directory: Path, names: Sequence[str]) -> list[str]:
    """Those of the files that exist and have another digest than the manifest records; not files without a record."""
    files = (read_manifest(directory) or {}).get("files", {})
    recorded = {name: record.get("digest") for name, record in files.items() if isinstance(record, dict)}
    return [
        name
        for name in names
        if recorded.get(name) and (directory / name).is_file() and digest_input(directory / name) != recorded[name]
    ]


def check_recorded(directory: Path, names: Sequence[str], fix: str) -> None:
    """Refuse an output of which one of these files was changed. Raises InputError with this fix."""
    changed = changed_files(directory, names)
    if changed:
        raise InputError(
            f"{directory / changed[0]} was changed after it was written: its digest is not the one in {MANIFEST}", fix
        )


def check_weights(directory: Path, role: str) -> None:
    """Refuse a model of ours whose weights are not those that were written: of rotten bits, or of a copy that broke.

    Other files may be edited on purpose: their content counts as it is. Raises InputError.
    """
    changed = changed_files(directory, [path.name for path in weight_files(directory)])
    if changed:
        raise InputError(
            f"{role} {directory}: {changed[0]} is not what was written: its digest is not the one in {MANIFEST}",
            f"make it again, restore it, or remove {directory / MANIFEST} to use it as it is",
        )


def remake(command: str, directory: Path) -> str:
    """The fix that makes an output again with its own settings."""
    return f"restore it, or make it again: gemma2 {command} --config {directory} --out {directory} --force"
