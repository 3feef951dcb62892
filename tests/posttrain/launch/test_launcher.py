"""The processes of a command end as one: one line, of the process that was the cause, and its exit code."""

import atexit
import ctypes
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest

from gemma2.core import ranks
from gemma2.core.errors import EndedElsewhere, GuardStop, InputError, OutOfMemory, PeerLost, SystemRefusal, UsageError
from gemma2.core.ranks import FOLDER, LastWord, ProcessBug, make_room
from gemma2.posttrain.launch import launcher
from gemma2.posttrain.launch.launcher import Ended, ProcessEnd, Processes, cause, run_processes
from gemma2.posttrain.launch.nodes import Meeting

# A process of a command whose work is a word for each rank; the entry point around it is the real one.
WORKER = """
import ctypes, errno, os, signal, sys, time
from gemma2.core import interrupts, ranks
from gemma2.core.errors import GuardStop, InputError, OutOfMemory, UsageError
from gemma2.cli import app, main

interrupts.GRACE = interrupts.LAST = 1.0

def _raise(error):
    raise error

def invoke(words):
    work = words[int(os.environ["RANK"])]
    if work == "sleep":
        time.sleep(600)
    if work == "guard":
        raise GuardStop("the KL is 300", "lower the rate")
    if work == "usage":
        raise UsageError("--n 0 is too small", "give 1")
    if work == "absent":
        raise InputError("d is no file", "give one", "d:1")
    if work == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "out")
    if work == "cut off":
        said = main.leave_word
        main.leave_word = lambda word: (said(word), os.kill(os.getpid(), signal.SIGTERM), time.sleep(600))
        raise InputError("d is no file", "give one", "d:1")
    if work == "met":  # an error of rank 0 that the others hear of before it has cleaned up
        try:
            ranks.join("sft").on_main(lambda: _raise(InputError("d is no file", "give one", "d:1")))
        finally:
            time.sleep(2 if os.environ["RANK"] == "0" else 0)
    if work == "apart":  # rank 0 waits, in native code, for one that fails
        met = ranks.join("sft")
        met.barrier()
        if not met.is_main:
            raise OutOfMemory("step 2: memory is exhausted", "give --micro-batch-size 1")
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    if work == "no exception":
        from torch.distributed.checkpoint.api import CheckpointException
        raise CheckpointException("write", {})
    if work == "bug":
        raise KeyError("forgotten")
    if work == "lost":
        time.sleep(0.6)  # it notices that the other one is gone
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]")
    if work == "late":
        time.sleep(0.5)
        sys.stdout.write("late\\n")
    if work == "silent":
        os.write(2, b"a library gave up\\n")
        os._exit(7)
    if work.startswith("SIG"):
        time.sleep(0.2)
        os.kill(os.getpid(), getattr(signal, work))
    return 0

app.invoke = invoke
main.main()
"""


@pytest.fixture
def run(monkeypatch):
    """Run two processes with the work of each."""
    monkeypatch.setattr(launcher, "WORKER", ("-c", WORKER))
    monkeypatch.setattr(launcher, "check_torch", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RANK", raising=False)
    with warnings.catch_warnings():  # torch's launcher leaves files of processes that ended to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        yield lambda *works: run_processes(Processes(works, ("0", "1")))
        gc.collect()


def test_a_process_whose_command_is_gone_ends(monkeypatch):
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    monkeypatch.setattr("sys.platform", "linux")
    ranks.follow_launcher()  # not one of several: nothing happens
    monkeypatch.setenv(FOLDER, "folder")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *asked: signals.append(asked)))
    for parent in (os.getppid(), -1):
        monkeypatch.setenv(ranks.LAUNCHER, str(parent))
        ranks.follow_launcher()
    asked = (ranks.PR_SET_PDEATHSIG, signal.SIGTERM)
    assert signals == [asked, asked, (os.getpid(), signal.SIGTERM)]


def test_processes_that_do_their_work_end_with_0(run, capfd):
    assert run("late", "late") == 0
    assert capfd.readouterr().err == ""
    assert FOLDER not in os.environ


@pytest.mark.parametrize(
    "works", [("usage", "sleep"), ("usage", "usage"), ("usage", "lost"), ("sleep", "usage"), ("lost", "usage")]
)
def test_an_error_of_the_command_line_is_one_line_whichever_rank_was_the_first_to_see_it(run, capfd, works):
    with pytest.raises(UsageError) as caught:
        run(*works)
    assert str(caught.value) == "--n 0 is too small; give 1"
    assert capfd.readouterr().err == ""  # of the processes; the entry point of this one says it


@pytest.mark.parametrize(("works", "who"), [(("absent", "sleep"), ""), (("sleep", "absent"), "rank 1: ")])
def test_an_error_keeps_its_place_and_the_rank_of_a_process_that_may_have_been_the_only_one(run, works, who):
    with pytest.raises(InputError, match=f"^{who}d is no file; give one$") as caught:
        run(*works)
    assert (caught.value.where, caught.value.exit_code) == ("d:1", InputError.exit_code)


