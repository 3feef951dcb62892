"""What bounds the area of a front, the same after folders moved or are gone; its interval next to that of a gain."""

import csv
import json
import shutil

import numpy as np
import pytest
from policies import Said, manifest, pareto_config, points_of, two_iterations

from gemma2.core.errors import InputError
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.evaluation.areas import Reference, gain_columns, reference_of
from gemma2.posttrain.evaluation.bootstrap import Answers, interval, resampled_areas
from gemma2.posttrain.evaluation.pareto import run_pareto
from gemma2.posttrain.reports.plots.gains import bounds_of
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.tiny.networks import save_random

# --- the reference point --------------------------------------------------------------------------------------------


def point(name, kind, kl, reward):
    return {"name": name, "kind": kind, "kl": kl, "reward": reward}


def test_the_farthest_point_with_more_reward_than_the_start_bounds_the_kl():
    points = [
        point("SFT", "sft", 0.0, 1.0),
        point("base", "base", 90.0, 5.0),
        point("unknown", "policy", 50.0, 0.2),  # of a hub id, from before RL, which nothing says
        point("equal", "policy", 20.0, 1.0),
        point("far", "policy", 4.0, 1.5),
        point("best", "policy", 2.0, 3.0),
    ]
    assert reference_of(points) == Reference(4.0, 1.0, "points", "far")
    assert reference_of(points[:4]).ends == (0.0, 1.0)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """base -> middle -> sft, with manifests that record their parents, and an RL run."""
    root = two_iterations(tmp_path_factory.mktemp("family"))
    save_random(root / "middle", 5)
    weights = {name: digest_weights(root / name) for name in ("base", "middle")}
    for name, above, command in (("middle", "base", "sft"), ("sft", "middle", "distill")):
        parents = [{"role": "model", "path": f"../{above}", "weights": weights[above]}]
        manifest(root / name, command=command, parents=parents)
    return root


def front_of(root, out, policies, **more):
    config = pareto_config(root, policies=tuple(policies), **more)
    run_pareto(config, RunOptions(out))
    return json.loads((out / "front.json").read_text())


def decided(document):
    """What must not depend on folders: area, reference, kinds and figures."""
    keys = ("reference", "reference_from", "reference_point", "hypervolume", "hypervolume_low", "best_at")
    kinds = [(p["name"], p["kind"], p["reward"], p["kl"]) for p in document["points"]]
    return [document[key] for key in keys], kinds


@pytest.mark.parametrize("made_by", [{"command": "tiny"}, None], ids=["tiny", "no manifest"])
def test_moved_and_deleted_folders_change_neither_area_nor_kinds(family, tmp_path, made_by):
    before = shutil.copytree(family, tmp_path / "before")
    if made_by:
        manifest(before / "base", **made_by)
    policies = ["base", "iteration-1/policy-1", "iteration-1/slerp"]
    whole = front_of(before, before / "front", [before / name for name in policies])
    after = tmp_path / "elsewhere" / "run"
    shutil.copytree(before, after, ignore=shutil.ignore_patterns("middle", "front"))
    shutil.rmtree(before)
    assert decided(front_of(after, after / "front", [after / name for name in policies])) == decided(whole)
    assert points_of(after / "front")["base"]["kind"] == ("base" if made_by else "policy")
    assert whole["hypervolume"] is not None


def test_a_parent_that_a_given_model_records_is_from_before_rl_wherever_it_is(family, tmp_path):
    root = shutil.copytree(family, tmp_path / "run")
    for name in ("base", "middle"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        (root / name).rename(tmp_path / "hub" / name)
    places = [tmp_path / "hub" / "base", tmp_path / "hub" / "middle", root / "iteration-1/policy-1"]
    kinds = {p["name"]: p["kind"] for p in front_of(root, root / "front", places)["points"]}
    assert {name: kinds[name] for name in ("SFT", "base", "middle", "policy-1")} == {
        "SFT": "sft",
        "base": "base",
        "middle": "base",
        "policy-1": "policy",
    }


def test_a_given_reference_is_recorded_shown_and_kept_by_later_fronts(family, tmp_path):
    run = [family / "iteration-1/policy-1"]
    first = front_of(family, tmp_path / "first", run, reference=(500.0, -2.0))
    assert (first["reference"], first["reference_from"]) == ({"kl": 500.0, "reward": -2.0}, "--reference")
    assert "as --reference says" in bounds_of(first, first["points"])
    with (tmp_path / "first" / "hypervolume.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["reference_kl"], row["reference_reward"]) == ("500.0", "-2.0")
    assert row["reference_from"] == "'--reference"  # a spreadsheet would take it for a formula
    assert read_manifest(tmp_path / "first")["summary"]["reference_from"] == "--reference"

    kept = front_of(family, tmp_path / "kept", [family / "iteration-2/policy-1"], fronts=(tmp_path / "first",))
    assert (kept["reference"], kept["reference_from"]) == (first["reference"], "--fronts")
    assert kept["hypervolume_before"] == first["hypervolume"]
    other = front_of(family, tmp_path / "other", run, reference=(400.0, -2.0))
    with pytest.raises(InputError, match=r"different reference points: .*500.*400.*--reference KL,REWARD"):
        front_of(family, tmp_path / "both", run, fronts=(tmp_path / "first", tmp_path / "other"))
    more = {"fronts": (tmp_path / "first", tmp_path / "other"), "reference": (400.0, -2.0)}
    said = Said()
    run_pareto(pareto_config(family, **more), RunOptions(tmp_path / "both"), said)
    both = json.loads((tmp_path / "both" / "front.json").read_text())
    assert both["hypervolume"] == other["hypervolume"]
    assert [line for line in said.notes if "compare the gain" in line and str(tmp_path / "first") in line]
    assert not [line for line in said.notes if str(tmp_path / "other") in line]


# --- area and gain --------------------------------------------------------------------------------------------------


def test_no_resample_has_a_gain_above_its_area():
    """Both ends of the interval of the area are at or above those of the gain; separate intervals often cross."""
    crossed = 0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        hard = draw.normal(size=24)
        means = [(0.0, 0.0), (1.0, 0.05), (2.0, 0.1), (0.5, 0.15), (1.5, 0.2)]
        kl = np.array([[mean] * 24 for mean, _ in means])
        reward = np.array([[mean + 0.3 * h + noise for h, noise in zip(hard, draw.normal(size=24) * 0.2, strict=True)]
                           for _, mean in means])  # fmt: skip
        points = [{"kl": float(k.mean()), "reward": float(r.mean())} for k, r in zip(kl, reward, strict=True)]
        answers, reference = Answers(kl, reward), Reference(2.5, points[0]["reward"], "points")
        found = gain_columns(points, answers, reference, True, [True, True, True, False, False])
        assert found["hypervolume"] == pytest.approx(found["hypervolume_before"] + found["hypervolume_gain"])
        for end in ("", "_low", "_high"):
            assert found[f"hypervolume{end}"] >= found[f"hypervolume_gain{end}"] - 1e-12
        whole, part = resampled_areas(answers, [range(5), range(3)], reference.ends)
        alone = interval(found["hypervolume"], whole)
        assert interval(found["hypervolume_gain"], whole - part) == pytest.approx(
            (found["hypervolume_gain_low"], found["hypervolume_gain_high"])
        )
        crossed += alone[0] < found["hypervolume_gain_low"]
    assert crossed  # so the property is not that of any pair of intervals
