"""`gemma2 rlhf`"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import RlhfConfig


def run(config: RlhfConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.rl.rlhf import run_rlhf

    return run_rlhf(config, options, progress)


app = stage(
    RlhfConfig,
    run,
    examples="""gemma2 rlhf --policy sft --reward reward --prompts prompts.jsonl --out policy
gemma2 rlhf --policy sft --reward-fn my.module:score --prompts prompts.jsonl --out policy""",
)
