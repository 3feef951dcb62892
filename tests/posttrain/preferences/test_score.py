"""`reward score` and `reward eval`: every kind of row, invariance, resume, tables, and what is refused."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from processes import MAIN, gemma2, start
from transformers import AutoModelForSequenceClassification

from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.sources import to_line
from gemma2.posttrain.preferences import score as score_module
from gemma2.posttrain.preferences.reward_eval import run_reward_eval
from gemma2.posttrain.preferences.score import run_score
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import RewardEvalConfig, RewardScoreConfig
from gemma2.posttrain.schemas.config import resolve
from gemma2.posttrain.tiny.networks import save_random, tiny_tokenizer

USER, MODEL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
ROWS = [
    {"prompt": "What is 1?", "completion": "one", "id": 7},
    {"messages": [USER, MODEL, USER, {"role": "assistant", "content": "So it is."}]},
    {"prompt": [USER], "completion": [MODEL], "finish_reason": "length"},
    {"prompt": "What is 2?", "chosen": "two", "rejected": "three", "source": "a", "score_chosen": 9},
    {"chosen": [USER, MODEL], "rejected": [USER, {"role": "assistant", "content": "x" * 30}], "source": "b"},
]


def write(path, rows):
    path.write_bytes(b"".join(map(to_line, rows)))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    write(folder / "rows.jsonl", ROWS)
    write(
        folder / "pairs.jsonl",
        [
            {"prompt": f"What is {i}?", "chosen": f"it is {i}", "rejected": "no " * (i % 4), "source": "ab"[i % 2]}
            for i in range(24)
        ],
    )
    save_random(folder / "model", kind="reward")
    save_random(folder / "other", kind="reward", seed=1)
    return folder


def scored(inputs, out, data="rows.jsonl", progress=SILENT, resume=False, **fields):
    config = RewardScoreConfig(model=inputs / "model", data=inputs / data, **fields)
    result = run_score(config, RunOptions(out, resume=resume), progress)
    return [
        json.loads(line) for file in sorted(out.glob("data-*.jsonl")) for line in file.read_text().splitlines()
    ], result


def reference(inputs, messages, truncated=False):
    """The score by transformers' own forward, one row at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(inputs / "model", attn_implementation="eager")
    ids, _ = ChatFormat(tiny_tokenizer()).example(messages, "eot", truncated)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item()


def test_every_kind_of_row_gets_its_score_and_keeps_its_columns(inputs, tmp_path):
    rows, result = scored(inputs, tmp_path / "out")
    assert [{k: v for k, v in row.items() if k in given} for row, given in zip(rows, ROWS, strict=True)] == ROWS
    assert [sorted(row.keys() - given.keys()) for row, given in zip(rows, ROWS, strict=True)] == [
        *[["score"]] * 3,
        *[["chosen_score", "rejected_score"]] * 2,
    ]
    ask, tell = [{"role": "user", "content": "What is 1?"}], [{"role": "assistant", "content": "one"}]
    assert rows[0]["score"] == pytest.approx(reference(inputs, ask + tell), abs=1e-5)
    assert rows[1]["score"] == pytest.approx(reference(inputs, ROWS[1]["messages"]), abs=1e-5)
    assert rows[2]["score"] == pytest.approx(reference(inputs, [USER, MODEL], truncated=True), abs=1e-5)
    assert rows[4]["chosen_score"] == pytest.approx(reference(inputs, [USER, MODEL]), abs=1e-5)
    assert result.summary["rows"] == 5 and result.summary["pairs"] == 2


@pytest.mark.parametrize("fields", [{"batch_size": 1}, {"batch_size": 3}])
def test_scores_do_not_depend_on_batch_size_or_order(inputs, tmp_path, fields):
    whole, _ = scored(inputs, tmp_path / "a")
    other, _ = scored(inputs, tmp_path / "b", **fields)
    write(tmp_path / "turned.jsonl", ROWS[::-1])
    turned, _ = scored(inputs, tmp_path / "c", data=tmp_path / "turned.jsonl", **fields)
    for one, two, three in zip(whole, other, turned[::-1], strict=True):
        for name in one.keys() & {"score", "chosen_score", "rejected_score"}:
            assert two[name] == pytest.approx(one[name], abs=1e-5) == three[name]


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_the_tokenizer_s_padding_side(inputs, tmp_path, side):
    from shutil import copytree

    copytree(inputs / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text()) | {"padding_side": side}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    config = RewardScoreConfig(model=tmp_path / "model", data=inputs / "rows.jsonl")
    run_score(config, RunOptions(tmp_path / "out"))
    found = (tmp_path / "out/data-00000-of-00001.jsonl").read_bytes()
    scored(inputs, tmp_path / "whole")
    assert found == (tmp_path / "whole/data-00000-of-00001.jsonl").read_bytes()


def test_rows_that_are_too_long_have_no_score_and_are_counted(inputs, tmp_path, interrupting):
    progress = interrupting()
    rows, result = scored(inputs, tmp_path / "out", progress=progress, max_length=20)
    assert rows[4]["rejected_score"] is None and rows[0]["score"] is not None
    assert result.summary["overlong"] > 0 and "too long for the model" in progress.warnings[0]


