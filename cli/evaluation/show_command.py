"""`gemma2 eval show`"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, Quiet

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

reading = partial(typer.Option, show_default=False, rich_help_panel="Inputs")
Results = typer.Argument(
    metavar="RESULTS", help="An --out of gemma2 eval.", show_default=False, rich_help_panel="Inputs"
)
Against = reading(None, "--against", metavar="OTHER", help="Another one: compared row by row, on the rows of both.")
Published = typer.Option(
    "v3",
    "--published",
    metavar="v3|blog|card",
    help="Source of the published rows: report v3, blog post of June 2024, model cards [default v3].",
    show_default=False,
    rich_help_panel="Settings",
)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def show(
    results: Path = Results,
    against: Path | None = Against,
    published: Literal["v3", "blog", "card"] = Published,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Show a finished result next to the published rows, or compare two results. No model is loaded.

    A comparison is paired: exact McNemar where rows are right or wrong, a paired bootstrap for other values.

    \b
      gemma2 eval show results
      gemma2 eval show results --against results-of-the-parent
    """  # fmt: skip
    from gemma2.posttrain.evaluation.compared.kept_results import compare_results, read_result

    from .results_view import show_results

    document = read_result(results)
    if against is not None:
        document = {**document, **compare_results(results, against)}
    console = Console(as_json=as_json, quiet=quiet)
    if as_json:
        console.json(document)
    else:
        show_results(document, published, console)
