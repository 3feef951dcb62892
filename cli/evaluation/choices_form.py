"""`gemma2 eval choices`"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas.measures import ChoicesConfig

from .form_result import shown


def run(config: ChoicesConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.built_in.multiple_choice import run_choices

    return shown(run_choices(config, options, progress), progress)


app = stage(
    ChoicesConfig,
    run,
    examples="""
    gemma2 eval MODEL --choices questions.jsonl --shots 5 --out results
    gemma2 eval MODEL --choices test.csv --columns question=ctx,choices=endings --limit 200
    """,
    positional="model",
    prints=True,
)
