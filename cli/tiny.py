"""`gemma2 tiny`"""

from __future__ import annotations

from gemma2.merging.progress import Progress
from gemma2.posttrain.rundir import RunOptions, RunResult
from gemma2.posttrain.schemas import TinyConfig

from .options import stage


def run(config: TinyConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.embedded.build import run_tiny

    return run_tiny(config, options, progress)


app = stage(TinyConfig, run, examples="gemma2 tiny --out models")
