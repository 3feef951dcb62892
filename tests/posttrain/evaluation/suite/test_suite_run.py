"""`gemma2 eval --suite` end to end on a random model: results, samples, resume at every row, refusals."""

import importlib.util
import json
import socket

import pytest
import yaml
from miniature_tasks import Miniature

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.evaluation.suite import engines, run_suite, suite_plan
from gemma2.posttrain.evaluation.suite.chat_choice import uses_chat
from gemma2.posttrain.evaluation.suite.results import read_results
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.measures import SuiteConfig
from gemma2.posttrain.tiny.networks import save_random


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("models") / "policy", 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Miniature().write(tmp_path_factory.mktemp("tasks"))


def config(model, data, **more):
    return SuiteConfig(**({"model": model, "data": data, "max_new_tokens": 6, "batch_size": 3, "chat": "off"} | more))


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """A whole run, made while no socket could be opened."""
    out = tmp_path_factory.mktemp("runs") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", None)
        run_suite.run_suite(config(model, data), RunOptions(out))
    return out


def files_of(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.suffix in (".json", ".jsonl", ".csv")
    }


def samples_of(out, task):
    return [json.loads(line) for line in (out / "samples" / f"{task}.jsonl").read_bytes().splitlines()]


def test_results_follow_from_the_samples(finished):
    results = read_results(finished)
    assert results["version"] == 1
    assert results["model"]["name"] == "policy"
    assert results["model"]["weights"].startswith("blake3:")
    assert [*results["tasks"]] == ["mmlu", "arc_challenge", "gsm8k", "winogrande", "hellaswag"]
    for task, found in results["tasks"].items():
        rows = samples_of(finished, task)
        assert found["n"] == len(rows) == (8 if task == "mmlu" else 4)
        for metric, value in found["metrics"].items():
            if not metric.endswith("_by_size"):
                assert value == pytest.approx(sum(row["correct"][metric] for row in rows) / len(rows))
        assert found["notes"] == []
    table = (finished / "results.csv").read_text().splitlines()
    assert table[0] == "task,metric,value,stderr,n,shots,fewshot_from"
    assert sum(line.startswith("gsm8k,") for line in table) == 2  # strict and flexible


def test_a_sample_says_what_was_asked_and_answered(finished):
    for row in samples_of(finished, "arc_challenge"):
        assert len(row["logprobs"]) == len(row["choices"])
        best = max(range(len(row["logprobs"])), key=row["logprobs"].__getitem__)
        assert row["correct"]["acc"] == (best == row["target"])
        assert row["prompt"].endswith("\nAnswer:")
    assert all(isinstance(row["answer"], str) for row in samples_of(finished, "gsm8k"))
    assert len({row["prompt_ids_hash"] for row in samples_of(finished, "hellaswag")}) == 4


def test_mmlu_has_the_mean_of_its_subjects_and_of_its_rows(model, tmp_path):
    rows = [
        row for row in Miniature(rows=6).ours["mmlu"] if row["split"] == "dev" or row["subject"] != "abstract_algebra"
    ]
    rows += [row for row in Miniature(rows=2, seed=8).ours["mmlu"] if row["split"] == "test"][:1]
    rows = [{**row, "id": number} for number, row in enumerate(rows)]
    data = Miniature().write(tmp_path / "data", mmlu=rows)
    run_suite.run_suite(config(model, data, tasks=("mmlu",)), RunOptions(tmp_path / "out"))
    found = read_results(tmp_path / "out")["tasks"]["mmlu"]
    groups = found["groups"]
    assert {name: group["n"] for name, group in groups.items()} == {"abstract_algebra": 1, "high_school_us_history": 6}
    means = [group["acc"] for group in groups.values()]
    assert found["metrics"]["acc"] == pytest.approx(sum(means) / 2)
    assert found["metrics"]["acc_by_size"] == pytest.approx(sum(g["n"] * g["acc"] for g in groups.values()) / 7)


def test_a_run_that_was_interrupted_anywhere_and_continued_gives_the_same_bytes(
    model, data, finished, tmp_path, interrupting
):
    expected = files_of(finished)
    del expected["gemma2.json"]
    for after in (9, 14):
        out = tmp_path / f"out-{after}"
        with pytest.raises(KeyboardInterrupt):
            run_suite.run_suite(config(model, data), RunOptions(out), interrupting(after))
        run_suite.run_suite(config(model, data), RunOptions(out, resume=(out.parent / f".{out.name}.partial").exists()))
        found = files_of(out)
        del found["gemma2.json"]
        assert found == expected, after


