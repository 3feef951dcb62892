"""Merges from files in our own keys: what each key becomes, and what is refused by file and key."""

from pathlib import Path

import pytest

from gemma2.core.errors import InputError, UsageError
from gemma2.merging.methods.parameters import Rule, Schedule
from gemma2.merging.methods.request import MergeRequest, settings_at
from gemma2.merging.recipes.recipe import read_recipe


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The steps of a file's text, read in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def steps(text: str, sets=()):
        Path("merge.yaml").write_text(text)
        return read_recipe(Path("merge.yaml"), sets).steps

    return steps


@pytest.fixture
def request_of(read):
    return lambda text, sets=(): read(text, sets)[0].request


def paths(*names):
    return tuple(map(Path, names))


def test_every_key_becomes_the_field_of_its_name(request_of):
    text = """
method: della
models: [a, b]
base: init
weights: [1, 0.5]
scale: 0.7
density: [0.5, 0.6]
gamma: 0.01
epsilon: 0.1
normalize: false
rescale: true
seed: 3
iterations: 5
tolerance: 1e-6
granularity: tensor
tokenizer: union
dtype: float16
"""
    assert request_of(text) == MergeRequest(
        method="della",
        models=paths("a", "b"),
        base=Path("init"),
        weights=(1.0, 0.5),
        scale=0.7,
        density=(0.5, 0.6),
        gamma=(0.01,),
        epsilon=(0.1,),
        normalize=False,
        rescale=True,
        seed=3,
        iterations=5,
        tolerance=1e-6,
        granularity="tensor",
        tokenizer="union",
        dtype="float16",
    )


def test_eta_decay_and_t(request_of):
    assert request_of("{method: warp, models: [a, b], eta: [0, 0.5], t: 0.25}").etas == (0.0, 0.5)
    assert request_of("{method: warp, models: [a, b], eta: 0.5, t: 0.25}").t == 0.25
    assert request_of("{method: ema, models: [a, b], decay: 0.9}").decay == 0.9


def test_a_gradient_runs_from_the_first_layer_to_the_last(request_of):
    t = request_of("{method: slerp, models: [a, b], t: {layers: [0, 0.3, 1]}}").t
    assert t == Schedule((Rule((0.0, 0.3, 1.0)),))


def test_the_first_rule_that_fits_a_name_counts(request_of):
    text = """
method: slerp
models: [a, b]
t:
- {match: "mlp|norm", value: 0.1}
- {match: self_attn, layers: [0, 1]}
- 0.5
"""
    request = request_of(text)
    found = [settings_at(request, name, 0.25).t for name in ("x.mlp.norm", "x.self_attn.q", "embed_tokens")]
    assert found == [0.1, 0.25, 0.5]


def test_rules_without_a_last_one_leave_tensors_without_a_value(request_of):
    request = request_of("{method: slerp, models: [a, b], t: [{match: mlp, value: 1}]}")
    with pytest.raises(UsageError, match=r"no rule of t fits the tensor embed"):
        settings_at(request, "embed", 0.0)


def test_a_list_is_one_per_model_and_each_may_be_rules(request_of):
    text = "{method: ties, models: [a, b], base: o, density: [[{match: mlp, value: 0.2}, 1], {layers: [0, 1]}]}"
    first, second = request_of(text).density
    assert first == Schedule((Rule((0.2,), "mlp"), Rule((1.0,))))
    assert second == Schedule((Rule((0.0, 1.0)),))
    (both,) = request_of("{method: ties, models: [a, b], base: o, density: [{match: mlp, value: 0.2}, 1]}").density
    assert both == first


def test_numbers_may_stand_at_the_models(request_of):
    request = request_of(
        "{method: ties, base: o, models: [{model: a, weight: 1, density: 0.2}, {model: b, weight: 2, density: 1}]}"
    )
    assert request.models == paths("a", "b")
    assert request.weights == (1.0, 2.0)
    assert request.density == (0.2, 1.0)


def test_set_changes_a_key_and_one_of_a_step(read, request_of):
    assert request_of("{method: slerp, models: [a, b]}", ["t=0.25"]).t == 0.25
    steps = read("steps: {my-step: {method: slerp, models: [a, b]}}", ["steps.my-step.t=1e-1"])
    assert steps[0].request.t == 0.1


# --- paths and steps --------------------------------------------------------------------------------------------------


def test_a_path_is_from_here_when_it_exists_here_else_from_the_folder_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "there/here", "there/beside"):
        Path(folder).mkdir(parents=True)
    Path("there/merge.yaml").write_text("{method: linear, models: [here, beside, owner/name, beside+here, gone]}")
    found = read_recipe(Path("there/merge.yaml")).steps[0].request.models
    assert found == paths("here", "there/beside", "owner/name", "there/beside+here", "gone")


def test_steps_come_after_those_they_take(read):
    text = """
steps:
  last: {method: liti, models: [middle], base: init, eta: 0.3}
  middle: {method: linear, models: [first, x+lora]}
  first: {method: slerp, models: [a, b]}
"""
    steps = read(text)
    assert [step.name for step in steps] == ["first", "middle", "last"]
    assert [step.needs for step in steps] == [(), ("first",), ("middle",)]


def test_a_step_with_an_adapter_on_it_is_needed_too(read):
    steps = read("steps: {b: {method: linear, models: [a+lora, x]}, a: {method: linear, models: [x, y]}}")
    assert [(step.name, step.needs) for step in steps] == [("a", ()), ("b", ("a",))]


# --- what is refused --------------------------------------------------------------------------------------------------

