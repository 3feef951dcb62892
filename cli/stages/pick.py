"""`gemma2 pick`"""

from __future__ import annotations

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.gain_lines import show_gains
from gemma2.cli.terminal.options import stage
from gemma2.core.json_files import load_json
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import PickConfig


def run(config: PickConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.evaluation.pick import run_pick

    result = run_pick(config, options, progress)
    if isinstance(progress, Console) and not progress.as_json:
        points = load_json(config.front / "front.json")["points"]
        show_gains(progress, result.summary, points)
    return result


app = stage(
    PickConfig,
    run,
    positional="front",
    examples="""gemma2 pick front --out model
    gemma2 pick front --pick 'kl<=5' --out model
    gemma2 pick front --pick eta=0.4 --out model""",
)
