"""The same DAG on a Ray cluster that is started here: the same hashes and bytes, failures, logs, lost workers."""

import json
import os
import signal

import pytest
from processes import MAIN, finish, start
from waiting import wait_for

from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.pipelines.freshness import output_hash
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.ray

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
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    return finish(start(MAIN, "pipeline", "run", "p.yaml", "--out", out, *more, cwd=place, env=environment))


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


def test_a_lost_worker_is_tried_again(place):
    rows = (json.dumps({"prompt": f"What is {i} times {i % 7}? " * 8, "completion": "It is."}) for i in range(40_000))
    (place / "many.jsonl").write_text("\n".join(rows))
    options = ["--set", "clean.data=many.jsonl", "--set", "stages.clean.retries=1", "--only", "clean"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    words = ["pipeline", "run", "p.yaml", "--out", "lost", "--executor", "ray", *options]
    process = start(MAIN, *words, cwd=place, env=environment)
    wait_for(lambda: worker_of(place / "lost" / ".clean.lock") or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    os.kill(worker_of(place / "lost" / ".clean.lock"), signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert "its process was ended by SIGKILL" in err
    assert "attempt 2 of 2" in err


def worker_of(lock) -> int | None:
    """The process that has this file open."""
    from pathlib import Path

    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) == str(lock) for entry in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:
            continue
    return None
