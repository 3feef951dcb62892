"""The server that stages are forked from is interrupted, killed, and killed again, at any moment."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from processes import MAIN, alive, children_of, finish, start, wait_until_gone
from waiting import pause, wait_for

from gemma2.posttrain.pipelines.executors import processes
from gemma2.posttrain.pipelines.executors.fork_server import ForkServer
from gemma2.posttrain.pipelines.executors.jobs import Outcome
from gemma2.posttrain.pipelines.executors.processes import RESTARTS, LocalExecutor
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.long

WORKS = """
import os, signal, time
from pathlib import Path
from gemma2.core.interrupts import Interrupted, Signals
from gemma2.posttrain.pipelines.executors.jobs import Outcome
from gemma2.posttrain.pipelines.executors.processes import follow

def until(folder, pipe):
    follow(pipe)
    with open(folder + "/begun", "a") as file:
        file.write(f"{os.getpid()} ")
    while not os.path.exists(folder + "/go"):
        time.sleep(0.01)
    pipe.send(Outcome(0, {"x": 1}))

def stopped(folder, pipe):
    follow(pipe)
    signals = Signals((signal.SIGTERM,))
    signals.install()
    try:
        Path(folder, "begun").touch()
        time.sleep(600)
    except Interrupted:
        Path(folder, "cleaned").touch()
    os._exit(0)
"""
KILLED = """
import os, signal
with open({file!r}, "a") as file:
    file.write("x")
if os.path.getsize({file!r}) <= {times}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def executor(tmp_path, monkeypatch):
    """An executor, and a module `works` that its processes find."""
    (tmp_path / "works.py").write_text(WORKS)
    monkeypatch.syspath_prepend(tmp_path)
    made = LocalExecutor(2, gpus=())
    made.prepare(["filter"])
    yield made
    made.close()


def end_of(executor: LocalExecutor, seen: list | None = None, stage: str = "a") -> Outcome:
    found: dict[str, Outcome] = {}

    def look():
        events, ended = executor.poll(0.1)
        found.update(ended)
        if seen is not None:
            seen.extend(events)
        return stage in found

    wait_for(look)
    return found[stage]


def begun(executor: LocalExecutor, place: Path) -> int:
    """The process of stage `a`, which works."""
    wait_for(lambda: executor.poll(0.05) and (place / "begun").exists())
    return executor.running["a"].pid


