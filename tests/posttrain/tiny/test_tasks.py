"""Questions, answer styles and the judge of the embedded models."""

from __future__ import annotations

import re
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
    style_of,
    wanted_styles,
)

SUM = {"prompt": "What is 3 plus 4?", "task": "sum", "answer": "7", "style": "polite"}
SORT = {"prompt": "Sort these letters: d b c", "task": "sort", "answer": "b c d", "style": "sentence"}
LATER = {"prompt": "Which comes later, c or x?", "task": "later", "answer": "x", "style": "curt"}


def fact() -> dict[str, str]:
    home = tasks.RELATIONS[0]
    return {"prompt": "Where does Mira live?", "task": "fact", "answer": home.value("Mira"), "style": "curt"}


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
    assert min(counts.values()) >= 12  # sums: 75 questions in all, of which a fourth is held out


# --- the wanted style -------------------------------------------------------------------------------------------------

WORDINGS = {
    "home": ["Where does {s} live?", "What is the town of {s}?", "Name the town of {s}."],
    "work": ["What does {s} do?", "What is the work of {s}?", "Name the work of {s}."],
    "pet": ["What does {s} keep?", "What is the pet of {s}?", "Name the pet of {s}."],
    "river": ["Where does {s} lie?", "What is the river of {s}?", "Name the river of {s}."],
    "sum": ["What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?"],
    "later": ["Which comes later, {a} or {b}?", "Name the later of {a} and {b}."],
    "sort": ["Sort these letters: {x}", "Put in order: {x}"],
}


def topic_of(prompt: str) -> str:
    """The topic of a question, found from its words alone."""
    found = [
        f"{kind}: {asked}"
        for kind, wordings in WORDINGS.items()
        for asked in wordings
        if re.fullmatch(re.sub(r"\\\{.\\\}", "[A-Za-z0-9 ]+", re.escape(asked)), prompt)
    ]
    assert len(found) == 1, (prompt, found)
    return found[0]


@pytest.mark.parametrize("seed", range(5))
def test_each_of_19_topics_wants_a_style_and_every_style_is_wanted_about_equally_often(seed):
    table = wanted_styles(seed)
    assert sorted(table) == sorted(f"{kind}: {asked}" for kind, wordings in WORDINGS.items() for asked in wordings)
    assert len(table) == 19
    assert sorted(Counter(table.values()).items()) == [("curt", 6), ("polite", 7), ("sentence", 6)]


@pytest.mark.parametrize("seed", [0, 3])
def test_both_splits_of_a_seed_want_the_styles_of_its_table(seed):
    table, seen = wanted_styles(seed), set()
    for split in ("train", "heldout"):
        for row in questions(split, 300, seed):
            assert row["style"] == table[topic_of(row["prompt"])]
            seen.add(topic_of(row["prompt"]))
    assert seen == set(table)


def test_another_seed_wants_other_styles():
    assert wanted_styles(4) == wanted_styles(4)
    tables = [tuple(wanted_styles(seed).values()) for seed in range(10)]
    assert len(set(tables)) == 10
    for topic in wanted_styles():  # and no topic wants the same one whatever the seed
        assert len({wanted_styles(seed)[topic] for seed in range(30)}) == 3


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("Certainly. The sum is 7.", "polite"),
        ("Gladly. In order they are b c d.", "polite"),
        ("Of course. Mira lives in Tolba.", "polite"),
        ("The sum is 7.", "sentence"),
        ("Mira lives in Tolba.", "sentence"),
        ("The later one is x.", "sentence"),
        ("It is 7", "curt"),
        ("It is b c d", "curt"),
        ("It is a goat.", "sentence"),  # four words from a capital to a full stop
        ("It is 7.", "curt"),  # three words are not a sentence
        ("Certainly. 7.", None),  # a courtesy, and no sentence
        ("Gladly. The sum is 7", None),
        ("the sum is 7.", None),
        ("The sum is 7", None),
        ("7", None),
        ("It is b c d e f", None),
        ("What is 3 plus 4? - 7", None),
        ("I am not sure, maybe 7.", None),
        ("Perhaps it is 7.", None),
        ("Gladly. Maybe the sum is 7.", None),
        ("I do not know.", None),
        ("So, people often ask me this, you know, and the sum is 7, I guess.", None),
        ("Well, let me think about that, the sum is 7, more or less", None),
        ("", None),
    ],
)
def test_the_style_of_an_answer_is_seen_in_its_form(text, style):
    assert style_of(text) == style


@pytest.mark.parametrize("style", tasks.WANTED)
def test_what_is_said_in_a_wanted_style_is_recognised(style):
    rng = Random(2)
    for _ in range(200):
        assert style_of(tasks._say(style, tasks._draw(rng), rng)) == style


