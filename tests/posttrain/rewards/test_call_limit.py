"""A function that does not return: it is interrupted wherever Python can be, and the process ends where it cannot."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from waiting import hang

from gemma2.core.errors import GuardStop, InputError
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.rewards import call_limit
from gemma2.posttrain.rewards.call_limit import limited
from gemma2.posttrain.rewards.functions import Sampled, function_score

SHORT = 0.1  # seconds
HERE = Path(__file__).name


def spin(**given):
    while True:
        pass


def sleep(**given):
    hang()


def match(**given):
    re.match(r"(a+)+$", "a" * 64 + "b")


def wait_for_a_lock(**given):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_a_process(**given):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            child.wait()
        finally:
            child.kill()


def wait_for_a_server(**given):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.recv(1)


def wait_in_a_loop_of_events(**given):
    asyncio.run(asyncio.sleep(1000))


def yield_for_ever(**given):
    while True:
        yield 1.0


def try_again(**given):
    for _ in range(3):
        try:
            hang()
        except:  # noqa: E722  as users write it
            continue
    return [0.0]


def make_another_error(**given):
    try:
        hang()
    except BaseException as error:
        raise ValueError("a server did not answer") from error


HANGS = [spin, sleep, match, wait_for_a_lock, wait_for_a_process, wait_for_a_server, wait_in_a_loop_of_events]
HANGS += [yield_for_ever, try_again, make_another_error]


@pytest.fixture
def sampled():
    return Sampled([Prompt("f:1", [{"role": "user", "content": "Hi"}], {})], [[2]], [[3]], ["ab"], [False])


@pytest.mark.parametrize("function", HANGS, ids=lambda function: function.__name__)
def test_a_call_that_hangs_is_one_line_with_its_place_and_leaves_nothing_behind(function, sampled, monkeypatch):
    monkeypatch.setattr(call_limit, "AGAIN", SHORT)
    before = signal.getsignal(signal.SIGALRM), threading.enumerate()
    score = function_score(f"{__name__}:{function.__name__}", "--reward-fn", "reward", seconds=SHORT)
    with pytest.raises(GuardStop) as caught:
        score(sampled)
    line = function.__code__.co_firstlineno
    found = re.fullmatch(
        rf"--reward-fn '{__name__}:{function.__name__}' did not return within 0\.1 s \(.*{HERE}:(\d+)\); "
        "make it faster, or raise --reward-timeout",
        str(caught.value),
    )
    assert found is not None, str(caught.value)
    assert line < int(found[1]) < line + 8
    assert caught.value.exit_code == 3
    assert (signal.getsignal(signal.SIGALRM), threading.enumerate()) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 100, "the timer of pytest goes on"


@pytest.mark.parametrize("seconds", [None, 1000.0])
def test_a_call_in_time_gives_its_value_and_an_error_of_the_function_stays_one(sampled, seconds):
    assert limited(lambda: 7, seconds, "f") == 7
    with pytest.raises(KeyError):
        limited(lambda: {}["x"], seconds, "f")
    with pytest.raises(InputError, match="failed with"):
        function_score(f"{__name__}:missing_argument", "--reward-fn", "reward", seconds=seconds)(sampled)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 100


def missing_argument(answer):
    return [answer]


def test_a_function_may_use_the_timer_and_threads(sampled):
    rang = []

    def call():
        before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        signal.pause()
        signal.signal(signal.SIGALRM, before)
        with ThreadPoolExecutor(2) as pool:
            return sum(pool.map(int, "123"))

    assert limited(call, 1000.0, "f") == 6
    assert rang == [1]


def test_outside_the_main_thread_a_call_has_its_value():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(limited, lambda: 7, 1000.0, "f").result() == 7


# --- what cannot be interrupted ---------------------------------------------------------------------------------------

RUN = """
import collections, itertools, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from gemma2.core.errors import GuardStop
from gemma2.posttrain.rewards import call_limit
call_limit.AGAIN = call_limit.LAST = 0.1
call_limit.HARD = float(sys.argv[2])
def native():
    collections.deque(itertools.repeat(1), maxlen=0)
def own_alarm():
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(1000)
def elsewhere():
    time.sleep(1000)
def thread():
    worker = threading.Thread(target=time.sleep, args=(1000,))
    worker.start()
    worker.join()
def pool():
    with ThreadPoolExecutor(1) as workers:
        workers.submit(time.sleep, 1000).result()
def interrupted():
    from gemma2.core.interrupts import Interrupted, Signals
    Signals().install()
    try:
        call_limit.limited(lambda: signal.raise_signal(signal.SIGTERM) or time.sleep(1000), 1000.0, "f")
    except Interrupted:
        left = signal.getitimer(signal.ITIMER_REAL)[0]
        print("interrupted,", "in time" if 0 < left < 100 else "for ever", file=sys.stderr)
        sys.exit(7)
if sys.argv[1] == "interrupted":
    interrupted()
try:
    if sys.argv[1] == "elsewhere":
        threading.Thread(target=lambda: call_limit.limited(elsewhere, 0.1, "f")).start()
    else:
        call_limit.limited(globals()[sys.argv[1]], 0.1, "f")
except GuardStop as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("native", 1, "line 9 in native"),
        ("own_alarm", 1, "line 13 in own_alarm"),
        ("elsewhere", 1, "line 15 in elsewhere"),
        ("interrupted", 7, "interrupted, in time"),
        ("thread", 3, "f did not return within 0.1 s (<string>:19); "),
        ("pool", 3, "f did not return within 0.1 s (<string>:22); "),
    ],
)
def test_the_process_ends_whatever_its_function_does(name, code, said):
    hard = "0.1" if code == 1 else "50"
    done = subprocess.run([sys.executable, "-c", RUN, name, hard], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
