"""Outputs that appear whole or not at all, and the manifest (`gemma2.json`) that tells where they came from.

An output is built in a hidden sibling of its final place, locked, flushed to disk and moved there in one rename.
The manifest is written last; a directory without `"status": "complete"` in it is not a result.

Torch-free and free of pydantic: the merge commands start in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError, OutputError

__all__ = [
    "CHECKPOINTS",
    "MANIFEST",
    "SCHEMA_VERSION",
    "STATE",
    "cache_folder",
    "check_output",
    "digest_file",
    "digest_input",
    "digest_name",
    "digest_weights",
    "fsync_tree",
    "hasher",
    "locked",
    "now",
    "publish",
    "read_manifest",
    "require_complete",
    "staged_output",
    "versions",
    "weight_files",
    "write_json",
    "write_manifest",
]

MANIFEST = "gemma2.json"
# What a run needs only until it is complete: no part of the output.
STATE, CHECKPOINTS = "run.json", "checkpoints"
SCHEMA_VERSION = 1
# Only what identifies the arithmetic: an allowlist, so that nothing about the user or the machine's paths leaks.
RECORDED_PACKAGES = ("gemma2", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "numpy", "numba")


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cache_folder(name: str) -> Path:
    """A folder in the user's cache, as the XDG base directory specification says; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma2" / name


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result's bytes."""
    from importlib import metadata

    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hasher(threads: int = 1) -> Any:
    """BLAKE3, ten times as fast as SHA-256 on a processor without instructions for that; `b3sum` gives the same."""
    from blake3 import blake3

    return blake3(max_threads=threads)


def digest_name(digest: Any) -> str:
    """`"blake3:<hex>"` of a hasher."""
    return f"blake3:{digest.hexdigest()}"


def digest_file(path: Path, threads: int = 1) -> str:
    """`"blake3:<hex>"` of a file's bytes."""
    digest = hasher(threads)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(4 << 20 if threads > 1 else 1 << 20)
        while got := file.readinto(buffer):
            digest.update(memoryview(buffer)[:got])
    return digest_name(digest)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, by name."""
    return sorted(path for path in directory.glob("*.safetensors") if path.is_file())


def digest_input(path: Path, threads: int = 1) -> str:
    """`digest_file` of an input, at the price of a look where that is enough.

    The digest that the manifest beside it records is trusted for a file that was not touched after it; any other file
    is read once per process and state.
    """
    manifest = read_manifest(path.parent) or {}
    entry = manifest.get("files", {}).get(path.name) if manifest.get("status") == "complete" else None
    if isinstance(entry, dict) and _untouched(path, entry, path.parent / MANIFEST):
        return str(entry["digest"])
    status = path.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _digest_of(path, threads, state)


@lru_cache(maxsize=4096)
def _digest_of(path: Path, threads: int, state: tuple[int, ...]) -> str:
    """The digest of a file in one state of its inode."""
    return digest_file(path, threads)


def digest_weights(directory: Path, threads: int = 1) -> str:
    """One digest of all weights of a model directory: over (name, digest) of its safetensors files.

    Digests that a complete manifest records are trusted for files that were not touched after it.
    """
    total = hasher()
    for path in weight_files(directory):
        total.update(f"{path.name} {digest_input(path, threads)}\n".encode())
    return digest_name(total)


def _untouched(path: Path, entry: Mapping[str, Any], manifest: Path) -> bool:
    """Whether a file is as the manifest, written after it, describes it. No call sets ctime back, as it does mtime."""
    status = path.stat()
    if "digest" not in entry:
        return False
    return entry.get("size") == status.st_size and status.st_ctime_ns <= manifest.stat().st_ctime_ns


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, or None where there is none.

    Raises InputError when the file is there and is no manifest.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "check its permissions") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
        raise InputError(f"{path} is not readable JSON ({type(error).__name__})", "make the output again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files", {}), dict):
        raise InputError(f"{path} is not a gemma2 manifest", "make the output again")
    return manifest


def require_complete(directory: Path, role: str) -> None:
    """Refuse a directory that a gemma2 command began and did not finish."""
    manifest = read_manifest(directory)
    if manifest is not None and manifest.get("status") != "complete":
        raise InputError(
            f"{role} {directory} is an unfinished output (status {str(manifest.get('status'))[:60]!r})",
            "finish it with --resume, or name a complete directory",
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` with the JSON of `value` in one rename, flushed to disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    # A path that is no UTF-8 has lone surrogates in Python, and with this their escapes in JSON.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def own_files(directory: Path) -> Iterator[Path]:
    """The files of an output; a directory inside it that has a manifest of its own is an output by itself."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in (STATE, CHECKPOINTS):
            continue
        if path.is_dir():
            if not (path / MANIFEST).exists():
                yield from own_files(path)
        elif path.name != MANIFEST:
            yield path


