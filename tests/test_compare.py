"""bench/compare.py: what counts as a difference between two folders of outputs. Runs no command."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from processes import ROOT
from safetensors.numpy import save_file


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


trees, recipes = load("trees"), load("recipes")
MANIFEST = {"gemma2": "0.1.0", "command": "sft", "started": "10:00", "files": {"README.md": {"size": 5}}}
METRICS = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


@pytest.fixture
def pair(tmp_path):
    """Two equal folders of an output, with weights, manifest, metrics and a model card."""
    for name in ("a", "b"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        weights = {"first": np.zeros((2, 3), np.float32), "second": np.arange(4, dtype=np.float16)}
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        (out / "gemma2.json").write_text(json.dumps(MANIFEST, indent=2))
        write_metrics(out, METRICS)
        (out / "README.md").write_text("# out")
    return tmp_path / "a", tmp_path / "b"


def write_metrics(out, rows):
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def differences(pair):
    return [str(one) for one in trees.compare_trees(*pair).differences]


def change(pair, name, value):
    (pair[1] / "out" / name).write_text(value if isinstance(value, str) else json.dumps(value, indent=2))


def test_equal_folders_have_no_difference(pair):
    found = trees.compare_trees(*pair)
    assert (found.files, found.differences, found.prose) == (4, [], [])


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_tensor_is_named_with_the_number_of_elements_and_the_largest_difference(pair):
    weights = {"first": np.zeros((2, 3), np.float32), "second": np.arange(4, dtype=np.float16)}
    weights["second"][1:3] += [0.5, 0.25]
    save_file(weights, pair[1] / "out" / "model.safetensors", {"format": "pt"})
    assert differences(pair) == ["out/model.safetensors: second: 2 of 4 elements, largest difference 0.5"]


def test_zero_and_minus_zero_are_different_bits(pair):
    weights = {"first": -np.zeros((2, 3), np.float32), "second": np.arange(4, dtype=np.float16)}
    save_file(weights, pair[1] / "out" / "model.safetensors", {"format": "pt"})
    assert differences(pair) == ["out/model.safetensors: first: 6 of 6 elements, largest difference 0"]


def test_bfloat16_is_the_upper_half_of_float32():
    ones, twos = (np.array([value], np.float32).view(np.uint32) >> 16 for value in (1, 2))
    told = trees._elements(ones.astype("<u2").tobytes(), twos.astype("<u2").tobytes(), "BF16", [1])
    assert told == "1 of 1 elements, largest difference 1"


def test_a_missing_tensor_and_another_shape_are_differences(pair):
    path = pair[1] / "out" / "model.safetensors"
    save_file({"first": np.zeros((2, 3), np.float32)}, path)
    assert differences(pair) == ["out/model.safetensors: second: only in A"]
    save_file({"first": np.zeros((3, 2), np.float32), "second": np.arange(4, dtype=np.float16)}, path)
    assert differences(pair) == ["out/model.safetensors: first: F32 [2, 3] and F32 [3, 2]"]


def test_metadata_of_weights_counts(pair):
    weights = {"first": np.zeros((2, 3), np.float32), "second": np.arange(4, dtype=np.float16)}
    save_file(weights, pair[1] / "out" / "model.safetensors", {"format": "np"})
    assert differences(pair) == ['out/model.safetensors: __metadata__/format: "pt" and "np"']


# --- JSON -----------------------------------------------------------------------------------------------------------


def test_a_metric_is_named_with_line_and_both_values(pair):
    write_metrics(pair[1] / "out", [METRICS[0], {"step": 2, "loss": 0.25000000000000006}])
    assert differences(pair) == ["out/metrics.jsonl: line 2: loss: 0.25 and 0.25000000000000006"]


def test_a_missing_line_is_a_difference(pair):
    write_metrics(pair[1] / "out", METRICS[:1])
    assert differences(pair) == ["out/metrics.jsonl: 2 and 1 lines"]


def test_time_version_and_digest_of_the_card_may_differ(pair):
    files = {"README.md": {"size": 6}}
    change(pair, "gemma2.json", MANIFEST | {"started": "11:00", "gemma2": "0.2.0", "files": files})
    assert differences(pair) == []


def test_an_ignored_field_has_to_be_there(pair):
    change(pair, "gemma2.json", {key: value for key, value in MANIFEST.items() if key != "started"})
    assert differences(pair) == ["out/gemma2.json: started: only in A"]


def test_next_to_an_ignored_field_every_other_counts(pair):
    change(pair, "gemma2.json", MANIFEST | {"started": "11:00", "command": "distill"})
    assert differences(pair) == ['out/gemma2.json: command: "sft" and "distill"']


def test_an_integer_is_not_the_float_of_its_value(pair):
    write_metrics(pair[1] / "out", [{"step": 1.0, "loss": 0.5}, METRICS[1]])
    assert differences(pair) == ["out/metrics.jsonl: line 1: step: 1 and 1.0"]


def test_the_order_of_keys_counts(pair):
    change(pair, "gemma2.json", dict(reversed(MANIFEST.items())))
    assert differences(pair) == ["out/gemma2.json: the document: keys in another order"]


def test_indentation_counts(pair):
    change(pair, "gemma2.json", json.dumps(MANIFEST, indent=4))
    assert len(differences(pair)) == 1


def test_a_file_that_is_not_json_is_compared_as_bytes(pair):
    change(pair, "gemma2.json", "{")
    assert differences(pair)[0].startswith("out/gemma2.json: bytes differ, and cannot be read")


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_of_one_folder_alone_is_a_difference(pair):
    (pair[0] / "out" / "metrics.jsonl").unlink()
    assert differences(pair) == ["out/metrics.jsonl: only in B"]


def test_the_path_of_the_folder_may_differ(pair):
    for folder in pair:
        (folder / "out" / "plan.txt").write_text(f"writes {folder}/out")
    assert differences(pair) == []


def test_a_reworded_model_card_is_reported_apart(pair):
    change(pair, "README.md", "# The output")
    found = trees.compare_trees(*pair)
    assert found.differences == []
    assert [str(one) for one in found.prose] == ["out/README.md: line 1: '# out' and '# The output'"]


def test_a_reworded_warning_is_prose_and_a_missing_one_is_not(pair):
    for folder, warning in zip(pair, ("too near", "too close"), strict=True):
        (folder / "out" / "gemma2.json").write_text(json.dumps({"summary": {"warnings": [warning]}}))
    found = trees.compare_trees(*pair)
    assert found.differences == []
    assert [str(one) for one in found.prose] == ['out/gemma2.json: summary/warnings/0: "too near" and "too close"']
    change(pair, "gemma2.json", {"summary": {"warnings": []}})
    assert differences(pair) == ["out/gemma2.json: summary/warnings: 1 and 0 entries"]


def test_a_report_page_may_differ_in_dates_and_durations(pair):
    for folder, text in zip(pair, ("6 s of work, 2026-11-28", "1 min 5 s of work, 2026-11-29"), strict=True):
        (folder / "out" / "report.html").write_text(f"<p>{text}</p>")
    found = trees.compare_trees(*pair)
    assert (found.differences, found.prose) == ([], [])


def test_only_the_folders_that_are_named_are_compared(pair):
    (pair[0] / "more").mkdir()
    (pair[0] / "more" / "file").touch()
    assert trees.compare_trees(*pair, folders=["out"]).differences == []
    assert [str(one) for one in trees.compare_trees(*pair).differences] == ["more/file: only in A"]


# --- recipes --------------------------------------------------------------------------------------------------------


def test_a_recipe_comes_after_those_that_it_needs_and_writes_into_its_own_folder():
    names = list(recipes.RECIPES)
    for name, recipe in recipes.RECIPES.items():
        assert all(names.index(need) < names.index(name) for need in recipe.needs)
        outs = [line.split(" --out ")[1].split()[0] for line in recipe.commands if " --out " in line]
        assert all(path.startswith(f"{name}/") for path in [*outs, *recipe.files])


def test_a_recipe_brings_along_what_it_needs():
    assert recipes.with_needs(["sft"]) == ["tiny", "generate", "filter", "sft"]
