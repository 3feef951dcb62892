"""Outputs that appear complete or not at all.

An output is built in a hidden sibling of its final path, locked, flushed to disk and moved there in one rename.
Its manifest (`gemma2.json`) is written last; a directory without `"status": "complete"` in it is not a result.

Imports neither torch nor pydantic: the merge commands start in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gemma2.core.errors import Gemma2Error, InputError, OutputError
from gemma2.core.sizes import sizes_apart

from .manifest import CHECKPOINTS, MANIFEST, STATE, read_manifest

__all__ = [
    "add_note",
    "check_named",
    "check_output",
    "check_partial",
    "check_space",
    "fsync_tree",
    "locked",
    "out_is",
    "publish",
    "remove_tokens",
    "staged_output",
    "take_notes",
]


# Whoever asks whether an output is being written (`pipeline status`, `watch`) holds its lock for some microseconds.
LOOKS, PAUSE = 5, 0.02  # seconds
# Of an output, though its manifest does not list them.
OURS = (MANIFEST, STATE, CHECKPOINTS, ".live.json", ".alert.json")
SHOWN = 5  # names in a note
_notes: list[str] = []


def partial_path(out: Path) -> Path:
    """Return the path at which an output is built: a hidden sibling, so that the last step is one rename."""
    return out.with_name(f".{out.name}.partial")


def check_partial(partial: Path) -> None:
    """Refuse a link, or a folder of another user, in the place where a run works: it would become our output."""
    if not _is_own(partial):
        raise OutputError(f"{partial} is not a run of ours: it is a link, a file, or another user's", "remove it")


def _is_own(folder: Path) -> bool:
    """Whether a path is free, or a folder that this user (or root) made."""
    try:
        status = os.lstat(folder)
    except FileNotFoundError:
        return True
    return stat.S_ISDIR(status.st_mode) and status.st_uid in (os.geteuid(), 0)


@contextmanager
def out_is(name: str) -> Iterator[None]:
    """Say `name` for `--out` in the errors of the block: a command whose output is an argument has no such flag."""
    try:
        yield
    except OutputError as error:
        what, hint = (re.sub(r"--out(?=[ ;,]|$)", name, text) for text in (error.what, error.hint))
        raise OutputError(what, hint, error.where) from error


def check_named(out: Path) -> Path:
    """Return an output's path; refuse one without a name, `.` or an empty text, next to which nothing can be built."""
    if out.name in ("", "..") or "\0" in out.name:
        raise OutputError(f"--out {out} does not name a directory", "give the name of a new directory")
    return out


def check_output(
    out: Path, force: bool, inputs: Mapping[str, Path] | None = None, marks: Sequence[str] = (MANIFEST,)
) -> None:
    """Refuse an output that exists (without `force`), or that is, contains or is inside one of the inputs.

    marks  files of which an existing output has one; a folder without them is not ours, and `force` does not replace it
    """
    check_named(out)
    target = out.resolve()
    for role, path in (inputs or {}).items():
        source = path.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise OutputError(f"--out {out} and the {role} {path} overlap", "choose another --out")
    if out.is_symlink():  # replacing the link would leave its target as it is, and writing through it is a surprise
        raise OutputError(
            f"--out {out} is not a directory but a symbolic link to {os.readlink(out)}",
            "remove the link, or choose another --out",
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} exists and is not a directory", "choose another --out")
    _require_ours(out, marks)
    if out.exists() and not force and any(out.iterdir()):
        raise OutputError(f"--out {out} exists", "choose another --out, or replace it with --force")
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write --out {out}: {parent} is not a writable directory", "choose another --out")


def _require_ours(out: Path, marks: Sequence[str]) -> None:
    if out.exists() and any(out.iterdir()) and not any((out / name).is_file() for name in marks):
        raise OutputError(
            f"--out {out} exists and holds something else than an output of gemma2: it has no {marks[0]}",
            "choose another --out",
        )


