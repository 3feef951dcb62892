"""The folder of a pipeline: what is written beside the stages, and which folders are refused."""

import json

import pytest
from stages import Inline, compiled

from gemma2.core.errors import OutputError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.staging import locked
from gemma2.core.progress import SILENT
from gemma2.posttrain.pipelines.compile import compile_pipeline
from gemma2.posttrain.pipelines.decision import Choice
from gemma2.posttrain.pipelines.run import run_pipeline
from gemma2.posttrain.pipelines.scheduler import StageFailed
from gemma2.posttrain.schemas import PipelineFile
from gemma2.posttrain.schemas.config import load_yaml, validated

STAGES = {
    "a": {"command": "make", "options": {"value": "${vars.x}"}},
    "b": {"command": "make", "options": {"model": "${a.out}"}},
}


def pipeline(root, x=1.0, stages=STAGES):
    return compiled(stages, root, vars={"x": x})


def test_a_run_leaves_the_file_that_runs_it_again(tmp_path):
    run_pipeline(pipeline(tmp_path / "out"), Inline())
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["command"], manifest["status"]) == ("pipeline", "complete")
    for name in ("pipeline.yaml", "gemma2.json"):
        again = compile_pipeline(validated(PipelineFile, load_yaml(tmp_path / "out" / name)), tmp_path / "out")
        executor = Inline()
        run_pipeline(again, executor)
        assert executor.started == []
    hashes = {name: stage["hash"] for name, stage in manifest["summary"]["stages"].items()}
    assert len(set(hashes.values())) == 2


def test_a_pipeline_that_fails_after_a_change_is_not_called_complete(tmp_path):
    run_pipeline(pipeline(tmp_path / "out"), Inline())
    broken = {**STAGES, "c": {"command": "make", "options": {"fail": "mend it"}}}
    with pytest.raises(StageFailed):
        run_pipeline(pipeline(tmp_path / "out", stages=broken), Inline())
    assert read_manifest(tmp_path / "out") is None
    assert json.loads((tmp_path / "out" / "pipeline.json").read_text())["status"] == "failed"


def test_a_part_of_a_pipeline_is_not_called_complete_either(tmp_path):
    run_pipeline(pipeline(tmp_path / "out"), Inline(), choice=Choice(within=frozenset({"a"})))
    assert read_manifest(tmp_path / "out") is None


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        run_pipeline(pipeline(tmp_path / "mine"), Inline())
    run_pipeline(pipeline(tmp_path / "out"), Inline())
    with pytest.raises(OutputError, match="output of another command"):
        run_pipeline(pipeline(tmp_path / "out" / "a"), Inline())


def test_two_runs_to_one_folder_do_not_mix(tmp_path):
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="another gemma2 process is writing"):
        run_pipeline(pipeline(tmp_path / "out"), Inline())


def test_the_output_of_a_stage_that_was_renamed_is_named(tmp_path):
    notes = []

    class Heard(type(SILENT)):
        def note(self, text):
            notes.append(text)

    run_pipeline(pipeline(tmp_path / "out"), Inline(), progress=Heard())
    assert notes == []
    renamed = {"first": STAGES["a"], "b": {"command": "make", "options": {"model": "${first.out}"}}}
    run_pipeline(pipeline(tmp_path / "out", stages=renamed), Inline(), progress=Heard())
    assert notes == [
        f"{tmp_path / 'out' / 'a'} (make) is the output of no stage of this file: a was renamed or dropped"
    ]
