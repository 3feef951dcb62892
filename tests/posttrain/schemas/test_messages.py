"""Wrong values of every kind, at every field of every schema: one line in our words, with its place; `~` in paths."""

import inspect
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from gemma2.core.errors import UsageError
from gemma2.core.yaml_files import to_yaml
from gemma2.posttrain import schemas
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.schemas.config import Config, ValueSource, resolve, validated
from gemma2.posttrain.schemas.messages import WORDS

FOREIGN = re.compile(
    r"input should|should be a valid|should have|unable to (parse|interpret)|\[type=|field required|extra inputs|"
    r"value error|validation error|pydantic|further information|got an unexpected|tuple\b|dictionary|instance of|"
    r"NoneType|<class|\{limits|\{desc",
    re.IGNORECASE,
)
SCHEMAS = {
    name: schema
    for name in schemas.__all__
    if isinstance(schema := getattr(schemas, name), type) and issubclass(schema, BaseModel)
}
WRONG = [
    *(None, True, 0, -1, 3, 10**30, 0.5, -0.5, 1e300, float("nan"), float("inf")),
    *("", "text", "~", "1", "a,b", "ä" * 300, "line\nline"),
    *([], [[]], [1, "x", None], [float("inf")], ["a", "a"], [{}], {}, {"a": 1}, {1: 2}, {"a": {"b": [None]}}),
]
FIELDS = [(name, field) for name, schema in SCHEMAS.items() for field in schema.model_fields]


def required(schema: type[Config]) -> dict[str, object]:
    """Values for the required fields, right for their types."""
    values: dict[str, object] = {}
    for name, field in schema.model_fields.items():
        if field.is_required():
            values[name] = ["x"] if get_origin(field.annotation) is tuple else "x"
    if schema is schemas.MergeConfig:
        values |= {"method": "slerp", "models": ["a", "b"], "base": "c"}
    if schema is schemas.PipelineFile:
        values["stages"] = {"sft": {"command": "sft"}}
    return values


def declared_by(schema: type[BaseModel], field: str) -> type:
    return next(base for base in schema.__mro__ if field in inspect.get_annotations(base))


# (schema, field) of every field once, of one that several schemas inherit for the last of them.
ONCE = {*{(declared_by(SCHEMAS[name], field), field): (name, field) for name, field in FIELDS}.values()}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_wrong_value_is_described_in_our_words_with_its_line(name, tmp_path):
    """Every field of every schema as a flag; as a recipe and without a source each field once, where it is declared."""
    schema, faults = SCHEMAS[name], []
    path = tmp_path / "recipe.yaml"
    right = required(schema)
    for field in schema.model_fields:
        for wrong in WRONG:
            values = right | {field: wrong}
            error = _refused(schema, values, ValueSource(flags=frozenset(values)))
            if error is None:
                continue
            errors = [error]
            if (name, field) in ONCE:
                path.write_text(to_yaml(values), encoding="utf-8")
                errors += [_refused(schema, values, source) for source in (ValueSource(), ValueSource(path))]
                if not re.search(r"recipe\.yaml:\d+:\d+", errors[-1].where if errors[-1] else ""):
                    faults.append((field, wrong, "no line", str(errors[-1])))
            faults += [(field, wrong, str(error)) for error in errors if not _in_our_words(error)]
    assert faults == []


def _in_our_words(error: UsageError | None) -> bool:
    return error is not None and bool(error.hint) and not FOREIGN.search(str(error)) and "\n" not in str(error)


def _refused(schema: type[Config], values: dict[str, object], source: ValueSource) -> UsageError | None:
    try:
        validated(schema, values, source)
    except UsageError as error:
        return error
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_unknown_key_and_a_missing_one_are_described_in_our_words(name, tmp_path):
    schema = SCHEMAS[name]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n\n  \nunknown_key: 1\n")
    with pytest.raises(UsageError, match=r"unknown key 'unknown_key'.* in .*recipe\.yaml:4:1;") as caught:
        resolve(schema, file=path)
    assert not FOREIGN.search(str(caught.value))
    if required(schema):
        with pytest.raises(UsageError, match="is missing") as caught:
            resolve(schema)
        assert not FOREIGN.search(str(caught.value))


