"""Errors that a user can fix: one line that says what is wrong, where, and how to fix it.

Gemma2Error            exit code 1   a clear error
├── UsageError         exit code 2   wrong option, key or configuration
├── InputError         exit code 1   a file, model or data set that cannot be used
├── OutputError        exit code 1   the output exists, is locked or does not fit
├── GuardStop          exit code 3   a guard stopped the run (KL limit, NaN, no signal)
└── AlertStop          exit code 4   an alert of `gemma2 watch` ended the run

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os

__all__ = ["AlertStop", "Gemma2Error", "GuardStop", "InputError", "OutputError", "UsageError", "refusal"]

# Failures of the operating system that any read or write may meet: they are not bugs, so they show no traceback.
REFUSALS = {
    *(errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS),
}
# The disk itself, or the way to it: a network or a plug.
DEVICES = {errno.EIO, errno.EINTR, errno.ENODEV, errno.ENOTCONN, errno.ENXIO, errno.ESTALE}
# torch writes in C++ and keeps no reason.
TORCH_WRITES = ("PytorchStreamWriter failed writing", "basic_ios::clear: iostream error", "inline_container.cc")
HINT = "check its place and permissions"
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


class OutputError(Gemma2Error, OSError):
    """An output that cannot be written: it exists, is locked, or the disk is full."""

    def __str__(self) -> str:  # OSError formats two arguments as "[Errno what] hint"
        return f"{self.what}; {self.hint}" if self.hint else self.what


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
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        found = _refused(one)
        if found:
            return found
        one = one.__cause__
    return None


def _refused(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        hint = _hint(error.errno)
        return f"{error.strerror}: {error.filename or 'the output'}; {hint}" if hint else None
    text = " ".join(str(error).split())
    for number in sorted(REFUSALS | DEVICES):
        if f"(os error {number})" in text:  # Rust
            return f"{os.strerror(number)}: the output ({type(error).__name__}: {text[:200]}); {_hint(number)}"
    if isinstance(error, RuntimeError) and any(words in text for words in TORCH_WRITES):
        return f"torch could not write a file ({text[:200]}); see whether the disk is full"
    return None


def _hint(number: int | None) -> str:
    """What to do about a failure of the operating system; empty for a number that a bug may have as well."""
    return HINT if number in REFUSALS else DEVICE_HINT if number in DEVICES else ""
