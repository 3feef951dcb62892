"""All faults of a file of merges at once: each is corrected in the document in memory, and the rest is read again.

A mistyped key gets the name that it is closest to, where that is free; any other fault is taken out.

Deviation from reading: what is said about a place after something inside it was taken out (`has no 'method'`) may
follow from that, so the search ends there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping
from gemma2.core.yaml_files import read_documents
from gemma2.merging.methods.request_check import check_chosen

from .place import Place, PlaceError
from .recipe import merges_of, read_recipe
from .step import Step

__all__ = ["faults_of"]

MOST = 100  # faults that are looked for


def faults_of(path: Path) -> list[UsageError]:
    """The faults of a file of merges, in the order in which they are found; none of a file that can be carried out.

    No model is opened. Raises InputError or UsageError for a file that is not YAML, or is empty.
    """
    documents = read_documents(path)
    if not documents:
        raise UsageError(f"{path} is empty", "see docs/merging.md for what it may hold")
    rest: list[dict[str, Any]] = deepcopy(documents)
    found: list[UsageError] = []
    removed: list[tuple[int, tuple[str | int, ...]]] = []
    while len(found) < MOST:
        try:
            steps = merges_of(rest, Place(path))
        except PlaceError as error:
            keys = error.keys
            if any(document == error.document and keys == taken[: len(keys)] for document, taken in removed):
                return found
            found.append(error)
            meant = re.search(r"did you mean '(\w+)'", error.hint) if error.what.startswith("unknown key") else None
            if meant and _rename(rest[error.document], keys, meant[1]):
                continue
            if not keys or not _take_out(rest[error.document], keys):
                return found
            removed.append((error.document, keys))
        except UsageError as error:
            return [*found, error]
        else:
            found += _between_keys(steps)
            break
    if not found:
        try:
            read_recipe(path)  # also the order of its steps
        except UsageError as error:
            return [error]
    return found


def _between_keys(steps: Sequence[Step]) -> Iterator[UsageError]:
    """What is wrong with the merges whose keys are each right by themselves."""
    for step in steps:
        try:
            step.checked(step.request)
            check_chosen(step.request)
        except UsageError as error:
            yield error


def _holder(document: Any, keys: Sequence[str | int]) -> tuple[Any, Any]:  # noqa: ANN401
    """The mapping or list that a value is in, and the value's key there; (None, None) of one that is not found."""
    inside = document
    for key in keys[:-1]:
        try:
            inside = inside[key]
        except (KeyError, IndexError, TypeError):
            return None, None
    last = keys[-1]
    if isinstance(inside, dict):
        return inside, next((key for key in inside if str(key) == str(last)), None)
    there = isinstance(inside, list) and isinstance(last, int) and last < len(inside)
    return (inside, last) if there else (None, None)


def _rename(document: JsonMapping, keys: Sequence[str | int], name: str) -> bool:
    """Give a value another key; False where that key is taken."""
    holder, key = _holder(document, keys)
    if not isinstance(holder, dict) or key is None or name in holder:
        return False
    holder[name] = holder.pop(key)
    return True


def _take_out(document: JsonMapping, keys: Sequence[str | int]) -> bool:
    """Remove a value from a nested document; False where it is not found."""
    holder, key = _holder(document, keys)
    if isinstance(holder, dict) and key is not None:
        holder.pop(key)
        return True
    if isinstance(holder, list) and key is not None and holder[key] is not None:
        holder[key] = None  # the places of the others stay
        return True
    return False