def test_every_kind_of_problem_that_our_types_can_have_has_words():
    """Else the description of the field stands in, which says less."""
    met = set()
    for name, field in FIELDS:
        for wrong in WRONG:
            try:
                SCHEMAS[name].model_validate(required(SCHEMAS[name]) | {field: wrong})
            except ValueError as error:
                met |= {problem["type"] for problem in error.errors()}
    assert met - WORDS.keys() <= {"value_error", "missing", "extra_forbidden", "invalid_key"}


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sets", "flags", "said"),
    [
        ("steps: 1\nlearning_rate: fast\n", [], {}, "'learning_rate' = 'fast' in R:2:16 is not a number"),
        ("steps: 1\nlearning_rate: 1e-6\n", ["learning-rate=2"], {}, "= 2 in --set learning-rate=2 is not below 1"),
        ("steps: 1\nlearning_rate: fast\n", ["learning_rate=slow"], {}, "= 'slow' in --set learning_rate=slow is not"),
        ("learning_rate: fast\n", ["learning_rate=slow"], {"learning_rate": 7.0}, "--learning-rate 7.0 is not below"),
        ("reward_weights:\n- 1\n- two\n", [], {}, r"'reward_weights\[1\]' = 'two' in R:3:3 is not a number"),
        ("reward: [a,\n  a]\n", [], {}, "the reward names a twice in R:1:9"),
        ("lora_output: adapter\n", [], {}, "lora_output=adapter needs an adapter in R:1:14"),
        ("steps: 0\nbeta: -1\nmu: 3\n", [], {}, r"\(2 more\)"),
    ],
)
def test_the_place_is_that_of_the_value_that_counts(tmp_path, monkeypatch, text, sets, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("R").write_text(f"{text}policy: p\nprompts: q\n" + ("" if "reward" in text else "reward: r\n"))
    with pytest.raises(UsageError, match=said):
        resolve(schemas.RlhfConfig, file=Path("R"), sets=sets, flags=flags)


STAGES = """\
vars:
  rate: 1e-6
stages:
  sft:
    command: sft
    options: {model: base, data: rows}
  rl:
    command: rlhf
    matrix: {seed: [1, 2]}
    options:
      policy: ${sft.out}
      prompts: rows
      reward: rm
      steps: 5
"""


@pytest.mark.parametrize(
    ("before", "after", "place", "said"),
    [
        ("steps: 5", "steps: many", "14:14", "is not a whole number"),
        ("steps: 5", "stepps: 5", "14:7", "did you mean 'steps'"),
        ("${sft.out}", "${sftt.out}", "11:15", "no stage is called 'sftt'"),
        ("${sft.out}", "${vars.rat}", "11:15", "there is no 'rat'"),
        ("command: rlhf", "command: rlfh", "8:14", "unknown command 'rlfh'"),
        ("matrix: {seed: [1, 2]}", "matrix: {seed: 1}", "9:13", "is not a list"),
        ("matrix: {seed: [1, 2]}", "matrix: {sed: [1, 2]}", "9:13", "not an option of rlhf"),
        ("    command: sft", "    comand: sft", "5:5", "did you mean 'command'"),
        ("  rl:", "  logs:", "7:3", "cannot be the name"),
        ("matrix:", "retries: x\n    matrix:", "9:14", "is not a whole number"),
        ("matrix:", "when: yes please\n    matrix:", "9:11", "is not a comparison"),
        ("matrix:", "after: [sftt]\n    matrix:", "9:13", "no stage is called 'sftt'"),
    ],
)
def test_an_error_of_a_pipeline_names_line_and_column(tmp_path, monkeypatch, before, after, place, said):
    monkeypatch.chdir(tmp_path)
    assert before in STAGES
    Path("p.yaml").write_text(STAGES.replace(before, after))
    with pytest.raises(UsageError, match=said) as caught:
        pipeline = compile_pipeline(read_pipeline(Path("p.yaml")), tmp_path)
        for stage in pipeline.stages.values():
            stage.config()
    assert f"p.yaml:{place}" in str(caught.value)


# --- home -------------------------------------------------------------------------------------------------------------

PATHS = [(n, f) for n, f in FIELDS if Path in (a := SCHEMAS[n].model_fields[f].annotation, *get_args(a))]
TEXTS = [(name, field) for name, schema in SCHEMAS.items() for field in sorted(schema.PATHS_AS_TEXT)]


@pytest.mark.parametrize(("name", "field"), PATHS + TEXTS)
def test_every_path_takes_the_home_of_the_user(name, field, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    schema = SCHEMAS[name]
    for written, meant in (("~/x", "/users/me/x"), ("~/x@test", "/users/me/x@test"), ("a~/x", "a~/x")):
        kind = get_origin(schema.model_fields[field].annotation)
        value = [written, "~/y"] if kind is tuple else {"key": written} if kind is dict else written
        alone = schema._home_is_expanded(value, SimpleNamespace(field_name=field))
        found = [alone]
        with suppress(ValueError):  # fields that do not fit each other, which is not the matter here
            found.append(getattr(schema.model_validate(required(schema) | {field: value}), field))
        for one in found:
            assert meant in str(one), (written, one)
            assert "'~/" not in repr(one)


def test_a_reference_to_a_folder_at_home_is_replaced_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    file = tmp_path / "p.yaml"
    file.write_text(
        "vars: {root: ~/d}\nstages: {a: {command: sft, options: {model: '${vars.root}/m', data: ~/x@test}}}"
    )
    config = compile_pipeline(read_pipeline(file), tmp_path).stages["a"].config()
    assert (config.model, config.data) == (Path("/users/me/d/m"), (Path("/users/me/x@test"),))
