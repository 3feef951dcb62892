"""Teacher data: rows and their provenance, truncation, input order, and a resume that ends with the same bytes."""

from __future__ import annotations

import random

import pytest
import torch

from gemma2.merging.errors import GuardStop, InputError
from gemma2.posttrain.batching import derived_seed
from gemma2.posttrain.chat import ChatFormat
from gemma2.posttrain.data import read_conversations
from gemma2.posttrain.engines import local
from gemma2.posttrain.models import load_policy
from gemma2.posttrain.rundir import RunOptions
from gemma2.posttrain.schemas import GenerateConfig
from gemma2.posttrain.scorer import token_logps
from gemma2.posttrain.sources import iter_rows, to_line
from gemma2.posttrain.synthesize import run_generate
from gemma2.posttrain.tiny import save_random

PROMPTS = [{"prompt": f"What is {i}?" + " please" * (7 * i % 5), "id": i, "sample": "theirs"} for i in range(12)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    (folder / "prompts.jsonl").write_bytes(b"".join(map(to_line, PROMPTS)))
    save_random(folder / "teacher")
    save_random(folder / "judge", seed=1, kind="reward")
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Batches of 4, two of them to a chunk: 12 prompts with two samples are three chunks of two batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "BATCHES", 2)
        yield


def configure(inputs, **fields):
    # An untrained model draws one of its two stop tokens about once in 256 tokens.
    given = {"max_new_tokens": 128, "temperature": 2.0, "n": 2, "batch_size": 4, "keep_truncated": True, **fields}
    return GenerateConfig(**{"teacher": inputs / "teacher", "prompts": inputs / "prompts.jsonl", **given})


def rows_of(result):
    return [row.columns for row in iter_rows(result.out)]


