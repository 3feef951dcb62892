"""The headline of a report: table of policies, verdict, best points by KL limit, area under the front. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.rounding import SAME_AS_START, differ

from .collect import Collected
from .fronts import Front, is_number
from .plots.gains import GAINS_NOTE, bounds_of, called, gain_of, gain_sentences, is_certain, merges_sentence, scale_of
from .plots.point_kinds import is_merge, is_merged, line_word, word_of
from .plots.values import column, column_decimals, duration, end_of, fixed, number, spreads, start_of

__all__ = [
    "PolicyRow",
    "answers",
    "areas",
    "best_within",
    "facts",
    "headline_rows",
    "merges",
    "point_table",
    "rows_of",
    "same_as_start",
    "table",
    "verdict",
]

# Columns of a point that are not scores.
NOT_SCORES = ("reward", "kl", "length", "truncated", "distinct_2", "eta")
CHOSEN, SINGLE, START = "chosen", "best single run", "where RL started"  # roles of a row
OVER = "reward_over_single"
WHOLE = ("warp", "pipeline", "quickstart")  # commands whose time is that of their stages
BARS = 2.0  # half length of a bar in the table in standard errors, if no interval is known


def facts(found: Collected) -> list[str]:
    """The facts below the title: size of the run, size of the measurement, time and date."""
    runs: dict[str, int] = {}
    for stage in found.of("rlhf"):
        if stage.round:
            runs[stage.round] = runs.get(stage.round, 0) + 1
    policies = max(runs.values(), default=0)
    iterations = max((stage.iteration or 0 for stage in found.of("rlhf")), default=0)
    seconds = sum(stage.seconds or 0.0 for stage in found.stages if stage.command not in WHOLE)
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


def answers(front: Front) -> str:
    """The size of the measurement in words: `448 held-out prompts`, or `896 answers to held-out prompts`."""
    count = max((point.get("n") or 0 for point in front.measured), default=0)
    return f"{count:,} answers to held-out prompts" if count else "held-out prompts"


def plural(word: str, count: int) -> str:
    """`policy`, `policies`."""
    if count == 1:
        return word
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


@dataclass(frozen=True)
class PolicyRow:
    """A line of the headline table: a point, and its role in the comparison ("" or a few words)."""

    point: JsonMapping
    role: str = ""

    @property
    def label(self) -> str:
        """The name of the point, the same in tables and pictures."""
        return called(self.point)

    @property
    def title(self) -> str:
        """Name and role in one text."""
        return f"{self.label} ({self.role})" if self.role else self.label


def headline_rows(found: Collected) -> list[PolicyRow]:
    """Base, SFT, the best single RL run of the first iteration, the merge of every WARP iteration and the chosen model;
    every policy if the front has no iterations."""
    picked = [stage.summary for stage in found.of("pick")]
    return rows_of(found.front.measured, picked[-1] if picked else None)


def rows_of(points: Sequence[JsonMapping], picked: JsonMapping | None) -> list[PolicyRow]:
    """The rows of a front. picked: summary of the stage that chose the model."""
    rows = [
        PolicyRow(p, START if kind == "sft" else "") for kind in ("base", "sft") for p in points if p["kind"] == kind
    ]
    first = min((p["iteration"] for p in points if p["kind"] == "policy" and p.get("iteration")), default=None)
    single = [p for p in points if p["kind"] == "policy" and p.get("iteration") == first]
    if first is None:
        rows += [PolicyRow(point) for point in single]
    elif single:
        rows.append(PolicyRow(max(single, key=lambda point: point["reward"]), SINGLE))
    merges = [point for point in points if is_row_of_merge(point)]
    merges.sort(key=lambda point: point.get("iteration") or 0)
    rows += [PolicyRow(point) for point in merges]
    chosen = chosen_point(points, picked)
    if chosen is None:
        return rows
    same = next((i for i, row in enumerate(rows) if row.label == called(chosen)), None)
    if same is None:
        return [*rows, PolicyRow(chosen, CHOSEN)]
    role = ", ".join(filter(None, (rows[same].role, CHOSEN)))
    return [*rows[:same], PolicyRow(rows[same].point, role), *rows[same + 1 :]]


def is_row_of_merge(point: JsonMapping) -> bool:
    """Whether a point is a merge with its own row: any but the LITI that an iteration of WARP hands to the next."""
    return is_merge(point["kind"]) and not (point["kind"] == "liti" and point.get("iteration"))


def chosen_point(points: Sequence[JsonMapping], picked: JsonMapping | None) -> JsonMapping | None:
    """The point of a front that was picked; one that was measured elsewhere if its figures are recorded."""
    if picked is None:
        return None
    point = next((point for point in points if point["name"] == picked.get("name")), None)
    if point is None and all(is_number(picked.get(key)) for key in ("reward", "kl")):
        point = {**picked, "name": str(picked.get("name")), "kind": "line", "eta": picked.get("eta") or 0.0}
    return point


def scores_of_points(points: Sequence[JsonMapping]) -> list[str]:
    """Names of the other scores for which every point has a value, accuracy and judge first."""
    known = [{key for key in point if f"{key}_se" in point and point[key] is not None} for point in points]
    common = set.intersection(*known) - set(NOT_SCORES) if known else set()
    keys = [key for key in points[0] if key in common and "_over_" not in key] if points else []
    return sorted(keys, key=lambda key: ({"accuracy": 0, "judge": 1}.get(key, 2), keys.index(key)))


def table(rows: Sequence[PolicyRow]) -> JsonObject:
    """The headline table. `dot` is (reward, reward - 2 errors, reward + 2 errors) on a common scale of 0 to 100."""
    points = [row.point for row in rows]
    scores = scores_of_points(points)[:3]
    ranges = [error_bar(point) for point in points]
    low, high = min((r[1] for r in ranges), default=0.0), max((r[2] for r in ranges), default=1.0)
    rewards = column(points, "reward")
    others = [column(points, "kl"), *(column(points, name, scale_of(name)) for name in scores)]
    others.append([{**cell, "error": ""} for cell in column(points, "length")])
    lines = [
        {
            "title": row.label,
            "role": row.role,
            "best": CHOSEN in row.role and differ(points),
            "reward": rewards[i],
            "dot": [round(100 * (x - low) / ((high - low) or 1.0), 1) for x in ranges[i]],
            "cells": [cells[i] for cells in others],
        }
        for i, row in enumerate(rows)
    ]
    names = [f"KL to {start_of(points)}, nats", *(score_title(name) for name in scores), "Length, tokens"]
    return {"columns": names, "rows": lines}


def error_bar(point: JsonMapping) -> tuple[float, float, float]:
    """The reward and the ends of its interval; without interval, two standard errors below and above it."""
    reward, error = float(point["reward"]), BARS * float(point.get("reward_se") or 0.0)
    low, high = point.get("reward_low"), point.get("reward_high")
    return reward, reward - error if low is None else low, reward + error if high is None else high


def score_title(score: str) -> str:
    """Title of a score's column."""
    return f"{score.replace('_', ' ').capitalize()}{', %' if score == 'accuracy' else ''}"


