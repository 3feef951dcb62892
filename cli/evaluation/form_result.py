"""The result of a form of `gemma2 eval` on the screen."""

from __future__ import annotations

from gemma2.cli.terminal.console import Console
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunResult

from .results_view import show_results

__all__ = ["shown"]


def shown(result: RunResult, progress: Progress) -> RunResult:
    """Print a result for people; with --json, or for another reader, it stays as it is."""
    if not isinstance(progress, Console) or progress.as_json:
        return result
    show_results(result.summary, "", progress)
    return RunResult(result.out)
