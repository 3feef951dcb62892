"""Which bytes of the inputs are on this disk: the question that a merge asks before it reads.

`Arrivals` is the answer for models that are whole. `hub_stream.HubStream` answers for models that are still on their
way, and fetches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from gemma2.core.outputs.hub import locate_model

__all__ = ["ON_DISK", "Arrivals", "Span"]

Span = tuple[Path, int, int]  # bytes [first, end) of a weight file


class Arrivals:
    """The weight files of a merge, all of which are whole from the start."""

    @property
    def pending(self) -> bool:
        """Whether a file is not whole yet."""
        return False

    def locate(self, name: Path, role: str) -> Path:
        """Return the directory of a model, as `locate_model` does. Raises InputError."""
        return locate_model(name, role)

    def stored(self, path: Path) -> Path:
        """Return the file that holds the bytes of a weight file that have arrived."""
        return path

    def names(self, folder: Path) -> Sequence[str]:
        """Return the names of the weight files of a directory that are still on their way."""
        return ()

    def wait(self, file: Path, first: int, end: int) -> None:
        """Return when bytes [first, end) of a weight file can be read. Raises Gemma2Error if they will not arrive."""

    def start(self, order: Sequence[Span]) -> None:
        """Begin to fetch: first what `order` names, in its order, then the rest."""

    def finish(self) -> None:
        """Return when every file is whole, checked and in its place. Raises Gemma2Error."""

    def stop(self) -> None:
        """End all waiting and fetching; what has arrived is kept."""

    @contextmanager
    def pool(self, threads: int) -> Iterator[ThreadPoolExecutor]:
        """Lend a pool of threads that wait for arrivals; an error in the block ends their waiting."""
        with ThreadPoolExecutor(threads) as pool:
            try:
                yield pool
            except BaseException:
                self.stop()
                raise


ON_DISK = Arrivals()
