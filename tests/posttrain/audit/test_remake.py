"""Verify --fix: exactly what is damaged is made again, and what comes out is compared with what was recorded."""

import json
import shutil
from dataclasses import dataclass, field

import pytest
from lineages import DAMAGES, lineage, made, stages_of
from stages import Inline, compiled, write_text_model

from gemma2.core.outputs.digest_cache import stamp_of, store
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.posttrain.audit.remake import Remade, Tools, remake
from gemma2.posttrain.audit.verification import verify
from gemma2.posttrain.pipelines.run import Watcher, run_pipeline


@dataclass
class Shop:
    """The tools of `remake`, and the stages that it ran."""

    pipelines: dict = field(default_factory=dict)
    executors: list = field(default_factory=list)

    def executor(self):
        self.executors.append(Inline())
        return self.executors[-1]

    @property
    def ran(self):
        return [stage for executor in self.executors for stage in executor.started]

    def fix(self, *paths):
        return remake(verify(paths), Tools(self.pipelines.__getitem__, self.executor, lambda pipeline: Watcher()))


@pytest.fixture
def place(tmp_path):
    """A pipeline that was run as the command does it."""
    pipeline = lineage(tmp_path)
    run_pipeline(pipeline, Inline())
    return pipeline


def shop(pipeline):
    return Shop({pipeline.root.resolve(): pipeline})


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_exactly_the_damaged_stages_are_made_again_with_the_recorded_bytes(place, damage, name):
    for stage in ("b", "e"):
        DAMAGES[damage](place.root / stage / name)
    found, tools = verify([place.root]), shop(place)
    assert found.broken == [place.root / "b", place.root / "e"]
    assert sorted(tools.fix(place.root), key=str) == [Remade(place.root / "b"), Remade(place.root / "e")]
    assert tools.ran == ["b", "e"]
    assert verify([place.root]).faults == ()
    assert read_manifest(place.root)["status"] == "complete"


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / MANIFEST).write_text("{"),
        lambda out: shutil.rmtree(out),
    ],
)
def test_a_stage_without_a_readable_manifest_is_made_again(place, damage):
    damage(place.root / "b")
    tools = shop(place)
    assert [(one.problem, one.compared) for one in tools.fix(place.root)] == [("", False)]
    assert tools.ran == ["b"] and verify([place.root]).faults == ()


def test_the_record_of_the_pipeline_itself_is_not_guessed(place):
    (place.root / MANIFEST).write_text("{")
    (one,) = shop(place).fix(place.root)
    assert "remove it" in one.problem


def test_nothing_is_trained_again_for_what_only_people_read(place):
    (place.root / "b" / "README.md").write_text("edited")
    tools = shop(place)
    (one,) = tools.fix(place.root)
    assert "only README.md is damaged" in one.problem and "--force" in one.problem
    assert tools.ran == [] and len(verify([place.root]).faults) == 1
    DAMAGES["flipped"](place.root / "b" / "config.json")
    assert [one.same for one in tools.fix(place.root)] == [True]
    assert tools.ran == ["b"] and verify([place.root]).faults == ()


def test_a_stage_whose_damage_the_run_would_not_see_is_made_again(place, monkeypatch):
    monkeypatch.setattr("gemma2.core.outputs.digest_cache._not_before", lambda stamp: 0)
    monkeypatch.setattr("gemma2.posttrain.audit.disk_reading.store", lambda *digest: None)  # a cache that is read-only
    path = place.root / "b" / "model.safetensors"
    before = digest_file(path)
    DAMAGES["flipped"](path)
    for kind in ("file", "tensors"):
        store(kind, [path], [stamp_of(path)], 1, before)
    tools = shop(place)
    assert [one.same for one in tools.fix(place.root)] == [True]
    assert tools.ran == ["b"]


def test_what_depends_on_other_bytes_runs_again(place, monkeypatch):
    DAMAGES["flipped"](place.root / "b" / "model.safetensors")
    monkeypatch.setattr("stages.text_of", lambda directory: "other")  # as with another version of a library
    tools = shop(place)
    assert tools.fix(place.root) == [Remade(place.root / "b", other=("model.safetensors",))]
    assert tools.ran == ["b", "d"]
    assert verify([place.root]).faults == ()


def test_stages_that_are_not_damaged_do_not_run_although_they_would(place):
    DAMAGES["flipped"](place.root / "b" / "model.safetensors")
    stages = stages_of(place.root.parent)
    stages["e"] = {"command": "make", "options": {"value": 6}}  # the user has edited the file meanwhile
    tools = shop(compiled(stages, place.root))
    assert [one.same for one in tools.fix(place.root)] == [True]
    assert tools.ran == ["b"]


def test_a_single_output_is_made_by_its_recorded_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lineage(tmp_path)
    out = made(tmp_path / "alone", model="raw", data="rows.jsonl", value=7)
    DAMAGES["gone"](out / "config.json")
    before = read_manifest(out)["files"]
    monkeypatch.chdir("/")  # the record says where its relative paths start from
    assert Shop().fix(out) == [Remade(out)]
    assert read_manifest(out)["files"] == before and verify([out]).faults == ()


def test_outputs_are_made_after_those_that_they_need(tmp_path):
    first = made(tmp_path / "z", value=1)
    second = made(tmp_path / "y", model=first, value=2)
    third = made(tmp_path / "x", model=second, value=3)
    for out in (first, second, third):
        DAMAGES["cut"](out / "model.safetensors")
    assert Shop().fix(third) == [Remade(third), Remade(second), Remade(first)]
    assert verify([third]).faults == ()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda place: DAMAGES["longer"](place / "rows.jsonl"), "the content of"),
        (lambda place: write_text_model(place / "raw", "case"), "the weights of model"),
        (lambda place: (place / "rows.jsonl").unlink(), "rows.jsonl"),
        (lambda place: (place / "raw").rename(place / "away"), "raw"),
    ],
)
def test_an_output_whose_inputs_are_gone_or_changed_is_not_made(tmp_path, change, cause):
    lineage(tmp_path)
    out = made(tmp_path / "alone", model=tmp_path / "raw", data=tmp_path / "rows.jsonl", value=7)
    DAMAGES["flipped"](out / "model.safetensors")
    change(tmp_path)
    (one,) = Shop().fix(out)
    assert cause in one.problem and "\n" not in one.problem and "cannot be made again" in one.problem


def test_an_output_without_its_command_is_not_made(tmp_path):
    out = made(tmp_path / "alone", value=7)
    path = out / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "command": "unheard"}))
    DAMAGES["flipped"](out / "config.json")
    (one,) = Shop().fix(out)
    assert "does not record the command that made it" in one.problem
    path.write_text("{")
    (one,) = Shop().fix(out)
    assert "is not readable JSON" in one.problem
