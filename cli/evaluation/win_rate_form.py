"""`gemma2 eval win-rate`"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas.measures import WinRateConfig

from .form_result import shown


def run(config: WinRateConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.built_in.win_rate import run_win_rate

    return shown(run_win_rate(config, options, progress), progress)


app = stage(
    WinRateConfig,
    run,
    examples="""
    gemma2 eval MODEL --win-rate OTHER --prompts prompts.jsonl --reward reward --out results
    gemma2 eval MODEL --win-rate OTHER --prompts prompts.jsonl --judge openai:NAME --judge-url http://localhost:8000/v1
    """,
    positional="model",
    prints=True,
)
