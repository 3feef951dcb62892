"""Preference pairs: which samples become chosen and rejected, ties, and what a judge may be."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
from row_reading import read_pairs

from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.checks.plan import plan
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.preferences.pairs import choose, run_pairs
from gemma2.posttrain.runs.inputs import check_inputs
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import PairsConfig
from gemma2.posttrain.tiny.networks import save_random


def length_of(completions, **_):
    return [float(len(text)) for text in completions]


def truncation_of(completions, truncated, **_):
    return [-float(cut) for cut in truncated]


def equal(completions, **_):
    return [1.0] * len(completions)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(10)]
    (folder / "prompts.jsonl").write_bytes(b"".join(map(to_line, rows)))
    save_random(folder / "model")
    save_random(folder / "judge", seed=1, kind="reward")
    return folder


def make(inputs, out, judge=f"{__name__}:length_of", **fields):
    given = {"max_new_tokens": 64, "temperature": 2.0, "n": 4, **fields}
    config = PairsConfig(model=inputs / "model", prompts=inputs / "prompts.jsonl", judge=judge, **given)
    return run_pairs(config, RunOptions(out))


def test_extremes_are_the_best_and_the_worst():
    assert choose([2.0, 5.0, -1.0, 3.0], "extremes", 0.0, Random(0)) == [(1, 2)]


def test_random_pairs_are_any_two_that_differ_the_better_one_first():
    scores = [1.0, 1.0, 2.0, 3.0]
    draw = Random(0)
    seen = Counter(pair for _ in range(500) for pair in choose(scores, "random", 0.0, draw))
    assert seen.keys() == {(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}
    assert min(seen.values()) > 60  # expected 100 each, standard deviation 9


def test_all_are_every_two_that_differ():
    assert choose([1.0, 1.0, 2.0, 3.0], "all", 0.0, Random(0)) == [(2, 0), (3, 0), (2, 1), (3, 1), (3, 2)]


def test_equal_scores_and_small_differences_give_no_pair():
    assert choose([1.0, 1.0, 1.0], "all", 0.0, Random(0)) == []
    assert choose([1.0, 1.4], "extremes", 0.5, Random(0)) == []
    assert choose([1.0, 1.6], "extremes", 0.5, Random(0)) == [(1, 0)]


def test_the_judge_decides_what_is_chosen(inputs, tmp_path):
    result = make(inputs, tmp_path / "out")
    pairs = read_pairs(result.out)
    assert len(pairs) == result.summary["pairs"] == 10 - result.summary["ties"]
    for pair in pairs:
        chosen, rejected = pair.chosen[0]["content"], pair.rejected[0]["content"]
        assert (len(chosen), len(rejected)) == (pair.extra["chosen_score"], pair.extra["rejected_score"])
        assert len(chosen) > len(rejected) and pair.extra["answer"] in pair.prompt[0]["content"]


def test_one_prompt_can_give_several_pairs(inputs, tmp_path):
    extremes, everything = make(inputs, tmp_path / "a"), make(inputs, tmp_path / "b", select="all")
    lines = [set((result.out / "pairs.jsonl").read_text().splitlines()) for result in (extremes, everything)]
    assert lines[0] < lines[1] and everything.summary["ties"] == extremes.summary["ties"]


def test_truncation_is_seen_by_the_judge_and_kept_in_the_pair(inputs, tmp_path):
    result = make(inputs, tmp_path / "out", f"{__name__}:truncation_of")
    assert all(pair.rejected_truncated and not pair.chosen_truncated for pair in read_pairs(result.out))
    assert result.summary["ties"] > 0


def test_a_reward_model_can_be_the_judge(inputs, tmp_path):
    result = make(inputs, tmp_path / "out", str(inputs / "judge"))
    manifest = json.loads((result.out / "gemma2.json").read_text())
    assert [parent["role"] for parent in manifest["parents"]] == ["model", "judge"]
    assert all(pair.extra["chosen_score"] > pair.extra["rejected_score"] for pair in read_pairs(result.out))


def test_samples_with_equal_scores_give_no_data(inputs, tmp_path):
    with pytest.raises(InputError, match="the judge gave no two samples of any of 10 prompts different scores"):
        make(inputs, tmp_path / "out", f"{__name__}:equal")


def test_an_unknown_judge_is_refused_before_anything_is_loaded(inputs, tmp_path):
    config = PairsConfig(model=inputs / "model", prompts=inputs / "prompts.jsonl", judge="nowhere")
    with pytest.raises(UsageError, match="neither a directory nor module:function"):
        plan(config, RunOptions(tmp_path / "out"))
    with pytest.raises(InputError, match=r"--judge .* holds no config\.json"):
        check_inputs(config.model_copy(update={"judge": str(tmp_path)}))
    check_inputs(config.model_copy(update={"judge": str(inputs / "judge")}))


@pytest.mark.parametrize(
    ("judge", "words"),
    [("nowhere", "neither a directory nor module:function"), (f"{__name__}:nothing", "has no 'nothing'")],
)
def test_an_invalid_judge_is_refused(inputs, tmp_path, judge, words):
    with pytest.raises(UsageError, match=words):
        make(inputs, tmp_path / "out", judge)
    assert not list(tmp_path.iterdir())
