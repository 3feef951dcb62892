"""A loaded model is the one in its directory: dtype, soft caps, windows and weights, compared after loading.

A library that renames a tensor, skips a file or drops a key of config.json leaves a model that runs. Of a few tensors,
heads among them, the first row is compared with the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping

from .protocols import Network

__all__ = ["check_loaded", "check_weights_of"]

ELEMENTS = 64
KEYS = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "query_pre_attn_scalar", "layer_types")
HEADS = ("score.weight", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
HINT = "check the versions of torch and transformers, or report it"


def check_loaded(model: Network, path: Path, config: JsonMapping, dtype: torch.dtype, files: Sequence[Path]) -> None:
    """Raise InputError for a model that differs from its directory. config: the content of config.json."""
    other = [name for name, value in model.named_parameters() if value.is_floating_point() and value.dtype != dtype]
    if other:
        raise InputError(f"{path}: {other[0]} was loaded as {model.get_parameter(other[0]).dtype}, not {dtype}", HINT)
    for key in KEYS if config.get("model_type") == "gemma2" else ():
        for place in (model.config, *model.modules()):
            found = getattr(place, key, None)
            if key in config and found != config[key] and (place is model.config or hasattr(place, key)):
                if key == "sliding_window" and found is None and place is not model.config:
                    continue  # a global layer
                raise InputError(f"{path}: {key} is {config[key]} in config.json, the model has {found}", HINT)
    check_weights_of(model, path, files)


def check_weights_of(model: Network, path: Path, files: Sequence[Path]) -> None:
    """Raise InputError if the first and last tensors of a file, or a head, are not what the model holds."""
    held = dict(model.named_parameters())
    for file in files:
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name in held]  # noqa: SIM118  # not a mapping
            for name in dict.fromkeys([*names[:1], *names[-1:], *(name for name in HEADS if name in names)]):
                written, found = weights.get_slice(name), held[name].detach()
                if list(written.get_shape()) != list(found.shape) or not _alike(_first_row(written[:1]), found):
                    raise InputError(f"{path}: {name} is not the one in {file.name}", HINT)


def _first_row(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[:ELEMENTS]


def _alike(written: Tensor, found: Tensor) -> bool:
    row = _first_row(found[:1])
    return torch.allclose(written.to(row.device, row.dtype), row, rtol=0, atol=0, equal_nan=True)
