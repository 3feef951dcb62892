"""Policies that do not differ from the start: the front, the choice and the card say so, and rank nothing."""

import json
import shutil

import pytest
import torch
from policies import Said, manifest, pareto_config, two_iterations
from safetensors.torch import load_file, save_file

from gemma2.cli.app import invoke
from gemma2.core.rounding import SAME_AS_START
from gemma2.posttrain.evaluation.pareto import run_pareto
from gemma2.posttrain.evaluation.pick import run_pick
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import PickConfig

DRAWN = True


def moved(source, target, scale):
    """A copy of a model whose weights have moved by `scale` of their norm, in a direction that depends on its name."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    torch.manual_seed(len(str(target)))
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: w + scale * w.norm() / w.numel() ** 0.5 * torch.randn_like(w) for name, w in weights.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.fixture(scope="module", params=[0.0, 1e-12, 1e-7], ids=["copies", "1e-12", "1e-7"])
def still(request, tmp_path_factory):
    """(the run, its front, the warnings) of a policy and a merge that are the start, but for rounding."""
    root = two_iterations(tmp_path_factory.mktemp("still"))
    here = root / "iteration-1"
    for name, command in (("policy-1", "rlhf"), ("slerp", "merge slerp")):
        moved(root / "sft", here / name, request.param)
        manifest(here / name, command=command)
    said = Said()
    run_pareto(pareto_config(root, 1), RunOptions(here / "front"), said)
    return root, here / "front", said.warnings


def test_the_front_says_so_in_one_line_and_has_no_area_and_no_best_point(still):
    _, front, warnings = still
    document = json.loads((front / "front.json").read_text())
    summary = json.loads((front / "gemma2.json").read_text())["summary"]
    assert len(warnings) == 1
    assert warnings[0].startswith(SAME_AS_START)
    assert "larger --learning-rate" in warnings[0]
    for found in (document, summary):
        assert found["differs"] is False
        assert found["hypervolume"] is None
        assert found["hypervolume_low"] is None
        assert found["best_at"] == []
    assert summary["best"] is None


def test_the_picture_says_so_instead_of_drawing_rounding(still):
    text = (still[1] / "front.svg").read_text()
    assert "do not differ from the start" in text
    assert "reward on held-out prompts" not in text


def test_a_second_front_of_such_policies_gains_nothing(still, tmp_path):
    root, front, _ = still
    said = Said()
    found = run_pareto(pareto_config(root, fronts=(front,)), RunOptions(tmp_path / "both"), said).summary
    assert found["hypervolume_gain"] is None
    assert found["improved"] is False
    assert found["flat"] == 1
    assert len(said.warnings) == 1


def test_pick_warns_and_its_card_says_so(still, tmp_path):
    said = Said()
    run_pick(PickConfig(front=still[1]), RunOptions(tmp_path / "model"), said)
    assert any(SAME_AS_START in line for line in said.warnings)
    card = (tmp_path / "model" / "README.md").read_text()
    assert SAME_AS_START.capitalize() in card
    assert "Hypervolume" not in card


def test_the_screen_has_the_sentence_and_no_front(still, tmp_path, capsys):
    root = still[0]
    words = f"--sft {root}/sft --reward-fn policies:reward --prompts {root}/heldout.jsonl --max-new-tokens 6"
    assert invoke(f"pareto {words} --policies {root}/iteration-1/policy-1 --out {tmp_path}/f".split()) == 0
    captured = capsys.readouterr()
    assert SAME_AS_START in captured.err
    assert "front\n" not in captured.out
    assert "best point" not in captured.out


def test_one_policy_of_several_is_named_and_the_front_is_drawn(still, tmp_path):
    root = still[0]
    shutil.copytree(root, tmp_path / "run")
    moved(root / "sft", tmp_path / "run/iteration-1/slerp", 0.3)
    manifest(tmp_path / "run/iteration-1/slerp", command="merge slerp")
    said = Said()
    found = run_pareto(pareto_config(tmp_path / "run", 1), RunOptions(tmp_path / "front"), said).summary
    assert found["differs"] is True
    assert found["hypervolume"] is not None
    assert [line.partition(" ")[0] for line in said.warnings] == ["policy-1"]
    assert "does not differ from the start" in said.warnings[0]
