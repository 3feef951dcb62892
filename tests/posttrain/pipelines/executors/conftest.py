"""SLURM as scripts on PATH (tests/fake_slurm.py), and an executor that uses it."""

import json
import signal
from pathlib import Path

import fake_slurm
import pytest

from gemma2.posttrain.pipelines.executors.slurm import SlurmExecutor

ROW = {"prompt": "What is two plus two?", "completion": "It is four, as you can count on your fingers."}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of the fake SLURM, which is on PATH; the working folder has rows."""
    environment = fake_slurm.install(tmp_path / "slurm")
    for name in ("PATH", "FAKE_SLURM"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(json.dumps({**ROW, "prompt": f"How much is {i}?"}) for i in range(4)))
    yield tmp_path / "slurm"
    for job in (tmp_path / "slurm" / "jobs").iterdir():
        if fake_slurm.state(job) in fake_slurm.LIVE:
            fake_slurm.end(job, "CANCELLED", signal.SIGKILL)


@pytest.fixture
def executor(cluster):
    made = SlurmExecutor(2, ["partition=gpu"])
    made.every = made.late = 0.05
    yield made
    made.running.clear()
