"""bench/science.py: its statistics against numbers worked by hand, and what its stages differ in."""

import importlib.util
import math
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from processes import ROOT

from gemma2.posttrain.pipelines.check import check_pipeline


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


findings = load("findings")
judged = load("judged")
Curve, Estimate, Finding, Seed = findings.Curve, findings.Estimate, findings.Finding, findings.Seed


def curve(*points):
    """A curve of one set of prompts from (KL, reward) pairs."""
    kl, reward = zip(*points, strict=True)
    return Curve(np.array([kl]), np.array([reward]))


# --- areas ----------------------------------------------------------------------------------------------------------


def test_the_area_of_a_segment_is_that_of_its_triangle():
    # Reward 1 -> 3 over KL 0 -> 2: half of 2 x 2; a step of 1/100 of the segment is left out on one side.
    assert curve((0, 1), (2, 3)).area(2.0)[0] == pytest.approx(2.0, abs=2 * 2 / 200 + 1e-9)


def test_beyond_its_end_a_curve_keeps_its_best_reward():
    line = curve((0, 1), (2, 3))
    assert line.area(5.0)[0] - line.area(2.0)[0] == pytest.approx(3 * 2)


def test_a_point_on_the_segment_adds_no_area():
    few, many = curve((0, 0), (1, 1)), curve((0, 0), (0.2, 0.2), (0.5, 0.5), (0.7, 0.7), (1, 1))
    assert many.area(1.0)[0] == pytest.approx(few.area(1.0)[0], abs=0.005)


def test_a_path_that_turns_back_counts_what_it_dominates():
    # (1, 1) -> (0.5, 2): the second point is better in both; within KL 0.5 .. 1 its reward of 2 is to be had.
    assert curve((0, 0), (1, 1), (0.5, 2)).area(1.0)[0] == pytest.approx(0.5**2 / 2 + 0.5 * 2, abs=0.01)


def test_the_gap_is_the_mean_difference_up_to_the_lesser_end():
    # a has the reward 2 KL up to KL 4, b the reward KL up to KL 2: up to 2 the difference is KL, 1 on average.
    a, b = curve((0, 0), (4, 8)), curve((0, 0), (2, 2))
    assert findings.gap(a, b)[0] == pytest.approx(1.0, abs=0.05)
    assert findings.gap(b, a)[0] == pytest.approx(-findings.gap(a, b)[0])


def test_the_extent_goes_to_the_greater_end():
    # Up to 4: a 4 x 8 / 2 = 16; b 2 x 2 / 2 and then 2 for another 2 nats, 6.
    a, b = curve((0, 0), (4, 8)), curve((0, 0), (2, 2))
    assert findings.extent(a, b)[0] == pytest.approx(10.0, abs=0.2)


def test_a_curve_is_read_at_the_kls_of_another():
    # Between (1, 2) and (3, 3) the reward rises by 1/2 a nat; beyond 3 it stays; the second set has a line of its own.
    a = Curve(np.array([[0.0, 1.0, 3.0], [0.0, 2.0, 4.0]]), np.array([[0.0, 2.0, 3.0], [0.0, 2.0, 8.0]]))
    b = Curve(np.array([[0.0, 2.0, 5.0], [1.0, 3.0, 4.0]]), np.zeros((2, 3)))
    read = a.at_kls_of(b)
    assert read.kl is b.kl
    assert read.reward.tolist() == [[0.0, 2.5, 3.0], [1.0, 5.0, 8.0]]


def test_a_curve_loses_at_the_corners_of_the_other_and_wins_at_its_own():
    # Both lie on sqrt(KL), one with corners at 0, 1, 4, the other at 0, 0.25, 2.25, 4: neither is above the other.
    a, b = (curve(*((x, x**0.5) for x in corners)) for corners in ((0, 1, 4), (0, 0.25, 2.25, 4)))
    assert findings._at_least(findings.gap)(a, b)[0] < -0.01
    assert findings._at_most(findings.gap)(a, b)[0] > 0.01


