"""Rolling windows over the tokens of a document, and the figures of a perplexity. Pure; torch-free.

    window k = <bos>, `overlap` tokens that were counted before, then tokens that are counted

Every token of a document is counted once, given at most `size - 1` tokens before it; the first window has nothing to
overlap, and counts `size - 1` tokens. lm-eval's rolling windows are those with overlap 0, except that the first token
of each later window there has the token before it in place of <bos>.

    perplexity per token = exp(nats / tokens)      per word = exp(nats / words)      bits per byte = nats / (ln 2 bytes)

Words are what blanks separate, bytes those of UTF-8; both divide the nats of the same tokens, so that models with
other tokenizers can be compared by them. Their error is that of a ratio of sums over windows (the delta method).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma2.posttrain.evaluation.intervals import confidence_interval

__all__ = ["Span", "Totals", "perplexity_figures", "windows_of"]


@dataclass(frozen=True)
class Span:
    """One window: tokens `start` to `end` are counted, given <bos> and those from `context` on."""

    context: int
    start: int
    end: int


@dataclass(frozen=True)
class Totals:
    """The size of what was counted."""

    words: int
    bytes: int


def windows_of(tokens: int, size: int, overlap: int) -> Iterator[Span]:
    """The windows of a document of so many tokens. size: tokens of a window, its <bos> included."""
    start, room = 0, size - 1
    while start < tokens:
        context = max(0, start - overlap)
        end = min(tokens, context + room)
        yield Span(context, start, end)
        start = end


def perplexity_figures(nats: Sequence[float], tokens: Sequence[int], size: Totals) -> dict[str, dict[str, float]]:
    """{"metrics", "stderr", "low", "high"}, each by name; from the nats and the counted tokens of every window."""
    total, count = math.fsum(nats), sum(tokens)
    scales = {
        "perplexity": float(count),
        "word_perplexity": float(size.words),
        "bits_per_byte": size.bytes * math.log(2),
    }
    found: dict[str, dict[str, float]] = {"metrics": {}, "stderr": {}, "low": {}, "high": {}}
    rate = total / count
    n = len(nats)
    left = [a - rate * b for a, b in zip(nats, tokens, strict=True)]
    error = math.sqrt(math.fsum(x * x for x in left) * n / (n - 1)) if n > 1 else math.nan  # of the sum of the nats
    for name, scale in scales.items():
        if not scale:
            continue
        mean, se = total / scale, error / scale
        grows = name != "bits_per_byte"
        ends = confidence_interval(mean, se, n, (0.0, math.inf))
        found["metrics"][name] = _exp(mean) if grows else mean
        if ends is not None:
            found["stderr"][name] = _exp(mean) * se if grows else se
            found["low"][name], found["high"][name] = (_exp(end) if grows else end for end in ends)
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
