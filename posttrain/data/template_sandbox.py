"""What keeps one expression of a chat template from taking all memory, or from computing where no signal arrives.

Memory      the limit of the address space is lowered to what is in use and TEMPLATE_MEMORY more: `'x' * 10**10`,
            doubled texts and `center(10**10)` raise MemoryError, whatever filter or operator they come from (Linux)
Integers    a power of ten million digits is one call of C, inside of which Python handles no signal: operators and the
            filter `round` refuse integers of more than TEMPLATE_BITS
The rest    other calls of C that do not come back (sorting a million long texts) end with the process: SIGPROF, sent by
            the kernel after LAST times the seconds of a template

transformers makes the environment of a template itself, from the class that `chat_template_utils` names; it is
replaced there by a subclass, once (`tests/posttrain/data/test_template_bounds.py` sees that it is used).
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma2.core.limits import TEMPLATE_BITS, TEMPLATE_MEMORY

__all__ = ["BoundedEnvironment", "bounded_memory", "use_bounded_environment"]

DIGITS = 1000  # of `round`: beyond what a float has


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' templates, with operators that do not compute for minutes in one call."""

    intercepted_binops = frozenset(("*", "**", "//", "%", "/"))

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.filters["round"] = _bounded_round(self.filters["round"])

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Refuse integers that are too long. Raises OverflowError."""
        bits = [_bits(left), _bits(right)]
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            bits.append(bits[0] * abs(right))
        if max(bits) > TEMPLATE_BITS:
            raise OverflowError(f"an integer of more than {TEMPLATE_BITS} bits")
        return super().call_binop(context, operator, left, right)


def _bits(value: object) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _bounded_round(plain: Callable[..., object]) -> Callable[..., object]:
    def rounded(value: float, precision: int = 0, method: str = "common") -> object:
        if abs(precision) > DIGITS:
            raise OverflowError(f"round to {precision} digits")
        return plain(value, precision, method)

    return rounded


@cache
def use_bounded_environment() -> None:
    """Have transformers make the environments of chat templates from `BoundedEnvironment`."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let this process take TEMPLATE_MEMORY more than it has; what goes beyond raises MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = _address_space()
    bound = used + TEMPLATE_MEMORY
    if not used or (soft != resource.RLIM_INFINITY and soft <= bound):
        yield  # no way to know what is in use, or a bound of the user's that is lower
        return
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of addresses that this process has in use; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
