"""Writes a model again: its tensors copied one by one in another dtype or in other files, an adapter merged or kept.

The copy is the merge engine's `passthrough`: W' = W, or W + scale * B @ A of an adapter, rounded once to the dtype of
the output, read back from the disk before the output appears.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.ancestry import write_card
from gemma2.core.outputs.manifest import Manifest, now, versions, write_manifest
from gemma2.core.outputs.model_card import Account
from gemma2.core.outputs.model_identity import identity_of, parent_record
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.outputs.staging import check_output, staged_output
from gemma2.core.progress import Progress
from gemma2.merging import MergeRequest, merge, plan_merge
from gemma2.merging.inputs.weight_files import companions
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.delivery.export import ExportConfig

from .endpoint_files import ENDPOINT_FILES
from .exported_model import ADAPTER_CONFIG, ExportedModel, sentencepiece_of

__all__ = ["manifest_of", "plan_of_model", "write_adapter", "write_model"]

COMMAND = "export"


def request_of(config: ExportConfig) -> MergeRequest:
    """The copy as the merge engine takes it."""
    return MergeRequest(method="passthrough", models=(config.model,), dtype=config.dtype)


def check_kind(config: ExportConfig, source: ExportedModel) -> None:
    """Refuse options that the kind of model has no use for. Raises UsageError."""
    if config.keep_adapter and (source.adapter is None or len(source.parts) > 1):
        raise UsageError(f"--keep-adapter: {source.given} is not an adapter alone", "leave it out, or give an adapter")
    if config.endpoint and not source.is_reward_model:
        raise UsageError(
            f"--endpoint: {source.given} is not a reward model",
            "a policy needs no handler: the vLLM engine of Inference Endpoints serves it as it is (docs/serving.md)",
        )
    if config.gguf and source.is_reward_model:
        raise UsageError(f"--gguf: {source.given} is a reward model", "llama.cpp's converter takes language models")


def plan_of_model(config: ExportConfig, out: Path, force: bool) -> JsonObject:
    """Return what `write_model` would write. Raises its errors about arguments and inputs."""
    plan = plan_merge(request_of(config), out, force)
    return {
        "parameters": plan.parameters,
        "bytes": plan.output_bytes,
        "dtype": config.dtype or "unchanged",
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }


def write_model(config: ExportConfig, source: ExportedModel, options: RunOptions, progress: Progress) -> None:
    """Write the model with its configuration and tokenizer; for --endpoint also the handler."""
    found = sentencepiece_of(source.parts[0])
    more = (found,) if found is not None else ()
    account = Account(
        command=COMMAND,
        config=config.recorded(),
        summary={"dtype": config.dtype or "unchanged"},
        files=(*more, *(ENDPOINT_FILES if config.endpoint else ())),
    )
    merge(
        request_of(config),
        out=options.out,
        force=options.force,
        progress=progress,
        account=account,
        shard_bytes=config.shard_bytes,
    )


def write_adapter(config: ExportConfig, source: ExportedModel, options: RunOptions) -> None:
    """Copy an adapter with its tokenizer, if it has one."""
    check_output(options.out, options.force, {"model": source.path})
    files = [source.path / ADAPTER_CONFIG, *weight_files(source.path), *companions(source.path)]
    started = now()
    with staged_output(options.out, options.force) as partial:
        for file in files:
            shutil.copyfile(file, partial / file.name)
        manifest = manifest_of(config, source, options.out, started, {})
        write_card(partial, manifest, options.out)
        write_manifest(partial, {**manifest})


def manifest_of(config: ExportConfig, source: ExportedModel, out: Path, started: str, summary: JsonObject) -> Manifest:
    """Return the manifest of an output that the merge engine did not write."""
    roles = ("base", "input") if len(source.parts) > 1 else ("input",)
    return {
        "command": COMMAND,
        "config": config.recorded(),
        "parents": [
            parent_record(role, path, identity_of(path), out) for role, path in zip(roles, source.parts, strict=True)
        ],
        "data": [],
        "versions": versions(),
        "started": started,
        "ended": now(),
        "status": "complete",
        "summary": summary,
    }
