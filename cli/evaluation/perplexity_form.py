"""`gemma2 eval perplexity`"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas.measures import PerplexityConfig

from .form_result import shown


def run(config: PerplexityConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.built_in.perplexity import run_perplexity

    return shown(run_perplexity(config, options, progress), progress)


app = stage(
    PerplexityConfig,
    run,
    examples="""
    gemma2 eval MODEL --perplexity heldout.txt
    gemma2 eval MODEL --perplexity a.txt,b.jsonl --window 4096 --overlap 512 --out results
    gemma2 eval MODEL --perplexity rows.parquet --columns text=content --against OTHER
    """,
    positional="model",
    prints=True,
)
