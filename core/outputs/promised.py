"""Exit code 0 says that the output is there: no early return and no foreign code makes a success of nothing."""

from __future__ import annotations

import os
from pathlib import Path

from gemma2.core.errors import InputError, OutputError
from gemma2.core.ranks import is_main

from .manifest import read_manifest

__all__ = ["check_promised", "fault_of", "forget_promised", "promise"]

_promised: dict[Path, bool] = {}  # outputs of the command that runs; whether each is a single file


def promise(out: Path, file: bool = False) -> Path:
    """Note that the command ends with exit code 0 only if `out` is complete; return it.

    file  `out` is a single file, without a manifest
    """
    _promised[Path(os.path.abspath(out))] = file  # user code may change the working folder
    return out


def forget_promised() -> None:
    """Begin another command."""
    _promised.clear()


def check_promised() -> None:
    """Raise OutputError for a promised output that is missing or not complete. With several processes, rank 0 does."""
    for out, file in _promised.items() if is_main() else ():
        fault = ("" if out.is_file() else "is not there") if file else fault_of(out)
        if fault:
            raise OutputError(
                f"the command came to its end, and --out {out} {fault}",
                "start it again; see that no other program removes the output, and no code that it calls ends it early",
            )


def fault_of(out: Path) -> str:
    """What is wrong with a directory that should be a complete output; empty if nothing is."""
    try:
        manifest = read_manifest(out)
    except InputError as error:
        return f"is not complete ({error.what})"
    if manifest is None:
        return "is not there, or has no manifest"
    if manifest.get("status") != "complete":
        return "is not complete"
    for name, record in manifest.get("files", {}).items():
        try:
            right = (out / name).stat().st_size == record.get("size")
        except OSError:
            right = False
        if not right:
            return f"is not complete: {name} is missing or has another size"
    return ""
