"""Merges as steps of a pipeline: a thin door to `gemma2.merging`. Torch-free."""

from __future__ import annotations

from gemma2.core.progress import SILENT, Progress
from gemma2.merging import merge
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas import MergeConfig

__all__ = ["run_merge"]


def run_merge(config: MergeConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Merge, and return the report per group as the summary. A merge is quick: `resume` starts it again."""
    result = merge(config.request(), out=options.out, force=options.force, progress=progress)
    return RunResult(options.out, result.summary)
