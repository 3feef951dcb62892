"""Where a step writes, and what it returns. Apart from the run directory: a help page needs these two names only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.json_files import JsonObject

__all__ = ["RunOptions", "RunResult"]


@dataclass(frozen=True)
class RunOptions:
    """Where a step writes, and what it may do with an existing output."""

    out: Path
    resume: bool = False
    force: bool = False


@dataclass(frozen=True)
class RunResult:
    """Result of a step: the output directory and the figures for the last line."""

    out: Path
    summary: JsonObject = field(default_factory=dict)
