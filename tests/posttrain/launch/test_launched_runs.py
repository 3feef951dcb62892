"""`gemma2 rlhf --gpus 2` from the command line to its processes on gloo: killed, interrupted, refused, on two machines.

The machine has no GPU: a driver's tool on PATH lists two, and the check of torch's build is left out. All else is real.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import BARE_CHECKOUT, MAIN, children_of, finish, wait_until_gone
from rl_job import environment, words, write_job
from waiting import wait_for

PARENT = "from gemma2.posttrain.launch import launcher\nlauncher.check_torch = lambda: None\n"
SETTINGS = "--steps 6 --prompts-per-step 4 --n 3 --save-every 2 --eval-every 3 --json"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a policy, prompts, a judge, and a driver's tool that lists two GPUs."""
    root = write_job(tmp_path_factory.mktemp("launched"))
    tool = root / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA A, 80000\\nNVIDIA A, 80000\\n'\n", encoding="utf-8")
    tool.chmod(0o755)
    return root


def start(job: Path, out: Path, *more: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start a run on two GPUs, as a user does."""
    env = {**environment(job), "PATH": f"{job}:{os.environ['PATH']}", **variables}
    line = [sys.executable, "-c", BARE_CHECKOUT + PARENT + MAIN, *words(job, out, SETTINGS), *more]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd or job)


@pytest.fixture(scope="module")
def whole(job):
    """The output of a run that was left alone."""
    code, out, err = finish(start(job, job / "whole", "--gpus", "2"))
    assert code == 0, err
    assert out.count("{") == 1  # one document: rank 1 is silent
    return job / "whole"


def free_port() -> str:
    """A port of this machine that nothing listens to."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def at_checkpoint(job: Path, name: str, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait for the first checkpoint of a run and return its processes, by rank."""
    mark = job / f".{name}.partial" / "checkpoints" / "checkpoint-2" / "complete.json"
    wait_for(lambda: mark.exists() or process.poll() is not None)
    assert mark.exists(), process.communicate()
    ranks = [one for one in psutil.Process(process.pid).children(recursive=True) if "RANK" in one.environ()]
    return sorted(ranks, key=lambda one: int(one.environ()["RANK"]))


@pytest.mark.slow
def test_a_killed_process_is_one_line_and_the_others_end(job):
    killed = start(job, job / "killed", "--gpus", "2", "--steps", "2000")
    ranks = at_checkpoint(job, "killed", killed)
    assert len(ranks) == 2
    ranks[1].kill()
    code, _, err = finish(killed)
    assert code == 128 + signal.SIGKILL
    assert err.count("error: ") == 1 and f"error: rank 1 (process {ranks[1].pid}) was ended by SIGKILL" in err
    assert "Traceback" not in err and "ChildFailedError" not in err
    wait_until_gone({one.pid for one in ranks})


@pytest.mark.slow
def test_a_run_of_which_a_process_was_killed_is_resumed_bit_for_bit(job, whole):
    process = start(job, job / "again", "--gpus", "2")
    at_checkpoint(job, "again", process)[0].kill()
    code, _, err = finish(process)
    assert code == 128 + signal.SIGKILL and "error: rank 0" in err
    code, _, err = finish(start(job, job / "again", "--gpus", "2", "--resume"))
    assert code == 0, err
    for file in ("model.safetensors", "ema/model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (job / "again" / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_every_process_and_is_said_once(job, number):
    process = start(job, job / f"stopped{number}", "--gpus", "2", "--steps", "2000")
    at_checkpoint(job, f"stopped{number}", process)
    below = children_of(process.pid)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number
    assert err.count("interrupted") - err.count("interrupted; cleaning up") == 1
    assert "Traceback" not in err and "error" not in err
    assert '"exit_code": ' + str(code) in out
    wait_until_gone(below)
    assert (job / f".stopped{number}.partial" / "run.json").exists()


@pytest.mark.slow
def test_the_processes_end_with_a_command_that_is_killed(job):
    process = start(job, job / "orphans", "--gpus", "2", "--steps", "2000")
    ranks = at_checkpoint(job, "orphans", process)
    process.kill()
    process.communicate()
    wait_until_gone({one.pid for one in ranks})


def two_machines(job: Path, out: Path, port: str, *places: Path) -> list[tuple[int, str, str]]:
    """Run a job of two machines with a GPU each, here; the ends of both."""
    machines = []
    for node, place in enumerate(places):
        place.mkdir(exist_ok=True)
        variables = {"PET_NODE_RANK": str(node), "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": port}
        machines.append(start(job, out, "--gpus", "1", "--nodes", "2", cwd=place, **variables))
    return [finish(one) for one in machines]


@pytest.mark.slow
def test_two_machines_make_what_two_processes_on_one_make(job, whole):
    ends = two_machines(job, job / "apart", free_port(), job, job)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert ends[1][1:] == ("", "")
    for file in ("model.safetensors", "ema/model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (job / "apart" / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.slow
def test_two_machines_with_disks_of_their_own_are_refused_at_the_start(job):
    first, second = two_machines(job, Path("out"), free_port(), job / "machine0", job / "machine1")
    assert (first[0], second[0]) == (2, 2), (first, second)
    assert "error: --out out is not on a disk that all machines share: machine 1 of the job" in first[2]
    assert second[2].count("error: ") == 1 and "rank 0, on another machine, has ended the job with exit" in second[2]
    assert [[*(job / name).iterdir()] for name in ("machine0", "machine1")] == [[], []]


@pytest.mark.slow
def test_a_divided_training_is_killed_and_resumed_to_the_same_bytes(job):
    rows = [{"prompt": f"What is {a} plus {b}?", "completion": f"It is {a + b}."} for a in range(6) for b in range(6)]
    (job / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def sft(name: str, *more: str) -> subprocess.Popen[str]:
        line = f"sft --model {job}/policy --data {job}/rows.jsonl --gpus 2 --strategy fsdp --max-steps 6 --batch-size 4"
        line += f" --save-every 2 --max-length 64 --learning-rate 1e-3 --out {job / name} --json"
        env = {**environment(job), "PATH": f"{job}:{os.environ['PATH']}"}
        script = [sys.executable, "-c", BARE_CHECKOUT + PARENT + MAIN, *line.split(), *more]
        return subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=job)

    code, _, err = finish(sft("sft"))
    assert code == 0, err
    record = json.loads((job / "sft" / "gemma2.json").read_text(encoding="utf-8"))
    assert (record["processes"], record["strategy"]) == (2, "fsdp")
    killed = sft("sft-again")
    at_checkpoint(job, "sft-again", killed)[1].kill()
    code, _, err = finish(killed)
    assert code == 128 + signal.SIGKILL and err.count("error: rank 1") == 1
    code, _, err = finish(sft("sft-again", "--resume"))
    assert code == 0, err
    assert (job / "sft-again" / "model.safetensors").read_bytes() == (job / "sft" / "model.safetensors").read_bytes()