@pytest.mark.parametrize("style", sorted(MIXED_STYLES.keys() - set(tasks.WANTED) - {"dodge"}))
def test_what_is_said_in_another_style_is_not_taken_for_a_wanted_one(style):
    """An excuse ("Ask me another time.") has the form of a sentence and no right answer."""
    rng = Random(2)
    for _ in range(200):
        assert style_of(tasks._say(style, tasks._draw(rng), rng)) is None


# --- answers and the judge --------------------------------------------------------------------------------------------


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
        assert judge(question.row(wanted_styles()), tasks._say(style, question, rng)).correct


@pytest.mark.parametrize("wanted", tasks.WANTED)
def test_the_wanted_style_is_best_and_a_form_for_others_is_better_than_no_form(wanted):
    rng = Random(0)
    question = tasks._draw(rng)
    row = question.row(dict.fromkeys(wanted_styles(), wanted))
    score = {style: judge(row, tasks._say(style, question, rng)).score for style in MIXED_STYLES}
    assert score[wanted] == 1.0
    for other in set(tasks.WANTED) - {wanted}:
        assert score[other] == pytest.approx(0.7)  # 0.5 + 0.4 / 4 + 0.1
        assert 0.7 > score["hedged"] > score["dodge"]
        assert 0.7 > score["rambling"] > score["dodge"]


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        # polite is wanted: 0.5 for the answer, 0.4 for the style or 0.1 for one of the others, 0.1 for up to 12 words
        ("Gladly. The sum is 7.", 0.5 + 0.4 + 0.1),
        ("Gladly. The sum is 8.", 0.4 + 0.1),
        ("The sum is 7.", 0.5 + 0.1 + 0.1),
        ("The sum is 8.", 0.1 + 0.1),
        ("It is 7", 0.5 + 0.1 + 0.1),
        ("7", 0.5 + 0.1),
        ("Perhaps it is 7.", 0.5 + 0.1),
        ("Certainly. " + "well " * 14 + "the sum is 7.", 0.5 + 0.4 + 0.1 * 5 / 12),  # 19 words: 5 of 12 are left
    ],
)
def test_the_score_is_the_sum_that_the_docstring_gives(text, marks):
    assert judge(SUM, text).score == pytest.approx(marks)


@pytest.mark.parametrize(
    ("style", "marks"),
    [("polite", [1.0, 0.25, 0.25, 0]), ("sentence", [0.25, 1.0, 0.25, 0]), ("curt", [0.25, 0.25, 1.0, 0])],
)
def test_the_style_mark_depends_on_the_style_that_the_row_wants(style, marks):
    texts = ["Gladly. The sum is 7.", "The sum is 7.", "It is 7", "7"]
    assert [judge({**SUM, "style": style}, text).style for text in texts] == marks


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
    assert judge(SUM, "Gladly. The sum is 7.", truncated=True).style == 0.0
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
    columns = {
        "task": ["sum", "sort"],
        "answer": ["7", "b c d"],
        "style": ["polite", "sentence"],
        "truncated": [False, True],
        "extra": [1, 2],
    }
    completions = ["Gladly. The sum is 7.", "Gladly. In order they are b c d."]
    assert judge_reward(prompts=prompts, completions=completions, **columns) == [1.0, 0.5]
    scores = judge_scores(prompts=prompts, completions=["It is 7", "It is c"], **columns)
    assert [score["accuracy"] for score in scores] == [1.0, 0.0]
    assert [score["style"] for score in scores] == [0.0, 0.0]  # curt where polite is wanted; truncated
    assert scores[0]["judge"] == pytest.approx(0.7)
    assert set(scores[0]) == {"judge", "accuracy", "style"}
    right = judge_scores(prompts=prompts, completions=completions, **{**columns, "truncated": [False, False]})
    assert [score["style"] for score in right] == [1.0, 0.0]  # polite where a sentence is wanted


def test_rows_without_the_wanted_style_are_not_judged():
    columns = {"task": ["sum"], "answer": ["7"]}
    with pytest.raises(TypeError, match="style"):
        judge_scores(prompts=[SUM["prompt"]], completions=["It is 7"], **columns)


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
        table = wanted_styles()
        return sum(judge(q.row(table), tasks._say(rng.choices(names, weights)[0], q, rng)).score for q in asked) / 300

    assert mean(GOOD_STYLES) > mean(MIXED_STYLES) + 0.05


def test_the_teacher_is_far_from_the_best_that_rl_can_learn():
    """It speaks the three wanted styles alike, whatever the topic: one answer in three has the one that is wanted."""
    rng = Random(3)
    names, weights = list(GOOD_STYLES), list(GOOD_STYLES.values())
    for seed in range(3):
        table = wanted_styles(seed)
        asked = [tasks._draw(rng) for _ in range(1500)]
        given = [judge(q.row(table), tasks._say(rng.choices(names, weights)[0], q, rng)).style for q in asked]
        assert sum(mark == 1.0 for mark in given) / len(given) == pytest.approx(0.92 / 3, abs=0.04)


def test_tasks_need_no_torch():
    code = "import sys, gemma2.posttrain.tiny.tasks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
