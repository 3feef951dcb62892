"""Where the files of an output are while it is made, and whether a process makes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, load_json
from gemma2.core.outputs.manifest import MANIFEST, STATE
from gemma2.core.outputs.staging import partial_path
from gemma2.core.yaml_files import closest
from gemma2.posttrain.pipelines.state import STATE_FILE, is_running

__all__ = ["WatchedOutput", "find_output", "is_interrupted", "nothing_there", "read_object"]

PARTIAL = re.compile(r"^\.(.+)\.partial$")


@dataclass(frozen=True)
class WatchedOutput:
    """An output and the directory of its files.

    folder      `out`, or the hidden sibling in which it is being made
    pipeline    whether it has stages
    complete    whether it is finished
    running     whether a process holds it
    """

    out: Path
    folder: Path
    pipeline: bool
    complete: bool
    running: bool


def find_output(out: Path) -> WatchedOutput | None:
    """Return where `out` is; None if nothing of it exists yet. Raises InputError if it is something else."""
    if out.name in ("", ".."):  # the directory that we are in, or one above
        out = out.resolve()
        if not out.name:
            raise InputError(f"{out} is not the output of a gemma2 command", "give the --out of a run or of a pipeline")
    hidden = PARTIAL.match(out.name)
    if hidden:
        out = out.with_name(hidden[1])
    running = is_running(out)
    partial = partial_path(out)
    complete = _is_complete(out)
    if (out / STATE_FILE).is_file() and not (running and (partial / STATE).is_file()):
        return WatchedOutput(out, out, True, complete and not running, running)
    if (partial / STATE).is_file() and (running or not complete):
        return WatchedOutput(out, partial, (partial / STATE_FILE).is_file(), False, running)
    if complete:
        return WatchedOutput(out, out, False, True, False)
    if out.exists() and not running and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not the output of a gemma2 command", "give the --out of a run or of a pipeline")
    return None


def is_interrupted(out: Path) -> bool:
    """Whether an interrupted run of `out` is kept, so that its command needs --resume; a pipeline works in `out`."""
    return (partial_path(out) / STATE).is_file()


def nothing_there(out: Path) -> str:
    """What to say while nothing of `out` exists, with the nearest output next to it."""
    if out.is_dir():
        return f"{out} is empty: nothing runs there yet"
    try:
        names = {PARTIAL.sub(r"\1", path.name) for path in out.parent.iterdir() if _is_ours(path)}
    except OSError:
        names = set()
    near = closest(out.name, names) if names else ""
    return f"{out} does not exist yet{f' ({near})' if near.startswith('did') else ''}"


def _is_ours(path: Path) -> bool:
    return any((path / name).is_file() for name in (MANIFEST, STATE, STATE_FILE))


def _is_complete(folder: Path) -> bool:
    found = read_object(folder / MANIFEST)
    return found.get("status") == "complete"


def read_object(path: Path) -> JsonMapping:
    """Return the JSON object of a file; empty if it is missing, or cannot be read."""
    try:
        value = load_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
