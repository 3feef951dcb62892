"""Policies and reward models that are divided over processes, with the checks that `models/loading.py` makes of whole
ones.

    trained     `divided_policy`: FSDP2 units (`units.py`)
    frozen      `read_shards`, `lent_reward_model`: shards, and a plain model that they are lent to (`lending.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gemma2.core.errors import InputError
from gemma2.merging.inputs.architecture import classifies
from gemma2.posttrain.attention.choice import chosen_kernel
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import default_device, load_tokenizer, read_config
from gemma2.posttrain.models.protocols import CausalLM, Network, RewardNetwork
from gemma2.posttrain.schemas.fields import Attention

from .into_shards import divide, skeleton
from .lending import lend
from .units import ShardLayout, local

__all__ = [
    "Shards",
    "divided_policy",
    "empty_policy",
    "lent_average",
    "lent_reward_model",
    "read_shards",
]

Shards = dict[str, Tensor]  # DTensors by name, tied ones once


def empty_policy(path: Path, dtype: torch.dtype = torch.float32, attention: Attention = "eager") -> CausalLM:
    """Return the causal LM of a directory without memory for its weights.

    Raises InputError for a directory that is not a language model.
    """
    if classifies(read_config(path)):
        raise InputError(f"{path} is a reward model, not a language model", "give a causal LM")
    kernel = chosen_kernel(attention, path, dtype, default_device())
    return cast(CausalLM, skeleton(AutoModelForCausalLM, path, dtype, kernel))


def _empty_reward_model(path: Path, dtype: torch.dtype, attention: Attention = "eager") -> RewardNetwork:
    if not classifies(read_config(path)):
        raise InputError(f"{path} is not a reward model", "train one with gemma2 reward")
    kernel = chosen_kernel(attention, path, dtype, default_device())
    model = cast(RewardNetwork, skeleton(AutoModelForSequenceClassification, path, dtype, kernel))
    labels = getattr(model.config, "num_labels", 1)
    if labels != 1:
        raise InputError(f"{path} has {labels} outputs", "a reward model has one")
    return model


def divided_policy(
    path: Path,
    layout: ShardLayout,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    adapt: Callable[[CausalLM], object] | None = None,
    attention: Attention = "eager",
) -> CausalLM:
    """Read a causal LM into the shards of FSDP2 units, for training. A collective.

    dtype: of the shards; compute: of the products, None: that of the shards; adapt: adds adapters to the skeleton.
    Raises InputError as `load_policy` does.
    """
    model = empty_policy(path, dtype, attention)
    if adapt is not None:
        adapt(model)
    divide(model, path, layout, compute)
    return model


def read_shards(model: Network, path: Path, layout: ShardLayout) -> Shards:
    """Read the weights of a skeleton into shards. A collective. The model itself is used up."""
    divide(model, path, layout)
    return {name: value.data for name, value in model.named_parameters()}


def lent_reward_model(
    path: Path, layout: ShardLayout, dtype: torch.dtype = torch.float32, attention: Attention = "eager"
) -> tuple[RewardNetwork, Tokenizer]:
    """Return a frozen reward model that its shards are lent to, and its tokenizer. A collective.

    Raises InputError as `load_reward_model` does.
    """
    shards = read_shards(_empty_reward_model(path, dtype), path, layout)
    return _lent_reward_model(path, shards, layout, dtype, attention)


@torch.no_grad()
def lent_average(
    paths: Sequence[Path], layout: ShardLayout, dtype: torch.dtype = torch.float32, attention: Attention = "eager"
) -> tuple[RewardNetwork, Tokenizer]:
    """Return the uniform average of reward models, formed in fp32 on the shards, to be opened in `dtype`."""
    total = read_shards(_empty_reward_model(paths[0], torch.float32), paths[0], layout)
    for path in paths[1:]:
        other = read_shards(_empty_reward_model(path, torch.float32), path, layout)
        torch._foreach_add_([local(value) for value in total.values()], [local(other[name]) for name in total])
    torch._foreach_div_([local(value) for value in total.values()], float(len(paths)))
    narrow = {name: value.to(dtype) for name, value in total.items()}
    return _lent_reward_model(paths[0], narrow, layout, dtype, attention)


def _lent_reward_model(
    path: Path, shards: Shards, layout: ShardLayout, dtype: torch.dtype, attention: Attention
) -> tuple[RewardNetwork, Tokenizer]:
    shell, tokenizer = _empty_reward_model(path, dtype, attention), load_tokenizer(path)
    shell.config.pad_token_id = tokenizer.pad_token_id
    lend(shell, lambda: iter(shards.items()), dtype, layout.device)
    return shell, tokenizer
