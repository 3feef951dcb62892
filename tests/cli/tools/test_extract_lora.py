"""`gemma2 merge extract-lora` as a user runs it."""

import json
import re
import shlex

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2.cli.main import run

CONFIG = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "tie_word_embeddings": True}
UP = "model.layers.0.mlp.up_proj.weight"


def gemma2(command: str) -> int:
    """The exit code of a command line."""
    return run(shlex.split(command))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """b = a + diag(3, 2, 1) in the only linear layer: rank 2 holds 13/14 of the squared difference."""
    monkeypatch.chdir(tmp_path)
    for name, step in {"a": 0, "b": 1}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        weight = np.eye(3, dtype=np.float32) + step * np.diag([3, 2, 1]).astype(np.float32)
        save_file({UP: weight, "model.norm.weight": np.ones(3, np.float32)}, tmp_path / name / "model.safetensors")
    return tmp_path


def test_the_adapter_merges_into_the_model_that_was_derived_by_hand(models, capsys):
    assert gemma2("merge extract-lora b --base a --rank 2 --out lora") == 0
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [
        ["group", "adapted", "rank", "norm", "error", "explained"],
        ["layers.0", "1", "2", "3.742", "0.2673", "0.9286"],
    ]
    assert ["output", "lora"] in lines
    assert gemma2("merge linear a+lora --out back -q") == 0
    merged = load_file(models / "back/model.safetensors")[UP]
    np.testing.assert_allclose(merged, np.diag([4, 3, 1]), atol=1e-6)


@pytest.mark.parametrize(("share", "rank"), [(0.6, 1), (0.9, 2), (0.93, 3), (1, 3)])
def test_a_share_gives_the_rank_that_holds_it(models, capsys, share, rank):
    assert gemma2(f"merge extract-lora b --base a --explained {share} --out lora --json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["output"], document["largest_rank"], document["explained"] >= share - 1e-9) == ("lora", rank, True)
    assert document["groups"][0]["rank"] == document["tensors"][0]["rank"] == rank


def test_a_dry_run_writes_nothing_and_needs_no_out(models, capsys):
    assert gemma2("merge extract-lora b --base a --rank 2 --dry-run") == 0
    assert "bytes to write at most" in capsys.readouterr().out
    assert sorted(path.name for path in models.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("b --base a --rank 2", 2, "--out is missing"),
        ("b --base a --out lora", 2, "--explained 0.95"),
        ("b --base nowhere --rank 2 --out lora", 1, "base nowhere is not a directory"),
        ("b --rank 2 --out lora", 2, "name it: --base"),
        ("b --base a --rank 2 --out a", 1, "overlap"),
        ("a --base a --rank 2 --out lora", 1, "does not differ"),
        ("b --base a --rank 2 --save-modules up_prj --out lora", 2, "did you mean 'up_proj'"),
        ("b --base a --rnk 2 --out lora", 2, "--rank"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_leaves_nothing(models, capsys, command, code, message):
    before = sorted(models.rglob("*"))
    assert gemma2(f"merge extract-lora {command}") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(models.rglob("*")) == before


def test_the_card_says_that_it_is_an_adapter(models):
    gemma2("merge extract-lora b --base a --rank 2 --out lora -q")
    card = (models / "lora/README.md").read_text()
    assert "library_name: peft" in card
    assert "AutoPeftModelForCausalLM" in card
    assert str(models) not in card
    assert gemma2("inspect lora -q") == 0
