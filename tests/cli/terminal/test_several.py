"""A command line with `--gpus`: what is wrong with it is said before processes are started, whose code is its own."""

import os

import pytest
from light_model import light_model

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.launch import starting


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two GPUs in the list of the driver; what would be started on them, whose exit code is 3."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H, 80000'\necho 'NVIDIA H, 80000'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    light_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 20, encoding="utf-8")
    found = []
    monkeypatch.setattr(starting, "run_processes", lambda processes: found.append(processes.words) or 3)
    return found


LINE = "sft --model model --data rows.jsonl --out out --gpus 2"


def test_the_processes_get_the_line_as_it_was_typed_and_their_code_is_the_commands(runs, tmp_path):
    assert invoke(LINE.split()) == 3
    assert runs == [tuple(LINE.split())]
    assert not (tmp_path / "out").exists()


def test_a_recipe_asks_for_several_too(runs, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: model\ndata: rows.jsonl\ngpus: 2\nstrategy: fsdp\n", encoding="utf-8")
    assert invoke(["sft", "--config", "recipe.yaml", "--out", "out"]) == 3
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        (LINE.replace("--model model", "--model gone"), InputError, "gone"),
        (
            f"{LINE} --batch-size 3",
            UsageError,
            "3 is not a multiple of the 2 processes; give --batch-size 4",
        ),
        (f"{LINE} --set trainer.deepspeed=x", UsageError, "--strategy"),
        (LINE.replace("--gpus 2", "--gpus 3"), UsageError, "--gpus 3, and 2 of this machine are visible"),
        (f"{LINE} --nodes 2", UsageError, "PET_NODE_RANK=K PET_MASTER_ADDR=HOST gemma2 sft --model model"),
        (LINE.replace("--gpus 2", "--gpus 0"), UsageError, "--gpus 0"),
        (f"{LINE} --strategy zero", UsageError, "strategy"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(runs, line, kind, said):
    with pytest.raises(kind) as caught:
        invoke(line.split())
    assert said in str(caught.value) and runs == []


def test_a_dry_run_starts_nothing(runs):
    assert invoke(f"{LINE} --dry-run --json".split()) == 0
    assert runs == []
