"""The command on random models: names, the line, resume, files."""

import csv
import json
import math
import os
import re
import shutil

import pytest
import torch
from policies import measured_on_the_way
from safetensors.torch import load_file, save_file

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.evaluation import pareto
from gemma2.posttrain.evaluation.candidates import plan_candidates, short_names
from gemma2.posttrain.evaluation.evaluate import run_eval
from gemma2.posttrain.evaluation.pareto import hypervolume, interpolate_, pareto_front, run_pareto
from gemma2.posttrain.evaluation.trajectory import procedure
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import EvalConfig, ParetoConfig
from gemma2.posttrain.tiny.networks import random_model, save_random

DRAWN = True


def test_names_take_as_many_folders_as_they_need(tmp_path):
    paths = [tmp_path / "iteration-1" / "slerp", tmp_path / "iteration-2" / "slerp"]
    assert short_names(paths) == ["iteration-1/slerp", "iteration-2/slerp"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    paths = [tmp_path / name for name in ("student", "iteration-1/m", "iteration-2/m", "iteration-2/slerp")]
    assert short_names([*paths, paths[0]]) == [
        "student",
        "iteration-1/m",
        "iteration-2/m",
        "iteration-2/slerp",
        "student",
    ]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_line_interpolates_every_tensor_and_a_tied_one_once(eta):
    init, merged, model = random_model(1), random_model(2), random_model(3)
    ends = [{name: p.detach().double().clone() for name, p in m.named_parameters()} for m in (init, merged)]
    interpolate_(model, dict(init.named_parameters()), dict(merged.named_parameters()), eta)
    for name, parameter in model.named_parameters():
        expected = (1 - eta) * ends[0][name] + eta * ends[1][name]
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(p.double(), ends[0][name]) for name, p in init.named_parameters())


# --- the command ----------------------------------------------------------------------------------------------------


def reward(completions, **_):
    return [float(len(text) % 7) for text in completions]


