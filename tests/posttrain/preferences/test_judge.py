"""A language model as the judge: what it is asked, how replies are read, position bias, failures, resume, the key."""

from __future__ import annotations

import json
import re

import pytest
from chat_server import KEY, Server, refuse, serving
from row_reading import read_pairs

from gemma2.core.errors import InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.preferences.judge import COMPARE_PROMPT, SCORE_PROMPT, Judge
from gemma2.posttrain.preferences.pairs import run_pairs
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import GenerateConfig, PairsConfig
from gemma2.posttrain.schemas.config import validated
from gemma2.posttrain.schemas.messages import ValueSource
from gemma2.posttrain.tiny.networks import save_random

PROMPTS = 6
RATER, COMPARER = Judge(SCORE_PROMPT, False), Judge(COMPARE_PROMPT, True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    (folder / "prompts.jsonl").write_bytes(b"".join(to_line({"prompt": f"What is {i}?"}) for i in range(PROMPTS)))
    save_random(folder / "model")
    return folder


class JudgingServer(Server):
    """Replies with what `says` makes of the request's text."""

    def __init__(self, says, **options):
        super().__init__(**options)
        self.says = says

    def completion(self, body):
        found = super().completion(body)
        found["choices"][0]["message"]["content"] = self.says(body["messages"][0]["content"])
        return found


def by_length(text):
    return f"It is so long.\nScore: {1 + min(len(text[text.index('[answer]') : text.index('[end')]), 90) / 10:.1f}"


def longer_is_better(text):
    a, b = (len(re.search(rf"\[answer {x}\]\n(.*?)\n\[end", text, re.DOTALL)[1]) for x in "AB")
    return f"Better: {'tie' if a == b else 'A' if a > b else 'B'}"


def configure(inputs, url, **fields):
    given = {"max_new_tokens": 24, "temperature": 2.0, "n": 3, "judge": "openai:a/judge", "judge_url": url, **fields}
    return PairsConfig(model=inputs / "model", prompts=inputs / "prompts.jsonl", **given)


@pytest.fixture
def make(inputs, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(server, out, progress=SILENT, **fields):
        with serving(server) as url:
            return run_pairs(configure(inputs, url, **fields), RunOptions(out), progress)

    return run


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Fine.\nScore: 7", 7.0),
        ("Score: 3 at first sight, but\nscore: 8.5", 8.5),
        ("**Score:** 9/10", 9.0),
        ("Score (1-10): 6", 6.0),
        ("7", 7.0),
        ("7/10", 7.0),
        ("Score: 11", None),
        ("Score: 0", None),
        ("Score: -3", None),
        ("Score: N", None),
        ("I scored 10 points in this game.", None),
        ("I cannot judge that.", None),
        ("", None),
    ],
)
def test_a_rating_is_the_last_number_after_score_within_its_bounds(reply, score):
    assert RATER.read(reply) == score


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Better: A", 1.0),
        ("Better: A? No.\nBetter: B", 0.0),
        ("**Better:** Answer A", 1.0),
        ("better: TIE", 0.5),
        ("Better: a tie", 0.5),
        ("Better: A tie.", 0.5),
        ("**Better:** A **tie**", 0.5),
        ("Better: a", 1.0),
        ("Better: A, B is wrong", 1.0),
        ("Better: B because it is shorter", 0.0),
        ("Better: A or B", None),
        ("Better: A and B", None),
        ("Better: A/B", None),
        ("Better: A, B or tie", None),
        ("Better: A or B?\nBetter: B", 0.0),
        ("Better: A\n\nBetter: A or B", None),
        ("Better: a bit of both", None),
        ("A is better than B", None),
        ("Better: Both", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_one_after_better(reply, verdict):
    assert COMPARER.read(reply) == verdict


def test_both_orders_of_a_comparison_are_averaged():
    # Three answers; replies by number i * 3 + j, 1 where the one shown first is better.
    # 0 beats 1 in both orders; 0 against 2 goes to the one shown first; 1 and 2 tie once, 2 wins once.
    values = {1: 1.0, 3: 0.0, 2: 1.0, 6: 1.0, 5: 0.5, 7: 1.0}
    judge = Judge(COMPARE_PROMPT, True)
    assert judge.scores(3, values) == [(1 + 0.5) / 2, (0 + 0.25) / 2, (0.5 + 0.75) / 2]
    assert judge.facts() == {"judge_replies": 0, "judge_unreadable": 0, "judge_compared": 3, "judge_orders_disagree": 1}


def test_a_comparison_with_one_failed_order_is_ignored():
    assert Judge(COMPARE_PROMPT, True).scores(2, {1: 1.0, 2: None}) == [None, None]


def test_the_judge_s_ratings_decide_what_is_chosen(make, tmp_path):
    server = JudgingServer(by_length)
    result = make(server, tmp_path / "out")
    assert len(server.requests) == 3 * PROMPTS == result.summary["judge_replies"]
    assert result.summary["unjudged"] == result.summary["judge_unreadable"] == 0
    for pair in read_pairs(result.out):
        assert len(pair.chosen[0]["content"]) > len(pair.rejected[0]["content"])
        assert 1 <= pair.extra["rejected_score"] < pair.extra["chosen_score"] <= 10
    bodies = [body for _, _, body in server.requests]  # in any order
    assert all(body["model"] == "a/judge" and body["temperature"] == 0 for body in bodies)
    for i in range(PROMPTS):
        assert sum(f"What is {i}?" in body["messages"][0]["content"] for body in bodies) == 3


def test_every_two_answers_are_compared_in_both_orders(make, tmp_path):
    server = JudgingServer(longer_is_better)
    result = make(server, tmp_path / "out", judge_style="compare")
    assert len(server.requests) == 6 * PROMPTS and result.summary["judge_orders_disagree"] == 0
    assert all(len(p.chosen[0]["content"]) > len(p.rejected[0]["content"]) for p in read_pairs(result.out))


def test_a_judge_that_prefers_a_position_gives_equal_scores(make, tmp_path, interrupting):
    progress = interrupting()
    with pytest.raises(InputError, match="gave no two samples"):
        make(JudgingServer(lambda text: "Better: A"), tmp_path / "out", progress, judge_style="compare")
    assert "chose by position in 18 of 18 comparisons" in progress.warnings[0]


def test_a_reply_without_a_verdict_is_counted_and_shown_but_not_scored(make, tmp_path, interrupting):
    progress = interrupting()

    def says(text):
        return "I would rather not say." if "What is 2?" in text else by_length(text)

    result = make(JudgingServer(says), tmp_path / "out", progress)
    assert result.summary["judge_unreadable"] == result.summary["unjudged"] == 3
    # The prompt without scores is not a tie.
    assert result.summary["unjudged_prompts"] == 1
    assert result.summary["pairs"] + result.summary["ties"] == PROMPTS - 1
    assert not any("What is 2?" in pair.prompt[0]["content"] for pair in read_pairs(result.out))
    assert "3 of the judge's 18 replies have no verdict" in progress.warnings[0]
    assert "I would rather not say." in progress.warnings[0]


def test_a_judge_without_any_readable_reply_ends_the_run(make, tmp_path):
    with pytest.raises(InputError, match=r"none of the judge's 18 replies .* one is 'It is nice\.'"):
        make(JudgingServer(lambda text: "It is nice."), tmp_path / "out")


def test_paid_replies_are_not_requested_again(inputs, make, tmp_path, monkeypatch):
    whole = make(JudgingServer(by_length), tmp_path / "whole")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = JudgingServer(by_length, faults=lambda number, body: refuse(401, "wrong key") if number >= 7 else None)
    with serving(server) as url:
        with pytest.raises(InputError, match="401"):
            run_pairs(configure(inputs, url, judge_concurrency=2), RunOptions(tmp_path / "out"))
        assert 0 < len(server.answered) <= 7
        server.faults = lambda number, body: None
        resumed = run_pairs(configure(inputs, url), RunOptions(tmp_path / "out", resume=True))
    assert len(server.answered) == len(set(server.answered)) == 3 * PROMPTS
    assert (resumed.out / "pairs.jsonl").read_bytes() == (whole.out / "pairs.jsonl").read_bytes()
    assert resumed.summary == whole.summary


def test_the_key_is_sent_and_written_nowhere(make, tmp_path):
    server = JudgingServer(by_length)
    result = make(server, tmp_path / "out")
    assert server.requests[0][1]["authorization"] == f"Bearer {KEY}"
    assert all(KEY.encode() not in path.read_bytes() for path in result.out.iterdir())
    with pytest.raises(InputError) as caught:
        make(JudgingServer(by_length, faults=lambda *_: refuse(401, f"no {KEY}")), tmp_path / "refused")
    assert KEY not in str(caught.value)


def test_errors_name_the_flags_of_this_command(make, tmp_path):
    with pytest.raises(InputError, match="check --judge and --judge-url"):
        make(JudgingServer(by_length, faults=lambda *_: refuse(404, "no such model")), tmp_path / "out")


def test_a_custom_judge_prompt_is_used(make, tmp_path):
    (tmp_path / "judge.txt").write_text('Rate {answer} to {prompt} as {{"score"}}. Score: N')
    server = JudgingServer(lambda text: f"Score: {1 + len(text) % 10}")
    result = make(server, tmp_path / "out", judge_prompt=tmp_path / "judge.txt")
    assert server.requests[0][2]["messages"][0]["content"].endswith('as {"score"}. Score: N')
    data = json.loads((result.out / "gemma2.json").read_text())["data"]
    assert [entry["path"].rpartition("/")[2] for entry in data] == ["prompts.jsonl", "judge.txt"]


@pytest.mark.parametrize(
    ("template", "words"),
    [("Rate {answer}", "has the places {answer}"), ("{prompt} {answer} {x}", "{x}"), ("{prompt} {answer} {", "braces")],
)
def test_a_prompt_without_its_places_is_refused(make, tmp_path, template, words):
    (tmp_path / "judge.txt").write_text(template)
    with pytest.raises(UsageError) as caught:
        make(JudgingServer(by_length), tmp_path / "out", judge_prompt=tmp_path / "judge.txt")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_as_the_prompt_is_refused(make, tmp_path):
    with pytest.raises(UsageError, match=r"--judge-prompt .* cannot be read: Is a directory; give a text file"):
        make(JudgingServer(by_length), tmp_path / "out", judge_prompt=tmp_path)


@pytest.mark.parametrize("above", [(), ("stages", "pairs", "options")])
@pytest.mark.parametrize(
    ("schema", "given", "option"),
    [
        (PairsConfig, {"judge": "openai:x", "judge_key_env": "sk-my-secret"}, "--judge-key-env"),
        (GenerateConfig, {"teacher": "x", "engine": "openai", "api_key_env": "sk-my-secret"}, "--api-key-env"),
    ],
)
def test_a_key_in_place_of_its_variable_is_not_shown(schema, given, option, above):
    values = {"prompts": "p", **given} | ({"model": "m"} if "judge" in given else {})
    with pytest.raises(UsageError, match=f"{option} is not a variable's name") as caught:
        validated(schema, values, ValueSource(above=above))
    assert "secret" not in str(caught.value)


def test_a_key_that_could_be_a_name_is_not_shown_either(make, tmp_path):
    with pytest.raises(UsageError, match="holds none; give its name with --judge-key-env, not the key") as caught:
        make(JudgingServer(by_length), tmp_path / "out", judge_key_env="gsk_MySecret")
    assert "Secret" not in str(caught.value)


def test_server_options_need_a_judge_at_a_server():
    with pytest.raises(ValueError, match="judge_style is for a judge on a server"):
        PairsConfig(model="m", prompts="p", judge="module:f", judge_style="compare")
    with pytest.raises(ValueError, match="credentials"):
        PairsConfig(model="m", prompts="p", judge="openai:x", judge_url="https://me:secret@host/v1")
