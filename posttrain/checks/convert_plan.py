"""The plan of `gemma2 convert --dry-run`: what it would read and write, from headers. Torch-free."""

from __future__ import annotations

from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.foreign.code_keys import refuse_code
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.safetensors_header import parameter_count, weight_files
from gemma2.core.outputs.staging import check_output
from gemma2.posttrain.conversion.gguf import find_gguf, read_header
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import ConvertConfig

from .kinds import look_at

__all__ = ["plan_convert"]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_convert(config: ConvertConfig, options: RunOptions) -> JsonObject:
    """Return what a conversion would read and write. Raises what the run would raise about its arguments."""
    gguf = find_gguf(config.source)
    check_output(options.out, options.force, {} if gguf else {"source": config.source})
    parameters = _parameters(config.source) if gguf is None else read_header(gguf).parameters
    return {
        "plan": f"convert {gguf or config.source} -> {options.out}, nothing was written",
        "format": "GGUF" if gguf else "safetensors",
        "parameters": parameters,
        "disk_gib": parameters * ITEM_BYTES[config.dtype] / 2**30,
        "config": config.model_dump(mode="json"),
    }


def _parameters(source: Path) -> int:
    if not (source / "config.json").exists():
        raise InputError(f"{source} holds no config.json", "give a model directory")
    if not weight_files(source):
        raise InputError(f"{source} holds no *.safetensors", "convert the weights to safetensors first")
    refuse_code(source)
    look_at(source)
    return parameter_count(source)
