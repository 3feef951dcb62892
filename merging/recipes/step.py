"""The merges of a file, as named steps of one request each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemma2.merging.methods.request import MergeRequest

__all__ = ["Recipe", "Step"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One merge. A model or base whose path is the name in `needs` is the output of that step.

    name   "" for the only merge of a file that names none
    notes  what the file says that has no effect on this merge
    """

    name: str
    request: MergeRequest
    needs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The merges of a file, every one after those whose outputs it takes."""

    path: Path
    steps: tuple[Step, ...]


def needs_of(request: MergeRequest, names: Iterable[str]) -> tuple[str, ...]:
    """The steps whose outputs a request takes."""
    used = [*request.models, *([request.base] if request.base else [])]
    heads = dict.fromkeys(str(path).partition("+")[0] for path in used)
    return tuple(head for head in heads if head in frozenset(names))
