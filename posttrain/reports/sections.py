"""The sections of the report below its headline, as plain values and SVG for the template. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.rounding import differ

from .collect import Collected, RecordedStage
from .command_lines import command_of, phrases, why
from .fronts import is_number
from .headline import PolicyRow
from .plots.figures import curves_figure, front_figure, page_svg
from .plots.layermaps import ANGLES, KEPT, layer_map
from .plots.values import as_yaml, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "anchor_of",
    "angles",
    "both",
    "curves",
    "evaluated_on",
    "front_figures",
    "settings",
    "side_by_side",
    "stage_list",
    "versions",
]

PANELS = {
    "reward": "reward, training",
    "heldout_reward": "reward, held-out",
    "kl": "KL, held-out",
    "length": "length, training",
}
LONGEST_CURVE = 120  # points of a curve; a panel could not show more
SHOWN_SAMPLES = 8
NOT_BEGUN = ("waiting", "blocked", "not needed")
SCORES = ("reward", "judge", "accuracy")  # shown below an answer


def both(make: Callable[[bool], Figure], name: str, description: str) -> dict[str, str]:
    """A figure as SVG in its wide and its narrow form. `make` takes whether the form is narrow."""
    return {form: page_svg(make(form == "narrow"), f"{name}-{form}", description) for form in ("wide", "narrow")}


def front_figures(found: Collected) -> dict[str, str] | None:
    """The front (reward over KL), or None without points that differ from the start."""
    points = found.front.points
    if not points or not differ(points):
        return None
    return both(
        lambda narrow: front_figure(points, narrow), "front", "Reward over KL to the SFT policy for every policy"
    )


def stage_list(found: Collected) -> list[JsonObject]:
    """The stages in their order. The RL runs of one iteration, which differ in their seed, share one entry, as do
    stages that were not started; `also` of the entry has all but the first."""
    entries: list[JsonObject] = []
    for stage in found.stages:
        if stage.name == "." and len(found.stages) > 1:
            continue
        entry = described(stage, found)
        last = entries[-1] if entries else None
        if last and entry["group"] is not None and entry["group"] == last["group"]:
            last["also"].append(entry)
            if entry["seconds"] is not None:
                last["seconds"] = (last["seconds"] or 0.0) + entry["seconds"]
        else:
            entries.append(entry | {"also": []})
    return entries


def group_of(stage: RecordedStage) -> tuple[str, str] | None:
    """Key that the stages of one entry of the list share; None for a stage with its own entry."""
    if stage.status in NOT_BEGUN:
        return stage.status, ""
    together = stage.command == "rlhf" and stage.status == "complete" and stage.round
    return ("rlhf", stage.round) if together else None


def settings(found: Collected) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, [(name, configuration as YAML)]) of every stage, the RL runs of one iteration under one title."""
    groups: dict[tuple[str, str] | str, list[tuple[str, str]]] = {}
    for stage in found.stages:
        if stage.config:
            name = "whole run" if stage.name == "." and len(found.stages) > 1 else called(stage, found)
            groups.setdefault(group_of(stage) or stage.name, []).append((name, as_yaml(stage.config)))
    return [
        (f"{len(group)} RL runs of {key[1]}" if len(group) > 1 else group[0][0], group) for key, group in groups.items()
    ]


def called(stage: RecordedStage, found: Collected) -> str:
    """The name of a stage; for the directory itself, the title of the report."""
    return found.title if stage.name == "." else stage.name


def anchor_of(found: Collected, name: str) -> str:
    """The HTML id of a stage's entry."""
    return f"stage-{next(i for i, stage in enumerate(found.stages, 1) if stage.name == name)}"


def described(stage: RecordedStage, found: Collected) -> JsonObject:
    """A stage as one entry of the list: its purpose, figures and command."""
    figures = {
        key.replace("_", " "): number(value)
        for key, value in stage.summary.items()
        if is_number(value) and not key.endswith(("_se", "_low", "_high"))
    }
    return {
        "name": called(stage, found),
        "group": group_of(stage),
        "anchor": anchor_of(found, stage.name),
        "error": stage.error,
        "command": stage.command,
        "iteration": stage.iteration,
        "status": stage.status,
        "why": why(stage.command),
        "figures": list(figures.items())[:6],
        "seconds": stage.seconds,
        "shell": phrases(command_of(stage, found.root)),
    }


