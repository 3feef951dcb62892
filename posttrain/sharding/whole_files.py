"""Plain safetensors from a sharded model, tensor by tensor: rank 0 never holds more than one of them.

The layout is the one of transformers' `save_pretrained`: one file, or several with an index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gemma2.core.outputs.safetensors_header import ITEM_BYTES, encode_header
from gemma2.posttrain.models.protocols import Network

from .units import gathered, plain_class

__all__ = ["OutputTensor", "planned_of", "save_settings", "save_sharded", "write_file", "write_weights"]

FILE_BYTES = 5 * 10**9
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output before its values are there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * ITEM_BYTES[NAMES[self.dtype]]


def planned_of(model: Network) -> list[OutputTensor]:
    """The tensors of a model without adapters, tied ones once."""
    return [OutputTensor(name, value.dtype, tuple(value.shape)) for name, value in model.named_parameters()]


def save_sharded(
    model: Network, directory: Path, is_main: bool, values: Iterable[tuple[str, Tensor]] | None = None
) -> None:
    """Write config, generation config and weights of a sharded model. A collective; rank 0 writes.

    values: whole tensors in the order of `planned_of(model)`, for other weights than the model's.
    """
    write_weights(planned_of(model), gathered(model) if values is None else values, directory, is_main)
    if is_main:
        save_settings(model, directory)


def save_settings(model: Network, directory: Path) -> None:
    """Write config.json and generation_config.json of a sharded model."""
    config, name = model.config, plain_class(model).__name__
    config.architectures = [name]  # type: ignore[attr-defined]  # transformers is not typed
    config.save_pretrained(directory)  # type: ignore[attr-defined]
    if (settings := getattr(model, "generation_config", None)) is not None:
        settings.save_pretrained(directory)


def write_weights(
    plan: Sequence[OutputTensor], values: Iterable[tuple[str, Tensor]], directory: Path, is_main: bool
) -> None:
    """Write tensors in the order of `plan` as they come. Every process goes through all `values`; rank 0 writes.

    Raises RuntimeError for a tensor that is not the planned one.
    """
    files = list(_files(plan))
    stream = iter(values)
    for number, tensors in enumerate(files, 1):
        write_file(tensors, stream, directory / _file_name(number, len(files)) if is_main else None)
    if is_main and len(files) > 1:
        places = {item.name: _file_name(number, len(files)) for number, group in enumerate(files, 1) for item in group}
        index = {"metadata": {"total_size": sum(item.nbytes for item in plan)}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(tensors: Sequence[OutputTensor], values: Iterable[tuple[str, Tensor]], file: Path | None) -> None:
    """Take the values of `tensors`, in their order, and write them to a file; to none where it is None."""
    header, starts = encode_header({item.name: (NAMES[item.dtype], item.shape) for item in tensors})
    stream = iter(values)
    with nullcontext() if file is None else file.open("wb") as opened:
        if opened is not None:
            opened.write(header)
        for item in tensors:
            found, value = next(stream)
            if found != item.name:
                raise RuntimeError(f"{found} came in the place of {item.name}")
            if opened is None:
                continue
            if tuple(value.shape) != item.shape:
                raise RuntimeError(f"{item.name} has the shape {tuple(value.shape)}, planned was {item.shape}")
            assert opened.tell() == starts[item.name]
            raw = value.detach().to("cpu", item.dtype).contiguous().view(-1).view(torch.uint8)
            opened.write(raw.numpy().data)


def _files(plan: Sequence[OutputTensor]) -> Iterator[list[OutputTensor]]:
    """Cut the tensors into files of at most FILE_BYTES, or of one tensor."""
    group: list[OutputTensor] = []
    for item in plan:
        if group and sum(other.nbytes for other in group) + item.nbytes > FILE_BYTES:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _file_name(number: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"
