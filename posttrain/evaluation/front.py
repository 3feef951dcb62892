"""Points in the plane of KL and reward: which nothing beats, the area that they dominate, the best within a KL. Pure.

A point is a mapping with at least `kl` (nats per sequence, less is better) and `reward` (more is better).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gemma2.core.json_files import JsonMapping, JsonObject

__all__ = ["best_at", "best_table", "hypervolume", "pareto_front", "round_limits"]

Point = JsonMapping

ROUND = (1.0, 2.0, 5.0)
LIMITS_SHOWN = 5


def pareto_front(points: Sequence[Point]) -> list[bool]:
    """Whether each point is on the front; of equal points all are.

    No other point may have at most its KL and at least its reward, one of them strictly.
    """
    return [not any(_beats(other, point) for other in points) for point in points]


def _beats(a: Point, b: Point) -> bool:
    no_worse = a["kl"] <= b["kl"] and a["reward"] >= b["reward"]
    result: bool = no_worse and (a["kl"] < b["kl"] or a["reward"] > b["reward"])
    return result


def hypervolume(points: Sequence[Point], reference: tuple[float, float]) -> float:
    """Area in the (KL, reward) plane that the points dominate, bounded by `reference` = (largest KL, least reward).

    Points with more KL or less reward than the reference add nothing. Unit: nats times reward.
    """
    limit, floor = reference
    front = sorted(
        (point["kl"], point["reward"]) for point in points if point["kl"] < limit and point["reward"] > floor
    )
    area, height = 0.0, floor
    for kl, reward in front:
        if reward > height:
            area += (limit - kl) * (reward - height)
            height = reward
    return area


def best_at(points: Sequence[Point], kl: float) -> Point | None:
    """The point with the highest reward among those with KL <= `kl` nats, of equal ones that with the least KL.

    None if no point is.
    """
    within = [point for point in points if point["kl"] <= kl]
    return max(within, key=lambda point: (point["reward"], -point["kl"]), default=None)


def round_limits(points: Sequence[Point]) -> tuple[float, ...]:
    """Limits worth a line each: 1, 2 and 5 times a power of ten in the range of the positive KLs.

    Only those within which another point is the best than within the one before; of these the largest five.
    """
    positive = sorted(point["kl"] for point in points if point["kl"] > 0)
    if not positive:
        return ()
    powers = range(math.floor(math.log10(positive[0])), math.ceil(math.log10(positive[-1])) + 1)
    limits = [float(f"{digit:g}e{power}") for power in powers for digit in ROUND]
    shown: list[float] = []
    best = None
    for limit in (limit for limit in limits if positive[0] <= limit <= positive[-1]):
        within = best_at(points, limit)
        if within is not best:
            shown.append(limit)
        best = within
    return tuple(shown[-LIMITS_SHOWN:])


def best_table(points: Sequence[Point], limits: Sequence[float]) -> list[JsonObject]:
    """For each limit that any point keeps: the limit, the number of points within it (`chosen_from`), and the name,
    labels and figures of the best of them."""
    figures = [f"{name}{part}" for name in ("reward", "kl") for part in ("", "_se", "_low", "_high")]
    shown = ("name", "label", "kind", "eta", "iteration", *figures)
    found = [(limit, best_at(points, limit)) for limit in limits]
    return [
        {
            "limit": limit,
            **{key: best.get(key) for key in shown},
            "chosen_from": sum(point["kl"] <= limit for point in points),
        }
        for limit, best in found
        if best is not None
    ]
