"""Log-likelihoods of choices, with what they share computed once.

    log p(c | x) = sum_t log softmax(logits)[c_t]                      fp32, soft caps as in the model

The choices of a row differ at their ends, so a row is one packed sequence: the common beginning (stem), then the rest
of each choice (branches), which sees the stem and itself. Position ids continue from the stem in every branch, windows
count positions, not columns. What all rows of a group begin with (MMLU's examples of a subject) is run once per group,
and its keys and values are kept. A question with 25 examples and 4 choices takes about a quarter of the tokens. One
that fills a batch alone runs its stem in the same way, which on a CPU is attention in blocks: 12 x HFLM's speed, and
3.3 x without (bench/eval.py).

Rows are batched in their order, and the cut of the batches depends on all rows of the group, not on those that are left
to do: a run that continues computes the same bits. Several processes are dealt the batches, and each gets all results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.models.attention import Masks, additive, causal_masks, layer_windows, taking_masks
from gemma2.posttrain.models.causal_attention import blockwise, can_be_blockwise
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import evaluating
from gemma2.posttrain.models.scorer import last_hidden_states, target_log_probs

from .encoding import TokenRequest

__all__ = ["SharedScorer"]

WORTH_KEEPING = 32  # tokens that a group has in common, below which they are run with each row
MOST_TOKENS = {"cpu": 2048, "cuda": 16384}  # of one forward pass; a layer's activations fit a CPU's caches
MOST_SCORES = 2**27  # query-key pairs of one pass: 8 GiB of fp32 scores with 16 heads
Row = Sequence[TokenRequest]


@dataclass(frozen=True)
class Packed:
    """One row as a packed sequence.

    ids, positions, branches  of every column; branch 0 is the stem
    states                    columns that predict a target; `owners`, `targets`: choice and token of each
    """

    ids: list[int]
    positions: list[int]
    branches: list[int]
    states: list[int]
    owners: list[int]
    targets: list[int]


class SharedScorer:
    """Scores the choices of rows with one model."""

    def __init__(self, model: CausalLM, batch_size: int, ranks: Ranks = ALONE) -> None:
        self.model, self.batch_size, self.ranks = model, batch_size, ranks
        self.most_tokens = MOST_TOKENS.get(model.device.type, MOST_TOKENS["cuda"])
        self.computed = 0  # tokens that went through the network

    @torch.no_grad()
    def group(self, rows: Sequence[Row], done: int = 0) -> Iterator[tuple[int, list[list[float]]]]:
        """Yield (number of the first row, log-likelihoods of its and the next rows' choices) batch by batch.

        done  rows that are known; their batches are left out, but for one that they do not fill
        """
        shared = _shared(rows) if len(rows) > 1 else 0
        packed = [_packed(row, shared) for row in rows]
        batches = [batch for batch in self._batches(packed, shared) if batch.stop > done]
        if not batches:
            return
        with evaluating(self.model), taking_masks(self.model):
            prefix = self._prefix(rows[0][0].ids[:shared]) if shared else None

            def score(batch: range) -> list[list[float]]:
                if prefix is None and len(batch) == 1:
                    return [self._alone(rows[batch.start])]
                return self._scored(packed[batch.start : batch.stop], shared, prefix)

            for batch, values in zip(batches, self.ranks.dealt(batches, score), strict=True):
                yield batch.start, values

    def _alone(self, row: Row) -> list[float]:
        """One row, its stem kept like the beginning of a group: on a CPU it runs in blocks, which is quicker."""
        shared = _shared([row])
        prefix = self._prefix(row[0].ids[:shared]) if shared else None
        return self._scored([_packed(row, shared)], shared, prefix)[0]

    def _batches(self, packed: Sequence[Packed], shared: int) -> Iterator[range]:
        start, width = 0, 0
        for number, row in enumerate(packed):
            wider = max(width, len(row.ids))
            count = number + 1 - start
            full = count * wider > self.most_tokens or count * wider * (shared + wider) > MOST_SCORES
            if count > 1 and (full or count > self.batch_size):
                yield range(start, number)
                start, wider = number, len(row.ids)
            width = wider
        if packed:
            yield range(start, len(packed))

    def _prefix(self, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer for what a group begins with."""
        cache = DynamicCache()
        tokens = torch.tensor([ids], device=self.model.device)
        positions = torch.arange(len(ids), device=self.model.device)[None]
        in_blocks = self.model.device.type == "cpu" and can_be_blockwise(self.model)
        with blockwise(self.model) if in_blocks else nullcontext():
            self._run(tokens, positions, None if in_blocks else causal_masks(self.model, len(ids)), cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _run(self, ids: Tensor, positions: Tensor, masks: Masks | None, cache: DynamicCache | None) -> Tensor:
        self.computed += ids.numel()
        output = self.model.base_model(
            input_ids=ids,
            attention_mask=masks,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        states: Tensor = output.last_hidden_state
        return states

    def _scored(
        self, rows: Sequence[Packed], shared: int, prefix: list[tuple[Tensor, Tensor]] | None
    ) -> list[list[float]]:
        device = self.model.device
        width = max(len(row.ids) for row in rows)

        def padded(name: str, value: int) -> Tensor:
            lists = [getattr(row, name) for row in rows]
            return torch.tensor([one + [value] * (width - len(one)) for one in lists], device=device)

        ids, positions, branches = padded("ids", 0), padded("positions", shared), padded("branches", -1)
        if prefix is None and not any(any(row.branches) for row in rows):
            self.computed += ids.numel()
            hidden = last_hidden_states(self.model, ids)
        else:
            cache = None
            if prefix is not None:
                cache = DynamicCache()
                for layer, (keys, values) in enumerate(prefix):
                    cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
            hidden = self._run(ids, positions, self._masks(positions, branches, shared), cache)
        states = torch.cat([hidden[number, row.states] for number, row in enumerate(rows)])
        targets = torch.tensor([token for row in rows for token in row.targets], device=device)
        of_targets = target_log_probs(self.model, states, targets).double().cpu().tolist()
        logps: Iterator[float] = iter(of_targets)
        found = []
        for row in rows:
            sums = [0.0] * (max(row.owners) + 1)
            for owner in row.owners:
                sums[owner] += next(logps)
            found.append(sums)
        return found

    def _masks(self, positions: Tensor, branches: Tensor, shared: int) -> Masks:
        """Masks of packed rows (B, T): the shared beginning and the stem are seen by all, a branch by itself alone."""
        before = torch.arange(shared, device=positions.device).expand(len(positions), -1)
        keys = torch.cat([before, positions], 1)[:, None, :]  # (B, 1, K) positions
        of_keys = torch.cat([torch.zeros_like(before), branches], 1)[:, None, :]
        queries = positions[:, :, None]
        allowed = (keys <= queries) & ((of_keys == 0) | (of_keys == branches[:, :, None]))
        config, dtype = self.model.config, self.model.dtype
        windows = set(layer_windows(config))
        near = {window: allowed & (keys > queries - window) for window in windows if window is not None}
        if windows == {None}:
            return additive(allowed[:, None], dtype)
        (local,) = near.values()
        if getattr(config, "layer_types", None) is None:
            return additive(local[:, None], dtype)
        return {
            "full_attention": additive(allowed[:, None], dtype),
            "sliding_attention": additive(local[:, None], dtype),
        }


def _common(lists: Sequence[list[int]]) -> int:
    """Length of the longest common beginning."""
    first, last = min(lists), max(lists)  # all others are between these two
    shortest = min(len(first), len(last))
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def _shared(rows: Sequence[Row]) -> int:
    """Tokens that all rows of a group begin with, before any state that predicts a target; 0 where it does not pay."""
    lists = [request.ids for row in rows for request in row]
    length = min(_common(lists), min(len(request.ids) - request.targets - 1 for row in rows for request in row))
    return length if length >= WORTH_KEEPING else 0


def _packed(row: Row, shared: int) -> Packed:
    inputs = [request.ids[:-1] for request in row]
    stem = _common(inputs)
    ids, branches = list(inputs[0][shared:stem]), [0] * (stem - shared)
    positions = list(range(shared, stem))
    states, owners, targets = [], [], []
    for number, (request, tokens) in enumerate(zip(row, inputs, strict=True)):
        begins = len(ids)
        ids += tokens[stem:]
        positions += range(stem, len(tokens))
        branches += [number + 1] * (len(tokens) - stem)
        for place in range(len(tokens) - request.targets, len(tokens)):  # the token here predicts the next one
            states.append(place - shared if place < stem else begins + place - stem)
            owners.append(number)
            targets.append(request.ids[place + 1])
    return Packed(ids, positions, branches, states, owners, targets)
