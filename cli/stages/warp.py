"""`gemma2 warp`"""

from __future__ import annotations

from gemma2.cli.terminal.gain_lines import show_gains
from gemma2.cli.terminal.options import stage
from gemma2.core.json_files import load_json
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import WarpConfig


def run(config: WarpConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.cli.terminal.console import Console
    from gemma2.cli.tools.pipeline import Announcer
    from gemma2.posttrain.pipelines.warp import run_warp, warp_pipeline

    total = len(warp_pipeline(config, options.out).stages)
    announcer = Announcer(progress, total, options.out) if isinstance(progress, Console) else None
    result = run_warp(config, options, progress, announcer)
    if isinstance(progress, Console) and not progress.as_json:
        points = load_json(options.out / "front" / "front.json")["points"]
        show_gains(progress, result.summary, points)
    return result


app = stage(
    WarpConfig,
    run,
    examples="""gemma2 warp --sft sft --reward reward --prompts prompts.jsonl --heldout heldout.jsonl --out warp
    gemma2 warp --sft sft --reward reward --prompts p.jsonl --heldout h.jsonl --policies 3 --pick 'kl<=5' --out warp""",
)
