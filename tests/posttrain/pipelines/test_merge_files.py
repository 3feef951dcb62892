"""Files that a merge stage names besides models are inputs: an edited one makes the stage again."""

import json

import pytest
from model_files import random_arrays, write_model
from stages import Inline, compiled

from gemma2.core.errors import InputError
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.decision import Choice
from gemma2.posttrain.pipelines.run import Watcher, run_stages

FILES = {
    "chat_template": ("mine.jinja", "{{ one }}", "{{ two }}"),
    "generation_config": ("asking.json", '{"eos_token_id": [1]}', '{"eos_token_id": [2]}'),
    "special_tokens": ("tokens.json", '{"eos_token": "<a>"}', '{"eos_token": "<b>"}'),
}


@pytest.mark.parametrize("option", FILES)
def test_an_edited_file_makes_the_stage_again_and_a_moved_one_does_not(tmp_path, option):
    name, first, second = FILES[option]
    for seed, model in enumerate("ab"):
        write_model(tmp_path / model, random_arrays(seed))
    (tmp_path / name).write_text(first)
    options = {"models": [str(tmp_path / model) for model in "ab"], option: str(tmp_path / name)}

    def made():
        pipeline = compiled({"s": {"command": "merge linear", "options": options}}, tmp_path / "out")
        plan = check_pipeline(pipeline, contents=False)
        pipeline.root.mkdir(exist_ok=True)
        run_stages(pipeline, plan, executor := Inline(), choice=Choice(), observer=Watcher())
        return executor.started == ["s"], plan.stages["s"].why

    assert made()[0]
    assert made() == (False, ())
    (tmp_path / name).write_text(second)
    again, why = made()
    assert again
    assert any(str(tmp_path / name) in line for line in why)
    manifest = json.loads((tmp_path / "out/s/gemma2.json").read_text())
    assert [one["role"] for one in manifest["data"]] == [option]
    (tmp_path / name).rename(tmp_path / f"moved-{name}")
    options[option] = str(tmp_path / f"moved-{name}")
    assert made() == (False, ())
    del options[option]
    assert made()[0]


@pytest.mark.parametrize("option", ["generation_config", "special_tokens"])
def test_a_file_that_is_not_there_is_refused_before_anything_runs(tmp_path, option):
    for seed, model in enumerate("ab"):
        write_model(tmp_path / model, random_arrays(seed))
    options = {"models": [str(tmp_path / model) for model in "ab"], option: str(tmp_path / "gone.json")}
    pipeline = compiled({"s": {"command": "merge linear", "options": options}}, tmp_path / "out")
    with pytest.raises(InputError, match=f"stages.s.*{option}.*gone.json is not a file"):
        check_pipeline(pipeline)
