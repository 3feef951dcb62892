"""Outputs of other pipelines stand for a stage if they are the same work, whole, and of the same versions."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from random_pipelines import MIX, Recording, contents, world_versions
from random_pipelines import World as RandomWorld
from stages import compiled

from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.pipelines import shelf
from gemma2.posttrain.pipelines.check import check_pipeline, look_at_pipeline
from gemma2.posttrain.pipelines.decision import Choice
from gemma2.posttrain.pipelines.run import Watcher, run_stages
from gemma2.posttrain.pipelines.scheduler import StageFailed
from gemma2.posttrain.pipelines.shelf import Shelf
from gemma2.posttrain.runs.commands import COMMANDS

STAGES = {
    "a": {"command": "mix", "options": {"value": 1}},
    "b": {"command": "mix", "options": {"model": "${a.out}", "data": ["${a.out}"], "value": 2}},
    "c": {"command": "mix", "options": {"models": ["${a.out}", "${b.out}"], "text": "x${b.summary.value}"}},
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    found = RandomWorld(tmp_path, None)
    monkeypatch.setitem(COMMANDS, "mix", MIX)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with world_versions(found):
        run(tmp_path / "one", STAGES)
        yield found


def run(root: Path, stages, *directories: Path) -> list[str]:
    """Run, looking for outputs below these directories; what was started. The plan and the status say the same."""
    pipeline, executor, choice = compiled(stages, root), Recording(), Choice(shelf=Shelf(directories))
    pipeline.root.mkdir(parents=True, exist_ok=True)
    plan = check_pipeline(pipeline, choice, contents=False)
    looked = look_at_pipeline(pipeline, replace(choice, shelf=Shelf(directories)))
    actions = {name: one.action for name, one in plan.stages.items()}
    assert actions == {name: one.action for name, one in looked.items()}
    run_stages(pipeline, plan, executor, choice=choice, observer=Watcher())
    assert {name for name, action in actions.items() if action in ("skip", "reuse")}.isdisjoint(executor.started)
    return executor.started


def test_the_same_work_elsewhere_is_linked_and_is_then_current_here(world, tmp_path):
    assert run(tmp_path / "two", STAGES, tmp_path / "one") == []
    for name in STAGES:
        here, there = tmp_path / "two" / name, tmp_path / "one" / name
        assert contents(here) == contents(there)
        assert os.path.samefile(here / "model.safetensors", there / "model.safetensors")
        assert not os.path.samefile(here / "gemma2.json", there / "gemma2.json")
    manifest = read_manifest(tmp_path / "two" / "c")
    assert [parent["path"] for parent in manifest["parents"]] == ["../a", "../b"]
    assert manifest["reused_from"] == "../../one/c"
    assert run(tmp_path / "two", STAGES) == run(tmp_path / "one", STAGES) == []


def test_another_name_of_a_stage_does_not_matter(world, tmp_path):
    renamed = json.loads(json.dumps(STAGES).replace("a.out", "first.out").replace('"a":', '"first":'))
    assert run(tmp_path / "two", renamed, tmp_path / "one") == []


def test_what_differs_is_made_and_what_needs_it_too(world, tmp_path):
    changed = {**STAGES, "b": {"command": "mix", "options": {"model": "${a.out}", "value": 3}}}
    assert run(tmp_path / "two", changed, tmp_path / "one") == ["b", "c"]


def test_a_damaged_output_stands_for_nothing(world, tmp_path):
    path = tmp_path / "one" / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert run(tmp_path / "two", {"a": STAGES["a"]}, tmp_path / "one") == ["a"]


def test_an_output_of_other_versions_stands_for_nothing(world, tmp_path):
    world.versions["numpy"] = "2"
    assert run(tmp_path / "two", {"a": STAGES["a"]}, tmp_path / "one") == ["a"]


def test_a_forced_stage_is_made(world, tmp_path):
    pipeline = compiled(STAGES, tmp_path / "two")
    choice = Choice(force=frozenset({"a"}), shelf=Shelf([tmp_path / "one"]))
    assert check_pipeline(pipeline, choice, contents=False).stages["a"].action == "again"


def test_on_another_disk_files_are_copied(world, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(shelf.os, "link", refuse)
    assert run(tmp_path / "two", STAGES, tmp_path / "one") == []
    assert contents(tmp_path / "two" / "c") == contents(tmp_path / "one" / "c")
    assert not os.path.samefile(tmp_path / "two/a/model.safetensors", tmp_path / "one/a/model.safetensors")


def test_a_full_disk_fails_the_stage_in_one_line_and_leaves_nothing(world, tmp_path, monkeypatch):
    def full(path, document):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(shelf, "write_json", full)
    with pytest.raises(StageFailed, match=r"stage a: .*No space left on device"):
        run(tmp_path / "two", {"a": STAGES["a"]}, tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["pipeline.json"]


def test_folders_that_are_not_outputs_are_passed_over(world, tmp_path):
    (tmp_path / "one" / "broken").mkdir()
    (tmp_path / "one" / "broken" / "gemma2.json").write_text("{")
    assert run(tmp_path / "two", STAGES, tmp_path / "one", tmp_path / "nowhere") == []


def test_an_output_that_holds_other_outputs_is_made_again(world, tmp_path):
    inner = tmp_path / "one" / "a" / "inner"
    inner.mkdir()
    (inner / "gemma2.json").write_text(json.dumps({"status": "complete", "files": {}}))
    assert run(tmp_path / "two", STAGES, tmp_path / "one") == ["a"]
