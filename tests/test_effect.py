"""bench/effect.py: the rule by which the quickstart shows what merging adds, and the figures that it reads."""

import json
import sys

import pytest
from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import effect

UP, FLAT, DOWN = (0.3, 0.1), (0.2, 0.1), (-0.3, 0.1)  # +3 errors, exactly +2 errors, -3 errors


def seeds(reward, judge=None):
    """Rows of (reward, judge, accuracy), one per seed; the accuracy falls throughout and decides nothing."""
    return [[a, b, DOWN] for a, b in zip(reward, judge or [UP] * len(reward), strict=True)]


@pytest.mark.parametrize(
    ("rewards", "holds"),
    [
        ([UP] * 10, True),
        ([UP] * 8 + [DOWN] * 2, True),  # 8 of 10 are enough, whatever the other two are
        ([UP] * 7 + [DOWN] * 3, False),
        ([UP] * 8 + [FLAT] * 2, True),
        ([UP] * 7 + [FLAT] * 3, False),  # two errors are not more than two errors
        ([(0.21, 0.1)] * 8 + [DOWN] * 2, True),
        ([(0.9, 0.5)] * 10, False),  # +1.8 errors on every seed: certain over all, but not by the rule
        ([UP] * 4 + [DOWN], True),  # 4 of 5
        ([UP] * 3 + [DOWN] * 2, False),
        ([UP] * 3, True),
        ([UP] * 2 + [DOWN], False),  # 2 of 3 are less than 0.8
    ],
)
def test_the_reward_must_be_two_errors_up_on_eight_seeds_of_ten(rewards, holds):
    assert effect.shows(seeds(rewards)) is holds


@pytest.mark.parametrize(
    ("judges", "holds"),
    [
        ([UP] * 8 + [(-0.1, 0.1)] * 2, True),
        ([UP] * 7 + [(-0.1, 0.1)] * 3, False),  # above zero on 7 only
        ([UP] * 7 + [(0.001, 0.1)] + [(-0.1, 0.1)] * 2, True),  # just above zero counts
        ([UP] * 7 + [(0.0, 0.1)] * 3, False),  # zero is not above zero
        # The mean over ten: 8 x 0.1 / 10 = 0.08, its error 0.1 x sqrt(10) / 10 = 0.032: 2.5 errors.
        ([(0.1, 0.1)] * 8 + [(0.0, 0.1)] * 2, True),
        # 8 x 0.075 / 10 = 0.06, 1.9 errors of 0.032.
        ([(0.075, 0.1)] * 8 + [(0.0, 0.1)] * 2, False),
        # Eight small gains and two large losses: (8 x 0.1 - 2 x 0.5) / 10 is below zero.
        ([(0.1, 0.01)] * 8 + [(-0.5, 0.01)] * 2, False),
    ],
)
def test_the_judge_must_be_above_zero_on_eight_seeds_of_ten_and_by_two_errors_over_all(judges, holds):
    assert effect.shows(seeds([UP] * 10, judges)) is holds


def test_the_gain_of_merging_is_read_from_the_summary(tmp_path):
    chosen = {"label": "SLERP 2", "single": "RL 1.2"}
    for number, metric in enumerate(effect.METRICS, start=1):
        chosen |= {f"{metric}_over_single": number / 10, f"{metric}_over_single_se": number / 100}
    (tmp_path / "summary.json").write_text(json.dumps({"chosen": chosen, "rows": []}))
    assert effect.over_single(tmp_path) == [(0.1, 0.01), (0.2, 0.02), (0.3, 0.03)]


def test_over_all_seeds_the_error_is_the_larger_of_that_of_the_prompts_and_that_of_the_spread():
    # Spread: deviations of 0.3, 0, -0.3; the root of 0.18 / 2 / 3 is 0.1732. Prompts: 0.03 sqrt(3) / 3 is 0.0173.
    assert effect.over_all([(0.5, 0.03), (0.8, 0.03), (0.2, 0.03)]) == pytest.approx((0.5, 0.17320508))
    assert effect.over_all([(0.5, 3.0)] * 4) == pytest.approx((0.5, 1.5))  # 3 / sqrt(4); no spread
    # One seed of ten carries it: a mean of 0.109 with 0.003 from the prompts, 0.099 from the spread.
    assert not effect.shows(seeds([UP] * 10, [(1.0, 0.01)] + [(0.01, 0.01)] * 9))


def test_the_first_slerp_is_set_against_the_mean_of_its_policies_on_each_prompt(tmp_path):
    values = {"a": [1.0, 3.0, 2.0], "b": [3.0, 5.0, 2.0], "s": [4.0, 4.0, 4.0], "c": [9.0] * 3, "t": [50.0] * 3}
    kinds = {"a": ("policy", 1), "b": ("policy", 1), "s": ("slerp", 1), "c": ("line", 1), "t": ("slerp", 2)}
    front = tmp_path / "warp" / "front"
    front.mkdir(parents=True)
    points = [{"name": name, "kind": kind, "iteration": iteration} for name, (kind, iteration) in kinds.items()]
    (front / "front.json").write_text(json.dumps({"points": points}))
    measured = {name: dict.fromkeys(effect.COLUMNS, one) for name, one in values.items()}
    (front / "prompts.json").write_text(json.dumps({"points": measured}))
    # On the three prompts 4 - 2, 4 - 4, 4 - 2: a mean of 4/3, sd 2/sqrt(3), error 2/3.
    assert effect.over_policies(tmp_path) == [pytest.approx((4 / 3, 2 / 3))] * 4


def test_a_row_has_a_cell_for_every_column():
    row = effect.table_row("3", "chosen - single", [(0.5, 0.25), (0.1, 0.05), (-0.3, 0.1)])
    assert row == "| 3 | chosen - single | +0.500 (+2.0 SE) | +0.100 (+2.0 SE) | -0.300 (-3.0 SE) |  |"


def test_a_gain_has_the_error_of_both_figures():
    after, before = {"reward": 5.0, "reward_se": 0.3}, {"reward": 2.0, "reward_se": 0.4}
    assert effect.gain(after, before, "reward") == pytest.approx((3.0, 0.5))


def test_the_seed_of_the_calibration_is_not_among_the_seeds_that_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["effect.py", "--help"])
    with pytest.raises(SystemExit):
        effect.main()
    assert "--at-once" in capsys.readouterr().out
    asked = []
    monkeypatch.setattr(sys, "argv", ["effect.py"])

    def measured(gemma2, directory, seed):
        asked.append((seed, directory.name))
        raise KeyboardInterrupt

    monkeypatch.setattr(effect, "timed", measured)
    with pytest.raises(KeyboardInterrupt):
        effect.main()
    assert (0, "seed-0") in asked
    assert {seed for seed, _ in asked} <= set(range(10))
