"""`gemma2 merge extract-lora`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.options import AsJson, DryRun, Force, Out, Quiet, required_out
from gemma2.core.outputs.promised import promise
from gemma2.core.sizes import size

if TYPE_CHECKING:
    from gemma2.core.json_files import JsonObject
    from gemma2.merging.lora.extraction import ExtractResult

__all__ = ["extract_lora"]

MOST_ROWS = 80  # a longer report is in gemma2.json only
SOMEWHERE = Path("adapter")  # of a plan without --out


Model = typer.Argument(
    metavar="MODEL",
    help="A model directory, a hub id or MODEL+ADAPTER.",
    show_default=False,
    rich_help_panel="Inputs",
)
Base = typer.Option(
    None,
    "--base",
    metavar="MODEL",
    help="The model that it was trained from [default the one that it records].",
    show_default=False,
    rich_help_panel="Inputs",
)
Rank = typer.Option(
    None,
    "--rank",
    metavar="INT",
    help="Rank of the factors; with --explained the largest one [>=1].",
    show_default=False,
    rich_help_panel="Settings",
)
Explained = typer.Option(
    None,
    "--explained",
    metavar="FLOAT",
    help="Share of the squared difference of each layer that its factors must hold [>0, <=1].",
    show_default=False,
    rich_help_panel="Settings",
)
Targets = typer.Option(
    None,
    "--target-modules",
    metavar="A,B,...",
    help="Modules that get factors [default every linear layer that differs].",
    show_default=False,
    rich_help_panel="Settings",
)
Saved = typer.Option(
    None,
    "--save-modules",
    metavar="A,B,...|all",
    help="Modules that are stored whole if they differ; all: everything without factors.",
    show_default=False,
    rich_help_panel="Settings",
)
LeaveOut = typer.Option(
    False,
    "--leave-out",
    help="Leave out what differs and has no place in the adapter, and report it.",
    show_default=False,
    rich_help_panel="Settings",
)
Dtype = typer.Option(
    "float32",
    "--dtype",
    metavar="bfloat16|float16|float32",
    help="dtype of the factors [default float32].",
    show_default=False,
    rich_help_panel="Settings",
)
Threads = typer.Option(
    2,
    "--threads",
    min=1,
    metavar="INT",
    help="Threads that read and compare [default 2; >=1].",
    show_default=False,
    rich_help_panel="Settings",
)


def extract_lora(
    model: Path = Model,
    base: Path | None = Base,
    rank: int | None = Rank,
    explained: float | None = Explained,
    target_modules: str | None = Targets,
    save_modules: str | None = Saved,
    leave_out: bool = LeaveOut,
    dtype: Literal["bfloat16", "float16", "float32"] = Dtype,
    threads: int = Threads,
    out: Path | None = Out,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Write the difference of a model and its base as a LoRA adapter, by a truncated SVD of each linear layer.

    Memory holds one tensor. The report says, for each layer, which share of the difference the adapter does not hold.

    \b
      gemma2 merge extract-lora rl-1 --base sft --rank 16 --out adapter
      gemma2 merge extract-lora rl-1 --base sft --explained 0.95 --save-modules all --out adapter
    """
    from gemma2.merging.inputs.weight_files import check_folders

    out = out if dry_run else required_out(out)
    check_folders({"model": model} | ({"base": base} if base else {}))
    from gemma2.merging.lora.extract_plan import ExtractRequest, plan_extract
    from gemma2.merging.lora.extraction import extract_lora as extract

    console = Console(as_json=as_json, quiet=quiet)
    request = ExtractRequest(
        model=model,
        base=base,
        rank=rank,
        explained=explained,
        target_modules=_names(target_modules),
        save_modules=_names(save_modules),
        leave_out=leave_out,
        dtype=dtype,
        threads=threads,
    )
    if dry_run:
        console.result(plan_extract(request, out or SOMEWHERE, force or out is None).describe())
        return
    show(console, extract(request, out=promise(required_out(out)), force=force, progress=console))


def _names(text: str | None) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def show(console: Console, result: ExtractResult) -> None:
    """Rank and error of each layer, and where the adapter is."""
    summary: JsonObject = result.summary
    if console.as_json:
        console.json({"output": str(result.plan.out), **summary})
        return
    rows = [row for row in summary["groups"] if row["norm"]]
    if len(rows) <= MOST_ROWS:
        console.table(rows)
    weights = sum(file.stat().st_size for file in result.plan.out.glob("*.safetensors"))
    figures = {key: summary[key] for key in ("parameters", "norm", "error", "explained", "error_of_weights", "svd")}
    console.result({**figures, "size": size(weights)}, result.plan.out)
