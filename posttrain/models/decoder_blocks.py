"""The blocks of `decoder.py`: norms and layers of Gemma 2 and of the Llama family, on one token per row.

    Gemma 2:        x <- x + norm(attention(norm(x)));  x <- x + norm(mlp(norm(x)))      norm(x) = x / rms(x) * (1 + w)
    Llama, Mistral, Qwen 2 and 3:
                    x <- x + attention(norm(x));        x <- x + mlp(norm(x))            norm(x) = x / rms(x) * w
    attention       softmax(cap * tanh(q k / (sqrt(s) cap)) + mask) v; without a cap softmax(q k / sqrt(s) + mask) v
    mlp             down(activation(gate x) * up x)

Queries and keys of Qwen 3 are normalised per head before they are rotated. Linear layers may have biases (Qwen 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import bias_of, is_quantised, weight_of

if TYPE_CHECKING:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

__all__ = ["ACTIVATIONS", "KvStore", "Layer", "Norm"]

# Names of `hidden_act` and `hidden_activation` in config.json -> the function.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}


class KvStore(Protocol):
    """Keys and values of one layer: `KvLayer`, which grows, or `StaticKv`, whose tensors keep their places."""

    def update(self, key_states: Tensor, value_states: Tensor, /) -> tuple[Tensor, Tensor]:
        """Append (B, heads, 1, head_dim) and return the keys and values that the query may see."""
        ...


class Norm:
    """RMSNorm of the last axis; `centred`: the scale is 1 + w, as in Gemma.

    The mean square is in fp32. Gemma also scales in fp32; the others round to the dtype of the input first.
    """

    def __init__(self, norm: Gemma2RMSNorm | LlamaRMSNorm, centred: bool) -> None:
        weight: Tensor = norm.weight.detach()
        size = weight.shape[0]
        eps = norm.eps if centred else norm.variance_epsilon
        # x / sqrt(mean(x^2) + eps) w = x / sqrt(|x|^2 + d eps) sqrt(d) w: one reduction and no division.
        root = math.sqrt(size)
        self.floor = weight.new_tensor(eps * size, dtype=torch.float32)
        self.root = root
        self.scale = root * (weight.float() + 1.0 if centred else weight.float())
        self.weight, self.eps = weight, eps
        self.rounds_first = not centred and weight.dtype != torch.float32
        # An accelerator has one kernel for it, where the products below are seven; on a CPU those are faster.
        self.fused = weight.device.type != "cpu"
        self.gain = self.scale / root

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (..., d), normalised."""
        wide = x.float()
        if self.fused and self.rounds_first:
            return F.rms_norm(wide, wide.shape[-1:], None, self.eps).to(x.dtype) * self.weight
        if self.fused:
            return F.rms_norm(wide, wide.shape[-1:], self.gain, self.eps).to(x.dtype)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        shrink = torch.addcmul(self.floor, length, length).rsqrt_()
        if self.rounds_first:
            return (wide * shrink.mul_(self.root)).to(x.dtype) * self.weight
        return (wide * shrink).mul_(self.scale).to(x.dtype)


