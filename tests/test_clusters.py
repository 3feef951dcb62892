"""The files of docs/clusters.md do what it says: their shell text runs, with stand-ins for the cluster's programs.

Each `gemma2` line that comes out is accepted by the real parser with --dry-run, and the variables of the cluster say
which machine is which.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from processes import ROOT
from rl_job import write_job

from gemma2.cli.app import invoke
from gemma2.posttrain.launch.nodes import JOBS, Meeting, meeting_of
from gemma2.posttrain.pipelines.executors.slurm_script import slurm_settings
from gemma2.posttrain.tiny.networks import save_random

PLACE = ROOT / "docs" / "clusters"
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
STAND_INS = {
    # prints its words, and the variables that it was given, as a line of JSON
    "gemma2": 'python3 -c "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))" "$@"',
    # one copy on each machine
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done\nfor i in $(seq 0 $((SLURM_NNODES - 1))); do '
    'SLURM_NODEID=$i "$@"; done',
    "ray": 'echo "ray $*"',
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What the files find on the shared disk, with models of a few weights."""
    place = write_job(tmp_path_factory.mktemp("shared"))
    (place / "policy").rename(place / "sft")
    save_random(place / "reward", kind="reward")
    (place / "rows.jsonl").write_text(json.dumps({"prompt": "How much is 1?", "completion": "It is 1."}) + "\n")
    stages = {"clean": {"command": "filter", "options": {"data": str(place / "rows.jsonl")}}}
    (place / "align.yaml").write_text(yaml.safe_dump({"stages": stages}))
    return place


def run(text: str, shared: Path, *words: str, **variables: str) -> list[str]:
    """The lines that a shell text prints, with the programs of the cluster replaced."""
    tools = shared / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PET_", "SKYPILOT"))}
    env = {**kept, "PATH": f"{tools}:{os.environ['PATH']}", "SHARED": str(shared), **variables}
    assert subprocess.run(["bash", "-n", "-c", text], capture_output=True).returncode == 0
    done = subprocess.run(["bash", "-c", text, "script", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def started(lines: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The words and variables of every `gemma2` that was started."""
    return [tuple(json.loads(line)) for line in lines if line.startswith("[")]


def accepted(words: list[str], capsys) -> None:
    assert invoke([*words, "--dry-run", "--json"]) == 0
    assert "plan" in json.loads(capsys.readouterr().out)


def meeting(words: list[str], variables: dict[str, str]) -> Meeting:
    return meeting_of(int(words[words.index("--nodes") + 1]), words, variables)


def test_the_batch_script_starts_one_command_on_each_machine(shared, capsys):
    text = (PLACE / "slurm.sbatch").read_text()
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert (given["nodes"], given["ntasks-per-node"], given["gres"]) == ("2", "1", "gpu:8")
    found = started(run(text, shared, SLURM_NNODES="2", SLURM_JOB_NODELIST="gpu[07-08]", SLURM_JOB_ID="4242"))
    assert found[0][0] == found[1][0] and found[0][0][0] == "rlhf"
    assert [meeting(*one) for one in found] == [Meeting(2, node, "gpu07", 29500 + 242) for node in (0, 1)]
    accepted(found[0][0], capsys)


def test_the_task_of_skypilot_starts_the_command_with_its_variables(shared, capsys):
    task = yaml.safe_load((PLACE / "sky.yaml").read_text())
    assert task["num_nodes"] == 2 and task["envs"]["SHARED"] in task["file_mounts"]
    assert task["resources"]["accelerators"].endswith(":8")
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    ((words, variables),) = started(run(task["run"], shared, **node, SKYPILOT_NUM_GPUS_PER_NODE="8"))
    assert meeting(words, variables) == Meeting(2, 1, "10.0.0.1", 29500)
    assert words[words.index("--gpus") + 1] == "8"
    accepted(words, capsys)


def test_the_pods_of_kubernetes_are_numbered_and_meet_at_the_first(shared, capsys):
    service, job = yaml.safe_load_all((PLACE / "kubernetes.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]}
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables.pop("PET_NODE_RANK") is None  # from the index of the pod
    index = next(one["valueFrom"]["fieldRef"]["fieldPath"] for one in container["env"] if "valueFrom" in one)
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert variables["PET_MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"  # the name of pod 0 of an indexed Job
    assert variables["SHARED"] == next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "shared")
    assert container["command"] == ["bash", "-c"]
    given = {**variables, "SHARED": str(shared), "PET_NODE_RANK": "1"}
    ((words, found),) = started(run(container["args"][0], shared, **given))
    assert meeting(words, found) == Meeting(2, 1, f"{name}-0.gemma2", 29500)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(words[words.index("--gpus") + 1])
    accepted(words, capsys)


def test_the_script_of_ray_starts_a_cluster_and_runs_a_pipeline_on_it(shared, capsys):
    text = (PLACE / "ray.sh").read_text()
    (head,) = run(text, shared, "head", HEAD="10.0.0.1")
    (worker,) = run(text, shared, HEAD="10.0.0.1")
    assert head.startswith("ray start --head --node-ip-address 10.0.0.1 --port 6379")
    assert worker == "ray start --address 10.0.0.1:6379"
    ((words, variables),) = started(run(text, shared, "run", HEAD="10.0.0.1"))
    assert variables["RAY_AUTH_MODE"] == "token"
    accepted(words, capsys)


def test_the_page_names_every_file_and_the_variables_that_are_read():
    for path in PLACE.iterdir():
        assert f"(clusters/{path.name})" in PAGE
    for job in JOBS:
        assert all(f"`{name}`" in PAGE for name in (*job.count, job.node, *job.hosts))


def test_the_settings_that_the_page_names_are_accepted():
    names = {"account", "partition", "time", "mem", "qos", "constraint"}
    assert all(f"`{name}`" in PAGE for name in names)
    assert slurm_settings([f"{name}=x" for name in names]).keys() == names
    assert slurm_settings(["gres=gpu:h100:8", "exclusive"]) == {"gres": "gpu:h100:8", "exclusive": ""}
