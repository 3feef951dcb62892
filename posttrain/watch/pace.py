"""The pace of a run, and the time left: steps asked less steps done, over the rate of the recent steps. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from gemma2.core.json_files import JsonMapping

__all__ = ["Pace", "pace_of", "seconds_between", "seconds_since"]


@dataclass(frozen=True)
class Pace:
    """How far a training is. None where the run does not say it.

    rate  steps per second, over the recent steps
    eta   seconds left
    """

    step: int | None = None
    steps: int | None = None
    rate: float | None = None
    eta: float | None = None


def pace_of(live: JsonMapping, now: float) -> Pace:
    """Return the pace from the record that a run writes (`runs/live.py`). now: seconds since 1970."""
    step, steps = _count(live.get("step")), _count(live.get("steps"))
    if step is None or steps is None:
        return Pace()
    times = live.get("times")
    points = [
        (float(one[0]), int(one[1]))
        for one in (times if isinstance(times, list) else ())
        if isinstance(one, list) and len(one) == 2 and all(isinstance(part, int | float) for part in one)
        and all(map(math.isfinite, one))
    ]  # fmt: skip
    if len(points) < 2 or points[-1][0] <= points[0][0] or points[-1][1] <= points[0][1]:
        return Pace(step, steps, eta=0.0 if step >= steps else None)
    rate = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
    # What has passed since the last step was taken off it; another machine's clock may be ahead.
    left = (steps - points[-1][1]) / rate - max(0.0, now - points[-1][0])
    return Pace(step, steps, rate, max(0.0, left))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def seconds_since(started: object, now: float) -> float | None:
    """Return the seconds from a time in ISO 8601 to `now`; None if it cannot be read."""
    try:
        return max(0.0, now - datetime.fromisoformat(str(started)).timestamp())
    except (ValueError, OverflowError):
        return None


def seconds_between(started: object, ended: object) -> float | None:
    """Return the seconds between two times in ISO 8601; None if one cannot be read."""
    try:
        end = datetime.fromisoformat(str(ended)).timestamp()
    except (ValueError, OverflowError):
        return None
    return seconds_since(started, end)
