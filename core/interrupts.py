"""SIGINT, SIGTERM and SIGHUP as an exception that cannot be lost.

The handler raises `Interrupted` in the main thread. Python prints and drops an exception raised in a finaliser, in a
callback of a weak reference or of the garbage collector, or in a callback of C code; libraries catch the rest. So a
thread, started by the first signal, watches the main thread:

    every TICK   raise again when the main thread is not handling an Interrupted: the last one was swallowed
    after ECHO   default action for further signals: a second one ends the process at once, also inside native code
    after GRACE  (more where `allow` asks for it) the process ends itself with the signal
    LAST later   SIGALRM from the kernel, for native code that never gives the interpreter back

Ending at once is safe: outputs and checkpoints count only when complete, as after kill -9.

Python handles a signal between two bytecodes, so one that comes just before a blocking call, or within native code,
waits until that returns. A second thread, which sleeps in a read of the wake-up pipe, sees the signal at once and sends
POKE until the handler has run: any further signal ends the wait of most calls. Where it does not, as in a collective
whose other processes are gone, this thread keeps the times above. A forked child would write into the same pipe; it
gives the pipe up.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from .ranks import is_launched

__all__ = ["POKE", "Interrupted", "Signals", "allow"]

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POKE = signal.SIGURG  # wakes the main thread; ignored by default, so that a late one harms nothing
TICK = 0.1  # seconds
# `timeout`, torchrun and a terminal that closes send two signals in a row, which is not a user who lost patience.
ECHO = 1.0  # seconds
GRACE = 8.0  # seconds; `docker stop` sends SIGKILL after 10
LAST = 2.0  # seconds


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP. No `except Exception` in a library can swallow it."""


