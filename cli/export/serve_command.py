"""`gemma2 serve`"""

from __future__ import annotations

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import COMMON as PANEL
from gemma2.cli.terminal.options import Quiet
from gemma2.posttrain.schemas.delivery.serve import ServeConfig

from .schema_command import Flags, TypeForm, schema_command

EXAMPLES = """
gemma2 serve merged
gemma2 serve base+adapter --port 9000 --devices 2
gemma2 serve merged --print
gemma2 serve merged -- --gpu-memory-utilization 0.8
"""
More = typer.Argument(
    None, metavar="-- WORDS", help="Words for vllm serve.", show_default=False, rich_help_panel="Inputs"
)
Print = typer.Option(False, "--print", "--dry-run", help="Show vLLM's command line and end.", rich_help_panel=PANEL)


def run(config: ServeConfig, given: Flags) -> None:
    """Become vLLM, or show how."""
    import shlex

    from gemma2.posttrain.export.vllm_command import serve, vllm_words

    console = Console(quiet=given["quiet"])
    more = list(given["more"] or ())
    if given["shown"]:
        console.text(shlex.join(vllm_words(config, more)))
        return
    serve(config, more, console)


COMMON: dict[str, tuple[TypeForm, object]] = {
    "more": (list[str] | None, More),
    "shown": (bool, Print),
    "quiet": (bool, Quiet),
}
app: typer.Typer = schema_command(ServeConfig, run, COMMON, EXAMPLES)
