"""References are found, replaced with their types, spliced into lists; conditions compare numbers."""

import pytest

from gemma2.core.errors import UsageError
from gemma2.posttrain.pipelines.references import NULL, condition_holds, filled, lookup, references, replaced

VALUES = {"n": NULL, "a": 1, "b": "x y", "c": ["p", "q"], "e": [1, 2]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${a}", 1),  # alone: the value with its type
        ("n-${a}", "n-1"),  # inside text: text
        ("${a}${b}", "1x y"),
        ("${c}", ["p", "q"]),
        ("${c}/m", ["p/m", "q/m"]),
        (["first", "${c}/m", "${a}"], ["first", "p/m", "q/m", 1]),  # a list is spliced into the list around it
        ({"k": [["${c}"]]}, {"k": [["p", "q"]]}),
        ("${later}", "${later}"),  # not known yet: stays
        ("${a}-${later}", "1-${later}"),
        ("$${a}", "$${a}"),  # escaped
        (["${n}", "${n}s"], [None, "nulls"]),
        (3, 3),
    ],
)
def test_a_reference_is_replaced_by_its_value(value, expected):
    assert replaced(value, VALUES.get) == expected


def test_an_escaped_brace_ends_as_a_plain_one():
    assert filled({"x": ["$${a}", 1]}) == {"x": ["${a}", 1]}
    assert references("$${a} ${b}") == ["b"]


def test_two_lists_in_one_text_are_refused():
    with pytest.raises(UsageError, match="two lists"):
        replaced("${c}/${e}", VALUES.get)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("${a} < 2", True),
        ("${a} >= 2", False),
        ("${b} == x y", True),
        ("1 != 1.0", False),
        ("${n} == null", True),
        ("${a}0 == 10", True),
    ],
)
def test_a_condition_compares_values(text, holds):
    assert condition_holds(text, VALUES.get) is holds


@pytest.mark.parametrize(("text", "said"), [("${a}", "not a comparison"), ("${b} < 1", "compares 'x y' with 1")])
def test_a_condition_that_is_none_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        condition_holds(text, VALUES.get)


def test_a_lookup_names_the_key_that_is_not_there():
    assert lookup({"best": {"points": [{"eta": 0.3}]}}, ["best", "points", "0", "eta"], "r") == 0.3
    with pytest.raises(UsageError, match="there is no 'rewrad'; did you mean 'reward'"):
        lookup({"reward": 1}, ["rewrad"], "x.summary.rewrad")
