"""What a launcher says in variables is a number that fits the others, or one line that leads to a run."""

import os

import pytest

from gemma2.core.errors import UsageError
from gemma2.core.ranks import announced, announced_here

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
OF_TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}


@pytest.fixture
def given(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def take(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return take


@pytest.mark.parametrize(
    ("variables", "size", "here"),
    [
        ({}, 1, 1),
        (OF_TWO, 2, 2),
        (OF_TWO | {"LOCAL_WORLD_SIZE": "1"}, 2, 1),
        ({"WORLD_SIZE": " 3 "}, 3, 3),
        ({"RANK": "0", "LOCAL_RANK": "-1"}, 1, 1),  # as old launchers say that there is one process
        ({"MASTER_PORT": "any"}, 1, 1),  # nobody meets there
    ],
)
def test_processes_are_counted_by_what_the_launcher_says(given, variables, size, here):
    given(variables)
    assert (announced(), announced_here()) == (size, here)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["abc", "", " ", "-2", "1.5", "1e3", "²", "9" * 5000])
def test_a_variable_that_is_no_number_is_one_line_whose_advice_leads_to_one_process(given, monkeypatch, name, value):
    given(OF_TWO | {name: value})
    with pytest.raises(UsageError) as caught:
        (announced(), announced_here())
    assert caught.value.what == f"the environment variable {name} is {value!r}"
    unset = caught.value.hint.removeprefix("unset ").partition(", or ")[0]
    for one in unset.replace(" and ", ", ").split(", "):
        monkeypatch.delenv(one)
    assert (announced(), announced_here()) == (1, 1)
    assert set(os.environ) & set(NAMES) == {"MASTER_PORT"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE says 1"),
        (OF_TWO | {"RANK": "2"}, "RANK is 2, and WORLD_SIZE says 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        (OF_TWO | {"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(given, variables, said):
    given(variables)
    with pytest.raises(UsageError, match=said):
        announced()