def test_bends_on_an_uneven_grid():
    # Divided differences: of x^2 always 1; of x^3 over (a, b, c) it is a + b + c.
    grid = [0.0, 0.1, 0.3, 0.5, 0.8, 1.0]
    powers = np.array([[x**2 for x in grid], [x**3 for x in grid]])
    assert findings.bend(grid, powers)[0] == pytest.approx([1.0] * 4)
    assert findings.bend(grid, powers)[1] == pytest.approx([0.4, 0.9, 1.6, 2.3])


# --- errors ---------------------------------------------------------------------------------------------------------


def test_means_with_one_prompt_left_out():
    means = findings.left_out(np.array([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]]))
    assert means.tolist() == [[3.0, 2.0], [4.0, 3.0], [3.5, 1.5], [1.5, 1.5]]


def test_the_jackknife_of_a_difference_is_the_paired_error():
    a, b = [1.0, 4.0, 2.5, 7.0, 3.0], [0.5, 4.5, 1.0, 5.0, 3.5]
    means = findings.left_out(np.array([a, b]))
    found = findings.jackknifed(means[:, 0] - means[:, 1])
    pairs = [x - y for x, y in zip(a, b, strict=True)]
    assert found.value == pytest.approx(statistics.mean(pairs))
    assert found.se == pytest.approx(statistics.stdev(pairs) / math.sqrt(5))


def test_over_seeds_the_larger_error_counts():
    # Spread: values 1, 2, 3 have sd 1, so 1/sqrt(3). Prompts: sqrt(3 x 3^2) / 3 = sqrt(3).
    assert findings.over_seeds([Estimate(v, 0.1) for v in (1, 2, 3)]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert findings.over_seeds([Estimate(v, 3.0) for v in (1, 2, 3)]) == pytest.approx((2.0, math.sqrt(3)))


def test_without_errors_within_seeds_the_spread_counts_and_one_seed_has_none():
    assert findings.over_seeds([Estimate(v) for v in (1, 2, 3)]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert math.isnan(findings.over_seeds([Estimate(1.0)])[1])


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "values", "se", "expected"),
    [
        (findings.above(""), (1.0, 1.1, 0.9), 0.1, "yes"),
        (findings.above(""), (-1.0, -1.1, -0.9), 0.1, "no"),
        (findings.below(""), (-1.0, -1.1, -0.9), 0.1, "yes"),
        (findings.below(""), (1.0, 1.1, 0.9), 0.1, "no"),
        (findings.above(""), (1.0, 1.1, 0.9), 0.65, "not told apart"),  # error 0.65 / sqrt(3): 1 is 2.7 of them
        (findings.above(""), (1.0, 1.1, -0.01), 0.1, "not told apart"),  # one seed has the other sign
        (findings.above(""), (1.0, 1.0, 1.0, 1.0, -0.01), 0.1, "not told apart"),  # so with five, whose error is 0.2
        (findings.above("", 1.0), (2.0, 2.0, 2.0, 2.0, 0.99), 0.1, "not told apart"),
        (findings.above("", 1.0), (1.2, 1.3, 1.4), 0.01, "yes"),
        (findings.above("", 1.3), (1.2, 1.3, 1.4), 0.01, "not told apart"),
        (findings.near("", 90.0), (89.2, 89.3, 89.25), 0.0, "yes"),  # within one per cent
        (findings.near("", 90.0), (60.0, 61.0, 62.0), 0.0, "no"),
        (findings.near("", 90.0), (73.0, 79.0, 91.0), 0.0, "yes"),  # 81 is within three errors of 5.3
        (findings.near("", 90.0), (70.0, 76.0, 78.0), 0.0, "no"),  # 74.7 is not within three of 2.4
        (findings.Claim(""), (1.0, 1.0, 1.0), 0.0, "—"),
    ],
)
def test_the_rule(claim, values, se, expected):
    assert claim.verdict([Estimate(value, se) for value in values]) == expected


def test_a_number_that_is_too_low_or_too_high_gives_one_verdict_alone():
    up, down = [Estimate(value, 0.1) for value in (1.0, 1.1, 0.9)], [Estimate(-value, 0.1) for value in (1.0, 1.1, 0.9)]
    assert [findings.AT_LEAST.verdict(found) for found in (up, down)] == ["yes", "not told apart"]
    assert [findings.AT_MOST.verdict(found) for found in (up, down)] == ["not told apart", "no"]


