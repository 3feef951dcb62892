"""Stages as processes of this machine: isolated, logged, stopped in order, gone with the pipeline that started them."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from processes import MAIN, alive, children_of, finish, start, wait_until_gone
from waiting import wait_for

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.pipelines.executors.jobs import Job, Outcome
from gemma2.posttrain.pipelines.executors.processes import LocalExecutor, visible_gpus
from gemma2.posttrain.schemas import Resources

pytestmark = pytest.mark.long

ANY = Resources()
ROW = {"prompt": "What is two plus two?", "completion": "It is four, as you can count on your fingers."}


@pytest.fixture
def place(tmp_path):
    rows = [json.dumps({**ROW, "prompt": f"{ROW['prompt']} ({i})"}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return tmp_path


def write_rows(place: Path, count: int) -> None:
    """Rows that take about a millisecond each."""
    rows = (json.dumps({**ROW, "prompt": f"What is {i} plus {i * i} times {i % 7}? " * 8}) for i in range(count))
    (place / "rows.jsonl").write_text("\n".join(rows))


def job(place: Path, stage: str = "a", **changes) -> Job:
    return Job(
        **{
            "stage": stage,
            "command": "filter",
            "options": {"data": "rows.jsonl", "workers": 1},
            "out": f"out/{stage}",
            "log": f"out/logs/{stage}.log",
            "resume": False,
            "force": False,
            "folder": str(place),
            "modules": (),
            "cpus": 1,
            **changes,
        }
    )


def outcomes(executor: LocalExecutor, count: int) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    wait_for(lambda: found.update(executor.poll(0.2)[1]) or len(found) >= count)
    return found


def pid_of(executor: LocalExecutor, stage: str = "a") -> int:
    """The process of a stage that has its work."""
    return wait_for(lambda: executor.poll(0.05) and executor.running[stage].pid)


@pytest.fixture
def executor():
    made = LocalExecutor(2, gpus=("0", "1", "2"))
    made.prepare(["filter"])
    yield made
    made.close()


def test_a_stage_is_a_process_of_its_own_and_tells_how_it_ended(place, executor):
    executor.start(job(place), ANY)
    executor.start(job(place, "bad", options={"data": "gone.jsonl"}), ANY)
    assert not executor.has_room("filter", ANY)
    found = outcomes(executor, 2)
    assert found["a"].code == 0
    assert found["a"].summary["kept"] == 4
    assert (place / "out" / "a" / "gemma2.json").is_file()
    assert found["bad"].code == 1
    assert "gone.jsonl" in found["bad"].error
    assert not found["bad"].traceback
    assert executor.has_room("filter", ANY)


def test_a_bug_is_told_with_its_traceback_and_logged(place, executor):
    executor.start(job(place, options={"data": "rows.jsonl", "no such option": 1}), ANY)
    found = outcomes(executor, 1)["a"]
    assert found.code == 1
    assert "Traceback" in found.traceback
    assert "no such option" in (place / "out" / "logs" / "a.log").read_text()


def test_a_process_that_is_killed_is_told_by_its_signal(place, executor):
    write_rows(place, 20_000)  # so that it cannot end before it is killed
    executor.start(job(place), ANY)
    os.kill(pid_of(executor), signal.SIGKILL)
    assert outcomes(executor, 1)["a"].error.startswith("its process was ended by SIGKILL")


def test_every_stage_has_its_gpus_to_itself(place, executor):
    assert executor.wanted_gpus("rlhf", ANY) == 1
    assert executor.wanted_gpus("filter", ANY) == executor.wanted_gpus("merge slerp", ANY) == 0
    executor.start(job(place), Resources(gpus=2))
    assert executor.running["a"].gpus == ("0", "1")
    assert executor.has_room("rlhf", ANY)
    assert not executor.has_room("rlhf", Resources(gpus=2))
    executor.start(job(place, "b"), Resources(gpus=1))
    assert executor.running["b"].gpus == ("2",)
    outcomes(executor, 2)
    assert sorted(executor.gpus) == ["0", "1", "2"]
    with pytest.raises(UsageError, match=r"stages\.a\.resources\.gpus = 4: this machine has 3"):
        executor.check("a", Resources(gpus=4))
    with pytest.raises(UsageError, match=r"resources\.nodes = 2: --executor local has this machine alone; give --exe"):
        executor.check("a", Resources(nodes=2))


@pytest.mark.parametrize(("given", "expected"), [("", ()), ("-1", ()), ("3, 5", ("3", "5"))])
def test_gpus_are_those_that_the_environment_leaves(monkeypatch, given, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == expected


def test_threads_are_what_is_asked_for_else_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert LocalExecutor(3, gpus=()).cpus(None) == 2
    assert LocalExecutor(3, gpus=()).cpus(5) == 5
    assert LocalExecutor(9, gpus=()).cpus(None) == 1


# --- the command ------------------------------------------------------------------------------------------------------

PIPELINE = """
stages:
  a: {command: filter, options: {data: rows.jsonl, workers: 1}}
  b: {command: filter, options: {data: "${a.out}", workers: 1, min_words: 1}}
