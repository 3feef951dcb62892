"""Errors that a user can fix: one line that says what is wrong, where, and how to fix it.

Gemma2Error            exit code 1   a clear error
├── UsageError         exit code 2   wrong option, key or configuration
├── InputError         exit code 1   a file, model or data set that cannot be used
│   └── PeerLost       exit code 1   another process of the job, on another machine, is gone
├── EndedElsewhere     as rank 0's   rank 0, on another machine, has ended the job
├── OutputError        exit code 1   the output exists, is locked or does not fit
├── OutOfMemory        exit code 1   memory is exhausted, of the machine or of an accelerator
├── SystemRefusal      exit code 1   the operating system refused a read or a write, in another process
├── GuardStop          exit code 3   a guard stopped the run (KL limit, NaN, no signal)
└── AlertStop          exit code 4   an alert of `gemma2 watch` ended the run

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

__all__ = [
    "AlertStop",
    "EndedElsewhere",
    "Gemma2Error",
    "GuardStop",
    "InputError",
    "OutOfMemory",
    "OutputError",
    "PeerLost",
    "SystemRefusal",
    "UsageError",
    "lost_connection",
    "memory_asked",
    "refusal",
]

# Failures of the operating system that any read or write may meet: they are not bugs, so they show no traceback.
REFUSALS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check its place and permissions"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, then start the command again"),
    errno.EFBIG: "choose a disk, or a limit, that takes files of this size",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EROFS: "choose a place that can be written",
}
# The disk itself, or the way to it: a network or a plug.
DEVICES = {errno.EIO, errno.EINTR, errno.ENODEV, errno.ENOTCONN, errno.ENXIO, errno.ESTALE}
# torch writes in C++ and keeps no reason.
TORCH_WRITES = ("PytorchStreamWriter failed writing", "basic_ios::clear: iostream error", "inline_container.cc")
# numpy and Python raise MemoryError; torch, its back ends and Rust tell by their words.
NO_MEMORY = re.compile(r"out of memory|can(?:'t|not) allocate memory|not enough memory|os error 12\b", re.I)
# How gloo, NCCL and the store of torch.distributed say that another process is gone.
LOST = re.compile(
    r"gloo/transport|connection (?:was )?(?:closed|reset|refused) by (?:remote )?peer|ncclRemoteError|ncclSystemError|"
    r"NCCL communicator was aborted|Watchdog caught collective|failed to recv, got 0 bytes|Broken pipe",
    re.I,
)
ASKED = re.compile(r"allocate ([\d.]+ ?(?:bytes|[KMGTP]i?B))\b", re.I)
DEVICE_HINT = "see whether the disk works, and start the command again"


class Gemma2Error(Exception):
    """Base of every expected failure. `what` says what is wrong and where, `hint` how to fix it.

    where  the place alone, for programs: `FILE:LINE:COLUMN`, or the flag
    """

    exit_code = 1

    def __init__(self, what: str, hint: str = "", where: str = "") -> None:
        self.what = what
        self.hint = hint
        self.where = where
        super().__init__(f"{what}; {hint}" if hint else what)


class UsageError(Gemma2Error, ValueError):
    """An option, key or value that the command does not accept."""

    exit_code = 2


class InputError(Gemma2Error, ValueError):
    """An input that is missing, malformed or does not fit the others."""


class PeerLost(InputError):
    """Another process of the job is gone, and nothing on this machine says why; a pipeline may try the stage again."""


class EndedElsewhere(Gemma2Error):
    """Rank 0, on another machine, has ended the job, and says why there; `exit_code` of one is that of rank 0."""


class OutputError(Gemma2Error, OSError):
    """An output that cannot be written: it exists, is locked, or the disk is full."""

    def __str__(self) -> str:  # OSError formats two arguments as "[Errno what] hint"
        return f"{self.what}; {self.hint}" if self.hint else self.what


class OutOfMemory(Gemma2Error, MemoryError):
    """There is not enough memory for the next step; the last checkpoint is kept."""


class SystemRefusal(Gemma2Error):
    """A full disk, a missing permission or the like that another process met; its own error cannot be sent."""


class GuardStop(Gemma2Error, RuntimeError):
    """A guard ended the run before it could do harm; the last good checkpoint is kept."""

    exit_code = 3


class AlertStop(Gemma2Error, RuntimeError):
    """An alert of `gemma2 watch` ended the run; the last checkpoint is kept."""

    exit_code = 4


def refusal(error: BaseException) -> str | None:
    """Return the error line for a failure of the operating system (full disk, missing permission); None for a bug.

    safetensors, tokenizers and torch write in other languages and raise other types, which are known by the
    number or the words of the failure in their texts, or by the OSError that they name as their cause.
    """
    asked = memory_asked(error)
    if asked is not None:
        return f"memory is exhausted ({asked}); close other programs, or use smaller batches or a smaller model"
    return next(filter(None, map(_refused, _causes(error))), None)


def memory_asked(error: BaseException) -> str | None:
    """Return what was asked for when memory was exhausted ("2.00 GiB more were asked for"); None for another error."""
    for one in _causes(error):
        text = " ".join(str(one).split())
        by_words = isinstance(one, RuntimeError | OSError) or type(one).__name__ == "SafetensorError"
        if isinstance(one, MemoryError) or (by_words and NO_MEMORY.search(text)):
            found = ASKED.search(text)
            return f"{found[1]} more were asked for" if found else "the amount asked for is not known"
    return None


def lost_connection(error: BaseException) -> str | None:
    """Return the words in which torch says that another process of the job is gone; None for another error."""
    for one in _causes(error):
        text = " ".join(str(one).split())
        if isinstance(one, RuntimeError) and LOST.search(text):
            return text[:200]
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it names as its cause, and so on."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__


def _refused(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        hint = _hint(error.errno)
        return f"{error.strerror}: {error.filename or 'the output'}; {hint}" if hint else None
    text = " ".join(str(error).split())
    for number in sorted(REFUSALS.keys() | DEVICES):
        if f"(os error {number})" in text:  # Rust
            return f"{os.strerror(number)}: the output ({type(error).__name__}: {text[:200]}); {_hint(number)}"
    if isinstance(error, RuntimeError) and any(words in text for words in TORCH_WRITES):
        return f"torch could not write a file ({text[:200]}); see whether the disk is full"
    return None


def _hint(number: int | None) -> str:
    """What to do about a failure of the operating system; empty for a number that a bug may have as well."""
    if number is None:
        return ""
    return REFUSALS.get(number, DEVICE_HINT if number in DEVICES else "")
