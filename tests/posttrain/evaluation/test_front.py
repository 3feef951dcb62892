"""Fronts, areas and the best within a KL, by hand."""

import math

import numpy as np
import pytest

from gemma2.posttrain.evaluation.bootstrap import (
    Answers,
    chosen_elsewhere,
    front_areas,
    interval,
    resampled_areas,
)
from gemma2.posttrain.evaluation.front import best_at, best_table, hypervolume, pareto_front, round_limits


def points(*pairs):
    return [{"kl": kl, "reward": reward} for kl, reward in pairs]


def test_the_front_keeps_what_nothing_beats():
    assert pareto_front(points((0, 1), (1, 3), (2, 2), (3, 3), (4, 5))) == [True, True, False, False, True]


def test_equal_points_stay_together():
    assert pareto_front(points((1, 1), (1, 1), (2, 1))) == [True, True, False]


def test_the_hypervolume_is_the_area_of_the_staircase():
    # from KL 1 to 3 the best reward is 2, from 3 to 5 it is 4; floor 1: 2 * (2 - 1) + 2 * (4 - 1) = 8
    assert hypervolume(points((1, 2), (3, 4), (4, 3)), (5, 1)) == pytest.approx(8)


def test_a_point_twice_and_a_point_on_an_edge_add_nothing():
    # (3, 2) lies on the step of (1, 2); at equal KL the higher reward counts
    assert hypervolume(points((1, 2), (1, 2), (3, 2), (3, 4), (3, 3)), (5, 1)) == pytest.approx(8)


def test_points_outside_the_reference_add_nothing():
    assert hypervolume(points((6, 9), (2, 0.5)), (5, 1)) == 0
    assert hypervolume(points((5, 9)), (5, 1)) == 0
    assert hypervolume([], (5, 1)) == 0


def test_best_at_takes_the_highest_reward_within_the_limit():
    front = points((0, 1), (2, 3), (4, 5))
    assert best_at(front, 2)["reward"] == 3
    assert best_at(front, 3.9)["reward"] == 3
    assert best_at(points((2, 3)), 1) is None


def test_of_equal_rewards_the_one_with_less_kl_is_the_best():
    assert best_at(points((3, 2), (1, 2), (2, 2)), 9)["kl"] == 1


def test_limits_are_round_and_each_lets_another_point_win():
    # 1 -> (0.7, 2); 2 -> the same; 5 -> (3, 4); 10 -> (8, 5); 20 is above the largest KL
    assert round_limits(points((0, 1), (0.7, 2), (3, 4), (8, 5), (12, 1))) == (1.0, 5.0, 10.0)
    assert round_limits(points((0, 1))) == ()
    assert round_limits(points((0, 1), (0.03, 2), (0.1, 3))) == (0.05, 0.1)


def test_the_table_names_the_best_point_within_each_limit_that_any_keeps():
    named = [{"name": n, "kind": "line", "eta": e, "kl": k, "reward": r} for n, e, k, r in
             (("a", 0.1, 1.0, 2.0), ("b", 0.5, 3.0, 4.0))]  # fmt: skip
    rows = best_table(named, (0.5, 2.0, 9.0))
    assert [(row["limit"], row["name"], row["eta"]) for row in rows] == [(2.0, "a", 0.1), (9.0, "b", 0.5)]


# --- the bootstrap --------------------------------------------------------------------------------------------------


def test_areas_of_many_sets_are_those_of_each():
    """Against the staircase of `hypervolume`, on random points with ties, in and outside of the reference."""
    generator = np.random.default_rng(0)
    kl, reward = (np.round(generator.uniform(0, 6, (200, 5)), 1) for _ in range(2))
    for reference in ((5.0, 1.0), (2.0, 3.0)):
        expected = [hypervolume(points(*zip(*row, strict=True)), reference) for row in zip(kl, reward, strict=True)]
        np.testing.assert_allclose(front_areas(kl, reward, reference), expected, atol=1e-12)


def test_resamples_draw_prompts_for_all_points_at_once():
    """Two points that always differ by (1, 2): so do their means in every resample, and the area between is known."""
    generator = np.random.default_rng(1)
    kl, reward = generator.uniform(0, 1, 30), generator.normal(0, 1, 30)
    answers = Answers.of([kl, kl + 1], [reward, reward + 2])
    one, both = resampled_areas(answers, [[0], [0, 1]], (9.0, -9.0), resamples=50)
    assert one.std() > 0.1
    # Adding the second point lifts the floor by 2 from its KL to the limit: 2 * (9 - kl - 1), and the first's area is
    # (9 - kl) * (reward + 9): the gain is a function of kl alone, so reward's noise has cancelled.
    gain = both - one
    assert gain.std() < 2 * 0.06 * 1.5  # kl's: sd 0.29 / sqrt(30) = 0.053
    assert gain.mean() == pytest.approx(2 * (8 - kl.mean()), abs=0.1)


