"""A point of a finished front as a model directory. Torch-free: nothing is measured, the weights are merged.

    line     (1 - eta) * init + eta * merged, in one pass         (WARP 2406.16768, Algorithm 1: the front)
    policy   a copy, by the merge engine's passthrough

The paper does not say which point of the front to take. The rules:

    best-reward  the highest reward among the points of the eta lines, of all iterations
    kl<=X        the highest reward among those with a KL of at most X nats
    eta=E        of the last iteration's line; E need not be a point that was measured

Without a line the first two choose among the policies. A choice by a noisy reward is optimistic: the reward of the
best of several points is, on average, higher than what a new measurement of that point gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.markdown import code, table
from gemma2.core.outputs.model_card import Account
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.outputs.staging import check_output
from gemma2.core.progress import SILENT, Progress
from gemma2.core.rounding import SAME_AS_START, differ
from gemma2.merging import MergeRequest, merge
from gemma2.posttrain.provenance.origin import data_records
from gemma2.posttrain.reports.plots.gains import GAINS_NOTE, bounds_of, called, gain_sentences
from gemma2.posttrain.reports.plots.values import label_of, spreads
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult
from gemma2.posttrain.schemas import PickConfig

from .comparison import is_gain
from .front import best_at
from .front_files import place_of, read_front

__all__ = ["choose", "run_pick"]

Point = JsonMapping

FIGURES = ("reward", "kl", "length")
PARTS = ("", "_se", "_low", "_high")
PICTURE_BYTES = 400_000  # a larger picture of the front stays where it is


def choose(points: Sequence[Point], pick: str) -> JsonObject:
    """The chosen point; with eta=E one of the last line, with figures only where it was measured.

    Raises InputError when no point satisfies `pick`.
    """
    lines = [point for point in points if point["kind"] == "line"]
    if pick.startswith("eta="):
        return _at_eta(lines, float(pick[4:]))
    among = lines or [point for point in points if point["kind"] not in ("trajectory", "base")]
    limit = math.inf if pick == "best-reward" else float(pick[4:])
    chosen = best_at(among, limit)
    if chosen is None:
        least = min((point["kl"] for point in among), default=math.nan)
        raise InputError(
            f"--pick {pick}: no point of the front has so small a KL, the least is {least:.3g} nats", "raise the limit"
        )
    return dict(chosen)


def _at_eta(lines: Sequence[Point], eta: float) -> JsonObject:
    if not lines:
        raise InputError(f"--pick eta={eta:g}: the front has no line from init to merge", "use best-reward or kl<=X")
    if not 0 <= eta <= 1:
        raise UsageError(f"--pick eta={eta:g} is not in 0 .. 1", "the line goes from 0, the init, to 1, the merge")
    last = max(enumerate(lines), key=lambda item: (item[1]["iteration"] or 0, item[0]))[1]
    ends = ("init", "init_weights", "merged", "merged_weights")
    line = [point for point in lines if all(point.get(key) == last.get(key) for key in ends)]
    measured = next((point for point in line if math.isclose(point["eta"], eta, abs_tol=1e-9)), None)
    if measured is not None:
        return dict(measured)
    return {
        "name": f"eta {eta:g}",
        "label": label_of({**last, "name": f"eta {eta:g}", "eta": eta}),
        **{"kind": "line", "eta": eta, "iteration": last["iteration"]},
        **{key: last[key] for key in ends if key in last},
    }


def run_pick(config: PickConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Build the chosen point of `config.front` in `options.out`. A merge is quick: `resume` starts it again."""
    check_output(options.out, options.force, {"front": config.front})
    front = read_front(config.front, "--front")
    point = choose(front["points"], config.pick)
    if not differ(front["points"]):
        progress.warn(f"{SAME_AS_START}: their rewards differ by chance, and so does the choice; train them further")
    models = place_of(point, config.front)
    for model in models:
        if not model.path.is_dir():
            raise InputError(
                f"{model.path}, of which {printable(point['name'])!r} of {config.front} is made, is missing",
                "move the front and its models together, or measure again",
            )
        if digest_weights(model.path) != model.digest:
            raise InputError(
                f"the weights of {model.path} are not those that {config.front} measured", "measure again with pareto"
            )
    if point["kind"] == "line":
        request = MergeRequest(method="liti", base=models[0].path, models=(models[1].path,), etas=(point["eta"],))
    else:
        request = MergeRequest(method="passthrough", models=(models[0].path,))
    summary = summarise(point)
    account = Account(
        command="pick",
        config=config.recorded(),
        data=data_records(config, options.out),
        summary=summary,
        sections=figures_section(front, point, config.pick),
        pictures=tuple(picture for picture in [config.front / "front.svg"] if _is_small(picture)),
    )
    merge(request, out=options.out, force=options.force, progress=progress, account=account)
    return RunResult(options.out, summary)