def verdict(rows: Sequence[PolicyRow]) -> JsonObject | None:
    """The chosen model, or else the last merge, compared with the policy that RL started from and with single runs.

    `sentences` about its reward, and `lines`: for each of the two, the gain in every score, paired over the prompts.
    """
    chosen = [row for row in rows if CHOSEN in row.role] or [row for row in rows if is_row_of_merge(row.point)]
    start = [row for row in rows if row.point["kind"] == "sft"]
    if not chosen or not start or not differ([row.point for row in rows]):
        return None
    point, origin = chosen[-1].point, start[-1].label
    sentences = list(gain_sentences(point, origin))
    if not sentences:
        return None
    metrics = [key.removesuffix("_over_start") for key in point if key.endswith("_over_start")]
    rivals = {
        "over_start": f"over {origin}, where RL started",
        "over_single": f"over the best single run at no more KL: {point.get('single')}",
    }
    lines = [
        {"over": words, "cells": [gain_cell(point, f"{metric}_{key}", scale_of(metric)) for metric in metrics]}
        for key, words in rivals.items()
        if is_certain(point, f"reward_{key}") is not None
    ]
    return {
        "label": chosen[-1].label,
        "sentences": sentences,
        "metrics": [score_title(metric) for metric in metrics],
        "lines": lines,
        "note": GAINS_NOTE,
    }


def gain_cell(point: JsonMapping, key: str, scale: float) -> JsonObject:
    """A gain as text, and whether it is more than chance; None if unknown."""
    known = is_certain(point, key)
    return {"text": "–" if known is None else gain_of(point, key, scale), "certain": known}


def same_as_start(front: Front) -> str | None:
    """The sentence that takes the place of verdict, areas and best points if no policy differs from the start."""
    if differ(front.measured):
        return None
    return f"{SAME_AS_START.capitalize()}: the rewards below differ by chance. Train further, or at a higher rate."


# --- the front ------------------------------------------------------------------------------------------------------


