"""WARM: one reward model whose weights are the uniform average of several (2401.12187, section 3).

    phi = 1/M sum_i phi_i

Averaging works for models that were fine-tuned from one pre-trained model and started with the same head; the weights
do not show this, so the caller must know it. Architecture, names and shapes of the tensors, and the tokenizer are
checked. The sum is taken in fp32 on the CPU, model by model, so that only two are in memory. `gemma2 merge linear`
writes the same average as a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemma2.core.errors import InputError
from gemma2.merging.inputs.checkpoint import open_checkpoint
from gemma2.merging.inputs.compatibility import check_same_architecture, check_same_tensors, check_same_tokenizer
from gemma2.posttrain.attention.choice import chosen_kernel
from gemma2.posttrain.models.loading import default_device, load_reward_model
from gemma2.posttrain.schemas.fields import Attention
from gemma2.posttrain.sharding.divided_models import lent_average
from gemma2.posttrain.sharding.units import ShardLayout

from .model import RewardModel

__all__ = ["averaged_reward_model"]


@torch.no_grad()
def averaged_reward_model(
    paths: Sequence[Path],
    dtype: torch.dtype = torch.float32,
    attention: Attention = "eager",
    layout: ShardLayout | None = None,
) -> RewardModel:
    """Return the average of reward models, formed in fp32 and rounded to `dtype`; divided by a layout if there is one.

    Raises InputError for models that cannot be averaged, naming the first difference.
    """
    check_averageable(paths)
    if layout is not None:
        return RewardModel(*lent_average(paths, layout, dtype, attention))
    cpu = torch.device("cpu")
    model, tokenizer = load_reward_model(paths[0], device=cpu)
    total: dict[str, Tensor] = dict(model.named_parameters())
    for path in paths[1:]:
        other, other_tokenizer = load_reward_model(path, device=cpu)
        if other_tokenizer.chat_template != tokenizer.chat_template:
            raise InputError(
                f"the chat templates of --reward {paths[0]} and --reward {path} differ",
                "average models that were trained with the same chat template",
            )
        for name, parameter in other.named_parameters():
            total[name] += parameter
        del other
    for summed in total.values():
        summed /= len(paths)
    model.config._attn_implementation = chosen_kernel(attention, paths[0], dtype, default_device())
    return RewardModel((model.bfloat16() if dtype == torch.bfloat16 else model).to(default_device()), tokenizer)


def check_averageable(paths: Sequence[Path]) -> None:
    """Refuse models that differ in architecture, tensors or tokenizer; of the weights, only headers are read."""
    first, *others = (open_checkpoint(path, "--reward") for path in paths)
    for other in others:
        check_same_architecture(first, other)
        check_same_tensors(first, other)
        check_same_tokenizer(first, other)
