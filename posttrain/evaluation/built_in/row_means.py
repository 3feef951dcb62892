"""Means of rows with their errors, as results.json has them. Pure; torch-free.

The standard error of a mean is that of independent rows, s / sqrt(n), which for shares of 0 and 1 is lm-eval's. The
interval at 95 % is Student's t, cut to what the metric can be; of right and wrong rows it is Wilson's (1927),
which is not of zero width where all rows are right, or all are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.evaluation.intervals import LEVEL, confidence_interval

__all__ = ["mean_and_se", "row_figures", "wilson"]

SHARE = (0.0, 1.0)


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and its standard error, NaN for fewer than two."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n rows by Wilson's score."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (max(0.0, centre - reach) if share else 0.0), (min(1.0, centre + reach) if share < 1 else 1.0)


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
        is_share = name not in (bounds or {}) and {*values} <= {0.0, 1.0}
        limits = (bounds or {}).get(name, SHARE)
        ends = wilson(mean, len(values)) if is_share else confidence_interval(mean, se, len(values), limits)
        if math.isfinite(se):
            found["stderr"][name] = se
        if ends is not None:
            found["low"][name], found["high"][name] = ends
        if len(values) < found["n"]:
            found.setdefault("rows_of_metric", {})[name] = len(values)
    return found
