"""A stage on several Ray nodes, without Ray: placed on different nodes, joined at the first, ended together."""

import queue
import socket
import sys
import threading
import types

import pytest
from waiting import PATIENCE, wait_for

from gemma2.posttrain.pipelines.executors import ray_driver, ray_gang
from gemma2.posttrain.pipelines.executors.job_values import STOPPED, Job, Outcome
from gemma2.posttrain.pipelines.executors.ray_gang import RayGang, meeting_place

END = object()
LOST = Outcome(-1, error="another process is gone", kind="lost")
FOLLOWED = Outcome(3, error="rank 0 has ended the job", kind="followed")
GUARD = Outcome(3, error="the KL is 300")


class RayError(Exception):
    pass


class NodeDiedError(RayError):
    pass


class RayTaskError(RayError):
    pass


class Stream:
    """The messages of one node, as a test puts them; an exception is raised, END ends it."""

    def __init__(self):
        self.messages = queue.Queue()

    def __iter__(self):
        while (message := self.messages.get()) is not END:
            if isinstance(message, Exception):
                raise message
            yield message


class Cluster:
    """What RayGang uses of Ray."""

    def __init__(self):
        self.groups, self.removed, self.placed, self.cancelled = [], [], [], []
        self.ready = threading.Event()
        self.streams = [Stream() for _ in range(3)]

    def install(self, monkeypatch):
        def module(name, **members):
            made = types.ModuleType(name)
            vars(made).update(members)
            monkeypatch.setitem(sys.modules, name, made)
            return made

        def placement_group(bundles, strategy):
            self.groups.append((bundles, strategy))
            return types.SimpleNamespace(ready=lambda: "ready")

        def cancel(stream, force):
            self.cancelled.append((self.streams.index(stream), force))
            stream.messages.put(END)

        meeting = types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=lambda: "10.0.0.1:77"))
        ray = module(
            "ray",
            wait=lambda refs, timeout: (refs if self.ready.is_set() else [], []),
            get=lambda value: value,
            remote=lambda **words: lambda function: meeting,
            cancel=cancel,
        )
        module("ray.util")
        module("ray.util.placement_group", placement_group=placement_group, remove_placement_group=self.removed.append)
        module("ray.util.scheduling_strategies", PlacementGroupSchedulingStrategy=lambda **words: words)
        module("ray.exceptions", RayError=RayError, RayTaskError=RayTaskError, NodeDiedError=NodeDiedError)
        return ray

    def options(self, **words):
        def remote(job, commands):
            self.placed.append((words["scheduling_strategy"]["placement_group_bundle_index"], words["num_gpus"], job))
            return self.streams[len(self.placed) - 1]

        return types.SimpleNamespace(remote=remote)


@pytest.fixture
def cluster(monkeypatch):
    made = Cluster()
    made.ray = made.install(monkeypatch)
    return made


def gang(cluster, nodes=2) -> RayGang:
    job = Job("a", "sft", {}, "out/a", "logs/a.log", False, False, "/", (), 4, processes=8, nodes=nodes)
    return RayGang(cluster.ray, cluster, job, 8, ["sft"])


class Running:
    """A gang that runs in a thread; what it sent, and what came out."""

    def __init__(self, cluster, made):
        self.gang, self.sent, self.begun, self.result = made, [], threading.Event(), []
        work = lambda: self.result.append(made.run(self.begun.set, self.sent.append))  # noqa: E731
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        cluster.ready.set()
        wait_for(lambda: len(cluster.placed) == made.job.nodes)

    def end(self):
        wait_for(lambda: not self.thread.is_alive())
        return self.result[0]


def test_every_node_gets_a_bundle_a_number_and_the_address_of_the_first(cluster):
    running = Running(cluster, gang(cluster, 3))
    assert cluster.groups == [([{"CPU": 4, "GPU": 8}] * 3, "STRICT_SPREAD")]
    assert [(index, gpus, job.node, job.head) for index, gpus, job in cluster.placed] == [
        (node, 8, node, "10.0.0.1:77") for node in range(3)
    ]
    assert [job.log for _, _, job in cluster.placed] == ["logs/a.log", "logs/a.node-1.log", "logs/a.node-2.log"]
    cluster.streams[0].messages.put("begun")
    cluster.streams[0].messages.put(("note", "of the first"))
    cluster.streams[1].messages.put(("note", "of another"))
    for node, stream in enumerate(cluster.streams):
        stream.messages.put(Outcome(0, {"node": node}))
        stream.messages.put(END)
    assert running.end() == Outcome(0, {"node": 0})
    assert running.sent == [("note", "of the first")]
    assert running.begun.is_set() and len(cluster.removed) == 1 and cluster.cancelled == []


