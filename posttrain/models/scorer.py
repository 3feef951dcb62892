"""Log-probs of completions.

    log pi(y | x) = sum_t log softmax(logits_t / temperature)[y_t]              over completion tokens only

The temperature is that of sampling: the policy of the RL objective is softmax(logits / temperature), so log pi and the
log-probs of anchor and SFT policy all use it (WARP 2406.16768, Algorithm 1, line 6). The soft cap is applied before the
temperature, as in the model. Rows are padded on the right, out of sight of every token, so padding does not enter the
sum, and the LM head runs on completion positions only, in chunks.

On a CPU eager attention runs in blocks (`causal_attention.py`), and rows of similar length share a forward pass. On an
accelerator the model uses the attention kernel that it was loaded with: flash and flex attention make their own causal
masks, without the T^2 scores and masks of eager attention, and flash attention reads fp32 weights under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import causal_masks
from .causal_attention import blockwise, can_be_blockwise
from .cross_entropy import target_logps
from .head import head_logits, plain_head
from .protocols import CausalLM, Network
from .sampler import evaluating, length_batches

__all__ = [
    "Pace",
    "correlation",
    "head_in_one_pass",
    "head_logps",
    "hidden_states",
    "last_hidden_states",
    "masked_states",
    "mean_and_error",
    "similar_rows",
    "target_log_probs",
    "token_logps",
]

CHUNK = 2**24  # logits held at once: 64 MiB in fp32
PART_TOKENS = 2048  # per forward pass on a CPU: a layer's activations fit in the caches, measured (bench/sft.py)
# What turns a list of batches into those with as many None between or behind them as other processes have more.
Pace = Callable[[Sequence[list[int]]], Iterable[list[int] | None]]
PART_COST = 256  # tokens that cost as much as one more forward pass, measured (bench/rlhf.py)


@torch.no_grad()
def token_logps(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int = 32,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Return log pi(y_t | x, y_<t) of every completion token: per pair an fp32 CPU tensor (len(completion),), nats."""
    result: list[Tensor] = [torch.empty(0)] * len(prompts)
    with evaluating(model):
        for batch, hidden in hidden_states(model, prompts, completions, batch_size):
            targets = [torch.tensor(completions[i], device=hidden.device) for i in batch]
            # The state at position t predicts token t + 1, so the prompt's last state predicts the first target.
            states = [
                hidden[row, len(prompts[i]) - 1 : len(prompts[i]) + len(completions[i]) - 1]
                for row, i in enumerate(batch)
            ]
            logps = target_log_probs(model, torch.cat(states), torch.cat(targets), temperature)
            for i, values in zip(batch, torch.split(logps.cpu(), [len(t) for t in targets]), strict=True):
                result[i] = values
    return result


def hidden_states(
    model: Network,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int,
    pace: Pace | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (indices, last hidden states (B, T, d)) in batches of similar length, padded on the right.

    pace: the batches in step with other processes; for None a forward pass of one token runs, and nothing is yielded.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    batches = _similar_batches([len(row) for row in rows], batch_size, model.device.type)
    for batch in batches if pace is None else pace(batches):
        if batch is None:
            last_hidden_states(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
            continue
        width = max(len(rows[i]) for i in batch)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch], device=model.device)
        yield batch, last_hidden_states(model, ids)


def _similar_batches(lengths: Sequence[int], batch_size: int, device: str) -> list[list[int]]:
    """Return the batches of `length_batches`; on a CPU rows of each that are not similar are in separate ones."""
    batches = list(length_batches(lengths, batch_size))
    if device != "cpu":
        return batches
    return [[batch[j] for j in part] for batch in batches for part in similar_rows([lengths[i] for i in batch])]


