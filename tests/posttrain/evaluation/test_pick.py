"""Which point is chosen, and that the model that is written is that point."""

import json
import os
import re
import shutil

import pytest
import torch
from policies import pareto_config, points_of
from safetensors.torch import load_file, save_file

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, OutputError, UsageError
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import read_manifest, write_manifest
from gemma2.posttrain.evaluation.evaluate import run_eval
from gemma2.posttrain.evaluation.pareto import run_pareto
from gemma2.posttrain.evaluation.pick import choose, run_pick
from gemma2.posttrain.reports.plots.values import spreads
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import EvalConfig, PickConfig


def point(name, kind, kl, reward, eta=None, iteration=None, end="a"):
    ends = {"init": "sft", "init_weights": "s", "merged": end, "merged_weights": end} if kind == "line" else {}
    return {"name": name, "kind": kind, "kl": kl, "reward": reward, "eta": eta, "iteration": iteration, **ends}


POINTS = [
    point("SFT", "sft", 0.0, 1.0),
    point("base", "base", 0.0, 99.0),
    point("policy-1", "policy", 3.0, 9.0, iteration=1),
    point("policy-1 step 5", "trajectory", 0.1, 99.0, iteration=1),
    point("1/0", "line", 0.0, 1.0, 0.0, 1, "a"),
    point("1/1", "line", 2.0, 5.0, 1.0, 1, "a"),
    point("2/0.5", "line", 1.5, 4.0, 0.5, 2, "b"),
    point("2/1", "line", 4.0, 5.0, 1.0, 2, "b"),
]


@pytest.mark.parametrize(
    ("pick", "name"),
    [("best-reward", "1/1"), ("kl<=1.5", "2/0.5"), ("kl<=1.9", "2/0.5"), ("kl<=0", "1/0"), ("kl<=50", "1/1")],
)
def test_lines_of_all_iterations_compete_and_of_equal_rewards_less_kl_wins(pick, name):
    assert choose(POINTS, pick)["name"] == name


def test_without_a_line_the_policies_compete_and_neither_base_nor_trajectory_does():
    points = [p for p in POINTS if p["kind"] != "line"]
    assert choose(points, "best-reward")["name"] == "policy-1"
    assert choose(points, "kl<=1")["name"] == "SFT"
    with pytest.raises(InputError, match="no line"):
        choose(points, "eta=0.5")


def test_eta_is_of_the_last_line_measured_or_not():
    assert choose(POINTS, "eta=0.5")["name"] == "2/0.5"
    between = choose(POINTS, "eta=0.25")
    assert (between["iteration"], between["eta"], between["merged"]) == (2, 0.25, "b")
    assert "reward" not in between
    with pytest.raises(UsageError, match=r"eta=1\.5 is not in 0 \.\. 1"):
        choose(POINTS, "eta=1.5")


def test_no_point_within_the_limit_is_an_error_that_says_what_there_is():
    with pytest.raises(InputError, match=r"no point .* so small a KL, the least is 1\.5 nats"):
        choose(POINTS[6:], "kl<=1")


# --- the command ----------------------------------------------------------------------------------------------------


def weights(directory):
    return load_file(directory / "model.safetensors")


def line(iterations, iteration, eta):
    """The point by independent arithmetic, in float64."""
    ends = [weights(iterations / "sft"), weights(iterations / f"iteration-{iteration}" / "slerp")]
    return {name: (1 - eta) * ends[0][name].double() + eta * ends[1][name].double() for name in ends[0]}


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_the_model_is_the_point_of_the_last_line(iterations, tmp_path, eta):
    front = iterations / "iteration-2" / "front"
    result = run_pick(PickConfig(front=front, pick=f"eta={eta}"), RunOptions(tmp_path / "model"))
    found, expected = weights(tmp_path / "model"), line(iterations, 2, eta)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-7)
    assert result.summary["iteration"] == 2
    assert ("reward" in result.summary) == (eta != 0.3)


def test_the_chosen_model_measures_as_its_point_did(iterations, tmp_path):
    front = iterations / "iteration-2" / "front"
    result = run_pick(PickConfig(front=front), RunOptions(tmp_path / "model"))
    fields = {"prompts": iterations / "heldout.jsonl", "reward_fn": "policies:reward", "max_new_tokens": 6}
    measured = run_eval(EvalConfig(model=tmp_path / "model", sft=iterations / "sft", **fields))
    for key in ("reward", "reward_se", "reward_low", "kl"):
        assert result.summary[key] == pytest.approx(measured[key], rel=1e-4)
    lines = [p["reward"] for p in points_of(front).values() if p["kind"] == "line"]
    assert result.summary["reward"] == max(lines)


def rewrite(front, document):
    """Another content of front.json, with its record in the manifest."""
    (front / "front.json").write_text(json.dumps(document))
    own = read_manifest(front)
    write_manifest(front, {key: own[key] for key in own if key != "files"})


