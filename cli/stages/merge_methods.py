"""What `gemma2 merge` offers: one entry per method, with the options it takes. Free of numpy, for quick help pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from gemma2.cli.terminal.options import AsJson, DryRun, Force, Out, Quiet

__all__ = ["COMMON", "METHODS", "MODELS", "OPTIONS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One sub-command: its help, an example, the options that it takes besides the common ones, and its panel."""

    help: str
    example: str
    options: tuple[str, ...]
    panel: str


WARP, AVERAGES, SPHERES = "WARP", "Averages", "Averages on a sphere"
SUMS, PARTS = "Sums of task vectors", "Layers"
DROPPED = ("base", "weights", "density", "rescale", "seed", "normalize", "scale")

METHODS = {
    "slerp": Entry(
        "Spherical interpolation of task vectors (WARP stage 2), one angle per layer. Three or more models are merged "
        "one after the other, the k-th with weight 1/k. Without --base it is the parent that the models record, else "
        "the weights themselves.",
        "gemma2 merge slerp rl-1 rl-2 --base sft --out merged",
        ("base", "t"),
        WARP,
    ),
    "liti": Entry(
        "Linear interpolation from the init towards a merged model (WARP stage 3): (1 - eta) base + eta model.",
        "gemma2 merge liti merged --base sft --eta 0.1,0.3,0.5 --out front",
        ("base", "eta"),
        WARP,
    ),
    "warp": Entry(
        "SLERP, then LITI, as one combination: no model in between.",
        "gemma2 merge warp rl-1 rl-2 --base sft --eta 0.3 --out next-init",
        ("base", "t", "eta"),
        WARP,
    ),
    "linear": Entry(
        "Weighted average of the weights. Uniform for reward models is WARM.",
        "gemma2 merge linear rm-1 rm-2 rm-3 --out rm",
        ("weights", "normalize"),
        AVERAGES,
    ),
    "ema": Entry(
        "Exponential moving average over checkpoints, oldest first.",
        "gemma2 merge ema step-100 step-200 step-300 --decay 0.9 --out averaged",
        ("decay", "uniform"),
        AVERAGES,
    ),
    "model-stock": Entry(
        "Average of the models, drawn to the base as far as the angle between their task vectors asks for.",
        "gemma2 merge model-stock run-1 run-2 run-3 --base base --out merged",
        ("base",),
        AVERAGES,
    ),
    "nuslerp": Entry(
        "SLERP of two models by relative weights, of their task vectors with --base, else of the weights themselves.",
        "gemma2 merge nuslerp a b --weights 1,3 --base base --out merged",
        ("base", "weights"),
        SPHERES,
    ),
    "multislerp": Entry(
        "Weighted mean of directions in the tangent space at their mean; of task vectors with --base.",
        "gemma2 merge multislerp a b c --weights 1,1,2 --out merged",
        ("base", "weights"),
        SPHERES,
    ),
    "karcher": Entry(
        "Karcher mean: the point of the sphere with the least squared angles to the models.",
        "gemma2 merge karcher a b c --out merged",
        ("base", "weights", "iterations", "tolerance"),
        SPHERES,
    ),
    "task-arithmetic": Entry(
        "The base plus the weighted sum of the task vectors, times --scale.",
        "gemma2 merge task-arithmetic math code --base base --weights 0.5,0.4 --out merged",
        ("base", "weights", "normalize", "scale"),
        SUMS,
    ),
    "ties": Entry(
        "Task vectors trimmed to their largest elements; where signs conflict, those of the majority by mass are kept. "
        "Default density 0.2.",
        "gemma2 merge ties math code --base base --density 0.2 --out merged",
        ("base", "weights", "density", "normalize", "scale"),
        SUMS,
    ),
    "dare": Entry(
        "Task vectors with elements dropped at random and the rest scaled up, summed. Default density 0.5.",
        "gemma2 merge dare math code --base base --density 0.5 --seed 1 --out merged",
        DROPPED,
        SUMS,
    ),
    "dare-ties": Entry(
        "DARE's random dropping, then the signs as in TIES. Default density 0.5.",
        "gemma2 merge dare-ties math code --base base --density 0.5 --out merged",
        DROPPED,
        SUMS,
    ),
    "della": Entry(
        "Random dropping that keeps large elements of a row more often, then the signs as in TIES. Default "
        "density 0.5, epsilon 0.1.",
        "gemma2 merge della math code --base base --density 0.5 --epsilon 0.1 --out merged",
        (*DROPPED, "epsilon"),
        SUMS,
    ),
    "della-linear": Entry(
        "DELLA's dropping without the signs: a plain sum. Default density 0.5, epsilon 0.1.",
        "gemma2 merge della-linear math code --base base --density 0.5 --out merged",
        (*DROPPED, "epsilon"),
        SUMS,
    ),
    "breadcrumbs": Entry(
        "Task vectors without their largest and their smallest elements, summed. Default density 0.9, gamma 0.01.",
        "gemma2 merge breadcrumbs math code --base base --density 0.9 --gamma 0.01 --out merged",
        ("base", "weights", "density", "gamma", "normalize", "scale"),
        SUMS,
    ),
    "breadcrumbs-ties": Entry(
        "Breadcrumbs, then the signs as in TIES. Default density 0.9, gamma 0.01.",
        "gemma2 merge breadcrumbs-ties math code --base base --density 0.9 --gamma 0.01 --out merged",
        ("base", "weights", "density", "gamma", "normalize", "scale"),
        SUMS,
    ),
    "passthrough": Entry(
        "A model as it is, or its weights times --scale. Layers of several models are stacked by a file (--config).",
        "gemma2 merge passthrough model --dtype bfloat16 --out smaller",
        ("scale",),
        PARTS,
    ),
}


