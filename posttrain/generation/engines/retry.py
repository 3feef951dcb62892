"""When to ask a server again: exponential back-off with jitter, and its own `Retry-After`, for all requests together.

    wait before attempt k (k = 1, 2, ...) = max(retry_after, min(60, 0.5 * 2^(k-1)) * u),   u uniform in [0.5, 1.5)

A server that limits the rate of one request limits all of them, so its `Retry-After` holds back every request that has
not been sent yet.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Mapping
from random import Random

__all__ = ["Backoff", "retry_after"]

FIRST, LONGEST = 0.5, 60.0  # seconds


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
    """The pause that a server asks for, in seconds: `Retry-After` as seconds or as a date, or `retry-after-ms`."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            parsed = email.utils.parsedate_tz(value)
        if parsed is not None:
            return max(0.0, email.utils.mktime_tz(parsed) - time.time())
    return None
