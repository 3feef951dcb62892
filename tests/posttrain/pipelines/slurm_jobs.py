"""Jobs on the SLURM of tests/fake_slurm.py: what the tests of the executor do with them."""

import os
from pathlib import Path

import fake_slurm
from waiting import wait_for

from gemma2.posttrain.pipelines.executors.job_values import Job, Outcome
from gemma2.posttrain.pipelines.executors.slurm import SlurmExecutor
from gemma2.posttrain.schemas import Resources

ANY = Resources()
SLEEP = "echo at work; exec sleep 600\n"


def job(**changes) -> Job:
    given = {"stage": "a", "command": "filter", "options": {"data": "rows.jsonl", "workers": 1}, "out": "out/a"}
    given |= {"log": "logs/a.log", "resume": False, "force": False, "folder": os.getcwd(), "modules": ()}
    return Job(**given | {"cpus": 1} | changes)


def outcome_of(executor, stage="a", seen=None) -> Outcome:
    found = {}

    def look():
        events, ended = executor.poll(0.1)
        found.update(ended)
        if seen is not None:
            seen.extend(events)
        return found.get(stage)

    return wait_for(look)


def running(cluster: Path, number: int = 1) -> Path:
    """A job that is at work, with a process."""
    place = cluster / "jobs" / str(number)
    wait_for(lambda: place.exists() and (place / "state").exists() and fake_slurm.state(place) == "RUNNING")
    return place


def again(executor) -> SlurmExecutor:
    """The executor of a pipeline that was started again after a kill."""
    made = SlurmExecutor(2, ["partition=gpu"])
    made.every = made.late = 0.05
    executor.running.clear()
    return made
