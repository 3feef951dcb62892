"""The trained weights of a model in one file, next to a run: written whole by rank 0, read back by every process.

Of a sharded model a process reads its part, and rank 0 holds one tensor at a time while it writes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import Network

from .into_shards import write_part
from .units import gathered, is_sharded
from .whole_files import OutputTensor, write_file

__all__ = ["read_weights", "save_trained"]


def save_trained(model: Network, file: Path, is_main: bool) -> None:
    """Write the trained weights of a model, in peft's wrapper or not, by name. A collective for a sharded one."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if is_sharded(plain_model(model)):
        plan = [OutputTensor(name, value.dtype, tuple(value.shape)) for name, value in trained.items()]
        write_file(plan, gathered(model, trained.keys()), file if is_main else None)
    elif is_main:
        save_file({name: value.detach().contiguous() for name, value in trained.items()}, file)


@torch.no_grad()
def read_weights(model: Network, file: Path) -> None:
    """Copy the weights of a file into the parameters of the same names."""
    parameters = dict(model.named_parameters())
    divided = is_sharded(plain_model(model))
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            if divided:
                write_part(parameters[name], opened.get_slice(name), name, file)
            else:
                parameters[name].copy_(opened.get_tensor(name))
