"""A stage in a Ray worker, without Ray: its fork server stays warm, and it ends with its node, its lock or its task."""

import os
import sys
import types

import pytest
from processes import wait_until_gone
from waiting import wait_for

from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.staging import locked
from gemma2.posttrain.pipelines.executors import cluster, ray_driver
from gemma2.posttrain.pipelines.executors.cluster import RayExecutor
from gemma2.posttrain.pipelines.executors.jobs import Job, Outcome

pytestmark = pytest.mark.long

WORKS = """
import os, signal, time
from pathlib import Path
from gemma2.core.interrupts import Interrupted, Signals
from gemma2.posttrain.pipelines.executors.jobs import Outcome
from gemma2.posttrain.pipelines.executors.processes import follow

def report(job, pipe):
    follow(pipe)
    pipe.send(("note", "at work"))
    pipe.send(Outcome(0, {"gpus": job.gpus, "parent": os.getppid(), "process": os.getpid()}))

def long(job, pipe):
    follow(pipe)
    signals = Signals((signal.SIGTERM,))
    signals.install()
    try:
        Path(job.folder, "begun").write_text(str(os.getpid()))
        time.sleep(600)
    except Interrupted:
        Path(job.folder, "cleaned").touch()
    os._exit(0)
"""


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """The GPUs that Ray assigns; and a module `ray_works` that the processes of stages find."""
    (tmp_path / "ray_works.py").write_text(WORKS)
    monkeypatch.syspath_prepend(tmp_path)
    assigned: list[str] = []
    context = types.SimpleNamespace(get_accelerator_ids=lambda: {"GPU": assigned})
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(get_runtime_context=lambda: context))
    yield assigned
    if ray_driver._warm is not None:
        ray_driver._warm.close()
        ray_driver._warm = None


def test_a_cluster_of_our_own_listens_on_this_machine_alone(monkeypatch):
    given = {}
    ray = types.SimpleNamespace(
        init=lambda **words: given.update(words),
        get_runtime_context=lambda: types.SimpleNamespace(get_node_id=lambda: "node"),
        remote=lambda **words: lambda function: function,
    )
    services = types.SimpleNamespace(resolve_ip_for_localhost=lambda host: "192.0.2.1")
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray._private.services", services)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    ray_driver.Driver(None, None, [])
    assert given["_node_ip_address"] == "127.0.0.1" and given["include_dashboard"] is False
    assert services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    given.clear()
    ray_driver.Driver(None, "10.0.0.1:6379", [])
    assert given["address"] == "10.0.0.1:6379" and "_node_ip_address" not in given


def job(place, stage="a") -> Job:
    return Job(stage, "filter", {}, f"out/{stage}", f"out/logs/{stage}.log", False, False, str(place), (), 1)


def test_stages_of_a_worker_are_processes_of_one_server_and_have_their_gpus(tmp_path, gpus, monkeypatch):
    import ray_works

    monkeypatch.setattr(ray_driver, "work", ray_works.report)
    first = [*ray_driver.run_stage(job(tmp_path), ["filter"])]
    assert first[:2] == ["begun", ("note", "at work")]
    gpus += ["3", "5"]
    second = [*ray_driver.run_stage(job(tmp_path, "b"), ["filter"])]
    before, after = first[-1].summary, second[-1].summary
    assert before["parent"] == after["parent"] == ray_driver._warm.server.process.pid
    assert before["process"] != after["process"]
    assert (before["gpus"], after["gpus"]) == ((), ("3", "5"))


def begun(place) -> int:
    return int(wait_for(lambda: (place / "begun").exists() and (place / "begun").read_text()))


def test_a_task_that_is_cancelled_stops_its_stage_in_order(tmp_path, gpus, monkeypatch):
    import ray_works

    monkeypatch.setattr(ray_driver, "work", ray_works.long)
    running = ray_driver.run_stage(job(tmp_path), ["filter"])
    assert next(running) == "begun"

    def cancelled(self, seconds):
        found = poll(self, seconds)
        if (tmp_path / "begun").exists():
            raise KeyboardInterrupt
        return found

    poll = ray_driver.LocalExecutor.poll
    monkeypatch.setattr(ray_driver.LocalExecutor, "poll", cancelled)
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert (tmp_path / "cleaned").exists()
    wait_until_gone({begun(tmp_path)})


