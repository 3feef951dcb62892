"""`gemma2 serve`"""

from __future__ import annotations

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import COMMON as PANEL
from gemma2.cli.terminal.options import AsJson, Quiet
from gemma2.core.errors import UsageError
from gemma2.posttrain.schemas.delivery.serve import ServeConfig

from .schema_command import Flags, TypeForm, schema_command

EXAMPLES = """
gemma2 serve merged
gemma2 serve base+adapter --port 9000 --devices 2
gemma2 serve merged --print
gemma2 serve merged -- --gpu-memory-utilization 0.8
"""
More = typer.Argument(
    None, metavar="-- WORDS", help="Words for vllm serve.", show_default=False, rich_help_panel="vLLM"
)
Print = typer.Option(False, "--print", "--dry-run", help="Show vLLM's command line and end.", rich_help_panel=PANEL)


def run(config: ServeConfig, given: Flags) -> None:
    """Become vLLM, or show how."""
    import shlex

    from gemma2.posttrain.export.vllm_command import serve, vllm_words

    console = Console(as_json=given["as_json"], quiet=given["quiet"])
    more = list(given["more"] or ())
    if given["shown"]:
        words = vllm_words(config, more)
        if console.as_json:
            console.json({"command": words})
        else:
            console.text(shlex.join(words))
        return
    if console.as_json:
        raise UsageError("--json is given without --print", "the server's output is vLLM's; add --print, or drop it")
    serve(config, more, console)


COMMON: dict[str, tuple[TypeForm, object]] = {
    "more": (list[str] | None, More),
    "shown": (bool, Print),
    "as_json": (bool, AsJson),
    "quiet": (bool, Quiet),
}
app: typer.Typer = schema_command(ServeConfig, run, COMMON, EXAMPLES)
