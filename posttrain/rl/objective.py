"""The objective of a batch of RL: REINFORCE on whole sequences, scored at completion positions only.

loss = - mean_i A_i log pi(y_i | x_i),   log pi(y | x) = sum over completion tokens
                                                                    (WARP 2406.16768, Algorithm 1, line 7)

It is a cross-entropy with a weight for each token, the advantage of its sequence over the number of sequences: on a CPU
the head makes its gradient with the loss (`cross_entropy.py`). Rows of similar length go together (`loss_parts`), which
changes neither loss nor gradient: each part counts as many rows as the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gemma2.posttrain.models.cross_entropy import weighted_cross_entropy
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.scorer import head_in_one_pass, head_logps, last_hidden_states, similar_rows

__all__ = ["loss_parts", "policy_loss"]


def policy_loss(
    model: CausalLM, ids: Tensor, mask: Tensor, advantages: Tensor, temperature: float
) -> tuple[Tensor, Tensor, int]:
    """(loss, a scalar with gradient; sum of the entropies of all completion tokens, nats; how many tokens these are).

    ids: (N, T) right-padded; mask: (N, T) True on completion tokens; advantages: (N,) fp32. `model` is a plain causal
    LM; its layers may hold adapters. Prompt and padding do not enter.
    """
    target = mask[:, 1:]  # the state at position t predicts token t + 1
    hidden, tokens = last_hidden_states(model, ids)[:, :-1][target], ids[:, 1:][target]  # (K, d), (K,)
    weights = advantages[target.nonzero()[:, 0]] / len(ids)
    if head_in_one_pass(model, hidden):
        loss, _, entropies = weighted_cross_entropy(model, hidden, tokens, weights, temperature)
    else:
        logps, entropies = head_logps(model, hidden, tokens, temperature)
        loss = -(weights * logps).sum()
    return loss, entropies.sum(), len(entropies)


def loss_parts(
    ids: Tensor, mask: Tensor, advantages: Tensor, whole: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, mask, advantages) of rows of similar length, no wider than they need; their losses add up to the batch's.

    One part where `whole`, and on an accelerator.
    """
    ends = mask.shape[1] - mask.flip(1).int().argmax(1)  # (N,) columns in use
    rows = [list(range(len(ids)))] if whole or ids.device.type != "cpu" else similar_rows(ends.tolist())
    for part in rows:
        width = int(ends[part].max())
        yield ids[part, :width], mask[part, :width], advantages[part] * (len(part) / len(ids))
