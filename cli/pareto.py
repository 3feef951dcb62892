"""`gemma2 pareto`"""

from __future__ import annotations

from gemma2.merging.progress import Progress
from gemma2.posttrain.rundir import RunOptions, RunResult
from gemma2.posttrain.schemas import ParetoConfig

from .options import stage


def run(config: ParetoConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.pareto import run_pareto

    return run_pareto(config, options, progress)


app = stage(
    ParetoConfig,
    run,
    examples="""gemma2 pareto --sft sft --reward reward --prompts heldout.jsonl --policies rl-1,rl-2 --out front
    gemma2 pareto --sft sft --reward reward --prompts heldout.jsonl --merged slerp --etas 0,.3,1 --out front""",
)
