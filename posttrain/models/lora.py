"""Low-rank adaptation by peft: W + (alpha / rank) B A, with B = 0 at the start (Hu et al., 2106.09685).

The output is the plain model with the products added to its weights, or the adapter alone in peft's layout, which
`gemma2 merge` reads together with its base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gemma2.core.errors import UsageError
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.quantisation.quantised_linear import QuantisedLinear, dequantised
from gemma2.posttrain.schemas import LoraFields
from gemma2.posttrain.schemas.config import closest

from .loading import open_to_readers, save_tokenizer
from .protocols import CausalLM, Network

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

__all__ = [
    "adapted_weights",
    "adapters_are_products",
    "bias_of",
    "check_targets",
    "is_quantised",
    "lora_config",
    "merged",
    "merged_copy",
    "plain_class",
    "plain_model",
    "save_adapter",
    "sharing_copy",
    "weight_of",
    "with_weights",
]


N = TypeVar("N", bound=Network)


def lora_config(config: LoraFields, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> LoraConfig | None:
    """Return peft's configuration, None if `lora_rank` is 0. The head of a classifier is trained in full."""
    if config.lora_rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) or "all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def check_targets(config: LoraFields, model: Network) -> None:
    """Refuse target names that match no linear layer of the model, and the output head.

    An adapter of the head would be trained by some losses and not by others; a classifier's head is trained in full.
    """
    heads = [
        model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None,
        getattr(model, "score", None),
    ]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(module is head for head in heads)
    ]
    known = {name.rpartition(".")[2] for name in names}
    for target in config.lora_targets if config.lora_rank else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UsageError(f"--lora-targets: no linear layer is named '{target}'", closest(target, known))


def merged(model: N) -> N:
    """Return the plain model with the LoRA products added to its weights, in place and in the dtype of the weights.

    Not for a base in fewer bits than its directory has: `adapters/merged_output.py` reads that one again.
    """
    plain: N = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return plain


def plain_model(model: N) -> N:
    """Return the model inside peft's wrapper; its layers include the adapters."""
    plain: N = model.get_base_model() if hasattr(model, "get_base_model") else model
    return plain


def plain_class(model: object) -> type:
    """The class of a model as it was before its weights were divided, which puts a subclass in its place."""
    kind = type(model)
    if not isinstance(model, FSDPModule):
        return kind
    return next(base for base in kind.__mro__[1:] if not issubclass(base, FSDPModule))


def adapted_weights(model: Network) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the plain model, W + (alpha / rank) B A in fp32) of every adapted weight.

    model: a causal LM with adapters in its layers, inside or outside peft's wrapper.
    """
    for name, module in plain_model(model).named_modules():
        if hasattr(module, "lora_A"):
            yield f"{name}.weight", _product_added(module, torch.float32)


def weight_of(linear: nn.Linear) -> Tensor:
    """Return the weight of a linear layer, with the product of its adapter added if it has one, in the same dtype.

    An adapter whose B is still 0 adds nothing: the weight itself is returned, so that the check before the first step
    does not copy the whole model. A quantised weight is formed anew.
    """
    if not hasattr(linear, "lora_A"):
        return dequantised(linear)
    adapted: LoraLayer = linear
    weight: Tensor = dequantised(adapted.get_base_layer())
    (adapter,) = adapted.active_adapters
    return _product_added(adapted, weight.dtype) if adapted.lora_B[adapter].weight.any() else weight


def bias_of(linear: nn.Linear) -> Tensor | None:
    """Return the bias of a linear layer, with or without an adapter."""
    if not hasattr(linear, "lora_A"):
        return linear.bias
    adapted: LoraLayer = linear
    bias: Tensor | None = adapted.get_base_layer().bias
    return bias


def _product_added(layer: LoraLayer, dtype: torch.dtype) -> Tensor:
    (adapter,) = layer.active_adapters
    weight: Tensor = dequantised(layer.get_base_layer()).detach().float()
    product: Tensor = layer.get_delta_weight(adapter).detach().float()
    return (weight + product).to(dtype)


def is_quantised(linear: nn.Linear) -> bool:
    """Whether a linear layer, with or without an adapter, keeps its weight in 4 or 8 bits."""
    if not hasattr(linear, "lora_A"):
        return isinstance(linear, QuantisedLinear)
    adapted: LoraLayer = linear
    return isinstance(adapted.get_base_layer(), QuantisedLinear)


def adapters_are_products(model: Network) -> bool:
    """Whether every adapter in a model has the form W + s B A on a linear layer and is switched on."""
    adapted: list[LoraLayer] = [module for module in model.modules() if hasattr(module, "lora_A")]
    if not adapted:
        return True
    from peft.tuners.lora import Linear

    return all(
        type(module) is Linear
        and len(module.active_adapters) == 1
        and not module.lora_variant  # DoRA and its like
        and not module.disable_adapters
        and not module.merged
        and not any(module.lora_bias.values())
        for module in adapted
    )


def sharing_copy(model: N) -> N:
    """Return a second model on the same parameters: separate modules, no memory for weights, which must not change."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def merged_copy(base: N, model: Network) -> N:
    """Return a plain copy of a model with adapters: products added to weights, everything else shared with `base`.

    base: `sharing_copy` of the model from before it had adapters.
    """
    return with_weights(base, adapted_weights(model))


def with_weights(base: N, weights: Iterable[tuple[str, Tensor]]) -> N:
    """Return a model that shares everything with `base` except these weights, given by name."""
    plain = sharing_copy(base)
    for name, weight in weights:
        path, _, leaf = name.rpartition(".")
        module, value = plain.get_submodule(path), torch.nn.Parameter(weight, requires_grad=False)
        if isinstance(module, QuantisedLinear):
            parent, _, last = path.rpartition(".")
            setattr(plain.get_submodule(parent), last, _linear(value, module.bias))
        else:
            setattr(module, leaf, value)
    return plain


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def save_adapter(
    model: CausalLM | PeftModel, tokenizer: Tokenizer, directory: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter in peft's layout, and its tokenizer. state: its tensors by name; default: those of `model`."""
    model.save_pretrained(directory, **({} if state is None else {"state_dict": dict(state)}))
    save_tokenizer(tokenizer, directory)
    open_to_readers(directory)
    (directory / "README.md").unlink(missing_ok=True)  # peft's model card, an empty form
