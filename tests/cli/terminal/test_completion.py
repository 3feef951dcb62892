"""What the shell offers after TAB, through typer's own protocol, without torch."""

import json
import os
import subprocess

import pytest
from processes import start
from waiting import PATIENCE

from gemma2.configs import recipes

# Answers every line of stdin in one process, and says whether that imported anything heavy.
COMPLETE = """
import contextlib, io, json, os, sys
from gemma2.cli.main import main
answers = {}
for line in json.load(sys.stdin):
    words = line.split("|")[0].split(" ")
    os.environ |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            main()
        except SystemExit as end:
            assert end.code in (0, None), (line, end.code)
    answers[line] = said.getvalue().split()
heavy = {"torch", "transformers", "numpy", "numba"} & {*sys.modules}
assert not heavy, heavy
json.dump(answers, sys.stdout)
"""
PIPELINE = """
stages:
  data: {command: filter, options: {data: rows}}
  sft: {command: sft, options: {model: m, data: "${data.out}"}}
  sweep: {command: sft, matrix: {seed: [1, 2]}, options: {model: m, data: "${data.out}"}}
"""


# Line -> what bash would offer; `|` is the place of the cursor.
OFFERED = {
    "gemma2 sf|": ["sft"],
    "gemma2 merge dar|": ["dare", "dare-ties"],
    "gemma2 merge plan dar|": ["dare", "dare-ties"],
    "gemma2 help rewa|": ["reward"],
    "gemma2 help reward pr|": ["probe"],
    "gemma2 warp --config warp-p|": ["warp-paper"],
    "gemma2 warp --config warp-2b|": ["warp-2b-24gb", "warp-2b-80gb", "warp-2b-8x80gb"],
    "gemma2 recipes show |": [*recipes()],
    "gemma2 recipes show warp-2b-m|": ["warp-2b-multi-node"],
    "gemma2 recipes plan distill-2b|": ["distill-2b-24gb", "distill-2b-80gb"],
    "gemma2 config check warp-p|": ["warp-paper"],
    "gemma2 config schema pip|": ["pipeline"],
    "gemma2 pipeline run |": [
        "align",
        "merge-search",
        "quickstart",
        "warp-27b-multi-node",
        "warp-2b-multi-node",
        "warp-9b-multi-node",
    ],
    "gemma2 quickstart --config q|": ["quickstart"],
    "gemma2 sft --end-of-turn |": ["eot", "eot+eos"],
    "gemma2 sft --report-to wandb,t|": ["wandb,tensorboard", "wandb,trackio"],
    "gemma2 pipeline run p.yaml --only |": ["sweep", "data", "sft", "sweep/seed-1", "sweep/seed-2"],
    "gemma2 pipeline run p.yaml --jobs 2 --from s|": ["sweep", "sft", "sweep/seed-1", "sweep/seed-2"],
    "gemma2 pipeline run p.yaml --out o --force sw|": ["sweep", "sweep/seed-1", "sweep/seed-2"],
    "gemma2 pipeline run broken.yaml --only |": [],
    "gemma2 pipeline run gone.yaml --only |": [],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    (folder / "p.yaml").write_text(PIPELINE)
    (folder / "broken.yaml").write_text("stages: [")
    environment = {**os.environ, "_GEMMA2_COMPLETE": "complete_bash"}
    process = start(COMPLETE, cwd=folder, env=environment, stdin=subprocess.PIPE)
    out, err = process.communicate(json.dumps([*OFFERED]), timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("line", OFFERED)
def test_completion_offers(answers, line):
    assert answers[line] == OFFERED[line]