def test_a_policy_is_copied_tensor_by_tensor(iterations, tmp_path):
    slerp = iterations / "iteration-1" / "slerp"
    run_pareto(pareto_config(iterations, policies=(slerp,)), RunOptions(tmp_path / "front"))
    document = json.loads((tmp_path / "front" / "front.json").read_text())
    for entry in document["points"]:
        entry["reward"] += 100 * (entry["kind"] == "slerp")
    rewrite(tmp_path / "front", document)
    run_pick(PickConfig(front=tmp_path / "front"), RunOptions(tmp_path / "model"))
    assert digest_file(tmp_path / "model" / "tokenizer.json") == digest_file(slerp / "tokenizer.json")
    found, expected = weights(tmp_path / "model"), weights(slerp)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_manifest_leads_to_the_front_and_to_the_ends_of_the_line(iterations, tmp_path):
    front = iterations / "iteration-2" / "front"
    run_pick(PickConfig(front=front, pick="eta=0.5"), RunOptions(tmp_path / "model"))
    manifest = read_manifest(tmp_path / "model")
    assert (manifest["command"], manifest["status"]) == ("pick", "complete")
    assert manifest["config"] == {"front": str(front), "pick": "eta=0.5"}
    parents = {p["role"]: (tmp_path / "model" / p["path"]).resolve() for p in manifest["parents"]}
    assert parents == {"base": iterations / "sft", "input": iterations / "iteration-2" / "slerp"}
    (source,) = manifest["data"]
    assert (tmp_path / "model" / source["path"]).resolve() == front / "front.json"
    assert source["digest"] == digest_file(front / "front.json")
    assert {"README.md", "front.svg", "model.safetensors"} <= manifest["files"].keys()


def test_the_card_says_what_was_chosen_and_that_choosing_flatters(iterations, tmp_path):
    run_pick(PickConfig(front=iterations / "iteration-2" / "front"), RunOptions(tmp_path / "model"))
    card, summary = (tmp_path / "model" / "README.md").read_text(), read_manifest(tmp_path / "model")["summary"]
    assert f"| {spreads([summary], 'reward')[0].split('.')[0]}." in card
    assert re.search(r"\(chosen\) \| \S+ \(\S+ to \S+\) \| \S+ \(\S+ to \S+\) \|", card)
    assert "optimistic" in card
    assert "(front.svg)" in card
    assert "base_model" not in card  # directories are not models of the hub
    assert "gains" in card or "could be shown" in card
    assert f"| {summary['label']} (chosen) |" in card
    assert str(iterations) not in card
    run_pick(PickConfig(front=iterations / "iteration-2" / "front", pick="eta=0.3"), RunOptions(tmp_path / "between"))
    card = (tmp_path / "between" / "README.md").read_text()
    assert "| not measured | not measured |" in card
    assert "optimistic" not in card


def test_a_run_that_moved_as_a_whole_is_picked_from(iterations, tmp_path):
    moved = shutil.copytree(iterations, tmp_path / "elsewhere" / "run")
    run_pick(PickConfig(front=moved / "iteration-2" / "front"), RunOptions(tmp_path / "model"))
    parents = read_manifest(tmp_path / "model")["parents"]
    assert all((tmp_path / "model" / p["path"]).resolve().is_relative_to(moved) for p in parents)


def scale(directory):
    tensors = {name: 2 * tensor for name, tensor in weights(directory).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: shutil.rmtree(run / "iteration-2" / "slerp"), "slerp, of which .* is made, is missing"),
        (lambda run: scale(run / "iteration-2" / "slerp"), "the weights of .*slerp are not those"),
        (lambda run: scale(run / "sft"), "the weights of .*sft are not those"),
        (lambda run: (run / "iteration-2" / "front" / "gemma2.json").unlink(), "not an output of gemma2 pareto"),
        (lambda run: os.truncate(run / "iteration-2" / "front" / "front.json", 99), r"front\.json cannot be read"),
    ],
)
def test_ends_that_are_gone_or_others_are_refused(iterations, tmp_path, harm, said):
    run = shutil.copytree(iterations, tmp_path / "run")
    harm(run)
    with pytest.raises(InputError, match=said):
        run_pick(PickConfig(front=run / "iteration-2" / "front", pick="eta=0.3"), RunOptions(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_the_front_is_never_replaced_by_its_model(iterations, tmp_path):
    front = shutil.copytree(iterations, tmp_path / "run") / "iteration-2" / "front"
    with pytest.raises(OutputError, match="overlap"):
        run_pick(PickConfig(front=front), RunOptions(front, force=True))
    assert (front / "front.json").is_file()


def test_the_command_takes_the_front_as_an_argument(iterations, tmp_path, capsys):
    front, out = str(iterations / "iteration-2" / "front"), tmp_path / "model"
    assert invoke(["pick", front, "--pick", "kl<=1000", "--out", str(out), "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "line"
    assert (out / "model.safetensors").is_file()
    assert invoke(["pick", front, "--out", str(tmp_path / "not"), "--dry-run", "--json", "--quiet"]) == 0
    assert not (tmp_path / "not").exists()
