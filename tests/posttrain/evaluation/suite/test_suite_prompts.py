"""Prompts of the suite: number of shots, exact texts, one <bos>, and rows that do not fit their task."""

import json
from itertools import chain

import pytest
from miniature_tasks import Miniature

from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.evaluation.suite.encoding import Encoder, chat_text
from gemma2.posttrain.evaluation.suite.prompts import asked_of
from gemma2.posttrain.evaluation.suite.task import SUITES, load_task, tasks_of
from gemma2.posttrain.evaluation.suite.task_rows import read_rows
from gemma2.posttrain.tiny.networks import tiny_tokenizer

SHOTS = {"mmlu": 5, "arc_challenge": 25, "gsm8k": 5, "winogrande": 5, "hellaswag": 10}
METRIC = {"mmlu": "acc", "arc_challenge": "acc_norm", "gsm8k": "strict-match", "winogrande": "acc"}
METRIC |= {"hellaswag": "acc_norm"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Miniature().write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny_tokenizer(), 8192)


def first(data, task, **options):
    return next(asked_of(read_rows(data, load_task(task)), 1234, **options))


def test_the_suite_has_the_shots_and_metrics_of_the_report():
    assert {task.task: task.num_fewshot for task in tasks_of("gemma2", ())} == SHOTS
    assert {task.task: task.metric for task in tasks_of("gemma2", ())} == METRIC
    assert [task.task for task in tasks_of("gemma2", ("gsm8k", "mmlu"))] == ["mmlu", "gsm8k"]
    assert set(SUITES["gemma2"]) == set(SHOTS)


@pytest.mark.parametrize(
    ("task", "mark", "extra"),
    [
        ("mmlu", "\nAnswer:", 1),
        ("arc_challenge", "Question: ", 1),
        ("gsm8k", "#### ", 0),
        ("winogrande", "The ", 1),
        ("hellaswag", "Cooking: ", 1),
    ],
)
def test_a_prompt_has_its_examples_and_then_the_question(data, task, mark, extra):
    assert first(data, task).contexts[0].count(mark) == SHOTS[task] + extra


def test_the_first_prompts_as_exact_text(tmp_path):
    question = {"question": " What is 2? ", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "us_history"}
    rows = [{"id": number, "split": "dev" if number < 5 else "test", **question} for number in range(6)]
    data = Miniature(rows=1).write(tmp_path, mmlu=rows)
    asked = first(data, "mmlu")
    shown = "What is 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    head = "The following are multiple choice questions (with answers) about us history.\n\n"
    assert asked.contexts == [head + f"{shown} B\n\n" * 5 + shown]
    assert asked.pairs[2] == (asked.contexts[0], " C")
    sentence = {"sentence": "The cat met _ at noon.", "choices": ["Ann", "Bo"], "answer": 1}
    rows = [{"id": number, "split": "train" if number < 6 else "validation", **sentence} for number in range(7)]
    asked = first(Miniature(rows=1).write(tmp_path, winogrande=rows), "winogrande")
    examples = "The cat met Bo at noon.\n\n" * 5
    assert asked.pairs == [(f"{examples}The cat met {name}", " at noon.") for name in ("Ann", "Bo")]
    start = {"context": "Rowing: [header] Go [title] Sit down. Then he ", "answer": 0}
    rows = [
        {**start, "id": number, "split": "train", "choices": ["rows [x] on.", "b", "c", "d"]} for number in range(11)
    ]
    rows.append({**rows[0], "id": 11, "split": "validation"})
    asked = first(Miniature(rows=1).write(tmp_path, hellaswag=rows), "hellaswag")
    assert asked.contexts == ["Rowing: Go. Sit down. Then he rows on.\n\n" * 10 + "Rowing: Go. Sit down. Then he"]
    assert asked.continuations[0] == " rows on."


def test_the_first_prompt_as_a_chat(tmp_path):
    rows = [
        {"id": number, "split": split, "question": f"{number}?", "choices": ["a", "b"], "answer": 0}
        for number, split in enumerate(["train"] * 25 + ["test"])
    ]
    data = Miniature(rows=1).write(tmp_path, arc_challenge=rows)
    chat = chat_text(ChatFormat(tiny_tokenizer()))
    turns = first(data, "arc_challenge", chat=chat).contexts[0]
    end = "<start_of_turn>user\nQuestion: 25?\nAnswer:<end_of_turn>\n<start_of_turn>model\n"
    assert turns.endswith(f"<start_of_turn>model\na<end_of_turn>\n{end}")
    assert turns.count("<start_of_turn>user") == 26
    one = first(data, "arc_challenge", chat=chat, multiturn=False)
    assert one.contexts[0].count("<start_of_turn>user") == 1
    assert one.contexts[0].endswith("Answer: a\n\nQuestion: 25?\nAnswer:<end_of_turn>\n<start_of_turn>model\n")
    assert one.continuations == ["a", "b"]
    mmlu = first(data, "mmlu", chat=chat).contexts[0]
    assert mmlu.startswith("<bos><start_of_turn>user\nThe following are multiple choice questions")  # not dropped


