"""Questions, answer styles and the judge of the embedded models."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import islice
from random import Random

import pytest

from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.tiny import tasks
from gemma2.posttrain.tiny.tasks import (
    GOOD_STYLES,
    MIXED_STYLES,
    dialogues,
    judge,
    judge_reward,
    judge_scores,
    prose,
    questions,
)

SUM = {"prompt": "What is 3 plus 4?", "task": "sum", "answer": "7"}
SORT = {"prompt": "Sort these letters: d b c", "task": "sort", "answer": "b c d"}
LATER = {"prompt": "Which comes later, c or x?", "task": "later", "answer": "x"}


def fact() -> dict[str, str]:
    home = tasks.RELATIONS[0]
    return {"prompt": "Where does Mira live?", "task": "fact", "answer": home.value("Mira")}


def test_no_prompt_is_in_both_splits():
    train = {row["prompt"] for row in questions("train", 900)}
    heldout = {row["prompt"] for row in questions("heldout", 300)}
    assert len(train) == 900 and len(heldout) == 300
    assert not train & heldout


def test_dialogues_never_ask_a_heldout_question():
    heldout = {row["prompt"] for row in questions("heldout", 300, seed=7)}
    asked = {prompt for prompt, _ in islice(dialogues(MIXED_STYLES), 5000)}
    assert not asked & heldout


def test_questions_depend_on_the_seed_alone():
    assert questions("train", 50, seed=1) == questions("train", 50, seed=1)
    assert questions("train", 50, seed=1) != questions("train", 50, seed=2)


def test_every_task_is_in_a_heldout_file_of_the_quickstart():
    counts = Counter(row["task"] for row in questions("heldout", 256))
    assert set(counts) == set(tasks.SKILLS)
    assert min(counts.values()) >= 25


def test_more_questions_than_there_are_is_an_error_that_says_so():
    with pytest.raises(InputError, match="does not hold 99999 different questions"):
        questions("heldout", 99999)


def test_answers_are_right():
    """Sums, orders and facts recomputed from the text of the question."""
    for row in questions("train", 600):
        words = row["prompt"].replace("?", "").replace(".", "").replace(",", "").split()
        if row["task"] == "sum":
            assert int(row["answer"]) == sum(int(word) for word in words if word.isdigit())
        elif row["task"] == "sort":
            assert row["answer"] == " ".join(sorted(word for word in words if len(word) == 1))
        elif row["task"] == "later":
            assert row["answer"] == max(word for word in words if len(word) == 1)
        else:
            subject = next(word for word in words if word in tasks.SUBJECTS)
            told = {relation.value(subject) for relation in tasks.RELATIONS if subject in relation.subjects}
            assert row["answer"] in told


def test_prose_states_the_same_world_as_the_answers():
    home = tasks.RELATIONS[0]
    texts = " ".join(islice(prose(), 2000))
    for person in tasks.PEOPLE:
        assert f"{person} lives in {home.value(person)}." in texts
        assert texts.count(f"{person} lives in ") == texts.count(f"{person} lives in {home.value(person)}.")


@pytest.mark.parametrize("style", [style for style in MIXED_STYLES if style != "dodge"])
def test_every_style_that_answers_is_judged_correct(style):
    rng = Random(0)
    for _ in range(200):
        question = tasks._draw(rng)
        assert judge(question.row(), tasks._say(style, question, rng)).correct


def test_the_styles_are_ranked_as_a_reader_would():
    rng = Random(0)
    question = tasks._draw(rng)
    score = {style: judge(question.row(), tasks._say(style, question, rng)).score for style in MIXED_STYLES}
    assert score["polite"] == 1.0
    assert score["polite"] > score["sentence"] > score["curt"] > score["rambling"] > score["dodge"]


def test_the_score_is_the_sum_that_the_docstring_gives():
    """A right, plain sentence without a courtesy: 0.5 + 0.3 * 2/3 + 0.2 = 0.9."""
    assert judge(SUM, "The sum is 7.").score == pytest.approx(0.9)
    assert judge(SUM, "The sum is 8.").score == pytest.approx(0.4)
    assert judge(SUM, "Gladly. The sum is 7.").score == pytest.approx(1.0)
    assert judge(SUM, "It is 7").score == pytest.approx(0.5 + 0.1 + 0.2)


def test_brevity_falls_from_twelve_words_to_twenty_four():
    assert judge(SUM, "word " * 12).brevity == 1.0
    assert judge(SUM, "word " * 18).brevity == pytest.approx(0.5)
    assert judge(SUM, "word " * 24).brevity == 0.0


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (SUM, "The sum is 7, or 8."),
        (SUM, "The sum is 17."),
        (SUM, "The sum is seven."),
        (SORT, "In order they are b d c."),
        (SORT, "In order they are b c d e."),
        (LATER, "The later one is c."),
        (LATER, ""),
        (fact(), "Mira lives in town."),
    ],
)
def test_a_wrong_answer_is_wrong(row, text):
    assert not judge(row, text).correct


def test_the_right_value_said_of_somebody_else_is_wrong():
    row = fact()
    assert judge(row, f"Mira lives in {row['answer']}.").correct
    assert not judge(row, f"Tobin lives in {row['answer']}.").correct


def test_a_truncated_or_empty_completion_earns_for_correctness_only():
    assert judge(SUM, "Gladly. The sum is 7.", truncated=True).score == 0.5
    assert judge(SUM, "  ").score == 0.0


def test_every_score_lies_between_zero_and_one():
    rng = Random(1)
    alphabet = "abc 0123. ,Certainly Mira goat"
    for row in (SUM, SORT, LATER, fact()):
        for _ in range(300):
            text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(80)))
            assert 0.0 <= judge(row, text).score <= 1.0


def test_reward_function_reads_columns_and_messages():
    prompts = [SUM["prompt"], [{"role": "user", "content": SORT["prompt"]}]]
    columns = {"task": ["sum", "sort"], "answer": ["7", "b c d"], "truncated": [False, True], "extra": [1, 2]}
    completions = ["Gladly. The sum is 7.", "Gladly. In order they are b c d."]
    assert judge_reward(prompts=prompts, completions=completions, **columns) == [1.0, 0.5]
    scores = judge_scores(prompts=prompts, completions=["It is 7", "It is c"], **columns)
    assert [score["accuracy"] for score in scores] == [1.0, 0.0]


def test_an_unknown_task_or_style_is_named():
    with pytest.raises(InputError, match="'sums'"):
        judge({**SUM, "task": "sums"}, "7")
    with pytest.raises(UsageError, match="'loud'"):
        next(iter(dialogues({"loud": 1.0})))


def test_the_teacher_speaks_better_than_the_student():
    def mean(styles):
        rng = Random(3)
        asked = [tasks._draw(rng) for _ in range(300)]
        names, weights = list(styles), list(styles.values())
        return sum(judge(q.row(), tasks._say(rng.choices(names, weights)[0], q, rng)).score for q in asked) / 300

    assert mean(GOOD_STYLES) > mean(MIXED_STYLES) + 0.1


def test_tasks_need_no_torch():
    code = "import sys, gemma2.posttrain.tiny.tasks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
