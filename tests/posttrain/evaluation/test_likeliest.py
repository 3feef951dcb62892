"""The answers that people read: greedy, as transformers decodes, for each model in the order given."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma2.posttrain.evaluation.likeliest import likeliest_answers
from gemma2.posttrain.pipelines.quickstart import _one_of_each
from gemma2.posttrain.tiny.networks import save_random

QUESTIONS = ["What is 1 plus 2?", "Where does Mira live, and why?"]


def greedy(path, question, tokens):
    """What plain transformers makes of it."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True).strip()


def test_each_model_answers_every_question_as_transformers_does(tmp_path):
    models = {name: save_random(tmp_path / name, seed) for name, seed in (("after", 1), ("before", 2))}
    rows = likeliest_answers(models, QUESTIONS, 12)
    assert [list(row) for row in rows] == [["prompt", "after", "before"]] * 2
    for row, question in zip(rows, QUESTIONS, strict=True):
        assert row.pop("prompt") == question
        assert {name: text.strip() for name, text in row.items()} == {
            name: greedy(path, question, 12) for name, path in models.items()
        }
    assert rows[0]["after"] != rows[0]["before"]


def test_one_question_of_each_kind_four_at_most():
    asked = ["Sort these: b a", "Sort these: d c", "What is 1?", "Where is it?", "Add 1.", "Name it."]
    assert _one_of_each(asked) == ["Sort these: b a", "What is 1?", "Where is it?", "Add 1."]
