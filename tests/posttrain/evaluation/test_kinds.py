"""The kind of a point follows from what made its model, and equal weights are one point."""

import json
import shutil

import pytest
from policies import Said, manifest, pareto_config, points_of, two_iterations
from safetensors.torch import load_file, save_file

from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.merging.methods.table import METHODS
from gemma2.posttrain.evaluation import candidates, pick
from gemma2.posttrain.evaluation.candidates import kind_of, plan_candidates
from gemma2.posttrain.evaluation.comparison import with_gains
from gemma2.posttrain.evaluation.pareto import run_pareto
from gemma2.posttrain.reports.fronts import Front, usable
from gemma2.posttrain.reports.headline import merges, rows_of
from gemma2.posttrain.reports.plots.figures import front_figure
from gemma2.posttrain.reports.plots.gains import is_merged
from gemma2.posttrain.reports.plots.point_kinds import KINDS, marker_of, word_of
from gemma2.posttrain.reports.plots.textplot import front_text
from gemma2.posttrain.reports.plots.values import label_of
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.tiny.networks import save_random

BASED = [{"role": "base", "weights": "b"}, {"role": "input", "weights": "a"}]
TWO = [{"role": "input", "weights": "a"}, {"role": "input", "weights": "b"}]
ONE = TWO[:1]


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        ({"command": "rlhf"}, "policy"),
        ({"command": "merge slerp", "parents": TWO}, "slerp"),
        ({"command": "merge nuslerp", "parents": TWO}, "nuslerp"),
        ({"command": "merge multislerp", "parents": TWO}, "multislerp"),
        ({"command": "merge linear", "parents": TWO}, "linear"),
        ({"command": "merge linear", "parents": ONE}, "policy"),  # an adapter made a model, or a copy
        ({"command": "merge liti", "parents": BASED}, "liti"),
        ({"command": "merge ties", "parents": BASED}, "ties"),
        ({"command": "rlhf", "config": {"method": "slerp"}}, "policy"),
        ({"command": "pick", "summary": {"kind": "line"}, "parents": BASED}, "liti"),
        ({"command": "pick", "summary": {"kind": "ties"}, "parents": ONE}, "ties"),
        ({"command": "pick", "summary": {"kind": "policy"}, "parents": ONE}, "policy"),
        ({"command": "pick"}, "policy"),
    ],
)
def test_the_kind_is_that_of_the_command_not_of_a_part_of_its_name(tmp_path, made, kind):
    manifest(tmp_path, **made)
    assert kind_of(tmp_path, False) == kind


def test_every_merge_method_has_a_word_and_a_mark():
    words = [word_of(kind) for kind in KINDS if kind != "line"]
    assert len(set(words)) == len(words)
    assert "RL policy" not in [word_of(method) for method in METHODS]
    marks = [marker_of(method) for method in METHODS]
    assert len(set(marks)) == len(METHODS)
    assert all(is_merged(method) for method in (*METHODS, "line"))


def point(name, kind, kl, reward, iteration=None, **more):
    ends = {f"{key}{end}": value + sign for key, value in (("kl", kl), ("reward", reward))
            for end, sign in (("_low", -0.1), ("_high", 0.1))}  # fmt: skip
    return {"name": name, "kind": kind, "kl": kl, "reward": reward, "iteration": iteration, "eta": None, "n": 4,
            "on_front": True, **ends, **more}  # fmt: skip


POINTS = [
    point("SFT", "sft", 0.0, 1.0),
    point("policy-1", "policy", 3.0, 2.0),
    point("mean", "linear", 2.0, 2.5),
    point("trimmed", "ties", 2.5, 2.2),
]


def legend_of(points):
    return [text.get_text() for text in front_figure(points).legends[0].get_texts()]


def test_a_linear_merge_is_no_rl_policy_in_legend_table_and_sentences():
    legend = legend_of(POINTS)
    assert legend[:4] == ["start of RL", "RL policy", "linear merge", "TIES"]
    assert legend_of([p for p in POINTS if p["kind"] != "policy"])[:3] == ["start of RL", "linear merge", "TIES"]
    assert "▲ linear merge, TIES" in front_text(POINTS)
    assert all(usable(p) is not None for p in POINTS)
    assert [row.label for row in rows_of(POINTS, None)] == ["SFT", "policy-1", "mean", "trimmed"]
    assert label_of(point("iteration-2/linear", "linear", 1, 1, iteration=2)) == "linear merge 2"
    both = [label_of(point(name, "slerp", 1, 1, iteration=2)) for name in ("slerp", "iteration-2/slerp-4")]
    assert both == ["SLERP 2", "iteration-2/slerp-4"]


