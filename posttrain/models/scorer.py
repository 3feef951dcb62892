"""Log-probs of completions.

    log pi(y | x) = sum_t log softmax(logits_t / temperature)[y_t]              over completion tokens only

The temperature is that of sampling: the policy of the RL objective is softmax(logits / temperature), so log pi, the
anchor's and the SFT policy's log-probs are all taken there (WARP 2406.16768, Algorithm 1, line 6). The soft cap comes
before it, as in the model. Rows are padded on the right and no position after a row's end can be seen from inside it,
so neither padding nor the prompt enters, and the LM head runs on completion positions alone, in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import causal_masks
from .sampler import evaluating, length_batches

__all__ = ["head_logits", "head_logps", "hidden_states", "mean_and_error", "token_logps"]

CHUNK = 2**24  # logits held at once: 64 MiB in fp32


@torch.no_grad()
def token_logps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int = 32,
    temperature: float = 1.0,
) -> list[Tensor]:
    """log pi(y_t | x, y_<t) of every completion token: one fp32 CPU tensor (len(completion),) per pair, nats."""
    result: list[Tensor] = [torch.empty(0)] * len(prompts)
    with evaluating(model):
        for batch, hidden in hidden_states(model, prompts, completions, batch_size):
            targets = [torch.tensor(completions[i], device=hidden.device) for i in batch]
            # The state at position t predicts token t + 1, so the prompt's last state predicts the first target.
            states = [
                hidden[row, len(prompts[i]) - 1 : len(prompts[i]) + len(completions[i]) - 1]
                for row, i in enumerate(batch)
            ]
            logps, _ = head_logps(model, torch.cat(states), torch.cat(targets), temperature)
            for i, values in zip(batch, logps.cpu().split([len(t) for t in targets]), strict=True):
                result[i] = values
    return result


def hidden_states(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, last hidden states (B, T, d)) in batches of similar length, padded on the right."""
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    for batch in length_batches([len(row) for row in rows], batch_size):
        width = len(rows[batch[0]])
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch], device=model.device)
        positions = torch.arange(width, device=model.device)[None]
        output = model.base_model(
            input_ids=ids, attention_mask=causal_masks(model, width), position_ids=positions, use_cache=False
        )
        yield batch, output.last_hidden_state


def head_logps(model: Any, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies, both (N,) fp32 nats, from last hidden states (N, d).

    Differentiable in the log-probs. The logits never exist for more than a chunk of the N positions, backward included.
    """
    weight = model.get_output_embeddings().weight
    size = max(1, CHUNK // weight.shape[0])
    pieces = [
        checkpoint(_chunk_logps, model, states, tokens, temperature, use_reentrant=False)
        if torch.is_grad_enabled() and len(targets) > size
        else _chunk_logps(model, states, tokens, temperature)
        for states, tokens in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat([logps for logps, _ in pieces]), torch.cat([entropies for _, entropies in pieces])


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits (N, V) fp32 of last hidden states (N, d), soft cap included (Gemma 2 report, section 2)."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _chunk_logps(model: Any, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head_logits(model, hidden)
    logps = torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
    with torch.no_grad():
        entropies = -(logps.exp() * logps).sum(-1)
    return logps.gather(1, targets[:, None]).squeeze(1), entropies


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error over independent values (N,); the error of fewer than two is NaN."""
    values = values.double()
    error = values.std(correction=1).item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error
