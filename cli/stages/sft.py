"""`gemma2 sft`"""

from __future__ import annotations

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import Look, stage
from gemma2.core.progress import Progress
from gemma2.posttrain.runs.run_options import RunOptions, RunResult
from gemma2.posttrain.schemas import SftConfig


def run(config: SftConfig, options: RunOptions, progress: Progress) -> RunResult:
    from gemma2.posttrain.sft.sft import run_sft

    return run_sft(config, options, progress)


def show(config: SftConfig, count: int, console: Console) -> None:
    from gemma2.cli.terminal.token_view import show_rows
    from gemma2.posttrain.sft.sft import show_tokens

    show_rows(show_tokens(config, count), console)


app = stage(
    SftConfig,
    run,
    examples="""
    gemma2 sft --model base --data data --out sft
    gemma2 sft --model base --data data --show-tokens 2
    gemma2 sft --model base --data chat,maths --weights 3,1 --eval-every 50 --keep best --patience 3 --out sft
    """,
    look=Look("show_tokens", "Print the first N rows of the data with their loss mask and stop.", show),
)
