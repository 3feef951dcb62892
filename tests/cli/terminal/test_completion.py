"""What the shell offers after TAB, through typer's own protocol, without torch."""

import os

import pytest
from processes import finish, start

from gemma2.configs import recipes

COMPLETE = """
import sys
from gemma2.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "numpy", "numba"} & {*sys.modules}
    assert not heavy, heavy
"""
PIPELINE = """
stages:
  data: {command: filter, options: {data: rows}}
  sft: {command: sft, options: {model: m, data: "${data.out}"}}
  sweep: {command: sft, matrix: {seed: [1, 2]}, options: {model: m, data: "${data.out}"}}
"""


def offered(folder, line):
    """The words that bash would offer; `|` is the place of the cursor."""
    words = line.split("|")[0].split(" ")
    environment = {
        "_GEMMA2_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    code, out, err = finish(start(COMPLETE, cwd=folder, env={**os.environ, **environment}))
    assert (code, err) == (0, "")
    return out.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gemma2 sf|", ["sft"]),
        ("gemma2 merge dar|", ["dare", "dare-ties"]),
        ("gemma2 merge plan dar|", ["dare", "dare-ties"]),
        ("gemma2 help rewa|", ["reward"]),
        ("gemma2 help reward pr|", ["probe"]),
        ("gemma2 warp --config |", ["warp-paper"]),
        ("gemma2 config show |", [*recipes()]),
        ("gemma2 pipeline run |", ["align", "quickstart"]),
        ("gemma2 quickstart --config |", ["align", "quickstart"]),
        ("gemma2 sft --end-of-turn |", ["eot", "eot+eos"]),
        ("gemma2 sft --report-to wandb,t|", ["wandb,tensorboard", "wandb,trackio"]),
        ("gemma2 pipeline run p.yaml --only |", ["sweep", "data", "sft", "sweep/seed-1", "sweep/seed-2"]),
        ("gemma2 pipeline run p.yaml --jobs 2 --from s|", ["sweep", "sft", "sweep/seed-1", "sweep/seed-2"]),
        ("gemma2 pipeline run p.yaml --out o --force sw|", ["sweep", "sweep/seed-1", "sweep/seed-2"]),
        ("gemma2 pipeline run broken.yaml --only |", []),
        ("gemma2 pipeline run gone.yaml --only |", []),
    ],
)
def test_completion_offers(tmp_path, line, words):
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "broken.yaml").write_text("stages: [")
    assert offered(tmp_path, line) == words
