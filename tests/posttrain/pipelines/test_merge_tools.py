"""extract-lora and replace-tokenizer as stages: checked before, skipped while their inputs are the same, made again."""

import json
import shutil

import numpy as np
import pytest
from model_files import added, random_arrays, read_model, write_model
from stages import Inline, compiled
from tokenizer_models import LETTERS, model, write_tokenizer

from gemma2.core.errors import Gemma2Error
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.audit.remake import recorded_config
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.decision import Choice
from gemma2.posttrain.pipelines.run import Watcher, run_stages
from gemma2.posttrain.runs.commands import COMMANDS, output_hash, spell
from gemma2.posttrain.schemas import ExtractLoraConfig, ReplaceTokenizerConfig


@pytest.fixture
def root(tmp_path):
    base = random_arrays(0)
    model(tmp_path / "base", base)
    changed = {name: array * name.endswith("_proj.weight") for name, array in random_arrays(1, 0.1).items()}
    model(tmp_path / "tuned", added(base, changed))
    (tmp_path / "donor").mkdir()
    write_tokenizer(tmp_path / "donor", LETTERS[:6], [("<new>", 6)])
    (tmp_path / "donor/chat_template.jinja").write_text("{{ one }}")
    return tmp_path


def stages(root, **changes):
    lora = {"model": str(root / "tuned"), "base": str(root / "base"), "rank": 2} | changes
    return {
        "lora": {"command": "merge extract-lora", "options": lora},
        "again": {"command": "merge linear", "options": {"models": ["${lora.out}"]}},
        "other": {
            "command": "merge replace-tokenizer",
            "options": {"model": "${again.out}", "tokenizer": str(root / "donor")},
        },
    }


def run(root, **changes):
    pipeline = compiled(stages(root, **changes), root / "out")
    plan = check_pipeline(pipeline)
    pipeline.root.mkdir(exist_ok=True)
    run_stages(pipeline, plan, executor := Inline(), choice=Choice(), observer=Watcher())
    return executor.started


def edit_model(root):
    arrays = read_model(root / "tuned")
    name = next(name for name in arrays if name.endswith("up_proj.weight"))
    write_model(root / "tuned", arrays | {name: arrays[name] + 0.01}, config={"vocab_size": 16})
    write_tokenizer(root / "tuned", LETTERS)


def edit_base(root):
    arrays = {
        name: array + np.where(array == array.max(), 0.01, 0) for name, array in read_model(root / "base").items()
    }
    arrays = {n: a if n.endswith("_proj.weight") else read_model(root / "base")[n] for n, a in arrays.items()}
    write_model(root / "base", arrays, config={"vocab_size": 16})
    write_tokenizer(root / "base", LETTERS)


def edit_template(root):
    (root / "donor/chat_template.jinja").write_text("{{ two }}")


def edit_donor(root):
    write_tokenizer(root / "donor", LETTERS[:6], [("<newer>", 6)])


ALL = ["lora", "again", "other"]


@pytest.mark.parametrize(
    ("happen", "started"), [(edit_model, ALL), (edit_base, ALL), (edit_template, ["other"]), (edit_donor, ["other"])]
)
def test_a_stage_runs_again_when_one_of_its_inputs_changes(root, happen, started):
    assert run(root) == ALL
    assert run(root) == []
    happen(root)
    assert run(root) == started
    assert run(root) == []


def test_a_setting_counts_and_a_moved_input_does_not(root):
    assert run(root) == ALL
    assert run(root, rank=3)[0] == "lora"
    shutil.move(root / "tuned", root / "elsewhere")
    assert run(root, rank=3, model=str(root / "elsewhere")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": None}, "stages.lora: extract-lora needs a rank"),
        ({"base": "nowhere/at/all"}, "nowhere/at/all is not a directory"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(root, changes, message):
    with pytest.raises(Gemma2Error, match=message):
        run(root, **changes)
    assert not (root / "out/lora").exists()


def test_the_record_of_a_tool_is_that_of_its_configuration_and_it_can_be_made_again(root):
    run(root)
    for name, schema in (("lora", ExtractLoraConfig), ("other", ReplaceTokenizerConfig)):
        manifest = read_manifest(root / "out" / name)
        command = COMMANDS[manifest["command"]]
        config, changed = recorded_config(root / "out" / name, manifest, manifest["command"], command)
        assert isinstance(config, schema)
        assert changed == []
        assert output_hash(manifest).startswith("blake3:")
        assert spell(manifest["command"], config, root / "o").startswith(f"gemma2 {manifest['command']} ")


def test_a_retokenised_model_has_the_template_of_the_donor(root):
    run(root)
    assert (root / "out/other/chat_template.jinja").read_text() == "{{ one }}"
    roles = [one["path"] for one in json.loads((root / "out/other/gemma2.json").read_text())["data"]]
    assert {path.rpartition("/")[2] for path in roles} == {"chat_template.jinja", "tokenizer.json"}
