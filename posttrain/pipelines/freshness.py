"""Whether the output of a stage exists and was made from the inputs that the stage names. Torch-free.

An output counts as made when its manifest is complete, and was written by the same command from the same settings,
parents (digests of their weights) and data (digests). The content of an input counts, not its place.

The hash of an output covers all of that:

    BLAKE3 of {command, settings without paths, (role, digest) of every parent, digest of every data file, code}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.core.outputs.manifest import STATE, read_manifest
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.provenance import changes, is_setting
from gemma2.posttrain.schemas.config import Config

__all__ = ["Currency", "currency_of", "goes_on", "output_hash"]

ASIDE = ("metrics.jsonl", "samples.jsonl", "dropped.jsonl")  # for people; no stage reads them


@dataclass(frozen=True)
class Currency:
    """complete     there is nothing to do
    interrupted  a run of it can be continued; an output of something else may still be in its place
    changed      the output was made from something else; `why` names the difference
    missing      there is nothing
    """

    state: Literal["complete", "interrupted", "changed", "missing"]
    why: tuple[str, ...] = ()


def currency_of(command: str, config: Config, out: Path) -> Currency:
    """The state of one output and the reasons for it. Raises InputError for a foreign directory in its place."""
    manifest = read_manifest(out)
    if manifest is not None and manifest.get("status") == "complete":
        differing = _differing(manifest, command, config, out) or _damaged(manifest, out)
        if not differing:
            return Currency("complete")
        return Currency("interrupted" if goes_on(command, config, out) else "changed", differing)
    if manifest is not None:
        return Currency("changed", (f"status ({manifest.get('status')})",))
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} holds something else than an output of gemma2", "move it, or choose another --out")
    return Currency("interrupted" if goes_on(command, config, out) else "missing")


def goes_on(command: str, config: Config, out: Path) -> bool:
    """Whether an interrupted run of the same can be continued."""
    partial = partial_path(out)
    before = _interrupted(partial)
    return before is not None and not _differing(before, command, config, partial)


def _damaged(manifest: JsonMapping, out: Path) -> tuple[str, ...]:
    """The weights and rows that a finished output no longer holds."""
    for name, entry in manifest.get("files", {}).items():
        if name in ASIDE or "/" in name or not name.endswith((".safetensors", ".jsonl")):
            continue
        try:
            size = (out / name).stat().st_size
        except OSError:
            return (f"its {name} is gone",)
        if size != entry.get("size"):
            return (f"its {name} is not what was written",)
    return ()


def _differing(recorded: JsonMapping, command: str, config: Config, place: Path) -> tuple[str, ...]:
    if recorded.get("command") != command:
        return (f"command ({recorded.get('command')} -> {command})",)
    return tuple(changes(recorded, config, place))


def _interrupted(partial: Path) -> JsonObject | None:
    """The record of an interrupted run, where there is one that a resume can use."""
    try:
        found = json.loads((partial / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def output_hash(manifest: JsonMapping) -> str:
    """`"blake3:<hex>"` of what a finished output was made from."""
    command = str(manifest.get("command"))
    known = COMMANDS.get(command)
    settings = manifest.get("config") or {}
    if known is not None:
        settings = {key: value for key, value in settings.items() if is_setting(known.schema, key)}
    content = {
        "command": command,
        "config": settings,
        "parents": [[parent["role"], parent["weights"]] for parent in manifest.get("parents", ())],
        "data": [source["digest"] for source in manifest.get("data", ())],
        "code": manifest.get("code", {}),
    }
    digest = hasher()
    digest.update(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())
    return digest_name(digest)
