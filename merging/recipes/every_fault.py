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

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
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
    rest = deepcopy(documents)
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


def _holder(document: JsonObject, keys: Sequence[str | int]) -> object:
    """The mapping or list that a value is in; None where it is not found."""
    inside: object = document
    for key in keys[:-1]:
        if isinstance(inside, dict):
            inside = inside.get(_own(inside, key))
        else:
            inside = inside[key] if isinstance(inside, list) and isinstance(key, int) and key < len(inside) else None
    return inside


def _own(holder: JsonObject, key: str | int) -> str:
    """A key of a mapping as the mapping has it: YAML reads some names as numbers."""
    return next((own for own in holder if str(own) == str(key)), str(key))


def _rename(document: JsonObject, keys: Sequence[str | int], name: str) -> bool:
    """Give a value another key; False where that key is taken."""
    holder = _holder(document, keys)
    if not isinstance(holder, dict) or name in holder or _own(holder, keys[-1]) not in holder:
        return False
    holder[name] = holder.pop(_own(holder, keys[-1]))
    return True


def _take_out(document: JsonObject, keys: Sequence[str | int]) -> bool:
    """Remove a value from a nested document; False where it is not found."""
    holder, last = _holder(document, keys), keys[-1]
    if isinstance(holder, dict) and _own(holder, last) in holder:
        holder.pop(_own(holder, last))
        return True
    if isinstance(holder, list) and isinstance(last, int) and last < len(holder) and holder[last] is not None:
        holder[last] = None  # the places of the others stay
        return True
    return False
