"""Questions with answers and with choices: how replies are compared, what a model reads, log-probs by hand, formats."""

from __future__ import annotations

import csv
import json
import shutil
from decimal import Decimal

import pytest
import torch

from gemma2.core.errors import InputError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.evaluation.built_in.keeping import NOWHERE
from gemma2.posttrain.evaluation.built_in.matching import contains, exact, extracted, normalised, number_in, numeric
from gemma2.posttrain.evaluation.built_in.multiple_choice import run_choices
from gemma2.posttrain.evaluation.built_in.prompting import asking_of, cut_left, drawn_shots
from gemma2.posttrain.evaluation.built_in.question_rows import (
    choices_of,
    each_choice_row,
    each_question,
    right_choice,
    the_answers,
)
from gemma2.posttrain.evaluation.built_in.questions import run_qa
from gemma2.posttrain.evaluation.built_in.row_means import row_figures, wilson
from gemma2.posttrain.evaluation.suite.shared_scoring import SharedScorer
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.measures import ChoicesConfig, QaConfig
from gemma2.posttrain.tiny.networks import save_random, tiny_tokenizer

CHOICES = [
    {"question": "What is ice?", "choices": ["frozen water", "a", "stone and more stone"], "answer": 0},
    {"question": "Who reads?", "choices": ["a reader", "ñ"], "answer": "B"},
    {"question": "Where is the sun?", "choices": {"text": ["down", "up there"], "label": ["1", "2"]}, "answerKey": "2"},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    save_random(folder / "model", 1)
    save_random(folder / "other", 2)
    rows = [{"question": f"What is {i} plus 1?", "answer": f"It follows.\n#### {i + 1}"} for i in range(6)]
    (folder / "qa.jsonl").write_bytes(b"".join(map(to_line, rows)))
    (folder / "choices.jsonl").write_bytes(b"".join(map(to_line, CHOICES)))
    return folder


def read(tmp_path, rows, each=each_question, **options):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(map(to_line, rows)))
    given = {"model": tmp_path, "qa": file} | options
    return list(each(file, Reading(QaConfig(**given))))


# --- comparing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "answers", "same"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], True),
        ("  an  apple, a day ", ["Apple day"], True),
        ("９", ["9"], True),  # a full-width digit
        ("It is Paris", ["Paris"], False),
        ("Lyon", ["Paris", "lyon"], True),
        ("theatre", ["atre"], False),
        (None, ["x"], False),
        ("18", ["He eats 3, so 18.\n#### 18"], True),
    ],
)
def test_exact_match_compares_what_is_left_without_case_articles_and_punctuation(reply, answers, same):
    assert exact(reply, answers) is same


@pytest.mark.parametrize(
    ("reply", "answers", "inside"),
    [
        ("It is the Lune, of course.", ["Lune"], True),
        ("It is Lunedale.", ["Lune"], False),
        ("New York City", ["york city"], True),
        ("York, a city", ["york city"], True),  # articles and punctuation are gone
        ("anything", ["?!"], False),
        (None, ["x"], False),
    ],
)
def test_an_answer_is_contained_in_a_reply_as_whole_words(reply, answers, inside):
    assert contains(reply, answers) is inside


@pytest.mark.parametrize(
    ("reply", "answer", "same"),
    [
        ("so the answer is $1,000.00.", "1000", True),
        ("5 + 4 = 9 apples", "9", True),
        ("9 apples of 10", "9", False),
        ("-3", "3", False),
        ("0.50", ".5", True),
        ("no number", "7", False),
        ("2,5", "5", True),  # a comma that does not group thousands separates two numbers
        ("anything", "Paris", None),
    ],
)
def test_the_last_number_of_a_reply_counts(reply, answer, same):
    assert numeric(reply, [answer]) is same


