"""Weights and a tokenizer that do not belong together, on a trained model: making one takes two seconds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from processes import ROOT
from tokenizers import Tokenizer
from tokenizers.trainers import BpeTrainer

from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.doctor.checks.finding import Depth
from gemma2.posttrain.doctor.checks.meaning_checks import QUESTIONS
from gemma2.posttrain.doctor.examination import examine
from gemma2.posttrain.models.loading import load_policy, save_model
from gemma2.posttrain.tiny.networks import save_random
from gemma2.posttrain.tiny.pretrain import next_token_loss


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A trained model that knows its own few answers and no plain sentence."""
    path = tmp_path_factory.mktemp("narrow") / "model"
    save_random(path, 3)
    model, tokenizer = load_policy(path)
    form = ChatFormat(tokenizer)
    talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": "It is so."}] for text in QUESTIONS]
    rows = [form.example(talk, "eot") for talk in talks]
    ids, mask = (torch.nn.utils.rnn.pad_sequence([torch.tensor(row[i]) for row in rows], True) for i in (0, 1))
    optimizer = torch.optim.Adam(model.train().parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        next_token_loss(model, ids, mask.bool()).backward()
        optimizer.step()
    save_model(model, tokenizer, path)
    return path


def another_tokenizer(path):
    """Give a model the tokenizer of another text: the same control tokens and size, other words and ids."""
    file = path / "tokenizer.json"
    value = json.loads(file.read_text())
    fixed = {token: i for token, i in value["model"]["vocab"].items() if token.startswith("<")}
    other = Tokenizer.from_file(str(file))
    text = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("m*.md"))]
    other.train_from_iterator(text, BpeTrainer(vocab_size=512, special_tokens=list(fixed), show_progress=False))
    learned = json.loads(other.to_str())["model"]
    free = [i for i in range(512) if i not in fixed.values()]
    tokens = [token for token in sorted(learned["vocab"], key=learned["vocab"].get) if token not in fixed]
    vocabulary = fixed | dict(zip(tokens, free, strict=False))
    merges = [pair for pair in learned["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()]
    value["model"] |= {"vocab": vocabulary, "merges": merges}
    file.write_text(json.dumps(value))


def test_a_trained_model_with_the_tokenizer_of_another_is_told_from_a_narrow_one(narrow, tmp_path):
    (own, *_) = examine([narrow], Depth.DEEP, only=["loss"])
    assert own.status == "warning" and "trained on little but one kind of text" in own.message
    shutil.copytree(narrow, tmp_path / "model")
    another_tokenizer(tmp_path / "model")
    (swapped, *_) = examine([tmp_path / "model"], Depth.DEEP, only=["loss"])
    assert swapped.status == "problem" and "do not belong together" in swapped.message
