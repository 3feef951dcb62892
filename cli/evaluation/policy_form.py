"""`gemma2 eval policy`: the form that no flag selects"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import EvalConfig


def run(config: EvalConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.evaluate import run_eval

    return RunResult(config.model, run_eval(config, progress))


app = stage(
    EvalConfig,
    run,
    examples="gemma2 eval --model policy --sft sft --reward reward --prompts heldout.jsonl",
    writes=False,
    positional="model",
)