def test_a_resample_leaves_out_what_has_no_opinion():
    answers = Answers.of([[1.0, 1.0, 1.0]], [[math.nan, 4.0, 4.0]])
    areas = resampled_areas(answers, [[0]], (2.0, 1.0), resamples=40)
    np.testing.assert_allclose(areas, 3.0)


def test_the_same_answers_give_the_same_resamples_however_they_are_cut(monkeypatch):
    generator = np.random.default_rng(2)
    answers = Answers(generator.uniform(0, 3, (3, 20)), generator.normal(0, 1, (3, 20)))
    whole = resampled_areas(answers, [[0, 1, 2]], (3.0, -1.0), resamples=30)
    monkeypatch.setattr("gemma2.posttrain.evaluation.bootstrap.CELLS", 100)
    np.testing.assert_allclose(resampled_areas(answers, [[0, 1, 2]], (3.0, -1.0), resamples=30), whole)


def test_the_basic_interval_mirrors_the_replicates():
    # quantiles of 0..100 at 2.5 % and 97.5 % are 2.5 and 97.5: 2 * 60 - 97.5 = 22.5, 2 * 60 - 2.5 = 117.5
    assert interval(60.0, np.arange(101.0)) == pytest.approx((22.5, 117.5))
    assert interval(1.0, np.arange(101.0))[0] == 0.0


def gains(shift, runs=60, prompts=128):
    """Share of simulated second fronts, `shift` of reward above the first, that are said to improve it."""
    generator = np.random.default_rng(5)
    kl_of, improved = np.array([0.0, 0.1, 0.3, 0.6, 1.0]), 0
    for _ in range(runs):
        common = generator.normal(0, 1.5, prompts)

        def front(rise, common=common):
            kl = kl_of[:, None] * np.exp(generator.normal(0, 0.3, (5, prompts)))
            return kl, 3 * np.sqrt(kl_of)[:, None] + rise + common + generator.normal(0, 1.0, (5, prompts))

        (kl, reward), (kl2, reward2) = front(0.0), front(shift)
        answers = Answers(np.concatenate([kl, kl2[1:]]), np.concatenate([reward, reward2[1:]]))
        reference = (answers.kl.mean(1).max(), reward[0].mean())
        means = answers.kl.mean(1)[None], answers.reward.mean(1)[None]
        gain = front_areas(*means, reference)[0] - front_areas(means[0][:, :5], means[1][:, :5], reference)[0]
        both, before = resampled_areas(answers, [range(9), range(5)], reference, resamples=200)
        improved += interval(gain, both - before)[0] > 0
    return improved / runs


def test_a_front_that_is_no_better_is_seldom_called_better_and_one_that_is_always():
    """With percentiles instead of the basic interval, 97 of 100 fronts without a true gain would be called better."""
    assert gains(0.0) <= 0.15
    assert gains(0.5) >= 0.95


def test_the_reward_of_the_luckiest_of_equal_points_is_corrected():
    """40 points of equal true reward: the best of them looks better by two standard errors, elsewhere it is not."""
    best, corrected = [], []
    for seed in range(10):
        draw = np.random.default_rng(seed)
        reward = draw.normal(size=(40, 64))
        answers = Answers(np.ones((40, 64)), reward)
        best.append(reward.mean(axis=1).max() * 8)  # in standard errors of a mean
        corrected.append(chosen_elsewhere(answers, [1.0], resamples=300)[0] * 8)
    assert np.mean(best) > 1.8
    assert abs(np.mean(corrected)) < 0.6


def test_a_point_that_is_always_chosen_keeps_its_reward():
    reward = np.array([[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0], [50.0] * 4])
    kl = np.array([[0.0] * 4, [1.0] * 4, [9.0] * 4])
    elsewhere = chosen_elsewhere(Answers(kl, reward), [0.5, 2.0, 9.0])
    assert elsewhere == pytest.approx([1.5, 11.5, 50.0], abs=0.1)
    assert chosen_elsewhere(Answers(kl[1:], reward[1:]), [0.5]) == [None]


def test_the_choice_in_a_resample_is_by_its_own_means_and_measured_on_what_it_left_out():
    """Two prompts: a resample of the first alone chooses the point that is good there, measured on the second."""
    answers = Answers(np.zeros((2, 2)), np.array([[1.0, -3.0], [-5.0, 2.0]]))
    # Resamples of one prompt alone, both equally often: the first -> point 0 -> -3; the second -> point 1 -> -5.
    assert chosen_elsewhere(answers, [0.0], resamples=20_000)[0] == pytest.approx(-4.0, abs=0.05)


def test_the_table_says_from_how_many_points_each_was_chosen():
    rows = best_table(
        [{"name": str(i), **p} for i, p in enumerate(points((0, 1), (1, 3), (2, 2), (9, 9)))], [0.5, 2, 10]
    )
    assert [(row["name"], row["chosen_from"]) for row in rows] == [("0", 1), ("1", 3), ("3", 4)]
