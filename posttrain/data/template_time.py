"""Rendering of chat templates of others: bounded in size and computing time, every failure an InputError.

transformers renders in Jinja's sandbox, which keeps a template from attributes and files but not from loops in loops.
A timer of this process's computing time ends those, with a signal that nothing else here uses.
Outside of the main thread, which alone handles signals, only the size is checked.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gemma2.core.errors import InputError
from gemma2.core.limits import TEMPLATE_BYTES, TEMPLATE_SECONDS

__all__ = ["TemplateOutOfBounds", "bounded_rendering"]

# What the expressions of a template can raise besides Jinja's own errors.
FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


class TemplateOutOfBounds(InputError):
    """A template is too large, or computes too long: another conversation will not do better."""


class _Rung(Exception):
    pass


def _ring(number: int, frame: FrameType | None) -> None:
    raise _Rung


@contextmanager
def bounded_rendering(template: object) -> Iterator[None]:
    """Raise InputError if the template is too large, or if the block computes too long or fails in an expression."""
    if isinstance(template, str) and len(template) > TEMPLATE_BYTES:
        raise TemplateOutOfBounds(
            f"the chat template has more than {TEMPLATE_BYTES >> 10:,} KiB", "use a plain template"
        )
    timed = threading.current_thread() is threading.main_thread()
    if timed:
        before = signal.signal(signal.SIGVTALRM, _ring)
        signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
    try:
        yield
    except _Rung:
        what = f"the chat template computes for more than {TEMPLATE_SECONDS:g} s over one conversation"
        raise TemplateOutOfBounds(what, "use a template without loops in loops") from None
    except InputError:
        raise
    except FAILURES as error:
        what = f"the chat template fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(what, "correct the template, or give another with the tokenizer") from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
