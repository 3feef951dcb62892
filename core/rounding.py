"""When a change of a model is no more than rounding.

    |theta - theta_start| / |theta_start|  <  2^-14      over the tensors that changed

bf16, the dtype in which Gemma 2 is published and served, has steps of 2^-8 to 2^-7 of a value. A change of 2^-14 is
1/64 of the smallest step: about one weight in a hundred would be stored as another number. In fp32 such a change is
there, and nothing that a model answers shows it: the KL to the start is below 1e-4 nats per sequence.
"""

from __future__ import annotations

__all__ = ["STILL", "is_still"]

STILL = 2.0**-14


def is_still(relative: float | None) -> bool:
    """Whether a relative change of weights is rounding; None (nothing to compare with) is not."""
    return relative is not None and relative < STILL
