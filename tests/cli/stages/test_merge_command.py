"""`gemma2 merge` and `gemma2 inspect` as a user runs them."""

import json
import re
import shlex

import numpy as np
import pytest
from commands import all_commands
from safetensors.numpy import load_file, save_file

from gemma2.cli.app import invoke
from gemma2.cli.main import run
from gemma2.core.errors import UsageError
from gemma2.merging.methods.option import OPTIONS
from gemma2.merging.methods.table import METHODS

CONFIG = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "tie_word_embeddings": True}


def gemma2(command: str) -> int:
    """The exit code of a command line."""
    return run(shlex.split(command))


def write(path, values):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.norm.weight": np.array(values, np.float32)}, path / "model.safetensors")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Task vectors (1, 0, 0), (0, 1, 0), (0, 0, 1) from the base (5, 5, 5)."""
    monkeypatch.chdir(tmp_path)
    for name, values in {"base": [5, 5, 5], "a": [6, 5, 5], "b": [5, 6, 5], "c": [5, 5, 6]}.items():
        write(tmp_path / name, values)
    return tmp_path


def merged(path):
    return load_file(path / "model.safetensors")["model.norm.weight"].tolist()


@pytest.mark.parametrize(
    ("command", "delta"),
    [
        ("task-arithmetic a b --base base --weights 1,0.5 --scale 0.5", [0.5, 0.25, 0]),
        ("task-arithmetic a b --base base --weights 1,3 --normalize", [0.25, 0.75, 0]),
        ("ties a b c --base base --density 0.34", [1, 1, 1]),
        ("ties a b --base base --density 1 --scale 0.5", [0.5, 0.5, 0]),
        ("dare a b --base base --density 1", [1, 1, 0]),
        ("dare-ties a b --base base --density 1", [1, 1, 0]),
        ("della a b --base base --density 1 --epsilon 0", [1, 1, 0]),
        ("della-linear a b --base base --density 1 --epsilon 0", [1, 1, 0]),
        ("breadcrumbs a b --base base --density 1 --gamma 0", [1, 1, 0]),
        ("breadcrumbs-ties a b --base base --density 1 --gamma 0 --normalize", [1, 1, 0]),
        ("model-stock a b --base base", [0, 0, 0]),
        ("nuslerp a b --base base --weights 1,1", [0.70711, 0.70711, 0]),
        ("multislerp a b c --base base", [0.57735, 0.57735, 0.57735]),
        ("karcher a b c --base base", [0.57735, 0.57735, 0.57735]),
        ("passthrough a --scale 2", [7, 5, 5]),
        ("linear a b --weights 3,1 --normalize", [0.75, 0.25, 0]),
        ("slerp a b --base base", [0.70711, 0.70711, 0]),
        ("slerp a b c --base base", [0.61237, 0.61237, 0.5]),
        ("slerp a b --base base --t 0", [1, 0, 0]),
        ("liti a --base base --eta 0.25", [0.25, 0, 0]),
        ("liti a --base base", [0.3, 0, 0]),
        ("warp a b c --base base --eta 0.5", [0.30619, 0.30619, 0.25]),
        ("linear a b --weights .75,.25", [0.75, 0.25, 0]),
        ("linear a b c", [1 / 3, 1 / 3, 1 / 3]),
        ("ema a b c --decay 0.9", [0.81, 0.09, 0.1]),
        ("ema a b --uniform", [0.5, 0.5, 0]),
    ],
)
def test_the_output_is_the_base_plus_the_combination_derived_by_hand(models, command, delta):
    assert gemma2(f"merge {command} --out out -q") == 0
    assert np.array(merged(models / "out")) - 5 == pytest.approx(delta, abs=1e-5)


def test_several_etas_give_several_outputs(models):
    assert gemma2("merge liti a --base base --eta 0,0.5 --out front") == 0
    assert merged(models / "front/eta-0.00") == [5, 5, 5]
    assert merged(models / "front/eta-0.50") == [5.5, 5, 5]


