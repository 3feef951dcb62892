"""The headline of a report: table of policies, verdict, best points by KL limit, area under the front. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.rounding import SAME_AS_START, differ

from .collect import Collected
from .fronts import Front, is_number
from .plots.values import duration, number, rounded, start_of, title_of, with_error

__all__ = ["areas", "best_within", "facts", "headline_rows", "point_table", "same_as_start", "table", "verdict"]

Rows = Sequence[tuple[str, JsonMapping]]

# Columns of a point that are not scores.
NOT_SCORES = ("reward", "kl", "length", "truncated", "distinct_2", "eta")
CERTAIN = 3.0  # standard errors; a larger difference is hardly chance
BARS = 2.0  # half length of a bar in the table in standard errors, if no interval is known


def facts(found: Collected) -> list[str]:
    """The facts below the title: size of the run, size of the measurement, time and date."""
    runs: dict[str, int] = {}
    for stage in found.of("rlhf"):
        if stage.round:
            runs[stage.round] = runs.get(stage.round, 0) + 1
    policies = max(runs.values(), default=0)
    iterations = max((stage.iteration or 0 for stage in found.of("rlhf")), default=0)
    seconds = sum(stage.seconds or 0.0 for stage in found.stages if stage.command not in ("warp", "quickstart"))
    ends = [str(stage.manifest["ended"]) for stage in found.stages if stage.manifest.get("ended")]
    answers = max((point.get("n") or 0 for point in found.front.points), default=0)
    size = f"{policies} {plural('policy', policies)} × {iterations} {plural('iteration', iterations)}"
    lines = [
        size if runs else "",
        f"{answers:,} held-out answers per policy" if answers else "",
        f"{duration(seconds)} of work" if seconds else "",
        max(ends)[:10] if ends else "",
    ]
    return [line for line in lines if line]


def plural(word: str, count: int) -> str:
    """`policy`, `policies`."""
    if count == 1:
        return word
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


def headline_rows(found: Collected) -> list[tuple[str, JsonMapping]]:
    """(title, point) of base, SFT, the best single RL run of the first iteration, the merge of every WARP iteration and
    the chosen model; of every policy if the front has no iterations."""
    points = found.front.measured
    rows = [(capital(title_of(p)), p) for kind in ("base", "sft") for p in points if p["kind"] == kind]
    first = min((p["iteration"] for p in points if p["kind"] == "policy" and p.get("iteration")), default=None)
    single = [p for p in points if p["kind"] == "policy" and p.get("iteration") == first]
    if first is None:
        rows += [(str(point["name"]), point) for point in single]
    elif single:
        rows.append(("Best single RL run", max(single, key=lambda point: point["reward"])))
    merges = [point for point in points if point["kind"] == "slerp"]
    merges.sort(key=lambda point: point.get("iteration") or 0)
    rows += [(f"WARP {point.get('iteration') or ''}".strip(), point) for point in merges]
    return rows + chosen_rows(found, points)


def chosen_rows(found: Collected, points: Sequence[JsonMapping]) -> list[tuple[str, JsonMapping]]:
    """The row of the chosen model, unless it is one of the merges."""
    rows = []
    for stage in found.of("pick"):
        eta, name = stage.summary.get("eta"), stage.summary.get("name")
        point = next((point for point in points if point["name"] == name), None)
        if point is None and all(is_number(stage.summary.get(key)) for key in ("reward", "kl")):
            point = {**stage.summary, "name": str(name), "kind": "line"}
        if point is not None and not (point["kind"] == "line" and eta == 1):
            rows.append((f"Chosen model, η = {eta:g}" if is_number(eta) else "Chosen model", point))
    return rows


def capital(title: str) -> str:
    """The title with a capital first letter."""
    return title[:1].upper() + title[1:]


def scores_of_points(points: Sequence[JsonMapping]) -> list[str]:
    """Names of the other scores for which every point has a value, accuracy and judge first."""
    known = [{key for key in point if f"{key}_se" in point and point[key] is not None} for point in points]
    common = set.intersection(*known) - set(NOT_SCORES) if known else set()
    keys = [key for key in points[0] if key in common] if points else []
    return sorted(keys, key=lambda key: ({"accuracy": 0, "judge": 1}.get(key, 2), keys.index(key)))


def table(rows: Rows) -> JsonObject:
    """The headline table. `dot` is (reward, reward - 2 errors, reward + 2 errors) on a common scale of 0 to 100."""
    points = [point for _, point in rows]
    scores = scores_of_points(points)[:3]
    ranges = [error_bar(point) for point in points]
    low, high = min((r[1] for r in ranges), default=0.0), max((r[2] for r in ranges), default=1.0)
    best = max((point["reward"] for point in points), default=None) if differ(points) else None
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


def error_bar(point: JsonMapping) -> tuple[float, float, float]:
    """The reward and the ends of its interval; without interval, two standard errors below and above it."""
    reward, error = float(point["reward"]), BARS * float(point.get("reward_se") or 0.0)
    low, high = point.get("reward_low"), point.get("reward_high")
    return reward, reward - error if low is None else low, reward + error if high is None else high


def scale_of(score: str) -> float:
    """Factor from a score to the figure shown: accuracies are shown in percent."""
    return 100.0 if score == "accuracy" else 1.0


def score_title(score: str) -> str:
    """Title of a score's column."""
    return f"{score.replace('_', ' ').capitalize()}{', %' if score == 'accuracy' else ''}"