def test_what_the_system_has_refused_to_a_process_stays_a_refusal(run):
    with pytest.raises(SystemRefusal, match=r"^No space left on device: out; free some space") as caught:
        run("full", "sleep")
    assert caught.value.where == "out"


def test_an_error_of_all_is_that_of_rank_0_also_where_it_cleans_up_for_long(run, capfd):
    with pytest.raises(InputError, match=r"^d is no file; give one$") as caught:
        run("met", "met")
    assert caught.value.where == "d:1"
    assert capfd.readouterr().err == ""


def test_a_process_that_hangs_in_native_code_does_not_hide_why_another_one_failed(run, capfd):
    with pytest.raises(OutOfMemory, match=r"^rank 1: step 2: memory is exhausted; give --micro-batch-size 1$"):
        run("apart", "apart")
    assert capfd.readouterr().err == ""


def test_an_error_that_is_no_exception_is_a_bug_with_its_traceback(run):
    with pytest.raises(ProcessBug, match="CheckpointException"):
        run("no exception", "sleep")


KILL, TERM, SEGV = -signal.SIGKILL, -signal.SIGTERM, -signal.SIGSEGV
OF_1 = {1: LastWord("error", 1, "InputError", "a row", "fix it")}


@pytest.mark.parametrize(
    ("codes", "words", "said"),
    [
        # The launcher ends with SIGKILL what did not end by SIGTERM.
        ((KILL, 1, KILL), OF_1, "rank 1: a row; fix it"),
        ((KILL, TERM, TERM), {}, r"rank 0 \(process 10\) was ended by SIGKILL, which a system without free memory"),
        ((KILL, TERM, KILL), {}, r"rank 0 \(process 10\) or rank 2 \(process 12\) was ended by SIGKILL, which"),
        ((KILL, SEGV, KILL), {}, r"rank 1 \(process 11\) was ended by SIGSEGV; it wrote: words"),
        (
            (1, KILL, 1),
            {0: LastWord("lost", 1, "PeerLost", "gone"), 2: LastWord("lost", 1, "PeerLost", "gone")},
            "rank 1",
        ),
        ((TERM, 3), {1: LastWord("followed", 3)}, "^rank 0 has ended the job with exit code 3"),
    ],
)
def test_what_was_said_comes_before_what_was_seen(codes, words, said):
    ended = {rank: launcher.Ended(rank, 10 + rank, code, "words") for rank, code in enumerate(codes)}
    assert re.search(said, str(launcher.cause(ended, words)))


def test_a_word_needs_no_room_on_a_disk_that_has_filled_up(tmp_path, monkeypatch):
    make_room(tmp_path, [3])
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    held = (tmp_path / "end-3.tmp").stat()
    assert ranks.leave_word(LastWord("bug", 1, "KeyError", "naïve", trace="x" * 10**6 + "the end"))
    left = tmp_path / "end-3.json"
    assert (left.stat().st_size, left.stat().st_ino) == (held.st_size, held.st_ino)
    assert ranks.last_words(tmp_path)[3].trace.endswith("the end")


def test_a_process_that_is_ended_before_it_could_say_its_line_has_its_line_said(run, capfd):
    with pytest.raises(InputError, match=r"^d is no file; give one$"):
        run("cut off", "sleep")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("first", ["sleep", "lost"])
def test_the_error_of_another_rank_is_the_error_of_the_command(run, capfd, first):
    with pytest.raises(GuardStop, match="rank 1: the KL is 300; lower the rate"):
        run(first, "guard")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("works", [("sleep", "bug"), ("bug", "sleep"), ("bug", "lost")])
def test_a_bug_of_any_rank_keeps_its_traceback(run, capfd, works):
    with pytest.raises(ProcessBug, match=r"^KeyError: 'forgotten'$") as caught:
        run(*works)
    assert caught.value.trace.startswith("Traceback") and caught.value.trace.endswith("KeyError: 'forgotten'\n")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("works", [("sleep", "SIGKILL"), ("lost", "SIGKILL"), ("SIGKILL", "lost"), ("sleep", "SIGBUS")])