def test_a_single_number_without_an_error_tells_no_sign_apart():
    assert findings.above("").verdict([Estimate(1.0)]) == "not told apart"


def test_a_row_shows_the_mean_every_seed_and_the_verdict(science):
    rewards = {0: [1.0, 3.0], 1: [2.0, 4.0]}
    seeds = {
        number: Seed({"a": 0, "b": 1}, np.zeros((3, 2)), findings.left_out(np.array([values, [0.0, 0.0]])), {})
        for number, values in rewards.items()
    }
    rows = [Finding("a over b", findings.above("> 0"), lambda s: s.mean_reward("a") - s.mean_reward("b"))]
    # Seeds: means 2 and 3, paired errors 1 each; over both 2.5, spread 0.5, prompts sqrt(2) / 2.
    assert science.table({"Part": rows}, seeds).splitlines() == [
        "| finding | the paper | here, mean ± error | seed 0 | seed 1 | holds? |",
        "| --- | --- | --- | --- | --- | --- |",
        "| **Part** |  |  |  |  |  |",
        "| a over b | > 0 | +2.500 ± 0.707 | +2.000 ± 1.000 | +3.000 ± 1.000 | yes |",
    ]


# --- the pipeline ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def science():
    return load("science")


@pytest.fixture(scope="module")
def stages(science):
    return {seed: science.stages_of(seed) for seed in (0, 1)}


def different(a, b):
    return {key for key in a.options if a.options[key] != b.options[key]}


def test_every_stage_is_accepted_before_anything_runs(science, tmp_path):
    assert check_pipeline(science.pipeline_of([0], tmp_path)).problems == []


def test_fixed_runs_differ_from_those_of_iteration_1_in_the_anchor_alone(stages):
    for m in (1, 2):
        pair = stages[0][f"fixed/policy-{m}"], stages[0][f"iteration-1/policy-{m}"]
        assert different(*pair) == {"anchor"}
        assert [stage.options["anchor"] for stage in pair] == ["sft", "ema"]


def test_the_long_run_differs_from_the_first_in_its_length_and_seed_alone(stages):
    long, first = stages[0]["long/policy"], stages[0]["iteration-1/policy-1"]
    assert different(long, first) == {"steps", "seed", "eval_every"}
    assert long.options["steps"] == 4 * first.options["steps"]


def test_a_run_measures_itself_where_its_path_has_corners(stages):
    for run in findings.RUNS.values():
        options = stages[0][run].options
        measured = range(options["eval_every"], options["steps"], options["eval_every"])
        assert tuple(measured) == findings.stops_of(run)
        assert len(measured) == 19
        assert (options["eval_prompts"], options["eval_seed"]) == (448, 0)


def test_at_another_width_the_model_and_every_learning_rate_differ_and_nothing_else(science, stages):
    wide = science.stages_of(0, width=192)
    for name, stage in wide.items():
        keys = different(stage, stages[0][name])
        assert keys <= {"width", "learning_rate"}
        if "learning_rate" in stage.options:
            assert float(stage.options["learning_rate"]) == float(stages[0][name].options["learning_rate"]) / 2
    assert wide["models"].options["width"] == 192


def test_the_four_policies_of_iteration_1_differ_in_their_seed_alone(stages):
    policies = [stages[0][f"iteration-1/policy-{m}"] for m in (1, 2, 3, 4)]
    measuring = {"eval_every", "eval_prompts"}  # which changes no weight
    assert all(different(one, policies[0]) <= {"seed", *measuring} for one in policies)
    assert len({one.options["seed"] for one in policies}) == 4


def test_every_stage_of_a_seed_names_its_own_folder_and_draws_from_its_own_seed(stages):
    for number, own in stages.items():
        text = str([stage.options for stage in own.values()])
        assert f"${{seed-{number}/distilled.out}}" in text
        assert f"${{seed-{1 - number}/" not in text
    drawn = [{stage.options["seed"] for stage in own.values() if "seed" in stage.options} for own in stages.values()]
    assert not drawn[0] & drawn[1]