# --- merges ---------------------------------------------------------------------------------------------------------


def angles(found: Collected) -> JsonObject | None:
    """Two heat maps over layers with their table: the angle between the task vectors of every SLERP, and the length
    that SLERP keeps and LERP would keep. None without a SLERP of two or more policies that differ from the start."""
    if not differ(found.front.measured):
        return None
    cells: dict[str, dict[str, float | None]] = {}
    kept: dict[str, dict[str, float | None]] = {}
    tips: dict[tuple[str, str], str] = {}
    runs: set[int] = set()
    rows = []
    merges = sorted(found.of("merge slerp"), key=lambda stage: (stage.round.rpartition("/")[0], stage.iteration or 0))
    several = len({stage.round.rpartition("/")[0] for stage in merges if stage.round}) > 1
    for stage in merges:
        title = f"iteration {stage.iteration}" if stage.round and not several else stage.round or stage.name
        short = stage.iteration if stage.round and not several else title
        groups = [MergedGroup(group) for group in stage.summary.get("groups") or () if isinstance(group, Mapping)]
        if not any(group.angle is not None for group in groups):
            continue
        cells[title] = {group.label: group.angle for group in groups}
        kept[f"SLERP {short}"] = {group.label: group.kept for group in groups}
        kept[f"LERP {short}"] = {group.label: group.linear for group in groups}
        tips |= {(title, group.label): group.extremes for group in groups}
        runs |= {len(group.norms) for group in groups}
        rows += [(title, *group.row) for group in groups]
    if not cells:
        return None
    shares = [[value for value in row.values() if value is not None] for row in kept.values()]
    return {
        "angles": both(
            lambda narrow: layer_map(cells, ANGLES, narrow, tips),
            "angles",
            "Angle between task vectors, per layer and merge",
        ),
        "kept": both(
            lambda narrow: layer_map(kept, KEPT, narrow),
            "kept",
            "Length kept by SLERP and by LERP, per layer and merge",
        ),
        "rows": rows,
        "mean": mean_of([stage.summary.get("mean_angle") for stage in merges]),
        "slerp": percent(shares[0::2]),
        "lerp": percent(shares[1::2]),
        "unrelated": [(count, percent([[count**-0.5]])) for count in sorted(runs - {0})],
    }


class MergedGroup:
    """One group of a merge, as the manifest records it; missing figures are None."""

    def __init__(self, record: JsonMapping) -> None:
        self.label = group_label(str(record.get("group", "")))
        self.pairs = [angle if is_number(angle) else None for angle in record.get("angles") or ()]
        self.norms = [float(norm) for norm in record.get("norms") or () if is_number(norm)]
        self.result = record.get("result_norm") if is_number(record.get("result_norm")) else None
        self.fallback = str(record.get("fallback") or "")

    @property
    def known(self) -> list[float]:
        return [angle for angle in self.pairs if angle is not None]

    @property
    def angle(self) -> float | None:
        """Angle in degrees; the mean over pairs for more than two policies."""
        return fmean(self.known) if self.known else None

    @property
    def extremes(self) -> str:
        """The smallest and the largest angle of several pairs; "" for a single pair."""
        return (
            f"{min(self.known):.1f} to {max(self.known):.1f} over {len(self.known)} pairs"
            if len(self.known) > 1
            else ""
        )

    @property
    def norm(self) -> float | None:
        """The mean length of the task vectors."""
        return fmean(self.norms) if self.norms else None

    @property
    def kept(self) -> float | None:
        """The length of the merge over the mean length of the task vectors."""
        return None if self.result is None or not self.norm else self.result / self.norm

    @property
    def linear(self) -> float | None:
        """The share that the plain average of the task vectors would keep: |sum d_m / M| over their mean length.

        Computed from lengths and angles.
        """
        count = len(self.norms)
        if len(self.pairs) != count * (count - 1) // 2 or None in self.pairs or not self.norm:
            return None
        square = sum(norm**2 for norm in self.norms)
        couples = [(i, j) for i in range(count) for j in range(i + 1, count)]
        for (i, j), angle in zip(couples, self.known, strict=True):
            square += 2 * self.norms[i] * self.norms[j] * math.cos(math.radians(angle))
        return math.sqrt(max(square, 0.0)) / count / self.norm

    @property
    def row(self) -> tuple[object, ...]:
        return self.label, self.angle, self.extremes, self.norm, self.result, self.kept, self.linear, self.fallback