class _Copied:
    """x W.T + b of one linear layer or of several with the same input, as one product. Products of adapters are added.

    Where `dtype` is narrower than the model a copy of the weights is kept, which autocast would make for every token.
    """

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        weights = [weight_of(linear).to(dtype) for linear in linears]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        found = [bias_of(linear) for linear in linears]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in found):
            zeros = (self.weight.new_zeros(linear.out_features) for linear in linears)
            self.bias = torch.cat([zero if bias is None else bias for zero, bias in zip(zeros, found, strict=True)])
            self.bias = self.bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Quantised:
    """The same of layers in 4 or 8 bits: each computes for itself, its adapter next to it.

    A copy of all weights would take the memory that few bits save.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1) if len(self.linears) > 1 else self.linears[0](x)


def _product(linears: Sequence[nn.Linear], dtype: torch.dtype) -> _Copied | _Quantised:
    return _Quantised(linears) if any(map(is_quantised, linears)) else _Copied(linears, dtype)


class Layer:
    """One block: q, k and v are one product where their weights are not quantised.

    dtype: of the products. The residual stream stays as wide as the model, as under autocast.
    """

    def __init__(self, layer: Gemma2DecoderLayer | LlamaDecoderLayer, activation: str, dtype: torch.dtype) -> None:
        self.attention, mlp = layer.self_attn, layer.mlp
        self.dtype = dtype
        self.qkv = _product([getattr(self.attention, f"{name}_proj") for name in "qkv"], dtype)
        self.out = _product([self.attention.o_proj], dtype)
        self.gate, self.up = _product([mlp.gate_proj], dtype), _product([mlp.up_proj], dtype)
        self.down = _product([mlp.down_proj], dtype)
        self.activation = ACTIVATIONS[activation]
        after = hasattr(layer, "pre_feedforward_layernorm")  # Gemma 2 also normalises what a sublayer returns
        self.before_attention = Norm(layer.input_layernorm, after)
        self.before_mlp = Norm(layer.pre_feedforward_layernorm if after else layer.post_attention_layernorm, after)
        self.after_attention = Norm(layer.post_attention_layernorm, True) if after else None
        self.after_mlp = Norm(layer.post_feedforward_layernorm, True) if after else None
        of_heads = hasattr(self.attention, "q_norm")
        self.of_queries = Norm(self.attention.q_norm, False) if of_heads else None
        self.of_keys = Norm(self.attention.k_norm, False) if of_heads else None
        self.cap: float | None = getattr(self.attention, "attn_logit_softcapping", None)
        self.groups: int = self.attention.num_key_value_groups
        self.kv_heads = self.attention.k_proj.out_features // self.attention.head_dim

    def step(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kv: KvStore) -> Tensor:
        """Return the block's output (B, d) and append to `kv`.

        hidden: (B, d); cos, sin: (B, 1, head_dim); mask: (B, 1, 1, K).
        """
        attended = self._attend(self.before_attention(hidden).to(self.dtype), cos, sin, mask, kv)
        hidden = hidden + (attended if self.after_attention is None else self.after_attention(attended))
        inner = self.before_mlp(hidden).to(self.dtype)
        down = self.down(self.activation(self.gate(inner)).mul_(self.up(inner)))
        return hidden + (down if self.after_mlp is None else self.after_mlp(down))

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kv: KvStore) -> Tensor:
        rows, head_dim, kv_heads = x.shape[0], self.attention.head_dim, self.kv_heads
        heads = self.qkv(x).view(rows, -1, head_dim)  # (B, heads + 2 kv_heads, head_dim)
        rotating = heads[:, :-kv_heads]
        if self.of_queries is not None and self.of_keys is not None:
            query, key = rotating[:, :-kv_heads], rotating[:, -kv_heads:]
            rotating = torch.cat((self.of_queries(query), self.of_keys(key)), 1)
        low, high = rotating.chunk(2, -1)
        rotated = torch.addcmul(rotating * cos, torch.cat((high, low), -1), sin)
        query, key = rotated[:, :-kv_heads], rotated[:, -kv_heads:, None]
        keys, values = kv.update(key, heads[:, -kv_heads:, None])  # (B, kv_heads, K, head_dim)
        # Query heads j * groups .. (j + 1) * groups - 1 read KV head j.
        grouped = query.reshape(rows, kv_heads, self.groups, head_dim).to(keys.dtype)
        weights = torch.matmul(grouped, keys.transpose(2, 3))  # (B, kv_heads, groups, K)
        if self.cap is None:
            weights = torch.add(mask, weights, alpha=self.attention.scaling)
        else:
            weights = weights.mul_(self.attention.scaling / self.cap).tanh_().mul_(self.cap).add_(mask)
        weights = torch.softmax(weights, -1, dtype=torch.float32).to(values.dtype)
        return self.out(torch.matmul(weights, values).view(rows, -1).to(self.dtype))
