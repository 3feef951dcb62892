"""`gemma2 eval --suite --against OTHER`: a model measured in the same way, or a finished result."""

import json

import pytest
from miniature_tasks import Miniature

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.posttrain.evaluation.suite import run_suite as run_suite_module
from gemma2.posttrain.evaluation.suite.run_suite import run_suite
from gemma2.posttrain.pipelines.check import plan_step
from gemma2.posttrain.runs.inputs import check_inputs
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.measures import SuiteConfig
from gemma2.posttrain.tiny.networks import save_random

TASKS = ("winogrande", "mmlu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models, rows, and the result of the second model."""
    root = tmp_path_factory.mktemp("against")
    for seed, name in enumerate(("ours", "theirs")):
        save_random(root / name, seed)
    Miniature(rows=6).write(root / "tasks")
    run_suite(config(root, "theirs"), RunOptions(root / "earlier"))
    return root


def config(root, model, **more):
    return SuiteConfig(model=root / model, data=root / "tasks", tasks=TASKS, **more)


def results(path):
    return json.loads((path / "results.json").read_text())


def test_a_model_and_its_earlier_result_give_the_same_comparison(world):
    run_suite(config(world, "ours", against=world / "theirs"), RunOptions(world / "model"))
    run_suite(config(world, "ours", against=world / "earlier"), RunOptions(world / "result"))
    model, result, earlier = (results(world / name) for name in ("model", "result", "earlier"))
    assert model["compared"] == result["compared"]
    assert list(model["compared"]) == ["mmlu", "winogrande"] or set(model["compared"]) == set(TASKS)
    assert model["against"]["name"] == result["against"]["name"] == "theirs"
    assert model["tasks_against"] == earlier["tasks"]
    compared = model["compared"]["mmlu"]
    assert (compared["n"], compared["clusters"], compared["other_prompts"]) == (12, 2, 0)
    assert compared["ours"] - compared["theirs"] == pytest.approx(compared["difference"])
    samples = (world / "model" / "samples" / "against" / "mmlu.jsonl").read_bytes()
    assert samples == (world / "earlier" / "samples" / "mmlu.jsonl").read_bytes()


def test_a_model_against_itself_differs_by_nothing(world):
    run_suite(config(world, "theirs", against=world / "earlier"), RunOptions(world / "same"))
    for compared in results(world / "same")["compared"].values():
        assert (compared["difference"], compared["p"], compared["found"]) == (0.0, 1.0, False)


def test_what_it_is_compared_with_is_recorded(world):
    """Both kinds are inputs: the model a parent, the result its files; a stage runs again when they change."""
    check_inputs(config(world, "ours", against=world / "earlier"))
    plan = plan_step(config(world, "ours", against=world / "earlier"), RunOptions(world / "new"))
    assert plan is not None
    out = world / "recorded"
    run_suite(config(world, "ours", against=world / "earlier"), RunOptions(out))
    manifest = json.loads((out / "gemma2.json").read_text())
    assert [parent["role"] for parent in manifest["parents"]] == ["model"]
    assert any("results.json" in source["path"] for source in manifest["data"])


def test_results_hold_the_rows_of_a_card_and_a_figure(world):
    found = results(world / "earlier")
    assert [row["dataset"]["type"] for row in found["model_index"]] == [
        {"mmlu": "cais/mmlu", "winogrande": "allenai/winogrande"}[name] for name in found["tasks"]
    ]
    assert {"results.png", "results.svg", "results.csv"} <= {path.name for path in (world / "earlier").iterdir()}


def test_an_unfinished_result_is_refused_before_the_model_is_loaded(world, monkeypatch):
    half = world / "half"
    half.mkdir()
    (half / "results.json").write_text("{}")
    monkeypatch.setattr(run_suite_module, "open_engine", None)
    with pytest.raises(InputError, match="not a finished result"):
        check_inputs(config(world, "ours", against=half))
    with pytest.raises(InputError, match="not a finished result"):
        run_suite(config(world, "ours", against=half), RunOptions(world / "never"))


def test_the_command_prints_the_table(world, capsys):
    words = ["eval", str(world / "ours"), "--suite", "gemma2", "--data", str(world / "tasks"), "--tasks", "winogrande"]
    assert invoke([*words, "--against", str(world / "earlier"), "--out", str(world / "printed")]) == 0
    printed = capsys.readouterr().out
    assert "Winogrande, 5-shot  acc" in printed
    assert "Against theirs, row by row:" in printed
