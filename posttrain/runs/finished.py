"""Runs that were complete when they were killed: published, or tidied up, by the next start of the same command.

A run writes its manifest, moves its directory to `--out`, and removes its resume state after that. A kill between two
of these steps leaves the state (`run.json`) next to a complete manifest, before or after the move. Nothing is computed
again then. The digests of the files are read, since a kill may have come before they were flushed.

Of several processes rank 0 looks and publishes, and the others hear of it.

A pipeline passes over an output that is complete; it removes what a kill has left there (`tidy`).
"""

from __future__ import annotations

import glob
import shutil
from contextlib import suppress
from pathlib import Path

from gemma2.core.errors import Gemma2Error
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.manifest import STATE, read_manifest, read_state
from gemma2.core.outputs.staging import (
    check_named,
    check_output,
    check_partial,
    locked,
    partial_path,
    publish,
    remove_tokens,
)
from gemma2.core.ranks import announced, join
from gemma2.posttrain.provenance.origin import changes
from gemma2.posttrain.provenance.output_state import broken_files
from gemma2.posttrain.schemas import StrategyFields
from gemma2.posttrain.schemas.config import Config

from .commands import COMMANDS
from .run_directory import RunOptions, RunResult, remove_resume_state
from .together import SHARED, together

__all__ = ["publish_finished", "tidy"]


def publish_finished(config: Config, options: RunOptions) -> RunResult | None:
    """Publish a complete run of this configuration that a kill left behind; None where there is no such run.

    Raises OutputError for an `--out` that cannot be written or that another process writes.
    """
    if announced() == 1:
        return _published(config, options)
    if type(config) in SHARED:
        with together(config) as ranks:
            return ranks.on_main(lambda: _published(config, options))
    if not isinstance(config, StrategyFields):  # refused by `open_run`: the processes need not meet
        return None
    return join(type(config).__name__.removesuffix("Config").lower()).on_main(lambda: _published(config, options))


def _published(config: Config, options: RunOptions) -> RunResult | None:
    out = check_named(options.out)
    partial = partial_path(out)
    moved = (out / STATE).is_file()
    found = out if moved else partial
    if not (found / STATE).is_file():
        tidy(out)
        return None
    check_partial(partial)
    check_output(out, options.force or moved)
    with locked(out):
        try:
            state = read_state(found)
            manifest = read_manifest(found)
        except (OSError, ValueError):
            return None
        if manifest is None or manifest.get("status") != "complete" or not _is_of(state, config):
            return None
        if any(True for _ in broken_files(manifest, found)):
            return None
        if not moved:
            publish(partial, out, options.force)
        _tidy(out)
    return RunResult(out, dict(manifest.get("summary") or {}))


def tidy(out: Path) -> None:
    """Remove what a kill has left in and next to a complete output, unless another process writes there."""
    if not ((out / STATE).exists() or _beside(out)):
        return
    with suppress(Gemma2Error, OSError):
        if (read_manifest(out) or {}).get("status") == "complete":
            with locked(out):
                _tidy(out)


def _tidy(out: Path) -> None:
    """Remove resume state and hidden siblings of a complete output that we hold; an interrupted run stays."""
    for path in _beside(out):
        if path.is_dir() and not path.is_symlink() and not (path / STATE).exists():  # what this output has replaced
            shutil.rmtree(path)
    remove_tokens(out)
    remove_resume_state(out)


def _beside(out: Path) -> list[Path]:
    """The hidden siblings of an output: its lock, partial and temporary folders, tokens of its starts."""
    names = ("lock", "partial", "partial-old", "tmp-*", "token-*")
    return [path for name in names for path in out.parent.glob(f".{glob.escape(out.name)}.{name}")]


def _is_of(record: JsonObject, config: Config) -> bool:
    """Whether the state of a run is that of this configuration, with the same inputs."""
    command = str(record.get("command"))
    known = COMMANDS.get(command)
    return known is not None and known.schema is type(config) and not changes(record, command, config)
