"""What a training writes in the end, whole or divided: a plain model with LoRA products added, or the adapter alone.

A divided model is gathered tensor by tensor: rank 0 never holds more than one whole weight, with its product. The files
are those of `models/loading.py` and `models/lora.py`. Every function is a collective; rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import open_to_readers, save_model, save_tokenizer
from gemma2.posttrain.models.lora import adapters_are_products, merged, plain_model, save_adapter
from gemma2.posttrain.models.protocols import CausalLM, Network

from .into_shards import whole_name
from .units import gathered, is_sharded
from .whole_files import OutputTensor, save_settings, write_weights

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["merged_values", "save_result", "save_trained_adapter"]


def save_result(model: Network, tokenizer: Tokenizer, directory: Path, is_main: bool) -> None:
    """Write a trained model, in peft's wrapper or not, as a plain one; a whole one is merged in place on rank 0."""
    plain = plain_model(model)
    if not is_sharded(plain):
        if is_main:
            save_model(merged(model), tokenizer, directory)
        return
    assert adapters_are_products(plain)
    plan = [OutputTensor(whole_name(name), value.dtype, tuple(value.shape)) for name, value in _kept(plain)]
    write_weights(plan, merged_values(plain), directory, is_main)
    if is_main:
        save_settings(plain, directory)
        save_tokenizer(tokenizer, directory)
        open_to_readers(directory)


def save_trained_adapter(model: CausalLM, tokenizer: Tokenizer, directory: Path, is_main: bool) -> None:
    """Write the adapter of a model in peft's wrapper, in peft's layout."""
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    state = dict(gathered(model, trained)) if is_sharded(plain_model(model)) else None
    if is_main:
        save_adapter(model, tokenizer, directory, state)


def _kept(plain: Network) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a plain model has too: no factors of adapters, of a head that is trained in full the copy."""
    for name, value in plain.named_parameters():
        if ".lora_" not in name and ".original_module." not in name:
            yield name, value


@torch.no_grad()
def merged_values(plain: Network) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the plain model, whole W or W + s B A on the CPU) of a sharded model; empty except on rank 0."""
    main = dist.get_rank() == 0
    for name, parameter in _kept(plain):
        value = _whole(parameter)
        layer, _, leaf = name.rpartition(".base_layer.")
        if leaf == "weight":
            adapted = cast("LoraLayer", plain.get_submodule(layer))
            (adapter,) = adapted.active_adapters
            left, right = _whole(adapted.lora_B[adapter].weight), _whole(adapted.lora_A[adapter].weight)
            if main:
                value = value + (left @ right * adapted.scaling[adapter]).to(value.dtype)
        yield whole_name(name), value.cpu() if main else torch.empty(0, dtype=value.dtype)


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