def bytes_of(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def generated(inputs, small_chunks):
    return run_generate(configure(inputs), RunOptions(inputs / "data"))


def test_rows_are_in_input_order_with_the_columns_of_their_prompt(generated):
    rows = rows_of(generated)
    assert [row["id"] for row in rows] == [i for i in range(12) for _ in range(2)]
    assert [row["sample"] for row in rows] == [0, 1] * 12
    assert rows[2]["prompt"] == [{"role": "user", "content": PROMPTS[1]["prompt"]}]


def test_samples_of_a_prompt_differ(generated):
    completions = [row["completion"][0]["content"] for row in rows_of(generated)]
    assert len(set(completions)) > 20


def test_the_output_is_what_sft_reads(generated):
    conversations = read_conversations(generated.out)
    assert len(conversations) == 24 and conversations[0].learn_from == 1
    assert {c.truncated for c in conversations} == {True, False}


def test_finish_reason_tokens_and_log_prob_belong_to_the_completion(inputs, tmp_path):
    result = run_generate(configure(inputs, temperature=0, n=1, max_new_tokens=16), RunOptions(tmp_path / "out"))
    model, tokenizer = load_policy(inputs / "teacher")
    chat = ChatFormat(tokenizer)
    for row in rows_of(result)[:4]:
        prompt = chat.prompt_ids(row["prompt"])
        ids = list(prompt)
        while len(ids) - len(prompt) < 16 and (len(ids) == len(prompt) or ids[-1] not in (1, 107)):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        completion = ids[len(prompt) :]
        assert row["completion"][0]["content"] == chat.decode(completion).strip()
        assert row["tokens"] == len(completion)
        assert row["finish_reason"] == ("stop" if completion[-1] in (1, 107) else "length")
        (logps,) = token_logps(model, [prompt], [completion])
        assert row["logprob"] == pytest.approx(logps.sum().item(), abs=1e-3)


def test_truncated_completions_are_dropped_and_counted(inputs, tmp_path, generated):
    result = run_generate(configure(inputs, keep_truncated=False), RunOptions(tmp_path / "out"))
    assert rows_of(result) == [row for row in rows_of(generated) if row["finish_reason"] == "stop"]
    assert result.summary["truncated"] == generated.summary["truncated"] == 24 - result.summary["rows"] > 0


def test_when_nothing_ends_there_is_no_data(inputs, tmp_path):
    config = configure(inputs, max_new_tokens=1, keep_truncated=False)
    with pytest.raises(GuardStop, match="all 24 completions ran into --max-new-tokens 1; raise it"):
        run_generate(config, RunOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_mostly_truncated_data_is_warned_about(inputs, tmp_path, interrupting):
    progress = interrupting(10**9)
    run_generate(configure(inputs, max_new_tokens=2), RunOptions(tmp_path / "out"), progress)
    assert "completions ran into --max-new-tokens 2" in progress.warnings[0]


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_a_killed_run_resumes_to_the_same_bytes(inputs, tmp_path, generated, batches, interrupting, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_generate(configure(inputs), RunOptions(out), interrupting(12 + 4 * batches - 1))  # 12: the check
    assert not out.exists()
    calls, draw = [], local.decode
    monkeypatch.setattr(local, "decode", lambda *args: calls.append(args) or draw(*args))
    resumed = run_generate(configure(inputs), RunOptions(out, resume=True))
    assert len(calls) == 6 - batches
    assert bytes_of(out) == bytes_of(generated.out)
    assert resumed.summary == generated.summary and not (out / "checkpoints").exists()


@pytest.mark.parametrize("turns", [1, 2])
def test_a_journal_torn_anywhere_resumes_to_the_same_bytes(inputs, tmp_path, turns, interrupting):
    """What a kill or a power cut can leave behind is a journal that ends at any byte."""
    config = configure(inputs, turns=turns, limit=6, max_new_tokens=24, reward=inputs / "judge", best=1)
    whole = run_generate(config, RunOptions(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):  # after the last completion, before the shards are written
        run_generate(config, RunOptions(tmp_path / "out"), interrupting(6 + 6 * 2 * (2 * turns - 1)))
    partial = tmp_path / ".out.partial" / "checkpoints"
    journal = (partial / "answers.jsonl").read_bytes()
    draw = random.Random(0)
    for cut in [0, 1, len(journal) - 1, *(draw.randrange(len(journal)) for _ in range(3))]:
        (partial / "answers.jsonl").write_bytes(journal[:cut])
        (partial / "scores.jsonl").unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            run_generate(config, RunOptions(tmp_path / "out", resume=True), interrupting(6 + 12 * (2 * turns - 1)))
    run_generate(config, RunOptions(tmp_path / "out", resume=True))
    assert bytes_of(tmp_path / "out") == bytes_of(whole.out)


def test_seed_and_limit_decide_what_is_drawn(inputs, tmp_path, generated):
    limited = run_generate(configure(inputs, limit=4), RunOptions(tmp_path / "limited"))
    assert rows_of(limited) == rows_of(generated)[:8]
    other = run_generate(configure(inputs, limit=4, seed=1), RunOptions(tmp_path / "other"))
    assert rows_of(other) != rows_of(limited)


def test_a_row_is_drawn_with_its_own_seed_whatever_its_company(inputs, tmp_path, generated):
    same = tmp_path / "same.jsonl"
    same.write_bytes(to_line({"prompt": "a"}) * 16)
    config = configure(inputs, prompts=same, max_new_tokens=8, n=1)
    rows = rows_of(run_generate(config, RunOptions(tmp_path / "out")))
    assert len({row["completion"][0]["content"] for row in rows}) == 16
    assert [row["seed"] for row in rows] == [derived_seed(0, i, 0) for i in range(16)]
    other = rows_of(run_generate(configure(inputs, batch_size=3), RunOptions(tmp_path / "other")))
    for ours, theirs in zip(other, rows_of(generated), strict=True):
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)
        assert ours["completion"] == theirs["completion"] and ours["seed"] == theirs["seed"]


def test_a_prompt_that_the_template_refuses_is_named_before_anything_is_drawn(inputs, tmp_path, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(to_line(PROMPTS[0]) + to_line({"prompt": [{"role": "bot", "content": "x"}]}))
    monkeypatch.setattr(local, "decode", None)
    with pytest.raises(InputError, match=r"bad\.jsonl:2: unknown role 'bot'"):
        run_generate(configure(inputs, prompts=bad), RunOptions(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [bad]
