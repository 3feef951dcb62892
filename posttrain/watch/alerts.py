"""Alerts: comparisons such as `kl > 20` with the figures of metrics.jsonl. Pure.

A figure that is null (undefined, or not finite) makes no alert hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gemma2.core.errors import UsageError
from gemma2.core.sizes import apart
from gemma2.core.yaml_files import closest, parse_value
from gemma2.posttrain.pipelines.references import COMPARE, parse_condition

__all__ = ["Alert", "check_metrics", "holding", "parse_alert"]

EXAMPLE = 'write for instance --alert "kl > 20"'


@dataclass(frozen=True)
class Alert:
    """One comparison."""

    metric: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.limit:g}"

    def said(self, value: float) -> str:
        """The alert with the value that made it hold: `kl 21.3 > 20`."""
        shown, limit = apart(value, self.limit)
        return f"{self.metric} {shown} {self.sign} {limit}"


def parse_alert(text: str) -> Alert:
    """Return the alert of a text. Raises UsageError if it is not a comparison of a metric with a number."""
    try:
        metric, sign, right = parse_condition(text)
    except UsageError as error:
        raise UsageError(f"--alert {text!r} is not a comparison", EXAMPLE) from error
    limit = parse_value(right)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
        raise UsageError(f"--alert {text!r} compares with {right!r}, not with a number", EXAMPLE)
    if isinstance(parse_value(metric), int | float):
        raise UsageError(f"--alert {text!r} does not name a metric on its left", EXAMPLE)
    return Alert(metric, sign, float(limit))


def holding(alerts: Sequence[Alert], figures: Mapping[str, float]) -> tuple[Alert, float] | None:
    """Return the first alert that holds, with its value; None if none does."""
    for alert in alerts:
        value = figures.get(alert.metric)
        if value is not None and COMPARE[alert.sign](value, alert.limit):
            return alert, value
    return None


def check_metrics(alerts: Sequence[Alert], seen: Collection[str], where: str) -> None:
    """Raise UsageError for an alert about a metric that is not among those that `where` logs."""
    for alert in alerts:
        if alert.metric not in seen:
            raise UsageError(
                f"--alert: {where} logs no metric {alert.metric!r}",
                closest(alert.metric, seen) if seen else "nothing is logged there",
            )
