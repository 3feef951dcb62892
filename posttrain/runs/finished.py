"""Runs that were complete when they were killed: published, or tidied up, by the next start of the same command.

A run writes its manifest, moves its directory to `--out`, and removes its resume state after that. A kill between two
of these steps leaves the state (`run.json`) next to a complete manifest, before or after the move. Nothing is computed
again then. The digests of the files are read, since a kill may have come before they were flushed.

With several processes a resume goes on from the last checkpoint instead, and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.manifest import STATE, read_manifest
from gemma2.core.outputs.staging import check_output, check_partial, locked, partial_path, publish
from gemma2.core.ranks import announced
from gemma2.posttrain.provenance.origin import changes
from gemma2.posttrain.provenance.output_state import broken_files
from gemma2.posttrain.schemas.config import Config

from .commands import COMMANDS
from .run_directory import RunOptions, RunResult, remove_resume_state

__all__ = ["publish_finished"]


def publish_finished(config: Config, options: RunOptions) -> RunResult | None:
    """Publish a complete run of this configuration that a kill left behind; None where there is no such run.

    Raises OutputError for an `--out` that cannot be written or that another process writes.
    """
    out, partial = options.out, partial_path(options.out)
    moved = (out / STATE).is_file()
    found = out if moved else partial
    if announced() > 1 or not (found / STATE).is_file():
        return None
    check_partial(partial)
    check_output(out, options.force or moved)
    with locked(out):
        try:
            state = json.loads((found / STATE).read_text(encoding="utf-8"))
            manifest = read_manifest(found)
        except (InputError, OSError, ValueError):
            return None
        if manifest is None or manifest.get("status") != "complete" or not _is_of(state, config):
            return None
        if any(True for _ in broken_files(manifest, found)):
            return None
        if not moved:
            publish(partial, out, options.force)
        elif partial.exists() and not (partial / STATE).exists():  # the output that this one has replaced
            shutil.rmtree(partial)
        remove_resume_state(out)
    return RunResult(out, dict(manifest.get("summary") or {}))


def _is_of(state: object, config: Config) -> bool:
    """Whether the state of a run is that of this configuration, with the same inputs."""
    if not isinstance(state, dict):
        return False
    record: JsonObject = state
    command = str(record.get("command"))
    known = COMMANDS.get(command)
    return known is not None and known.schema is type(config) and not changes(record, command, config)
