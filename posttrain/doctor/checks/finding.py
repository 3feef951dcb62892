"""What a check says, and what a check is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from .subject import Subject

__all__ = ["Check", "Depth", "Diagnosis", "Finding", "Status", "fine", "problem", "warning"]

Status = Literal["ok", "warning", "problem"]


class Depth(IntEnum):
    """How far a check reads: headers and JSON files; every byte of the files; or it runs the model."""

    QUICK = 0
    FULL = 1
    DEEP = 2


@dataclass(frozen=True)
class Finding:
    """The answer of one check.

    name     of the check
    subject  path of the model, two of them for a pair, or "machine"
    status   ok; warning: it works, but differs from what it should be; problem: it gives wrong results or no run
    message  what was found, in one line
    fix      what to do, or ""
    """

    name: str
    subject: str
    status: Status
    message: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """A finding that does not know its check and subject yet."""

    status: Status
    message: str
    fix: str = ""


def fine(message: str) -> Diagnosis:
    """Say that all is well, with the figure that shows it."""
    return Diagnosis("ok", message)


def warning(message: str, fix: str) -> Diagnosis:
    """Say what differs, and what to do."""
    return Diagnosis("warning", message, fix)


def problem(message: str, fix: str) -> Diagnosis:
    """Say what is wrong, and what to do."""
    return Diagnosis("problem", message, fix)


@dataclass(frozen=True)
class Check:
    """One check of one subject.

    name     as --only, --skip and --list have it
    line     what it looks at
    depth    how far it reads
    applies  to which kinds of subjects: policy, reward model, adapter, output
    run      yields its answers; nothing where it does not apply
    gemma2   whether it looks at Gemma 2 only
    """

    name: str
    line: str
    depth: Depth
    applies: frozenset[str]
    run: Callable[[Subject], Iterator[Diagnosis]]
    gemma2: bool = False
