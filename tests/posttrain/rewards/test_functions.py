"""What a function is called with, and what it may answer."""

import functools
import math
import sys

import pytest
import torch

from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.rewards.functions import Sampled, function_score, load_function

SEEN = []
TURNS = [
    {"role": "user", "content": "Who lives in Tolba?"},
    {"role": "assistant", "content": "Ana."},
    {"role": "user", "content": "And where?"},
]


def plain(prompts, completions, answer, **_):
    return [float(len(text) + len(a)) for text, a in zip(completions, answer, strict=True)]


def rich(completions, truncated, **_):
    return [{"judge": 1.0, "accuracy": float(cut)} for cut in truncated]


def spy(**given):
    SEEN.append(given)
    return [0] * len(given["completions"])


def strict(prompts, completions):
    return [0.0] * len(completions)


async def later(completions, **_):
    return [0.0] * len(completions)


class Later:
    async def __call__(self, completions, **_):
        return [0.0] * len(completions)


later_object, later_part = Later(), functools.partial(later, answer=1)


def as_tensor(completions, **_):
    return torch.tensor([1.5, 2.5])


def too_few(completions, **_):
    return [1.0]


def not_finite(completions, **_):
    return [math.nan] * len(completions)


def words(completions, **_):
    return ["5"] * len(completions)


def nothing(completions, **_):
    return None


def hesitant(completions, **_):
    return [None, 2]


def uneven(completions, **_):
    return [{"judge": 1}, {"judge": 1, "more": 2}]


def broken(completions, **_):
    raise KeyError("answer\nis gone")


def leaving(completions, **_):
    sys.exit(0)


@pytest.fixture
def sampled():
    rows = [
        Prompt("f:1", [{"role": "user", "content": "What is 2 + 3?"}], {"answer": "5", "truncated": "theirs"}),
        Prompt("f:2", TURNS, {"answer": "Rim", "source": "b"}),
    ]
    return Sampled(rows, [[2, 9], [2, 8]], [[30, 31], [32]], ["ab", "c"], [True, False])


def score(name, sampled, **options):
    return function_score(f"{__name__}:{name}", "--judge-fn", "judge", **options)(sampled)


def test_a_function_gets_texts_ids_and_every_column_of_the_rows(sampled):
    score("spy", sampled)
    assert SEEN.pop() == {
        "prompts": [sampled.rows[0].messages, TURNS],
        "completions": ["ab", "c"],
        "prompt_ids": [[2, 9], [2, 8]],
        "completion_ids": [[30, 31], [32]],
        "truncated": [True, False],  # a column of that name does not hide what was drawn
        "answer": ["5", "Rim"],
        "source": [None, "b"],
    }


def test_plain_values_and_mappings_become_columns(sampled):
    assert score("plain", sampled) == {"judge": [3.0, 4.0]}
    assert score("rich", sampled) == {"judge": [1.0, 1.0], "accuracy": [1.0, 0.0]}
    assert score("as_tensor", sampled) == {"judge": [1.5, 2.5]}


def test_none_means_no_opinion_only_if_abstaining_is_allowed(sampled):
    withheld, given = score("hesitant", sampled, abstains=True)["judge"]
    assert math.isnan(withheld)
    assert given == 2
    with pytest.raises(InputError, match=r"not a number for 'judge': None"):
        score("hesitant", sampled)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "1 values for 2 completions"),
        ("not_finite", "NaN or infinity"),
        ("words", "is not a number for 'judge': '5'"),
        ("nothing", "failed with TypeError: 'NoneType' object is not iterable"),
        ("uneven", "different keys"),
        ("leaving", r"failed with a call of sys.exit\(0\); fix the function"),
        ("broken", r"failed with KeyError: .answer\\nis gone"),
        ("strict", r"unexpected keyword argument.*accept \*\*kwargs"),
    ],
)
@pytest.mark.parametrize("abstains", [False, True])
def test_a_function_that_fails_or_returns_nonsense_is_named_in_a_one_line_error(sampled, name, message, abstains):
    with pytest.raises(InputError, match=message) as caught:
        score(name, sampled, abstains=abstains)
    assert f"--judge-fn '{__name__}:{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "no.such.module:f", "math:no_such", "math:pi", ":f", "math:"])
def test_a_missing_function_is_a_usage_error(name):
    with pytest.raises(UsageError, match="--judge-fn"):
        load_function(name, "--judge-fn")


def test_a_module_that_ends_python_is_an_error_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "leaves_at_once.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"a call of sys.exit\(0\) \(.*leaves_at_once.py:2\); fix the module"):
        load_function("leaves_at_once:f", "--reward-fn")


@pytest.mark.parametrize("name", ["later", "later_object", "later_part"])
def test_async_functions_are_refused(name):
    with pytest.raises(UsageError, match="is async"):
        load_function(f"{__name__}:{name}", "--reward-fn")
