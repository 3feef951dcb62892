"""The merges of a file, as named steps of one request each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.merging.methods.option import OPTIONS
from gemma2.merging.methods.request import MergeRequest
from gemma2.merging.methods.request_check import check_request

from .place import Place

__all__ = ["Recipe", "Step"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One merge. A model or base whose path is the name in `needs` is the output of that step.

    name   "" for the only merge of a file that names none
    notes  what the file says that has no effect on this merge
    place  where the file asks for it, for messages
    """

    name: str
    request: MergeRequest
    needs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    place: Place | None = None

    def checked(self, request: MergeRequest) -> MergeRequest:
        """The request of this step with its defaults filled in. Raises UsageError with the place in the file."""
        try:
            return check_request(request)
        except UsageError as error:
            if self.place is None:
                raise
            words = (word.removeprefix("--").strip(",;:") for word in error.what.split())
            key = next((word for word in words if word in OPTIONS or word in ("base", "models", "granularity")), None)
            where = (self.place.at(key) if key else self.place).where()
            of = f"step '{self.name}': " if self.name else ""
            raise UsageError(f"{of}{error.what.replace('--', '')} in {where}", error.hint, where) from error


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