def check_space(out: Path, needed: int) -> None:
    """Refuse an output of `needed` bytes that the disk has no room for. Raises OutputError."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        texts = sizes_apart(needed, free)
        raise OutputError(
            f"the output needs {texts[0]}, {parent} has {texts[1]} free",
            "free some space, or choose another --out",
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock on writing `out`; a second process fails at once instead of waiting. Raises OutputError."""
    path = out.with_name(f".{out.name}.lock")
    descriptors: list[int] = []
    try:
        with _written(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            while not descriptors or not _take(descriptors[-1], path):
                descriptors.append(_open_lock(path))
        yield
    except BlockingIOError as error:
        raise OutputError(f"another gemma2 process is writing {out}", "wait for it, or choose another --out") from error
    except Exception as error:
        if isinstance(error, Gemma2Error) or not descriptors or _is_at(descriptors[-1], path):
            raise
        raise OutputError(
            f"the folder of --out {out} was moved or removed while the command ran ({type(error).__name__}: {error})",
            "put it back, and start the command again",
        ) from error
    finally:
        try:
            _release(descriptors, path)
        except BaseException:  # interrupted: repeat it; further interrupts are ignored (cli/main.py)
            _release(descriptors, path)
            raise


def _open_lock(path: Path) -> int:
    """Open the lock, made by us or by another process of this user; never what a link there points to."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise OutputError(f"{path} is not a lock of ours but a link, a pipe or a folder", "remove it") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size == 0 and status.st_uid in (os.geteuid(), 0):
        return descriptor
    os.close(descriptor)
    raise OutputError(f"{path} is not a lock of ours: it belongs to another user, or holds data", "remove it")


@contextmanager
def _written(out: Path) -> Iterator[None]:
    """A place where nothing can be created, /proc for one, is an error of the command line, whatever its number."""
    try:
        yield
    except (BlockingIOError, OutputError):
        raise
    except OSError as error:
        raise OutputError(f"cannot write --out {out} ({error.strerror})", "choose another --out") from error


def _take(descriptor: int, path: Path) -> bool:
    """Lock an open file as `_hold` does, also where somebody looks at the lock at this moment."""
    for _ in range(LOOKS):
        with suppress(BlockingIOError):
            return _hold(descriptor, path)
        time.sleep(PAUSE)
    return _hold(descriptor, path)


def _hold(descriptor: int, path: Path) -> bool:
    """Lock an open file. False if it is no longer the file at `path`, which the previous holder may have unlinked."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return _is_at(descriptor, path)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return False


def _release(descriptors: list[int], path: Path) -> None:
    """Unlink a lock file that we hold, or that we created but could not lock before an interrupt.

    One that a broken or read-only disk keeps does no harm: nobody holds it.
    """
    with suppress(OSError):
        if descriptors and _hold(descriptors[-1], path):
            path.unlink()
    while descriptors:
        os.close(descriptors.pop())


def remove_tokens(out: Path) -> None:
    """Remove the tokens (posttrain/launch/shared_disk.py) of starts on several machines that were killed.

    For a holder of the lock: a start holds it as long as its token is needed, so that those found now are left over.
    """
    for path in out.parent.glob(f".{glob.escape(out.name)}.token-*"):
        with suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size == 0:
                path.unlink()


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
    """Swap two directories in one step (Linux renameat2). False, with nothing changed, where that does not exist.

    It needs Linux, a C library with renameat2 (glibc 2.28) and a file system with RENAME_EXCHANGE. POSIX rename cannot
    replace a directory that is not empty, so no sequence of plain renames is a substitute.
    """
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))


# --- files of others: moved to `OUT.kept` before an output is replaced, so that a kill loses nothing ---


def take_notes() -> list[str]:
    """Return the lines about what was kept aside, or could not be removed, since the last call."""
    found = _notes[:]
    _notes.clear()
    return found


def add_note(text: str) -> None:
    """Keep a line for the end of the command."""
    _notes.append(text)


def keep_aside(out: Path) -> None:
    """Move the files below `out` that no manifest lists to a new folder next to it."""
    found = [*_unlisted(out)]
    if not found:
        return
    place = _free_name(out)
    for path in found:
        target = place / path.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    names = [str(path.relative_to(out)) for path in found]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    _notes.append(f"{out} held files of others, which are now in {place}: {', '.join(names[:SHOWN])}{more}")


def _unlisted(directory: Path) -> Iterator[Path]:
    """The files, links and empty folders below an output that its manifest, or that of an output in it, lacks."""
    try:
        listed = (read_manifest(directory) or {}).get("files", {})
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # the disk fails: nothing says that files are those of others
            raise
        listed = {}  # cut or overwritten: nothing says which files are ours
    yield from _unlisted_below(directory, directory, {os.path.normpath(name) for name in listed})


def _unlisted_below(root: Path, folder: Path, listed: set[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if (folder == root and path.name in OURS) or str(path.relative_to(root)) in listed:
            continue
        if path.is_symlink() or not path.is_dir():
            yield path
        elif (path / MANIFEST).is_file():
            yield from _unlisted(path)
        elif any(path.iterdir()):
            yield from _unlisted_below(root, path, listed)


def _free_name(out: Path) -> Path:
    number, place = 1, out.with_name(f"{out.name}.kept")
    while os.path.lexists(place):
        number += 1
        place = out.with_name(f"{out.name}.kept-{number}")
    return place


def publish(partial: Path, out: Path, force: bool) -> None:
    """Move a finished directory to its final path, which never holds a mixture of old and new.

    With `exchange`, `out` is the old output until it is the new one. Where `exchange` returns False, `out` does not
    exist between two renames (old aside, new in). A kill in between leaves both outputs complete in hidden siblings,
    the old one as `partial` with the suffix "-old"; the next `staged_output` of the same path removes them. If the
    second rename fails, the old output is moved back.
    """
    fsync_tree(partial)
    if out.exists():
        if any(out.iterdir()) and not force:
            raise OutputError(f"--out {out} appeared while the command ran", "choose another --out, or use --force")
        _require_ours(out, (MANIFEST,))
        keep_aside(out)
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
    """Build an output: yields an empty hidden directory that becomes `out` if the block ends without an exception.

    The block writes its files and, last, the manifest. Any exception, an interrupt too, removes the directory.
    The next run to the same path removes the directories of killed processes.
    """
    check_output(out, force)
    with locked(out):
        check_output(out, force)  # again: another process may have published it just before
        for stale in filter(_is_own, out.parent.glob(f".{glob.escape(out.name)}.tmp-*")):
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
