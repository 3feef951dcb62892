"""Decoding with fixed shapes: a step that the host launches and does not look at until EVERY tokens later.

    step t:  logits <- network(token t-1 at column c);  token t <- draw(logits, u_t);  ended |= token t is a stop token

Where the row-by-row loop of the sampler asks the device after every token which rows have ended, here the host looks
every EVERY tokens; what a row has drawn after its end is cut, so results are the same. Rows leave the batch when half
of it has ended, because each new shape is captured again. Attention reads a stretch of columns whose end is fixed for
SEGMENT tokens; what is not written yet is masked.

Greedy tokens and draws are those of the row-by-row loop up to the rounding of sums over masked columns, which are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .captured_step import Capture, CapturedStep
from .static_cache import StaticKv

__all__ = ["EVERY", "SEGMENT", "Opening", "decode_static"]

EVERY = 8  # tokens between two looks of the host: a row that ends computes at most 7 more
SEGMENT = 256  # columns: the stretch for which keys, masks and the captured step are made at once
Step = Callable[[Sequence[StaticKv], Tensor, Tensor, Sequence[Tensor]], Tensor]
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Ends = Callable[[list[int]], bool]
Row = tuple[list[int], list[float], bool]


@dataclass(frozen=True)
class Opening:
    """What the prefill leaves: rows (B), columns in use (`length`), all of them on the device of the model.

    logits: (B, V) fp32 of the first token. positions: (B,) of it. mask: (B, 1, 1, length + max_new) additive, with the
    padding masked. uniforms: (B, max_new) float64. stops: (V,) bool, True for stop tokens.
    keys: of each layer (window, keys, values), the latter (B, heads, length, head_dim).
    """

    logits: Tensor
    positions: Tensor
    mask: Tensor
    uniforms: Tensor
    stops: Tensor
    length: int
    keys: Iterable[tuple[int | None, Tensor, Tensor]]


def decode_static(
    opening: Opening, step: Step, draw: Draw, capture: Capture | None, pad_id: int, ends: Ends | None = None
) -> list[Row]:
    """Decode: (ids, logps, truncated) of each row.

    step    logits (B, V) fp32 from (layers, tokens (B,), positions (B,), one mask of each layer)
    draw    tokens (B,) and log-probs (B,) from logits and uniforms (B,)
    ends    whether a row is complete, by its ids so far; asked for every token, at the next look of the host
    """
    rows = _StaticRows(opening, step, draw, pad_id)
    limit, done = opening.uniforms.shape[1], 1
    rows.record(opening.logits)
    while (live := rows.look(done, ends)) and done < limit:
        if rows.arrange(live, done):
            run = CapturedStep(rows.advance, capture)
        count = min(EVERY, limit - done)
        for _ in range(count):
            run()
        done += count
    return rows.results()


class _StaticRows:
    """The rows in the batch and all that has been drawn; every tensor that `advance` changes is changed in place."""

    def __init__(self, opening: Opening, step: Step, draw: Draw, pad_id: int) -> None:
        device, (count, limit) = opening.logits.device, opening.uniforms.shape
        self.step, self.draw = step, draw
        self.uniforms, self.stops, self.start = opening.uniforms, opening.stops, opening.length
        self.tokens = torch.full((count, limit), pad_id, dtype=torch.long, device=device)
        self.logps = torch.zeros(count, limit, dtype=torch.float32, device=device)
        self.lengths = torch.full((count,), limit, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.number = torch.zeros(1, dtype=torch.long, device=device)  # of the token that is drawn next
        self.column = torch.full((1,), opening.length, device=device)  # where the last token is written
        self.rows = torch.arange(count, device=device)  # (B,) number of each row of the batch in the results
        self.last, self.positions = torch.zeros_like(self.rows), opening.positions.clone()
        self.whole_mask = opening.mask
        self.layers = [StaticKv(keys, values, window, self.column) for window, keys, values in opening.keys]
        self.end = 0  # columns that there is room for
        self.limit = limit
        self.looked = 0
        self.ended_by: dict[int, int] = {}  # rows that `ends` ended -> their lengths

    def advance(self) -> None:
        """Feed the last token of every row, draw the next one. Never waits for the device."""
        logits = self.step(self.layers, self.last, self.positions, self._masks())
        self.positions.add_(1)
        self.column.add_(1)
        self.record(logits)

    def record(self, logits: Tensor) -> None:
        """Draw a token from logits (B, V) and note it, with its log-prob and whether it ends the row."""
        place = (self.rows, self.number.expand_as(self.rows))
        drawn, logps = self.draw(logits, self.uniforms[place])
        self.tokens.index_put_(place, drawn)
        self.logps.index_put_(place, logps)
        ended = self.ended[self.rows]
        stopped = self.stops[drawn] & ~ended
        self.lengths.index_put_((self.rows,), torch.where(stopped, self.number + 1, self.lengths[self.rows]))
        self.ended.index_put_((self.rows,), ended | stopped)
        self.last.copy_(drawn)
        self.number.add_(1)

    def _masks(self) -> list[Tensor]:
        """Return the mask (B, 1, 1, K) of each layer: what is written, of a local layer the last `window` columns."""
        lowest = torch.finfo(self.whole_mask.dtype).min
        columns = torch.arange(self.end, device=self.column.device)
        whole = self.whole_mask[..., : self.end].masked_fill(columns > self.column, lowest)
        found: dict[int | None, Tensor] = {None: whole}
        for kv in self.layers:
            if kv.window is not None and kv.window not in found:
                near = columns[kv.shown :] > self.column - kv.window
                found[kv.window] = whole[..., kv.shown :].masked_fill(~near, lowest)
        return [found[kv.window] for kv in self.layers]

    def look(self, done: int, ends: Ends | None) -> list[int]:
        """Return the rows of the batch that have not ended after `done` tokens. Waits for the device."""
        rows, ended = self.rows.tolist(), self.ended[self.rows].tolist()
        if ends is not None:
            drawn, lengths = self.tokens[self.rows, :done].tolist(), self.lengths[self.rows].tolist()
            for i, row in enumerate(rows):
                last = min(done, lengths[i])
                found = (n for n in range(self.looked + 1, last + 1) if ends(drawn[i][:n]))
                at = None if row in self.ended_by else next(found, None)
                if at is not None:
                    self.ended_by[row] = at
                    ended[i] = True
                elif row in self.ended_by:
                    ended[i] = True
        self.looked = done
        return [i for i, over in enumerate(ended) if not over]

    def arrange(self, live: Sequence[int], done: int) -> bool:
        """Drop ended rows if they are half of the batch, and make room for more columns; True if places changed."""
        fewer = 2 * len(live) <= len(self.rows)
        if fewer:
            keep = torch.tensor(live, device=self.rows.device)
            self.rows, self.last, self.positions = self.rows[keep], self.last[keep], self.positions[keep]
            self.whole_mask = self.whole_mask[keep]
            for kv in self.layers:
                kv.keep(keep)
        column = self.start + done - 1  # where the next step writes
        short = column + min(EVERY, self.limit - done) > self.end
        if short:
            self.end = min(column + SEGMENT, self.start + self.limit)
            for kv in self.layers:
                kv.reserve(column, self.end)
        return fewer or short

    def results(self) -> list[Row]:
        """Return (ids, logps, truncated) of all rows; what follows the end of a row is cut."""
        lengths, ended = self.lengths.tolist(), self.ended.tolist()
        for row, length in self.ended_by.items():
            lengths[row], ended[row] = min(length, lengths[row]), True
        columns = zip(self.tokens.tolist(), self.logps.tolist(), lengths, ended, strict=True)
        return [(ids[:length], logps[:length], not over) for ids, logps, length, over in columns]
