"""Teacher data: rows and their provenance, truncation, input order, and a resume that ends with the same bytes."""

from __future__ import annotations

import json
import random

import pytest
import torch
from row_reading import read_conversations
from teachers import save_stopping

from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.seeds import derived_seed
from gemma2.posttrain.data.sources import iter_rows, to_line
from gemma2.posttrain.generation.engines import Request, local
from gemma2.posttrain.generation.generate import run_generate
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import GenerateConfig
from gemma2.posttrain.schemas.config import resolve
from gemma2.posttrain.tiny.networks import save_random

PROMPTS = [{"prompt": f"What is {i}?" + " please" * (7 * i % 5), "id": i, "sample": "theirs"} for i in range(12)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    (folder / "prompts.jsonl").write_bytes(b"".join(map(to_line, PROMPTS)))
    save_stopping(folder / "teacher", 6.0)
    save_random(folder / "judge", seed=1, kind="reward")
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Batches of 4, two of them to a chunk: 12 prompts with two samples are three chunks of two batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "BATCHES", 2)
        yield


def configure(inputs, **fields):
    # This teacher ends most of its turns within 24 tokens, and some not.
    given = {"max_new_tokens": 24, "n": 2, "batch_size": 4, "keep_truncated": True, **fields}
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
    config = configure(inputs, turns=turns, limit=6, reward=inputs / "judge", best=1)
    whole = run_generate(config, RunOptions(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):  # after the last completion, before the shards are written
        run_generate(config, RunOptions(tmp_path / "out"), interrupting(6 + 6 * 2 * (2 * turns - 1)))
    partial = tmp_path / ".out.partial" / "checkpoints"
    journal = (partial / "answers.jsonl").read_bytes()
    draw = random.Random(0)
    for cut in [1, len(journal) - 1, draw.randrange(len(journal))]:
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
    bad.write_bytes(to_line(PROMPTS[0]) + to_line({"prompt": [{"role": "robot", "content": "x"}]}))
    monkeypatch.setattr(local, "decode", None)
    with pytest.raises(InputError, match=r"bad\.jsonl:2: .prompt\[0\]\.role. is .robot., an unknown role"):
        run_generate(configure(inputs, prompts=bad), RunOptions(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [bad]


def length_of(completions, **_):
    return [float(len(text)) for text in completions]


def test_the_best_of_n_are_kept_with_their_scores_in_the_order_of_the_samples(inputs, tmp_path):
    function = {"reward_fn": f"{__name__}:length_of", "n": 4, "limit": 5}
    everything = rows_of(run_generate(configure(inputs, **function), RunOptions(tmp_path / "all")))
    result = run_generate(configure(inputs, **function, best=2), RunOptions(tmp_path / "best"))
    assert [row["reward"] for row in everything] == [float(len(r["completion"][0]["content"])) for r in everything]
    expected = []
    for i in range(5):
        group = [row for row in everything if row["id"] == i]
        chosen = sorted(sorted(group, key=lambda row: -row["reward"])[:2], key=lambda row: row["sample"])
        expected += chosen
    assert rows_of(result) == expected
    mean = sum(row["reward"] for row in everything) / 20
    assert result.summary["mean_reward"] == pytest.approx(mean, abs=1e-4) and len(expected) == 10
    assert result.summary["mean_reward_of_best"] > mean


def redrawn(engine, messages, seed):
    """One turn, drawn alone."""
    request = Request((0, 0, 0), "p:1", messages, engine.encode(messages), seed)
    ((completion,),) = engine.complete([request], ())
    return completion


def test_a_reward_model_scores_the_ids_that_were_drawn(inputs, tmp_path):
    config = configure(inputs, reward=inputs / "judge", limit=2)
    result = run_generate(config, RunOptions(tmp_path / "out"))
    model, engine = RewardModel.from_dir(inputs / "judge"), local.SamplerEngine.load_for(config)
    for row in rows_of(result):
        drawn = redrawn(engine, row["prompt"], row["seed"])
        expected = model.score([engine.encode(row["prompt"])], [drawn.ids]).item()
        assert row["reward"] == pytest.approx(expected, abs=1e-4)
    manifest = json.loads((result.out / "gemma2.json").read_text())
    assert [parent["role"] for parent in manifest["parents"]] == ["teacher", "reward"]


def test_a_misspelt_reward_function_shows_before_anything_is_drawn(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "decode", None)
    with pytest.raises(UsageError, match="has no 'lenght_of'"):
        run_generate(configure(inputs, reward_fn=f"{__name__}:lenght_of"), RunOptions(tmp_path / "out"))


def test_conversations_hold_both_sides_and_the_columns_of_their_prompt(inputs, tmp_path):
    result = run_generate(configure(inputs, turns=3, system="Be kind.", limit=6), RunOptions(tmp_path / "out"))
    rows = rows_of(result)
    assert {row["turns"] for row in rows} >= {1, 3}
    for row in rows:
        roles = ["system"] + ["user", "assistant"] * row["turns"]
        assert [message["role"] for message in row["messages"]] == roles and "prompt" not in row
        assert row["messages"][:2] == [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": PROMPTS[row["id"]]["prompt"]},
        ]
        assert all(message["content"] for message in row["messages"][1::2])
    assert len(read_conversations(result.out)) == len(rows) == 12
    short = sum(row["turns"] < 3 and row["finish_reason"] == "stop" for row in rows)
    assert result.summary["shortened"] == short > 0


def test_a_later_turn_is_drawn_from_the_conversation_so_far(inputs, tmp_path):
    config = configure(inputs, turns=2, n=1, limit=6)
    whole = [row for row in rows_of(run_generate(config, RunOptions(tmp_path / "out"))) if row["turns"] == 2]
    engine = local.SamplerEngine.load_for(config)
    assert whole
    for row in whole:
        drawn = redrawn(engine, row["messages"][:-1], derived_seed(row["seed"], 2))
        assert drawn.text == row["messages"][-1]["content"]


def test_overlong_prompts_are_an_error_with_their_line_or_dropped_and_counted(inputs, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a"}, {"prompt": "b " * 9000}, {"prompt": "c"}]
    prompts.write_bytes(b"".join(map(to_line, rows)))
    window = load_policy(inputs / "teacher")[0].config.max_position_embeddings - 24
    message = rf"prompts\.jsonl:2: \d+ tokens, where {window} and the completion fit"
    with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
        patch.setattr(local, "decode", None)
        run_generate(configure(inputs, prompts=prompts), RunOptions(tmp_path / "out"))
    result = run_generate(configure(inputs, prompts=prompts, on_overlong="drop"), RunOptions(tmp_path / "out"))
    assert [row["prompt"][0]["content"] for row in rows_of(result)] == ["a", "a", "c", "c"]
    assert result.summary["dropped"] == {"overlong": 2} and result.summary["completions"] == 6


def test_a_completion_that_fills_the_context_is_refused(inputs, tmp_path):
    with pytest.raises(UsageError, match="--max-new-tokens fills the model's context"):
        run_generate(configure(inputs, max_new_tokens=100_000), RunOptions(tmp_path / "out"))


def test_the_prompt_may_stand_in_another_column_and_rows_hold_one_example_only(inputs, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(
        to_line({"question": "2 + 2?", "answer": "4", "completion": "x", "chosen": "y", "teacher": "z"})
    )
    config = configure(inputs, prompts=prompts, n=1)
    (row,) = rows_of(run_generate(config, RunOptions(tmp_path / "out")))
    assert row["prompt"] == [{"role": "user", "content": "2 + 2?"}] and row["answer"] == "4"
    assert row["completion"] != "x" and "chosen" not in row and row["teacher"] == "teacher"


def test_shards_hold_as_many_rows_as_asked(inputs, tmp_path):
    out = run_generate(configure(inputs, shard_rows=10), RunOptions(tmp_path / "out")).out
    assert [content.count(b"\n") for content in bytes_of(out).values()] == [10, 10, 4]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"best": 1}, "--best needs --reward"),
        ({"best": 3, "n": 2, "reward_fn": "m:f"}, "--best 3 of --n 2"),
        ({"reward_fn": "m:f", "reward_weights": (1, 2)}, "2 weights for 1 terms"),
        ({"engine": "openai", "price_in": 1.0}, "both --price-in and --price-out"),
        ({"engine": "openai", "base_url": "ftp://x/v1"}, "is not an http address"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, words):
    with pytest.raises(UsageError, match=words):
        resolve(GenerateConfig, flags={"teacher": "t", "prompts": "p", **fields})


@pytest.mark.parametrize("url", ["https://me:hunter2@host/v1", "https://host/v1?api_key=hunter2"])
def test_an_address_that_holds_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(UsageError, match="holds credentials") as raised:
        resolve(GenerateConfig, flags={"teacher": "t", "prompts": "p", "engine": "openai", "base_url": url})
    assert "hunter2" not in str(raised.value)