def _setting(flag: str, metavar: str | None, text: str, panel: str = "Settings") -> Any:
    return typer.Option(None, flag, metavar=metavar, help=text, show_default=False, rich_help_panel=panel)


# A comma list is a gradient over the layers where the text says so; rules by name go into a file.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "base": (Path | None, _setting("--base", "MODEL", "The init of the models; task vectors start from it.", "Inputs")),
    "t": (
        str | None,
        _setting("--t", "FLOAT", "Share of the second of two models; A,B,... from first layer to last [default 0.5]."),
    ),
    "eta": (
        str | None,
        _setting("--eta", "A,B,...", "Share of the merged model [default 0.3]. Several: one OUT/eta-... for each."),
    ),
    "weights": (str | None, _setting("--weights", "A,B,...", "One per model [default equal].")),
    "normalize": (
        bool | None,
        _setting("--normalize/--no-normalize", None, "Divide by the sum of the weights that take part."),
    ),
    "decay": (float | None, _setting("--decay", "FLOAT", "Share of the average so far at each checkpoint.")),
    "uniform": (bool | None, _setting("--uniform", None, "Plain average of the checkpoints.")),
    "scale": (
        str | None,
        _setting("--scale", "FLOAT", "Factor of the result; A,B,... from first layer to last [default 1]."),
    ),
    "density": (str | None, _setting("--density", "A,B,...", "Share of elements kept: one, or one per model.")),
    "gamma": (str | None, _setting("--gamma", "A,B,...", "Share of the largest elements dropped: one, or one each.")),
    "epsilon": (
        str | None,
        _setting("--epsilon", "A,B,...", "Half the spread of the keep probability over ranks: one, or one each."),
    ),
    "rescale": (
        bool | None,
        _setting("--rescale/--no-rescale", None, "Divide what is kept by its keep probability [default yes]."),
    ),
    "seed": (int | None, _setting("--seed", "INT", "Of the random masks [default 0].")),
    "iterations": (int | None, _setting("--iterations", "INT", "Most steps of the mean.")),
    "tolerance": (float | None, _setting("--tolerance", "FLOAT", "Radians; a shorter step is the last.")),
}
THREADS = _setting("--threads", "INT", "Threads that read, compute and write [default cores + 1; >=1].")
VERIFY = typer.Option(
    True,
    "--verify/--no-verify",
    help="Read the output back and compare it with what was written [default yes].",
    show_default=False,
    rich_help_panel="Output and control",
)
ENDING: dict[str, tuple[Any, Any]] = {
    "out": (Path | None, Out),
    "verify": (bool, VERIFY),
    "force": (bool, Force),
    "dry_run": (bool, DryRun),
    "as_json": (bool, AsJson),
    "quiet": (bool, Quiet),
}
COMMON: dict[str, tuple[Any, Any]] = {
    "granularity": (
        Literal["layer", "tensor", "model"] | None,
        _setting("--granularity", "layer|tensor|model", "What shares coefficients or thresholds [default by method]."),
    ),
    "tokenizer": (
        str | None,
        _setting("--tokenizer", "base|union|MODEL", "Whose tokenizer the output has; without it all must be equal."),
    ),
    "dtype": (
        Literal["bfloat16", "float16", "float32"] | None,
        _setting("--dtype", "bfloat16|float16|float32", "Of the output [default that of the first model]."),
    ),
    "threads": (int | None, THREADS),
    **ENDING,
}
MODELS = typer.Argument(
    metavar="MODEL",
    help="Directories, hub ids, LoRA adapters or MODEL+ADAPTER, in the order of the merge.",
    show_default=False,
    rich_help_panel="Inputs",
)
