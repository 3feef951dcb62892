"""Rendering of chat templates of others: bounded in size, computing time and memory, every failure an InputError.

transformers renders in Jinja's sandbox, which keeps a template from attributes and files but not from loops in loops.
A timer of this process's computing time ends those, with a signal that nothing else here uses; a second one, of the
kernel alone, ends the process where the interpreter no longer answers. `template_sandbox.py` bounds the memory.
Outside of the main thread, which alone handles signals, only sizes and integers are bounded.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

from gemma2.core.errors import InputError
from gemma2.core.limits import TEMPLATE_BYTES, TEMPLATE_MEMORY, TEMPLATE_SECONDS, TEMPLATE_TEXT

from .template_sandbox import bounded_memory, use_bounded_environment

__all__ = ["TemplateOutOfBounds", "bounded_rendering", "check_rendered"]

LAST = 10  # times TEMPLATE_SECONDS, of all threads: a signal that is still not handled is one that never will be

# What the expressions of a template can raise besides Jinja's own errors.
FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


class TemplateOutOfBounds(InputError):
    """A template is too large, or takes too much time or memory: another conversation will not do better."""


class _Rung(Exception):
    pass


def _ring(number: int, frame: FrameType | None) -> None:
    raise _Rung


@contextmanager
def bounded_rendering(template: object) -> Iterator[None]:
    """Raise InputError if the template is too large, or if the block needs too much or fails in an expression."""
    if isinstance(template, str) and len(template) > TEMPLATE_BYTES:
        raise TemplateOutOfBounds(
            f"the chat template has more than {TEMPLATE_BYTES >> 10:,} KiB", "use a plain template"
        )
    use_bounded_environment()
    try:
        with _bounded() if threading.current_thread() is threading.main_thread() else nullcontext():
            yield
    except _Rung:
        what = f"the chat template computes for more than {TEMPLATE_SECONDS:g} s over one conversation"
        raise TemplateOutOfBounds(what, "use a template without loops in loops") from None
    except MemoryError:
        what = f"the chat template needs more than {TEMPLATE_MEMORY >> 20:,} MiB over one conversation"
        raise TemplateOutOfBounds(what, "use a template that does not multiply texts") from None
    except InputError:
        raise
    except FAILURES as error:
        what = f"the chat template fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(what, "correct the template, or give another with the tokenizer") from error


@contextmanager
def _bounded() -> Iterator[None]:
    """The bounds of time and memory, for the main thread."""
    before = signal.signal(signal.SIGVTALRM, _ring), signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, LAST * TEMPLATE_SECONDS)
    try:
        with bounded_memory():
            yield
    finally:
        for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        signal.signal(signal.SIGVTALRM, before[0])
        signal.signal(signal.SIGPROF, before[1])


def check_rendered(text: str) -> str:
    """Return a rendered conversation, without the text of its messages. Raises InputError where it is too long."""
    if len(text) > TEMPLATE_TEXT:
        what = f"the chat template writes more than {TEMPLATE_TEXT >> 20} million characters around one conversation"
        raise TemplateOutOfBounds(what, "use a plain template")
    return text
