"""`gemma2 convert`"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Out, Quiet, required_out
from gemma2.core.outputs.promised import promise

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def convert(
    source: Path = typer.Argument(
        metavar="SOURCE",
        help="A GGUF file, a directory with one, or a model directory.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    dtype: Literal["float32", "bfloat16", "float16"] = typer.Option(
        "float32",
        "--dtype",
        metavar="float32|bfloat16|float16",
        help="Dtype of the written weights [default float32].",
        show_default=False,
        rich_help_panel="Settings",
    ),
    out: Path | None = Out,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Import a model as plain safetensors, with all stop ids, a chat template and a pad token that is not a stop token.

    Reading GGUF needs the extra: pip install 'gemma2[real]'.

    \b
      gemma2 convert model.Q8_0.gguf --out model
      gemma2 convert model --dtype bfloat16 --out model-bf16
    """
    from gemma2.posttrain.conversion.gguf import find_gguf
    from gemma2.posttrain.runs.run_options import RunOptions
    from gemma2.posttrain.schemas import ConvertConfig
    from gemma2.posttrain.schemas.config import resolve

    console = Console(as_json=as_json, quiet=quiet)
    config = resolve(ConvertConfig, flags={"source": source, "dtype": dtype})
    options = RunOptions(required_out(out), force=force)
    find_gguf(config.source)
    if dry_run:
        from gemma2.posttrain.checks.convert_plan import plan_convert

        console.result(plan_convert(config, options))
        return
    from gemma2.posttrain.conversion.convert import run_convert

    promise(options.out)
    result = run_convert(config, options, console)
    console.result(result.summary, result.out)
