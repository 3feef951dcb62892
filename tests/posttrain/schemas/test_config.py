"""Recipe < --set < flags, strict about keys and values; every field is described, bounded and read somewhere."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field
from pydantic_core import PydanticUndefined

from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain import schemas
from gemma2.posttrain.schemas.config import Config, ValueSource, load_yaml, parse_value, resolve, to_yaml, validated

ROOT = Path(__file__).resolve().parents[3]


class Inner(Config):
    depth: int = Field(1, ge=0, description="an inner number")


class Sample(Config):
    rate: float = Field(0.1, gt=0, lt=1, description="a rate")
    steps: int = Field(10, ge=1, description="a count")
    model: Path | None = Field(None, description="a path")
    kind: Literal["a", "b"] = Field("a", description="a choice")
    etas: tuple[float, ...] = Field((0.0, 1.0), description="a list")
    trainer: dict[str, Any] = Field(default_factory=dict, description="a mapping")
    inner: Inner = Field(default_factory=Inner, description="a section")


class Strict(Config):
    needed: Path = Field(description="a path")


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- precedence -------------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_set_and_set_over_the_recipe(recipe):
    file = recipe("rate: 0.2\nsteps: 20\nkind: b\n")
    config = resolve(Sample, file=file, sets=["rate=0.3", "steps=30"], flags={"rate": 0.4, "steps": None})
    assert (config.rate, config.steps, config.kind) == (0.4, 30, "b")


def test_a_later_set_wins_over_an_earlier_one():
    assert resolve(Sample, sets=["steps=2", "steps=3"]).steps == 3


def test_a_nested_set_keeps_its_siblings(recipe):
    file = recipe("trainer: {adam_beta1: 0.8, optim: sgd}\n")
    config = resolve(Sample, file=file, sets=["trainer.adam_beta1=0.7", "inner.depth=3"])
    assert config.trainer == {"adam_beta1": 0.7, "optim": "sgd"}
    assert config.inner.depth == 3


def test_set_takes_keys_spelled_as_flags():
    class Spelled(Config):
        learning_rate: float = 1.0

    assert resolve(Spelled, sets=["learning-rate=2"]).learning_rate == 2.0


@pytest.mark.parametrize("item", ["steps", "=3", ""])
def test_a_set_without_key_or_value_is_refused(item):
    with pytest.raises(UsageError, match="KEY=VALUE"):
        resolve(Sample, sets=[item])


def test_a_set_below_a_single_value_is_refused():
    with pytest.raises(UsageError, match="'steps' is a single value"):
        resolve(Sample, sets=["steps=3", "steps.deep=4"])


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5e1", 5.0),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("[1, 2e-1]", [1, 0.2]),
        ("'1e-6'", "1e-6"),
        ("kl<=5", "kl<=5"),
        ("my.module:score", "my.module:score"),
        ("v1e6", "v1e6"),
        ("a: [b", "a: [b"),
    ],
)
def test_the_right_hand_side_of_a_set_is_yaml_with_numbers_as_people_write_them(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_recipe_reads_1e_6_as_a_number(recipe):
    assert load_yaml(recipe("rate: 1e-6\n")) == {"rate": 1e-6}


def test_a_key_given_twice_is_refused_with_file_and_line(recipe):
    file = recipe("steps: 1\nrate: 0.1\nsteps: 2\n")
    with pytest.raises(UsageError, match="'steps' is given twice") as caught:
        load_yaml(file)
    assert str(file) in str(caught.value)


def test_a_key_given_twice_in_a_section_is_refused_too(recipe):
    with pytest.raises(UsageError, match=r"recipe\.yaml:3:3 .*'a' is given twice, first in line 2"):
        load_yaml(recipe("trainer:\n  a: 1\n  a: 2\n"))


@pytest.mark.parametrize(("text", "said"), [("- 1\n", "a list"), ("3\n", "a single"), ("a: [1\n", "not valid YAML")])
def test_what_is_no_mapping_is_refused_by_name(recipe, text, said):
    file = recipe(text)
    with pytest.raises(UsageError, match=said) as caught:
        load_yaml(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_objects_in_yaml_are_not_built(recipe):
    with pytest.raises(UsageError, match="not valid YAML"):
        load_yaml(recipe("a: !!python/object/apply:os.getcwd []\n"))


def test_an_empty_recipe_leaves_every_default(recipe):
    assert resolve(Sample, file=recipe("# nothing\n")) == Sample()


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_recipe_is_named(tmp_path, content):
    path = tmp_path / "gone.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*gone\.yaml"):
        load_yaml(path)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unknown_key_names_its_path_its_file_and_the_closest_key(recipe):
    file = recipe("stepps: 3\n")
    with pytest.raises(UsageError) as caught:
        resolve(Sample, file=file)
    assert str(caught.value) == f"unknown key 'stepps' in {file}:1:1; did you mean 'steps'?"


def test_an_unknown_key_in_a_section_has_the_whole_path():
    with pytest.raises(UsageError, match=r"unknown key 'inner\.dept' in --set inner.dept=3; did you mean 'depth'\?"):
        resolve(Sample, sets=["inner.dept=3"])


def test_an_unknown_key_near_nothing_lists_what_is_valid():
    with pytest.raises(UsageError, match="valid: etas, inner, kind, model, rate, steps, trainer"):
        resolve(Sample, flags={"zzz": 1})


def test_a_typo_is_named_before_the_key_that_it_leaves_missing():
    with pytest.raises(UsageError, match=r"unknown key 'neded' \(1 more\); did you mean 'needed'\?"):
        resolve(Strict, flags={"neded": "x"})


def test_a_missing_key_names_the_flag():
    with pytest.raises(UsageError, match="'needed' is missing; give --needed"):
        resolve(Strict)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("steps=0", "^'steps' = 0 in --set steps=0 is below 1; give a number >=1$"),
        ("rate=1", "'rate' = 1 in --set rate=1 is not below 1; give a number >0, <1"),
        ("steps=many", "'steps' = 'many' in --set steps=many is not a whole number"),
        ("kind=c", "'kind' = 'c' in --set kind=c is not one of a, b"),
        ("etas=[0.5, x]", r"'etas\[1\]' = 'x'"),
        ("rate=.nan", "'rate' = nan"),
        ("etas=[.inf]", r"'etas\[0\]' = inf .* is not a finite number"),
    ],
)
def test_a_value_out_of_bounds_names_key_value_and_bound(setting, said):
    with pytest.raises(UsageError, match=said) as caught:
        resolve(Sample, sets=[setting])
    assert "\n" not in str(caught.value)


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Sample().steps = 3


# --- round trip -------------------------------------------------------------------------------------------------------


def test_the_resolved_configuration_as_yaml_resolves_to_itself(recipe):
    config = resolve(
        Sample,
        sets=["rate=1e-6", "etas=[0.1, 0.7]", "trainer.name='1e-6'", "trainer.flag=yes", "inner.depth=2"],
        flags={"model": Path("a b/ünï")},
    )
    assert resolve(Sample, file=recipe(to_yaml(config.model_dump(mode="json")))) == config


def test_the_manifest_of_an_output_is_a_recipe_for_the_same_configuration(tmp_path):
    config = Sample(rate=1e-6, model=Path("m"))
    manifest = tmp_path / "gemma2.json"
    manifest.write_text(json.dumps({"schema_version": 1, "config": config.model_dump(mode="json"), "files": {}}))
    assert resolve(Sample, file=manifest) == config
    assert resolve(Sample, file=manifest, flags={"steps": 3}).steps == 3


# What excludes another input, or needs one beside it.
ALTERNATIVES = ("teacher_cache", "eval_data", "judge_prompt")
SCHEMAS = {name: getattr(schemas, name) for name in schemas.__all__}


def example(schema: type[Config]) -> Config:
    """A configuration with every required field given, and every optional path that may stand beside the others."""
    paths = {
        name: "some/path"
        for name, field in schema.model_fields.items()
        if (field.annotation in (Path, Path | None) and name not in ALTERNATIVES)
        or (field.is_required() and field.annotation in (str, tuple[Path, ...]))
    }
    if "models" in schema.model_fields:
        paths |= {"models": ["a", "b"]}
    if "method" in schema.model_fields:
        paths |= {"method": "slerp"}
    if "stages" in schema.model_fields:
        paths |= {"stages": {"a": {"command": "sft", "matrix": {"seed": [1, 2]}}}}
    return schema.model_validate(paths)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_yaml_of_every_schema_reruns_the_same_configuration(recipe, name):
    config = example(SCHEMAS[name])
    assert resolve(SCHEMAS[name], file=recipe(to_yaml(config.model_dump(mode="json")))) == config


# --- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_is_described_and_every_number_bounded(name):
    schema = SCHEMAS[name]
    for key, field in schema.model_fields.items():
        assert field.description or key == "method", key
        if field.annotation in (int, float, int | None, float | None):
            assert any(hasattr(item, bound) for item in field.metadata for bound in ("gt", "ge", "lt", "le")), key


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_default_is_within_its_own_bounds(name):
    config = example(SCHEMAS[name])
    assert type(config).model_validate(config.model_dump()) == config
    for field in SCHEMAS[name].model_fields.values():
        value = field.get_default(call_default_factory=True)
        assert value is PydanticUndefined or not isinstance(value, float) or math.isfinite(value)


def test_an_error_in_a_section_of_a_larger_recipe_names_the_section():
    with pytest.raises(UsageError, match=r"unknown key 'sft\.stepps'; did you mean 'steps'\?"):
        validated(Sample, {"stepps": 3}, ValueSource(above=("sft",)))


def test_a_text_of_the_wrong_form_is_told_what_the_field_is_for():
    with pytest.raises(UsageError, match=r"^--pick 'kl<5' does not fit; which point: best-reward, kl<=X"):
        resolve(schemas.PickConfig, flags={"front": "f", "pick": "kl<5"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: &a {x: *a}", "contains itself"),
        ("steps: &a [1, *a]", "contains itself"),
        (f"steps: {'[' * 3000}{']' * 3000}", "nested too deeply"),
    ],
)
def test_a_file_without_an_end_is_refused(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=rf"r\.yaml.*{said}"):
        load_yaml(tmp_path / "r.yaml")


def test_aliases_that_share_a_value_are_read_and_count_with_all_that_they_stand_for(tmp_path):
    """What walks through the options of a pipeline visits an alias as often as it occurs: 10^29 times."""
    shared = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 4))]
    (tmp_path / "r.yaml").write_text("\n".join(shared))
    assert len(load_yaml(tmp_path / "r.yaml")["a3"]) == 10
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30))]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="too large"):
        load_yaml(tmp_path / "r.yaml")
