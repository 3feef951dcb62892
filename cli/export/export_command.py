"""`gemma2 export`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import AsJson, DryRun, Force, Out, Quiet, Resume
from gemma2.posttrain.schemas.delivery.export import ExportConfig

from .schema_command import Flags, TypeForm, schema_command

if TYPE_CHECKING:
    from gemma2.core.json_files import JsonObject

EXAMPLES = """
gemma2 export merged --dtype bfloat16 --out release
gemma2 export base+adapter --out release
gemma2 export release --push ORG/NAME --dry-run
gemma2 export merged --gguf q8_0 --llama-cpp ~/llama.cpp --out gguf
gemma2 export reward --endpoint --out endpoint --push ORG/NAME
"""


def run(config: ExportConfig, given: Flags) -> None:
    """Export, or print the plan."""
    from gemma2.posttrain.export.exporting import export, plan_export

    console = Console(as_json=given["as_json"], quiet=given["quiet"])
    out: Path | None = given["out"]
    if given["dry_run"]:
        show_plan(plan_export(config, out, given["force"], given["resume"]), console)
        return
    done = export(config, out, force=given["force"], resume=given["resume"], progress=console)
    console.result(done, out)


def show_plan(plan: JsonObject, console: Console) -> None:
    """The plan as a table; the files that would be uploaded one by one."""
    console.result(plan)
    if not console.as_json and plan.get("files"):
        console.text("")
        console.table(plan["files"])


COMMON: dict[str, tuple[TypeForm, object]] = {
    "out": (Path | None, Out),
    "resume": (bool, Resume),
    "force": (bool, Force),
    "dry_run": (bool, DryRun),
    "as_json": (bool, AsJson),
    "quiet": (bool, Quiet),
}
app: typer.Typer = schema_command(ExportConfig, run, COMMON, EXAMPLES)
