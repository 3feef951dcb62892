"""Groups, the recorded common parent, dry runs, and the warnings of the report."""

import json
import shutil

import numpy as np
import pytest
from model_files import added, random_arrays, read_raw, write_model

from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import read_manifest
from gemma2.merging import MergeRequest, inspect_model, merge, plan_merge
from gemma2.merging.methods.coefficients import slerp
from gemma2.merging.methods.method import Mix
from gemma2.merging.plan.merge_plan import group_of
from gemma2.merging.streaming.group_report import judge, mean_angle, report_group


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.layers.11.self_attn.q_proj.weight", "layers.11"),
        ("model.layers.1.post_feedforward_layernorm.weight", "layers.1"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "lm_head"),
        ("score.weight", "score"),
        ("transformer.h.3.attn.c_attn.bias", "transformer.h.3"),
    ],
)
def test_each_layer_is_one_group_and_so_is_each_other_tensor(name, group):
    assert group_of(name) == group


@pytest.fixture
def family(tmp_path):
    """A parent and two policies whose manifests record it, like those of `gemma2 rlhf`."""
    base = random_arrays(0)
    parent = write_model(tmp_path / "sft", base)
    for number in (1, 2):
        path = write_model(tmp_path / f"rl-{number}", added(base, random_arrays(number, 0.1)))
        record(path, parent)
    return tmp_path


def record(path, parent, role="policy"):
    parents = [
        {"role": role, "path": f"../{parent.name}", "weights": digest_weights(parent)},
        {"role": "reward", "path": "../rm", "weights": "sha256:0"},
    ]
    (path / "gemma2.json").write_text(json.dumps({"status": "complete", "parents": parents}))


def request(root, method="slerp", **options):
    return MergeRequest(method=method, models=(root / "rl-1", root / "rl-2"), **options)


@pytest.mark.parametrize("method", ["slerp", "warp"])
def test_the_parent_that_all_models_record_is_the_base(family, method):
    found = merge(request(family, method), out=family / "found")
    merge(request(family, method, base=family / "sft"), out=family / "named")
    assert found.plan.notes == (f"base: {family / 'sft'}, the parent that all models record",)
    assert read_raw(family / "found") == read_raw(family / "named")
    assert read_manifest(family / "found")["parents"][0]["role"] == "base"
    assert found.warnings == ()


def test_with_a_recorded_parent_that_is_gone_or_changed_a_note_says_that_weights_are_merged(family):
    write_model(family / "sft", random_arrays(9))
    lost = "record ../sft as their common parent, but it is missing or has other weights: merging the weights"
    assert lost in plan_merge(request(family), family / "out").notes[0]
    shutil.rmtree(family / "sft")
    plan = plan_merge(request(family), family / "out")
    assert plan.base is None
    assert lost in plan.notes[0]


def test_a_method_that_needs_the_init_is_refused_if_it_is_gone(family):
    shutil.rmtree(family / "sft")
    with pytest.raises(InputError, match="missing or has other weights; name it: --base"):
        plan_merge(request(family, method="warp"), family / "out")


def test_models_of_different_parents_are_merged_as_weights_with_one_warning(family):
    record(family / "rl-2", family / "rl-1")
    result = merge(request(family), out=family / "out")
    assert result.plan.base is None
    (warning,) = result.warnings
    assert "the models record no common parent: SLERP of the weights themselves, which are" in warning
    assert "name the init with --base" in warning
    with pytest.raises(UsageError, match="no common parent"):
        plan_merge(request(family, "warp"), family / "out")


def test_a_record_of_two_inits_gives_no_common_parent(family):
    for number in (1, 2):
        path = family / f"rl-{number}/gemma2.json"
        manifest = json.loads(path.read_text())
        manifest["parents"][1]["role"] = "model"
        path.write_text(json.dumps(manifest))
    assert plan_merge(request(family), family / "out").base is None


def test_the_inputs_of_a_merge_do_not_count_as_its_init(family):
    for eta in (0.3, 0.6):
        liti = MergeRequest(method="liti", models=(family / "rl-1",), base=family / "sft", etas=(eta,))
        merge(liti, out=family / f"liti-{eta}")
    slerp_of_merges = MergeRequest(method="slerp", models=(family / "liti-0.3", family / "liti-0.6"))
    assert plan_merge(slerp_of_merges, family / "out").base is None


