"""`gemma2 tiny`"""

from __future__ import annotations

from gemma2.cli.terminal.options import stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import TinyConfig


def run(config: TinyConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.tiny.build import run_tiny

    return run_tiny(config, options, progress)


app = stage(TinyConfig, run, examples="gemma2 tiny --out models")