def test_existing_scores_are_replaced_with_a_warning_or_kept_under_another_name(inputs, tmp_path, interrupting):
    write(tmp_path / "rows.jsonl", [ROWS[0] | {"score": 123}])
    progress = interrupting()
    rows, _ = scored(inputs, tmp_path / "a", data=tmp_path / "rows.jsonl", progress=progress)
    assert rows[0]["score"] != 123 and "1 of 1 rows have scores of that name" in progress.warnings[0]
    rows, _ = scored(inputs, tmp_path / "b", data=tmp_path / "rows.jsonl", column="rm")
    assert rows[0]["score"] == 123 and "rm" in rows[0]


@pytest.mark.parametrize("column", ["prompt", "completion", "messages", "chosen", "rejected", "truncated"])
def test_a_score_column_never_replaces_a_conversation(inputs, column):
    given = {"model": inputs / "model", "data": inputs / "rows.jsonl", "column": column}
    with pytest.raises(UsageError, match=f"--column {column} is a column that scores are computed from; give"):
        resolve(RewardScoreConfig, flags=given)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, "2: no 'completion'"),
        ({"messages": [USER]}, "2: the last message is not the model's"),
        ({"prompt": "a", "chosen": "b"}, "2: no 'rejected'"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_before_any_is(inputs, tmp_path, row, words):
    write(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(InputError, match=words):
        scored(inputs, tmp_path / "out", data=tmp_path / "rows.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_an_interrupted_job_continues_at_the_next_row(inputs, tmp_path, monkeypatch, interrupting):
    monkeypatch.setattr(score_module, "CHUNK", 2)
    whole, result = scored(inputs, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        scored(inputs, tmp_path / "out", progress=interrupting(3))
    asked, score = [], score_module.score_rows
    monkeypatch.setattr(
        score_module,
        "score_rows",
        lambda model, rows, *rest, **more: asked.append(rows) or score(model, rows, *rest, **more),
    )
    resumed, again = scored(inputs, tmp_path / "out", resume=True)
    assert resumed == whole and again.summary == result.summary and len(asked) == 1


@pytest.mark.slow
def test_a_killed_job_resumes_to_the_same_bytes(inputs, tmp_path):
    write(tmp_path / "rows.jsonl", [ROWS[i % 5] | {"number": i} for i in range(1600)])
    command = ("reward", "score", inputs / "model", "--data", tmp_path / "rows.jsonl", "--quiet", "--batch-size", 8)
    assert gemma2(*command, "--out", tmp_path / "whole")[0] == 0
    process = start(MAIN, *command, "--out", tmp_path / "out")
    journal = tmp_path / ".out.partial/checkpoints/scores.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert gemma2(*command, "--out", tmp_path / "out", "--resume")[0] == 0
    name = "data-00000-of-00001.jsonl"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# -- reward eval ----------------------------------------------------------------------------------------------------


def evaluated(inputs, *models, data="pairs.jsonl", **fields):
    config = RewardEvalConfig(models=[inputs / name for name in models], data=inputs / data, **fields)
    return run_reward_eval(config)


def test_an_evaluation_agrees_with_the_scores(inputs, tmp_path):
    rows, _ = scored(inputs, tmp_path / "out", data="pairs.jsonl")
    (found,) = evaluated(inputs, "model")["models"]
    margins = [row["chosen_score"] - row["rejected_score"] for row in rows]
    assert found["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))
    assert found["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert sum(row["pairs"] for row in found["reliability"]) == len(margins)


def test_several_models_are_compared_and_sources_have_separate_figures(inputs):
    found = evaluated(inputs, "model", "other", by="source")
    first, second = found["models"]
    assert first["accuracy"] != second["accuracy"] or first["loss"] != second["loss"]
    assert list(first["by"]) == ["a", "b"] and first["by"]["a"]["pairs"] == 12
    mean = sum(first["by"][name]["accuracy"] * first["by"][name]["pairs"] for name in "ab") / 24
    assert mean == pytest.approx(first["accuracy"])
    alone = evaluated(inputs, "other")["models"][0]
    assert alone["accuracy"] == second["accuracy"]


def test_a_missing_column_is_named(inputs):
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: no 'sauce' for --by; give one of the columns: source"):
        evaluated(inputs, "model", by="sauce")


def test_a_model_whose_scores_are_not_finite_is_named(inputs, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(inputs / "model")
    with torch.no_grad():
        model.score.weight.fill_(3e38)  # finite; its products are not
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(GuardStop, match=r"broken gives a score that is NaN or infinite"):
        evaluated(inputs, tmp_path / "broken")


def test_the_command_prints_tables_and_one_json_document(inputs, capsys, monkeypatch):
    from gemma2.cli.main import run

    line = [
        "reward",
        "eval",
        *(str(inputs / name) for name in ("model", "other")),
        "--data",
        str(inputs / "pairs.jsonl"),
    ]
    assert run([*line, "--by", "source", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == ["figure", "model", "other"]
    assert "±" in text and "reliability of other" in text and "accuracy by value" in text
    assert run([*line, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [model["model"].rpartition("/")[2] for model in document["models"]] == ["model", "other"]
    assert run(["reward", "eval", "--data", str(inputs / "pairs.jsonl")]) == 2
    assert "models" in capsys.readouterr().err
