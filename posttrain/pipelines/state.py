"""`pipeline.json` in the folder of a pipeline: which stage is where. Torch-free.

    {"schema_version": 2, "name", "folder": what relative paths of pipeline.yaml start from, relative to this folder,
     "status": running | complete | failed | interrupted,
     "stages": {NAME: {"command", "needs", "status", "started", "ended", "seconds", "attempts", "exit_code", "error",
                       "hash"}}}

The status of a stage: waiting, running, complete, failed, interrupted, blocked (one that it needs failed), not needed
(its `when` did not hold). It is for people and reports: the `gemma2.json` of a stage decides whether it is done.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Container, Mapping
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, load_json, write_json
from gemma2.core.outputs.manifest import SCHEMA_VERSION

from .compile import Pipeline

__all__ = ["STATE_FILE", "State", "folder_of", "is_running", "read_state", "recorded_stages"]

STATE_FILE = "pipeline.json"


def read_state(root: Path) -> JsonObject | None:
    """The state of a pipeline's folder; None if it is missing. Raises InputError when it cannot be read."""
    path = root / STATE_FILE
    try:
        found = load_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})", "remove it: the next run writes it again") from error
    if not isinstance(found, dict) or not isinstance(found.get("stages"), dict):
        raise InputError(f"{path} is not the state of a pipeline", "remove it: the next run writes it again")
    return found


def recorded_stages(root: Path) -> Mapping[str, JsonMapping]:
    """What earlier runs recorded of every stage; empty where nothing is recorded, or where it cannot be read.

    The next run writes the file again. What is lost with it: times, and which stages were not needed.
    """
    try:
        found: Mapping[str, JsonMapping] = (read_state(root) or {}).get("stages", {})
    except InputError:
        return {}
    return {name: one for name, one in found.items() if isinstance(one, dict)}


def folder_of(root: Path) -> Path | None:
    """The working directory of the last run of a pipeline; None where it is not recorded or gone."""
    try:
        recorded = (read_state(root) or {}).get("folder")
    except InputError:
        return None
    place = root.resolve() / recorded if isinstance(recorded, str) and "\0" not in recorded else None
    return place if place is not None and place.is_dir() else None


def is_running(root: Path) -> bool:
    """Whether a process holds the folder: a killed process leaves a state that says `running`."""
    place = root.resolve()
    try:
        lock = place.with_name(f".{place.name}.lock")
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class State:
    """The state while a pipeline runs; every change is on disk before the call returns.

    within: the stages that the run is about; the others keep their recorded state.
    """

    def __init__(self, pipeline: Pipeline, within: Container[str] | None = None) -> None:
        self.path = pipeline.root / STATE_FILE
        before = recorded_stages(pipeline.root)
        self.document: JsonObject = {
            "schema_version": SCHEMA_VERSION,
            "name": pipeline.root.resolve().name,
            "status": "running",
            "folder": os.path.relpath(Path.cwd(), pipeline.root.resolve()),
            "stages": {
                name: {
                    **_kept(before.get(name)),
                    "status": "waiting",
                    "error": None,
                    **(before.get(name, {}) if within is not None and name not in within else {}),
                    "command": stage.command,
                    "needs": list(stage.needs),
                }
                for name, stage in pipeline.stages.items()
            },
        }

    def set(self, stage: str, **changes: object) -> None:
        """Change one stage."""
        self.document["stages"][stage].update(changes)
        self.write()

    def finish(self, status: str) -> None:
        """The outcome of the whole; what was running is interrupted."""
        self.document["status"] = status
        for stage in self.document["stages"].values():
            if stage["status"] == "running":
                stage["status"] = "interrupted"
        self.write()

    def write(self) -> None:
        """Replace the file."""
        write_json(self.path, self.document)


def _kept(before: JsonMapping | None) -> JsonObject:
    """The record of an earlier run about a stage that this one may find complete."""
    names = ("started", "ended", "seconds", "attempts", "exit_code", "hash")
    return {name: (before or {}).get(name) for name in names}