def test_a_journal_that_was_cut_at_any_byte_gives_the_same_bytes_and_known_rows_are_not_run_again(
    model, data, finished, tmp_path, interrupting, monkeypatch
):
    asked = []
    score = engines.OwnEngine.score
    monkeypatch.setattr(
        engines.OwnEngine,
        "score",
        lambda self, rows, requests, done: asked.append(done) or score(self, rows, requests, done),
    )
    for cut in (1, 2500):
        out = tmp_path / f"out-{cut}"
        settings = config(model, data, tasks=("arc_challenge",))
        with pytest.raises(KeyboardInterrupt):
            run_suite.run_suite(settings, RunOptions(out), interrupting(3))
        journal = tmp_path / f".out-{cut}.partial" / "checkpoints" / "arc_challenge.jsonl"
        journal.write_bytes(journal.read_bytes()[:-cut])
        known = journal.read_bytes().count(b"\n")
        asked.clear()
        run_suite.run_suite(settings, RunOptions(out, resume=True))
        assert asked == [known]
        assert (out / "samples/arc_challenge.jsonl").read_bytes() == (
            finished / "samples/arc_challenge.jsonl"
        ).read_bytes()


def test_samples_of_another_model_are_not_continued(model, data, tmp_path, interrupting):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_suite.run_suite(config(model, data), RunOptions(out), interrupting(3))
    other = save_random(tmp_path / "other", 6)
    with pytest.raises(InputError, match="changed since it began: the weights of model"):
        run_suite.run_suite(config(other, data), RunOptions(out, resume=True))
    with pytest.raises(InputError, match=r"changed since it began: .*seed"):
        run_suite.run_suite(config(model, data, seed=1), RunOptions(out, resume=True))


def test_what_differs_from_the_published_way_is_in_the_notes(model, tmp_path, monkeypatch):
    data = Miniature(train=False).write(tmp_path / "data")
    monkeypatch.setattr(suite_plan, "CONTEXT", 8192)
    run_suite.run_suite(config(model, data, tasks=("winogrande",), limit=2), RunOptions(tmp_path / "out"))
    found = read_results(tmp_path / "out")["tasks"]["winogrande"]
    assert found["n"] == 2
    assert found["notes"] == ["few-shot from validation, without the row itself: the data have no split train"]
    short = save_random(tmp_path / "short", 5, max_position_embeddings=120)
    run_suite.run_suite(config(short, data, tasks=("winogrande",), limit=2, doctor=False), RunOptions(tmp_path / "cut"))
    found = read_results(tmp_path / "cut")["tasks"]["winogrande"]
    assert found["truncated"] == 2
    assert found["notes"][1] == "2 rows were longer than the context and cut on the left"


def test_chat_is_on_for_a_model_with_a_template_that_ends_turns(model, tmp_path):
    assert uses_chat(model, "on") and not uses_chat(model, "off")
    assert uses_chat(model, "auto")
    base = save_random(tmp_path / "base", 5)
    ends = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(ends | {"eos_token_id": 1}))
    assert not uses_chat(base, "auto")
    (base / "chat_template.jinja").unlink()
    assert not uses_chat(base, "auto")


def test_the_plan_has_rows_and_tokens_and_loads_nothing(model, data, capsys):
    assert (
        invoke(["eval", str(model), "--suite", "gemma2", "--data", str(data), "--out", "o", "--dry-run", "--json"]) == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["rows"]) for row in plan["tasks"]][:2] == [("mmlu", 8), ("arc_challenge", 4)]
    assert all(row["tokens_about"] > 100 for row in plan["tasks"])
    assert plan["rows"] == 24


def test_a_missing_engine_names_its_extra(model, data, monkeypatch):
    monkeypatch.setattr(
        suite_plan, "find_spec", lambda name: None if name == "lm_eval" else importlib.util.find_spec(name)
    )
    with pytest.raises(UsageError, match=r"--engine hf needs the package lm-eval.*gemma2\[eval\]"):
        run_suite.run_suite(config(model, data, engine="hf"), RunOptions(data / "out"))


def test_a_broken_model_is_refused_before_it_is_loaded(data, tmp_path):
    broken = save_random(tmp_path / "broken", 5)
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(settings | {"attn_logit_softcapping": None}))
    with pytest.raises(InputError, match=r"gemma2 doctor calls .* broken: .*--no-doctor"):
        run_suite.run_suite(config(broken, data), RunOptions(tmp_path / "out"))


def test_the_suite_is_a_stage_of_a_pipeline(model, data, tmp_path):
    stages = {
        "measure": {"command": "eval suite", "options": {"model": str(model), "data": str(data), "tasks": ["gsm8k"]}}
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"stages": stages}))
    plan = check_pipeline(compile_pipeline(read_pipeline(tmp_path / "p.yaml"), tmp_path / "out"))
    assert [row["action"] for row in plan.rows()] == ["run"]
    stages["measure"]["options"]["data"] = str(tmp_path)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(InputError, match="a directory without data"):
        check_pipeline(compile_pipeline(read_pipeline(tmp_path / "p.yaml"), tmp_path / "out"))


def test_the_result_is_recorded_with_its_model_and_data(finished):
    manifest = read_manifest(finished)
    assert manifest["command"] == "eval suite"
    assert [parent["role"] for parent in manifest["parents"]] == ["model"]
    assert len(manifest["data"]) == 5
