"""A signal that arrives where Python or a library swallows exceptions, or where nothing runs, still ends the process.

Every body sends the signal to itself at the exact place, then works on for longer than a test may take.
"""

import os
import signal
import subprocess
import sys

import pytest
from processes import MAIN, ROOT, finish, start

# `gemma2` with a body in place of its commands.
COMMAND = """
import contextlib, ctypes, functools, gc, os, signal, sys, time, weakref
from gemma2.cli import app

class Thing:
    pass

def strike(*arguments, **options):
    signal.raise_signal(signal.SIGTERM)

def work():
    time.sleep(600)

def block():
    # A mutex that is locked twice: no signal wakes the thread.
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

def invoke(arguments):
BODY
    return 0

app.invoke = invoke
"""

FINALISER = """
    class Dying:
        __del__ = strike
    Dying()
    work()
"""
WEAK_REFERENCE = """
    thing = Thing()
    reference = weakref.ref(thing, strike)
    del thing
    work()
"""
COLLECTOR = """
    gc.callbacks.append(strike)
    gc.collect()
    gc.callbacks.clear()
    work()
"""
C_CALLBACK = """
    pair = (ctypes.c_int * 2)(2, 1)
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    ctypes.CDLL(None).qsort(pair, 2, 4, kind(lambda left, right: strike() or 0))
    work()
"""
EXCEPT = """
    try:
        strike()
    except BaseException:
        pass
    work()
"""
SUPPRESS = """
    with contextlib.suppress(BaseException):
        strike()
    work()
"""
CONVERTED = """
    try:
        try:
            strike()
        except BaseException:
            raise ImportError("the C extensions failed")
    except ImportError:
        pass
    work()
"""
# The signal comes while C code runs, and is heard in a finaliser.
LATE = """
    class Dying:
        def __del__(self):
            ctypes.PyDLL(None).kill(os.getpid(), signal.SIGTERM)
    Dying()
    work()
"""
SWALLOWED = {
    "finaliser": FINALISER,
    "weak reference": WEAK_REFERENCE,
    "garbage collector": COLLECTOR,
    "callback of C code": C_CALLBACK,
    "except BaseException": EXCEPT,
    "suppress": SUPPRESS,
    "converted, then swallowed": CONVERTED,
    "C code in a finaliser": LATE,
}


def command(body, settings="", **options):
    """Start `gemma2`; `settings` are assignments to names of `gemma2.core.interrupts`."""
    body = "\n".join(f"    {line.removeprefix('    ')}" for line in body.strip("\n").splitlines())
    prelude = f"from gemma2.core import interrupts\n{settings}\n" if settings else ""
    return start(prelude + COMMAND.replace("BODY", body) + MAIN, **options)


@pytest.mark.parametrize("body", SWALLOWED.values(), ids=SWALLOWED)
def test_a_swallowed_interrupt_is_raised_again(body):
    assert finish(command(body)) == (143, "", "\ninterrupted\n")


def test_a_result_that_was_complete_before_the_interrupt_was_raised_again_counts():
    assert finish(command("    with contextlib.suppress(BaseException):\n        strike()")) == (0, "", "")


def test_cleaning_up_is_not_interrupted_again():
    """Longer than many ticks, in every kind of place where it happens."""
    body = """
    class Closing:
        def __enter__(self):
            return self
        def __exit__(self, *error):
            time.sleep(0.3)
            print("exit", flush=True)

    @contextlib.contextmanager
    def closing():
        try:
            yield
        except BaseException:
            time.sleep(0.3)
            print("generator", flush=True)
            raise

    class Dying:
        def __del__(self):
            time.sleep(0.3)

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: (time.sleep(0.3), print("stack", flush=True)))
        with Closing(), closing():
            try:
                [Dying(), strike()]
            finally:
                with contextlib.suppress(OSError):
                    raise OSError
                time.sleep(0.3)
                print("finally", flush=True)
    """
    code, out, err = finish(command(body, "interrupts.ECHO = 60"))
    assert (code, out.split(), err) == (143, ["finally", "generator", "exit", "stack"], "\ninterrupted\n")


def test_a_loop_that_swallows_everything_is_ended_by_the_signal():
    body = """
    strike_once = [strike]
    while True:
        try:
            strike_once.pop()() if strike_once else time.sleep(600)
        except BaseException:
            pass
    """
    code, _, err = finish(command(body, "interrupts.GRACE = 1"))
    assert code == -signal.SIGTERM
    assert "cut short" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("body", ["work()", "block()"], ids=["Python", "native code"])
def test_cleaning_up_that_does_not_end_is_ended_by_the_signal(body):
    code, _, err = finish(command(f"    try:\n        strike()\n    finally:\n        {body}", "interrupts.GRACE = 1"))
    assert code == -signal.SIGTERM
    assert "cut short" in err


