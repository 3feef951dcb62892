"""Alerts: what is a comparison, when it holds, which metrics there are."""

import math

import pytest

from gemma2.core.errors import UsageError
from gemma2.posttrain.watch.alerts import Alert, check_metrics, holding, parse_alert


def test_an_alert_is_read_as_a_condition_of_a_pipeline_is():
    assert parse_alert("kl > 20") == parse_alert("kl>20") == Alert("kl", ">", 20.0)
    assert parse_alert(" rewards/judge.f <= -1e-3") == Alert("rewards/judge.f", "<=", -1e-3)


@pytest.mark.parametrize(
    "text", ["kl", "kl >", "> 20", "kl = 20", "kl > reward", "kl > true", "20 < kl", "kl > .nan", ""]
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r'--alert .*; write for instance --alert "kl > 20"'):
        parse_alert(text)


@pytest.mark.parametrize(
    ("sign", "held"),
    [
        ("<", [1.0]),
        ("<=", [1.0, 2.0]),
        ("==", [2.0]),
        (">=", [2.0, math.inf]),
        (">", [math.inf]),
        ("!=", [1.0, math.inf]),
    ],
)
def test_signs_mean_what_they_say(sign, held):
    values = (1.0, 2.0, math.inf)
    assert [value for value in values if holding([Alert("kl", sign, 2.0)], {"kl": value})] == held


def test_a_figure_that_is_missing_makes_no_alert_hold():
    assert holding([Alert("kl", "!=", 2.0)], {"reward": 1.0}) is None


def test_the_first_that_holds_is_said_with_its_value():
    alerts = [Alert("length", ">", 90), Alert("kl", ">", 20), Alert("reward", "<", 0)]
    alert, value = holding(alerts, {"kl": 21.3, "length": 3, "reward": -1})
    assert alert.said(value) == "kl 21.3 > 20"
    assert Alert("kl", ">", 20).said(20.00001) == "kl 20.00001 > 20"  # enough digits to see why


def test_an_unknown_metric_is_refused_with_the_nearest():
    check_metrics([Alert("kl", ">", 1)], {"kl", "reward"}, "out")
    with pytest.raises(UsageError, match="out logs no metric 'rewrad'; did you mean 'reward'"):
        check_metrics([Alert("rewrad", ">", 1)], {"kl", "reward"}, "out")
