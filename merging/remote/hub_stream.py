"""Hub models that are merged while they arrive.

    locate   configuration, tokenizer and index through the hub's library, then the headers of the weight files
    start    weights in the order in which the merge reads them, by LINES connections, into sparse files of the cache
    wait     called by every read of an input
    finish   the rest has arrived, all digests are right, the snapshot in the cache is whole

One thread follows the arrived bytes of each file with its digest, so that little is left when the last byte arrives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import disk_usage
from threading import Condition, Event, Thread
from time import monotonic

from gemma2.core.errors import Gemma2Error, InputError, OutputError
from gemma2.core.outputs.hub import fetch_snapshot, hub_errors, hub_failure, is_hub_id, locate_model
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.sizes import size, sizes_apart

from .arrivals import Arrivals, Span
from .hub_requests import NoRanges, is_passing, read_range, remote_files
from .partial_file import PartialFile, RemoteFile, link

__all__ = ["HubStream"]

LINES = 8  # connections
HEAD = 1 << 18  # bytes of the first request; most headers are shorter
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format
PART = 1 << 23  # bytes of one request
HASHED = 1 << 23  # bytes that are read and hashed at once
LAST = 0.5  # seconds for threads to end
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each repetition of a request that brought nothing


class HubStream(Arrivals):
    """The weight files of the hub models of one merge, on their way into the cache."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._files: dict[Path, PartialFile] = {}
        self._folders: dict[str, Path] = {}
        self._queue: deque[tuple[PartialFile, int, int]] = deque()
        self._change = Condition()  # guards everything here; notified of bytes, failures and the end
        self._failure: BaseException | None = None
        self._stopped = Event()
        self._threads: list[Thread] = []

    @property
    def pending(self) -> bool:
        """Whether a file is not whole yet."""
        return bool(self._files)

    # --- before the merge: what headers alone can say -----------------------------------------------------------------

    def locate(self, name: Path, role: str) -> Path:
        """Return the snapshot of a hub id, with the headers of its weights on this disk. Raises InputError."""
        from huggingface_hub import constants

        if not is_hub_id(name) or constants.HF_HUB_OFFLINE:
            return locate_model(name, role)
        if str(name) not in self._folders:
            self._folders[str(name)] = self._headers(str(name), role)
        return self._folders[str(name)]

    def _headers(self, name: str, role: str) -> Path:
        """Fetch all but the weights of a hub id, and open its weight files with their headers."""
        folder = fetch_snapshot(name, role, weights=False)
        unable: tuple[type[Exception], ...] = (NoRanges, *hub_errors())
        try:
            remotes = remote_files(name, role, folder)
        except unable as error:  # among others a hub that cannot be reached, with all in the cache
            return self._whole(name, role, str(error) or type(error).__name__)
        opened: list[PartialFile] = []
        try:
            for remote in remotes:
                self._open(remote, opened)
        except NoRanges as error:
            for file in opened:
                self._forget(file)
                file.drop()
            return self._whole(name, role, str(error))
        except OSError as error:
            if isinstance(error, Gemma2Error):
                raise
            raise hub_failure(name, role, error) from error
        return folder

    def _whole(self, name: str, role: str, cause: str) -> Path:
        """Fetch a model before the merge."""
        self._note(f"{role} {name} is fetched whole before the merge: {printable(cause.splitlines()[0])}")
        return locate_model(Path(name), role)

    def _open(self, remote: RemoteFile, opened: list[PartialFile]) -> None:
        """Open one weight file with its header."""
        if remote.blob.exists():  # as part of another revision
            link(remote)
            return
        same = next((file for file in self._files.values() if file.remote.blob == remote.blob), None)
        if same is None:
            same = PartialFile(remote)
            opened.append(same)
            self._files[remote.path] = same
            self._fetch_header(same)
        elif remote.path not in self._files:
            same.remotes.append(remote)
            self._files[remote.path] = same

    def _forget(self, file: PartialFile) -> None:
        for remote in file.remotes:
            self._files.pop(remote.path, None)

    def _each(self) -> list[PartialFile]:
        """Return the files that are on their way, each once."""
        return list(dict.fromkeys(self._files.values()))

    def _fetch_header(self, file: PartialFile) -> None:
        """Fetch the header of a file; whether it is well formed is checked by the code that reads it."""
        whole = file.remote.size
        self._fetch(file, 0, min(HEAD, whole))
        with file.path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        self._fetch(file, HEAD, min(8 + min(length, LONGEST_HEADER), whole))

    def stored(self, path: Path) -> Path:
        """Return the file that holds the bytes of a weight file that have arrived."""
        with self._change:
            return self._files[path].path if path in self._files else path

    def names(self, folder: Path) -> Sequence[str]:
        """Return the names of the weight files of a directory that are still on their way."""
        return [path.name for path in self._files if path.parent == folder]

    # --- during the merge ---------------------------------------------------------------------------------------------

    def start(self, order: Sequence[Span]) -> None:
        """Begin to fetch: first what `order` names, in its order, then the rest. Raises OutputError for a full disk."""
        self._check_space()
        wanted = [(self._files[path], first, end) for path, first, end in order if path in self._files]
        wanted += [(file, 0, file.remote.size) for file in self._each()]
        asked = {file: file.arrived.copy() for file in self._each()}
        for file, first, end in wanted:
            for start, stop in asked[file].missing(first, end):
                self._queue.extend((file, at, min(at + PART, stop)) for at in range(start, stop, PART))
            asked[file].add(first, end)
        if self._queue:
            left = sum(end - first for _, first, end in self._queue)
            self._note(f"{size(left)} of {len(asked)} weight files arrive while they are merged")
        work = [*[self._fetch_all] * min(LINES, len(self._queue)), *([self._check_all] if self._files else [])]
        self._threads = [Thread(target=self._guarded, args=(one,), daemon=True) for one in work]
        for thread in self._threads:
            thread.start()

    def _check_space(self) -> None:
        missing = sum(file.remote.size - file.arrived.total for file in self._each())
        for file in self._each():
            free = disk_usage(file.path.parent).free
            if missing > free:
                needed, there = sizes_apart(missing, free)
                place = file.path.parent.parent.parent
                raise OutputError(
                    f"the models need {needed} in the hub's cache {place}, which has {there} free",
                    "free some space, or set HF_HUB_CACHE to another folder",
                )

    def wait(self, file: Path, first: int, end: int) -> None:
        """Return when bytes [first, end) of a weight file can be read. Raises Gemma2Error if they will not arrive."""
        if file not in self._files:
            return
        with self._change:
            while (found := self._files.get(file)) and not found.arrived.covers(first, end):
                self._raise_failure()
                self._change.wait()

    def finish(self) -> None:
        """Return when every file is whole, checked and in its place. Raises Gemma2Error."""
        with self._change:
            while self._files:
                self._raise_failure()
                self._change.wait()

    def stop(self) -> None:
        """End all waiting and fetching; what has arrived is kept."""
        self._stopped.set()
        with self._change:
            self._change.notify_all()
            files = self._each()
        for file in files:
            file.close()
        until = monotonic() + LAST
        for thread in self._threads:  # one that waits for the network can write nothing any more, and ends with it
            thread.join(max(until - monotonic(), 0))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._stopped.is_set():
            raise InputError("the models are not fetched any further", "merge again: what has arrived is kept")

    # --- threads ------------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run a thread; its failure is that of every read that waits."""
        try:
            work()
        except BaseException as error:
            with self._change:
                self._failure = self._failure or error
                self._change.notify_all()

    def _over(self) -> bool:
        return self._stopped.is_set() or self._failure is not None

    def _fetch_all(self) -> None:
        while not self._over():
            with self._change:
                if not self._queue:
                    return
                file, first, end = self._queue.popleft()
            self._fetch(file, first, end)

    def _fetch(self, file: PartialFile, first: int, end: int) -> None:
        """Fetch the missing parts of a range; repeat requests that fail for reasons that may pass."""
        for start, stop in file.arrived.missing(first, end):
            tries, place = 0, start
            while place < stop and not self._over():
                reached, error = self._receive(file, place, stop)
                tries = 0 if reached > place else tries + 1
                place = reached
                if error and (tries > len(PAUSES) or not is_passing(error)):
                    raise self._lost(file.remote, error) from error
                if error:
                    self._stopped.wait(PAUSES[max(tries, 1) - 1])

    def _receive(self, file: PartialFile, first: int, end: int) -> tuple[int, Exception | None]:
        """Write one answer to its place as it comes. Return where it ended, and why if too early."""
        place = first
        try:
            for piece in read_range(file.remote, first, end):
                if self._over() or not file.write(piece[: end - place], place):
                    break
                with self._change:
                    file.arrived.add(place, min(place + len(piece), end))
                    self._change.notify_all()
                place = min(place + len(piece), end)
        except hub_errors() as error:
            if isinstance(error, Gemma2Error):
                raise
            return place, error
        finally:
            file.record(first, place)
        return place, None if place == end or self._over() else ConnectionError("the answer was too short")

    def _lost(self, remote: RemoteFile, error: Exception) -> Exception:
        """Return the failure of a file that cannot be fetched."""
        if not is_passing(error):
            role, _, name = remote.owner.rpartition(" ")
            return hub_failure(name, role, error)
        return InputError(
            f"{remote}: the connection to the hub was lost {len(PAUSES) + 1} times in a row ({type(error).__name__})",
            "check the network and merge again: what has arrived is kept",
        )

    def _check_all(self) -> None:
        """Follow the files with their digests, and give each its place when it is whole."""
        while not self._over():
            with self._change:
                files = self._each()
                if not files:
                    return
                ready = [(file, end) for file in files if (end := self._hashable(file)) > file.hashed or file.whole]
                if not ready:
                    self._change.wait()
                    continue
            for file, end in ready:
                if end > file.hashed:
                    file.hash_to(end)
                if file.hashed == file.remote.size and not self._over():
                    file.publish()
                    with self._change:
                        self._forget(file)
                        self._change.notify_all()

    def _hashable(self, file: PartialFile) -> int:
        """Return the end of the next bytes to hash: a full piece, or the rest of the file."""
        end = min(file.hashed + HASHED, file.remote.size)
        return end if file.arrived.covers(file.hashed, end) else file.hashed
