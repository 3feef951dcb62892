"""A limit on the time of one call of a user's function: a run that is left alone does not wait for ever.

    after the limit   a timer of the kernel (SIGALRM) raises an exception where the function is, in the main thread:
                      in Python code, a regular expression, a sleep, a lock, a socket, a wait for a process. No thread
                      is started for a call, so the function may use signals, asyncio and CUDA as it likes
    every AGAIN       once more, for a function that catches everything and tries again
    HARD later        the process ends with code 1 and prints where it was: native code that does not return cannot be
                      interrupted, nor can a function that sets SIGALRM for itself, nor one outside the main thread.
                      As safe as kill -9: the last checkpoint counts

Threads that the function started cannot be ended. If they are still busy when the command is over, the process ends
without them.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from gemma2.core.errors import GuardStop
from gemma2.core.interrupts import Interrupted, Signals

__all__ = ["limited"]

T = TypeVar("T")
AGAIN = 1.0  # seconds
HARD = 30.0  # seconds
LAST = 1.0  # seconds for each thread that is left when the command is over
SOON = 1e-3  # seconds
STDERR = 2


class _Expired(BaseException):
    """The limit has passed. No `except Exception` of the function can swallow it."""


@dataclass
class _Alarm:
    """The handler of SIGALRM during one call."""

    active: bool = True
    rang: bool = False
    place: str = ""  # in the function, when it rang first

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.active:
            self.place = self.place or _place(frame)
            self.rang = True
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            raise _Expired


def limited(call: Callable[[], T], seconds: float | None, named: str) -> T:
    """Return `call()`. Raises GuardStop if it takes longer than `seconds` (None: any time). named: in the error."""
    if seconds is None:
        return call()
    before = set(threading.enumerate())
    alarm = _Alarm()
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGALRM, alarm) if in_main else None
    begin, timer = time.monotonic(), (0.0, 0.0)  # somebody else's, which goes on after the call
    faulthandler.dump_traceback_later(seconds + HARD, exit=True, file=STDERR)
    try:
        if in_main:
            timer = signal.setitimer(signal.ITIMER_REAL, seconds)
        result = call()
        alarm.active = False
    except BaseException as error:  # the function may make another one of ours
        alarm.active = False
        if not alarm.rang or isinstance(error, Interrupted | KeyboardInterrupt):
            raise
    finally:
        alarm.active = False
        faulthandler.cancel_dump_traceback_later()
        if in_main and Signals.current is None:  # after an interrupt the timer is that of its end
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if timer[0]:
                signal.setitimer(signal.ITIMER_REAL, max(timer[0] - (time.monotonic() - begin), SOON), timer[1])
    if alarm.rang:
        _end_without([thread for thread in threading.enumerate() if thread not in before and not thread.daemon])
        raise GuardStop(
            f"{named} did not return within {seconds:g} s{alarm.place}", "make it faster, or raise --reward-timeout"
        )
    return result


def _place(frame: FrameType | None) -> str:
    """The line of the user's function that was waiting: the outermost below `limited` that is not of this room."""
    ours, place = os.path.dirname(__file__), ""
    for one, line in traceback.walk_stack(frame):
        if one.f_code is limited.__code__:
            break
        if os.path.dirname(one.f_code.co_filename) != ours:
            place = f" ({one.f_code.co_filename}:{line})"
    return place


def _end_without(threads: list[threading.Thread]) -> None:
    """Let the process end although threads of a function hang: Python would wait for them."""

    def end() -> None:
        threading.main_thread().join()
        for thread in threads:
            thread.join(LAST)
        if any(thread.is_alive() for thread in threads):
            os._exit(GuardStop.exit_code)

    if threads:
        threading.Thread(target=end, daemon=True).start()
