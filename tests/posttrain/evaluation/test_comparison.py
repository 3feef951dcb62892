"""Gains over the start of RL and over single runs, by hand."""

import math

import pytest

from gemma2.posttrain.evaluation.comparison import is_gain, with_gains


def point(name, kind, kl, reward, **more):
    return {"name": name, "kind": kind, "kl": kl, "reward": reward, "iteration": None, **more}


def world(kl=2.0, rewards=(5.0, 6.0, 7.0, 6.0), **more):
    """SFT at (0, 1), a run that ends at (4, 5) with an evaluation at (1, 4), and a merge."""
    values = {
        "SFT": {"reward": [0.0, 1.0, 2.0, 1.0], "kl": [0.0] * 4},
        "run": {"reward": [4.0, 5.0, 6.0, 5.0], "kl": [4.0] * 4},
        "run step 1": {"reward": [3.0, 4.0, 5.0, 4.0], "kl": [1.0] * 4},
        "later": {"reward": [9.0] * 4, "kl": [0.1] * 4},
        "merge": {"reward": list(rewards), "kl": [kl] * 4},
    } | more
    mean = {name: {key: sum(column) / 4 for key, column in found.items()} for name, found in values.items()}
    points = [
        point("SFT", "sft", **mean["SFT"]),
        point("run", "policy", **mean["run"]) | {"iteration": 1},
        point("later", "policy", **mean["later"]) | {"iteration": 2},  # starts at a merge: not a single run
        point("merge", "slerp", **mean["merge"]) | {"iteration": 1},
        point("run step 1", "trajectory", **mean["run step 1"], run="run", step=1),
    ]
    return {p["name"]: p for p in with_gains(points, values)}


def test_a_gain_is_paired_by_prompt():
    """One more on every prompt, however different the prompts are: no spread."""
    gained = world(kl=9.0)["merge"]
    assert gained["reward_over_single"] == pytest.approx(1.0)
    assert gained["reward_over_single_se"] == pytest.approx(0.0)
    assert gained["single"] == "run"
    assert (gained["reward_over_start"], gained["reward_over_start_se"]) == pytest.approx((5.0, 0.0))


def test_the_error_is_that_of_the_mean_of_the_differences():
    gained = world(kl=9.0, rewards=(5.0, 6.0, 7.0, 9.0))["merge"]  # differences 1, 1, 1, 4
    assert gained["reward_over_single"] == pytest.approx(1.75)
    assert gained["reward_over_single_se"] == pytest.approx(1.5 / 2)
    reach = 3.182446305284263 * 0.75  # Student's t, 3 degrees of freedom
    ends = gained["reward_over_single_low"], gained["reward_over_single_high"]
    assert ends == pytest.approx((1.75 - reach, 1.75 + reach))


@pytest.mark.parametrize(
    ("kl", "rival", "reward"),
    [
        (9.0, "run", 5.0),
        (4.0, "run", 5.0),
        (2.0, "a place between run step 1 and run", 4 + 1 / 3),
        (1.0, "run step 1", 4.0),
        (0.5, "a place between SFT and run step 1", 2.5),
    ],
)
def test_the_rival_is_the_best_of_a_single_run_at_no_more_kl(kl, rival, reward):
    gained = world(kl=kl)["merge"]
    assert gained["single"] == rival
    assert gained["reward_over_single"] == pytest.approx(6.0 - reward)


def test_between_two_corners_the_error_of_the_kl_counts():
    """A prompt with more KL than the mean would have had more reward on the curve: slope 1/3 between the corners."""
    kls = [1.0, 2.0, 2.0, 3.0]
    gained = world(merge={"reward": [5.0, 6.0, 7.0, 6.0], "kl": kls})["merge"]
    differences = [5 / 3 - (k - 2.0) / 3 for k in kls]
    mean = sum(differences) / 4
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
    assert (gained["reward_over_single"], gained["reward_over_single_se"]) == pytest.approx((mean, error))


def test_what_has_nothing_to_be_compared_with_has_no_gain():
    found = world()
    assert not any(is_gain(key) for key in found["SFT"])
    assert "reward_over_single" not in found["run"]
    assert "reward_over_start" in found["run"]
    assert "reward_over_single" not in found["run step 1"]
    same = world(merge={"reward": [0.0, 1.0, 2.0, 1.0], "kl": [0.0] * 4})["merge"]
    assert not any(is_gain(key) for key in same)  # the SFT policy itself, at eta 0


def test_a_prompt_without_a_score_is_left_out_of_the_pairs():
    points = [point("SFT", "sft", 0.0, 1.0), point("merge", "slerp", 9.0, 3.0)]
    values = {
        "SFT": {"reward": [1.0, 1.0, 5.0], "kl": [0.0] * 3},
        "merge": {"reward": [2.0, 4.0, None], "kl": [9.0] * 3},
    }
    assert with_gains(points, values)[1]["reward_over_start"] == pytest.approx(2.0)


def test_between_two_corners_a_gain_is_certain_only_if_it_beats_the_higher_corner():
    """The corners have rewards 4 and 5 at KL 1 and 4; at KL 2 the straight line is at 4.33, a curve may be near 5."""
    inside = world(rewards=(3.9, 4.9, 5.9, 4.9))["merge"]  # 4.9 on average, no spread to the run
    assert inside["reward_over_single"] == pytest.approx(4.9 - 4 - 1 / 3)
    assert inside["reward_over_single_low"] == pytest.approx(-0.1)
    above = world(rewards=(5.0, 6.0, 7.0, 6.0))["merge"]
    assert above["reward_over_single_low"] == pytest.approx(1.0)
    below = world(rewards=(2.0, 3.0, 4.0, 3.0))["merge"]  # below both corners: a loss, which the shape cannot explain
    assert below["reward_over_single_high"] == pytest.approx(-4 / 3)
