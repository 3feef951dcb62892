"""Two models side by side: a planted reward, a judge that goes by position, one that goes by length, resume."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
from chat_server import KEY, Server, serving
from processes import ROOT

from gemma2.core.errors import InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.evaluation.built_in.keeping import NOWHERE
from gemma2.posttrain.evaluation.built_in.side_by_side import SIDE_PROMPT, SideBySide, order_figures
from gemma2.posttrain.evaluation.built_in.win_rate import run_win_rate
from gemma2.posttrain.runs.inputs import check_inputs
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.config import validated
from gemma2.posttrain.schemas.measures import WinRateConfig
from gemma2.posttrain.tiny.networks import save_random

PROMPTS = 6
JUDGE = SideBySide(SIDE_PROMPT, True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("win_rate")
    (folder / "prompts.jsonl").write_bytes(b"".join(to_line({"prompt": f"What is {i}?"}) for i in range(PROMPTS)))
    save_random(folder / "model", 1)
    save_random(folder / "other", 2)
    save_random(folder / "rm", 3, "reward")
    return folder


@pytest.fixture
def planted(tmp_path, monkeypatch):
    (tmp_path / "planted_reward.py").write_text(
        "def score(completions, **rest):\n    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "planted_reward:score"


class JudgingServer(Server):
    """Replies with what `says` makes of the request's text."""

    def __init__(self, says):
        super().__init__()
        self.says = says

    def completion(self, body):
        found = super().completion(body)
        found["choices"][0]["message"]["content"] = self.says(body["messages"][0]["content"])
        return found


def longer_is_better(text):
    a, b = (len(re.search(rf"\[answer {x}\]\n(.*?)\n\[end", text, re.DOTALL)[1]) for x in "AB")
    return f"Verdict: {'about the same' if a == b else 'A is better' if a > b else 'B is better'}"


def compared(inputs, out=NOWHERE, progress=SILENT, resume=False, **fields):
    given = {"model": inputs / "model", "win_rate": inputs / "other", "temperature": 2.0, "max_new_tokens": 12} | fields
    config = WinRateConfig(prompts=inputs / "prompts.jsonl", **given)
    result = run_win_rate(config, RunOptions(out, resume=resume), progress)
    document = result.summary if out == NOWHERE else json.loads((out / "results.json").read_text())
    (task,) = document["tasks"].values()
    return task


@pytest.fixture
def judged(inputs, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(says, **fields):
        with serving(JudgingServer(says)) as url:
            return compared(inputs, judge="openai:a/judge", judge_url=url, **fields)

    return run


def rows_of(out):
    return [json.loads(line) for line in (out / "samples" / "prompts.jsonl.jsonl").read_text().splitlines()]


def test_a_planted_reward_decides_every_prompt(inputs, planted, tmp_path):
    task = compared(inputs, tmp_path / "out", reward_fn=(planted,))
    rows = rows_of(tmp_path / "out")
    sizes = [(len(row["answer"]), len(row["answer_other"])) for row in rows]
    wins, ties = sum(a > b for a, b in sizes), sum(a == b for a, b in sizes)
    assert task["n"] == PROMPTS and 0 < wins < PROMPTS
    assert task["metrics"]["win_rate"] == pytest.approx((wins + ties / 2) / PROMPTS)
    assert task["metrics"]["win"] == pytest.approx(wins / PROMPTS)
    assert task["metrics"]["tie"] == pytest.approx(ties / PROMPTS)
    assert task["metrics"]["reward_difference"] == pytest.approx(sum(a - b for a, b in sizes) / PROMPTS)
    apart = compared(inputs, reward_fn=(planted,), margin=1000.0)
    assert apart["metrics"]["tie"] == 1
    assert apart["metrics"]["reward_difference"] == task["metrics"]["reward_difference"]


def test_a_model_ties_with_itself_exactly(inputs):
    task = compared(inputs, win_rate=inputs / "model", judge=str(inputs / "rm"), batch_size=1)
    assert (task["metrics"]["win_rate"], task["metrics"]["tie"]) == (0.5, 1)
    assert task["metrics"]["reward_difference"] == task["metrics"]["side_by_side"] == 0


def test_equal_answers_tie_though_their_sums_are_rounded_otherwise(inputs, monkeypatch):
    def rounded(config, chat, batch_size, made=[]):  # noqa: B006 - counts the calls
        return lambda sampled: made.append(1) or {"reward": [1.0 + 1e-6 * len(made)] * len(sampled.texts)}

    monkeypatch.setattr("gemma2.posttrain.evaluation.built_in.win_rate.reward_score", rounded)
    task = compared(inputs, win_rate=inputs / "model", reward_fn=("a:b",))
    assert task["metrics"]["tie"] == 1
    assert task["metrics"]["reward_difference"] == 0 != task["metrics"]["reward"] - task["metrics"]["reward_other"]


def test_a_reward_model_reads_each_model_in_its_own_chat_format(inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs / "other", tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("loop.index0 % 2 == 0", "loop.index0 % 2 != 1"))
    chats = []

    def watched(config, chat, batch_size):
        chats.append(chat.tokenizer.chat_template)
        return lambda sampled: {"reward": [0.0] * len(sampled.texts)}

    monkeypatch.setattr("gemma2.posttrain.evaluation.built_in.win_rate.reward_score", watched)
    compared(inputs, reward_fn=("a:b",))
    assert len(chats) == 1  # one is loaded for both
    compared(inputs, win_rate=tmp_path / "other", reward_fn=("a:b",))
    assert chats[1] != chats[2] == template.read_text()


def test_a_reward_model_as_judge_gives_the_expected_verdict_of_bradley_and_terry(inputs, tmp_path):
    task = compared(inputs, tmp_path / "out", judge=str(inputs / "rm"))
    expected = [1.5 * (2 / (1 + math.exp(-row["reward_difference"])) - 1) for row in rows_of(tmp_path / "out")]
    assert task["metrics"]["side_by_side"] == pytest.approx(sum(expected) / PROMPTS)
    swapped = compared(inputs, model=inputs / "other", win_rate=inputs / "model", judge=str(inputs / "rm"))
    assert swapped["metrics"]["side_by_side"] == pytest.approx(-task["metrics"]["side_by_side"], abs=1e-6)


def test_a_judge_that_always_prefers_the_first_gives_no_winner_and_its_bias_is_reported(judged, interrupting):
    heard = interrupting()
    task = judged(lambda text: "Well.\nVerdict: A is much better", progress=heard)
    assert (task["metrics"]["side_by_side"], task["metrics"]["win_rate"], task["metrics"]["tie"]) == (0, 0.5, 1)
    assert task["order_bias"] == 1.5
    assert (task["preferred_the_first_shown"], task["preferred_the_second_shown"]) == (2 * PROMPTS, 0)
    assert task["orders_contradict"] == task["compared"] == PROMPTS
    assert any("by position" in line for line in heard.warnings)


def test_a_judge_by_length_has_no_order_bias_and_turns_with_the_models(judged, inputs, tmp_path):
    task = judged(longer_is_better, out=tmp_path / "out")
    other = judged(longer_is_better, model=inputs / "other", win_rate=inputs / "model")
    sizes = [(len(row["answer"]), len(row["answer_other"])) for row in rows_of(tmp_path / "out")]
    assert task["metrics"]["side_by_side"] == pytest.approx(sum((a > b) - (a < b) for a, b in sizes) / PROMPTS)
    assert other["metrics"]["side_by_side"] == pytest.approx(-task["metrics"]["side_by_side"])
    assert task["order_bias"] == task["orders_contradict"] == 0


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A is much better", 1.5),
        ("**Verdict:** B is slightly better.", -0.5),
        ("verdict: Answer A is better", 1.0),
        ("Verdict: about the same", 0.0),
        ("Verdict: tie", 0.0),
        ("Verdict: A is better\nNo.\nVerdict: B is much better", -1.5),
        ("Better: B", -1.0),
        ("Better: tie", 0.0),
        ("I like both.", None),
    ],
)
def test_a_verdict_is_read_from_the_last_line_that_has_one(reply, verdict):
    assert JUDGE.read(reply) == verdict


