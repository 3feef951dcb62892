"""The whole matrix, `make test-sharded`: each training, whole and with adapters, on two and four processes, whole and
divided weights, at two sizes; checkpoints on other numbers of processes; a process that is killed.
"""

import json
import random
import shutil

import psutil
import pytest
import torch
from sharded_job import outcomes, run_job, settings, start_jobs, write_material
from test_two_processes import assert_same_run
from waiting import wait_for

from gemma2.posttrain.tiny.networks import random_model

pytestmark = pytest.mark.slow

COMMANDS = {"sft": {"epochs": 4}, "reward": {"epochs": 4}, "distill": {"steps": 10, "n": 1}}
MIDDLE = {"hidden_size": 320, "intermediate_size": 2048, "num_hidden_layers": 8}  # 16 M weights


@pytest.fixture(scope="module", params=["tiny", "16M"])
def root(request, tmp_path_factory):
    """Material at one size, with every training in one process."""
    root = write_material(tmp_path_factory.mktemp(request.param))
    if request.param == "16M":
        for seed, name in enumerate(("policy", "teacher")):
            model = random_model(seed, **MIDDLE)
            with torch.no_grad():
                for value in model.parameters():
                    value *= 0.1  # of tiny ones, which are a hundred times narrower
                model.model.embed_tokens.weight[107] *= 8
            model.save_pretrained(root / name)
    for name, command, more in trainings("auto"):
        job = {"name": f"one-{name}", "command": command, "config": settings(root, command, **more)}
        assert run_job(root, job) == "done"
    return root


def trainings(strategy):
    """(name, command, settings) of the six trainings: at least ten optimizer steps, the last of an epoch not full."""
    for command, more in COMMANDS.items():
        for rank in (0, 4):
            # Adam turns the rounding of a small gradient into a step of the learning rate: it is a usual one here.
            shared = {"lora_rank": rank, "strategy": strategy, "save_every": 100, "learning_rate": 1e-4}
            yield f"{command}-{rank}", command, more | shared


@pytest.mark.parametrize("processes", [2, 4])
def test_every_training_is_the_one_of_one_process(root, processes):
    jobs = [
        {
            "name": f"{strategy}{processes}-{name}",
            "command": command,
            "config": settings(root, command, **more),
        }
        for strategy in ("ddp", "fsdp")
        for name, command, more in trainings(strategy)
    ]
    process = start_jobs(root, jobs, processes)
    _, err = process.communicate(timeout=1700)
    assert process.returncode == 0, err[-4000:]
    assert outcomes(root) == {job["name"]: ["done"] for job in jobs}
    for job in jobs:
        one = root / f"one-{job['name'].partition('-')[2]}"
        # Adam divides by the size of the gradient: near rounding, a weight moves by its learning rate either way.
        apart = 1e-3 if "16M" in root.name else None
        assert_same_run(one, root / job["name"], processes, apart)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def undisturbed(material):
    """Three sharded trainings on two processes, and the same stopped after a checkpoint."""

    def job(name, command, rank, **how):
        config = settings(material, command, batch_size=12, lora_rank=rank, strategy="fsdp", **COMMANDS[command])
        return {"name": name, "command": command, "config": config, **how}

    kinds = [("sft", 0), ("reward", 4), ("distill", 0)]
    jobs = [job(f"whole-{command}", command, rank) for command, rank in kinds]
    jobs += [job(f"part-{command}", command, rank, stop=5) for command, rank in kinds]
    process = start_jobs(material, jobs, 2)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    return jobs


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_a_sharded_run_goes_on_on_any_number_of_processes(material, undisturbed, processes, monkeypatch):
    jobs = []
    for job in undisturbed:
        if job["name"].startswith("part-"):
            name = f"{job['name']}-{processes}"
            shutil.copytree(material / f".{job['name']}.partial", material / f".{name}.partial")
            jobs.append({**job, "name": name, "resume": True, "stop": None})
    process = start_jobs(material, jobs, processes)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    monkeypatch.setattr("test_two_processes.TOLERANCE", 1e-6)
    for job in jobs:
        before = material / f"whole-{job['command']}"
        if processes == 2:
            for file in ("model.safetensors", "metrics.jsonl"):
                assert (material / job["name"] / file).read_bytes() == (before / file).read_bytes(), job["name"]
            continue
        assert_same_run(before, material / job["name"], processes)
        manifest = json.loads((material / job["name"] / "gemma2.json").read_text())
        assert manifest["processes_by_step"] == f"2, from step 4: {processes}"


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_process_changes_nothing(material, undisturbed, seed):
    """SIGKILL of one of two at a random moment; the others end, and the run goes on bit for bit."""
    drawn = random.Random(seed)
    (job,) = [job for job in undisturbed if job["name"] == "whole-sft"]
    job = {**job, "name": f"killed-{seed}"}
    process = start_jobs(material, [job], 2)
    partial = material / f".{job['name']}.partial"
    step = drawn.randrange(2, 8)

    def steps_done():
        lines = partial / "metrics.jsonl"
        return lines.exists() and lines.read_text().count("\n") > step

    wait_for(lambda: steps_done() or process.poll() is not None)
    workers = sorted(psutil.Process(process.pid).children(), key=lambda one: one.pid)
    drawn.choice(workers).kill()
    process.communicate(timeout=300)
    assert process.returncode != 0
    process = start_jobs(material, [{**job, "resume": True}], 2)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (material / job["name"] / file).read_bytes() == (material / "whole-sft" / file).read_bytes()
