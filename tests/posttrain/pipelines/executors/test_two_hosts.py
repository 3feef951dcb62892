"""RL in two processes is the same on one machine, on two "hosts" of torchrun, in a SLURM job and on two Ray nodes.

All on this machine and on gloo: a driver's tool on PATH lists two GPUs, and the check of torch's build is left out
(tests/gloo_site). The reference is a stage of the local executor with `gpus: 2`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fake_slurm
import pytest
from processes import MAIN, ROOT, finish, start
from rl_job import environment, words, write_job

pytestmark = pytest.mark.slow

SETTINGS = "--steps 3 --prompts-per-step 4 --n 3 --save-every 2 --eval-every 3 --strategy ddp"
FILES = ("model.safetensors", "ema/model.safetensors", "metrics.jsonl", "samples.jsonl")
PIPELINE = """
stages:
  rl:
    command: rlhf
    options: {{policy: {job}/policy, prompts: {job}/prompts.jsonl, heldout: {job}/prompts.jsonl, reward_fn: judge:judge,
      max_new_tokens: 16, temperature: 1, learning_rate: 1e-3, warmup_steps: 0, mu: 0.3, eval_prompts: 6,
      steps: 3, prompts_per_step: 4, n: 3, save_every: 2, eval_every: 3, strategy: ddp}}
    resources: {{cpus: 1, gpus: {gpus}, nodes: {nodes}}}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = write_job(tmp_path_factory.mktemp("hosts"))
    tool = root / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA A, 80000\\nNVIDIA A, 80000\\n'\n")
    tool.chmod(0o755)
    return root


def variables(job: Path, **more: str) -> dict[str, str]:
    found = {**environment(job), "PATH": f"{job / 'bin'}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", **more}
    return {**found, "PYTHONPATH": f"{ROOT / 'tests' / 'gloo_site'}:{job}"}


def run_stage(job: Path, out: str, gpus: int, nodes: int, *more: str, env: dict[str, str]) -> Path:
    """Run the pipeline of one stage; its output."""
    file = job / f"{out}.yaml"
    file.write_text(PIPELINE.format(job=job, gpus=gpus, nodes=nodes))
    line = ["pipeline", "run", file, "--out", out, *more]
    code, _, err = finish(start(MAIN, *line, cwd=job, env=env))
    assert code == 0, err + "".join(path.read_text() for path in (job / out / "logs").glob("*.log"))
    return job / out / "rl"


@pytest.fixture(scope="module")
def reference(job):
    """A gang of two processes on this machine, by the local executor."""
    env = variables(job, CUDA_VISIBLE_DEVICES="0,1")
    found = run_stage(job, "local", 2, 1, env=env)
    manifest = json.loads((found / "gemma2.json").read_text())
    assert (manifest["processes"], manifest["config"]["gpus"], manifest["config"]["nodes"]) == (2, 2, 1)
    return found


def assert_same(found: Path, reference: Path) -> None:
    assert json.loads((found / "gemma2.json").read_text())["processes"] == 2
    for name in FILES:
        assert (found / name).read_bytes() == (reference / name).read_bytes(), name


def test_two_hosts_of_torchrun(job, reference):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    shared += ["--master-addr", "localhost", "--master-port", port]
    command = ["-m", "--", "gemma2.cli.main", *words(job, job / "torchrun", SETTINGS)]
    hosts = [
        subprocess.Popen(
            [*shared, "--node-rank", str(rank), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=variables(job),
        )
        for rank in range(2)
    ]
    ends = [finish(host) for host in hosts]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert_same(job / "torchrun", reference)


def test_two_machines_of_a_slurm_job(job, reference, tmp_path):
    cluster = tmp_path / "slurm"
    env = {**variables(job), **{k: v for k, v in fake_slurm.install(cluster).items() if k == "FAKE_SLURM"}}
    env["PATH"] = f"{cluster / 'bin'}:{env['PATH']}"
    (cluster / "gres").write_text("gpu:1\n")
    found = run_stage(job, "slurm", 1, 2, "--executor", "slurm", env=env)
    options = json.loads((cluster / "jobs" / "1" / "options.json").read_text())
    assert (options["nodes"], options["gres"], options["cpus-per-task"]) == ("2", "gpu:1", "1")
    assert_same(found, reference)
    assert (job / "slurm" / "logs" / "rl.node-1.yaml").is_file()


@pytest.fixture
def nodes(job):
    """A Ray cluster of two nodes with a GPU each, as far as Ray knows; its address."""
    script = Path(__file__).with_name("ray_nodes.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, str(script)], env=variables(job), **pipes)
    address = process.stdout.readline().strip()
    pids = []
    for _ in range(2):
        process.stdin.write("add\n")
        process.stdin.flush()
        pids.append(int(process.stdout.readline()))
    yield address, pids
    process.communicate("")


@pytest.mark.ray
def test_two_nodes_of_a_ray_cluster(job, reference, nodes):
    env = variables(job)
    found = run_stage(job, "ray", 1, 2, "--executor", "ray", "--ray-address", nodes[0], env=env)
    assert_same(found, reference)