def kill_server(executor: LocalExecutor) -> None:
    os.kill(executor.server.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("watched", [True, False], ids=["pidfd", "pipe"])
def test_a_stage_goes_on_when_the_server_is_killed_and_its_outcome_counts(tmp_path, executor, monkeypatch, watched):
    from works import until

    if not watched:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    executor.begin("a", until, str(tmp_path))
    begun(executor, tmp_path)
    kill_server(executor)
    for _ in range(3):
        assert executor.poll(0.1)[1] == {}  # it is not taken for lost, so that it is not started a second time
    assert "a" in executor.running
    (tmp_path / "go").touch()
    assert end_of(executor) == Outcome(0, {"x": 1})
    executor.begin("a", until, str(tmp_path))  # by a new server
    assert end_of(executor) == Outcome(0, {"x": 1})
    assert len((tmp_path / "begun").read_text().split()) == 2


def test_a_stage_that_is_killed_after_the_server_was_lost(tmp_path, executor):
    from works import until

    executor.begin("a", until, str(tmp_path))
    pid = begun(executor, tmp_path)
    kill_server(executor)
    assert executor.poll(0.3)[1] == {}
    os.kill(pid, signal.SIGKILL)
    found = end_of(executor)
    assert found.code < 0  # `retries` cover it
    assert "was lost" in found.error


def test_a_stage_is_stopped_in_order_when_the_server_is_gone(tmp_path, executor):
    from works import stopped

    executor.begin("a", stopped, str(tmp_path))
    pid = begun(executor, tmp_path)
    kill_server(executor)
    executor.stop()
    assert (tmp_path / "cleaned").exists()
    wait_until_gone({pid})


@pytest.mark.parametrize("times", [1, RESTARTS, RESTARTS + 1])
def test_a_server_that_is_killed_while_it_imports_is_started_again(tmp_path, executor, times):
    from works import until

    counter = tmp_path / "counter"
    (tmp_path / "killed.py").write_text(KILLED.format(file=str(counter), times=times))
    executor.close()
    executor.modules = ["killed"]
    (tmp_path / "go").touch()
    seen: list = []
    executor.begin("a", until, str(tmp_path))
    found = end_of(executor, seen)
    warnings = [event[1] for _, event in seen if event[0] == "warn"]
    assert all("was ended by SIGKILL: out of memory?; it is started again" in text for text in warnings)
    assert len(warnings) == min(times, RESTARTS)
    if times <= RESTARTS:
        assert found == Outcome(0, {"x": 1})
        assert len((tmp_path / "begun").read_text().split()) == 1
    else:
        assert found.code == 1
        assert "4 times in a row; free memory" in found.error
        assert not (tmp_path / "begun").exists()


def test_a_child_that_was_given_up_before_it_had_its_work_ends_and_does_nothing(tmp_path):
    server = ForkServer([])
    server.fork(7).close()
    messages = [server.control.recv() for _ in range(2)]
    assert messages[0][:2] == ("forked", 7)
    assert messages[1] == ("ended", 7, 0)
    server.close()


def test_what_a_library_prints_on_import_stays_off_stdout(tmp_path, executor, capfd):
    from works import until

    (tmp_path / "banner.py").write_text("import os\nos.write(1, b'Welcome!')\n")
    executor.close()
    executor.modules = ["banner"]
    (tmp_path / "go").touch()
    executor.begin("a", until, str(tmp_path))
    assert end_of(executor).code == 0
    assert capfd.readouterr().out == ""


def test_a_recommendation_of_a_library_on_import_is_not_shown(tmp_path, executor, capfd):
    from works import until

    warns = "import logging\nlogging.getLogger('bitsandbytes.backends').warning('Failed to load gemm_4bit')\n"
    (tmp_path / "recommending.py").write_text(warns)
    executor.close()
    executor.modules = ["recommending"]
    (tmp_path / "go").touch()
    executor.begin("a", until, str(tmp_path))
    assert end_of(executor).code == 0
    assert "Failed to load" not in capfd.readouterr().err


def test_a_process_that_cannot_be_forked_fails_its_stage_with_one_line(executor, monkeypatch):
    monkeypatch.setattr(executor.server.control, "recv", lambda: ("refused", executor.asked, "no more processes"))
    monkeypatch.setattr(executor.server.control, "poll", iter([True, False]).__next__)
    executor.begin("a", processes.work)
    found = end_of(executor)
    assert (found.code, found.error) == (1, "its process cannot be started: no more processes; lower --jobs")


# --- the command ------------------------------------------------------------------------------------------------------

PIPELINE = """
stages:
  a: {command: sft, options: {model: m, data: rows.jsonl, max_steps: 2, batch_size: 2, max_length: 64}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("fork")
    save_random(root / "m", seed=1)
    rows = [json.dumps({"prompt": f"What is two plus {i}?", "completion": "Four."}) for i in range(8)]
    (root / "rows.jsonl").write_text("\n".join(rows))
    (root / "p.yaml").write_text(PIPELINE)
    return root


def begin(place: Path, out: str):
    """The command as a terminal starts it, when its server has begun; and the server."""
    process = start(MAIN, "pipeline", "run", "p.yaml", "--out", out, cwd=place, start_new_session=True)
    server = wait_for(lambda: server_of(process.pid) or (process.poll() is not None and -1))
    assert server > 0, process.communicate()
    return process, server


def server_of(pid: int) -> int:
    for child in children_of(pid):
        try:
            if "fork_server" in Path(f"/proc/{child}/cmdline").read_text():
                return child
        except OSError:
            continue
    return 0


def interrupt(place, number, code):
    """Interrupt a run while its server imports; nothing of it is left but one line."""
    process, _ = begin(place, f"interrupted-{number}")
    pause(random.uniform(0.0, 3.0))  # another one every time
    children = children_of(process.pid)
    os.killpg(process.pid, number)
    found, out, err = finish(process)
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted")
    wait_until_gone(children)


def test_ctrl_c_while_the_server_imports_is_one_line(place):
    interrupt(place, signal.SIGINT, 130)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_was_interrupted_while_the_server_imported_runs_again(place, number, code):
    interrupt(place, number, code)
    code, _, err = finish(start(MAIN, "pipeline", "run", "p.yaml", "--out", f"interrupted-{number}", cwd=place))
    assert code == 0, err


@pytest.mark.slow
def test_a_server_that_is_killed_at_any_moment_costs_a_warning_at_most(place):
    process, server = begin(place, "killed")
    pause(random.uniform(0.0, 4.0))
    if alive({server}):
        os.kill(server, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert "Traceback" not in err
    assert json.loads((place / "killed" / "pipeline.json").read_text())["stages"]["a"]["attempts"] == 1
