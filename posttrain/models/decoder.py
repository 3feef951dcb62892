"""One decoding step of Gemma 2 in a third of transformers' operations, for the sampler; same weights, same numbers.

    x <- x + norm(attention(norm(x)));  x <- x + norm(mlp(norm(x)))        norm(x) = x / rms(x) * (1 + w)
    attention: softmax(cap * tanh(q k / (sqrt(s) cap)) + mask) v           mlp: down(gelu_tanh(gate x) * up x)
                                                                           (Gemma 2 report, 2408.00118, section 2)

A step of decoding is bound by the number of operations, not by arithmetic: on small models and on GPUs the modules cost
several times as much as the matrices. Here each query is one row (no length axis), q, k and v are one product, keys are
shared by the query heads of their group without being repeated, and rotations come from a table that also contains the
scale of the queries. Norms and softmax are in fp32, as in transformers. No operation records a gradient; prefill,
training and every other architecture use transformers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma2ForCausalLM
from transformers.cache_utils import Cache

from .attention import KvLayer, layer_masks
from .lora import adapters_are_products, weight_of
from .protocols import CausalLM

if TYPE_CHECKING:
    from transformers import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RMSNorm

__all__ = ["Gemma2Decoder"]

WIDE = 16384  # tokens from which a vocabulary counts as wide


class Gemma2Decoder:
    """Decodes with one model from a prefilled cache while its weights do not change. `length`: columns at most."""

    def __init__(self, model: Gemma2ForCausalLM, length: int) -> None:
        self.model = model
        self.config = model.config
        self.layers = [_Layer(layer) for layer in model.model.layers]
        self.norm = _Norm(model.model.norm)
        self.cos, self.sin = self._rotations(length)

    @staticmethod
    def fits(model: CausalLM) -> bool:
        """Whether `model` is a Gemma 2 as released: no biases, no other rotation or activation. Linear layers may have
        LoRA adapters; the decoder works on copies of the weights with their products added."""
        config: Gemma2Config = model.config
        return (
            type(model) is Gemma2ForCausalLM
            and config.hidden_activation == "gelu_pytorch_tanh"
            and not config.attention_bias
            and config.rope_parameters.get("rope_type") == "default"
            and adapters_are_products(model)
            and isinstance(model.get_output_embeddings(), torch.nn.Linear)
        )

    def _rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin (length, heads + kv_heads, head_dim) of every position; queries: times the scale.

        A rotation is x cos + swapped(x) sin, where swapped exchanges the halves of the last axis; the sine includes the
        sign of the first half.
        """
        attention = self.layers[0].attention
        positions = torch.arange(length, device=self.model.device)[None]
        cos, sin = self.model.model.rotary_emb(self.model.model.embed_tokens.weight, positions)  # (1, length, head_dim)
        sin = torch.cat((-sin[..., : attention.head_dim // 2], sin[..., attention.head_dim // 2 :]), -1)
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        scale = torch.tensor([attention.scaling] * heads + [1.0] * kv_heads, device=cos.device)[:, None]
        return (cos[0][:, None] * scale).to(cos.dtype), (sin[0][:, None] * scale).to(cos.dtype)

    def step(self, cache: Cache, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, V) fp32 after one more token per row.

        tokens: (B,); positions: (B,), counted without padding; mask: (B, 1, 1, K) additive, K includes the new column.
        """
        masks = layer_masks(self.config, mask)
        cos, sin = self.cos[positions], self.sin[positions]  # (B, heads + kv_heads, head_dim)
        hidden = self.model.model.embed_tokens(tokens)  # (B, d)
        for layer, kind, kv in zip(self.layers, self.config.layer_types, cache.layers, strict=True):
            hidden = layer.step(hidden, cos, sin, masks[kind] if isinstance(masks, dict) else masks, kv)
        logits = _head(self.norm(hidden), self.model.lm_head.weight)
        cap = self.config.final_logit_softcapping
        return (logits if cap is None else logits.div_(cap).tanh_().mul_(cap)).float()


def _head(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden (B, d) times weight (V, d) transposed.

    For few rows and a wide vocabulary the other order is up to twice as fast on a CPU (4 to 15 rows, measured).
    """
    if hidden.device.type == "cpu" and 4 <= len(hidden) < 16 and len(weight) >= WIDE and hidden.dtype == weight.dtype:
        return torch.mm(weight, hidden.T).T.contiguous()
    return F.linear(hidden, weight)


class _Norm:
    """RMSNorm with the scale 1 + w."""

    def __init__(self, norm: Gemma2RMSNorm) -> None:
        size = norm.weight.shape[0]
        # x / sqrt(mean(x^2) + eps) (1 + w) = x / sqrt(|x|^2 + d eps) sqrt(d) (1 + w): one reduction and no division.
        self.scale = (1.0 + norm.weight.float()) * math.sqrt(size)
        self.floor = self.scale.new_tensor(norm.eps * size)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (B, d), normalised in fp32."""
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide * torch.addcmul(self.floor, length, length).rsqrt_()).mul_(self.scale).to(x.dtype)


class _Layer:
    """One block: q, k and v weights concatenated, the other weights from the module; products of adapters are added."""

    def __init__(self, layer: Gemma2DecoderLayer) -> None:
        self.attention, mlp = layer.self_attn, layer.mlp
        self.qkv = torch.cat([weight_of(getattr(self.attention, f"{name}_proj")) for name in "qkv"])
        self.out = weight_of(self.attention.o_proj)
        self.gate, self.up, self.down = (weight_of(p) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.before_attention, self.after_attention = (
            _Norm(layer.input_layernorm),
            _Norm(layer.post_attention_layernorm),
        )
        self.before_mlp, self.after_mlp = (
            _Norm(layer.pre_feedforward_layernorm),
            _Norm(layer.post_feedforward_layernorm),
        )
        self.cap = self.attention.attn_logit_softcapping
        self.groups = self.attention.num_key_value_groups

    def step(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kv: KvLayer) -> Tensor:
        """Return the block's output (B, d) and append to `kv`.

        hidden: (B, d); cos, sin: (B, heads + kv_heads, head_dim); mask: (B, 1, 1, K).
        """
        attended = self._attend(self.before_attention(hidden), cos, sin, mask, kv)
        hidden = hidden + self.after_attention(attended)
        inner = self.before_mlp(hidden)
        gate = F.gelu(F.linear(inner, self.gate), approximate="tanh")
        gated = gate.mul_(F.linear(inner, self.up))
        return hidden + self.after_mlp(F.linear(gated, self.down))

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kv: KvLayer) -> Tensor:
        rows, head_dim = x.shape[0], self.attention.head_dim
        both = cos.shape[1]  # heads + kv_heads
        heads = F.linear(x, self.qkv).view(rows, -1, head_dim)  # (B, heads + 2 kv_heads, head_dim)
        rotating = heads[:, :both]
        low, high = rotating.chunk(2, -1)
        rotated = torch.addcmul(rotating * cos, torch.cat((high, low), -1), sin)
        kv_heads = heads.shape[1] - both
        query, key = rotated[:, : both - kv_heads], rotated[:, both - kv_heads :, None]
        keys, values = kv.update(key, heads[:, both:, None])  # (B, kv_heads, K, head_dim)
        # Query heads j * groups .. (j + 1) * groups - 1 read KV head j.
        grouped = query.reshape(rows, kv_heads, self.groups, head_dim)
        weights = torch.matmul(grouped, keys.transpose(2, 3))  # (B, kv_heads, groups, K)
        if self.cap is not None:
            weights = weights.div_(self.cap).tanh_().mul_(self.cap)
        weights = torch.softmax(weights.add_(mask), -1, dtype=torch.float32).to(values.dtype)
        return F.linear(torch.matmul(weights, values).view(rows, -1), self.out)
