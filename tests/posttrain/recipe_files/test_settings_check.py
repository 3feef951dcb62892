"""`gemma2 config check`: every fault of a file at once, at its place, with the key that was meant."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from gemma2.configs import recipes
from gemma2.core.errors import Gemma2Error, UsageError
from gemma2.core.yaml_files import closest
from gemma2.merging.methods.option import OPTIONS
from gemma2.posttrain.foreign.counterparts import is_foreign
from gemma2.posttrain.recipe_files.schema_index import commands_with_settings, schema_for, with_inputs
from gemma2.posttrain.recipe_files.settings_check import check_file
from gemma2.posttrain.schemas import MergeConfig, PipelineFile, Resources, StageFile
from gemma2.posttrain.schemas.config import ValueSource
from gemma2.posttrain.schemas.messages import explained_each

SCHEMAS = commands_with_settings() | {"merge": MergeConfig, "pipeline": PipelineFile, "stage": StageFile}
SCHEMAS |= {"resources": Resources}


def slips(key: str) -> set[str]:
    """A key with one letter left out, or two neighbours swapped."""
    shorter = {key[:at] + key[at + 1 :] for at in range(len(key))}
    return shorter | {key[:at] + key[at + 1] + key[at] + key[at + 2 :] for at in range(len(key) - 1)} - {key}


def typos_of(schema: type) -> Iterator[tuple[str, str]]:
    """(typo, key) of each key.

    Left out: a typo that is a key, is one of another key too, is an option of another tool (which has an answer of its
    kind), or has no letter left.
    """
    made: dict[str, set[str]] = {}
    for key in schema.model_fields:
        for typo in sorted(slips(key)):
            made.setdefault(typo, set()).add(key)
    yield from (
        (typo, *keys)
        for typo, keys in made.items()
        if typo and typo not in schema.model_fields and len(keys) == 1 and not is_foreign(typo)
    )


@pytest.fixture
def faults(tmp_path):
    def of(text: str, command: str = "") -> list[tuple[str, str, str]]:
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding="utf-8")
        report = check_file(path, command)
        assert all(one.where.startswith(f"{path}:") and one.fix for one in report.faults)
        return [(one.where.removeprefix(f"{path}:"), one.what, one.fix) for one in report.faults]

    return of


# --- typos ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_key_with_one_slip_is_answered_with_the_key_that_was_meant(name):
    keys = [*SCHEMAS[name].model_fields]
    wrong = {typo: closest(typo, keys) for typo, key in typos_of(SCHEMAS[name]) if key not in closest(typo, keys)}
    assert wrong == {}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_report_of_a_file_says_the_key_that_was_meant(name):
    schema, one_each = SCHEMAS[name], {key: typo for typo, key in typos_of(SCHEMAS[name])}
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(dict.fromkeys(one_each.values(), "x"))
    told = {error.what: error.hint for error in explained_each(schema, caught.value.errors(), ValueSource())}
    for key, typo in one_each.items():
        assert key in told[f"unknown key '{typo}'"], (typo, told[f"unknown key '{typo}'"])


def test_a_slip_is_likelier_than_a_similar_word():
    assert closest("ebta", ["eta", "beta"]) == "did you mean 'beta'?"
    assert closest("pcus", ["gpus", "cpus"]) == "did you mean 'cpus'?"
    assert closest("um", ["mu", "columns"]) == "did you mean 'mu'?"
    assert closest("x", ["t", "mu"]).startswith("valid: ")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes())
def test_what_comes_with_the_package_has_no_fault(name):
    assert check_file(recipes()[name]).faults == ()


@pytest.mark.parametrize("name", commands_with_settings())
def test_a_recipe_without_inputs_has_no_fault(name):
    schema_for(name).model_validate(with_inputs(schema_for(name), {}))


def test_every_fault_of_a_recipe_is_found_at_its_place(faults):
    text = "# gemma2 sft: mine\nlearning_rat: 1e-4\nlora_rank: x\nepochs: 0\ntrainer: {adam_bta1: 0.8, nothing: 1}\n"
    found = faults(text)
    assert [where for where, *_ in found] == ["2:1", "3:12", "4:9", "5:11", "5:27"]
    assert [what.split(" in ")[0] for _, what, _ in found] == [
        "unknown key 'learning_rat'",
        "'lora_rank' = 'x' is not a whole number",
        "'epochs' = 0 is not above 0",
        "unknown key 'trainer.adam_bta1'",
        "unknown key 'trainer.nothing'",
    ]
    assert "learning_rate" in found[0][2] and "adam_beta1" in found[3][2]


def test_what_keys_say_together_is_checked_when_each_is_right(faults):
    ((where, what, _),) = faults("# gemma2 sft: mine\nmax_steps: 5\nkeep: best\n")
    assert "keep=best and patience compare held-out losses" in what and where == "3:7"


PIPELINE = """\
vars: {seed: 0, prompts: p.jsonl}
resorces: {cpus: 1}
stages:
  a:
    comand: generate
    options: {teacher: t}
  sft:
    command: sft
    matrix: {sed: [1, 2], lora_rank: [8, 16]}
    options:
      model: m
      data: ["${a.outt}", "${b.out}"]
      epochs: many
      seed: ${vars.sed}
  merged:
    command: merge slrp
    options: {models: [x]}
  last:
    command: merge slerp
    options: {modles: ["${sft.out}", b], base: c, t: x}
    after: [stf]
    when: ${sfft.summary.loss} < 1