def test_a_stage_does_not_outlive_the_node_of_its_worker(tmp_path, gpus, monkeypatch):
    """Ray starts it on another node, and two of it must not run at once."""
    import ray_works

    monkeypatch.setattr(ray_driver, "work", ray_works.long)
    monkeypatch.setattr(os, "getppid", lambda: 2 if (tmp_path / "begun").exists() else 1)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit):
        list(ray_driver.run_stage(job(tmp_path), ["filter"]))
    wait_until_gone({begun(tmp_path)})


class Control:
    """The connection of a driver."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


def bare_driver() -> ray_driver.Driver:
    """A driver without a cluster."""
    driver = ray_driver.Driver.__new__(ray_driver.Driver)
    driver.control, driver.lock = Control(), ray_driver.threading.Lock()
    return driver


class Lost:
    """The stream of a task whose worker was lost."""

    class RayError(Exception):
        pass

    def __iter__(self):
        raise self.RayError


def test_a_stage_counts_as_lost_when_it_has_let_go_of_its_output(tmp_path, monkeypatch):
    """What it leaves behind decides whether the next attempt goes on, so it must not change any more."""
    names = ("RayTaskError", "NodeDiedError", "LocalRayletDiedError")
    errors = types.SimpleNamespace(RayError=Lost.RayError, **{name: type(name, (Lost.RayError,), {}) for name in names})
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    driver = bare_driver()
    driver.here = "here"
    held = locked(tmp_path / "a")
    held.__enter__()
    tries: list[float] = []

    def sleep(seconds):
        assert driver.control.sent == []
        tries.append(seconds)
        held.__exit__(None, None, None)

    monkeypatch.setattr(ray_driver.time, "sleep", sleep)
    driver._follow("a", tmp_path / "a", Lost())
    assert len(tries) == 1
    assert driver.control.sent == [("ended", "a", Outcome(-1, error="its worker was lost (RayError)"))]


def test_threads_are_those_of_the_largest_node_at_most(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    executor = RayExecutor(2)
    executor.largest = 8
    assert executor.cpus(None) == 8
    assert executor.cpus(40) == 40


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--executor ray needs Ray; install gemma2\[ray\]"):
        RayExecutor().prepare([])


def test_the_client_of_ray_is_refused(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match=r"Ray's client.*with --ray-address auto"):
        RayExecutor(1, "ray://head:10001").prepare([])


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            [("refused", "nothing listens")],
            "no Ray cluster at here: nothing listens; start one with `ray start",
        ),
        ([], "the Ray cluster here was lost: it ended while it was joined; look at `ray status`"),
        ([("ready", 2, 0)], "the Ray cluster here was lost: its head ended, or cannot be reached; look at"),
        ([("ready", 2, 0), ("lost", "its node on this machine ended")], "lost: its node on this machine ended; look"),
    ],
)
def test_a_cluster_that_is_lost_is_one_line(monkeypatch, answers, said):
    """At any moment: before it is joined, while a stage runs."""
    import multiprocessing
    import subprocess

    def launch(*arguments, **options):
        ours, theirs = multiprocessing.Pipe()
        for answer in answers:
            theirs.send(answer)
        theirs.close()
        return subprocess.Popen([sys.executable, "-c", ""]), ours

    monkeypatch.setattr(cluster, "launch", launch)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: True)
    executor = RayExecutor(1, "here")
    with pytest.raises(InputError, match=r"Ray cluster") as caught:
        executor.prepare([])
        executor.poll(60)
    executor.close()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("waited", "nodes", "said"),
    [
        (1.0, [(2, 0)], None),
        (4.0, [(2, 0), (8, 0)], "has (CPUs and GPUs of its nodes: 2 and 0, 8 and 0); add a node, or lower"),
        (4.0, [], "has (CPUs and GPUs of its nodes: no node); add a node, or lower"),
        (4.0, [(8, 1)], None),
        (40.0, [(8, 1)], "stage a waits until 4 CPUs and 1 GPUs of a node are free"),
    ],
)
def test_a_stage_that_waits_says_why_once(monkeypatch, waited, nodes, said):
    driver = bare_driver()
    driver.placed = {"a": ray_driver._Placed(None, None, 4, 1, ray_driver.time.monotonic() - waited)}
    monkeypatch.setattr(driver, "_nodes", lambda: nodes)
    for _ in range(2):
        driver._say_why_stages_wait()
    texts = [message[2][1] for message in driver.control.sent]
    assert len(texts) == (said is not None)
    assert said is None or said in texts[0]