class Signals:
    """Turns signals into `Interrupted` between `install` and `end`, and makes certain that the process ends."""

    current: Signals | None = None  # the one that caught a signal
    least = 0.0  # seconds to clean up, of a process that waits for others

    def __init__(self, numbers: tuple[signal.Signals, ...] = NUMBERS) -> None:
        self.numbers = numbers
        self.caught: int | None = None
        self.ended = False  # nothing is raised any more
        self.released = False
        self.said = False  # that a second signal ends it
        self.deadline = 0.0  # time.monotonic()
        self.main = 0
        self.previous: dict[int, Any] = {}
        self.unraisable: Any = None
        self.alarm: tuple[Any, float, float] = (signal.SIG_DFL, 0, 0)
        self.wakeup: tuple[int, int] | None = None  # our end of the pipe, and the descriptor that was set before

    def install(self) -> None:
        for number in self.numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs stay as they are
                self.previous[number] = signal.signal(number, self._first)
        self.previous[POKE] = signal.signal(POKE, self._again)
        self.main = _thread.get_ident()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self.wakeup = writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget_pipe)
        with suppress(RuntimeError):  # no more threads for this user: a late signal is handled late
            _thread.start_new_thread(self._hear, (reader,))

    def end(self) -> None:
        """The work is over, or its interrupt was caught: further signals have their default action.

        The deadline of an interrupted process remains, for an interpreter that hangs while it shuts down.
        """
        self.ended = True
        for number in self.previous:
            signal.signal(number, signal.SIG_DFL)

    def release(self) -> None:
        """Everything as it was before `install`: the process goes on."""
        self.ended = self.released = True
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if Signals.current is self:
            Signals.current = None
            signal.setitimer(signal.ITIMER_REAL, *self.alarm[1:])
            signal.signal(signal.SIGALRM, self.alarm[0])
            sys.unraisablehook = self.unraisable
        self.previous.clear()
        if self.wakeup is not None:
            signal.set_wakeup_fd(self.wakeup[1])
            os.close(self.wakeup[0])  # the thread that reads it ends
            self.wakeup = None

    def extend(self, seconds: float) -> None:
        """Move the deadline to at least `seconds` from here."""
        self.deadline = max(self.deadline, time.monotonic() + seconds)
        signal.setitimer(signal.ITIMER_REAL, self.deadline - time.monotonic() + LAST)

    def _first(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None or self.ended:
            return
        self.caught = number
        Signals.current = self
        self.unraisable, sys.unraisablehook = sys.unraisablehook, self._dropped
        self.alarm = (signal.signal(signal.SIGALRM, signal.SIG_DFL), *signal.getitimer(signal.ITIMER_REAL))
        self.extend(max(GRACE, self.least))
        # Not threading.Thread: what was interrupted may hold the locks of that module.
        with suppress(RuntimeError):  # no more threads for this user: SIGALRM is left
            _thread.start_new_thread(self._watch, ())
        raise Interrupted(number)

    def _again(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None and not self.ended and not _holds(sys.exc_info()[1]):
            raise Interrupted(self.caught)

    def _dropped(self, unraisable: Any) -> None:  # noqa: ANN401
        """Python's report of an exception that it drops; of ours there is nothing to say, since it comes again."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self.unraisable(unraisable)

    def _forget_pipe(self) -> None:
        """In a forked child, whose signals are not for this process."""
        if self.wakeup is not None:
            with suppress(ValueError):  # forked by another thread than the main one
                signal.set_wakeup_fd(-1)

    def _hear(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in set(numbers) & set(self.numbers):
                self._wake(number)
        os.close(reader)

    def _wake(self, number: int) -> None:
        """Make the main thread handle a signal; end the process where it does not, as `_watch` would."""
        begin, armed = time.monotonic(), False
        # A library may have put its handler in the place of ours: then the signal is its.
        while self.caught is None and not self.ended and signal.getsignal(number) == self._first:
            time.sleep(TICK)
            passed = time.monotonic() - begin
            if passed >= max(GRACE, self.least) + LAST:
                _say("the code that was interrupted does not come back and is cut short")
                self._cut(number)
            if not armed and passed >= ECHO:
                armed = True
                self._arm()
                self._say_once()
            if self.caught is None and not self.ended:
                signal.pthread_kill(self.main, POKE)

    def _watch(self) -> None:
        begin = time.monotonic()
        armed = False
        while time.monotonic() < self.deadline:
            time.sleep(TICK)
            if self.released:
                return
            if not self.ended and not _holds(_handled_by(self.main)):
                signal.pthread_kill(self.main, POKE)
            if not armed and time.monotonic() - begin >= ECHO:
                armed = True
                self._arm()
                if not self.ended:
                    self._say_once()
        if not self.ended:
            _say("cleaning up did not come to an end and is cut short")
        if not self.released:
            self._cut(self.caught or signal.SIGTERM)

    def _say_once(self) -> None:
        if not self.said:
            self.said = True
            _say("interrupted; cleaning up (a second signal ends it at once)")

    def _cut(self, number: int) -> None:
        """End the process at once, by the signal."""
        time.sleep(TICK)  # for what is being said
        self._arm()
        os.kill(os.getpid(), number)
        time.sleep(TICK)
        os._exit(128 + number)  # the first process of a container: the kernel takes no default action there

    def _arm(self) -> None:
        """Default actions, by the C library: Python's `signal` works in the main thread only, which may be stuck."""
        import ctypes

        default = ctypes.CDLL(None).signal
        default.argtypes, default.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        for number in self.previous.keys() - {POKE}:
            default(number, None)


def allow(seconds: float) -> None:
    """Called by what cleans up for long: after a signal it has at least `seconds` from here. Else does nothing."""
    if Signals.current is not None:
        Signals.current.extend(seconds)


def _handled_by(thread: int) -> BaseException | None:
    """The exception that a thread is handling: in an `except` or `finally`, or in the end of a `with`."""
    found: Any = sys._current_exceptions().get(thread)
    result: BaseException | None = found[1] if isinstance(found, tuple) else found  # a tuple until Python 3.11
    return result


def _holds(error: BaseException | None) -> bool:
    """Whether an exception is an Interrupted, or came up while one was handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return True
        seen.add(id(error))
        error = error.__context__
    return False


def _say(text: str) -> None:
    """A line on stderr, from a separate thread: a reader that takes nothing must not hold up the watch."""
    if is_launched():  # the command that has started this process says it for all
        return
    with suppress(RuntimeError):
        _thread.start_new_thread(_write, (f"\n{text}\n".encode(),))


def _write(line: bytes) -> None:
    with suppress(OSError):  # the terminal is gone
        os.write(2, line)
