"""`gemma2 sft`"""

from __future__ import annotations

from gemma2.merging.progress import Progress
from gemma2.posttrain.rundir import RunOptions, RunResult
from gemma2.posttrain.schemas import SftConfig

from .options import stage


def run(config: SftConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.sft import run_sft

    return run_sft(config, options, progress)


app = stage(SftConfig, run, examples="""gemma2 sft --model base --data data --out sft""")
