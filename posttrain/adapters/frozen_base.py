"""The model that a command trains, as it is loaded: in fp32, or as the frozen base of an adapter.

all weights are trained     fp32
LoRA                        the base is not trained: as `models/precision.py` says on an accelerator, fp32 on a CPU
LoRA with --base-bits       its linear layers in 4 or 8 bits; embeddings, norms and heads as above. The model is
                            compared with its directory before it is quantised, and what quantising changes is measured

Adapters, and the head of a reward model, which is trained next to them, are fp32 in all cases.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from gemma2.core.progress import Progress
from gemma2.posttrain.attention.choice import chosen_kernel
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import default_device, load_policy
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.protocols import CausalLM, Network
from gemma2.posttrain.quantisation.convert import quantise
from gemma2.posttrain.quantisation.nf4 import require_bitsandbytes
from gemma2.posttrain.schemas import LoraFields
from gemma2.posttrain.schemas.fields import Attention

__all__ = ["base_dtype", "check_base", "load_trained", "quantised_base"]

N = TypeVar("N", bound=Network)


def base_dtype(config: LoraFields) -> torch.dtype:
    """The dtype of a model that is going to be trained: fp32, or that of a frozen base.

    A CPU trains without autocast, and so does `trainer.bf16: false`: there a base is as wide as its adapter.
    """
    autocast = default_device().type != "cpu" and getattr(config, "trainer", {}).get("bf16", True)
    if config.lora_rank == 0 or not autocast:
        return torch.float32
    return frozen_dtype(getattr(config, "dtype", "auto"))


def check_base(config: LoraFields) -> None:
    """Raise UsageError if --base-bits needs a package that is missing. Before anything is read or written."""
    if config.base_bits == 4:
        require_bitsandbytes()


def load_trained(
    path: Path, config: LoraFields, progress: Progress, attention: Attention = "eager"
) -> tuple[CausalLM, Tokenizer]:
    """Load the language model that is going to be trained, and its tokenizer.

    Raises what `load_policy` raises, and InputError for weights that cannot be quantised.
    """

    def load(device: torch.device, kernel: Attention) -> tuple[CausalLM, Tokenizer]:
        return load_policy(path, base_dtype(config), device, kernel)

    return quantised_base(path, config, progress, load, attention)


def quantised_base(
    path: Path,
    config: LoraFields,
    progress: Progress,
    load: Callable[[torch.device, Attention], tuple[N, Tokenizer]],
    attention: Attention = "eager",
) -> tuple[N, Tokenizer]:
    """Load a model, and quantise its linear layers if --base-bits says so. load: loads it to a device, with a kernel.

    A model that is quantised is loaded to main memory first, and moves one matrix after the other. Its attention is the
    kernel that suits the device on which it runs.
    """
    device = default_device()
    if config.base_bits is None:
        return load(device, attention)
    model, tokenizer = load(torch.device("cpu"), "eager")
    model.config._attn_implementation = chosen_kernel(attention, path, base_dtype(config), device)
    assert isinstance(model, nn.Module)
    error = quantise(model, config.base_bits, device)
    progress.note(f"{path}: {error}")
    return model.to(device), tokenizer
