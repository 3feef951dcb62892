"""Nodes of a Ray cluster are killed at ten random moments: the pipeline ends with the bytes of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import MAIN, children_of, finish, start
from waiting import pause, wait_for

from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.runs.commands import output_hash
from gemma2.posttrain.tiny.networks import save_random

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KILLS = 10
NAMES = ("first", "second", "mean", "third", "clean")
TRAIN = "{model: %s, data: rows.jsonl, max_steps: 12, batch_size: 2, save_every: 2, max_length: 64}"
PIPELINE = f"""
resources: {{cpus: 1}}
stages:
  clean: {{command: filter, retries: 20, options: {{data: many.jsonl, workers: 1}}}}
  first: {{command: sft, retries: 20, options: {TRAIN % "m1"}}}
  second: {{command: sft, retries: 20, options: {TRAIN % "m2"}}}
  mean: {{command: merge linear, retries: 20, options: {{models: ["${{first.out}}", "${{second.out}}"]}}}}
  third: {{command: sft, retries: 20, options: {TRAIN % '"${mean.out}"'}}}
"""


@pytest.fixture
def place(tmp_path):
    for number in (1, 2):
        save_random(tmp_path / f"m{number}", seed=number)
    rows = [json.dumps({"prompt": f"What is two plus {i}?", "completion": "Count."}) for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    texts = (f"What is {i} times {i % 7}? " * 8 for i in range(8_000))
    rows = [json.dumps({"prompt": text, "completion": "It is."}) for text in texts]
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    (tmp_path / "p.yaml").write_text(PIPELINE)
    return tmp_path


@pytest.fixture
def nodes():
    """The process that holds the cluster; its address."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray takes a dead node for alive, and places stages there, for 15 s by default.
    environment |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
    script = Path(__file__).with_name("ray_nodes.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, str(script)], env=environment, **pipes)
    yield process, process.stdout.readline().strip()
    process.communicate("")


def add(process) -> int:
    process.stdin.write("add\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def node_at_work(raylets: list[int]) -> int | None:
    """A node on which the process of a stage runs: below a raylet, a worker and its fork server."""
    for raylet in raylets:
        for server in children_of(raylet):
            if "fork_server" in command_of(server) and children_of(server):
                return raylet
    return None


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def digests(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in NAMES:
        manifest = read_manifest(root / name)
        found[name] = output_hash(manifest)
        found |= {f"{name}/{file}": one["digest"] for file, one in manifest["files"].items() if file != "README.md"}
    return found


def test_nodes_that_are_lost_at_random_moments_change_nothing(place, nodes):
    holder, address = nodes
    code, _, err = finish(start(MAIN, "pipeline", "run", "p.yaml", "--out", "whole", "--quiet", cwd=place))
    assert code == 0, err
    expected = digests(place / "whole")
    raylets = [add(holder), add(holder)]
    kills = runs = lost = 0
    while kills < KILLS:
        out = f"run-{runs}"
        runs += 1
        words = ["pipeline", "run", "p.yaml", "--out", out, "--executor", "ray", "--ray-address", address]
        with (place / f"{out}.err").open("w") as log:
            process = start(MAIN, *words, "--jobs", "2", cwd=place, stdout=subprocess.DEVNULL, stderr=log)
            wait_for(lambda out=out, process=process: (place / out).exists() or process.poll() is not None)
            while process.poll() is None and kills < KILLS:
                wait_for(lambda process=process: node_at_work(raylets) or process.poll() is not None)
                pause(random.uniform(0.0, 2.0))
                node = node_at_work(raylets)  # it may have come to its end
                if node:
                    os.kill(node, signal.SIGKILL)
                    kills += 1
                    raylets.remove(node)
                    raylets.append(add(holder))
            code = process.wait()
        err = (place / f"{out}.err").read_text()
        assert code == 0, err
        assert "Traceback" not in err
        lost += err.count("its worker was lost (NodeDiedError); attempt")
        assert digests(place / out) == expected
    assert lost >= KILLS // 2  # a stage may end in the moment before its node is seen to be lost
