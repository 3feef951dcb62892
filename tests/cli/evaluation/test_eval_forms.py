"""`gemma2 eval` and its forms: which form a command line means."""

import pytest

from gemma2.cli.app import invoke
from gemma2.cli.evaluation.eval_group import FORMS, EvalGroup
from gemma2.core.errors import UsageError


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.has_flag])
def test_the_flag_of_a_form_selects_it_wherever_it_is(name):
    assert EvalGroup.routed(["m", f"--{name}", "x"]) == [name, "m", f"--{name}", "x"]
    assert EvalGroup.routed([f"--{name}=x", "m"]) == [name, f"--{name}=x", "m"]
    assert EvalGroup.routed([name, "m"]) == [name, "m"]


def test_without_a_flag_of_a_form_the_policy_is_measured():
    assert EvalGroup.routed(["--model", "m", "--sft", "s"]) == ["policy", "--model", "m", "--sft", "s"]
    assert EvalGroup.routed(["m", "--sft", "s"]) == ["policy", "m", "--sft", "s"]


def test_flags_of_two_forms_are_refused():
    first, second, *_ = (name for name, form in FORMS.items() if form.has_flag)
    with pytest.raises(UsageError, match=f"--{first} and --{second} are two measurements"):
        invoke(["eval", "m", f"--{first}", "x", f"--{second}", "y"])


def test_the_page_lists_every_form_and_what_it_measures(capsys):
    assert invoke(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    for name, form in FORMS.items():
        assert f"  {name} " in shown
        assert form.summary[:40] in shown


def test_an_unknown_suite_is_answered_with_the_closest_name():
    with pytest.raises(UsageError, match=r"--suite gema2 .* did you mean 'gemma2'"):
        invoke(["eval", "m", "--suite", "gema2", "--data", "d", "--out", "o"])
