"""The last hidden state of the last token, which is all that a reward reads, with gradients, on a CPU.

    r = w . h_L[last],    h_l[t] = layer_l(h_{l-1}[0..t])

So the last layer needs queries, MLP and norms at one position of every row; only its keys and values need all
positions. This saves a fifth of the work with 4 layers, a thirtieth with 26. The other layers attend in blocks
(`causal_attention.py`). Rows are padded on the right, and no position looks at padding.

Deviation from transformers' forward pass: only the order of sums. Gemma 2 only; other architectures compute all
positions of all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma2ForSequenceClassification
from transformers.models.gemma2.modeling_gemma2 import rotate_half

from gemma2.posttrain.models.causal_attention import blockwise
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import RewardNetwork
from gemma2.posttrain.models.scorer import last_hidden_states

if TYPE_CHECKING:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

__all__ = ["all_positions", "embed", "last_position"]


def all_positions(model: RewardNetwork, ids: Tensor, lengths: Tensor) -> Tensor:
    """Return the last hidden state (B, d) fp32 of the last token of rows (B, T), padded on the right, lengths (B,)."""
    states = last_hidden_states(plain_model(model), ids)
    return states[torch.arange(len(ids), device=ids.device), lengths - 1].float()


def embed(model: RewardNetwork, ids: Tensor) -> Tensor | None:
    """Return embeddings (B, T, d) as the input of `last_position`; None for other architectures than Gemma 2."""
    plain = plain_model(model)
    if not isinstance(plain, Gemma2ForSequenceClassification):
        return None
    embedded: Tensor = plain.base_model.embed_tokens(ids)
    return embedded


def last_position(
    model: RewardNetwork, ids: Tensor, lengths: Tensor, dropout: float = 0.0, embedded: Tensor | None = None
) -> Tensor:
    """Return the same state as `all_positions`, by blockwise attention; Gemma 2: with the last layer at one position.

    dropout: share that the trainer's hook drops from the outputs of attention; the last layer's do not pass the hook.
    embedded: (B, T, d) if the tokens are already embedded; Gemma 2 only.
    """
    plain = plain_model(model)
    if not isinstance(plain, Gemma2ForSequenceClassification):
        with blockwise(plain):
            return all_positions(plain, ids, lengths)
    base = plain.base_model
    hidden = base.embed_tokens(ids) if embedded is None else embedded
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotation = base.rotary_emb(hidden, positions)
    with blockwise(plain):
        for layer in base.layers[:-1]:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotation, position_ids=positions)
    layer, rows, last = base.layers[-1], torch.arange(len(ids), device=ids.device), lengths - 1
    attended = _attend(layer.self_attn, layer.input_layernorm(hidden), rotation, last)
    attended = F.dropout(attended, dropout, training=plain.training)
    state = hidden[rows, last] + layer.post_attention_layernorm(attended)
    state = state + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(state)))
    normed: Tensor = base.norm(state)
    return normed.float()


def _attend(attention: Gemma2Attention, hidden: Tensor, rotation: tuple[Tensor, Tensor], last: Tensor) -> Tensor:
    """Return the output of attention (B, d) for queries at positions `last` (B,) of hidden states (B, T, d)."""
    batch, tokens, _ = hidden.shape
    cos, sin = rotation  # (1, T, D)
    rows = torch.arange(batch, device=hidden.device)
    key = attention.k_proj(hidden).view(batch, tokens, -1, attention.head_dim).transpose(1, 2)  # (B, Hk, T, D)
    value = attention.v_proj(hidden).view(batch, tokens, -1, attention.head_dim).transpose(1, 2)
    query = attention.q_proj(hidden[rows, last]).view(batch, -1, attention.head_dim)  # (B, H, D)
    key = key * cos + rotate_half(key) * sin
    query = query * cos[0, last][:, None] + rotate_half(query) * sin[0, last][:, None]
    query = query.view(batch, key.shape[1], -1, attention.head_dim)  # (B, Hk, H / Hk, D)
    scores = query @ key.transpose(2, 3) * attention.scaling  # (B, Hk, H / Hk, T)
    if attention.attn_logit_softcapping is not None:
        scores = torch.tanh(scores / attention.attn_logit_softcapping) * attention.attn_logit_softcapping
    column = torch.arange(tokens, device=hidden.device)
    hidden_from = column > last[:, None]
    if attention.sliding_window is not None:
        hidden_from |= column <= last[:, None] - attention.sliding_window
    weights = scores.masked_fill(hidden_from[:, None, None], -torch.inf).softmax(-1)
    output: Tensor = attention.o_proj((weights @ value).view(batch, -1))
    return output
