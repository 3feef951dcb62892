"""Teacher data: rows and their provenance, truncation, input order, and a resume that ends with the same bytes."""

from __future__ import annotations

import json

import pytest
import torch

from gemma2.merging.errors import GuardStop, InputError
from gemma2.posttrain import synthesize
from gemma2.posttrain.chat import ChatFormat
from gemma2.posttrain.data import read_conversations
from gemma2.posttrain.models import load_policy
from gemma2.posttrain.rundir import RunOptions
from gemma2.posttrain.schemas import GenerateConfig
from gemma2.posttrain.scorer import token_logps
from gemma2.posttrain.sources import to_line
from gemma2.posttrain.synthesize import run_generate
from gemma2.posttrain.tiny import save_random

PROMPTS = [{"prompt": f"What is {i}?" + " please" * (7 * i % 5), "id": i, "sample": "theirs"} for i in range(12)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    (folder / "prompts.jsonl").write_bytes(b"".join(map(to_line, PROMPTS)))
    save_random(folder / "teacher")
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(synthesize, "CHUNK", 8)


def configure(inputs, **fields):
    # An untrained model draws one of its two stop tokens about once in 256 tokens.
    given = {"max_new_tokens": 128, "temperature": 2.0, "n": 2, "batch_size": 4, "keep_truncated": True, **fields}
    return GenerateConfig(teacher=inputs / "teacher", prompts=inputs / "prompts.jsonl", **given)


def rows_of(result):
    return [json.loads(line) for line in (result.out / "data.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def generated(inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesize, "CHUNK", 8)
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


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_killed_run_resumes_to_the_same_bytes(inputs, tmp_path, generated, chunks, interrupting, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_generate(configure(inputs), RunOptions(out), interrupting(8 * chunks - 1))
    saved = sorted((tmp_path / ".out.partial" / "checkpoints").glob("chunk-*"))
    assert len(saved) == chunks and not out.exists()
    (saved[0].parent / ".chunk-00000007.jsonl.tmp").write_text('{"torn')  # what a kill in the middle of a save leaves
    calls, draw = [], synthesize.sample
    monkeypatch.setattr(synthesize, "sample", lambda *args: calls.append(args) or draw(*args))
    resumed = run_generate(configure(inputs), RunOptions(out, resume=True))
    assert len(calls) == 3 - chunks
    assert (out / "data.jsonl").read_bytes() == (generated.out / "data.jsonl").read_bytes()
    assert resumed.summary == generated.summary and not (out / "checkpoints").exists()


def test_seed_and_limit_decide_what_is_drawn(inputs, tmp_path, generated):
    limited = run_generate(configure(inputs, limit=4), RunOptions(tmp_path / "limited"))
    assert rows_of(limited) == rows_of(generated)[:8]
    other = run_generate(configure(inputs, limit=4, seed=1), RunOptions(tmp_path / "other"))
    assert rows_of(other) != rows_of(limited)


def test_chunks_draw_different_numbers(inputs, tmp_path):
    same = tmp_path / "same.jsonl"
    same.write_bytes(to_line({"prompt": "a"}) * 16)
    config = GenerateConfig(
        teacher=inputs / "teacher", prompts=same, max_new_tokens=8, batch_size=8, keep_truncated=True
    )
    rows = rows_of(run_generate(config, RunOptions(tmp_path / "out")))
    assert rows[:8] != rows[8:]


def test_a_prompt_that_the_template_refuses_is_named_before_anything_is_drawn(inputs, tmp_path, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(to_line(PROMPTS[0]) + to_line({"prompt": [{"role": "bot", "content": "x"}]}))
    monkeypatch.setattr(synthesize, "sample", None)
    with pytest.raises(InputError, match=r"bad\.jsonl:2: unknown role 'bot'"):
        run_generate(GenerateConfig(teacher=inputs / "teacher", prompts=bad), RunOptions(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [bad]