def group_label(group: str) -> str:
    """Short name of a group: `3` for `model.layers.3`, `embedding` for `model.embed_tokens`, `final norm`."""
    last = group.rsplit(".", 1)[-1]
    return {"embed_tokens": "embedding", "norm": "final norm"}.get(last, last)


def mean_of(values: Sequence[object]) -> str | None:
    """The mean of the known angles, in degrees; None without any."""
    known = [float(value) for value in values if isinstance(value, int | float) and is_number(value)]
    return f"{fmean(known):.0f}°" if known else None


def percent(shares: Sequence[Sequence[float]]) -> str | None:
    """The mean of all shares, in percent; None without any."""
    every = [share for row in shares for share in row]
    return f"{100 * fmean(every):.0f}\u00a0%" if every else None


# --- curves, answers, versions --------------------------------------------------------------------------------------


def curves(found: Collected) -> dict[str, str] | None:
    """The training curves of every RL run, or None without metrics."""
    metrics = {
        key: title
        for key, title in PANELS.items()
        if any(isinstance(row.get(key), int | float) for rows in found.curves.values() for row in rows)
    }
    if not metrics:
        return None
    runs = {name: thinned(rows) for name, rows in found.curves.items() if rows}
    return both(lambda narrow: curves_figure(runs, metrics, narrow), "curves", "Reward, KL and length over RL steps")


def thinned(rows: Sequence[JsonMapping]) -> list[JsonMapping]:
    """At most LONGEST_CURVE training rows, evenly spaced, and every evaluation."""
    training = [row for row in rows if row.get("kind") != "eval"]
    stride = max(1, math.ceil(len(training) / LONGEST_CURVE))
    return training[::stride] + [row for row in rows if row.get("kind") == "eval"]


def evaluated_on(found: Collected) -> str:
    """The number of held-out answers of an evaluation during RL, in words; "" if it is not recorded."""
    counts = {row["n"] for rows in found.curves.values() for row in rows if row.get("kind") == "eval" and row.get("n")}
    return f"{' or '.join(f'{count:,}' for count in sorted(counts))} answers each" if counts else ""


def side_by_side(found: Collected, rows: Sequence[PolicyRow]) -> list[JsonObject]:
    """Answers of base, SFT and the chosen model to the same prompts: [{"prompt", "answers": [(title, answer)]}].

    Without samples of the chosen model, those of the last merge.
    """
    sampled = {str(sample.get("name")) for sample in found.samples}
    shown = [row for row in rows if row.role != "best single run" and row.point["name"] in sampled]
    if len(shown) > 3:  # the first, what RL started from, and the chosen or last
        start = [row for row in shown[1:-1] if row.point["kind"] == "sft"]
        last = [row for row in shown if "chosen" in row.role] or shown
        shown = [shown[0], *start[-1:], last[-1]]
    titles = [row.label for row in shown]
    names = {row.point["name"]: row.label for row in shown}
    prompts: dict[object, JsonObject] = {}
    for sample in found.samples:
        if sample.get("name") in names:
            prompt = prompt_text(sample.get("prompt"))
            entry = prompts.setdefault(sample.get("index", prompt), {"prompt": prompt, "answers": {}})
            entry["answers"][names[sample["name"]]] = {
                "text": str(sample.get("completion", "")),
                "scores": [(key, number(sample[key])) for key in SCORES if is_number(sample.get(key))],
                "truncated": bool(sample.get("truncated")),
            }
    return [
        {"prompt": entry["prompt"], "answers": [(title, entry["answers"].get(title)) for title in titles]}
        for entry in list(prompts.values())[:SHOWN_SAMPLES]
    ]


def prompt_text(prompt: object) -> str:
    """The text of a prompt's last message."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping):
        return str(prompt[-1].get("content", ""))
    return str(prompt)


def versions(found: Collected) -> list[tuple[str, str]]:
    """(package, version); several versions if stages differ."""
    every: dict[str, set[str]] = {}
    for stage in found.stages:
        recorded = stage.manifest.get("versions")
        for package, version in (recorded if isinstance(recorded, Mapping) else {}).items():
            every.setdefault(str(package), set()).add(str(version))
    return [(package, ", ".join(sorted(found_here))) for package, found_here in every.items()]
