"""The arguments and flags of `gemma2 pipeline`."""

from __future__ import annotations

from functools import partial

import typer

from gemma2.cli.terminal.completion import pipelines, stages

__all__ = [
    "Again",
    "File",
    "From",
    "Jobs",
    "KeepGoing",
    "Only",
    "Place",
    "RayAddress",
    "Reuse",
    "Slurm",
    "Why",
    "jobs_option",
]

File = typer.Argument(
    metavar="FILE",
    help="Pipeline: a YAML file, the folder of a run, or the name of one that comes with gemma2.",
    show_default=False,
    rich_help_panel="Inputs",
    autocompletion=pipelines,
)
stage_option = partial(
    typer.Option, None, metavar="STAGE", show_default=False, rich_help_panel="Stages", autocompletion=stages
)
From = stage_option("--from", help="Run this stage and all stages that need it; earlier outputs are used as they are.")
Only = stage_option("--only", help="Run only this stage; the outputs that it needs are used as they are.")
Why = stage_option(
    "--why",
    help="Show in full what differs from the record of this stage, or what it was made from; repeatable, takes `*`.",
)
Again = stage_option("--force", help="Run this stage again even if it is complete; repeatable, takes `*`.")
Reuse = typer.Option(
    None,
    "--reuse",
    metavar="FOLDER",
    help="Link outputs below this folder that were made from the same, in place of making them again; repeatable.",
    show_default=False,
    rich_help_panel="Stages",
)
jobs_option = partial(
    typer.Option, None, "--jobs", "-j", metavar="INT", min=1, show_default=False, rich_help_panel="Settings"
)
Jobs = jobs_option(help="Stages that run at once [default 1].")
Place = typer.Option(
    "local",
    "--executor",
    metavar="local|ray|slurm",
    help="Run stages as processes on this machine, on a Ray cluster, or as SLURM jobs [default local].",
    show_default=False,
    rich_help_panel="Settings",
)
RayAddress = typer.Option(
    None,
    "--ray-address",
    metavar="TEXT",
    help="Address of the Ray cluster; without it, a cluster is started on this machine.",
    rich_help_panel="Settings",
)
Slurm = typer.Option(
    None,
    "--slurm",
    metavar="KEY=VALUE",
    help="Option of sbatch for every stage, such as partition=gpu; repeatable.",
    show_default=False,
    rich_help_panel="Settings",
)
KeepGoing = typer.Option(
    False,
    "--keep-going",
    help="After a failure, continue with the stages that do not need the failed one.",
    rich_help_panel="Stages",
)
