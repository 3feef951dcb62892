"""`gemma2 sft`"""

from __future__ import annotations

from gemma2.merging.progress import Progress
from gemma2.posttrain.rundir import RunOptions, RunResult
from gemma2.posttrain.schemas import SftConfig

from .console import Console
from .options import Look, stage


def run(config: SftConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.training.sft import run_sft

    return run_sft(config, options, progress)


def show(config: SftConfig, count: int, console: Console) -> None:
    from gemma2.posttrain.training.sft import show_tokens

    from .tokens import show_rows

    show_rows(show_tokens(config, count), console)


app = stage(
    SftConfig,
    run,
    examples="""
    gemma2 sft --model base --data data --out sft
    gemma2 sft --model base --data data --show-tokens 2
    gemma2 sft --model base --data chat,maths --weights 3,1 --eval-every 50 --keep best --patience 3 --out sft
    """,
    look=Look("show_tokens", "Print the first N rows of the data with their loss mask, and end.", show),
)
