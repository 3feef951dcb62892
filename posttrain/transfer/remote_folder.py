"""A folder in any fsspec file system: opened by its URI, read and written in blocks that are hashed on the way.

Every failure of the other side is one line, with secrets masked: user and password of an address, keys of the
environment. Keys come from where each package looks for them (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, ...); an address
that holds one is refused.
"""

from __future__ import annotations

import posixpath
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

from gemma2.core.errors import Gemma2Error, InputError, OutputError, UsageError
from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.core.permissions import check_host
from gemma2.core.secret_text import masked

__all__ = ["BLOCK", "RemoteFolder", "check_allowed", "open_remote"]

BLOCK = 4 << 20  # bytes
SHOWN = 200  # characters of what the other side says
WITHOUT_HOST = ("file", "local", "memory")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
PACKAGES |= {"sftp": "paramiko", "ssh": "paramiko", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
OURS = ("builtins", "gemma2")  # modules whose exceptions are bugs, where they are no OSError


class FileSystem(Protocol):
    """The part of an fsspec file system that is used here."""

    def open(self, path: str, mode: str = "rb", block_size: int | None = None) -> IO[bytes]: ...
    def cat_file(self, path: str) -> bytes: ...
    def pipe_file(self, path: str, value: bytes) -> object: ...
    def size(self, path: str) -> int | None: ...
    def isfile(self, path: str) -> bool: ...
    def find(self, path: str) -> list[str]: ...
    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...
    def mv(self, path1: str, path2: str) -> object: ...
    def rm_file(self, path: str) -> object: ...
    def invalidate_cache(self) -> None: ...


def _scheme(uri: str) -> str:
    found = SCHEME.match(uri)
    return found[1].lower() if found else "file"


def check_allowed(uri: str) -> None:
    """Raise UsageError for a store that a file names and the user has not allowed (`--allow-host BUCKET`)."""
    if _scheme(uri) not in WITHOUT_HOST:
        check_host(uri, "uri")


def open_remote(uri: str) -> RemoteFolder:
    """Return the folder of a URI; nothing is read yet.

    Raises UsageError for an address that holds a password, a scheme that fsspec does not know, and one whose package
    is not installed.
    """
    import fsspec

    if not uri.strip():  # fsspec takes it for the working folder
        raise UsageError("the URI is empty", "give s3://BUCKET/FOLDER, gs://..., or a path")
    if masked(uri) != uri:
        raise UsageError(f"{masked(uri)} holds a password or key", "keep it in the environment of its package")
    if "::" in uri or "?" in uri or "#" in uri:
        raise UsageError(f"{uri} is not the address of a folder", "give SCHEME://PLACE/FOLDER, or a path")
    scheme = _scheme(uri)
    try:
        system, path = fsspec.url_to_fs(uri)
    except ImportError:
        package = PACKAGES.get(scheme, f"the package of {scheme}://")
        raise UsageError(f"{scheme}:// needs {package}, which is not installed", f"pip install {package}") from None
    except ValueError as error:
        what = (
            f"{scheme}:// is not known to fsspec" if "rotocol" in str(error) else f"{uri} is not an address of its kind"
        )
        raise UsageError(what, "give s3://BUCKET/FOLDER, gs://..., or a path") from None
    except Exception as error:
        with reported(uri):
            raise error
    return RemoteFolder(uri.rstrip("/"), cast("FileSystem", system), str(path).rstrip("/"))


@contextmanager
def reported(uri: str, writing: bool = False) -> Iterator[None]:
    """Turn an error of the other side into one line. Bugs pass."""
    try:
        yield
    except (Gemma2Error, ImportError):
        raise
    except NotImplementedError:
        raise OutputError(f"{uri} cannot be written: its file system is for reading", "give another URI") from None
    except Exception as error:
        if not _is_theirs(error):
            raise
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        what = masked(" ".join(text.split()))[:SHOWN]
        kind = OutputError if writing else InputError
        verb = "written" if writing else "read"
        raise kind(
            f"{uri} cannot be {verb} ({what})", "check address, keys and network; the same command goes on"
        ) from None  # the library's errors may quote headers


def _is_theirs(error: Exception) -> bool:
    """Whether an error is of the other side or its library: a failed call, its types, a value it refuses."""
    if isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] not in OURS:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and "site-packages" in frames[-1].filename


