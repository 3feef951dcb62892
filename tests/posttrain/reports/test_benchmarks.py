"""The report shows every result of `gemma2 eval` in a run: table, published rows, comparison, notes."""

import json

import pytest

from gemma2.posttrain.reports.collect import collect
from gemma2.posttrain.reports.page import render

TASK = {"title": "MMLU", "n": 100, "metric": "acc", "metrics": {"acc": 0.5, "acc_by_size": 0.4}}
TASK["stderr"] = {"acc": 0.05, "acc_by_size": 0.05}
TASK |= {"shots": 5, "split": "test", "fewshot_from": "dev", "notes": ["few-shot from <test>"]}
COMPARED = {"metric": "acc", "higher_is_better": True, "n": 100, "clusters": 100, "ours": 0.5, "theirs": 0.3}
COMPARED |= {"difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.00001, "found": True, "gained": 25, "lost": 5}
COMPARED |= {"first_gained": ["a1"], "first_lost": ["b2"], "rows_needed": None, "detectable": 0.1}
COMPARED |= {"only_ours": 0, "only_theirs": 0, "other_prompts": 0}
SUITE = {"suite": "gemma2", "model": {"name": "mine"}, "settings": {"chat": False}, "tasks": {"mmlu": TASK}}


def stage(root, name, document, command="eval suite"):
    (root / name).mkdir()
    (root / name / "results.json").write_text(document if isinstance(document, str) else json.dumps(document))
    manifest = {"schema_version": 1, "status": "complete", "command": command, "files": {}, "config": {}}
    (root / name / "gemma2.json").write_text(json.dumps(manifest))


def page(root):
    return render(collect(root))


def test_a_suite_stands_next_to_the_published_rows(tmp_path):
    stage(tmp_path, "eval", SUITE | {"against": {"name": "parent"}, "compared": {"mmlu": COMPARED}})
    html = page(tmp_path)
    for words in ("Benchmarks", "50.0", "40.1 to 59.9", "Gemma 2 27B", "75.2", "few-shot from &lt;test&gt;", "<svg"):
        assert words in html
    assert html.count('<td data-label="Gemma 2 27B">75.2</td>') == 1  # next to the metric that it is of
    assert "Against parent, row by row:" in html
    assert "better by 20.0 points (95 %: +10.0 to +30.0; p &lt; 0.0001; 25 rows up, 5 down of 100)" in html
    assert "there is no front" not in html


def test_other_measures_have_a_plain_table(tmp_path):
    task = {"n": 7, "metrics": {"bits_per_byte": 1.25}, "low": {"bits_per_byte": 1.2}, "high": {"bits_per_byte": 1.3}}
    stage(tmp_path, "text", {"model": {"name": "mine"}, "tasks": {"book.txt": task}}, "eval perplexity")
    html = page(tmp_path)
    for words in ("book.txt", "bits per byte", "1.25", "1.200 to 1.300"):
        assert words in html
    assert "Gemma 2 27B" not in html


@pytest.mark.parametrize("document", ["{", '{"tasks": {"mmlu": {"metrics": {"acc": 1}}}, "suite": "gemma2"}', "[]"])
def test_a_result_that_cannot_be_read_is_a_gap(tmp_path, document):
    stage(tmp_path, "eval", document)
    html = page(tmp_path)
    assert "eval/results.json cannot be shown" in html
    assert 'id="benchmarks"' not in html


def test_a_run_without_results_has_no_such_section(tmp_path):
    stage(tmp_path, "eval", SUITE)
    (tmp_path / "eval" / "results.json").unlink()
    assert 'href="#benchmarks"' not in page(tmp_path)