def test_a_merge_is_compared_with_runs_and_is_not_one_of_them():
    values = {p["name"]: {"reward": [p["reward"] - 1, p["reward"] + i / 3], "kl": [p["kl"]] * 2}
              for i, p in enumerate(POINTS)}  # fmt: skip
    found = {p["name"]: p for p in with_gains(POINTS, values)}
    assert "reward_over_single" not in found["policy-1"]
    assert found["mean"]["single"].endswith("SFT and policy-1")
    front = Front("f", None, list(found.values()))
    assert [row["label"] for row in merges(front)["rows"]] == ["mean", "trimmed"]


def test_a_line_to_another_merge_says_so():
    ends = {"init": "sft", "merged": "iteration-1/mean", "end": "linear"}
    line = [point(f"eta {eta}", "line", eta, 1 + eta, 1, **ends) | {"eta": eta} for eta in (0.0, 0.5, 1.0)]
    assert [label_of(p) for p in line] == ["iteration-1/mean, η 0", "iteration-1/mean, η 0.5", "iteration-1/mean"]
    named = [{**p, "merged": "../iteration-1/linear"} for p in line]
    assert [label_of(p) for p in named] == ["linear merge 1, η 0", "linear merge 1, η 0.5", "linear merge 1"]
    assert "start to linear merge, by η" in legend_of([POINTS[0], *line])
    assert "• start to linear merge, by η" in front_text([POINTS[0], *line])


# --- equal weights --------------------------------------------------------------------------------------------------


def tensors_digest(directory):
    """The digest of the tensors of a model: name, dtype, shape and bytes, whatever the files are."""
    total = hasher()
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    for name, tensor in sorted(found.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return digest_name(total)


def padded(model):
    """The same tensors behind a longer header."""
    file = model / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size] + b" " * 64
    file.write_bytes((size + 64).to_bytes(8, "little") + header + content[8 + size :])


def sharded(model):
    """The same tensors in two files."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, model / part, metadata={"format": "pt"})
    places = {name: part for part, own in parts.items() for name in own}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    file.unlink()


@pytest.fixture
def by_tensors(monkeypatch):
    """Weights are identified by their tensors."""
    for module in (candidates, pick):
        monkeypatch.setattr(module, "digest_weights", tensors_digest)


@pytest.mark.parametrize("store", [lambda model: None, padded, sharded], ids=["copy", "padded", "sharded"])
def test_equal_weights_are_one_point_however_they_are_stored(tmp_path, by_tensors, store):
    root = two_iterations(tmp_path / "run")
    manifest(root / "sft", command="sft", parents=[{"role": "model", "weights": tensors_digest(root / "base")}])
    same = tmp_path / "other" / "run-7"
    shutil.copytree(root / "iteration-1/policy-1", same)
    store(same)
    shutil.copytree(root / "sft", tmp_path / "start")
    (tmp_path / "start" / "gemma2.json").unlink()
    store(tmp_path / "start")
    said = Said()
    config = pareto_config(root, policies=(root / "iteration-1/policy-1", same, tmp_path / "start", root / "base"))
    run_pareto(config, RunOptions(tmp_path / "front"), said)
    found = points_of(tmp_path / "front")
    assert [p["kind"] for p in found.values() if p["kind"] != "trajectory"] == ["sft", "policy", "base"]
    assert [note for note in said.notes if f"{same} has the weights of" in note]
    assert [note for note in said.notes if f"{tmp_path / 'start'} has the weights of" in note]

    again = pareto_config(root, policies=(same,), fronts=(tmp_path / "front",))
    run_pareto(again, RunOptions(tmp_path / "again"))
    assert len(points_of(tmp_path / "again")) == len(found)


def test_a_run_that_learned_nothing_is_a_point_next_to_its_start(tmp_path):
    root = two_iterations(tmp_path)
    still = root / "iteration-1/policy-1"
    shutil.rmtree(still)
    shutil.copytree(root / "sft", still)
    manifest(still, command="rlhf")
    planned = plan_candidates(pareto_config(root, policies=(still,)))
    assert [candidate.kind for candidate in planned] == ["sft", "policy"]


def test_what_was_trained_further_by_sft_is_not_from_before_rl(tmp_path):
    root = two_iterations(tmp_path)
    for name, seed, parent in (
        ("polished", 31, "iteration-1/policy-1"),
        ("longer", 32, "sft"),
        ("sibling", 33, "base"),
    ):
        save_random(root / name, seed)
        weights = candidates.digest_weights(root / parent)
        manifest(root / name, command="sft", parents=[{"role": "model", "weights": weights}])
    given = [root / name for name in ("iteration-1/policy-1", "polished", "longer", "sibling", "base")]
    planned = plan_candidates(pareto_config(root, policies=tuple(given)))
    assert [(c.kind, c.title) for c in planned] == [
        ("sft", "SFT"),
        ("policy", ""),
        ("policy", ""),
        ("policy", ""),
        ("base", "SFT"),
        ("base", "base"),
    ]
