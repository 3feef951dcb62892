"""A stage as a program of a batch system: what the machines of a job write, and when the pipeline knows the outcome."""

import pytest
from waiting import PATIENCE

from gemma2.posttrain.pipelines.executors import job_process, jobs
from gemma2.posttrain.pipelines.executors.job_process import Mailbox, main
from gemma2.posttrain.pipelines.executors.job_values import STOPPED, Job, Outcome

DONE = Outcome(0, {"loss": 1.5})
LOST = Outcome(-1, error="another process is gone", kind="lost")
FOLLOWED = Outcome(3, error="rank 0 has ended the job", kind="followed")
GUARD = Outcome(3, error="the KL is 300")
BUG = Outcome(1, traceback="Traceback")


def job(nodes=2) -> Job:
    return Job("a", "sft", {}, "out/a", "logs/a.log", False, False, "/", ("",), 1, nodes=nodes)


@pytest.mark.parametrize(
    ("written", "code", "error"),
    [
        ({0: LOST, 1: GUARD}, 3, "node 1: the KL is 300"),
        ({0: STOPPED, 1: GUARD}, 3, "node 1: the KL is 300"),
        ({0: GUARD, 1: FOLLOWED}, 3, "the KL is 300"),
        ({0: LOST, 1: FOLLOWED}, 3, "node 1: rank 0 has ended the job"),
        ({0: LOST, 1: BUG}, 1, ""),
        ({0: LOST, 1: LOST}, -1, "another process is gone"),
        ({0: STOPPED, 1: LOST}, -1, "node 1: another process is gone"),
        ({0: STOPPED, 1: STOPPED}, 143, "stopped"),
        ({0: LOST, 1: DONE}, -1, "another process is gone"),
        ({0: DONE, 1: LOST}, 0, ""),
    ],
)
def test_the_outcome_of_several_machines_is_the_cause_where_one_has_written_it(tmp_path, written, code, error):
    box = Mailbox(tmp_path, nodes=2)
    for node, outcome in written.items():
        box.end(outcome, node)
    assert (box.outcome().code, box.outcome().error) == (code, error)


@pytest.mark.parametrize("failure", [GUARD, LOST])
@pytest.mark.parametrize("node", [0, 1])
def test_a_failure_is_known_when_every_machine_has_written_or_the_job_is_over(tmp_path, failure, node):
    """One that still ends would write into the mailbox of the next attempt."""
    box = Mailbox(tmp_path, nodes=2)
    assert box.outcome() is None and box.outcome(over=True) is None
    box.end(failure, node)
    assert box.outcome() is None
    assert box.outcome(over=True).code == failure.code
    box.end(STOPPED, 1 - node)
    assert box.outcome().code == failure.code


def test_success_is_known_by_the_machine_that_writes_the_output(tmp_path):
    box = Mailbox(tmp_path, nodes=2)
    box.end(DONE, 1)
    assert box.outcome() is None and box.outcome(over=True) is None
    box.end(DONE)
    assert box.outcome() == DONE


def test_an_attempt_begins_without_what_the_machines_of_an_earlier_one_have_written(tmp_path):
    box = Mailbox(tmp_path, nodes=3)
    for node in range(3):
        box.end(LOST, node)
    box.put(job(3))
    assert box.outcomes() == {} and box.job() == job(3)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the program on one machine of two: how the job ends there, and what another one writes while it waits."""
    box = Mailbox(tmp_path, nodes=2)
    box.put(job())
    monkeypatch.setattr(job_process, "CAUSE", PATIENCE)

    def work(node, outcome, *others):
        left, looks = list(others), []

        def sleep(seconds):
            looks.append(seconds)
            if len(looks) > 1:  # the first look finds nothing new
                box.end(left.pop(0), 1 - node)

        monkeypatch.setattr(job_process.time, "sleep", sleep)
        monkeypatch.setenv(job_process.NODE, str(node))
        monkeypatch.setattr(jobs, "execute", lambda job, send: outcome if job.node == node else None)
        code = main(tmp_path)
        assert not left
        assert box.outcomes()[node] == outcome
        return code, len(looks)

    return work


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize(("outcome", "code"), [(LOST, 1), (FOLLOWED, 3)])
@pytest.mark.parametrize("other", [GUARD, BUG, LOST, DONE], ids=["guard", "bug", "lost", "done"])
def test_a_machine_that_knows_no_cause_ends_when_another_one_has_written(run, node, outcome, code, other):
    """srun ends the others as soon as this one ends."""
    assert run(node, outcome, other) == (code, 2)


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize(("outcome", "code"), [(GUARD, 3), (BUG, 1), (STOPPED, 143), (DONE, 0)])
def test_a_machine_that_says_why_or_was_ended_does_not_wait(run, node, outcome, code):
    assert run(node, outcome) == (code, 0)


def test_a_machine_does_not_wait_for_ever_for_a_cause(run, monkeypatch):
    monkeypatch.setattr(job_process, "CAUSE", 0.0)
    assert run(1, LOST) == (1, 0)
