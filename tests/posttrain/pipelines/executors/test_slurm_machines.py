"""A stage of several machines as a SLURM job: its outcome is the cause, whichever machine ends first."""

import signal
from pathlib import Path

import fake_slurm
import pytest
from slurm_jobs import ANY, SLEEP, again, job, outcome_of, running

from gemma2.posttrain.pipelines.executors import slurm_script
from gemma2.posttrain.pipelines.executors.job_values import STOPPED, Outcome

MACHINES = """
import sys, time
from pathlib import Path
from gemma2.posttrain.pipelines.executors import job_process, jobs
from gemma2.posttrain.pipelines.executors.job_values import Outcome

box, first = Path(sys.argv[1]), int(Path("first").read_text())

def end(job, send):
    if job.node == first:
        return Outcome(-1, error="another process is gone", kind="lost")
    while not (box / ("outcome-1.json" if first else "outcome.json")).exists():
        time.sleep(0.01)
    time.sleep(0.5)  # its processes end; srun would end this one meanwhile
    return Outcome(3, error="the KL is 300")

jobs._run, job_process.CAUSE = end, 600
sys.exit(job_process.main(box))
"""


@pytest.mark.parametrize(("first", "error"), [(0, "node 1: the KL is 300"), (1, "the KL is 300")])
def test_a_machine_that_lost_another_one_lets_that_say_why(cluster, executor, monkeypatch, first, error):
    Path("first").write_text(str(first))
    Path("machines.py").write_text(MACHINES)
    monkeypatch.setattr(slurm_script, "PROGRAM", "machines")
    executor.start(job(nodes=2), ANY)
    found = outcome_of(executor)
    assert (found.code, found.error) == (3, error)


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize(
    ("left", "state", "code", "said"),
    [
        (Outcome(3, error="the KL is 300"), "NODE_FAIL", 3, "the KL is 300"),
        (Outcome(-1, error="another is gone", kind="lost"), "FAILED", -1, "another is gone"),
        (Outcome(-1, error="another is gone", kind="lost"), "NODE_FAIL", -1, "a machine of it failed"),
        (STOPPED, "FAILED", -1, "has the state FAILED"),
    ],
)
def test_a_machine_that_left_no_outcome_is_waited_for_until_the_job_is_over(
    cluster, executor, node, left, state, code, said
):
    (cluster / "instead").write_text(SLEEP)
    executor.start(job(nodes=2), ANY)
    place = running(cluster)
    executor.running["a"].box.end(left, node)
    assert executor.poll(0.2)[1] == {}
    fake_slurm.end(place, state, signal.SIGKILL)
    found = outcome_of(executor)
    assert found.code == code and said in found.error


def test_a_job_that_fails_on_one_machine_ends_on_the_others_before_it_is_tried_again(cluster, executor):
    (cluster / "instead").write_text(SLEEP)
    executor.start(job(nodes=2), ANY)
    running(cluster)
    executor.running["a"].box.end(Outcome(3, error="the KL is 300"), 1)
    second = again(executor)
    second.start(job(nodes=2), ANY)
    assert fake_slurm.state(cluster / "jobs" / "1") == "CANCELLED"
    assert second.running["a"].number == "2" and second.running["a"].box.outcomes() == {}
    running(cluster, 2)  # the fake scancel misses a job that is just about to begin
    second.stop()
