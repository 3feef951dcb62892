"""`gemma2 reward` and `gemma2 reward pairs`"""

from __future__ import annotations

from gemma2.merging.progress import Progress
from gemma2.posttrain.rundir import RunOptions, RunResult
from gemma2.posttrain.schemas import PairsConfig, RewardConfig

from .options import add_stage, stage_group


def run(config: RewardConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.preferences.train import run_reward

    return run_reward(config, options, progress)


def run_pairs(config: PairsConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.preferences.pairs import run_pairs

    return run_pairs(config, options, progress)


app = stage_group(RewardConfig, run, examples="gemma2 reward --model sft --data pairs/pairs.jsonl --out reward")
add_stage(
    app,
    PairsConfig,
    run_pairs,
    name="pairs",
    examples="gemma2 reward pairs --model sft --prompts prompts.jsonl --judge my.module:score --out pairs",
)
