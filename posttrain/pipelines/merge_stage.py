"""Merges as steps of a pipeline: a thin door to `gemma2.merging`. Torch-free."""

from __future__ import annotations

from gemma2.core.progress import SILENT, Progress
from gemma2.merging import merge
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas import ExtractLoraConfig, MergeConfig, ReplaceTokenizerConfig

__all__ = ["run_extract_lora", "run_merge", "run_replace_tokenizer"]


def run_merge(config: MergeConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Merge, and return the report per group as the summary. A merge is quick: `resume` starts it again."""
    result = merge(config.request(), out=options.out, force=options.force, progress=progress)
    return RunResult(options.out, result.summary)


def run_extract_lora(config: ExtractLoraConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Write the difference of two models as a LoRA adapter. `resume` starts it again."""
    from gemma2.merging.lora.extraction import extract_lora

    result = extract_lora(config.request(), out=options.out, force=options.force, progress=progress)
    return RunResult(options.out, result.summary)


def run_replace_tokenizer(
    config: ReplaceTokenizerConfig, options: RunOptions, progress: Progress = SILENT
) -> RunResult:
    """Give a model another tokenizer. `resume` starts it again."""
    from gemma2.merging.replacement.replacement import replace_tokenizer

    done = replace_tokenizer(config.model, config.tokenizer, out=options.out, force=options.force, progress=progress)
    return RunResult(options.out, done.summary())
