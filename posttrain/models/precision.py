"""In which precision a model computes, stated once.

trained         weights, gradients, moments and the EMA anchor in fp32; products in bf16 on an accelerator (autocast)
under adapters  frozen, so as what is not trained; with --base-bits matrices in 4 or 8 bits (`adapters/frozen_base.py`)
not trained     policies that are measured or sampled from, reward models, teachers, judges: `--dtype`, by default bf16
                on an accelerator and fp32 on a CPU. bf16 halves the memory; on a CPU it is faster only with AMX
                (docs/benchmarks.md)
measured        a policy that is evaluated while it is trained, and what its KL is measured to: their weights rounded to
                `--dtype`, without autocast, as `eval` and `pareto` load them (`as_loaded`)
heads           logits, log-probs, softmax and the KL in fp32 everywhere (`head.py`)

The reference of RL is a copy of the policy where RL starts from it, so that their KL begins at 0: both are rounded
alike. It takes no memory of an accelerator between evaluations, unless it is the anchor too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from gemma2.posttrain.quantisation.quantised_linear import QuantisedLinear
from gemma2.posttrain.schemas.fields import Dtype

from .loading import default_device
from .lora import adapted_weights, plain_model, with_weights
from .protocols import CausalLM, Network

__all__ = ["HOST", "as_loaded", "free_cached", "frozen_dtype", "rounded_copy", "trained_weights", "widening"]

HOST = torch.device("cpu")
N = TypeVar("N", bound=Network)


def frozen_dtype(asked: Dtype) -> torch.dtype:
    """The dtype of a model that is not trained, by what `--dtype` says."""
    if asked == "auto":
        return torch.float32 if default_device().type == "cpu" else torch.bfloat16
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def widening(trainer: Mapping[str, object], dtype: Dtype = "bfloat16", flag: str = "--dtype") -> str:
    """Return how to change that a training computes something in fp32 and not under autocast; "" if nothing does.

    trainer  its options of the Trainer, which may turn autocast off
    dtype    of the models that it only reads without autocast, as `flag` asks for it
    """
    if not trainer.get("bf16", True) and not trainer.get("fp16"):
        return "leave trainer.bf16 out"
    return f"give {flag} bfloat16" if frozen_dtype(dtype) == torch.float32 else ""


@contextmanager
def as_loaded(model: N, dtype: torch.dtype) -> Iterator[N]:
    """The model as a command loads it that only computes forward: in `dtype`, on the accelerator if there is one.

    It is the model itself where that has this form; else a rounded copy, which is gone with its last name.
    """
    device = default_device()
    weights = (weight for weight in model.parameters() if weight.is_floating_point())  # the others are quantised
    if {(weight.dtype, weight.device.type) for weight in weights} == {(dtype, device.type)}:
        yield model
        return
    yield rounded_copy(model, dtype, device)


def rounded_copy(model: N, dtype: torch.dtype, device: torch.device) -> N:
    """Return a copy in eval mode with every weight rounded to `dtype`, on `device`, without gradients; ties are kept.

    Quantised weights stay as they are. Buffers keep their dtype, as in a model that is loaded in `dtype`. No second
    copy in the old dtype is made.
    """
    rounded = {
        id(weight): nn.Parameter(
            weight.detach().to(device, dtype if weight.is_floating_point() else weight.dtype), requires_grad=False
        )
        for weight in model.parameters()
    }
    copied = copy.deepcopy(model, rounded)
    for name in ("forward", "_original_forward"):  # accelerate's, under autocast; they would keep the copy alive too
        vars(copied).pop(name, None)
    result: N = copied.to(device).eval()
    return result


@contextmanager
def trained_weights(policy: CausalLM, base: CausalLM | None, dtype: torch.dtype) -> Iterator[CausalLM]:
    """The policy of a training as `as_loaded` gives a model, with the products of its adapters added to its weights.

    base: `sharing_copy` of the policy from before it had adapters; None where it has none.
    A policy on a quantised base is measured as it is trained: its weights as plain ones would take the memory that few
    bits save, and would still not be those of its output.
    """
    if any(isinstance(module, QuantisedLinear) for module in policy.modules()):
        yield plain_model(policy)
        return
    plain = policy
    if base is not None and dtype != torch.float32:
        plain = with_weights(base, ((name, weight.to(dtype)) for name, weight in adapted_weights(policy)))
    with as_loaded(plain_model(plain), dtype) as model:
        yield model


def free_cached() -> None:
    """Give memory of the accelerator back that no tensor uses any more: others than torch allocate there (vLLM)."""
    if default_device().type != HOST.type:
        torch.accelerator.empty_cache()
