"""Results on disk: compared row by row, shown next to published rows, as rows of a card, as a figure."""

import json

import pytest

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError
from gemma2.posttrain.evaluation.compared.against import comparison_lines, sentence
from gemma2.posttrain.evaluation.compared.card_rows import model_index
from gemma2.posttrain.evaluation.compared.figure import results_figure
from gemma2.posttrain.evaluation.compared.kept_results import compare_results
from gemma2.posttrain.evaluation.compared.result_table import result_table

ROWS = 40
DRAWN = True


def task(title, value, **more):
    return {
        "title": title,
        "n": ROWS,
        "metric": "acc",
        "metrics": {"acc": value, "acc_by_size": value},
        "stderr": {"acc": 0.02, "acc_by_size": 0.02},
        "shots": 5,
        "split": "test",
        "fewshot_from": "dev",
        "notes": [],
        **more,
    }


def document(name="gemma-2-2b", chat=False, **tasks):
    tasks = tasks or {"mmlu": task("MMLU", 0.5)}
    return {"version": 1, "model": {"name": name}, "suite": "gemma2", "settings": {"chat": chat}, "tasks": tasks}


def kept(directory, right, found=None, group="law"):
    """A result in which `right` rows of mmlu are right: the first ones."""
    (directory / "samples").mkdir(parents=True)
    found = found or document(directory.name)
    (directory / "results.json").write_text(json.dumps(found))
    (directory / "gemma2.json").write_text(json.dumps({"status": "complete", "command": "eval suite", "files": {}}))
    rows = [{"id": i, "group": group, "prompt_ids_hash": "x", "correct": {"acc": int(i < right)}} for i in range(ROWS)]
    (directory / "samples" / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_two_results_are_compared_on_the_rows_of_both(tmp_path):
    ours, theirs = kept(tmp_path / "ours", 30), kept(tmp_path / "theirs", 12)
    lines = (theirs / "samples" / "mmlu.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"x"', '"y"')
    (theirs / "samples" / "mmlu.jsonl").write_text("\n".join([*lines[:-2], '{"id": "new", "correct": {"acc": 1}}']))
    found = compare_results(ours, theirs)
    assert found["against"] == {"name": "theirs"}
    compared = found["compared"]["mmlu"]
    assert (compared["n"], compared["gained"], compared["lost"]) == (38, 18, 0)
    assert (compared["only_ours"], compared["only_theirs"], compared["other_prompts"]) == (2, 1, 1)
    assert compared["first_gained"] == ["12", "13", "14", "15", "16"]
    assert compared["metric"] == "acc"


def test_a_result_against_itself_is_equal(tmp_path):
    compared = compare_results(kept(tmp_path / "a", 20), kept(tmp_path / "b", 20))["compared"]["mmlu"]
    assert (compared["difference"], compared["p"], compared["found"]) == (0.0, 1.0, False)
    assert compared["by_groups"]["difference"] == 0.0
    assert sentence(compared) == "equal on all 40 rows"


def test_texts_are_compared_per_token_and_less_is_better(tmp_path):
    for name, nats in (("a", 1.0), ("b", 1.5)):
        directory = kept(
            tmp_path / name, 0, {"model": {"name": name}, "tasks": {"mmlu": {"n": 9, "metrics": {"p": 1}}}}
        )
        rows = [{"id": i, "tokens": 10 + i, "nats": nats * (10 + i)} for i in range(9)]
        (directory / "samples" / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared = compare_results(tmp_path / "a", tmp_path / "b")["compared"]["mmlu"]
    assert compared["difference"] == pytest.approx(-0.5)
    assert not compared["higher_is_better"]
    assert sentence(compared, "nats per token", 1.0, False).startswith("better by 0.500 nats per token")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("results.json", None, "has no results.json"),
        ("results.json", '{"tasks": {"x": {}}}', "no figures of tasks"),
        ("results.json", json.dumps(document(arc=task("A", 0.1))), "no task in common"),
        ("gemma2.json", None, "not a finished result"),
        ("samples/mmlu.jsonl", None, "mmlu.jsonl is missing"),
        ("samples/mmlu.jsonl", "{", "mmlu.jsonl:1 is not JSON"),
        ("samples/mmlu.jsonl", "[]", "mmlu.jsonl:1 is not a row"),
        ("samples/mmlu.jsonl", '{"id": "z", "correct": {"acc": 1}}', "no row in common"),
    ],
)
def test_a_result_that_cannot_be_compared_is_one_line(tmp_path, file, content, words):
    ours, theirs = kept(tmp_path / "a", 3), kept(tmp_path / "b", 3)
    (theirs / file).unlink()
    if content is not None:
        (theirs / file).write_text(content)
    with pytest.raises(InputError, match=words):
        compare_results(ours, theirs)


def test_a_difference_is_said_with_its_interval_and_noise_with_the_rows_it_needs(tmp_path):
    far = kept(tmp_path / "far", 35, group="")
    near = kept(tmp_path / "near", 5, group="")
    little = kept(tmp_path / "little", 6, group="")
    said = sentence(compare_results(far, near)["compared"]["mmlu"])
    assert said.startswith("better by 75.0 points (95 %: +")
    assert "p < 0.0001; 30 rows up, 0 down of 40" in said
    assert sentence(compare_results(near, far)["compared"]["mmlu"]).startswith("worse by 75.0 points")
    said = sentence(compare_results(little, near)["compared"]["mmlu"])
    assert said.startswith("no difference found: +2.5 points")
    assert "rows would be needed for this difference; these find" in said


def test_another_size_is_allowed_and_said(tmp_path):
    found = compare_results(kept(tmp_path / "a", 20), kept(tmp_path / "b", 20))
    small, large = {"name": "a", "shape": [96, 4]}, {"name": "b", "shape": [2304, 26], "size": "2B"}
    said = next(comparison_lines({"model": small, "tasks": {}, **found, "against": large}))
    assert said == "Against b (another size: 2B, here hidden 96, 4 layers), row by row:"
    assert next(comparison_lines({"model": small, "tasks": {}, **found, "against": small})) == "Against a, row by row:"


def test_the_table_puts_published_values_next_to_the_metric_that_they_are_of():
    table = result_table(document(mmlu=task("MMLU", 0.52, notes=["few-shot from test"]), other=task("Other", 0.1)))
    first = table.lines[0]
    assert (first.title, first.metric, first.value, first.shown) == ("MMLU, 5-shot", "acc", 52.0, True)
    assert first.low == pytest.approx(52 - 2.022690920036762 * 2)  # Student's t, 39 degrees of freedom
    assert [line.shown for line in table.lines] == [True, False, False, False]
    assert table.published.cells["mmlu", "gemma-2-2b"].value == 52.2
    assert "MMLU: few-shot from test." in table.notes


@pytest.mark.parametrize(("name", "chat"), [("ours", True), ("org/gemma-2-9b-it", False)])
def test_a_tuned_model_stands_next_to_tuned_rows(name, chat):
    table = result_table(document(name, chat, gsm8k=task("GSM8K", 0.5), mmlu=task("MMLU", 0.5)))
    assert all(value.tuned for value in table.published.cells.values())
    assert any("published for GSM8K" in note for note in table.notes)


def test_a_limit_is_said():
    found = document()
    found["settings"]["limit"] = 10
    assert any("first 10 rows" in note for note in result_table(found).notes)


def test_rows_of_the_card_follow_the_hub_s_form():
    found = document(gsm8k=task("GSM8K", 0.241, metrics={"strict-match": 0.241}, stderr={"strict-match": 0.0118}))
    (row,) = model_index(found)
    assert row == {
        "task": {"type": "text-generation"},
        "dataset": {
            "type": "openai/gsm8k",
            "name": "GSM8K (5-shot)",
            "config": "main",
            "split": "test",
            "args": {"num_few_shot": 5, "fewshot_from": "dev", "rows": ROWS},
        },
        "metrics": [{"type": "exact_match", "value": 24.1, "name": "exact match, strict, % +- 1.18"}],
    }
    from huggingface_hub.repocard_data import model_index_to_eval_results

    _, read = model_index_to_eval_results([{"name": "ours", "results": [row]}])
    assert (read[0].dataset_type, read[0].metric_value, read[0].verified) == ("openai/gsm8k", 24.1, None)


def test_the_figure_shows_every_task_and_the_published_sizes():
    found = document(mmlu=task("MMLU", 0.5), gsm8k=task("GSM8K", 0.2, metrics={"strict-match": 0.2}, stderr={}))
    figure = results_figure(result_table(found))
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["MMLU, 5-shot", "GSM8K, 5-shot"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "gemma-2-2b",
        "Gemma 2 2B",
        "Gemma 2 9B",
        "Gemma 2 27B",
    ]


def test_show_prints_a_table_and_a_comparison_and_loads_no_model(tmp_path, capsys):
    ours, theirs = kept(tmp_path / "ours", 30), kept(tmp_path / "theirs", 12)
    assert invoke(["eval", "show", str(ours), "--against", str(theirs), "--published", "card"]) == 0
    printed = capsys.readouterr().out
    assert "Gemma 2 2B" in printed
    assert "51.3[1]" in printed
    assert "[*] Of the report v3" in printed
    assert "Against theirs, row by row:" in printed
    assert "first up: 12, 13, 14, 15, 16" in printed
    assert invoke(["eval", "show", str(ours), "--against", str(theirs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"]["mmlu"]["gained"] == 18
