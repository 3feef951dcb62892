"""The curve of an RL run on a front: taken only from evaluations that were made as the points are."""

import json

import pytest
import torch
from policies import measured_on_the_way, pareto_config, points_of, two_iterations

from gemma2.posttrain.evaluation.pareto import run_pareto
from gemma2.posttrain.evaluation.trajectory import procedure, trajectory
from gemma2.posttrain.rl.rlhf import run_rlhf
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import ParetoConfig, RlhfConfig
from gemma2.posttrain.tiny.networks import random_model

NUMBERS = {"temperature": 1.0, "max_new_tokens": 24}


def short(prompts, completions, **_):
    return [-float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    found = two_iterations(tmp_path_factory.mktemp("trajectory"))
    model = random_model(1)
    with torch.no_grad():
        model.model.embed_tokens.weight[107] *= 6  # so that completions end
    model.save_pretrained(found / "sft")
    return found


def trained(root, out, **more):
    """A real RL run of three steps on four prompts, evaluated at each step."""
    config = RlhfConfig(
        policy=root / "sft", prompts=root / "heldout.jsonl", heldout=root / "heldout.jsonl", steps=3, n=2, seed=7,
        prompts_per_step=2, learning_rate=2e-3, warmup_steps=0, eval_every=1, eval_prompts=4, eval_seed=5,
        reward_fn=f"{__name__}:short", **NUMBERS, **more,
    )  # fmt: skip
    return run_rlhf(config, RunOptions(out)).out


@pytest.fixture(scope="module")
def run(root):
    return trained(root, root / "run")


def front_of(root, run, out, **more):
    fields = {"sft": root / "sft", "prompts": root / "heldout.jsonl", "policies": (run,), "seed": 5} | NUMBERS
    config = ParetoConfig(**(fields | {"reward_fn": f"{__name__}:short"} | more))
    run_pareto(config, RunOptions(out))
    return points_of(out)


def test_the_same_weights_get_the_same_numbers_during_rl_and_on_the_front(root, run, tmp_path):
    points = front_of(root, run, tmp_path / "front")
    last = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()][-1]
    values = json.loads((tmp_path / "front" / "prompts.json").read_text())["points"]
    assert last["step"] == 3
    for metric in ("reward", "kl"):
        assert last["values"][metric] == pytest.approx(values["run"][metric], abs=1e-5), metric
    assert {name for name, point in points.items() if point["kind"] == "trajectory"} == {"run step 1", "run step 2"}
    for name in ("run step 1", "run step 2"):
        assert points[name]["reward"] == pytest.approx(sum(values[name]["reward"]) / 4)
        assert points[name]["reward_low"] <= points[name]["reward"] <= points[name]["reward_high"]
        assert points[name]["n"] == 4


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}], ids=["full", "LoRA"])
def test_an_evaluation_in_half_precision_is_of_the_rounded_weights_that_a_front_loads(root, tmp_path, more):
    run = trained(root, tmp_path / "run", dtype="bfloat16", **more)
    last = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()][-1]
    points = front_of(root, run, tmp_path / "front", dtype="bfloat16")
    values = json.loads((tmp_path / "front" / "prompts.json").read_text())["points"]
    assert last["values"] == {metric: values["run"][metric] for metric in ("reward", "kl")}  # bit for bit
    assert {name for name, point in points.items() if point["kind"] == "trajectory"} == {"run step 1", "run step 2"}
    wide = front_of(root, run, tmp_path / "wide")
    assert [point for point in wide.values() if point["kind"] == "trajectory"] == []


@pytest.mark.parametrize(
    "other",
    [
        *({"seed": 6}, {"limit": 3}, {"n": 2}, {"temperature": 0.9}, {"max_new_tokens": 5}),
        {"reward_fn": "policies:reward"},
    ],
)
def test_an_evaluation_made_in_another_way_is_not_on_the_front(root, run, tmp_path, other):
    points = front_of(root, run, tmp_path / "front", **other)
    assert [name for name, point in points.items() if point["kind"] == "trajectory"] == []


def test_neither_the_start_nor_the_end_of_a_run_appears_a_second_time(root):
    here = root / "iteration-1" / "policy-1"
    alike = procedure(pareto_config(root), root / "sft", root / "heldout.jsonl", 1, 0)
    measured_on_the_way(here, alike, {0: 0.0, 10: 1.0, 20: 2.0})
    assert [point["step"] for point in trajectory(here, 1, alike, 4)] == [10]
    assert trajectory(here, 1, "blake3:other", 4) == trajectory(here, 1, alike, 5) == []
