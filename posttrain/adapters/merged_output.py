"""The plain model of an adapter whose base was loaded in fewer bits than its directory has.

    W_out = fp32(W of the directory) + (alpha / rank) B A            (Hu et al., 2106.09685, section 4.1)

The base is read again, tensor by tensor, so the output holds no error of quantising, and no second model is in memory.
It is not exactly the model that was trained, W' + (alpha / rank) B A with W' the quantised base
(`output_difference.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma2.core.errors import InputError
from gemma2.core.json_files import write_json
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import open_to_readers, save_tokenizer
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import Network
from gemma2.posttrain.quantisation.quantised_linear import QuantisedLinear

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

__all__ = ["Products", "is_rounded", "products_of", "write_merged"]

SHARD = 4 * 2**30  # bytes of a file at most, if no tensor is larger
PREFIX = "model."  # of a directory that was written from the network without its head, or the other way round
Products = Mapping[str, Callable[[], Tensor]]  # name of a weight in the plain model -> what is added to it, (out, in)


def is_rounded(model: Network) -> bool:
    """Whether a model with adapters has a base that may be less precise than the one in its directory."""
    parts = list(plain_model(model).modules())
    adapted = any(hasattr(module, "lora_A") for module in parts)
    narrow = any(isinstance(module, QuantisedLinear) for module in parts) or model.dtype != torch.float32
    return adapted and narrow


def products_of(model: Network) -> dict[str, Callable[[], Tensor]]:
    """The product of every adapter, formed when it is asked for, in fp32 on the CPU."""
    return {
        f"{name}.weight": _product_of(cast("LoraLayer", module))
        for name, module in plain_model(model).named_modules()
        if hasattr(module, "lora_A")
    }


def _product_of(layer: LoraLayer) -> Callable[[], Tensor]:
    (adapter,) = layer.active_adapters
    return lambda: layer.get_delta_weight(adapter).detach().float().cpu()


@dataclass(frozen=True)
class _OutputTensor:
    """One tensor of the output. value: of a trained tensor; None: read from the base."""

    shape: torch.Size
    value: Tensor | None = None


@torch.no_grad()
def write_merged(model: Network, products: Products, base: Path, tokenizer: Tokenizer, directory: Path) -> None:
    """Write config, weights in fp32, generation config and tokenizer of `base` with products added to its weights.

    model: the network that was trained, inside or outside peft's wrapper: its tensors are those of the output, and the
    ones that were trained in full, a reward model's head, are taken from it.
    Raises InputError for a base that lacks a tensor, or whose shapes changed since it was loaded.
    """
    plain = cast("PreTrainedModel", plain_model(model))
    shards = list(_shards(_parts(plain)))
    files = {name: file for file in weight_files(base) for name in _names(file)}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: _formed(key, part, products, files, base) for key, part in shard.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(4 * part.shape.numel() for shard in shards for part in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
    config = copy.deepcopy(plain.config)
    config.architectures, config.dtype = [type(plain).__name__], "float32"
    config.save_pretrained(directory)
    if plain.can_generate():
        plain.generation_config.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    open_to_readers(directory)


def _parts(plain: PreTrainedModel) -> Iterator[tuple[str, _OutputTensor]]:
    """(name, tensor) of everything that the plain model consists of; tied tensors once."""
    for name, parameter in plain.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        if ".modules_to_save." in name:
            before, _, after = name.partition(".modules_to_save.")
            yield f"{before}.{after.partition('.')[2]}", _OutputTensor(parameter.shape, parameter.detach())
            continue
        owner = plain.get_submodule(name.rpartition(".")[0])
        shape = parameter.shape
        if isinstance(owner, QuantisedLinear) and name.endswith(".weight"):
            shape = torch.Size((owner.out_features, owner.in_features))
        yield (
            name.replace(".base_layer.", "."),
            _OutputTensor(shape, parameter.detach() if parameter.requires_grad else None),
        )


def _shards(parts: Iterator[tuple[str, _OutputTensor]]) -> Iterator[dict[str, _OutputTensor]]:
    """Cut the tensors into files of about SHARD bytes."""
    shard: dict[str, _OutputTensor] = {}
    size = 0
    for name, part in parts:
        taken = 4 * part.shape.numel()
        if shard and size + taken > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = part
        size += taken
    yield shard


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _formed(name: str, part: _OutputTensor, products: Products, files: Mapping[str, Path], base: Path) -> Tensor:
    if part.value is not None:
        return part.value.float().cpu().contiguous()
    found = next((one for one in (name, name.removeprefix(PREFIX), PREFIX + name) if one in files), None)
    if found is None:
        raise InputError(f"{base} has no {name} any longer", "restore it, and give --resume")
    with safe_open(files[found], framework="pt") as tensors:
        weight: Tensor = tensors.get_tensor(found).float()
    if weight.shape != part.shape:
        raise InputError(
            f"{base}: {name} has the shape {tuple(weight.shape)}, it was loaded with {tuple(part.shape)}",
            "restore it, and give --resume",
        )
    return weight + products[name]() if name in products else weight.contiguous()