"""


def test_every_fault_of_a_pipeline_is_found_at_its_place(faults):
    found = faults(PIPELINE)
    assert [(where, fix) for where, _, fix in found] == [
        ("2:1", "did you mean 'resources'?"),
        ("5:5", "did you mean 'command'?"),
        ("9:14", "did you mean 'seed'?"),
        ("12:14", "write ${a.out}"),
        ("12:27", "valid: a, last, merged, sft"),
        ("13:15", "give a number >0"),
        ("14:13", "did you mean 'seed'?"),
        ("16:14", "did you mean 'merge slerp'?"),
        ("20:15", "did you mean 'models'?"),
        ("20:54", "give a number"),
        ("21:13", "did you mean 'sft'?"),
        ("22:11", "did you mean 'sft'?"),
    ]


def test_a_circle_of_stages_is_found_when_every_key_is_right(faults):
    stage = "{{command: filter, options: {{data: '${{{}.out}}'}}}}"
    ((_, what, fix),) = faults(f"stages:\n  a: {stage.format('b')}\n  b: {stage.format('a')}\n")
    assert "need each other" in what and fix == "break the circle"


def test_every_fault_of_a_merge_is_found_at_its_place(faults):
    found = faults("method: slerpp\nmodles: [a, b]\nbase: 3\ndtpye: bfloat16\nt: high\n")
    assert [where for where, *_ in found] == ["1:1", "2:1", "3:7", "4:1", "5:4"]
    assert [fix for *_, fix in found if "mean" in fix] == [
        f"did you mean '{one}'?" for one in ("slerp", "models", "dtype")
    ]


def test_every_fault_of_a_file_for_mergekit_is_found_at_its_place(faults):
    text = (
        "merge_method: ties\nmodels:\n  - model: a\n    parameters: {wieght: 0.5}\n"
        "  - model: b\n    paramters: {weight: 0.5}\nbase_model: c\ndtpye: bfloat16\n"
    )
    assert [(where, fix) for where, _, fix in faults(text)] == [
        ("4:18", "did you mean 'weight'?"),
        ("6:5", "did you mean 'parameters'?"),
        ("8:1", "did you mean 'dtype'?"),
    ]


@pytest.mark.parametrize("option", [name for name in OPTIONS if len(name) > 1])
def test_an_option_of_merges_with_one_slip_is_answered_with_it(faults, option):
    typo = option[1] + option[0] + option[2:]
    (found,) = [one for one in faults(f"method: linear\nmodels: [a, b]\n{typo}: 1\n") if typo in one[1]]
    assert found[2] == f"did you mean '{option}'?"


def test_the_command_of_a_file_is_that_of_its_first_line_its_keys_or_the_caller(tmp_path):
    path = tmp_path / "file.yaml"
    for text, command, kind in (
        ("# gemma2 reward pairs: x\nn: 4\n", "", "reward pairs"),
        ("policy: a\nmu: 0.1\n", "", "rlhf"),
        ("seed: 1\nbatch_size: 4\n", "distill", "distill"),
        ("method: linear\nmodels: [a, b]\n", "", "merge"),
        ("stages: {a: {command: tiny}}\n", "", "pipeline"),
    ):
        path.write_text(text, encoding="utf-8")
        assert check_file(path, command).kind == kind
    path.write_text("nothing: 1\n", encoding="utf-8")
    with pytest.raises(Gemma2Error, match="no key of any command"):
        check_file(path)
    with pytest.raises(UsageError, match="did you mean 'sft'"):
        check_file(path, "sftt")


def test_a_file_of_another_tool_is_one_fault_with_the_way_to_import_it(faults):
    ((_, _, fix),) = faults("base_model: a\nlora_r: 8\nnum_epochs: 1\nmicro_batch_size: 2\nsequence_len: 512\n", "sft")
    assert "gemma2 config import" in fix


def test_a_secret_is_a_fault(faults):
    ((_, what, _),) = faults("# gemma2 generate: x\nengine: openai\nrequest: {api_key: sk-1234567890abcdefghij}\n")
    assert "is not accepted" in what


def test_the_settings_of_an_output_are_checked_too(tmp_path):
    path = tmp_path / "gemma2.json"
    path.write_text('{"command": "sft", "config": {"model": "a", "data": ["b"], "epoch": 1}}', encoding="utf-8")
    (fault,) = check_file(Path(path)).faults
    assert fault.fix == "did you mean 'epochs'?"