def test_cpus_alone_ask_for_no_gpu(cluster):
    made = gang(cluster)
    made.gpus = 0
    running = Running(cluster, made)
    assert cluster.groups == [([{"CPU": 4}] * 2, "STRICT_SPREAD")]
    made.stop()
    assert running.end() is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Outcome(-9, error="rank 9 was killed"), Outcome(-9, error="node 1: rank 9 was killed")),
        (NodeDiedError("gone"), Outcome(-1, error="the worker on node 1 was lost (NodeDiedError)")),
        (
            RayTaskError("No module named gemma2"),
            Outcome(
                1, error="node 1: a Ray worker cannot run it: No module named gemma2; install gemma2 on every node"
            ),
        ),
    ],
)
def test_the_first_node_that_fails_ends_the_others_and_says_why(cluster, found, expected):
    """What number 0 says then is only that another one is gone."""
    running = Running(cluster, gang(cluster))
    cluster.streams[1].messages.put(found)
    if isinstance(found, Outcome):
        cluster.streams[1].messages.put(END)
    wait_for(lambda: cluster.cancelled)
    assert cluster.cancelled == [(0, False)]
    assert running.end() == expected
    assert len(cluster.removed) == 1


def ends(cluster, node, *messages):
    for message in messages:
        cluster.streams[node].messages.put(message)
    cluster.streams[node].messages.put(END)


@pytest.mark.parametrize("first", [LOST, FOLLOWED, STOPPED])
@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (GUARD, Outcome(3, error="node 1: the KL is 300")),
        (Outcome(1, traceback="Traceback"), Outcome(1, traceback="Traceback")),
        (Outcome(-9, error="rank 9 was killed"), Outcome(-9, error="node 1: rank 9 was killed")),
    ],
)
def test_a_node_that_knows_no_cause_may_end_first_and_that_of_another_counts(
    monkeypatch, cluster, first, cause, expected
):
    """A guard that ends one machine is a lost connection to the others, which may see it before that one has ended."""
    monkeypatch.setattr(ray_gang, "CAUSE", PATIENCE)
    running = Running(cluster, gang(cluster, 3))
    ends(cluster, 0, first)
    wait_for(lambda: running.gang.ended == {0})
    assert cluster.cancelled == []
    ends(cluster, 1, cause)
    assert running.end() == expected
    assert cluster.cancelled == [(2, False)]


def test_nodes_that_say_no_cause_in_time_are_ended_and_the_failure_is_a_lost_process(monkeypatch, cluster):
    """What they say then is that they were ended."""
    monkeypatch.setattr(ray_gang, "CAUSE", 0.01)
    running = Running(cluster, gang(cluster, 3))
    cluster.streams[1].messages.put(STOPPED)
    ends(cluster, 2, LOST)
    assert running.end() == Outcome(-1, error="node 2: another process is gone", kind="lost")
    assert sorted(cluster.cancelled) == [(0, False), (1, False)]


def test_when_all_have_ended_nothing_is_waited_for_and_what_says_most_counts(monkeypatch, cluster):
    monkeypatch.setattr(ray_gang, "CAUSE", PATIENCE)
    running = Running(cluster, gang(cluster, 3))
    for node, found in ((1, LOST), (2, FOLLOWED), (0, LOST)):
        ends(cluster, node, found)
        wait_for(lambda node=node: node in running.gang.ended)
    assert running.end() == Outcome(3, error="node 2: rank 0 has ended the job", kind="followed")
    assert cluster.cancelled == []
    wait_for(lambda: not running.gang.timer.is_alive())


def test_an_interrupt_ends_all_also_while_nodes_are_not_free(cluster):
    running = Running(cluster, gang(cluster))
    running.gang.stop()
    assert cluster.cancelled == [(0, False), (1, False)]
    assert running.end() is None
    waiting = gang(cluster)
    cluster.ready.clear()
    thread = threading.Thread(target=lambda: waiting.run(lambda: None, lambda event: None), daemon=True)
    thread.start()
    wait_for(lambda: len(cluster.groups) == 2)
    waiting.stop()
    wait_for(lambda: not thread.is_alive())
    assert len(cluster.removed) == 2


def test_the_meeting_place_is_free(monkeypatch):
    util = types.SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(util=util))
    host, _, port = meeting_place().rpartition(":")
    with socket.socket() as found:
        found.bind((host, int(port)))


@pytest.mark.parametrize(
    ("waited", "nodes", "said"),
    [
        (4.0, [(8, 8)], "stage a waits for 4 CPUs and 8 GPUs, which fewer than 2 nodes have"),
        (40.0, [(8, 8), (4, 8)], "stage a waits until 4 CPUs and 8 GPUs of 2 nodes are free"),
        (4.0, [(8, 8), (4, 8)], None),
    ],
)
def test_a_stage_that_waits_for_nodes_says_so(monkeypatch, cluster, waited, nodes, said):
    sent = []
    driver = ray_driver.Driver.__new__(ray_driver.Driver)
    driver.control, driver.lock = types.SimpleNamespace(send=sent.append), threading.Lock()
    since = ray_driver.time.monotonic() - waited
    driver.placed = {"a": ray_driver._Placed(None, None, 4, 8, since, gang=gang(cluster))}
    monkeypatch.setattr(driver, "_nodes", lambda: nodes)
    driver._say_why_stages_wait()
    assert len(sent) == (said is not None)
    assert said is None or said in sent[0][2][1]