def test_the_manifest_is_complete_and_names_parents_by_relative_path_and_digest(family):
    merge(request(family), out=family / "out")
    manifest = read_manifest(family / "out")
    assert manifest["status"] == "complete"
    assert manifest["command"] == "merge slerp"
    assert [(parent["role"], parent["path"]) for parent in manifest["parents"]] == [
        ("base", "../sft"),
        ("input", "../rl-1"),
        ("input", "../rl-2"),
    ]
    assert manifest["parents"][1]["weights"] == digest_weights(family / "rl-1")
    assert str(family) not in json.dumps({**manifest, "summary": {**manifest["summary"], "notes": []}})


def test_a_plan_reports_bytes_and_passes_and_writes_nothing(family):
    before = sorted(family.rglob("*"))
    plan = plan_merge(request(family), family / "out").describe()
    weights = 456 * 4  # parameters of the test model in fp32
    assert (plan["parameters"], plan["passes"]) == (456, 2)
    assert plan["bytes_to_read"] == 2 * 3 * weights
    assert plan["bytes_to_write"] == weights
    assert sorted(family.rglob("*")) == before


def test_inspect_reports_parameters_groups_and_lineage(family):
    merge(request(family, dtype="bfloat16"), out=family / "out")
    found = inspect_model(family / "out")
    assert found["parameters"] == 456
    assert found["dtypes"] == {"BF16": 456}
    assert [(row["group"], row["parameters"]) for row in found["groups"]] == [
        ("embed_tokens", 128),
        ("layers.0", 160),
        ("layers.1", 160),
        ("norm", 8),
    ]
    assert found["lineage"]["command"] == "merge slerp"
    assert inspect_model(family / "sft")["lineage"] is None


# --- report ---


def group(name, base_square, *vectors, parameters=10):
    matrix = np.array(vectors, dtype=np.float64)
    gram = matrix @ matrix.T
    result = slerp(gram)
    weights = result.coefficients
    if base_square is not None:
        weights = np.concatenate([[1 - weights.sum()], weights])
    return report_group(name, parameters, base_square, gram, Mix(weights[None, :], result.fallback))


def test_a_report_has_the_norms_and_angles_of_its_vectors():
    row = group("layers.0", 25.0, [3, 0], [0, 4])
    assert (row.base_norm, row.norms, row.angle) == (5.0, (3.0, 4.0), 90.0)
    assert row.result_norms == pytest.approx((5 * np.sqrt(0.5),))


def test_the_mean_angle_weighs_groups_by_parameters_and_skips_zero_vectors():
    rows = [group("a", 1.0, [1, 0], [0, 1], parameters=30), group("b", 1.0, [1, 0], [1, 1], parameters=10)]
    assert mean_angle(rows) == pytest.approx((90 * 30 + 45 * 10) / 40)
    assert mean_angle([group("c", 1.0, [0, 0], [1, 0])]) is None


def test_ordinary_task_vectors_give_no_warning():
    assert judge("slerp", [group("layers.0", 100.0, [1, 0], [0.1, 1])]) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            group("layers.0", 1.0, [1, 0], [0, 0.1]),
            "model 1 is far from the base: its task vector has norm 1, the base 1;",
        ),
        (group("layers.0", 100.0, [1, 0], [1, 0.1]), "task vectors are under 30 degrees apart in layers.0 (5.7)"),
        (group("layers.0", 100.0, [1, 0], [-1, 0.1]), "task vectors are over 150 degrees apart in layers.0 (174.3)"),
        (group("layers.0", 100.0, [0, 0], [1, 0.1]), "zero task vector: SLERP fell back to LERP in layers.0"),
        (
            group("layers.0", 100.0, [1e-5, 0], [0, 1]),
            "model 1 does not differ from the base: its task vector is 1e-06 of the base's norm, rounding",
        ),
    ],
)
def test_suspicious_figures_give_a_warning_with_the_figure(row, words):
    (warning,) = judge("slerp", [row])
    assert warning.startswith(words)
