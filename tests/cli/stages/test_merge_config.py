"""`gemma2 merge --config` and `gemma2 merge plan` as a user runs them."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2.cli.main import run

CONFIG = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "tie_word_embeddings": True}


def gemma2(command: str) -> int:
    return run(shlex.split(command))


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Task vectors (1, 0, 0), (0, 1, 0), (0, 0, 1) from the base (5, 5, 5), in two layers and the norm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, values in {"base": [5, 5, 5], "a": [6, 5, 5], "b": [5, 6, 5], "c": [5, 5, 6]}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(CONFIG))
        names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")
        save_file({key: np.array([values], np.float32) for key in names}, Path(name, "model.safetensors"))
    return tmp_path


def merged(path):
    """The task vector of each tensor of an output, by the start of its name's last distinct part."""
    return {key: (array[0] - 5).round(5).tolist() for key, array in load_file(Path(path, "model.safetensors")).items()}


def write(text):
    Path("merge.yaml").write_text(text)


def files(place):
    return sorted(str(path) for path in place.rglob("*") if "cache" not in path.parts)


GRADIENT = "method: linear\nmodels: [a, b]\nweights: [{layers: [1, 0]}, {layers: [0, 1]}]\n"
STEPS = """
steps:
  mean: {method: linear, models: [a, b]}
  pulled: {method: liti, models: [mean], base: base, eta: 0.5}
"""


def test_one_merge_of_a_file(capsys):
    write(GRADIENT)
    assert gemma2("merge --config merge.yaml --out out") == 0
    assert list(merged("out").values()) == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["output", "out"]


def test_a_gradient_by_flag_is_that_of_the_file():
    write("method: slerp\nmodels: [a, b]\nbase: base\nt: {layers: [0, 1]}\n")
    assert gemma2("merge --config merge.yaml --out one -q") == 0
    assert gemma2("merge slerp a b --base base --t 0,1 --out two -q") == 0
    assert merged("one") == merged("two")
    assert list(merged("one").values()) == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_set_changes_a_key():
    write("method: linear\nmodels: [a, b]\nweights: [1, 0]\n")
    assert gemma2("merge --config merge.yaml --set weights=[0.25,0.75] --out out -q") == 0
    assert merged("out")["model.norm.weight"] == [0.25, 0.75, 0]


def test_steps_and_their_report(capsys):
    write(STEPS)
    assert gemma2("merge --config merge.yaml --out out --json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"].keys() == {"mean", "pulled"}
    assert document["steps"]["pulled"]["outputs"] == ["out/pulled"]
    assert merged("out/pulled")["model.norm.weight"] == [0.25, 0.25, 0]


def test_a_file_of_mergekit():
    write("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, int8_mask: true}\n")
    assert gemma2("merge --config merge.yaml --out out -q --threads 1 --no-verify") == 0
    assert merged("out")["model.norm.weight"] == [0.5, 0.5, 0]


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "merge plan slerp a b --base base",
        "merge plan slerp a b --base base --out out",
        "merge slerp a b --base base --out out --dry-run",
        "merge slerp a b --base base --dry-run",
    ],
)
def test_a_plan_says_what_would_be_read_and_written(models, capsys, command):
    before = files(models)
    assert gemma2(command) == 0
    shown = capsys.readouterr().out
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in shown.splitlines()}
    assert lines["method"] == "slerp"
    assert lines["vectors"] == "task vectors from base"
    assert lines["parameters"] == "9 in 3 tensors"
    assert lines["passes over the data"] == "2"
    assert lines["bytes to read"] == f"{2 * 3 * 9 * 4} B"
    assert lines["bytes to write"].startswith("36 B, ")
    assert lines["outputs"] == ("out" if "--out" in command else "not named: --out is missing")
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("layers")] == [
        ["layers.0", "1"],
        ["layers.1", "1"],
    ]
    assert files(models) == before


def test_a_plan_shows_the_numbers_of_each_group(capsys):
    assert gemma2("merge plan slerp a b --base base --t 0,1") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-1] for row in rows if row and row[0] in ("layers.0", "layers.1", "norm")] == ["0", "1", "1"]


def test_a_plan_shows_the_numbers_that_hold_for_all_groups_once(capsys):
    assert gemma2("merge plan dare a b --base base --weights 1,0.5 --density 0.25 --no-rescale --seed 0") == 0
    shown = capsys.readouterr().out
    assert "numbers               weights 1 0.5, density 0.25 0.25, rescale no, seed 0\n" in shown
    assert ["group", "tensors", "parameters"] in [line.split() for line in shown.splitlines()]


def test_a_plan_of_steps_shows_each(models, capsys):
    write(STEPS)
    before = files(models)
    assert gemma2("merge plan --config merge.yaml --out out") == 0
    shown = capsys.readouterr().out
    assert "mean:" in shown
    assert "pulled:" in shown
    assert "out/pulled" in shown
    assert files(models) == before
    assert gemma2("merge plan --config merge.yaml --json") == 0
    assert json.loads(capsys.readouterr().out)["steps"]["mean"]["passes"] == 1


def test_a_plan_as_json(capsys):
    for command in ("merge plan --json slerp a b --base base", "merge plan slerp a b --base base --json"):
        assert gemma2(command) == 0
        assert json.loads(capsys.readouterr().out)["passes"] == 2


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "merge --config none.yaml --out out": (1, "--config none.yaml is not a file"),
    "merge --config merge.yaml": (2, "--out is missing"),
    "merge --config merge.yaml --out a": (1, "overlap"),
    "merge --config merge.yaml --out out --set wights=1": (
        2,
        "unknown key 'wights' in --set wights=1; did you mean 'weights'",
    ),
    "merge --config merge.yaml --out out --set weights=[1]": (2, "1 weights for 2 models in --set weights=[1]; give"),
    "merge --config merge.yaml --out out --set base=gone": (2, "does not take base in --set base=gone"),
    "merge --config merge.yaml --out out --set models=[a,gone]": (
        1,
        "names gone, which is not a directory or a hub id",
    ),
    "merge --out out": (2, "no method and no --config"),
    "merge --dry-run linear a b --out out": (2, "options come before 'linear'"),
    "merge --no-verify linear a b --out out": (2, "options come before 'linear'"),
    "merge plan": (2, "no method and no --config"),
    "merge plan linnear a b": (2, "unknown merge method 'linnear'; did you mean 'linear'?"),
    "merge plan --config merge.yaml linear": (2, "--config and linear: a plan is of one of them"),
    "merge plan linear a gone": (1, "gone"),
    "merge slerp a b --t , --base base --out out": (2, "--t is empty"),
    "merge slerp a b --t 2 --base base --out out": (2, "2 is not between 0 and 1"),
    "merge slerp a b --t 0,2 --base base --out out": (2, "2 is not between 0 and 1"),
    "merge linear a b --weights 1 --out out": (2, "1 weights for 2 models; give one per model"),
    "merge passthrough a b --out out": (2, "merge passthrough takes 1 model, 2 given"),
    "merge task-arithmetic a b --base base --weights 1,-1 --normalize --out out": (2, "--weights sum to 0"),
    "merge della a b --base base --density 0.9 --epsilon 0.3 --out out": (2, "--epsilon 0.3 around --density 0.9"),
    "merge task-arithmetic a b --out out": (2, "--base"),
    "merge ties a b --base base --gamma 0.1 --out out": (2, "--gamma"),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(models, capsys, command):
    write(GRADIENT)
    before = files(models)
    code, message = MISTAKES[command]
    assert gemma2(command) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert files(models) == before
