"""What doctor calls broken is not handed on, unless the user insists."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.progress import Progress
from gemma2.posttrain.doctor.checks.finding import Depth, Finding
from gemma2.posttrain.doctor.examination import examine

__all__ = ["problems_of", "refuse_broken"]

# Compares back ends of this machine: nothing about the model.
OF_THE_MACHINE = ("attention",)


def problems_of(paths: Sequence[Path], depth: Depth, skip: Collection[str] = OF_THE_MACHINE) -> list[Finding]:
    """Return the problems that doctor finds in each model by itself."""
    return [found for path in paths for found in examine([path], depth, skip=skip) if found.status == "problem"]


def refuse_broken(paths: Sequence[Path], depth: Depth, anyway: bool, progress: Progress) -> None:
    """Raise InputError for models with a problem; with `anyway` say it and go on."""
    found = problems_of(paths, depth)
    if not found:
        return
    first = found[0]
    rest = f", and {len(found) - 1} more" if len(found) > 1 else ""
    what = f"{first.subject} has a problem ({first.name}): {first.message}{rest}"
    if anyway:
        progress.warn(f"{what}; exported anyway")
        return
    raise InputError(
        what, f"gemma2 doctor {first.subject} names all, --fix DIR puts right what needs no judgement; or --anyway"
    )
