"""Norms, distances and angles between models against numpy in float64 and against cases by hand."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from model_files import CONFIG, added, entries, random_arrays, safetensors_bytes, stored, write_model

from gemma2.core.errors import InputError
from gemma2.merging.inspect import distances
from gemma2.merging.inspect.difference import diff_models

NORM = {"model.norm.weight": (8,)}


def vector(*values):
    return {"model.norm.weight": np.array(values, float)}


def compare(tmp_path, a, b, base=None, dtypes=("F32", "F32", "F32"), **options):
    paths = {
        name: write_model(tmp_path / name, arrays, dtype)
        for (name, arrays), dtype in zip({"a": a, "b": b, "base": base}.items(), dtypes, strict=True)
        if arrays is not None
    }
    return diff_models(paths["a"], paths["b"], base=paths.get("base"), **options)


def degrees(x, y):
    return np.degrees(np.arccos(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)))


def test_a_three_four_five_triangle_has_its_figures(tmp_path):
    # a - base = (3, 0), b - base = (0, 4): 90 degrees, 5 apart.
    (row,) = compare(tmp_path, vector(4, 1), vector(1, 5), vector(1, 1)).groups
    assert (row.group, row.parameters, row.norm_difference, row.largest) == ("norm", 2, 5.0, 4.0)
    assert (row.norm_a, row.norm_b, row.norm_base) == pytest.approx((17**0.5, 26**0.5, 2**0.5))
    assert row.relative == pytest.approx(5 / 17**0.5)
    assert (row.task_norm_a, row.task_norm_b) == (3.0, 4.0)
    assert (row.task_cosine, row.task_angle) == pytest.approx((0.0, 90.0), abs=1e-12)
    assert row.angle == pytest.approx(np.degrees(np.arctan2(5, 1) - np.arctan2(1, 4)))


@pytest.mark.parametrize("dtypes", [("F32", "F32", "F32"), ("BF16", "F16", "F32")])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_figure_is_that_of_numpy_in_float64(tmp_path, monkeypatch, dtypes, threads):
    monkeypatch.setattr(distances, "CUT", 8192)  # cuts of two blocks
    shapes = {
        "model.embed_tokens.weight": (130, 97),
        "model.layers.0.a.weight": (5,),
        "model.layers.0.b.weight": (0,),
        "model.layers.1.a.weight": (30000,),
        "model.norm.weight": (8,),
    }
    base = random_arrays(0, shapes=shapes)
    a, b = (added(base, random_arrays(seed, 0.01, shapes)) for seed in (1, 2))
    found = compare(tmp_path, a, b, base, dtypes, threads=threads)
    rows = (*found.groups, found.total)
    assert [row.group for row in rows] == ["embed_tokens", "layers.0", "layers.1", "norm", "total"]
    for row in rows:
        names = [name for name in shapes if row.group in name or row.group == "total"]
        x, y, o = (
            np.concatenate([stored(arrays[name], dtype).ravel() for name in names])
            for arrays, dtype in zip((a, b, base), dtypes, strict=True)
        )
        size = np.linalg.norm
        expected = {
            "parameters": x.size,
            "norm_a": size(x),
            "norm_b": size(y),
            "norm_difference": size(y - x),
            "relative": size(y - x) / size(x),
            "largest": np.abs(y - x).max(),
            "cosine": np.dot(x, y) / size(x) / size(y),
            "angle": degrees(x, y),
            "norm_base": size(o),
            "task_norm_a": size(x - o),
            "task_norm_b": size(y - o),
            "task_cosine": np.dot(x - o, y - o) / size(x - o) / size(y - o),
            "task_angle": degrees(x - o, y - o),
        }
        assert asdict(row) == {"group": row.group} | {
            key: pytest.approx(value, 1e-6) for key, value in expected.items()
        }


def test_threads_do_not_change_a_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(distances, "CUT", 4096)
    shapes = {"model.embed_tokens.weight": (300, 100), "model.norm.weight": (8,)}
    models = [random_arrays(seed, shapes=shapes) for seed in range(3)]
    results = [compare(tmp_path / str(threads), *models, threads=threads) for threads in (1, 2, 5)]
    assert results[0].sums == results[1].sums == results[2].sums


def test_a_tiny_angle_is_not_lost(tmp_path):
    # 1e-6 radians: its cosine is 1 - 5e-13. fp32 weights resolve it, an arc cosine of fp32 sums does not.
    (row,) = compare(tmp_path, vector(1, 0), vector(1, 1e-6)).groups
    assert row.angle == pytest.approx(np.degrees(1e-6), rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "angle"), [((1, 2), (-2, -4), 180.0), ((1, 2), (2, 4), 0.0), ((0, 0), (1, 1), None)], ids=str
)
def test_opposite_parallel_and_zero_vectors(tmp_path, a, b, angle):
    (row,) = compare(tmp_path, vector(*a), vector(*b)).groups
    assert row.angle == (angle if angle is None else pytest.approx(angle, abs=1e-5))
    assert (row.relative is None) == (angle is None)


def test_by_tensor_the_rows_are_the_tensors(tmp_path):
    found = compare(tmp_path, random_arrays(0), random_arrays(1), granularity="tensor")
    assert [row.group for row in found.groups] == list(random_arrays(0))
    layer = found.over("x", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
    assert layer.parameters == 12 * 8 + 8 * 8


def test_sharding_changes_nothing_and_a_stored_copy_counts_once(tmp_path):
    a, b = random_arrays(0), random_arrays(1)
    one = compare(tmp_path, a, b)
    write_model(tmp_path / "sharded", a, shards=3)
    assert diff_models(tmp_path / "sharded", tmp_path / "b").total == one.total
    for name, arrays in {"tied-a": a, "tied-b": b}.items():
        write_model(tmp_path / name, arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]})
    tied = diff_models(tmp_path / "tied-a", tmp_path / "tied-b")
    assert tied.total == one.total
    assert tied.notes == ("lm_head.weight repeats model.embed_tokens.weight in model a, model b: compared once",)


# --- warnings and notes ---------------------------------------------------------------------------------------------


def test_identical_models_are_reported_as_identical(tmp_path):
    found = compare(tmp_path, random_arrays(0), random_arrays(0))
    assert found.warnings == ("the models are identical: all 456 parameters are equal",)
    assert (found.total.relative, found.total.largest, found.total.angle) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b", "base", "warning"),
    [
        ((1, 0), (0, 1), None, "the difference is 1.41 of the norm of a: these models hardly have a common parent"),
        ((9, 9), (9, 10), (9, 9), "model a is identical to the base: it has no task vector"),
        ((9, 10), (9, 9), (9, 9), "model b is identical to the base: it has no task vector"),
        ((1, 9), (1.1, 1), (1, 1), "model a is far from the base: its task vector has norm 8, the base 1.414; is the"),
        ((9, 9), (9.01, 9.001), (8.9, 9), "task vectors are under 30 degrees apart in 1 of 1 groups, most so in norm"),
        (
            (9, 9.1),
            (9, 8.9),
            (9, 9),
            "task vectors are over 150 degrees apart in 1 of 1 groups, most so in norm (180.0",
        ),
    ],
)
def test_suspicious_differences_are_warnings_with_figures(tmp_path, a, b, base, warning):
    found = compare(tmp_path, vector(*a), vector(*b), base and vector(*base))
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith(warning)


def test_frozen_groups_are_counted_and_good_task_vectors_give_no_warning(tmp_path):
    base = random_arrays(0)
    a, b = (added(base, random_arrays(seed, 0.001)) for seed in (1, 2))
    assert compare(tmp_path / "1", a, b, base).warnings == ()
    frozen = b | {name: a[name] for name in a if "layers.1" in name}
    found = compare(tmp_path / "2", a, frozen, base).warnings
    assert "1 of 4 groups are identical, layers.1 for one" in found


def test_other_dtypes_and_tokenizers_are_notes(tmp_path):
    paths = [write_model(tmp_path / "a", vector(1, 2), "BF16"), write_model(tmp_path / "b", vector(1, 2.5), "F32")]
    for path, token in zip(paths, ("yes", "no"), strict=True):
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {token: 0}}}))
    notes = diff_models(*paths).notes
    assert notes[0] == "model a is BF16, model b is F32: part of the difference is rounding"
    assert "the tokenizers of model a" in notes[1]
    assert len(notes) == 2


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["model a", "model b", "base"])
def test_nan_is_refused_naming_model_and_tensor(tmp_path, role):
    models = {"model a": vector(1, 2), "model b": vector(2, 1), "base": vector(1, 1)}
    models[role] = vector(1, np.nan)
    with pytest.raises(InputError, match=rf"^{role} \S+: model.norm.weight holds NaN or Inf in elements 0 to 1"):
        compare(tmp_path, *models.values())


def test_models_that_do_not_fit_are_refused_as_in_a_merge(tmp_path):
    with pytest.raises(InputError, match=r"model.norm.weight is \[2\] in model a .*, \[3\] in model b"):
        compare(tmp_path / "shape", vector(1, 2), vector(1, 2, 3))
    with pytest.raises(InputError, match=r"has model.layers.0\.\S+ and \d more, model b"):
        compare(
            tmp_path / "keys", random_arrays(0), vector(*range(8)) | {"model.embed_tokens.weight": np.ones((16, 8))}
        )
    write_model(tmp_path / "x", vector(1, 2))
    write_model(tmp_path / "y", vector(1, 2), config=CONFIG | {"hidden_size": 9})
    with pytest.raises(InputError, match="hidden_size differs: 8 in model a"):
        diff_models(tmp_path / "x", tmp_path / "y")
    with pytest.raises(InputError, match=r"model b .*nowhere is not a directory"):
        diff_models(tmp_path / "x", tmp_path / "nowhere")


# --- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_is_compared_as_the_model_it_makes_of_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr(distances, "CUT", 4096)
    name, generator = "model.layers.0.mlp.up_proj", np.random.default_rng(0)
    base = {f"{name}.weight": generator.standard_normal((150, 80)), "model.norm.weight": np.ones(8)}
    factors = {"lora_A": generator.standard_normal((3, 80)) / 50, "lora_B": generator.standard_normal((150, 3)) / 50}
    write_model(tmp_path / "base", base)
    (tmp_path / "x").mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "elsewhere"}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}.{part}.weight": array for part, array in factors.items()}
    (tmp_path / "x" / "adapter_model.safetensors").write_bytes(safetensors_bytes(entries(named, "F32")))
    merged = base[f"{name}.weight"] + 2 * factors["lora_B"] @ factors["lora_A"]
    write_model(tmp_path / "merged", base | {f"{name}.weight": merged})
    found = diff_models(tmp_path / "x", tmp_path / "merged", base=tmp_path / "base").total
    assert found.task_norm_b == pytest.approx(np.linalg.norm(2 * factors["lora_B"] @ factors["lora_A"]), rel=1e-5)
    assert found.norm_difference < 1e-4 * found.task_norm_b
