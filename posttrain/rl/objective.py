"""The objective of a batch of RL: REINFORCE on whole sequences, scored at completion positions only.

loss = - mean_i A_i log pi(y_i | x_i),   log pi(y | x) = sum over completion tokens
                                                                    (WARP 2406.16768, Algorithm 1, line 7)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.posttrain.models.attention import causal_masks
from gemma2.posttrain.models.scorer import head_logps

__all__ = ["policy_loss", "sequence_logps"]


def policy_loss(
    model: Any, ids: Tensor, mask: Tensor, advantages: Tensor, temperature: float
) -> tuple[Tensor, Tensor, int]:
    """(loss, a scalar with gradient; sum of the entropies of all completion tokens, nats; how many tokens these are).

    ids: (N, T) right-padded; mask: (N, T) True on completion tokens; advantages: (N,) fp32. `model` is a plain causal
    LM; its layers may hold adapters.
    """
    logps, entropies = sequence_logps(model, ids, mask, temperature)
    return -(advantages * logps).mean(), entropies.sum(), len(entropies)


def sequence_logps(model: Any, ids: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(y | x) of each row, (N,) fp32 with gradient, and the entropy at each of its tokens, (K,); nats.

    ids: (N, T) right-padded; mask: (N, T) True on completion tokens. Prompt and padding do not enter.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden = model.base_model(
        input_ids=ids, attention_mask=causal_masks(model, ids.shape[1]), position_ids=positions, use_cache=False
    ).last_hidden_state  # (N, T, d)
    target = mask[:, 1:]  # the state at position t predicts token t + 1
    logps, entropies = head_logps(model, hidden[:, :-1][target], ids[:, 1:][target], temperature)
    rows = target.nonzero()[:, 0]
    return torch.zeros(len(ids), device=ids.device).index_add(0, rows, logps), entropies
