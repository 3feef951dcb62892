"""How to go on after an error of a run: it depends on whether the run has left anything to resume from."""

from __future__ import annotations

import re

from gemma2.core.errors import AlertStop, Gemma2Error, GuardStop

__all__ = ["in_a_pipeline", "names_the_way", "with_way_on"]

GOES_ON = "--resume continues from the last checkpoint, --force starts over"
STARTS_OVER = "and start over with --force"
NAMES = re.compile(r"--(resume|force)\b")


def names_the_way(hint: str) -> bool:
    """Whether a hint says how to go on, so that a second line about it could only contradict it."""
    return bool(NAMES.search(hint))


def with_way_on(error: Gemma2Error, kept: bool) -> Gemma2Error:
    """Return the error with the way on in its hint, where that is known; else the same error.

    A run that an alert ended goes on with its settings. One that a guard stopped meets the guard again: it needs other
    settings, with which --resume is refused.

    kept: whether there is something to resume from; without it the run has left nothing, and a start needs no flag
    """
    if names_the_way(error.hint):
        return error
    if isinstance(error, AlertStop):
        return AlertStop(error.what, GOES_ON if kept else "it had no checkpoint yet: the same command starts it again")
    if isinstance(error, GuardStop) and kept and "--" in error.hint:
        return GuardStop(error.what, f"{error.hint}, {STARTS_OVER}", error.where)
    return error


def in_a_pipeline(hint: str) -> str:
    """A hint of a stage for whoever runs the pipeline: it resumes, or replaces what other settings made, itself."""
    said = hint.replace(GOES_ON, "the same command goes on from the last checkpoint")
    return re.sub(r",? (?:and|or) start over with --force\b", "", said)
