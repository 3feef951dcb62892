"""What counts as rounding: of weights, and of answers."""

import pytest

from gemma2.core.rounding import STILL, STILL_KL, differ, is_still, relative_change, still_points


def point(kind, kl, error=None):
    return {"name": kind, "kind": kind, "kl": kl, "kl_se": error, "reward": 1.0}


START = [point("sft", 0.0), point("base", 3.0)]


@pytest.mark.parametrize("kl", [0.0, 2e-8, -2e-8, 0.99 * STILL_KL])
@pytest.mark.parametrize("kind", ["policy", "slerp", "liti"])
def test_policies_with_a_kl_of_rounding_do_not_differ(kind, kl):
    assert not differ([*START, point(kind, kl), point("line", 0.0), point("line", kl)])


@pytest.mark.parametrize("changed", [{"kl": 2 * STILL_KL}, {"kl": 0.5 * STILL_KL, "kl_se": STILL_KL}])
def test_one_policy_that_differs_or_may_differ_is_enough(changed):
    points = [*START, point("policy", 0.0), point("policy", 0.0) | changed]
    assert differ(points)
    assert still_points(points) == [points[2]]


@pytest.mark.parametrize("points", [[], START, [*START, point("trajectory", 0.0)]])
def test_a_front_without_policies_has_nothing_to_say(points):
    assert differ(points)
    assert still_points(points) == []


def test_the_relative_change_is_that_of_the_tensors_that_changed():
    assert relative_change([(9.0, 36.0), (0.0, 1e9)]) == 0.5
    assert relative_change([(9.0, 36.0), (16.0, 64.0)]) == 0.5
    assert relative_change([(0.0, 1.0)]) == 0.0
    assert relative_change([]) is None
    assert relative_change([(1.0, 0.0)]) is None


def test_rounding_is_a_64th_of_the_smallest_step_of_bf16():
    assert STILL == 2.0**-8 / 64
    assert is_still(0.0)
    assert is_still(STILL / 2)
    assert not is_still(STILL)
    assert not is_still(None)
