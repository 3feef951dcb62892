"""The published rows: cell by cell as the tables print them, footnotes where sources differ, the rule of -it models."""

import math

import pytest

from gemma2.posttrain.doctor.checks.config_checks import SIZES
from gemma2.posttrain.evaluation.compared.published import (
    SOURCES,
    published_columns,
    published_values,
    shape_of,
    task_label,
)

TASKS = ("mmlu", "arc_challenge", "gsm8k", "winogrande", "hellaswag")
# Report 2408.00118v3: Table 13 (pre-trained), the last two columns Table 12.
MODELS = [
    "gemma-1-2b",
    "gemma-2-2b",
    "mistral-7b",
    "llama-3-8b",
    "gemma-1-7b",
    "gemma-2-9b",
    "gemma-2-27b",
    "qwen1.5-32b",
    "llama-3-70b",
]
TABLE = """
mmlu          5  42.3 52.2 62.5 66.6 64.4 71.3 75.2 74.3 79.2
arc_challenge 25 48.5 55.7 60.5 59.2 61.1 68.4 71.4 63.6 68.8
gsm8k         5  15.1 24.3 39.6 45.7 51.8 68.6 74.0 61.1 76.9
winogrande    5  66.8 71.3 78.5 76.1 79.0 80.6 83.7 81.5 85.3
hellaswag     10 71.7 72.9 83.0 82.0 82.3 81.9 86.4 85.0 88.0
"""
# Table 17, pre-trained -> instruction-tuned; 2B, 9B, 27B.
TUNED = {
    "mmlu": ((52.2, 56.1), (71.3, 72.3), (75.2, 76.2)),
    "mbpp": ((30.2, 36.6), (52.4, 59.2), (62.6, 67.4)),
}
# Values of the blog post of June 2024 and of the model cards.
OTHERS = {
    ("gemma-2-27b", "gsm8k"): {"v3": 74.0, "blog": 75.1, "card": 74.0},
    ("gemma-2-9b", "gsm8k"): {"v3": 68.6, "blog": 62.3, "card": 68.6},
    ("mistral-7b", "gsm8k"): {"v3": 39.6, "blog": 34.5},
    ("llama-3-8b", "winogrande"): {"v3": 76.1, "blog": 78.5},
    ("gemma-1-7b", "gsm8k"): {"v3": 51.8, "blog": 50.9},
    ("gemma-2-2b", "mmlu"): {"v3": 52.2, "card": 51.3},
    ("gemma-2-2b", "hellaswag"): {"v3": 72.9, "card": 73.0},
    ("gemma-2-2b", "arc_challenge"): {"v3": 55.7, "card": 55.4},
    ("gemma-2-2b", "winogrande"): {"v3": 71.3, "card": 70.9},
    ("gemma-2-2b", "gsm8k"): {"v3": 24.3, "card": 23.9},
    ("gemma-2-27b", "drop"): {"v3": 74.2, "card": 72.2},
}


def cells():
    return {(v.model, v.task, v.tuned, v.source): v for v in published_values()}


def test_every_cell_of_the_report_is_there_and_no_other():
    found = cells()
    expected = {}
    for line in TABLE.split("\n")[1:-1]:
        task, shots, *values = line.split()
        for model, value in zip(MODELS, values, strict=True):
            expected[model, task, False, "v3"] = (float(value), int(shots))
            entry = found[model, task, False, "v3"]
            assert (entry.value, entry.shots) == (float(value), int(shots)), (model, task)
            assert entry.version == "2408.00118v3"
            assert entry.table == ("Table 12" if model in MODELS[-2:] else "Table 13")
    for task, pairs in TUNED.items():
        for size, (before, after) in zip(("2b", "9b", "27b"), pairs, strict=True):
            assert found[f"gemma-2-{size}", task, False, "v3"].value == before
            assert found[f"gemma-2-{size}", task, True, "v3"].value == after
            assert found[f"gemma-2-{size}", task, True, "v3"].table == "Table 17"
            expected[f"gemma-2-{size}", task, False, "v3"] = expected[f"gemma-2-{size}", task, True, "v3"] = ()
    for (model, task), values in OTHERS.items():
        for source, value in values.items():
            assert found[model, task, False, source].value == value, (model, task, source)
            expected[model, task, False, source] = ()
    assert found.keys() == expected.keys()
    assert len(published_values()) == len(found)  # no cell twice


def test_each_value_says_where_it_is_from():
    assert all(value.source in SOURCES and value.version and value.table for value in published_values())


@pytest.mark.parametrize("source", SOURCES)
def test_a_table_takes_one_source_and_says_where_the_others_differ(source):
    shown = published_columns([*TASKS, "drop"], source=source)
    for (model, task), values in OTHERS.items():
        assert shown.cells[task, model].value == values.get(source, values["v3"])
        marks = shown.marks.get((task, model), ())
        assert ("*" in marks) == (source not in values)
        if len(set(values.values())) > 1:
            note = next(shown.notes[mark] for mark in marks if mark != "*")
            assert all(f"{value:.1f}" in note for value in values.values())
    assert shown.marks.keys() >= {(task, model) for (model, task), values in OTHERS.items() if source not in values}


def test_values_that_need_an_explanation_have_one():
    notes = " ".join(published_columns(TASKS, source="blog").notes.values())
    for words in ("equal to the cell of Mistral 7B", "called Gemma (8B) there", "Qwen1.5 34B", "Meta's blog post"):
        assert words in notes
    assert "partial score" in " ".join(published_columns(TASKS, source="card").notes.values())


def test_a_tuned_model_is_compared_with_tuned_rows_only():
    shown = published_columns(TASKS, tuned=True, size="9B")
    assert list(shown.columns) == ["gemma-2-9b", "gemma-2-2b", "gemma-2-27b"]
    assert next(iter(shown.columns.values())) == "Gemma 2 9B-it"
    assert {place: value.value for place, value in shown.cells.items()} == {
        ("mmlu", "gemma-2-2b"): 56.1,
        ("mmlu", "gemma-2-9b"): 72.3,
        ("mmlu", "gemma-2-27b"): 76.2,
    }
    assert any("ARC-c, GSM8K, Winogrande, HellaSwag" in note for note in shown.further)
    assert all(not value.tuned for value in published_columns(TASKS).cells.values())


def test_the_own_size_comes_first():
    assert next(iter(published_columns(TASKS, size="27B").columns)) == "gemma-2-27b"
    assert next(iter(published_columns(TASKS).columns)) == "gemma-2-2b"


@pytest.mark.parametrize(
    ("task", "rows", "points"),
    [
        *[("mmlu", 14042, 0.42), ("hellaswag", 10042, 0.44), ("gsm8k", 1319, 1.18), ("winogrande", 1267, 1.27)],
        ("arc_challenge", 1172, 1.45),
    ],
)
def test_the_sampling_error_of_a_2b_is_a_point_or_so(task, rows, points):
    """What a difference from a published row has to exceed; docs/eval.md states these."""
    share = next(v.value for v in published_values() if (v.model, v.task, v.source) == ("gemma-2-2b", task, "v3")) / 100
    assert 100 * math.sqrt(share * (1 - share) / rows) == pytest.approx(points, abs=0.006)
    assert task_label(task) != task


def test_the_size_of_a_model_is_that_of_its_shape():
    for name, size in SIZES.items():
        config = {"hidden_size": size.hidden_size, "num_hidden_layers": size.num_hidden_layers}
        assert shape_of(config) == {"shape": [size.hidden_size, size.num_hidden_layers], "size": name}
        assert "size" not in shape_of(config | {"num_hidden_layers": 2})
