"""What models disagree on besides their weights: a warning with both sides, a choice, nothing in silence."""

import json

import numpy as np
import pytest
from model_files import random_arrays, write_model

from gemma2.core.errors import UsageError
from gemma2.merging import MergeRequest, merge, plan_merge

FILES = {
    "chat templates differ": ("chat_template.jinja", "one", "two", "'one' in model 1, 'two' in model 2"),
    "ids that end an answer differ": (
        "generation_config.json", '{"eos_token_id": 1}', '{"eos_token_id": [107, 1]}', "[1] in model 1, [1, 107] in",
    ),
    "special tokens differ": (
        "special_tokens_map.json", '{"eos_token": "<eos>"}', '{"eos_token": {"content": "<end>"}}',
        "eos_token <eos> in model 1, eos_token <end> in model 2",
    ),
}  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    return tuple(write_model(tmp_path / f"m-{n}", random_arrays(n)) for n in (1, 2))


def request(pair, **options):
    return MergeRequest(**{"method": "linear", "models": pair} | options)


def test_models_that_agree_give_no_warning(pair, tmp_path):
    for path in pair:
        for name, left, _, _ in FILES.values():
            (path / name).write_text(left)
    assert merge(request(pair), out=tmp_path / "out").warnings == ()


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("absent", [False, True])
def test_a_difference_is_one_warning_with_both_sides_in_plan_manifest_and_result(pair, tmp_path, what, absent):
    name, left, right, sides = FILES[what]
    (pair[0] / name).write_text(left)
    if not absent:
        (pair[1] / name).write_text(right)
    (line,) = plan_merge(request(pair), tmp_path / "out").describe()["warnings"]
    assert line.startswith(what)
    assert (sides in line) or (absent and "none in model 2" in line)
    assert "the output has" in line
    result = merge(request(pair), out=tmp_path / "out")
    assert result.warnings == (line,)
    assert json.loads((tmp_path / "out/gemma2.json").read_text())["summary"]["warnings"] == [line]


def test_different_dtypes_and_lengths_are_warnings_until_chosen(tmp_path):
    a = write_model(tmp_path / "a", random_arrays(1), "BF16", config={"max_position_embeddings": 128})
    b = write_model(tmp_path / "b", random_arrays(2), "F32")
    lines = plan_merge(request((a, b)), tmp_path / "out").warnings
    assert lines[0].startswith("dtypes differ: BF16 in model 1, F32 in model 2; the output has that of model 1; choose")
    assert lines[1].startswith("max_position_embeddings differs: 128 in model 1, 8192 in model 2")
    assert not any("dtype" in line for line in plan_merge(request((a, b), dtype="float32"), tmp_path / "out").warnings)


@pytest.mark.parametrize("choice", ["1", "2", "base", "file"])
def test_a_chosen_chat_template_is_that_of_the_output(pair, tmp_path, choice):
    base = write_model(tmp_path / "base", random_arrays(3))
    texts = {"1": "of 1", "2": "of 2", "base": "of base", "file": "of file"}
    (pair[0] / "chat_template.jinja").write_text(texts["1"])
    (pair[1] / "tokenizer_config.json").write_text(json.dumps({"chat_template": texts["2"]}))
    (base / "chat_template.jinja").write_text(texts["base"])
    (tmp_path / "mine.jinja").write_text(texts["file"])
    named = str(tmp_path / "mine.jinja") if choice == "file" else choice
    asked = request(pair, method="task-arithmetic", base=base, chat_template=named)
    result = merge(asked, out=tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == texts[choice]
    assert not any("chat templates" in line for line in result.warnings)
    assert any(note.startswith("chat template: ") for note in result.plan.notes)


@pytest.mark.parametrize(
    ("choice", "message"), [("2", "model 2 has no chat template; choose 1 or a"), ("7", "model 7 is")]
)
def test_a_template_that_is_not_there_is_refused_with_a_choice_that_is(pair, tmp_path, choice, message):
    (pair[0] / "chat_template.jinja").write_text("x")
    with pytest.raises(UsageError, match=message):
        plan_merge(request(pair, chat_template=choice), tmp_path / "out")


def test_slerp_without_a_base_warns_in_the_plan_too(pair, tmp_path):
    (line,) = plan_merge(request(pair, method="slerp"), tmp_path / "out").describe()["warnings"]
    assert line.startswith("no --base, and the models record no common parent: SLERP of the weights themselves")
    assert len(merge(request(pair, method="slerp"), out=tmp_path / "out").warnings) == 1


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_matrix_and_a_vector_that_is_constant_in_one_model_are_warnings(tmp_path, value):
    name = "model.layers.0.mlp.up_proj.weight"
    a = write_model(tmp_path / "a", random_arrays(1) | {name: np.full((12, 8), value)}, "BF16")
    b = write_model(tmp_path / "b", random_arrays(2) | {"model.norm.weight": np.full(8, value)}, "BF16")
    lines = merge(request((a, b)), out=tmp_path / "out").warnings
    assert [line.partition(":")[0] for line in lines] == [f"model 1 {a}", f"model 2 {b}"]
    assert f"every element of {name} is {value:g}, not constant in model 2" in lines[0]


def test_vectors_that_are_constant_in_all_models_are_usual(tmp_path):
    ones = {"model.norm.weight": np.ones(8)}
    pair = [write_model(tmp_path / name, random_arrays(seed) | ones) for seed, name in enumerate("ab")]
    assert merge(request(tuple(pair)), out=tmp_path / "out").warnings == ()