"""


def pipeline(place: Path, *more: str) -> list[str]:
    (place / "p.yaml").write_text(PIPELINE)
    return ["pipeline", "run", "p.yaml", "--out", "out", *more]


def test_a_pipeline_runs_is_skipped_and_tells_where_it_stands(place, monkeypatch, capsys):
    code, out, err = finish(start(MAIN, *pipeline(place, "--json"), cwd=place))
    assert code == 0, err
    assert json.loads(out)["ran"] == 2
    assert "$ gemma2 filter --data rows.jsonl --workers 1 --out out/a" in err
    monkeypatch.chdir(place)
    assert invoke(pipeline(place, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["ran"] == 0
    assert invoke(["pipeline", "status", "out", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [one["status"] for one in stages] == ["complete", "complete"]
    assert all(one["hash"] for one in stages)


def test_an_error_of_a_stage_is_one_line_with_its_exit_code(place):
    (place / "rows.jsonl").write_text('{"prompt": 1}\n')
    code, out, err = finish(start(MAIN, *pipeline(place, "--quiet"), cwd=place))
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: stage a: ")
    assert "rows.jsonl:1" in err
    assert "out/logs/a.log" in err


@pytest.fixture
def slow(place):
    """A pipeline whose stage has a minute of work, and has begun."""
    write_rows(place, 60_000)
    process = start(MAIN, *pipeline(place), cwd=place)
    wait_for(lambda: (place / "out" / ".a.partial").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupt_ends_the_stages_and_says_so(place, slow, number, code):
    children = children_of(slow.pid)
    slow.send_signal(number)
    found, _, err = finish(slow)
    assert found == code, err
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted")
    assert json.loads((place / "out" / "pipeline.json").read_text())["status"] == "interrupted"
    wait_until_gone(children)
    assert not (place / "out" / "a").exists()  # the stage has not come to its end meanwhile


def test_stages_do_not_outlive_a_pipeline_that_is_killed(place, slow):
    children = children_of(slow.pid)
    assert children
    slow.kill()
    wait_until_gone(children)
    assert not (place / "out" / "a").exists()  # the stage has not come to its end meanwhile


def written(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def end(pid: int) -> None:
    """End what a failing test would leave behind."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


HELPED = """
import subprocess, sys, time
from gemma2.posttrain.pipelines.executors.processes import follow
def work(file, pipe):
    follow(pipe)
    helper = subprocess.Popen(["sleep", "3600"])
    open(file, "w").write(str(helper.pid))
    time.sleep(3600)
"""


def test_a_helper_of_a_stage_does_not_outlive_it_either(place):
    (place / "helped.py").write_text(HELPED)
    script = """
import sys
from gemma2.posttrain.pipelines.executors.processes import LocalExecutor
sys.path.insert(0, sys.argv[1])
import helped
executor = LocalExecutor(1, gpus=())
executor.prepare(["filter"])
executor.begin("a", helped.work, sys.argv[1] + "/pid")
while True:
    executor.poll(1.0)
"""
    process = start(script, place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: written(place / "pid") or process.poll() is not None)
    helper = int(written(place / "pid"))
    assert alive({helper})
    process.kill()
    process.wait()  # not for its pipes, which the helper holds too
    try:
        wait_until_gone({helper})
    finally:
        end(helper)


