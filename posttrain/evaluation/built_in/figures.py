"""Means of rows with their errors, as results.json has them. Pure; torch-free.

The standard error of a mean is that of independent rows, s / sqrt(n), the interval Student's t at 95 %, cut to what the
metric can be. For shares of 0 and 1 that is lm-eval's error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.evaluation.intervals import confidence_interval

__all__ = ["mean_and_se", "row_figures"]

SHARE = (0.0, 1.0)
ANY = (-math.inf, math.inf)


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and its standard error, NaN for fewer than two."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan


def row_figures(
    columns: Mapping[str, Sequence[float | None]], bounds: Mapping[str, tuple[float, float]] | None = None
) -> JsonObject:
    """{"n", "metrics", "stderr", "low", "high"} of one value per row; None where a metric does not apply to a row.

    bounds  what a metric can be, where it is not a share
    """
    found: JsonObject = {"n": max(map(len, columns.values())), "metrics": {}, "stderr": {}, "low": {}, "high": {}}
    for name, column in columns.items():
        values = [value for value in column if value is not None]
        if not values:
            continue
        mean, se = mean_and_se(values)
        found["metrics"][name] = mean
        ends = confidence_interval(mean, se, len(values), (bounds or {}).get(name, SHARE))
        if ends is not None:
            found["stderr"][name] = se
            found["low"][name], found["high"][name] = ends
        if len(values) < found["n"]:
            found.setdefault("rows_of_metric", {})[name] = len(values)
    return found