def merges(front: Front) -> JsonObject | None:
    """Merged models against single runs: the sentence, and a row for each; None where nothing was compared."""
    sentence = merges_sentence(front.measured)
    if sentence is None:
        return None
    points = [p for p in front.measured if is_merged(p["kind"]) and is_certain(p, OVER) is not None]
    points = list({called(point): point for point in points}.values())
    decimals = column_decimals(points, OVER)
    rows = [
        {
            "label": called(point),
            "kl": fixed(point["kl"], 2),
            "single": str(point.get("single")),
            "gain": fixed(point[OVER], decimals),
            "interval": f"{fixed(point[f'{OVER}_low'], decimals)} to {fixed(point[f'{OVER}_high'], decimals)}",
            "certain": is_certain(point, OVER),
        }
        for point in points
    ]
    return {"sentence": sentence, "rows": rows, "note": GAINS_NOTE}


def best_within(front: Front) -> list[dict[str, str]]:
    """The best point within each KL limit, the number of points it was chosen from, and its reward elsewhere."""
    found = front.facts.get("best_at") if differ(front.measured) else None
    rows = [
        row
        for row in (found if isinstance(found, list) else ())
        if isinstance(row, Mapping) and all(is_number(row.get(key)) for key in ("limit", "reward", "kl"))
    ]
    names = {str(point["name"]): called(point) for point in front.measured}
    decimals = column_decimals(rows, "reward")
    return [
        {
            "limit": number(row["limit"]),
            "point": str(row.get("label") or names.get(str(row.get("name")), row.get("name"))),
            "chosen_from": number(row.get("chosen_from")),
            "reward": reward,
            "elsewhere": fixed(row["reward_elsewhere"], decimals) if is_number(row.get("reward_elsewhere")) else "–",
            "kl": kl,
        }
        for row, reward, kl in zip(rows, spreads(rows, "reward"), spreads(rows, "kl"), strict=True)
    ]


def areas(found: Collected) -> JsonObject | None:
    """The area under the front, its bounds, and the areas of the fronts of single iterations."""
    facts = found.front.facts
    if not is_number(facts.get("hypervolume")) or not differ(found.front.measured):
        return None
    own = [front for front in found.fronts if front.iteration and is_number(front.facts.get("hypervolume"))]
    own.sort(key=lambda front: front.iteration or 0)
    whole = [facts, *(front.facts for front in own)]
    decimals = {key: width_decimals(whole, key) for key in ("hypervolume", "hypervolume_gain")}
    rows = [
        {
            "iteration": front.iteration,
            "area": area_of(front.facts, "hypervolume", decimals),
            "interval": interval(front.facts, "hypervolume", decimals),
            "gain": area_of(front.facts, "hypervolume_gain", decimals),
            "gain_interval": interval(front.facts, "hypervolume_gain", decimals),
        }
        for front in own
    ]
    return {
        "area": area_of(facts, "hypervolume", decimals),
        "interval": interval(facts, "hypervolume", decimals),
        "bounds": bounds_of(facts, found.front.points),
        "rows": rows,
        "gains": any(row["gain"] != "–" for row in rows),
    }


def area_of(row: JsonMapping, key: str, decimals: Mapping[str, int]) -> str:
    """An area with the decimals of its column; a dash if it is unknown."""
    value = row.get(key)
    return fixed(value, decimals[key]) if is_number(value) else "–"


def interval(row: JsonMapping, key: str, decimals: Mapping[str, int]) -> str:
    """The interval of a value, such as `0.78 to 0.83`; "" if unknown."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if not (is_number(low) and is_number(high)):
        return ""
    return f"{fixed(low, decimals[key])} to {fixed(high, decimals[key])}"


def width_decimals(rows: Sequence[JsonMapping], key: str) -> int:
    """Decimals for a column of values with intervals: those for errors of a quarter of their width."""
    widths = [
        {f"{key}_se": (row[f"{key}_high"] - row[f"{key}_low"]) / 4}
        for row in rows
        if is_number(row.get(f"{key}_low")) and is_number(row.get(f"{key}_high"))
    ]
    return column_decimals(widths, key)


def point_table(found: Collected) -> list[dict[str, str]]:
    """Rows of the table of all measured points."""
    points = found.front.measured
    lengths, cut, distinct = (
        column(points, key, scale) for key, scale in (("length", 1), ("truncated", 100), ("distinct_2", 1))
    )
    rewards, kls = spreads(points, "reward"), spreads(points, "kl")
    return [
        {
            "label": called(point),
            "name": str(point["name"]),
            "kind": line_word({end_of(point)}) if point["kind"] == "line" else word_of(point["kind"]),
            "reward": rewards[i],
            "kl": kls[i],
            "length": lengths[i]["value"],
            "truncated": cut[i]["value"],
            "distinct": distinct[i]["value"],
            "front": "yes" if point.get("on_front") else "",
        }
        for i, point in enumerate(points)
    ]