def statuses(capsys: pytest.CaptureFixture) -> list[str]:
    capsys.readouterr()
    assert invoke(["pipeline", "status", "out", "--json"]) == 0
    return [one["status"] for one in json.loads(capsys.readouterr().out)["stages"]]


def test_what_is_refused_leaves_nothing_behind_and_blocks_nothing(place, monkeypatch, capsys):
    asked = pipeline(place)
    monkeypatch.chdir(place)
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        invoke([*asked, "--set", "b.data=gone.jsonl"])
    assert capsys.readouterr().out == ""
    for more in ([], ["--dry-run"]):
        with pytest.raises(UsageError, match=r"stages\.b\.resources\.gpus = 99: filter runs in one process"):
            invoke([*asked, *more, "--set", "stages.b.resources.gpus=99"])
    assert sorted(path.name for path in place.iterdir()) == ["p.yaml", "rows.jsonl"]
    (place / "out").mkdir()
    (place / "out" / "pipeline.yaml").write_text(PIPELINE)  # as a kill leaves it before the first state
    assert finish(start(MAIN, *asked, "--quiet", cwd=place))[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["status", "nowhere"], 1, "nowhere does not exist; give a YAML file, the folder of a run, or a recipe"),
        (["run", "p.yaml", "--out", "out", "--only", "a", "--force", "b"], 2, "--force b is not among the chosen"),
        (["graph", "p.yaml", "--write", "nowhere/x.svg"], 1, "cannot write --write nowhere/x.svg"),
    ],
)
def test_a_command_line_that_cannot_be_is_one_line(place, words, code, said):
    pipeline(place)
    found, out, err = finish(start(MAIN, "pipeline", *words, cwd=place))
    assert (found, out) == (code, "")
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1


def test_a_killed_run_is_not_told_as_running(place, slow, monkeypatch, capsys):
    monkeypatch.chdir(place)
    children = children_of(slow.pid)
    assert statuses(capsys) == ["running", "to run"]
    slow.kill()
    slow.wait()
    wait_until_gone(children)
    assert statuses(capsys)[0] in ("interrupted", "to run")


FORKING = """
import os, time
def work(file, pipe):
    os.setpgid(0, 0)
    helper = os.fork()  # holds the pipe open
    if helper:
        with open(file, "w") as out:
            out.write(str(helper))
    time.sleep(3600)
"""


def test_a_stage_that_is_killed_takes_its_helpers_along_and_its_end_is_seen(place, executor, monkeypatch):
    (place / "forking.py").write_text(FORKING)
    monkeypatch.syspath_prepend(place)
    from forking import work

    executor.begin("a", work, str(place / "pid"))
    process = pid_of(executor)
    helper = int(wait_for(lambda: written(place / "pid")))
    assert alive({helper})
    os.kill(process, signal.SIGKILL)
    try:
        assert outcomes(executor, 1)["a"].code == -signal.SIGKILL
        wait_until_gone({helper})
    finally:
        end(helper)


# C code waits for the signal and goes on to sleep: Python, which hears signals between bytecodes, has no chance to.
DEAF = """
import ctypes, functools, time
from gemma2.posttrain.pipelines.executors import jobs, processes
class Seconds:
    __index__ = functools.partial(sum, map(ctypes.CDLL(None).pause, [0]), 600)
def work(file, job, pipe):
    def run(job, send):
        open(file, "w").close()
        time.sleep(Seconds())
    jobs._run = run
    processes.work(job, pipe)
    open(file + "-ended", "w").close()
"""


def test_a_stage_that_began_to_wait_just_before_it_was_stopped_ends_in_order(place, executor, monkeypatch):
    (place / "deaf.py").write_text(DEAF)
    monkeypatch.syspath_prepend(place)
    from deaf import work

    executor.begin("a", work, str(place / "here"), job(place))
    wait_for(lambda: executor.poll(0.05) and (place / "here").exists())
    executor.stop()
    assert (place / "here-ended").exists(), "it was killed"
