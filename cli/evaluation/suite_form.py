"""`gemma2 eval suite`"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas.measures import SuiteConfig

from .form_result import shown


def run(config: SuiteConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.suite.run_suite import run_suite

    return shown(run_suite(config, options, progress), progress, config.published)


app = stage(
    SuiteConfig,
    run,
    examples="""
    gemma2 eval MODEL --suite gemma2 --data tasks --out results
    gemma2 eval MODEL --suite gemma2 --data tasks --against PARENT --out results
    gemma2 eval MODEL --suite gemma2 --tasks arc_challenge,gsm8k --limit 100 --data tasks --out results
    """,
    positional="model",
)