def verdict(rows: Rows) -> JsonObject | None:
    """The last WARP merge compared with the policy that RL started from, per score, in standard errors.

    The errors are taken as independent; common random numbers make the true error smaller.
    """
    last = [(title, point) for title, point in rows if title.startswith("WARP")]
    reference = [(title, point) for title, point in rows if point["kind"] == "sft"]
    if not reference or not last or not differ([point for _, point in rows]):
        return None
    (start, before), (merge, after) = reference[-1], last[-1]
    names = ["reward", *scores_of_points([before, after])[:2]]
    lines = [change(name, before, after) for name in names if name in before and name in after]
    price = with_error(after, "kl")["value"]
    return {"title": merge, "start": start, "kl": price, "lines": [line for line in lines if line]}


def change(name: str, before: JsonMapping, after: JsonMapping) -> JsonObject | None:
    """One line of the verdict; None if no error is known."""
    error = math.hypot(before.get(f"{name}_se") or 0.0, after.get(f"{name}_se") or 0.0)
    if not error:
        return None
    gain, scale = after[name] - before[name], scale_of(name)
    return {
        "name": name.replace("_", " "),
        "change": rounded(gain * scale, error * scale, "+"),
        "unit": " points" if name == "accuracy" else "",
        "errors": f"{abs(gain) / error:.1f}",
        "certain": round(abs(gain) / error, 1) >= CERTAIN,
    }


def same_as_start(front: Front) -> str | None:
    """The sentence that takes the place of verdict, areas and best points if no policy differs from the start."""
    if differ(front.measured):
        return None
    return f"{SAME_AS_START.capitalize()}: the rewards below differ by chance. Train further, or at a higher rate."


# --- the front ------------------------------------------------------------------------------------------------------


def best_within(front: Front) -> list[dict[str, str]]:
    """The best point within each KL limit, from front.json."""
    found = front.facts.get("best_at") if differ(front.measured) else None
    rows = []
    for row in found if isinstance(found, list) else ():
        if isinstance(row, Mapping) and all(is_number(row.get(key)) for key in ("limit", "reward", "kl")):
            place = f"iteration {row['iteration']}, " if row.get("iteration") else ""
            where = f"{place}η = {row['eta']:g}" if is_number(row.get("eta")) else str(row.get("name"))
            rows.append(
                {
                    "limit": number(row["limit"]),
                    "point": where,
                    "reward": spread(row, "reward"),
                    "kl": spread(row, "kl"),
                }
            )
    return rows


def spread(row: JsonMapping, key: str) -> str:
    """A value with its interval, else with its standard error, else alone."""
    error = row.get(f"{key}_se")
    written = with_error({key: row.get(key), f"{key}_se": error if is_number(error) else None}, key)
    ends = interval(row, key)
    return f"{written['value']} ({ends})" if ends else " ± ".join(filter(None, written.values()))


def interval(row: JsonMapping, key: str) -> str:
    """The interval of a value, such as `0.78 to 0.83`, rounded by its width; "" if unknown."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if not (is_number(low) and is_number(high)):
        return ""
    return f"{rounded(low, (high - low) / 4)} to {rounded(high, (high - low) / 4)}"


def areas(found: Collected) -> JsonObject | None:
    """The area under the front, its bounds, and the areas of the fronts of single iterations."""
    facts, reference = found.front.facts, found.front.facts.get("reference")
    if not is_number(facts.get("hypervolume")) or not differ(found.front.measured):
        return None
    bounds = reference if isinstance(reference, Mapping) else {}
    own = [front for front in found.fronts if front.iteration and is_number(front.facts.get("hypervolume"))]
    rows = [
        {
            "iteration": front.iteration,
            "area": number(front.facts["hypervolume"]),
            "interval": interval(front.facts, "hypervolume"),
            "gain": number(front.facts.get("hypervolume_gain")),
            "gain_interval": interval(front.facts, "hypervolume_gain"),
        }
        for front in sorted(own, key=lambda front: front.iteration or 0)
    ]
    return {
        "area": number(facts["hypervolume"]),
        "interval": interval(facts, "hypervolume"),
        "kl": number(bounds.get("kl")),
        "reward": number(bounds.get("reward")),
        "rows": rows,
        "gains": any(row["gain"] != "–" for row in rows),
    }


def point_table(found: Collected) -> list[dict[str, str]]:
    """Rows of the table of all measured points."""
    return [
        {
            "name": str(point["name"]),
            "kind": point["kind"],
            "reward": spread(point, "reward"),
            "kl": spread(point, "kl"),
            "length": number(point.get("length")),
            "truncated": number(point.get("truncated")),
            "distinct": number(point.get("distinct_2")),
            "front": "yes" if point.get("on_front") else "",
        }
        for point in found.front.measured
    ]