def test_every_front_is_measured_alike(stages):
    fronts = [stage for stage in stages[0].values() if stage.command == "pareto"]
    assert len(fronts) == 5
    assert all(different(front, fronts[0]) <= {"policies", "merged"} for front in fronts)


def test_what_is_compared_is_measured_once(stages):
    listed = [p for stage in stages[0].values() if stage.command == "pareto" for p in stage.options["policies"]]
    runs = {*findings.RUNS.values(), *findings.ALL}
    merges = (findings.TWO, findings.FOUR, findings.SECOND, findings.LERP)
    assert sorted(listed) == sorted(f"${{seed-0/{name}.out}}" for name in (*runs, *merges))


def test_the_judge_takes_the_place_of_the_reward_and_trajectories_are_left_out(science, tmp_path, monkeypatch):
    def entry(place, kl, judge, eta=None):
        models, kind = [SimpleNamespace(path=tmp_path / place)], "policy" if eta is None else "line"
        candidate = SimpleNamespace(models=models, kind=kind, eta=eta)
        values = {"kl": [kl - 1, kl + 1], "reward": [90.0, 90.0], "judge": [judge - 0.1, judge + 0.1]}
        return SimpleNamespace(candidate=candidate, values=values, trajectory=[{"step": 6, "values": {}}])

    first, second = findings.PAIR
    found = [entry(first, 2.0, 0.5), entry(second, 4.0, 0.6), entry(findings.TWO, 3.0, 0.8)]
    found += [entry(findings.TWO, kl, judge, eta) for kl, judge, eta in ((1.0, 0.4, 0.0), (3.0, 0.8, 1.0))]
    (tmp_path / "measured" / "one").mkdir(parents=True)
    monkeypatch.setattr(science, "read_entries", lambda *_: found)
    monkeypatch.setattr(science, "read_front", lambda *_: {})
    seed = science.read_judged(tmp_path)
    rows = {finding.name: finding for finding in judged.JUDGED["By the judge"]}
    assert rows["judge, SLERP − its policies"].estimate(seed).value == pytest.approx(0.8 - 0.55)
    # The line has 0.6 at a KL of 2, where the first run ended at 0.5, and 0.8, its end, where the second did at 0.6.
    over = rows["judge at equal KL, line of SLERP − ends of its runs"]
    assert over.estimate(seed).value == pytest.approx((0.1 + 0.2) / 2)


@pytest.mark.parametrize("missing", [None, 12])
def test_a_run_without_one_of_its_evaluations_is_refused(science, tmp_path, monkeypatch, missing):
    def entry(place, kind="policy", eta=None, steps=()):
        models = [SimpleNamespace(path=tmp_path / place)]
        return SimpleNamespace(
            candidate=SimpleNamespace(models=models, kind=kind, eta=eta),
            values={"kl": [0.5, 1.5], "reward": [1.0, 2.0]},
            trajectory=[{"step": step, "values": {"kl": [0.1, 0.2], "reward": [3.0, step]}} for step in steps],
        )

    found = [entry("distilled", "sft")]
    for run in findings.RUNS.values():
        found.append(entry(run, steps=[step for step in findings.stops_of(run) if step != missing]))
    (tmp_path / "measured" / "one").mkdir(parents=True)
    monkeypatch.setattr(science, "read_entries", lambda *_: found)
    monkeypatch.setattr(science, "read_front", lambda *_: {})
    monkeypatch.setattr(science, "geometry_of", lambda _: {})
    if missing is None:
        seed = science.read_seed(tmp_path)
        curve = findings.path(seed, "ema-1")
        # The start, 19 stops of KL 0.15, and the end; the reward of a stop is the mean of 3 and its step.
        assert curve.kl[0].tolist() == [1.0, *[pytest.approx(0.15)] * 19, 1.0]
        assert curve.reward[0, 1:-1].tolist() == [(3 + step) / 2 for step in range(6, 120, 6)]
    else:
        with pytest.raises(SystemExit, match=f"has no evaluation that is made as the fronts are at step {missing}"):
            science.read_seed(tmp_path)
