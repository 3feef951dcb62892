"""Several merges in one file: what each reads and writes, and what is refused before the first one runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from model_files import added, random_arrays, read_model, write_model

from gemma2.core.errors import Gemma2Error
from gemma2.core.outputs.manifest import write_manifest
from gemma2.core.progress import SILENT
from gemma2.merging.recipes.recipe import read_recipe
from gemma2.merging.recipes.run_recipe import merge_recipe, plan_recipe

BASE = random_arrays(0)
MODELS = {name: added(BASE, random_arrays(seed, 0.3)) for seed, name in enumerate("abc", 1)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, arrays in {"init": BASE, **MODELS}.items():
        write_model(tmp_path / name, arrays)
    return tmp_path


def recipe(text: str):
    Path("merge.yaml").write_text(text)
    return read_recipe(Path("merge.yaml"))


def files(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.name != "merge.yaml")


CHAIN = """
steps:
  pulled: {method: liti, models: [mean], base: init, eta: 0.25}
  mean: {method: linear, models: [a, b]}
"""


def test_a_step_takes_the_output_of_another(place):
    results = merge_recipe(recipe(CHAIN), out=Path("out"))
    assert [str(result.outputs[0]) for result in results] == ["out/mean", "out/pulled"]
    found = read_model(Path("out/pulled"))
    for name, array in found.items():
        mean = (MODELS["a"][name].astype(np.float32) + MODELS["b"][name].astype(np.float32)) / 2
        expected = 0.75 * BASE[name].astype(np.float32) + 0.25 * mean
        np.testing.assert_allclose(array, expected, atol=1e-6)


def test_every_step_records_what_it_was_made_from(place):
    merge_recipe(recipe(CHAIN), out=Path("out"))
    manifest = json.loads(Path("out/pulled/gemma2.json").read_text())
    assert manifest["status"] == "complete"
    assert [(parent["role"], parent["path"]) for parent in manifest["parents"]] == [
        ("base", "../../init"),
        ("input", "../mean"),
    ]


def test_a_file_with_one_merge_writes_the_output_itself(place):
    (result,) = merge_recipe(recipe("{method: linear, models: [a, b]}"), out=Path("out"))
    assert result.outputs == (Path("out"),)
    assert Path("out/model.safetensors").is_file()


def test_mergekits_documents_are_steps_too(place):
    text = (
        "name: one\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n---\n"
        "merge_method: linear\nmodels: [{model: one}, {model: c}]\nparameters: {weight: 1}\n"
    )
    merge_recipe(recipe(text), out=Path("out"))
    name = "model.norm.weight"
    expected = (MODELS["a"][name] + MODELS["b"][name]) / 4 + MODELS["c"][name] / 2
    np.testing.assert_allclose(read_model(Path("out/final"))[name], expected, atol=1e-6)


def test_a_plan_writes_nothing_and_shows_what_it_can(place):
    before = files(place)
    first, second = plan_recipe(recipe(CHAIN), Path("out"))
    assert files(place) == before
    assert first.plan is not None
    assert first.describe()["outputs"] == ["out/mean"]
    assert second.plan is None
    assert second.describe() == {
        **{"method": "liti", "etas": [0.25], "seed": 0, "base": "init", "models": ["out/mean"]},
        **{"outputs": ["out/pulled"], "after": "mean"},
    } | {key: value for key, value in second.describe().items() if key == "granularity"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("models: [mean]", "models: [maen]"),
            "names maen, which is not a step, a directory or a hub id; did you mean",
        ),
        (("base: init", "base: gone"), "names gone, which is not a step"),
        (("eta: 0.25", "eta: 2"), "2 is not between 0 and 1"),
        (("method: liti", "method: lity"), "unknown merge method 'lity'"),
        (("method: linear, models: [a, b]", "method: linear, models: [a, out]"), "overlap"),
    ],
)
def test_a_mistake_in_a_later_step_is_found_before_the_first_runs(place, change, message):
    write_model(place / "out", BASE)
    before = files(place)
    with pytest.raises(Gemma2Error) as caught:
        merge_recipe(recipe(CHAIN.replace(*change)), out=Path("out"))
    assert message in str(caught.value)
    assert files(place) == before


def test_an_output_that_exists_is_kept_without_force(place):
    write_model(place / "out" / "pulled", BASE)
    with pytest.raises(Gemma2Error, match="out/pulled exists"):
        merge_recipe(recipe(CHAIN), out=Path("out"))
    assert not Path("out/mean").exists()
    with pytest.raises(Gemma2Error, match=r"it has no gemma2\.json"):
        merge_recipe(recipe(CHAIN), out=Path("out"), force=True)
    write_manifest(place / "out" / "pulled", {"status": "complete"})
    merge_recipe(recipe(CHAIN), out=Path("out"), force=True)
    assert Path("out/pulled/gemma2.json").is_file()


def test_notes_reach_the_user(place):
    class Heard(type(SILENT)):
        def note(self, text):
            heard.append(text)

    heard = []
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, density: 0.5}\n"
    merge_recipe(recipe(text), out=Path("out"), progress=Heard())
    assert "parameters.density has no effect on linear" in heard
