"""The result of a form of `gemma2 eval` on the screen."""

from __future__ import annotations

from gemma2.cli.terminal.console import Console
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunResult

from .results_view import show_results

__all__ = ["shown"]


def shown(result: RunResult, progress: Progress, published: str = "") -> RunResult:
    """Print a result for people; with --json, or for another reader, it stays as it is.

    published: source of the published rows next to a suite's
    """
    if not isinstance(progress, Console):
        return result
    from gemma2.posttrain.evaluation.compared.kept_results import is_result, read_result

    document = read_result(result.out) if is_result(result.out) else result.summary
    if progress.as_json:
        return RunResult(result.out, document)
    show_results(document, published, progress)
    return RunResult(result.out)
