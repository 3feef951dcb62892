"""Toxic answers, by the word list of profanex (compiled; word boundaries, leetspeak, an allowlist).

A word list finds insults, slurs and obscenities but no dangerous advice, and it cannot distinguish abuse from a
quotation: use a safety model for that (`safety.py`).
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

from .sample import Sample

if TYPE_CHECKING:
    from profanex import Filter

__all__ = ["unsafe"]


@cache
def _list(categories: tuple[str, ...]) -> Filter:
    from profanex import Category, Filter, FilterConfig

    return Filter(FilterConfig(categories=frozenset(map(Category, categories))))


def unsafe(sample: Sample, categories: tuple[str, ...], terms: int) -> str | None:
    """Report offensive words in the model's turns only: a refusal of an unsafe prompt is a good row.

    The detail names the categories, not the words.
    """
    text = sample.model
    words = _list(categories)
    if not words.contains(text):
        return None
    found = words.find(text)
    if len(found) < terms:
        return None
    counts = Counter(sorted(match.categories)[0].value for match in found)
    return ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