def manifest(directory, **fields):
    (directory / "gemma2.json").write_text(json.dumps({"status": "complete", **fields}), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, the SFT policy made from it, an RL policy with a trajectory, and a SLERP, all random."""
    root = tmp_path_factory.mktemp("world")
    places = {"base": root / "base", "sft": root / "sft"}
    places |= {name: root / "iteration-1" / name for name in ("policy-1", "slerp")}
    for seed, path in enumerate(places.values()):
        save_random(path, seed)
    manifest(places["sft"], command="sft", parents=[{"role": "model", "weights": digest_weights(places["base"])}])
    manifest(places["policy-1"], command="rlhf")
    manifest(places["slerp"], command="merge slerp")
    texts = ["What is 2 + 3?", "Who lives in Tolba?", "Sort c, a, b.", "Say hello."]
    (root / "heldout.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts), encoding="utf-8")
    alike = procedure(settings((root, places)), places["sft"], root / "heldout.jsonl", 1, 0)
    measured_on_the_way(places["policy-1"], alike, {0: 0.0, 2: 0.5, 4: 1.0})
    return root, places


def settings(world, **more):
    root, places = world
    fields = {
        "sft": places["sft"],
        "prompts": root / "heldout.jsonl",
        "policies": (places["base"], places["policy-1"], places["slerp"]),
        "merged": places["slerp"],
        "reward_fn": f"{__name__}:reward",
        "max_new_tokens": 6,
    } | more
    line = {} if fields["merged"] is None else {"etas": (0.0, 0.25, 0.5, 1.0)}
    return ParetoConfig(**(line | fields))


@pytest.fixture(scope="module")
def front(world):
    out = world[0] / "front"
    run_pareto(settings(world), RunOptions(out))
    return out


def by_name(out):
    return {point["name"]: point for point in json.loads((out / "front.json").read_text())["points"]}


def test_every_policy_and_eta_is_a_point_of_its_kind(front):
    found = {name: (point["kind"], point["iteration"], point["eta"]) for name, point in by_name(front).items()}
    assert found == {
        "SFT": ("sft", None, None),
        "base": ("base", None, None),
        "policy-1": ("policy", 1, None),
        "slerp": ("slerp", 1, None),
        "eta 0": ("line", 1, 0.0),
        "eta 0.25": ("line", 1, 0.25),
        "eta 0.5": ("line", 1, 0.5),
        "eta 1": ("line", 1, 1.0),
        "policy-1 step 2": ("trajectory", 1, None),
    }


def test_what_comes_before_rl_is_called_by_the_command_that_made_it(world, tmp_path):
    _, places = world
    for name, command, parent in (("cloned", "sft", "base"), ("taught", "distill", "cloned")):
        source = places["policy-1" if name == "cloned" else "slerp"]
        shutil.copytree(source, tmp_path / name)
        above = places["base"] if parent == "base" else tmp_path / parent
        described = {"role": "model", "path": os.path.relpath(above, tmp_path / name), "weights": digest_weights(above)}
        manifest(tmp_path / name, command=command, parents=[described])
    config = settings(world, sft=tmp_path / "taught", policies=(places["base"], tmp_path / "cloned"), merged=None)
    assert [(c.kind, c.title) for c in plan_candidates(config)] == [
        ("sft", "distilled"),
        ("base", "base"),
        ("base", "SFT"),
    ]


def test_the_ends_of_the_line_are_the_policies_themselves(front):
    points = by_name(front)
    for end, policy in (("eta 0", "SFT"), ("eta 1", "slerp")):
        for key in ("reward", "reward_se", "kl", "kl_se", "length"):
            assert points[end][key] == points[policy][key]
    assert points["SFT"]["kl"] == 0


def test_a_point_of_the_line_measures_like_the_checkpoint_it_stands_for(world, front, tmp_path):
    """The middle of the line, written out by independent arithmetic and measured by `eval`."""
    root, places = world
    path = save_random(tmp_path / "middle", 9)
    tensors = [load_file(places[name] / "model.safetensors") for name in ("sft", "slerp")]
    middle = {name: ((tensors[0][name].double() + tensors[1][name].double()) / 2).float() for name in tensors[0]}
    save_file(middle, path / "model.safetensors", metadata={"format": "pt"})
    fields = {"prompts": root / "heldout.jsonl", "reward_fn": f"{__name__}:reward", "max_new_tokens": 6}
    measured = run_eval(EvalConfig(model=path, sft=places["sft"], **fields))
    point = by_name(front)["eta 0.5"]
    assert point["kl"] == pytest.approx(measured["kl"], rel=1e-4)
    assert point["reward"] == measured["reward"]


def test_trajectories_are_no_candidates_for_the_front(front):
    document = json.loads((front / "front.json").read_text())
    measured = [point for point in document["points"] if point["kind"] != "trajectory"]
    assert [point["on_front"] for point in measured] == pareto_front(measured)
    assert not any(point["on_front"] for point in document["points"] if point["kind"] == "trajectory")
    reference = document["reference"]
    start = by_name(front)["SFT"]["reward"]
    # The farthest point that is better than the start; the base may be far off, on the other side of it.
    kl = max(p["kl"] for p in measured if p["kind"] != "base" and p["reward"] > start)
    assert reference == {"kl": kl, "reward": by_name(front)["SFT"]["reward"]}
    assert document["hypervolume"] == hypervolume(measured, (reference["kl"], reference["reward"]))


def test_the_output_is_complete(front):
    assert {path.name for path in front.iterdir()} == {
        "front.json", "front.csv", "hypervolume.csv", "front.png", "front.svg", "samples.jsonl", "prompts.json",
        "gemma2.json",
    }  # fmt: skip
    manifest = read_manifest(front)
    assert manifest["status"] == "complete"
    assert {parent["role"] for parent in manifest["parents"]} == {"sft", "policies", "merged"}
    assert manifest["summary"]["points"] == 8
    assert (front / "front.png").read_bytes().startswith(b"\x89PNG")


def test_the_csv_has_the_points_of_the_json(front):
    with (front / "front.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    points = by_name(front)
    assert [row["name"] for row in rows] == list(points)
    assert float(rows[1]["kl"]) == points["base"]["kl"]
    assert rows[-1]["distinct_2"] == ""


def test_the_area_stands_beside_the_points_with_what_bounds_it(front):
    with (front / "hypervolume.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    document, summary = json.loads((front / "front.json").read_text()), read_manifest(front)["summary"]
    for key in ("hypervolume", "hypervolume_low", "hypervolume_high"):
        assert float(row[key]) == document[key] == summary[key]
    for key in ("kl", "reward"):
        assert float(row[f"reference_{key}"]) == document["reference"][key] == summary["reference"][key]
    assert document["hypervolume_low"] <= document["hypervolume"] <= document["hypervolume_high"]
    assert (document["flat"], summary["flat"]) == (0, 0)
    assert "improved" not in summary


def test_every_figure_of_every_point_has_an_interval(front):
    for point in by_name(front).values():
        if point["kind"] != "trajectory":
            for metric in ("reward", "kl", "length", "truncated", "distinct_2"):
                assert point[f"{metric}_low"] <= point[metric] <= point[f"{metric}_high"], (point["name"], metric)


def test_the_screen_shows_the_front_and_the_best_within_each_limit(world, monkeypatch, capsys):
    root, places = world
    inputs = ["--sft", str(places["sft"]), "--prompts", str(root / "heldout.jsonl"), "--policies", str(places["slerp"])]
    settings = ["--reward-fn", f"{__name__}:reward", "--max-new-tokens", "4", "--kl-limits", "0,1000", "--quiet"]
    assert invoke(["pareto", *inputs, *settings, "--out", str(root / "shown")]) == 0
    out = capsys.readouterr().out
    assert "KL to the SFT policy, nats per sequence" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["KL", "at", "most", "point", "reward", "KL,", "nats", "of", "points", "on", "other", "prompts"] in rows
    assert "partly the luckiest" in out
    assert "The hypervolume is bounded by KL" in out
    assert next(row for row in rows if row[:2] == ["0", "SFT"])
    points = by_name(root / "shown")
    for low, value, high in ((points["slerp"][f"reward{end}"] for end in ("_low", "", "_high")),):
        assert re.search(
            rf"^SLERP 1 +{value:.1f}\d* \({low:.1f}\d* to {high:.1f}\d*\)", out.replace("−", "-"), re.MULTILINE
        )
    assert re.search(r"SLERP 1 (gains|loses|: no gain)|SLERP 1: no gain|gains .* over SFT|could be shown", out)
    assert invoke(["pareto", *inputs, *settings, "--out", str(root / "json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["limit"] for row in document["best_at"]] == [0.0, 1000.0]


def test_samples_of_all_policies_answer_the_same_prompts(front):
    rows = [json.loads(line) for line in (front / "samples.jsonl").read_text().splitlines()]
    prompts = {}
    for row in rows:
        prompts.setdefault(row["name"], []).append(row["prompt"][-1]["content"])
    assert len(prompts) == 8
    assert len(set(map(tuple, prompts.values()))) == 1


class Interrupted(Exception):
    """Stands for a kill."""


def test_a_killed_front_goes_on_with_the_next_point_and_ends_alike(world, front, monkeypatch):
    out, measured, measure = world[0] / "killed", [], pareto.measure

    def failing(*arguments):
        if len(measured) == 2:
            raise Interrupted
        measured.append(arguments[-1])
        return measure(*arguments)

    monkeypatch.setattr(pareto, "measure", failing)
    with pytest.raises(Interrupted):
        run_pareto(settings(world), RunOptions(out))
    assert not out.exists()
    monkeypatch.setattr(pareto, "measure", lambda *arguments: measured.append(arguments[-1]) or measure(*arguments))
    run_pareto(settings(world), RunOptions(out, resume=True))
    assert sorted(measured) == sorted(["SFT", "base", "policy-1", "slerp", "eta 0.25", "eta 0.5"])
    for name in ("front.json", "front.csv", "hypervolume.csv", "front.svg", "samples.jsonl", "prompts.json"):
        assert (out / name).read_bytes() == (front / name).read_bytes()


def test_a_front_of_the_sft_policy_alone(world, tmp_path):
    result = run_pareto(settings(world, policies=(), merged=None), RunOptions(tmp_path / "front"))
    assert result.summary["points"] == 1
    assert result.summary["hypervolume"] == 0
    assert math.isfinite(result.summary["best"]["reward"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--init base", "--init is given and --merged is not; give --merged"),
        ("--merged base --etas 0.5,1.5", r"--etas 0\.5 1\.5: not all in 0 \.\. 1"),
        ("--reference 5", r"--reference 5: not a KL above 0 and a reward; give KL,REWARD, such as 10,0\.5"),
        ("--reference 0,1", "--reference 0,1: not a KL above 0"),
        ("--reference 1,2,3", "--reference 1,2,3: not a KL above 0"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_line_or_a_reference_that_makes_no_sense_is_a_usage_error(world, tmp_path, words, message, dry):
    root, places = world
    given = ["--sft", str(places["sft"]), "--prompts", str(root / "heldout.jsonl"), "--reward-fn", f"{__name__}:reward"]
    with pytest.raises(UsageError, match=message):
        invoke(["pareto", *given, *words.split(), "--out", str(tmp_path / "front"), *dry])
    assert list(tmp_path.iterdir()) == []


def test_a_merge_of_another_shape_is_refused(world, tmp_path):
    other = save_random(tmp_path / "other", 1, intermediate_size=64)
    with pytest.raises(InputError, match="different tensors"):
        run_pareto(settings(world, policies=(), merged=other), RunOptions(tmp_path / "front"))


def test_an_existing_output_is_kept(world, front):
    with pytest.raises(OutputError, match="exists"):
        run_pareto(settings(world), RunOptions(front))
