"""One decoding step in a third of transformers' operations, for the sampler; same weights, same numbers.

A step of decoding is bound by the number of operations, not by arithmetic: on small models and on GPUs the modules
cost several times as much as the matrices. Here each query is one row (no length axis), q, k and v are one product,
keys are shared by the query heads of their group without being repeated, and rotations come from a table. Norms and
softmax are in fp32, as in transformers; so is the head (`head.py`), which in transformers is not. No operation records
a gradient; prefill, training and every architecture that is not in `FAMILIES` use transformers.

Source of the architectures: Gemma 2 report (2408.00118), section 2; Llama, Mistral, Qwen 2 and 3 as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache

from .attention import layer_masks
from .decoder_blocks import ACTIVATIONS, KvStore, Layer, Norm
from .head import HALF, states_of_head, wide_linear
from .lora import adapters_are_products, plain_class
from .protocols import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["DecodingWeights", "StepDecoder", "precision"]

FAMILIES = (Gemma2ForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
ROTATIONS = ("default", "linear", "llama3", "yarn")  # kinds of rope whose angles do not depend on the length
WIDE = 16384  # tokens from which a vocabulary counts as wide
WIDENED = 2**27  # elements of a head of half precision, up to which a CPU keeps a copy of it in fp32: 512 MiB


class DecodingWeights:
    """The weights of a model as decoding reads them. Made once for all batches of a rollout, and dropped after it.

    Under autocast they are copies in its dtype, products of adapters added in fp32 before they are rounded; else the
    weights of the model where nothing has to be added to them. They are out of date once the model has learned.
    """

    def __init__(self, model: Gemma2ForCausalLM | LlamaForCausalLM) -> None:
        dtype = precision(model)
        self.layers = [Layer(layer, _activation(model.config), dtype) for layer in model.model.layers]
        self.norm = Norm(model.model.norm, isinstance(model, Gemma2ForCausalLM))
        self.head = _head_weight(model.lm_head.weight, dtype)

    @classmethod
    def of(cls, model: CausalLM) -> DecodingWeights | None:
        """The weights of a model that `StepDecoder` takes; None for another one."""
        return cls(model) if StepDecoder.fits(model) else None


class StepDecoder:
    """Decodes with one model from a prefilled cache while its weights do not change.

    length: columns at most; weights: those of the model, if they were prepared before.
    """

    def __init__(
        self,
        model: Gemma2ForCausalLM | LlamaForCausalLM,
        length: int,
        weights: DecodingWeights | None = None,
    ) -> None:
        self.model = model
        self.config = model.config
        prepared = DecodingWeights(model) if weights is None else weights
        self.layers, self.norm, self.head = prepared.layers, prepared.norm, prepared.head
        self.kinds = getattr(model.config, "layer_types", None) or [""] * len(self.layers)
        self.cos, self.sin = self._rotations(length)

    @staticmethod
    def fits(model: CausalLM) -> bool:
        """Whether `model` is of a family in `FAMILIES`, with a rotation and an activation that are known here.

        Linear layers may have LoRA adapters; the decoder works on copies of the weights with their products added.
        """
        return (
            plain_class(model) in FAMILIES
            and _activation(model.config) in ACTIVATIONS
            and model.config.rope_parameters.get("rope_type") in ROTATIONS
            and adapters_are_products(model)
            and isinstance(model.get_output_embeddings(), torch.nn.Linear)
        )

    def _rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin (length, 1, head_dim) of every position.

        A rotation is x cos + swapped(x) sin, where swapped exchanges the halves of the last axis; the sine includes the
        sign of the first half.
        """
        positions = torch.arange(length, device=self.model.device)[None]
        cos, sin = self.model.model.rotary_emb(self.model.model.embed_tokens.weight, positions)  # (1, length, head_dim)
        low, high = sin.chunk(2, -1)
        return cos[0][:, None], torch.cat((-low, high), -1)[0][:, None]

    def step(self, cache: Cache, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, V) fp32 after one more token per row.

        tokens: (B,); positions: (B,), counted without padding; mask: (B, 1, 1, K) additive, K includes the new column.
        """
        masks = layer_masks(self.config, mask)
        by_layer = [masks[kind] for kind in self.kinds] if isinstance(masks, dict) else [masks] * len(self.layers)
        return self.step_through(cache.layers, tokens, positions, by_layer)

    def step_through(
        self, layers: Sequence[KvStore], tokens: Tensor, positions: Tensor, masks: Sequence[Tensor]
    ) -> Tensor:
        """As `step`, with the keys and values and the mask (B, 1, 1, K) of each layer. Never waits for the device."""
        with torch.autocast(tokens.device.type, enabled=False):  # the weights have the precision that it asks for
            cos, sin = self.cos[positions], self.sin[positions]  # (B, 1, head_dim)
            hidden = self.model.model.embed_tokens(tokens)  # (B, d)
            for layer, mask, kv in zip(self.layers, masks, layers, strict=True):
                hidden = layer.step(hidden, cos, sin, mask, kv)
            logits = _head(self.norm(hidden), self.head)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def precision(model: CausalLM) -> torch.dtype:
    """The dtype of a model's products: that of its weights, or the one that autocast asks for."""
    device = model.device.type
    asked: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return asked


def _head_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head in the dtype of its products, which would else be converted for every token (`wide_linear`)."""
    if weight.device.type != "cpu":
        return weight.to(dtype)
    return weight.float() if weight.dtype in HALF and weight.numel() <= WIDENED else weight


def _activation(config: PreTrainedConfig) -> str:
    """Name of the activation of the MLP; Gemma calls it differently."""
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _head(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden (B, d) times weight (V, d) transposed, in fp32.

    For few rows and a wide vocabulary the other order is up to twice as fast on a CPU (4 to 15 rows, measured).
    """
    states = states_of_head(hidden)
    if states.device.type == "cpu" and 4 <= len(states) < 16 and len(weight) >= WIDE and states.dtype == weight.dtype:
        return torch.mm(weight, states.T).T.contiguous()
    return wide_linear(states, weight)
