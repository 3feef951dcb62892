"""Perplexity: windows by hand, the loss of transformers over the same windows, formats of text, resume."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from gemma2.core.errors import InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.evaluation.built_in.keeping import NOWHERE
from gemma2.posttrain.evaluation.built_in.perplexity import run_perplexity
from gemma2.posttrain.evaluation.built_in.windows import Span, windows_of
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.measures import PerplexityConfig
from gemma2.posttrain.tiny.networks import save_random

TEXT = "The sun rises in the east and sets in the west.\r\n\r\n<bos> is a word here, and so is ñandú.\n" * 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    save_random(folder / "model", 1)
    save_random(folder / "other", 2)
    (folder / "one.txt").write_bytes(TEXT.encode())
    (folder / "rows.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (folder / "rows.json").write_text(json.dumps([{"content": TEXT}]))
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["content"], [TEXT]])
    return folder


def measured(inputs, *names, out=None, progress=SILENT, **fields):
    files = tuple(inputs / name for name in names)
    config = PerplexityConfig(**{"model": inputs / "model", "perplexity": files, "window": 24, **fields})
    options = RunOptions(NOWHERE if out is None else out)
    result = run_perplexity(config, options, progress)
    return json.loads((out / "results.json").read_text()) if out is not None else result.summary


def test_every_token_is_counted_once_with_the_overlap_before_it():
    assert list(windows_of(10, 5, 2)) == [Span(0, 0, 4), Span(2, 4, 6), Span(4, 6, 8), Span(6, 8, 10)]
    assert list(windows_of(9, 5, 0)) == [Span(0, 0, 4), Span(4, 4, 8), Span(8, 8, 9)]
    for tokens in range(1, 40):
        for size in range(2, 12):
            for overlap in range(size - 1):
                spans = list(windows_of(tokens, size, overlap))
                assert [i for span in spans for i in range(span.start, span.end)] == list(range(tokens))
                assert all(span.end - span.context <= size - 1 for span in spans)
                assert all(span.start - span.context == min(overlap, span.start) for span in spans)


@pytest.mark.parametrize("overlap", [0, 7])
def test_the_perplexity_is_that_of_the_loss_of_transformers_over_the_same_windows(inputs, overlap):
    model, tokenizer = load_policy(inputs / "model")
    ids = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    nats = 0.0
    for start in range(0, len(ids), 23 - overlap) if overlap == 0 else [0, *range(23, len(ids), 23 - overlap)]:
        context = max(0, start - overlap)
        end = min(len(ids), context + 23)
        window = torch.tensor([[tokenizer.bos_token_id, *ids[context:end]]])
        labels = window.clone()
        labels[:, : 1 + start - context] = -100
        with torch.no_grad():
            nats += float(model(window, labels=labels).loss) * (end - start)

    found = measured(inputs, "one.txt", overlap=overlap)["tasks"]["one.txt"]

    assert found["tokens"] == len(ids)
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-5)
    assert found["metrics"]["word_perplexity"] == pytest.approx(math.exp(nats / len(TEXT.split())), rel=1e-5)
    assert found["metrics"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert (found["window"], found["overlap"], found["bytes"]) == (24, overlap, len(TEXT.encode()))
    assert found["low"]["perplexity"] < found["metrics"]["perplexity"] < found["high"]["perplexity"]


def test_every_window_has_one_bos_though_the_text_spells_it(inputs, monkeypatch):
    seen = []

    def watched(model, given, counted, batch_size):
        seen.extend([*a, *b] for a, b in zip(given, counted, strict=True))
        return [torch.zeros(len(ids)) for ids in counted]

    monkeypatch.setattr("gemma2.posttrain.evaluation.built_in.perplexity.token_logps", watched)
    measured(inputs, "one.txt", overlap=5)
    bos = load_policy(inputs / "model")[1].bos_token_id
    assert len(seen) > 3
    assert all(ids[0] == bos and ids.count(bos) == 1 for ids in seen)


def test_a_text_is_the_same_document_in_every_format(inputs):
    found = measured(inputs, "one.txt", "rows.jsonl")
    renamed = measured(inputs, "rows.json", "rows.csv", columns=("text=content",))
    tasks = found["tasks"] | renamed["tasks"]
    one = tasks["one.txt"]
    assert all(tasks[name] == one for name in ("rows.jsonl", "rows.json", "rows.csv"))
    assert found["tasks"]["all"]["tokens"] == 2 * one["tokens"]
    assert found["tasks"]["all"]["metrics"]["perplexity"] == pytest.approx(one["metrics"]["perplexity"])


@pytest.mark.parametrize(
    ("content", "fields", "said"),
    [
        (b"\xff\xfe no text", {}, "is not UTF-8"),
        (b"  \n", {}, "has no text"),
        (b"words", {"window": 100_000}, "longer than the model's context"),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused_in_a_line(inputs, tmp_path, content, fields, said):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises((InputError, UsageError), match=said):
        measured(inputs, tmp_path / "bad.txt", **fields)


def test_rows_without_a_text_get_the_option_that_names_the_column(inputs):
    with pytest.raises(InputError) as caught:
        measured(inputs, "rows.csv")
    assert "--columns text=content" in str(caught.value)


def test_two_models_have_separate_figures_over_the_same_windows(inputs, tmp_path):
    found = measured(inputs, "one.txt", against=inputs / "other", out=tmp_path / "out")
    alone = measured(inputs, "one.txt", model=inputs / "other")
    assert found["tasks_against"] == alone["tasks"]
    compared = found["compared"]["one.txt"]
    rates = [math.log(tasks["one.txt"]["metrics"]["perplexity"]) for tasks in (found["tasks"], alone["tasks"])]
    assert compared["difference"] == pytest.approx(rates[0] - rates[1], abs=1e-6)
    assert compared["gained"] + compared["lost"] == compared["n"] == found["tasks"]["one.txt"]["n"]
    ours, theirs = (
        [json.loads(line)["prompt_ids_hash"] for line in (tmp_path / "out" / place).read_text().splitlines()]
        for place in ("samples/one.txt.jsonl", "samples/against/one.txt.jsonl")
    )
    assert ours == theirs


def test_an_earlier_result_stands_for_the_model_that_it_is_of(inputs, tmp_path):
    measured(inputs, "one.txt", model=inputs / "other", out=tmp_path / "before")
    by_result = measured(inputs, "one.txt", against=tmp_path / "before")
    by_model = measured(inputs, "one.txt", against=inputs / "other")
    assert by_result["compared"] == by_model["compared"]
    assert by_result["against"] == by_model["against"]
    itself = measured(inputs, "one.txt", against=inputs / "model")["compared"]["one.txt"]
    assert (itself["difference"], itself["p"], itself["found"]) == (0, 1, False)


def test_an_interrupted_measure_goes_on_to_the_same_bytes(inputs, tmp_path, interrupting):
    fields = {"batch_size": 1, "window": 12, "against": inputs / "other"}
    measured(inputs, "one.txt", out=tmp_path / "whole", **fields)
    config = PerplexityConfig(model=inputs / "model", perplexity=inputs / "one.txt", **fields)
    with pytest.raises(KeyboardInterrupt):
        run_perplexity(config, RunOptions(tmp_path / "cut"), interrupting(150))
    run_perplexity(config, RunOptions(tmp_path / "cut", resume=True))
    names = ("results.json", "results.csv", "samples/one.txt.jsonl", "samples/against/one.txt.jsonl")
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
