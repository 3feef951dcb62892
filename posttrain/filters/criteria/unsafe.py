"""Toxic answers, by the word list of profanex (compiled; word boundaries, leetspeak, an allowlist).

A word list sees insults, slurs and obscenities, not dangerous advice, and cannot tell abuse from quotation: give a
safety model for that (`safety.py`).
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from .sample import Sample

__all__ = ["unsafe"]


@cache
def _list(categories: tuple[str, ...]) -> Any:  # noqa: ANN401
    from profanex import Category, Filter, FilterConfig

    return Filter(FilterConfig(categories=frozenset(map(Category, categories))))


def unsafe(sample: Sample, categories: tuple[str, ...], terms: int) -> str | None:
    """Reads the model's turns: a refusal to answer an unsafe prompt is a good row. The detail names no word."""
    text = sample.model
    words = _list(categories)
    if not words.contains(text):
        return None
    found = words.find(text)
    if len(found) < terms:
        return None
    counts = Counter(sorted(match.categories)[0].value for match in found)
    return ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
