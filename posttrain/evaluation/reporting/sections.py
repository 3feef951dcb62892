"""The sections of the report as plain values for its template: what to show of a finished run, nothing about how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .collect import Collected, Stage
from .commands import command_of, phrases, why
from .figures import angles_figure, curves_figure, front_figure, page_svg
from .values import duration, number, rounded, start_of, title_of, with_error

__all__ = [
    "angles",
    "curves",
    "facts",
    "front_figures",
    "headline_rows",
    "lineage",
    "side_by_side",
    "stage_list",
    "table",
    "verdict",
    "versions",
]

Rows = Sequence[tuple[str, Mapping[str, Any]]]

PANELS = {
    "reward": "reward, training prompts",
    "heldout_reward": "reward, held-out prompts",
    "kl": "KL to SFT, held-out (nats)",
    "length": "length, training (tokens)",
}
LONGEST_CURVE = 120  # points of a curve: more than a panel has dots for
SHOWN_SAMPLES = 8
# Columns of a point that are not a score.
NOT_SCORES = ("reward", "kl", "length", "truncated", "distinct_2", "eta")


def facts(found: Collected) -> list[str]:
    """The line below the title: size of the run, of the measurement, time and day."""
    warp = found.find("warp")
    config = warp.config if warp else {}
    steps = [stage for stage in found.stages if stage.command not in ("warp", "quickstart")]
    seconds = sum(stage.seconds or 0.0 for stage in steps)
    ends = [str(stage.manifest["ended"]) for stage in found.stages if stage.manifest.get("ended")]
    answers = max((point.get("n") or 0 for point in found.front.get("points", ())), default=0)
    lines = [
        f"{config['policies']} policies × {config['iterations']} iterations" if "policies" in config else "",
        f"{answers} held-out answers per policy" if answers else "",
        f"{duration(seconds)} of work" if seconds else "",
        max(ends)[:10] if ends else "",
    ]
    return [line for line in lines if line]


def headline_rows(found: Collected) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, point): base, SFT, the best single RL run of the first iteration, every WARP iteration's merge, the
    chosen model."""
    points = found.front.get("points", [])
    rows = [(capital(title_of(p)), p) for kind in ("base", "sft") for p in points if p["kind"] == kind]
    first = min((p["iteration"] for p in points if p["kind"] == "policy" and p.get("iteration")), default=None)
    single = [p for p in points if p["kind"] == "policy" and p.get("iteration") == first]
    if single:
        rows.append(("Best single RL run", max(single, key=lambda point: point["reward"])))
    merges = [point for point in points if point["kind"] == "slerp"]
    merges.sort(key=lambda point: point.get("iteration") or 0)
    rows += [(f"WARP {point.get('iteration') or ''}".strip(), point) for point in merges]
    warp = found.find("warp")
    eta = warp.summary.get("eta") if warp else None
    if eta not in (None, 1, 1.0):
        rows += [(f"Chosen model, η = {eta:g}", p) for p in points if p["kind"] == "line" and p.get("eta") == eta]
    return rows


def capital(title: str) -> str:
    """With a capital letter at the beginning of a row."""
    return title[:1].upper() + title[1:]