def write_manifest(
    directory: Path, manifest: Mapping[str, Any], digests: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Write `gemma2.json` with size and digest of every file beside it. The last thing written to an output.

    digests  of files whose digest is known, by name; None leaves a file's digest out
    """
    files: dict[str, Any] = {}
    for path in own_files(directory):
        name = str(path.relative_to(directory))
        digest = digests[name] if digests and name in digests else digest_file(path)
        files[name] = {"size": path.stat().st_size, **({"digest": digest} if digest else {})}
    document = {"schema_version": SCHEMA_VERSION, "gemma2": metadata_version(), **manifest, "files": files}
    write_json(directory / MANIFEST, document)
    return document


def metadata_version() -> str:
    """The version of this package, or "source" in a checkout that is not installed."""
    from importlib import metadata  # 15 ms that --help does not pay

    try:
        return metadata.version("gemma2")
    except metadata.PackageNotFoundError:
        return "source"


def partial_path(out: Path) -> Path:
    """Where an output is built: a hidden sibling, so that the last step is a rename inside one file system."""
    return out.with_name(f".{out.name}.partial")


def check_output(out: Path, force: bool, inputs: Mapping[str, Path] | None = None) -> None:
    """Refuse an output that exists (without `force`), or that is, holds or lies in one of the inputs."""
    if out.name in ("", "..") or "\0" in out.name:
        raise OutputError(f"--out {out} has no name of its own", "give the name of a directory to make")
    target = out.resolve()
    for role, path in (inputs or {}).items():
        source = path.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise OutputError(f"--out {out} and the {role} {path} overlap", "choose another --out")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"--out {out} exists and is not a directory", "choose another --out")
    if out.exists() and not force and any(out.iterdir()):
        raise OutputError(f"--out {out} exists", "choose another --out, or replace it with --force")
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write --out {out}: {parent} is not a writable directory", "choose another --out")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the right to write `out`; a second process fails at once instead of waiting."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.lock")
    descriptors: list[int] = []
    try:
        while not descriptors or not _hold(descriptors[-1], path):
            descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        yield
    except BlockingIOError as error:
        raise OutputError(f"another gemma2 process is writing {out}", "wait for it, or choose another --out") from error
    finally:
        try:
            _release(descriptors, path)
        except BaseException:  # an interrupt cut it short; further ones are ignored (cli/main.py)
            _release(descriptors, path)
            raise


def _hold(descriptor: int, path: Path) -> bool:
    """Lock an open file; whether it is still the one at `path`, which its holder before us may have unlinked."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _release(descriptors: list[int], path: Path) -> None:
    """Unlink a lock file that is ours, or that we made and could not lock before an interrupt."""
    with suppress(BlockingIOError):
        if descriptors and _hold(descriptors[-1], path):
            path.unlink()
    while descriptors:
        os.close(descriptors.pop())


def fsync_tree(directory: Path) -> None:
    """Flush every file and folder below `directory` to disk."""
    for root, _, names in os.walk(directory):
        for path in [*(Path(root) / name for name in names), Path(root)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def exchange(new: Path, old: Path) -> bool:
    """Swap two directories in one step (Linux renameat2); False where the system cannot."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))


def publish(partial: Path, out: Path, force: bool) -> None:
    """Move a finished directory to its place: old or new is there at every moment, never a mixture."""
    fsync_tree(partial)
    if out.exists():
        if any(out.iterdir()) and not force:
            raise OutputError(f"--out {out} appeared while the command ran", "choose another --out, or use --force")
        if exchange(partial, out):
            shutil.rmtree(partial)
        else:
            aside = partial.with_name(f"{partial.name}-old")
            out.rename(aside)
            try:
                partial.rename(out)
            except BaseException:
                aside.rename(out)
                raise
            shutil.rmtree(aside)
    else:
        partial.rename(out)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged_output(out: Path, force: bool = False) -> Iterator[Path]:
    """Build an output aside: yields an empty directory that becomes `out` when the block ends without an exception.

    The block writes its files and, last, the manifest. Any exception (an interrupt too) removes what was built.
    What a killed process left behind is swept by the next run to the same place.
    """
    check_output(out, force)
    with locked(out):
        for stale in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
            shutil.rmtree(stale)
        temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}-{secrets.token_hex(3)}")
        try:
            temporary.mkdir()
            yield temporary
            publish(temporary, out, force)
        except BaseException:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
            except BaseException:  # as in `locked`
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            raise
