"""pipeline diff: each pair of outputs is in the state that its change puts it in, with both values."""

import json
import shutil

import pytest
from lineages import lineage, made, stages_of
from stages import compiled, run

from gemma2.core.errors import InputError
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.posttrain.audit.run_difference import compare_runs


@pytest.fixture
def runs(tmp_path):
    """A finished run and its copy."""
    pipeline = lineage(tmp_path)
    shutil.copytree(pipeline.root, tmp_path / "other")
    return pipeline.root, tmp_path / "other"


def rerun(folder, change):
    """Run the pipeline with other stages in the other folder."""
    stages = stages_of(folder.parent)
    change(stages)
    run(compiled(stages, folder))


def states(first, second):
    found = compare_runs(first, second)
    json.dumps(found)
    return {one["stage"]: one["state"] for one in found["stages"] if one["state"] != "same"}


def row(first, second, name):
    return next(one for one in compare_runs(first, second)["stages"] if one["stage"] == name)


def edited(output, **changes):
    path = output / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_copy_is_the_same_in_the_order_of_the_stages(runs):
    assert states(*runs) == {}
    assert [one["stage"] for one in compare_runs(*runs)["stages"]] == ["a", "b", "c", "d", "e"]


def test_a_setting_and_what_follows_from_it(runs):
    rerun(runs[1], lambda stages: stages["b"]["options"].update(value=9))
    assert states(*runs) == dict.fromkeys("bd", "made from something else")
    changed = row(*runs, "b")
    assert changed["differences"] == [{"what": "value", "a": 2.0, "b": 9.0}]
    assert changed["summary"] == [{"figure": "value", "a": 2.0, "b": 9.0}]
    (followed,) = row(*runs, "d")["differences"]
    assert followed["what"] == "the weights of models ../b" and followed["a"] != followed["b"]


def test_an_input_that_changed(runs):
    (runs[0].parent / "rows.jsonl").write_text('{"prompt": "other", "completion": "z"}\n')
    rerun(runs[1], lambda stages: None)
    assert states(*runs) == {"c": "made from something else"}
    assert row(*runs, "c")["differences"][0]["what"] == "the content of ../../rows.jsonl"


def test_the_same_work_with_other_bytes_names_files_and_machine(runs):
    path = runs[1] / "e" / "model.safetensors"
    was = {"size": path.stat().st_size, "digest": digest_file(path)}
    files = json.loads((runs[1] / "e" / MANIFEST).read_text())["files"]
    edited(runs[1] / "e", files={**files, path.name: {"size": 7, "digest": "blake3:0"}})
    unexplained = row(*runs, "e")
    assert unexplained["state"] == "other bytes" and "nothing that is recorded" in unexplained["note"]
    assert unexplained["differences"] == [{"what": path.name, "a": was, "b": {"size": 7, "digest": "blake3:0"}}]
    edited(runs[1] / "e", versions={"torch": "0.1"}, hardware={"cpus": 1000}, processes=4)
    (runs[1] / "pipeline.yaml").write_text("resources: {cpus: 3}\nstages: {e: {command: make}}\n")
    named = {one["what"]: one["b"] for one in row(*runs, "e")["differences"]}
    assert named["torch"] == "0.1" and named["hardware: cpus"] == 1000 and named["processes"] == 4
    assert named["threads (cpus of the pipeline)"] == 3


def test_files_for_people_are_no_difference(runs):
    files = json.loads((runs[1] / "e" / MANIFEST).read_text())["files"]
    edited(runs[1] / "e", files={**files, "metrics.jsonl": {"size": 7, "digest": "blake3:0"}})
    assert states(*runs) == {}


def test_stages_of_one_run_only_and_renamed_ones(runs):
    (runs[1] / "e").rename(runs[1] / "renamed")
    shutil.rmtree(runs[1] / "d")
    made(runs[1] / "new", value=77)
    assert states(*runs) == {"d": f"only in {runs[0]}", "new": f"only in {runs[1]}"}
    assert row(*runs, "e")["note"] == f"called renamed in {runs[1]}"


def test_two_outputs_are_compared_whatever_they_are_called(tmp_path):
    first, second = made(tmp_path / "x", value=1), made(tmp_path / "y", value=2)
    assert states(first, second) == {".": "made from something else"}


def test_records_that_cannot_be_compared_say_so(runs):
    (runs[1] / "a" / MANIFEST).write_text("{")
    edited(runs[1] / "b", schema_version=1)
    assert states(*runs) == {"a": "not comparable", "b": "not comparable"}
    assert "is not readable JSON" in row(*runs, "a")["note"] and "record different things" in row(*runs, "b")["note"]


def test_a_folder_without_outputs_is_one_line(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(InputError, match="give the output of a gemma2 command"):
            compare_runs(runs[0], path)
