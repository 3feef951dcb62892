"""When to ask a server again: exponential back-off with jitter, and its own `Retry-After`, for all requests together.

    wait before attempt k (k = 1, 2, ...) = max(min(600, retry_after), min(60, 0.5 * 2^(k-1)) * u),   u in [0.5, 1.5)

A server that limits the rate of one request limits all of them, so its `Retry-After` holds back every request that has
not been sent yet.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from collections.abc import Mapping
from random import Random

__all__ = ["Backoff", "retry_after"]

FIRST, LONGEST = 0.5, 60.0  # seconds
LONGEST_PAUSE = 600.0  # seconds of a `Retry-After` that are waited for: a server may ask for a day, or for a century


class Backoff:
    """The pauses of one engine."""

    def __init__(self, draw: Random | None = None) -> None:
        self.draw = draw or Random()
        self.held_until = 0.0  # on the monotonic clock

    def hold(self, seconds: float) -> None:
        """No request may be sent before that many seconds from now."""
        self.held_until = max(self.held_until, time.monotonic() + seconds)

    async def turn(self) -> None:
        """Wait while requests are held back."""
        while (left := self.held_until - time.monotonic()) > 0:
            await asyncio.sleep(left + self.draw.uniform(0, 0.1 * min(left, 10)))

    def delay(self, failures: int) -> float:
        """Seconds to wait after that many failures of one request."""
        return min(LONGEST, FIRST * 2.0 ** (failures - 1)) * self.draw.uniform(0.5, 1.5)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The pause that a server asks for, in seconds, at most `LONGEST_PAUSE`.

    `Retry-After` as seconds or as a date, or `retry-after-ms`; what is neither counts as not given.
    """
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        seconds = _seconds(headers.get(name, ""), scale)
        if seconds is not None and not math.isnan(seconds):
            return min(LONGEST_PAUSE, max(0.0, seconds))
    return None


def _seconds(value: str, scale: float) -> float | None:
    try:
        return float(value) * scale
    except ValueError:
        parsed = email.utils.parsedate_tz(value)
    try:
        return None if parsed is None else email.utils.mktime_tz(parsed) - time.time()
    except (ValueError, OverflowError):  # a date that no calendar has
        return None
