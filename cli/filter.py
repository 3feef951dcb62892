"""`gemma2 filter`"""

from __future__ import annotations

from gemma2.merging.progress import Progress
from gemma2.posttrain.rundir import RunOptions, RunResult
from gemma2.posttrain.schemas import FilterConfig

from .options import stage


def run(config: FilterConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.filters.runner import run_filter

    return run_filter(config, options, progress)


app = stage(FilterConfig, run, positional="data", examples="""gemma2 filter data/ --out clean""")
