"""`gemma2 eval qa`"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas.measures import QaConfig

from .form_result import shown


def run(config: QaConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.built_in.questions import run_qa

    return shown(run_qa(config, options, progress), progress)


app = stage(
    QaConfig,
    run,
    examples="""
    gemma2 eval MODEL --qa questions.jsonl --shots 5 --out results
    gemma2 eval MODEL --qa test.csv --columns question=problem,answer=result --against OTHER
    """,
    positional="model",
    prints=True,
)