def test_a_process_that_was_killed_is_named_with_its_signal(run, capfd, works):
    rank, name = next((rank, work) for rank, work in enumerate(works) if work.startswith("SIG"))
    with pytest.raises(ProcessEnd, match=rf"rank {rank} \(process \d+\) was ended by {name}.*--resume") as caught:
        run(*works)
    assert caught.value.exit_code == 128 + getattr(signal, name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_connection_that_is_lost_for_no_reason_on_this_machine_is_one_line(run, capfd):
    with pytest.raises(PeerLost, match=r"^another process of the job is gone .*Connection closed by peer"):
        run("lost", "sleep")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("others", [{}, {3: LastWord("lost", 1, "PeerLost", "another process is gone")}])
def test_a_job_that_rank_0_of_another_machine_has_ended_has_a_class_and_the_exit_code_of_rank_0(others):
    """From an error of this machine; its kind in --json is `followed`."""
    words = {2: LastWord("followed", 3), **others}
    found = cause({rank: Ended(rank, 1, 3, "") for rank in words}, words, alone=False)
    assert isinstance(found, EndedElsewhere)
    assert (str(found), found.exit_code) == (
        "rank 0, on another machine, has ended the job with exit code 3; it says why where it runs",
        3,
    )


def test_a_process_that_leaves_no_word_is_named_with_its_exit_code(run):
    with pytest.raises(ProcessEnd, match=r"rank 1 .* 7 and left no word; it wrote: a library gave up") as caught:
        run("sleep", "silent")
    assert caught.value.exit_code == 7


def test_a_port_that_is_taken_is_one_line(run, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        meeting = Meeting(2, 0, "localhost", taken.getsockname()[1])
        with pytest.raises(UsageError, match=r"the port localhost:\d+ of the head is taken; set PET_MASTER_PORT"):
            run_processes(Processes(("late", "late"), ("0",), meeting))


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (b"SSH-2.0-OpenSSH_9.0\r\n", UsageError, "another program answers at .*; set PET_MASTER_PORT to another one"),
        (b"", InputError, "did not meet at .*PET_MASTER_PORT is another port"),  # it closes the connection
    ],
)
def test_another_program_at_the_port_of_the_head_is_one_line(run, monkeypatch, answer, kind, said):
    monkeypatch.setattr(launcher, "WAIT", 3)
    clients = []

    def serve(other):
        with suppress(OSError):  # the end of the test
            while True:
                clients.append(other.accept()[0])
                clients[-1].sendall(answer) if answer else clients.pop().close()

    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        server = threading.Thread(target=serve, args=(other,))
        server.start()
        meeting = Meeting(2, 1, "localhost", other.getsockname()[1])
        with pytest.raises(kind, match=said) as caught:
            run_processes(Processes(("late", "late"), ("0",), meeting))
        other.shutdown(socket.SHUT_RDWR)
        server.join()
    for client in clients:
        client.close()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [None, "INFO"])
def test_sockets_that_wait_for_machines_write_nothing_unless_the_user_asks(given):
    code = f"""
import os, socket
from gemma2.posttrain.launch import launcher
from gemma2.posttrain.launch.nodes import Meeting
launcher.WAIT = 1
launcher.check_torch = lambda: __import__("torch")
with socket.socket() as free:
    free.bind(("localhost", 0))
    meeting = Meeting(2, 1, "localhost", free.getsockname()[1])
    try:
        launcher.run_processes(launcher.Processes((), ("0",), meeting))
    except launcher.InputError:
        assert os.environ.get(launcher.LOG_LEVEL) == {given!r}
        print("one line")
"""
    variables = os.environ | ({} if given is None else {launcher.LOG_LEVEL: given})
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "one line\n"
    assert bool(done.stderr) == (given is not None)


def test_machines_that_do_not_come_are_one_line(run, monkeypatch):
    monkeypatch.setattr(launcher, "WAIT", 1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = Meeting(2, 0, "localhost", free.getsockname()[1])
    with pytest.raises(InputError, match="the 2 machines did not meet at localhost"):
        run_processes(Processes(("late", "late"), ("0",), meeting))


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ({}, "sees no GPU, and the driver lists some; install the build of torch"),
        (
            {
                "torch.accelerator.is_available": lambda: True,
                "torch.version.cuda": "13.0",
                "torch.distributed.is_nccl_available": lambda: False,
            },
            "built without NCCL",
        ),
        ({"torch.distributed.is_available": lambda: False}, "without torch.distributed"),
    ],
)
def test_a_torch_that_cannot_join_gpus_is_one_line(monkeypatch, absent, said):
    for name, value in absent.items():
        monkeypatch.setattr(name, value)
    with pytest.raises(InputError, match=said):
        launcher.check_torch()


@pytest.mark.parametrize(("backend", "parted"), [("gloo", []), ("nccl", ["parted"])])
def test_a_process_that_has_met_others_ends_without_taking_the_interpreter_down(monkeypatch, capfd, backend, parted):
    done = []
    group = SimpleNamespace(
        is_initialized=lambda: True,
        get_backend=lambda: backend,
        destroy_process_group=lambda: done.append("parted"),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(distributed=group))
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: done.append("cleaned up"))
    monkeypatch.setattr(os, "_exit", lambda code: done.append(code))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks.leave_job()
    assert done == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.leave_job()
    assert done == [*parted, "cleaned up", 0]
