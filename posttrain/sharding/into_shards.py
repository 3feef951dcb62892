"""Weights read into shards: no process ever holds a whole model.

    model = skeleton(AutoModelForCausalLM, path)     modules without memory for their weights
    ... adapters, a new head: their parameters have memory, and keep their values
    divide(model, path, layout)                      shards, filled from the safetensors files

In between a weight is one zero that is read over and over (stride 0), on the CPU: peft moves new adapters to the device
of the weights that they are added to, and on the meta device they would lose their values.

A process reads the rows of its part alone. A 27B model in fp32 takes 109 GB of host memory per process otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import read_header, weight_files
from gemma2.posttrain.models.loading import read_config
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import Network

from .units import ShardLayout, shard

__all__ = ["divide", "skeleton", "whole_name", "write_part"]

Factory = type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]


def skeleton(
    factory: Factory, path: Path, dtype: torch.dtype = torch.float32, attention: str = "eager", **options: object
) -> PreTrainedModel:
    """Return the model of a directory, in eval mode, with buffers, its parameters zeros without memory.

    options: keys that replace those of config.json. Raises InputError for a directory that is not a model.
    """
    read_config(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
        with init_empty_weights(include_buffers=False):
            model = factory.from_config(config, attn_implementation=attention, dtype=dtype)
    except Exception as error:  # the library raises whatever its parsers and validators raise
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be loaded as a model: {detail}", "check config.json") from error
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros((), dtype=value.dtype).expand(value.shape)))
    model.tie_weights()
    if (path / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model.eval()


def divide(
    model: Network, path: Path, layout: ShardLayout, compute: torch.dtype | None = None, unread: Collection[str] = ()
) -> None:
    """Divide the weights of a `skeleton`, in place, and read them from `path`.

    model: the skeleton, in peft's wrapper or not. A parameter that has memory keeps its value, which has to be the same
    on every process. compute: dtype of the products; None: that of the weights. unread: names in the files that the
    model does not have.
    Raises InputError, on every process, for missing and unknown tensors, wrong shapes, and values that are not finite.
    """
    plain = plain_model(model)
    assert isinstance(plain, nn.Module)
    kept = {name: value.detach().clone() for name, value in plain.named_parameters() if not _weightless(value)}
    on_meta: dict[nn.Parameter, nn.Parameter] = {}
    for module in plain.modules():
        for name, value in module.named_parameters(recurse=False):
            if value not in on_meta:
                on_meta[value] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
            setattr(module, name, on_meta[value])
    shard(plain, layout, compute)
    _materialise(plain, layout.device)
    _fill(plain, path, kept, set(unread))


def _weightless(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 0 and not any(parameter.stride())


def whole_name(name: str) -> str:
    """The name that a tensor has in the files of a model whose layers have adapters."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".").replace(".original_module.", ".")


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Give the shards memory; buffers, which were computed on the CPU, keep their values."""
    buffers = [
        (module, name, buffer.to(device))
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.to_empty(device=device)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer


@torch.no_grad()
def _fill(model: nn.Module, path: Path, kept: Mapping[str, Tensor], unread: set[str]) -> None:
    """Write every shard. One collective at the end: all processes fail together."""
    places = {name: file for file in weight_files(path) for name in read_header(file)}
    parameters = dict(model.named_parameters())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = {whole_name(name): name for name in parameters if name not in kept}
    for kind, names in (
        ("lacks", wanted.keys() - places.keys()),
        ("has the unknown", places.keys() - wanted.keys() - unread - tied - {whole_name(name) for name in kept}),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(
                f"{path} {kind} tensor {min(names)}{more}", "check that the weights belong to its config.json"
            )
    for name, value in kept.items():
        write_part(parameters[name], value, name, path)
    worst = ""
    for file in sorted({places[name] for name in wanted}):
        with safe_open(file, framework="pt") as opened:
            for name in (name for name in wanted if places[name] == file):
                part = write_part(parameters[wanted[name]], opened.get_slice(name), name, path)
                if not torch.isfinite(part.sum(dtype=torch.float32)) and not torch.isfinite(part).all():
                    worst = worst or name
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, worst)
    if bad := sorted({name for name in found if name}):
        raise InputError(f"{path}: {bad[0]} holds NaN or Inf", "the model is broken; use an earlier checkpoint")


class _Sliced(Protocol):
    """A tensor, or a view of a file that reads what is asked of it."""

    def __getitem__(self, ranges: tuple[slice, ...]) -> Tensor: ...


def write_part(parameter: nn.Parameter, saved: _Sliced | Tensor, name: str, path: Path) -> Tensor:
    """Copy this process's part of a tensor into its shard and return the shard."""
    shape = tuple(saved.shape if isinstance(saved, Tensor) else saved.get_shape())  # type: ignore[attr-defined]
    if shape != tuple(parameter.shape):
        raise InputError(
            f"{path}: {name} has the shape {shape}, the model needs {tuple(parameter.shape)}",
            "check that the weights belong to its config.json",
        )
    if not isinstance(parameter, DTensor):
        raise RuntimeError(f"{name} is not divided")
    part: Tensor = parameter.to_local()
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if part.numel():
        part.copy_(saved[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))])
    return part