def scores_of_points(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the further scores that every point has a value of, accuracy and judge first."""
    told = [{key for key in point if f"{key}_se" in point and point[key] is not None} for point in points]
    common = set.intersection(*told) - set(NOT_SCORES) if told else set()
    keys = [key for key in points[0] if key in common] if points else []
    return sorted(keys, key=lambda key: ({"accuracy": 0, "judge": 1}.get(key, 2), keys.index(key)))


def table(rows: Rows) -> dict[str, Any]:
    """The headline table. `dot` is (reward, reward - 2 errors, reward + 2 errors) on a common scale of 0 to 100."""
    points = [point for _, point in rows]
    scores = scores_of_points(points)[:3]
    ranges = [error_bar(point) for point in points]
    low, high = min((r[1] for r in ranges), default=0.0), max((r[2] for r in ranges), default=1.0)
    best = max((point["reward"] for point in points), default=None)
    lines = []
    for (title, point), bar in zip(rows, ranges, strict=True):
        cells = [with_error(point, "kl"), *(with_error(point, name, scale_of(name)) for name in scores)]
        lines.append(
            {
                "title": title,
                "best": point["reward"] == best,
                "reward": with_error(point, "reward"),
                "dot": [round(100 * (x - low) / ((high - low) or 1.0), 1) for x in bar],
                "cells": [*cells, {"value": number(point.get("length")), "error": ""}],
            }
        )
    return {"columns": [f"KL to {start_of(points)}", *(score_title(name) for name in scores), "Length"], "rows": lines}


def error_bar(point: Mapping[str, Any]) -> tuple[float, float, float]:
    """The reward, and two standard errors below and above it."""
    reward, error = float(point["reward"]), float(point.get("reward_se") or 0.0)
    return reward, reward - 2 * error, reward + 2 * error


def scale_of(score: str) -> float:
    """Shares of right answers are shown in percent."""
    return 100.0 if score == "accuracy" else 1.0


def score_title(score: str) -> str:
    """A column's name."""
    return f"{score.replace('_', ' ').capitalize()}{', %' if score == 'accuracy' else ''}"


def verdict(rows: Rows) -> dict[str, Any] | None:
    """The last WARP merge against the policy that RL started from, per score: the difference in standard errors.

    The errors are taken as independent; common random numbers make the true one smaller.
    """
    last = [(title, point) for title, point in rows if title.startswith("WARP")]
    reference = [(title, point) for title, point in rows if point["kind"] == "sft"]
    if not reference or not last:
        return None
    (start, before), (merge, after) = reference[-1], last[-1]
    names = ["reward", *scores_of_points([before, after])[:2]]
    lines = [change(name, before, after) for name in names if name in before and name in after]
    price = with_error(after, "kl")["value"]
    return {"title": merge, "start": start, "kl": price, "lines": [line for line in lines if line]}


def change(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """One line of the verdict; None where no error is known."""
    error = math.hypot(before.get(f"{name}_se") or 0.0, after.get(f"{name}_se") or 0.0)
    if not error:
        return None
    gain, scale = after[name] - before[name], scale_of(name)
    return {
        "name": name.replace("_", " "),
        "change": rounded(gain * scale, error * scale, "+"),
        "unit": " points" if name == "accuracy" else "",
        "errors": f"{abs(gain) / error:.1f}",
        "certain": abs(gain) > 3 * error,
    }


def both(make: Callable[[bool], Any], name: str, description: str) -> dict[str, str]:
    """A figure in its wide and its narrow form."""
    return {form: page_svg(make(form == "narrow"), f"{name}-{form}", description) for form in ("wide", "narrow")}


def front_figures(found: Collected) -> dict[str, str] | None:
    points = found.front.get("points")
    if not points:
        return None
    return both(
        lambda narrow: front_figure(points, narrow), "front", "Reward over KL to the SFT policy for every policy"
    )


def stage_list(found: Collected) -> list[dict[str, Any]]:
    """The stages in the order of the work; the RL runs of one iteration, which differ in their seed, are one entry."""
    entries: list[dict[str, Any]] = []
    for stage in found.stages:
        if stage.name == ".":
            continue
        entry = described(stage, found)
        last = entries[-1] if entries else None
        if last and stage.command == "rlhf" == last["command"] and stage.iteration == last["iteration"]:
            last["also"].append(entry)
            last["seconds"] = (last["seconds"] or 0.0) + (entry["seconds"] or 0.0)
        else:
            entries.append(entry | {"also": []})
    return entries


def described(stage: Stage, found: Collected) -> dict[str, Any]:
    """A stage as one entry of the list: what it is for, what came out, the command."""
    figures = {
        key.replace("_", " "): number(value)
        for key, value in stage.summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith("_se")
    }
    return {
        "name": stage.name,
        "command": stage.command,
        "iteration": stage.iteration,
        "status": stage.status,
        "why": why(stage.command),
        "figures": list(figures.items())[:6],
        "seconds": stage.seconds,
        "shell": phrases(command_of(stage, found.root)),
    }


def angles(found: Collected) -> dict[str, Any] | None:
    """Heat map of every SLERP: the mean angle between the task vectors of a group; and the table behind it."""
    merges: dict[str, dict[str, float | None]] = {}
    rows = []
    for name, stage in found.merges.items():
        title = f"iteration {stage.iteration}" if stage.iteration else name
        groups = [
            group for group in stage.summary.get("groups") or () if isinstance(group, Mapping) and "group" in group
        ]
        if any(mean_angle(group) is not None for group in groups):
            merges[title] = {group_label(str(g["group"])): mean_angle(g) for g in groups}
            rows += [
                (title, group_label(str(g["group"])), mean_angle(g), *norms(g), g.get("fallback") or "") for g in groups
            ]
    if not merges:
        return None
    figure = both(
        lambda narrow: angles_figure(merges, narrow), "angles", "Angle between task vectors, per layer and merge"
    )
    kept = [row[4] / row[3] for row in rows if row[3] and row[4] is not None]
    measured = [stage.summary.get("mean_angle") for stage in found.merges.values()]
    means = [angle for angle in measured if isinstance(angle, int | float)]
    return {
        "figure": figure,
        "rows": rows,
        "mean": f"{fmean(means):.0f}°" if means else None,
        "kept": f"{100 * fmean(kept):.0f} %" if kept else None,
    }


def group_label(group: str) -> str:
    """`model.layers.3` is `3`, `model.embed_tokens` is `embedding`, `model.norm` is `final norm`."""
    last = group.rsplit(".", 1)[-1]
    return {"embed_tokens": "embedding", "norm": "final norm"}.get(last, last)


def mean_angle(group: Mapping[str, Any]) -> float | None:
    """Degrees; with more than two policies the mean over their pairs."""
    values = [angle for angle in group.get("angles") or () if isinstance(angle, int | float)]
    return fmean(values) if values else None


def norms(group: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(mean norm of the task vectors, norm of the merged one)."""
    ins, outs = group.get("norms") or (), group.get("result_norms") or ()
    return fmean(ins) if ins else None, outs[0] if outs else None


def curves(found: Collected) -> dict[str, str] | None:
    """Training curves of every RL run."""
    metrics = {
        key: title
        for key, title in PANELS.items()
        if any(isinstance(row.get(key), int | float) for rows in found.curves.values() for row in rows)
    }
    if not metrics:
        return None
    runs = {name: thinned(rows) for name, rows in found.curves.items() if rows}
    return both(lambda narrow: curves_figure(runs, metrics, narrow), "curves", "Reward, KL and length over RL steps")


def thinned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most LONGEST_CURVE training rows, evenly, and every evaluation."""
    training = [row for row in rows if row.get("kind") != "eval"]
    stride = max(1, math.ceil(len(training) / LONGEST_CURVE))
    return training[::stride] + [row for row in rows if row.get("kind") == "eval"]


def side_by_side(found: Collected, rows: Rows) -> list[dict[str, Any]]:
    """Answers of base, SFT and the last merge to the same prompts: [{"prompt", "answers": [...]}]."""
    shown = [(title, point) for title, point in rows if not title.startswith(("Best", "Chosen"))]
    if len(shown) > 3:  # the first, what RL started from, and the last
        shown = [shown[0], *(row for row in shown if row[1]["kind"] == "sft"), shown[-1]]
    titles = [title for title, _ in shown]
    names = {point["name"]: title for title, point in rows if title in titles}
    prompts: dict[Any, dict[str, Any]] = {}
    for sample in found.samples:
        if sample.get("name") in names:
            entry = prompts.setdefault(
                sample.get("index"), {"prompt": prompt_text(sample.get("prompt")), "answers": {}}
            )
            entry["answers"][names[sample["name"]]] = {
                "text": str(sample.get("completion", "")),
                "scores": [(key, number(sample[key])) for key in ("reward", "judge", "accuracy") if key in sample],
                "truncated": bool(sample.get("truncated")),
            }
    return [
        {"prompt": entry["prompt"], "answers": [(title, entry["answers"].get(title)) for title in titles]}
        for entry in list(prompts.values())[:SHOWN_SAMPLES]
    ]


def prompt_text(prompt: object) -> str:
    """The last message of a prompt."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping):
        return str(prompt[-1].get("content", ""))
    return str(prompt)


def lineage(found: Collected) -> list[dict[str, Any]]:
    """Every result with its weights, and what it was made from; a parent that is a stage here is linked."""
    owners = {stage.weights: stage.name for stage in reversed(found.stages) if stage.weights}
    rows = []
    for stage in found.stages:
        parents = [parent for parent in stage.manifest.get("parents") or () if isinstance(parent, Mapping)]
        if not stage.weights and not parents:
            continue
        made_from = {str(parent.get("weights")): parent for parent in parents}
        described_parents = [
            {
                "role": str(parent.get("role", "")),
                "name": owners.get(weights) or Path(str(parent.get("path", ""))).name,
                "here": weights in owners,
                "weights": weights,
            }
            for weights, parent in made_from.items()
        ]
        rows.append({"name": stage.name, "weights": stage.weights, "parents": described_parents})
    return rows


def versions(found: Collected) -> list[tuple[str, str]]:
    """Package -> version; several where stages differ."""
    every: dict[str, set[str]] = {}
    for stage in found.stages:
        recorded = stage.manifest.get("versions")
        for package, version in (recorded if isinstance(recorded, Mapping) else {}).items():
            every.setdefault(str(package), set()).add(str(version))
    return [(package, ", ".join(sorted(found_here))) for package, found_here in every.items()]