def test_an_answer_is_cut_out_of_a_reply_by_the_last_match():
    reply = "The answer is 4. No: the answer is (B)."
    assert extracted(reply, r"answer is \(?([A-Z0-9])") == "B"
    assert extracted(reply, r"\d") == "4"
    assert extracted(reply, r"none (x)") is None
    assert extracted(" x ", None) == "x"
    assert number_in("1,234,567.5 m") == Decimal("1234567.5")
    assert normalised("A “quoted” word") == "“quoted” word"  # only ASCII punctuation goes, as in SQuAD's script


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"question": "q", "answer": 4}, ["4"]),
        ({"problem": "q", "solution": "long", "answer": "s"}, ["s"]),
        ({"question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, ["a", "b"]),
        ({"question": "q", "answer": {"value": "v", "aliases": ["w"]}}, ["v", "w"]),
        ({"instruction": "q", "output": "o"}, ["o"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ["a"]),
    ],
)
def test_questions_are_read_in_the_shapes_of_known_sets(tmp_path, row, answers):
    (found,) = read(tmp_path, [row])
    assert the_answers(found) == answers
    assert found.messages == [{"role": "user", "content": "q"}]


def test_the_text_that_a_question_is_about_comes_first(tmp_path):
    (found,) = read(tmp_path, [{"context": "A cat sat.", "question": "Who?", "answer": "cat"}])
    assert found.messages[0]["content"] == "A cat sat.\n\nWho?"


@pytest.mark.parametrize(
    ("row", "texts", "right"),
    [
        ({"question": "q", "choices": ["w", "x", "y"], "answer": 2}, ["w", "x", "y"], 2),
        ({"question": "q", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": "B"}, ["w", "x"], 1),
        ({"prompt": "q", "endings": ["w", "x"], "label": "0"}, ["w", "x"], 0),
        ({"question": "q", "A": "w", "B": "x", "C": "y", "answer": "C"}, ["w", "x", "y"], 2),
        ({"question": "q", "options": [3, 4], "answer": "4"}, ["3", "4"], 1),
        ({"question": "q", "choices": ["w", "x"], "answer": "x"}, ["w", "x"], 1),
    ],
)
def test_choices_are_read_in_the_shapes_of_known_sets(tmp_path, row, texts, right):
    (found,) = read(tmp_path, [row], each_choice_row)
    assert (choices_of(found), right_choice(found)) == (texts, right)


@pytest.mark.parametrize(
    ("row", "each", "said"),
    [
        ({"question": "q", "result": "a"}, each_question, "--columns answer=result"),
        ({"question": "q", "answer": ""}, each_question, "'answer' is empty"),
        ({"question": "q", "answer": True}, each_question, "holds true or false"),
        ({"question": "q", "choices": ["w", "x"], "answer": 2}, each_choice_row, "is 2, and the choices are 0 to 1"),
        ({"question": "q", "choices": ["w", "x"], "answer": -1}, each_choice_row, "is -1, and the choices are 0 to 1"),
        ({"question": "q", "choices": ["w", "x"], "answer": "C"}, each_choice_row, "is not one of the 2 choices"),
        ({"question": "q", "choices": ["1", "0"], "answer": "1"}, each_choice_row, "could be choice 0 or 1"),
        ({"question": "q", "choices": ["w"], "answer": 0}, each_choice_row, "two or more texts"),
        ({"question": "q", "choices": ["w", " "], "answer": 0}, each_choice_row, "an empty choice"),
        ({"question": "q", "choices": ["w", "x"], "right": 0}, each_choice_row, "--columns answer=right"),
        ({"question": "q", "given": ["w", "x"], "answer": 0}, each_choice_row, "--columns choices=given"),
        ({"question": "q", "A": "w", "C": "x", "answer": 0}, each_choice_row, "no 'choices'"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_with_its_line_and_a_fix(tmp_path, row, each, said):
    with pytest.raises(InputError) as caught:
        read(tmp_path, [row], each)
    assert said in str(caught.value)
    assert "rows.jsonl:1" in str(caught.value)


# --- what a model reads ---------------------------------------------------------------------------------------------


def asked(tmp_path, chat, shots, system=None):
    rows = read(tmp_path, [{"question": f"Q{i}", "answer": f"A{i}"} for i in range(4)])
    tokenizer = tiny_tokenizer()
    asking, _ = asking_of(tokenizer, None, chat, system)
    drawn = [(shot, the_answers(shot)[0]) for shot in drawn_shots(rows, 0, shots, seed=3)]
    ids = asking.ids(rows[0], drawn)
    assert ids.count(tokenizer.bos_token_id) == 1
    return tokenizer.decode(ids), [shot.messages[0]["content"][1:] for shot, _ in drawn]


def test_a_question_and_its_shots_as_the_model_reads_them(tmp_path):
    text, (one, two) = asked(tmp_path, False, 2, "Be short.")
    assert text == f"<bos>Be short.\n\nQuestion: Q{one}\nAnswer: A{one}\n\nQuestion: Q{two}\nAnswer: A{two}\n\n" + (
        "Question: Q0\nAnswer:"
    )
    text, (one,) = asked(tmp_path, True, 1)
    assert text == (
        f"<bos><start_of_turn>user\nQ{one}<end_of_turn>\n<start_of_turn>model\nA{one}<end_of_turn>\n"
        "<start_of_turn>user\nQ0<end_of_turn>\n<start_of_turn>model\n"
    )


def test_shots_are_other_rows_and_the_same_ones_for_every_seed(tmp_path):
    rows = read(tmp_path, [{"question": f"Q{i}", "answer": "a"} for i in range(9)])
    for number in range(9):
        shots = drawn_shots(rows, number, 8, 1)
        assert rows[number] not in shots
        assert len({shot.where for shot in shots}) == 8
        assert shots == drawn_shots(rows, number, 8, 1)
    assert any(drawn_shots(rows, 0, 3, 1) != drawn_shots(rows, 0, 3, seed) for seed in range(2, 6))
    with pytest.raises(InputError, match="too few for --shots 9"):
        drawn_shots(rows, 0, 9, 1)


def test_a_question_that_is_too_long_keeps_its_bos_and_its_end():
    assert cut_left([2, 5, 6, 7, 8], 3) == [2, 7, 8]
    assert cut_left([2, 5], 3) == [2, 5]


# --- runs -----------------------------------------------------------------------------------------------------------


def test_replies_are_counted_right_by_word_and_by_number(inputs, monkeypatch):
    texts = iter(["1", "the answer is 2", "3.0", "nothing", "#5.", "6 7"])
    monkeypatch.setattr("gemma2.posttrain.generation.engines.local.ChatFormat.decode", lambda self, ids: next(texts))
    config = QaConfig(model=inputs / "model", qa=inputs / "qa.jsonl", max_new_tokens=2, batch_size=1)
    task = run_qa(config, RunOptions(NOWHERE)).summary["tasks"]["qa.jsonl"]
    assert task["n"] == 6
    # The prompts are equally long, so that the batches of one are in the order of the file.
    assert task["metrics"]["exact"] == pytest.approx(2 / 6)  # "1", and "#5." without its punctuation
    assert task["metrics"]["contains"] == pytest.approx(4 / 6)  # "the answer is 2" and "6 7" as well
    assert task["metrics"]["numeric"] == pytest.approx(4 / 6)
    assert task["metric"] == "numeric"


def test_answers_stay_the_same_with_another_batch_size_and_after_an_interrupt(inputs, tmp_path, interrupting):
    fields = {"model": inputs / "model", "qa": inputs / "qa.jsonl", "shots": 2, "max_new_tokens": 5}
    run_qa(QaConfig(**fields, batch_size=2), RunOptions(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run_qa(QaConfig(**fields, batch_size=2), RunOptions(tmp_path / "cut"), interrupting(3))
    run_qa(QaConfig(**fields, batch_size=2), RunOptions(tmp_path / "cut", resume=True))
    one = run_qa(QaConfig(**fields, batch_size=1), RunOptions(NOWHERE)).summary
    for name in ("results.json", "results.csv", "samples/qa.jsonl.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert one["tasks"] == json.loads((tmp_path / "whole" / "results.json").read_text())["tasks"]


def by_hand(inputs, chat):
    """Log-probs of every choice from one plain forward pass each."""
    model, tokenizer = load_policy(inputs / "model")
    found = []
    for row in CHOICES:
        texts = row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"]
        if chat == "on":
            head = f"<start_of_turn>user\n{row['question']}<end_of_turn>\n<start_of_turn>model\n"
            context, before = tokenizer.encode(head), ""
        else:
            context, before = tokenizer.encode(f"Question: {row['question']}\nAnswer:"), " "
        logps = []
        for text in texts:
            ids = tokenizer.encode(before + text, add_special_tokens=False)
            with torch.no_grad():
                table = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
            logps.append(sum(float(table[len(context) - 1 + t, token]) for t, token in enumerate(ids)))
        found.append((texts, logps))
    return found


@pytest.mark.parametrize("chat", ["on", "off"])
def test_the_choice_with_the_largest_log_prob_and_the_largest_per_byte_are_the_answers(inputs, tmp_path, chat):
    config = ChoicesConfig(model=inputs / "model", choices=inputs / "choices.jsonl", chat=chat)
    run_choices(config, RunOptions(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["choices.jsonl"]
    lines = (tmp_path / "out" / "samples" / "choices.jsonl.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    right, right_per_byte = 0, 0
    for row, target, (texts, logps) in zip(rows, (0, 1, 1), by_hand(inputs, chat), strict=True):
        assert row["logprobs"] == pytest.approx(logps, abs=1e-4)
        per_byte = [value / len(text.encode()) for value, text in zip(logps, texts, strict=True)]
        right += logps.index(max(logps)) == target
        right_per_byte += per_byte.index(max(per_byte)) == target
    assert found["metrics"] == {"acc": right / 3, "acc_norm": right_per_byte / 3}
    assert any(row["answer"] != row["answer_norm"] for row in rows)  # else the test would not tell them apart
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    with (tmp_path / "out" / "results.csv").open() as file:
        assert [line["metric"] for line in csv.DictReader(file)] == ["acc", "acc_norm"]


def test_choices_resume_to_the_same_bytes(inputs, tmp_path, interrupting, monkeypatch):
    monkeypatch.setattr("gemma2.posttrain.evaluation.built_in.multiple_choice.PART", 1)
    fields = {"model": inputs / "model", "choices": inputs / "choices.jsonl", "batch_size": 1, "shots": 1}
    config = ChoicesConfig(**fields, against=inputs / "other")
    run_choices(config, RunOptions(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run_choices(config, RunOptions(tmp_path / "cut"), interrupting(4))
    scored = []
    monkeypatch.setattr(
        "gemma2.posttrain.evaluation.built_in.multiple_choice.SharedScorer.group",
        lambda self, rows, whole=SharedScorer.group: scored.append(rows) or whole(self, rows),
    )
    run_choices(config, RunOptions(tmp_path / "cut", resume=True))
    assert len(scored) == 1  # of six rows, two models with three each, five were known
    for name in ("results.json", "samples/choices.jsonl.jsonl", "samples/against/choices.jsonl.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_questions_over_the_context_are_counted_and_said(inputs, interrupting, monkeypatch):
    monkeypatch.setattr("gemma2.posttrain.evaluation.built_in.multiple_choice.context_of", lambda model: 12)
    heard = interrupting()
    config = ChoicesConfig(model=inputs / "model", choices=inputs / "choices.jsonl", chat="off")
    task = run_choices(config, RunOptions(NOWHERE), heard).summary["tasks"]["choices.jsonl"]
    assert task["cut_questions"] >= 1
    assert any("longer than the model's context" in line for line in heard.warnings)


def test_a_model_that_doctor_calls_broken_is_not_measured_in_silence(inputs, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | {"attn_logit_softcapping": None}))
    fields = {"model": tmp_path / "model", "choices": inputs / "choices.jsonl"}
    with pytest.raises(InputError) as caught:
        run_choices(ChoicesConfig(**fields), RunOptions(NOWHERE))
    assert "doctor calls" in str(caught.value) and "--no-doctor" in str(caught.value)
    assert run_choices(ChoicesConfig(**fields, doctor=False), RunOptions(NOWHERE)).summary["tasks"]


def test_no_rows_are_refused(tmp_path, inputs):
    (tmp_path / "empty.jsonl").write_text("")
    for config, run in (
        (QaConfig(model=inputs / "model", qa=tmp_path / "empty.jsonl"), run_qa),
        (ChoicesConfig(model=inputs / "model", choices=tmp_path / "empty.jsonl"), run_choices),
    ):
        with pytest.raises(InputError, match="has no rows"):
            run(config, RunOptions(NOWHERE), SILENT)


def test_figures_of_rows_by_hand():
    found = row_figures({"right": [0.0, 1.0, 1.0, 1.0], "some": [None, 2.0, 4.0, None]}, {"some": (0.0, 9.0)})
    assert found["metrics"] == {"right": 0.75, "some": 3.0}
    assert found["stderr"] == pytest.approx({"right": (0.75 * 0.25 / 3) ** 0.5, "some": 1.0})
    assert (found["low"]["some"], found["high"]["some"]) == (0.0, 9.0)  # Student's t with one degree: cut
    assert (found["n"], found["rows_of_metric"]) == (4, {"some": 2})


def test_the_interval_of_a_share_is_wilsons():
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert all(wilson(0.0, n)[0] == 0 and wilson(1.0, n)[1] == 1 for n in range(1, 40))
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