def _is_small(picture: Path) -> bool:
    return picture.is_file() and picture.stat().st_size <= PICTURE_BYTES


def summarise(point: Point) -> JsonObject:
    """Name, kind, eta and iteration, and the figures with their errors where the point was measured."""
    figures = {
        f"{name}{part}": point[f"{name}{part}"] for name in FIGURES for part in PARTS if f"{name}{part}" in point
    }
    gains = {key: point[key] for key in point if is_gain(key)}
    return (
        {"name": point["name"], "label": called(point)}
        | {k: point[k] for k in ("kind", "eta", "iteration")}
        | figures
        | gains
    )


# --- the card -------------------------------------------------------------------------------------------------------


def figures_section(front: JsonMapping, point: Point, pick: str) -> tuple[tuple[str, str], ...]:
    """The part of the front about the chosen point, for its card: (title, Markdown)."""
    sft = next((p for p in front["points"] if p["kind"] == "sft"), None)
    start = called(sft) if sft else "SFT"
    shown = [point, *([sft] if sft and sft["name"] != point["name"] else [])]
    names = [f"{called(point)} (chosen)", start]
    rows = [[name, *cells] for name, cells in zip(names, _cells(shown), strict=False)]
    parts = [*gain_sentences(point, start)]
    parts = [" ".join(parts), GAINS_NOTE] if parts else []
    parts.append(table(["policy", "reward", f"KL to {start}, nats", "length, tokens"], rows))
    if "reward" in point:
        parts.append("Means over held-out prompts with 95 % confidence intervals (Student's t over prompts).")
    else:
        parts.append("The chosen point is between the measured ones: its own reward and KL were not measured.")
    parts += _area(front)
    if not differ(front["points"]):
        parts.append(f"{SAME_AS_START.capitalize()}: their rewards differ by chance.")
    elif not pick.startswith("eta="):
        parts.append(
            f"The point was chosen by {code(pick)} from the rewards of this front. Such a choice is optimistic: "
            "measured again, on other prompts, the reward of the chosen point is lower on average."
        )
    return (("Measured on the KL-reward front", "\n\n".join(parts)),)


def _area(front: JsonMapping) -> Iterator[str]:
    """The sentence about the hypervolume, where the front has one."""
    area, ends = front.get("hypervolume"), [front.get("hypervolume_low"), front.get("hypervolume_high")]
    bounds = bounds_of(front, front["points"])
    if isinstance(area, int | float) and bounds:
        interval = f" ({ends[0]:.3g} to {ends[1]:.3g})" if all(isinstance(end, int | float) for end in ends) else ""
        yield f"Hypervolume of the whole front: {area:.3g} nats × reward{interval}, bounded by {bounds}."


def _cells(points: Sequence[Point]) -> list[list[str]]:
    """The figures of every point, with the same decimals in a column."""
    columns = [["not measured" if cell == "–" else cell for cell in spreads(points, name)] for name in FIGURES]
    return [list(row) for row in zip(*columns, strict=True)]
