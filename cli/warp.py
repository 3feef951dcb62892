"""`gemma2 warp`"""

from __future__ import annotations

from gemma2.merging.progress import Progress
from gemma2.posttrain.rundir import RunOptions, RunResult
from gemma2.posttrain.schemas import WarpConfig

from .options import stage


def run(config: WarpConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.warp import run_warp, warp_pipeline

    from .console import Console
    from .pipeline import Announcer

    total = len(warp_pipeline(config, options.out).stages)
    announcer = Announcer(progress, total, options.out) if isinstance(progress, Console) else None
    return run_warp(config, options, progress, announcer)


app = stage(
    WarpConfig,
    run,
    examples="""gemma2 warp --sft sft --reward reward --prompts prompts.jsonl --heldout heldout.jsonl --out warp
    gemma2 warp --sft sft --reward reward --prompts p.jsonl --heldout h.jsonl --policies 3 --pick 'kl<=5' --out warp""",
)