@dataclass(frozen=True)
class RemoteFolder:
    """A folder: `uri` as the user gave it, `path` as its file system has it. Names are relative, with slashes."""

    uri: str
    system: FileSystem
    path: str

    def below(self, name: str) -> RemoteFolder:
        """A folder in it."""
        return RemoteFolder(f"{self.uri}/{name}", self.system, f"{self.path}/{name}")

    @property
    def local(self) -> Path | None:
        """The folder on this machine, links followed; None for one elsewhere."""
        return Path(self.path or "/").resolve() if _scheme(self.uri) in ("file", "local") else None

    def _of(self, name: str) -> str:
        return f"{self.path}/{name}"

    def names(self) -> list[str]:
        """Every file in it and below it; empty for a folder that does not exist."""
        with reported(self.uri), suppress(FileNotFoundError):
            self.system.invalidate_cache()
            return sorted(posixpath.relpath(found, self.path) for found in self.system.find(self.path))
        return []

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is missing."""
        with reported(self.uri), suppress(FileNotFoundError):
            return self.system.size(self._of(name))
        return None

    def text(self, name: str, most: int) -> bytes:
        """The bytes of a small file. Raises InputError for one of more than `most`."""
        with reported(f"{self.uri}/{name}"):
            if (self.system.size(self._of(name)) or 0) > most:
                raise InputError(f"{self.uri}/{name} has more than {most:,} bytes", "it is not a manifest of ours")
            return self.system.cat_file(self._of(name))

    def _blocks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file. Only errors of the other side are turned into lines, not those of who takes them."""
        with reported(f"{self.uri}/{name}"), self.system.open(self._of(name), "rb", BLOCK) as file:
            while block := file.read(BLOCK):
                yield block

    def digest(self, name: str, seen: Callable[[int], None]) -> str:
        """`"blake3:<hex>"` of a file's bytes; `seen` gets the size of every block."""
        found = hasher()
        for block in self._blocks(name):
            found.update(block)
            seen(len(block))
        return digest_name(found)

    def fetch(self, name: str, target: Path, seen: Callable[[int], None]) -> str:
        """Copy a file here, hashed on the way; return its digest."""
        target.parent.mkdir(parents=True, exist_ok=True)
        found = hasher()
        with target.open("wb") as here:
            for block in self._blocks(name):
                found.update(block)
                here.write(block)
                seen(len(block))
        return digest_name(found)

    def send(self, name: str, source: Path, seen: Callable[[int], None]) -> str:
        """Copy a file there, hashed on the way; return the digest of what was sent."""
        found = hasher()
        place = f"{self.uri}/{name}"
        with source.open("rb") as here:
            with reported(place, writing=True):
                self.system.makedirs(posixpath.dirname(self._of(name)), exist_ok=True)
                file = self.system.open(self._of(name), "wb", BLOCK)
            try:
                while block := here.read(BLOCK):
                    found.update(block)
                    with reported(place, writing=True):
                        file.write(block)
                    seen(len(block))
            finally:
                with reported(place, writing=True):
                    file.close()  # an object store keeps what was sent from here on
        return digest_name(found)

    def put_whole(self, name: str, value: bytes) -> None:
        """Write a small file so that it appears at once: under another name, then renamed (an object store copies)."""
        aside = posixpath.join(posixpath.dirname(name), f".{posixpath.basename(name)}.tmp")
        with reported(self.uri, writing=True):
            self.system.makedirs(posixpath.dirname(self._of(name)), exist_ok=True)
            self.system.pipe_file(self._of(aside), value)
            self.system.mv(self._of(aside), self._of(name))
            self.system.invalidate_cache()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with reported(self.uri, writing=True), suppress(FileNotFoundError):
            self.system.rm_file(self._of(name))
