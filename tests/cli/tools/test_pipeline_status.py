"""`pipeline status` reads and never refuses; plan, status and run say the same in unusual situations."""

import json

import pytest
import yaml
from model_files import random_arrays, write_model
from stages import Inline

from gemma2.cli.main import run as call_words
from gemma2.posttrain.pipelines import run


def call(*words):
    return call_words([*words])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A finished pipeline of two merges with relative paths, run in `tmp_path / "place"`."""
    place = tmp_path / "place"
    (place / "base").mkdir(parents=True)
    monkeypatch.chdir(place)
    write_model(place / "base", random_arrays(0))
    monkeypatch.setattr(run, "executor_of", lambda *given, **more: Inline())
    stages = {"a": {"command": "merge passthrough", "options": {"models": ["base"]}}}
    stages["b"] = {"command": "merge passthrough", "options": {"models": ["${a.out}"]}}
    (place / "p.yaml").write_text(yaml.safe_dump({"stages": stages}))
    assert call("pipeline", "run", "p.yaml", "--out", "out", "--quiet") == 0
    return place


def states(capsys, *words):
    """Stage -> status, note, by `pipeline status --json`, which ends with 0."""
    capsys.readouterr()
    assert call("pipeline", "status", *words, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    return {row["stage"]: (row["status"], row["note"] or "") for row in rows}


def test_status_of_an_input_that_was_moved_away_says_so(made, capsys):
    (made / "base").rename(made / "elsewhere")
    found = states(capsys, "out")
    assert found["a"][0] == "unknown" and "base cannot be read" in found["a"][1]
    assert found["b"][0] == "to be seen"


def test_status_and_run_of_a_folder_take_its_relative_paths_from_where_it_was_run(made, capsys, monkeypatch):
    (made.parent / "other").mkdir()
    monkeypatch.chdir(made.parent / "other")
    assert {status for status, _ in states(capsys, str(made / "out")).values()} == {"complete"}
    monkeypatch.chdir(made.parent / "other")
    assert call("pipeline", "run", "../place/out") == 0
    assert "ran 0" in " ".join(capsys.readouterr().out.split())


def test_status_of_a_folder_that_was_moved_with_its_inputs_finds_them(made, capsys, monkeypatch):
    monkeypatch.chdir(made.parent)
    made.rename(made.parent / "moved")
    assert {status for status, _ in states(capsys, "moved/out").values()} == {"complete"}


@pytest.mark.parametrize("name", ["pipeline.json", "gemma2.json", "a/gemma2.json"])
def test_a_cut_record_stops_neither_status_nor_run(made, capsys, name):
    (made / "out" / name).write_text('{"sta')
    found = states(capsys, "out")
    assert found["a"][0] == ("changed" if name.startswith("a/") else "complete")
    for more in ([], ["--force", "b"]):
        assert call("pipeline", "run", "out", *more) == 0
    assert {status for status, _ in states(capsys, "out").values()} == {"complete"}


def test_a_forced_stage_is_made_again_also_where_its_record_is_cut(made, capsys):
    (made / "out" / "a" / "gemma2.json").write_text("")
    assert call("pipeline", "run", "out", "--force", "a") == 0
    assert json.loads((made / "out" / "a" / "gemma2.json").read_text())["status"] == "complete"


def test_a_stage_of_another_version_is_named_by_plan_status_and_run(made, capsys):
    path = made / "out" / "a" / "gemma2.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"numpy": "1.0"}}))
    assert "numpy (1.0 -> " in states(capsys, "out")["a"][1]
    for more, stream in ((["--dry-run"], "out"), ([], "err")):
        assert call("pipeline", "run", "out", *more) == 0
        shown = " ".join(getattr(capsys.readouterr(), stream).split())
        assert "numpy (1.0 -> " in shown, more
