"""Why a stage of a pipeline is what it is, in full: `gemma2 pipeline status --why STAGE`. Torch-free.

Of a stage that a run would make: every difference with the recorded value and the present one. Of a complete stage:
what it was made from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.pipelines.check import Checked, look_at_pipeline
from gemma2.posttrain.pipelines.compile import Pipeline
from gemma2.posttrain.pipelines.run import status_rows
from gemma2.posttrain.provenance.change import Change
from gemma2.posttrain.provenance.origin import is_setting
from gemma2.posttrain.runs.commands import COMMANDS, output_hash

from .recorded import entries

__all__ = ["explain", "made_from"]


def explain(pipeline: Pipeline, names: Collection[str]) -> list[JsonObject]:
    """Return status, differences and origin of these stages, in the order of the pipeline. Never refuses."""
    rows = {row["stage"]: row for row in status_rows(pipeline)}
    found = look_at_pipeline(pipeline)
    return [_explained(one, rows[name]) for name, one in found.items() if name in names]


def _explained(one: Checked, row: JsonMapping) -> JsonObject:
    decision, state = one.decision, one.decision.state
    manifest = _manifest(one)
    return {
        "stage": one.stage.name,
        "command": one.stage.command,
        "status": row["status"],
        "differences": [_change(change) for change in decision.why],
        "versions": [_change(change) for change in state.versions] if state else [],
        "notes": [*decision.notes, *([row["note"]] if row["status"] == "failed" else [])],
        "made_from": made_from(manifest) if manifest else None,
    }


def _manifest(one: Checked) -> JsonMapping:
    """The record of a stage's output, of whatever it was made; empty if it is missing or cannot be read."""
    try:
        return {**(read_manifest(one.stage.out) or {})}
    except InputError:
        return {}


def _change(change: Change) -> JsonObject:
    return {"what": change.what, "was": change.was, "now": change.now}


def made_from(manifest: JsonMapping) -> JsonObject:
    """Return all that decides a result, as a manifest records it."""
    config = manifest.get("config")
    return {
        "hash": output_hash(manifest),
        "command": manifest.get("command"),
        "settings": _settings(manifest, config if isinstance(config, Mapping) else {}),
        "parents": entries(manifest, "parents"),
        "data": entries(manifest, "data"),
        "code": manifest.get("code") or {},
        "versions": manifest.get("versions") or {},
    }


def _settings(manifest: JsonMapping, config: JsonMapping) -> JsonObject:
    """The settings of a record that decide, without paths."""
    known = COMMANDS.get(str(manifest.get("command")))
    return {key: value for key, value in config.items() if known is None or is_setting(known.schema, key)}