def test_native_code_that_keeps_the_interpreter_to_itself_is_ended_by_the_kernel():
    hold = "ctypes.PyDLL(None).pause()"  # PyDLL: other threads of Python cannot run, the watching one neither
    body = f"    try:\n        strike()\n    finally:\n        while True:\n            {hold}"
    assert finish(command(body, "interrupts.GRACE = 1"))[0] == -signal.SIGALRM


def test_a_shut_down_that_does_not_end_is_ended_by_the_signal():
    body = "    import atexit\n    atexit.register(work)\n    strike()"
    code, _, err = finish(command(body, "interrupts.GRACE = 2"))
    assert (code, err) == (-signal.SIGTERM, "\ninterrupted\n")


def test_what_cleans_up_for_long_gets_the_time_that_it_asks_for():
    body = """
    try:
        strike()
    finally:
        interrupts.allow(600)
        time.sleep(3)
    """
    code, _, err = finish(command(body, "interrupts.GRACE = 1"))
    assert code == 143
    assert err.endswith("\ninterrupted\n")


def test_a_second_signal_of_the_user_ends_the_process_at_once():
    process = command("    try:\n        strike()\n    finally:\n        block()", "interrupts.GRACE = 600")
    while "a second signal ends it at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == -signal.SIGINT


def test_two_signals_in_a_row_count_as_one():
    """As `timeout`, torchrun and a terminal that closes send them."""
    body = """
    try:
        print("ready", flush=True)
        sys.stdin.readline()
    finally:
        print("cleaning", flush=True)
        sys.stdin.readline()
    """
    process = command(body, "interrupts.ECHO = 60\ninterrupts.GRACE = 600", stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cleaning\n"
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    assert finish(process) == (143, "", "\ninterrupted\n")


def test_a_signal_just_before_a_blocking_call_ends_the_call():
    """Python handles signals between bytecodes: nothing else would end the sleep."""
    body = """
    signalled = ctypes.CDLL(None)["raise"]
    class Seconds:
        __index__ = functools.partial(sum, map(signalled, [int(signal.SIGTERM)]), 600)  # no bytecode runs
    print("ready", flush=True)
    time.sleep(Seconds())
    """
    assert finish(command(body)) == (143, "ready\n", "\ninterrupted\n")


STRUCK_INSIDE = """
    import threading
    print("ready", flush=True)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    block()
"""


def test_a_signal_within_native_code_that_does_not_come_back_ends_the_process():
    code, _, err = finish(command(STRUCK_INSIDE, "interrupts.GRACE = interrupts.LAST = 1"))
    assert code == -signal.SIGTERM
    assert "a second signal ends it at once" in err
    assert "cut short" in err


def test_a_second_signal_ends_native_code_that_the_first_one_found_at_work():
    process = command(STRUCK_INSIDE, "interrupts.GRACE = 600")
    while "a second signal ends it at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == -signal.SIGINT


def test_native_code_that_comes_back_in_time_is_cleaned_up_after():
    body = """
    import threading
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    try:
        ctypes.CDLL(None).usleep(900_000)  # that a signal cuts short
        ctypes.CDLL(None).usleep(900_000)
        work()
    finally:
        print("finally", flush=True)
    """
    assert finish(command(body, "interrupts.GRACE = 600")) == (143, "finally\n", "\ninterrupted\n")


FORKED = """
    reader, writer = os.pipe()
    if child := os.fork():
        os.read(reader, 1)
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
    else:
        with contextlib.suppress(BaseException):
            os.write(writer, b".")
            work()
        os._exit(0)
"""
REPLACED = """
    signal.signal(signal.SIGTERM, lambda *_: None)
    strike()
"""


@pytest.mark.parametrize("body", [FORKED, REPLACED], ids=["of a forked child", "with the handler of a library"])
def test_a_signal_that_is_for_others_ends_nothing(body):
    times = "interrupts.GRACE = interrupts.LAST = interrupts.ECHO = 0.2"
    assert finish(command(f"{body}\n    time.sleep(1)\n    print('done')", times)) == (0, "done\n", "")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="Linux")
def test_before_the_first_signal_there_is_one_thread_that_sleeps_and_no_timer():
    body = """
    print(len(os.listdir("/proc/self/task")), *signal.getitimer(signal.ITIMER_REAL))
    """
    assert finish(command(body)) == (0, "2 0.0 0.0\n", "")


@pytest.mark.torture
def test_signals_at_random_moments_of_merges_and_training_keep_every_promise():
    script = [sys.executable, str(ROOT / "bench" / "signals.py"), "--count", "20"]
    ended = subprocess.run(script, capture_output=True, text=True, check=False)
    sys.stdout.write(f"\n{ended.stdout}")
    assert ended.returncode == 0, ended.stderr
