"""`gemma2 merge`: one sub-command per method. The table below is what each of them takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from gemma2.merging.errors import UsageError

from .console import Console
from .help import HelpCommand, HelpGroup
from .options import HELP_NAMES, AsJson, DryRun, Force, Out, Quiet

if TYPE_CHECKING:
    from gemma2.merging import MergeRequest, MergeResult

__all__ = ["METHODS", "app"]

MOST_ROWS = 80  # a longer report is in gemma2.json only


@dataclass(frozen=True)
class Entry:
    """One sub-command: its help, an example, and the options that it takes besides the common ones."""

    help: str
    example: str
    options: tuple[str, ...]


METHODS = {
    "slerp": Entry(
        "Spherical interpolation of task vectors (WARP stage 2), one angle per layer. Three or more models are merged "
        "one after the other, the k-th with weight 1/k. Without --base it is the parent that the models record, else "
        "the weights themselves.",
        "gemma2 merge slerp rl-1 rl-2 --base sft --out merged",
        ("base", "t"),
    ),
    "liti": Entry(
        "Linear interpolation from the init towards a merged model (WARP stage 3): (1 - eta) base + eta model.",
        "gemma2 merge liti merged --base sft --eta 0.1,0.3,0.5 --out front",
        ("base", "eta"),
    ),
    "warp": Entry(
        "SLERP, then LITI, as one combination: no model in between.",
        "gemma2 merge warp rl-1 rl-2 --base sft --eta 0.3 --out next-init",
        ("base", "t", "eta"),
    ),
    "linear": Entry(
        "Weighted average of the weights. Uniform for reward models is WARM.",
        "gemma2 merge linear rm-1 rm-2 rm-3 --out rm",
        ("weights",),
    ),
    "ema": Entry(
        "Exponential moving average over checkpoints, oldest first.",
        "gemma2 merge ema step-100 step-200 step-300 --decay 0.9 --out averaged",
        ("decay", "uniform"),
    ),
}


def _setting(flag: str, metavar: str | None, text: str, panel: str = "Settings") -> Any:
    return typer.Option(None, flag, metavar=metavar, help=text, show_default=False, rich_help_panel=panel)


OPTIONS: dict[str, tuple[Any, Any]] = {
    "base": (Path | None, _setting("--base", "DIR", "The init of the models; task vectors start from it.", "Inputs")),
    "t": (float | None, _setting("--t", "FLOAT", "Share of the second of two models [default 0.5; >=0; <=1].")),
    "eta": (
        str | None,
        _setting("--eta", "A,B,...", "Share of the merged model [default 0.3]. Several: one OUT/eta-... for each."),
    ),
    "weights": (str | None, _setting("--weights", "A,B,...", "One per model, summing to 1 [default uniform].")),
    "decay": (float | None, _setting("--decay", "FLOAT", "Share of the average so far at each checkpoint.")),
    "uniform": (bool | None, _setting("--uniform", None, "Plain average of the checkpoints.")),
}
COMMON: dict[str, tuple[Any, Any]] = {
    "granularity": (
        Literal["layer", "tensor", "model"] | None,
        _setting("--granularity", "layer|tensor|model", "What shares one set of coefficients [default layer]."),
    ),
    "dtype": (
        Literal["bfloat16", "float16", "float32"] | None,
        _setting("--dtype", "bfloat16|float16|float32", "Of the output [default that of the first model]."),
    ),
    "threads": (int | None, _setting("--threads", "INT", "Threads that read, compute and write [default 2; >=1].")),
    "out": (Path | None, Out),
    "force": (bool, Force),
    "dry_run": (bool, DryRun),
    "as_json": (bool, AsJson),
    "quiet": (bool, Quiet),
}
MODELS = typer.Argument(
    metavar="MODEL", help="Model directories, in the order of the merge.", show_default=False, rich_help_panel="Inputs"
)

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup, no_args_is_help=True
)


@app.callback(context_settings=HELP_NAMES)
def merge() -> None:
    """Merge models of one architecture: streamed from disk, in fp32 or better, rounded once."""


def _numbers(flag: str, text: str | None) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"--{flag} {text} is not a list of numbers", "separate them by commas: 0.3,0.5") from error


def request_of(method: str, models: list[Path], given: dict[str, Any]) -> MergeRequest:
    """The library's request for a command line."""
    from gemma2.merging import MergeRequest

    if method == "ema" and (given.get("decay") is None) != bool(given.get("uniform")):
        raise UsageError("merge ema needs --decay or --uniform, and not both", "choose one")
    passed = ("base", "t", "decay", "granularity", "dtype", "threads")
    named = {name: given[name] for name in passed if given.get(name) is not None}
    return MergeRequest(
        method=method,
        models=tuple(models),
        etas=_numbers("eta", given.get("eta")),
        weights=_numbers("weights", given.get("weights")) or None,
        **named,
    )


def show(console: Console, result: MergeResult) -> None:
    """The report per group, and where the models are."""
    if console.as_json:
        outputs = [str(path) for path in result.outputs]
        console.json({"outputs": outputs, "seconds": result.seconds, **result.summary})
        return
    rows = [
        {
            "group": group.group,
            "parameters": group.parameters,
            "angle": group.angle,
            "norms": group.norms,
            "result norm": group.result_norms,
            "coefficients": group.coefficients[0] if len(group.coefficients) == 1 else None,
            "note": group.fallback or None,
        }
        for group in result.groups
    ]
    used = [name for name in (rows[0] if rows else ()) if any(row[name] is not None for row in rows)]
    if len(rows) <= MOST_ROWS:
        console.table([{name: row[name] for name in used} for row in rows])
    for path in result.outputs:
        console.result({}, path)


def command_of(method: str, entry: Entry) -> Callable[..., None]:
    """The function behind one sub-command, with the signature that typer reads."""

    def command(models: list[Path], **given: Any) -> None:
        from gemma2.merging import merge

        console = Console(as_json=given["as_json"], quiet=given["quiet"])
        if given["out"] is None:
            raise UsageError("--out is missing", "give the directory to write")
        request = request_of(method, models, given)
        result = merge(request, out=given["out"], force=given["force"], dry_run=given["dry_run"], progress=console)
        if given["dry_run"]:
            console.result(result.plan.describe())
        else:
            show(console, result)

    keyword = inspect.Parameter.KEYWORD_ONLY
    options = {name: OPTIONS[name] for name in entry.options} | COMMON
    parameters = [
        inspect.Parameter("models", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=MODELS, annotation=list[Path]),
        *(inspect.Parameter(name, keyword, default=o, annotation=a) for name, (a, o) in options.items()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = f"{entry.help}\n\n\b\n  {entry.example}"
    return command


for _name, _entry in METHODS.items():
    app.command(name=_name, cls=HelpCommand, context_settings=HELP_NAMES)(command_of(_name, _entry))