def test_prompts_without_a_verdict_are_left_out_and_counted(judged):
    task = judged(lambda text: "Verdict: A is better" if "What is 1?" in text else "Hm.")
    assert task["judge_unreadable"] == 2 * (PROMPTS - 1)
    assert task["compared"] == 1
    assert task["rows_of_metric"]["win_rate"] == 1
    with pytest.raises(InputError, match="has the requested line"):
        judged(lambda text: "Hm.")


def test_order_figures_of_verdicts_by_hand():
    found = order_figures([(1.5, -1.5), (1.0, 0.5), (None, 1.0), (0.0, -0.5)])
    assert found["order_bias"] == pytest.approx((0 + 0.75 - 0.25) / 3)
    assert (found["orders_contradict"], found["compared"]) == (1, 3)
    assert (found["preferred_the_first_shown"], found["preferred_the_second_shown"]) == (3, 2)
    assert order_figures([(None, 1.0)]) == {}


def test_an_interrupted_comparison_goes_on_to_the_same_bytes(inputs, tmp_path, interrupting, planted):
    fields = {"reward_fn": (planted,), "batch_size": 1}
    compared(inputs, tmp_path / "whole", **fields)
    with pytest.raises(KeyboardInterrupt):
        compared(inputs, tmp_path / "cut", interrupting(PROMPTS * 3 + 2), **fields)
    compared(inputs, tmp_path / "cut", resume=True, **fields)
    for name in ("results.json", "results.csv", "samples/prompts.jsonl.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give a reward model with --reward, or a judge with --judge"),
        ({"reward_fn": ("a:b",), "judge": "openai:x"}, "and not both"),
        ({"judge": "my.module:function"}, "a function is given with --reward-fn"),
        ({"reward_fn": ("a:b",), "judge_tokens": 7}, "judge_tokens is for a judge on a server"),
    ],
)
def test_a_comparison_without_one_referee_is_refused(inputs, fields, said):
    given = {"model": inputs / "model", "win_rate": inputs / "other", "prompts": inputs / "prompts.jsonl", **fields}
    with pytest.raises(UsageError) as caught:
        check_inputs(validated(WinRateConfig, given))
    assert said in str(caught.value)


def test_the_page_of_the_measures_has_the_prompt_of_the_judge():
    assert SIDE_PROMPT in (ROOT / "docs" / "measures.md").read_text(encoding="utf-8")
