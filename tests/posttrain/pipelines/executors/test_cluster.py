"""The same DAG on a Ray cluster that is started here: the same hashes and bytes, failures, logs, lost workers."""

import json
import os
import signal
from pathlib import Path

import pytest
from processes import MAIN, children_of, finish, start, wait_until_gone
from waiting import wait_for

from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.runs.commands import output_hash
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.ray

# Ray waits a minute for a head that is gone.
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
PIPELINE = """
stages:
  clean: {command: filter, options: {data: rows.jsonl, workers: 1}}
  again: {command: filter, options: {data: "${clean.out}", workers: 1, min_words: 1}}
  mean: {command: merge linear, options: {models: [m1, m2]}}
  scaled: {command: merge passthrough, options: {models: ["${mean.out}"]}, matrix: {scale: [0.5, 2.0]}}
  end: {command: merge linear, options: {models: ["${scaled.out}", "${mean.out}"]}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("ray")
    for number in (1, 2):
        save_random(root / f"m{number}", seed=number)
    row = {"prompt": "What is two plus two?", "completion": "It is four, as you can count on your fingers."}
    rows = [json.dumps({**row, "prompt": f"{row['prompt']} ({i})"}) for i in range(8)]
    (root / "rows.jsonl").write_text("\n".join(rows))
    (root / "p.yaml").write_text(PIPELINE)
    return root


def run(place, out, *more):
    return finish(start(MAIN, "pipeline", "run", "p.yaml", "--out", out, *more, cwd=place, env=ENVIRONMENT))


def test_the_same_dag_gives_the_same_hashes_and_bytes(place):
    code, _, err = run(place, "local", "--jobs", "2")
    assert code == 0, err
    code, out, err = run(place, "ray", "--jobs", "2", "--executor", "ray", "--json")
    assert code == 0, err
    assert json.loads(out)["ran"] == 6
    for name in ("clean", "again", "mean", "scaled/scale-0.5", "scaled/scale-2.0", "end"):
        here, there = read_manifest(place / "local" / name), read_manifest(place / "ray" / name)
        assert output_hash(here) == output_hash(there), name
        digests = [{k: v["digest"] for k, v in m["files"].items() if k != "README.md"} for m in (here, there)]
        assert digests[0] == digests[1], name
    assert (place / "ray" / "logs" / "end.log").exists()
    code, out, _ = run(place, "ray", "--executor", "ray", "--json")
    assert json.loads(out)["ran"] == 0  # and no cluster was started for that


def test_an_error_of_a_stage_is_one_line_with_its_exit_code(place):
    code, _, err = run(place, "bad", "--executor", "ray", "--quiet", "--set", "clean.data=m1/config.json")
    assert code == 1, err
    assert err.splitlines()[-1].startswith("error: stage clean: ")
    assert "Traceback" not in err


def begin(place, out, *more):
    """A pipeline whose stage has a minute of work, and has begun."""
    if not (place / "many.jsonl").exists():
        rows = (
            json.dumps({"prompt": f"What is {i} times {i % 7}? " * 8, "completion": "It is."}) for i in range(40_000)
        )
        (place / "many.jsonl").write_text("\n".join(rows))
    words = ["pipeline", "run", "p.yaml", "--out", out, "--executor", "ray", "--set", "clean.data=many.jsonl"]
    process = start(MAIN, *words, "--only", "clean", *more, cwd=place, env=ENVIRONMENT)
    lock = place / out / ".clean.lock"
    wait_for(lambda: worker_of(lock) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process, worker_of(lock)


@pytest.mark.parametrize(("worker", "said"), [(False, "process was ended by SIGKILL"), (True, "worker was lost (Work")])
def test_a_lost_process_or_worker_is_tried_again(place, worker, said):
    out = f"lost-{worker}"
    process, stage = begin(place, out, "--set", "stages.clean.retries=1")
    os.kill(ancestors(stage)[1] if worker else stage, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert said in err
    assert "attempt 2 of 2" in err


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_cluster_that_is_lost_is_one_line_and_stdout_is_ours(place, name):
    out = f"without-{name}"
    process, stage = begin(place, out, "--json", "--quiet")
    server = ancestors(stage)[0]
    os.kill(next(pid for pid in children_of(process.pid) if name_of(pid) == name), signal.SIGKILL)
    code, document, err = finish(process)
    assert code == 1, err
    assert "the Ray cluster on this machine was lost" in json.loads(document)["error"]["what"]
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].endswith("and give the same command: it goes on")
    assert "Traceback" not in err
    assert "[0m" not in err  # Ray's colours
    wait_until_gone({stage, server})  # Ray's agents stay a minute longer


def test_an_interrupt_ends_stages_in_order_and_the_cluster_with_them(place):
    process, _ = begin(place, "interrupted")
    family = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, ""), err
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted")
    wait_until_gone(family)


def test_a_stage_that_no_node_can_take_says_so(place):
    asked = ["--set", "stages.clean.resources.cpus=99", "--set", "stages.clean.resources.gpus=1", "--only", "clean"]
    words = ["pipeline", "run", "p.yaml", "--out", "large", "--executor", "ray", *asked]
    process = start(MAIN, *words, cwd=place, env=ENVIRONMENT)
    line = next(line for line in process.stderr if "waits" in line)
    family = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    assert "stage clean waits for 99 CPUs and 1 GPUs, which no node of the Ray cluster has" in line
    assert finish(process)[0] == 143
    wait_until_gone(family)


def ancestors(pid: int) -> list[int]:
    """The fork server of a stage, the Ray worker, the raylet, ..."""
    found = [pid]
    while found[-1] > 1:
        found.append(int(Path(f"/proc/{found[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
    return found[1:]


def name_of(pid: int) -> str:
    try:
        return Path(Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]).name
    except OSError:
        return ""


def worker_of(lock) -> int | None:
    """The process that has this file open."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) == str(lock) for entry in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:
            continue
    return None
