"""In which precision a model computes, stated once.

trained         weights, gradients, moments and the EMA anchor in fp32; products in bf16 on an accelerator (autocast)
under adapters  frozen, so as what is not trained; with --base-bits matrices in 4 or 8 bits (`adapters/frozen_base.py`)
not trained     policies that are measured or sampled from, reward models, teachers, judges: `--dtype`, by default bf16
                on an accelerator and fp32 on a CPU. bf16 halves the memory; on a CPU it is faster only with AMX
                (docs/benchmarks.md)
heads           logits, log-probs, softmax and the KL in fp32 everywhere (`head.py`)

The reference of RL is a copy of the policy where RL starts from it, in fp32: their KL begins at 0. Another one is not
trained, and so loaded as `--dtype` says.
"""

from __future__ import annotations

import torch

from gemma2.posttrain.schemas.fields import Dtype

from .loading import default_device

__all__ = ["frozen_dtype"]


def frozen_dtype(asked: Dtype) -> torch.dtype:
    """The dtype of a model that is not trained, by what `--dtype` says."""
    if asked == "auto":
        return torch.float32 if default_device().type == "cpu" else torch.bfloat16
    return torch.bfloat16 if asked == "bfloat16" else torch.float32
