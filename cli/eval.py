"""`gemma2 eval`"""

from __future__ import annotations

from gemma2.merging.progress import Progress
from gemma2.posttrain.rundir import RunOptions, RunResult
from gemma2.posttrain.schemas import EvalConfig

from .options import stage


def run(config: EvalConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.evaluate import run_eval

    return RunResult(config.model, run_eval(config, progress))


app = stage(
    EvalConfig,
    run,
    examples="gemma2 eval --model policy --sft sft --reward reward --prompts heldout.jsonl",
    writes=False,
)