def test_the_screen_shows_one_row_per_group_and_the_output(models, capsys):
    gemma2("merge slerp a b --base base --out out")
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["group", "parameters", "angle", "norms", "result norm", "coefficients"]
    assert rows[1] == ["norm", "3", "90", "1 1", "1", "-0.4142 0.7071 0.7071"]
    assert rows[2] == ["output", "out"]


def test_json_is_one_document_on_stdout(models, capsys):
    gemma2("merge slerp a b --base base --out out --json")
    document = json.loads(capsys.readouterr().out)
    assert document["outputs"] == ["out"]
    assert document["groups"][0]["angle"] == pytest.approx(90.0)


def test_the_warning_of_a_merge_without_base_goes_to_stderr(models, capsys):
    assert gemma2("merge slerp a b --out out") == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning:") == 1
    assert "--base" in captured.err


def test_a_dry_run_prints_the_plan_and_writes_nothing(models, capsys):
    assert gemma2("merge slerp a b --base base --out out --dry-run") == 0
    assert "bytes to write" in capsys.readouterr().out
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("merge slerp a b --base base", 2, "--out is missing"),
        ("merge slerp a nowhere --out out", 1, "model 2 nowhere is not a directory"),
        ("merge linear a b --weights 1,x --out out", 2, "--weights 1,x is not a list of numbers"),
        ("merge ema a b --out out", 2, "needs --decay or --uniform, and not both"),
        ("merge ema a b --decay .9 --uniform --out out", 2, "needs --decay or --uniform, and not both"),
        ("merge slerp a b --bas base --out out", 2, "--base"),
        ("merge slerpp a b --out out", 2, "slerp"),
        ("merge linear a b --out a", 1, "overlap"),
        ("inspect nowhere", 1, "model nowhere is not a directory"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_leaves_nothing(models, capsys, command, code, message):
    before = sorted(models.rglob("*"))
    assert gemma2(command) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(models.rglob("*")) == before


def test_inspect_shows_what_a_merge_made(models, capsys):
    gemma2("merge slerp a b --base base --out out -q")
    capsys.readouterr()
    assert gemma2("inspect out --tensors") == 0
    shown = capsys.readouterr().out
    assert re.search(r"made by +merge slerp", shown)
    assert re.search(r"model\.norm\.weight +F32 +3", shown)
    gemma2("inspect out --json")
    assert json.loads(capsys.readouterr().out)["parameters"] == 3


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_table_is_a_command_with_a_flag_for_each_of_its_options(name):
    method = METHODS[name]
    flags = {parameter.name for parameter in dict(all_commands())[f"merge {name}"].params}
    expected = {option.name for option in method.options} | ({"base"} if method.base != "none" else set())
    assert flags & (OPTIONS.keys() | {"base"}) == expected


def test_the_page_of_a_method_shows_its_own_defaults(capsys):
    for name, shown in {
        "ties": "kept [default 0.2]",
        "breadcrumbs": "dropped [default 0.01]",
        "karcher": "1e-08",
    }.items():
        assert gemma2(f"merge {name} --help") == 0
        assert shown in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("weights, flags", [("1,-1", []), ("1,-1", ["--normalize"]), ("0.5,0.6", []), ("0,0", [])])
def test_the_advice_about_the_sum_of_the_weights_leads_to_a_merge(tmp_path, monkeypatch, weights, flags):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write(tmp_path / name, [1.0, 2.0])
    line = ["merge", "linear", "a", "b", "--weights", weights, "--out", "out", "--dry-run"]
    with pytest.raises(UsageError, match="--weights sum to") as caught:
        invoke([*line, *flags])
    advised = re.findall("--(?:no-)?normalize", caught.value.hint)
    assert advised == (["--normalize", "--no-normalize"] if weights == "0.5,0.6" else ["--no-normalize"])
    for flag in advised:
        assert invoke([*line, flag]) in (0, None)
