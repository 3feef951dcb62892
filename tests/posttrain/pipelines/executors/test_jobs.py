"""What a stage's process is given: folder, modules, threads, devices; and how it tells of its work."""

import contextlib
import errno
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from stages import MAKE
from waiting import pause

from gemma2.posttrain.pipelines.executors import gang, jobs
from gemma2.posttrain.pipelines.executors.job_values import Outcome
from gemma2.posttrain.pipelines.executors.jobs import Job, Reporter, execute
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.run_directory import RunResult


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in; what a job does to this process is taken back."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "before")
    yield tmp_path
    torch.set_num_threads(threads)


def job(place, **changes) -> Job:
    given = {"stage": "a", "command": "make", "options": {}, "out": "deep/a", "log": "logs/a.log", "resume": False}
    given |= {"force": False, "folder": str(place), "modules": ("first",), "cpus": 1}
    return Job(**given | changes)


def test_a_process_has_the_folder_the_modules_the_threads_and_the_devices_of_its_job(place, monkeypatch):
    seen = {}

    def body(config, options, progress):
        seen.update(folder=os.getcwd(), path=sys.path[0], threads=torch.get_num_threads())
        seen.update({name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")})
        seen.update(out=options.out, parent=options.out.parent.is_dir())
        return RunResult(options.out, {"x": 1})

    monkeypatch.setitem(COMMANDS, "make", replace(MAKE, body=body, accelerated=True))
    torch.set_num_threads(2)
    os.chdir("/")
    outcome = execute(job(place, gpus=("3", "5")), lambda event: None)
    assert (outcome.code, outcome.summary) == (0, {"x": 1})
    assert seen["folder"] == str(place)
    assert seen["path"] == "first"
    assert seen["threads"] == 1
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert (str(seen["out"]), seen["parent"]) == ("deep/a", True)
    os.environ["CUDA_VISIBLE_DEVICES"] = "7"
    execute(job(place), lambda event: None)
    assert seen["CUDA_VISIBLE_DEVICES"] == "7"  # without a word about devices they stay as they are


@pytest.mark.parametrize(("cpus", "processes", "threads"), [(8, 2, 4), (7, 2, 3), (2, 8, 1), (6, 1, 6)])
def test_the_processes_of_a_gang_share_its_cpus(place, monkeypatch, cpus, processes, threads):
    """Each would else compute with as many threads as the stage has CPUs. A machine of several has all of them."""
    seen = {}

    def run_gang(job, send):
        seen.update(gang._environment(job))
        return Outcome(0)

    monkeypatch.setattr(jobs, "run_gang", run_gang)
    monkeypatch.setitem(COMMANDS, "make", MAKE)
    assert execute(job(place, cpus=cpus, processes=processes, nodes=2), lambda event: None).code == 0
    assert {seen[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {str(threads)}


def test_what_native_code_prints_goes_to_the_log(place, monkeypatch, capfd):
    def body(config, options, progress):
        os.write(1, b"to stdout\n")
        os.write(2, b"to stderr\n")
        return RunResult(options.out)

    monkeypatch.setitem(COMMANDS, "make", replace(MAKE, body=body))
    execute(job(place), lambda event: None)
    os.write(1, b"afterwards\n")
    assert (place / "logs" / "a.log").read_text() == "to stdout\nto stderr\n"
    assert capfd.readouterr().out == "afterwards\n"


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, "No space left on device: w.safetensors; free some space, then start the command again"),
        (errno.EBADF, ""),
    ],
)
def test_a_full_disk_is_one_line_and_no_bug(place, monkeypatch, number, error):
    def body(config, options, progress):
        raise OSError(number, os.strerror(number), "w.safetensors")

    monkeypatch.setitem(COMMANDS, "make", replace(MAKE, body=body))
    outcome = execute(job(place), lambda event: None)
    assert (outcome.code, outcome.error) == (1, error)
    assert bool(outcome.traceback) == (not error)


@pytest.mark.parametrize("value", [0, None, 3])
def test_code_that_ends_the_process_of_a_stage_is_one_line(place, monkeypatch, value):
    monkeypatch.setitem(COMMANDS, "make", replace(MAKE, body=lambda *_: sys.exit(value)))
    outcome = execute(job(place), lambda event: None)
    assert (outcome.code, outcome.traceback) == (1, "")
    assert f"sys.exit({value!r})" in outcome.error


@pytest.mark.parametrize("swallowed", [BaseException, ()], ids=["swallowed", ""])
def test_a_stage_that_is_stopped_says_so_and_leaves_no_trace_in_its_process(place, monkeypatch, swallowed):
    def body(config, options, progress):
        with contextlib.suppress(swallowed):
            signal.raise_signal(signal.SIGTERM)
        pause(600)  # the signal ends it

    def traces():
        numbers = (signal.SIGTERM, signal.SIGURG, signal.SIGALRM)
        return [*map(signal.getsignal, numbers), sys.unraisablehook, signal.getitimer(signal.ITIMER_REAL)[0] > 0]

    monkeypatch.setitem(COMMANDS, "make", replace(MAKE, body=body))
    before = traces()
    outcome = execute(job(place), lambda event: None)
    assert (outcome.code, outcome.error) == (143, "stopped")
    assert traces() == before


def test_a_failure_that_a_library_makes_of_an_interrupt_is_no_bug(place, monkeypatch):
    def body(config, options, progress):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("the C extensions failed") from error

    monkeypatch.setitem(COMMANDS, "make", replace(MAKE, body=body))
    assert execute(job(place), lambda event: None).code == 143


class Full:
    """A log on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_bug_is_told_also_when_its_log_takes_nothing(place, monkeypatch):
    def body(config, options, progress):
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(COMMANDS, "make", replace(MAKE, body=body))
    after_the_start = Full()
    after_the_start.flush = lambda: setattr(after_the_start, "flush", Full.flush.__get__(after_the_start))  # once
    monkeypatch.setattr(sys, "stderr", after_the_start)
    assert "a bug" in execute(job(place), lambda event: None).traceback


def test_a_bar_tells_all_that_it_advanced_by_in_few_messages():
    events = []
    reporter = Reporter(events.append)
    with reporter.task("RL", 500, "steps") as bar:
        for i in range(500):
            bar.advance(1, reward=float(i))
    reporter.note("a note")
    reporter.warn("a warning")
    assert events[0] == ("task", 1, "RL", 500, "steps")
    told = [event for event in events if event[0] == "advance"]
    assert sum(event[2] for event in told) == 500
    assert told[-1][3] == {"reward": 499.0}
    assert len(told) < 20
    assert events[-3:] == [("end", 1), ("note", "a note"), ("warn", "a warning")]