HEAD = "method: slerp\nmodels: [a, b]\n"
WRONG = {
    "": "merge.yaml is empty",
    "- a": "merge.yaml:1:1 holds a list, not KEY: VALUE lines",
    "method: [": "is not valid YAML",
    f"{HEAD}method: liti": "merge.yaml:3:1 is not valid YAML: key 'method' is given twice, first in line 1",
    f"{HEAD}etaa: 1": "unknown key 'etaa' in merge.yaml:3:1; did you mean 'eta'",
    "models: [a]": "the file has no 'method' in merge.yaml",
    "method: slerp": "the file has no 'models' in merge.yaml",
    "{method: slerp, models: a}": "models is 'a' in merge.yaml:1:25; give a list",
    "{method: slerp, models: [3]}": "models[0] is 3, not a model",
    "{method: slerp, models: [a, {model: b, wight: 1}]}": "unknown key 'models[1].wight' in merge.yaml:1:40; did",
    "{method: slerp, models: [a, {weight: 1}]}": "models[1] has no 'model'",
    "{method: ties, models: [a, {model: b, weight: 1}]}": "models[0] has no 'weight', others have",
    "{method: ties, models: [{model: b, weight: 1}], weights: [2]}": "weights is given for all models and",
    f"{HEAD}t: fast": "t is 'fast', not a number in merge.yaml",
    f"{HEAD}t: true": "t is True, not a number",
    f"{HEAD}t: .nan": "t is nan, not a number",
    f"{HEAD}t: []": "t.layers is [] in merge.yaml:3:4; give a list of numbers",
    f"{HEAD}t: {{layers: 3}}": "t.layers is 3",
    f"{HEAD}t: {{layers: [0, x]}}": "t.layers is 'x', not a number",
    f"{HEAD}t: {{layer: [0, 1]}}": "unknown key 't.layer' in merge.yaml:3:5; did you mean 'layers'",
    f"{HEAD}t: {{value: 1, layers: [1]}}": "t needs 'value' or 'layers', and not both",
    f"{HEAD}t: [{{match: '(', value: 1}}]": "t[0].match is not a regular expression",
    f"{HEAD}t: [{{value: 1}}, 2]": "t[1] comes after a rule that fits every tensor",
    f"{HEAD}normalize: 1": "normalize is 1, not true or false",
    f"{HEAD}seed: 1.5": "seed is 1.5, not a whole number",
    f"{HEAD}dtype: 16": "dtype is 16, not a name",
    "steps: []": "steps is []",
    f"{HEAD}steps: {{}}": "has 'method' next to 'steps'",
    "steps: {a/b: {method: slerp, models: [a, b]}}": "steps has a step named 'a/b'",
    "steps: {a: 3}": "steps.a is 3",
    "steps: {a: {method: slerp, models: [b, x], tt: 1}}": "unknown key 'steps.a.tt'",
    "steps: {a: {method: slerp, models: [b, x]}, b: {method: slerp, models: [a, x]}}": "need each other",
    "steps: {a: {method: slerp, models: [a, x]}}": "need each other",
    "steps: {a: {method: liti, models: [x], eta: [0, 1]}, b: {method: linear, models: [a, x]}}": "has several outputs",
    f"{HEAD}---\n{HEAD}": "holds 2 YAML documents",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_named_with_file_and_key(read, text):
    with pytest.raises(UsageError) as caught:
        read(text)
    assert WRONG[text] in str(caught.value)
    assert "merge.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_recipe(tmp_path / "none.yaml")


def test_a_set_that_is_no_assignment(read):
    with pytest.raises(UsageError, match="'t' is not KEY=VALUE"):
        read(HEAD, ["t"])
    with pytest.raises(UsageError, match="--set is for one YAML document"):
        read(f"merge_method: linear\n---\n{HEAD}", ["t=1"])


SLICED = """
method: slerp
models: [a, b]
base: base
slices:
- sources: [{model: a, layers: [0, 1]}, {model: b, layers: [1, 2]}, {model: base, layers: [0, 1]}]
  t: 0.25
- sources: [{model: 1, layers: [0, 2]}, {model: 0, layers: [0, 2]}]
"""


def test_slices_name_sources_by_path_or_number_and_change_options(read):
    (step,) = read(SLICED)
    first, second = step.request.slices
    assert (first.layers, first.base, first.changes) == (((0, 0, 1), (1, 1, 2)), (0, 1), {"t": 0.25})
    assert (second.layers, second.base, second.changes) == (((1, 0, 2), (0, 0, 2)), None, {})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: a,", "model: c,", "slices[0].sources[0].model c is neither one of the models nor the base"),
        ("layers: [0, 1]}, {model: b", "layers: [1, 1]}, {model: b", "slices[0].sources[0].layers is [1, 1]"),
        ("t: 0.25", "tt: 0.25", "unknown key 'slices[0].tt'"),
        ("sources: [{model: 1, layers: [0, 2]}, {model: 0, layers: [0, 2]}]", "t: 1", "slices[1] has no list of"),
        ("model: 1,", "model: 2,", "slices[1].sources[0].model is 2"),
    ],
)
def test_a_wrong_slice_is_named(read, old, new, said):
    with pytest.raises(UsageError) as caught:
        read(SLICED.replace(old, new, 1))
    assert said in str(caught.value)


def test_a_pipeline_is_named_as_that(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("vars: {seed: 1}\nstages:\n  data: {command: generate}\n")
    with pytest.raises(UsageError, match=r"stages is a key of pipelines in .*; gemma2 pipeline run .*p\.yaml"):
        read_recipe(path)
