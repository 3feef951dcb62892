"""Opens the arrivals of one merge: of models on this disk, or of models that still come from the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .arrivals import ON_DISK, Arrivals

__all__ = ["arrivals_of"]


@contextmanager
def arrivals_of(stream: bool, note: Callable[[str], None]) -> Iterator[Arrivals]:
    """Lend the arrivals of one merge: with `stream`, hub models are fetched while they are merged.

    `note` takes lines for the user.
    """
    if not stream:
        yield ON_DISK
        return
    from .hub_stream import HubStream

    found = HubStream(note)
    try:
        yield found
    finally:
        found.stop()