def test_examples_do_not_depend_on_the_rows_that_are_run_and_never_show_the_row_itself(tmp_path):
    data = Miniature(train=False).write(tmp_path)
    whole = [*asked_of(read_rows(data, load_task("arc_challenge")), 1234)]
    part = [*asked_of(read_rows(data, load_task("arc_challenge"), 3), 1234)]
    assert [row.contexts for row in part] == [row.contexts for row in whole[:3]]
    assert part[0].contexts != next(asked_of(read_rows(data, load_task("arc_challenge"), 3), 1)).contexts
    for row in whole:
        assert row.contexts[0].count(f"Question: {row.doc['question']}\n") == 1


@pytest.mark.parametrize("processor", ["none", "double"])
def test_every_request_has_one_bos_whatever_the_tokenizer_adds(data, processor):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token
    marks = {"none": "$A", "double": f"{bos} {bos} $A"}[processor]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=marks, special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    encoder = Encoder(tokenizer, 8192)
    for task in tasks_of("gemma2", ()):
        for chat in (None, chat_text(ChatFormat(tiny_tokenizer()))):
            asked = [*asked_of(read_rows(data, task), 1, chat)]
            requests = encoder.prompts(asked, 8) if task.generates else [*chain(*encoder.choices(asked))]
            assert all(r.ids[0] == encoder.bos and r.ids.count(encoder.bos) == 1 for r in requests)


def test_a_row_that_spells_bos_is_refused_by_its_id(tmp_path, encoder):
    rows = Miniature().ours["gsm8k"]
    rows[-1]["question"] = "<bos> and then?"
    asked = [*asked_of(read_rows(Miniature().write(tmp_path, gsm8k=rows), load_task("gsm8k")), 1)]
    with pytest.raises(InputError, match=r"row gsm8k-10: its prompt has 2 <bos> tokens"):
        encoder.prompts(asked, 8)


def test_blanks_before_the_choice_belong_to_it_and_the_targets_are_what_follows_the_context(data, encoder):
    asked = [*asked_of(read_rows(data, load_task("hellaswag")), 1)]
    for row, requests in zip(asked, encoder.choices(asked), strict=True):
        for request, ending in zip(requests, row.continuations, strict=True):
            assert encoder.tokenizer.decode(request.ids[-request.targets :]) == ending


def test_a_prompt_over_the_context_is_cut_on_the_left_and_keeps_bos(data):
    short = Encoder(tiny_tokenizer(), 200)
    asked = [*asked_of(read_rows(data, load_task("arc_challenge")), 1)]
    whole = chain(*Encoder(tiny_tokenizer(), 8192).choices(asked))
    for request, full in zip(chain(*short.choices(asked)), whole, strict=True):
        assert len(request.ids) == 201
        assert request.ids == [short.bos, *full.ids[-200:]]
        assert request.cut == len(full.ids) - 201
        assert request.targets == full.targets


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("mmlu", lambda row: row.pop("subject"), r"mmlu.jsonl:1 has no column 'subject'"),
        ("mmlu", lambda row: row.update(answer=4), "answer 4 is not an index of its 4 choices"),
        ("mmlu", lambda row: row.update(answer="B"), "answer 'B' is not an index"),
        ("mmlu", lambda row: row.update(choices=["a", "b"]), "choices are not 4 texts"),
        ("arc_challenge", lambda row: row.update(answer=-1), "answer -1 is not an index"),
        ("winogrande", lambda row: row.update(sentence="no blank"), "sentence has no _"),
        ("gsm8k", lambda row: row.update(answer=3), "answer is not a text"),
        ("gsm8k", lambda row: row.update(id="gsm8k-1"), "the id 'gsm8k-1' is also that of"),
        ("hellaswag", lambda row: row.update(split="valid"), "split is 'valid'"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_line(tmp_path, task, change, message):
    rows = json.loads(json.dumps(Miniature().ours[task]))
    change(rows[0])
    with pytest.raises(InputError, match=message):
        read_rows(Miniature().write(tmp_path, **{task: rows}), load_task(task))


def test_too_few_rows_are_said(tmp_path):
    rows = Miniature().ours
    few = [row for row in rows["arc_challenge"] if row["split"] == "test" or row["id"] == "arc_challenge-0"]
    data = Miniature().write(tmp_path, arc_challenge=few, gsm8k=[], hellaswag=rows["hellaswag"][:12])
    with pytest.raises(InputError, match="25 examples are needed, train has 1 other rows"):
        read_rows(data, load_task("arc_challenge"))
    with pytest.raises(InputError, match="has no row of split test"):
        read_rows(data, load_task("gsm8k"))
    with pytest.raises(InputError, match=r"no row of split validation \(rows: 12 of train\)"):
        read_rows(data, load_task("hellaswag"))
    (tmp_path / "mmlu.jsonl").unlink()
    with pytest.raises(InputError, match=r"has no mmlu.jsonl.*--tasks arc_challenge,gsm8k,hellaswag,winogrande"):
        read_rows(data, load_task("mmlu"))