def similar_rows(lengths: Sequence[int], tokens: int = PART_TOKENS, cost: int = PART_COST) -> list[list[int]]:
    """Return indices of rows of similar length, longest rows first: the cheapest way to cut the sorted rows into parts.

    A part costs its tokens, padding included, plus `cost`; it has at most `tokens` tokens, or one row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best, cuts = [0], [0]  # of the first n rows of `order`: the least cost, and the start of their last part
    for end in range(1, len(order) + 1):
        starts = (
            start
            for start in range(end - 1, -1, -1)
            if start == end - 1 or (end - start) * lengths[order[start]] <= tokens
        )
        costs = {start: best[start] + (end - start) * lengths[order[start]] + cost for start in starts}
        cuts.append(min(costs, key=lambda start: costs[start]))
        best.append(costs[cuts[-1]])
    parts: list[list[int]] = []
    end = len(order)
    while end:
        parts.append(order[cuts[end] : end])
        end = cuts[end]
    return parts[::-1]


def last_hidden_states(model: Network, ids: Tensor) -> Tensor:
    """Return (B, T, d) of rows padded on the right: causal attention never looks there, so padding needs no mask."""
    # A layer that is recomputed in the backward pass would run with another attention than in the forward pass.
    recomputed = model.training and model.is_activation_checkpointing
    plain = not recomputed and not torch.is_autocast_enabled("cpu")  # autocast would mix dtypes in the gradient
    eager = model.config._attn_implementation == "eager"
    in_blocks = eager and ids.device.type == "cpu" and can_be_blockwise(model) and plain
    with blockwise(model) if in_blocks else nullcontext():
        return masked_states(model, ids)


def masked_states(model: Network, ids: Tensor) -> Tensor:
    """Return (B, T, d) of rows padded on the right by the model's own kernel, whole rows at a time."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    name, device = model.config._attn_implementation, ids.device.type
    masks = causal_masks(model, ids.shape[1]) if name in ("eager", "sdpa") else None
    halved = name.startswith("flash") and model.dtype == torch.float32 and not torch.is_autocast_enabled(device)
    with torch.autocast(device, torch.bfloat16) if halved else nullcontext():
        output = model.base_model(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False)
    states: Tensor = output.last_hidden_state
    return states


def head_in_one_pass(model: CausalLM, hidden: Tensor) -> bool:
    """Whether `cross_entropy.py` serves these states (N, d): a plain head, on a CPU, no half precision.

    On an accelerator a gradient of the head in fp32 next to bf16 states would cost too much memory for the time saved.
    """
    weight = model.get_output_embeddings().weight
    wide = weight.dtype in (torch.float32, torch.float64)
    return hidden.device.type == "cpu" and plain_head(model) and wide and hidden.dtype == weight.dtype


def head_logps(model: CausalLM, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probs of `targets` and entropies, both (N,) fp32 nats, from last hidden states (N, d).

    The log-probs are differentiable. Logits exist for at most a chunk of the N positions, also in the backward pass.
    Raises InputError for a model that scales its logits.
    """
    size = _chunk_rows(model)
    pieces = [
        checkpoint(_chunk_logps, model, states, tokens, temperature, use_reentrant=False)
        if torch.is_grad_enabled() and len(targets) > size
        else _chunk_logps(model, states, tokens, temperature)
        for states, tokens in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    ]
    return torch.cat([logps for logps, _ in pieces]), torch.cat([entropies for _, entropies in pieces])


def target_log_probs(model: CausalLM, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log-probs of `targets` (N,) from last hidden states (N, d), without gradient and without entropies."""
    if head_in_one_pass(model, hidden):
        return target_logps(model, hidden, targets, temperature)
    size = _chunk_rows(model)
    pieces = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    return torch.cat([_target_logps(head_logits(model, states), tokens, temperature)[1] for states, tokens in pieces])


def _chunk_rows(model: CausalLM) -> int:
    return max(1, CHUNK // int(model.get_output_embeddings().weight.shape[0]))


def _chunk_logps(model: CausalLM, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    every, chosen = _target_logps(head_logits(model, hidden), targets, temperature)
    with torch.no_grad():
        entropies = -(every.exp() * every).sum(-1)
    return chosen, entropies


def _target_logps(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (log softmax (N, V), its values at `targets` (N,))."""
    every = torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
    return every, every.gather(1, targets[:, None]).squeeze(1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent values (N,) and its standard error, NaN for fewer than two values."""
    values = values.double()
    error = values.std(correction=1).item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Pearson's r of two series (N,), None if one of them does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = math.sqrt((a @ a).item() * (b @ b).item())
    return (a @ b).item() / scale if scale > 0 else None
