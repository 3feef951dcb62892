"""`gemma2 filter` end to end: what is written, in which order, whatever the number of processes and interruptions."""

import json
import signal

import pytest
from processes import finish, start
from samples import row
from waiting import wait_for

from gemma2.core.errors import InputError
from gemma2.posttrain.data.sources import iter_rows
from gemma2.posttrain.filters import runner
from gemma2.posttrain.filters.runner import run_filter
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import FilterConfig


def prose(seed, words=60):
    """A text per seed: no two seeds share three consecutive words."""
    return " ".join(f"s{seed}w{i}" for i in range(words))


def mixed_rows(count):
    """Rows of which every kind of trouble has a few."""
    kinds = [
        lambda i: row(prose(i), f"Question {i}?"),
        lambda i: row(prose(i), f"Question {i}?", finish_reason="length"),
        lambda i: row(f"Write to jane{i}.doe@gmail.com. {prose(i)}"),
        lambda i: row(f"I am ChatGPT. {prose(i)}"),
        lambda i: row(prose(i - 4), f"Question {i - 4}?"),
        lambda i: row(prose(i - 5) + " more", f"Question {i - 5}?"),
        lambda i: row("I'm sorry, but I can't help with that.", f"Question {i}?"),
        lambda i: row("", f"Question {i}?"),
    ]
    return [kinds[i % len(kinds)](i) for i in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return path


def run(data, out, progress=None, resume=False, **settings):
    settings = {"workers": 1} | settings
    arguments = [FilterConfig(data=data, **settings), RunOptions(out, resume=resume)]
    return run_filter(*arguments, *([progress] if progress else [])).summary


def output(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != "gemma2.json"}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(runner, "CHUNK", 16)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", mixed_rows(80))


def test_kept_rows_are_unchanged_and_in_order_and_dropped_ones_have_a_reason(data, tmp_path):
    summary = run(data, tmp_path / "out", max_refusal_share=0.2, shard_rows=10)
    rows = lines(data)
    kept = [one.columns for one in iter_rows(tmp_path / "out")]
    dropped = lines(tmp_path / "out" / "dropped.jsonl")
    reasons = ["", "truncated", "personal", "identity", "duplicate", "near-duplicate", "refusal", "empty"]
    # 10 answers: 2 / (10 + 2) is the largest share of refusals up to 0.2; the seed says which of the 10 stay.
    assert summary["dropped"] == {name: 8 if name == "refusal" else 10 for name in reasons if name} | {
        "turns": 0,
        "repetition": 0,
    }
    refusals = [i for i in range(6, 80, 8) if rows[i] in kept]
    stays = sorted([*range(0, 80, 8), *refusals])
    assert summary["kept_refusals"] == len(refusals) == 2
    assert kept == [rows[i] for i in stays]
    assert [one.pop("reason") for one in dropped] == [reasons[i % 8] for i in range(80) if i not in stays]
    assert all(one.pop("detail") for one in dropped)
    assert dropped == [rows[i] for i in range(80) if i not in stays]
    assert (summary["rows"], summary["kept"], summary["share"]) == (80, 12, 0.15)
    assert sorted(path.name for path in (tmp_path / "out").glob("data-*")) == [
        "data-00000-of-00002.jsonl",
        "data-00001-of-00002.jsonl",
    ]


def test_details_point_to_the_row_that_stays_and_hide_personal_data(data, tmp_path):
    run(data, tmp_path / "out")
    details = {one["reason"]: one["detail"] for one in reversed(lines(tmp_path / "out" / "dropped.jsonl"))}
    assert details["duplicate"] == "the same as data.jsonl:1"
    assert details["near-duplicate"].endswith("like data.jsonl:1")
    assert details["personal"] == "e-mail address"
    assert "jane" not in (tmp_path / "out" / "gemma2.json").read_text()


@pytest.mark.usefixtures("small_chunks")
def test_the_number_of_processes_changes_nothing(data, tmp_path):
    one = run(data, tmp_path / "one", workers=1, max_refusal_share=0.1, keep=("refusal",))
    two = run(data, tmp_path / "two", workers=2, max_refusal_share=0.1, keep=("refusal",))
    assert one == two
    assert output(tmp_path / "one") == output(tmp_path / "two")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("after", [0, 16, 48, 80, 100])
def test_interrupted_and_resumed_is_uninterrupted(data, tmp_path, interrupting, monkeypatch, after):
    settings = {"max_refusal_share": 0.1, "on_bad_row": "skip"}
    with data.open("a") as file:
        file.write("no json\n")
        file.write(json.dumps({"prompt": "no completion"}) + "\n")
    whole = run(data, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out", interrupting(after), **settings)
    chunks = len(list((tmp_path / ".out.partial" / "checkpoints").glob("chunk-*")))
    assert chunks >= min(after // 16, 6)
    with (tmp_path / ".out.partial" / "checkpoints" / "shingles.u32").open("ab") as file:
        file.write(b"torn")  # a chunk whose shingles were written and whose findings were not
    scanned = []
    scan = runner.scanned
    monkeypatch.setattr(runner, "scanned", lambda chunks, *rest: scan((scanned.append(c) or c for c in chunks), *rest))
    assert run(data, tmp_path / "out", resume=True, **settings) == whole
    assert len(scanned) == 6 - chunks
    assert output(tmp_path / "out") == output(tmp_path / "whole")


KILLED = """
from pathlib import Path
from gemma2.posttrain.filters import runner
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import FilterConfig
runner.CHUNK = 16
data, out, resume = sys.argv[1:4]
runner.run_filter(FilterConfig(data=data, workers=2), RunOptions(Path(out), resume=resume == "yes"))
"""


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(tmp_path):
    data = write(tmp_path / "data.jsonl", mixed_rows(1000))
    assert finish(start(KILLED, data, tmp_path / "whole", "no"))[0] == 0
    checkpoints = tmp_path / ".out.partial" / "checkpoints"
    for chunks in (2, 20, 45):
        process = start(KILLED, data, tmp_path / "out", "yes" if chunks > 2 else "no")
        wait_for(lambda: len(list(checkpoints.glob("chunk-*"))) >= chunks or process.poll() is not None)  # noqa: B023
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert finish(start(KILLED, data, tmp_path / "out", "yes"))[0] == 0
    assert output(tmp_path / "out") == output(tmp_path / "whole")


# --- bad rows and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"data.jsonl:2: not JSON"),
        ("[1]", r"data.jsonl:2: a list, not a JSON object"),
        ('{"prompt": "x"}', r"data.jsonl:2: no 'completion'"),
        ('{"prompt": "x", "completion": 3}', r"data.jsonl:2: 'completion' is the number 3"),
        ('{"text": "x"}', r"data.jsonl:2: 'text' is one text, without turns"),
        ('{"messages": [{"role": "user"}]}', r"data.jsonl:2: 'messages\[0\]' has no 'content'"),
    ],
)
def test_a_bad_row_is_an_error_with_file_and_line_or_is_left_out_and_counted(tmp_path, line, said, interrupting):
    data = write(tmp_path / "data.jsonl", [row("One.")])
    with data.open("a") as file:
        file.write(line + "\n" + json.dumps(row("Two.")) + "\n")
    with pytest.raises(InputError, match=said):
        run(data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    progress = interrupting()
    summary = run(data, tmp_path / "out", progress, on_bad_row="skip")
    assert (summary["rows"], summary["kept"], summary["bad_rows"]) == (2, 2, 1)
    assert len(progress.warnings) == 1 and progress.warnings[0].startswith(
        "rows left out: 1 (all in skipped.jsonl), the first: "
    )
    assert "data.jsonl:2" in progress.warnings[0]


def test_filters_are_chosen_and_left_out(data, tmp_path):
    assert list(run(data, tmp_path / "a", filters=("duplicate", "empty"))["dropped"]) == ["empty", "duplicate"]
    summary = run(data, tmp_path / "b", skip=("personal", "near-duplicate"))
    assert {"personal", "near-duplicate", "length", "refusal"}.isdisjoint(summary["dropped"])
    with pytest.raises(ValueError, match="--filters language does nothing by itself; give --language"):
        run(data, tmp_path / "c", filters=("language",))


def test_columns_named_like_ours_stay_in_the_dropped_row(tmp_path):
    data = write(tmp_path / "data.jsonl", [row("", reason="mine", other=1), row("Yes.", detail="kept")])
    run(data, tmp_path / "out")
    dropped = lines(tmp_path / "out" / "dropped.jsonl")
    assert [(one["reason"], one["reason_of_row"], one["other"]) for one in dropped] == [("empty", "mine", 1)]
    assert lines(tmp_path / "out" / "data-00000-of-00001.jsonl") == [row("Yes.", detail="kept")]


def test_every_reason_is_listed_on_request(tmp_path):
    data = write(tmp_path / "data.jsonl", [row("I am ChatGPT, jane.doe@gmail.com", finish_reason="length")])
    run(data, tmp_path / "out", all_reasons=True)
    (dropped,) = lines(tmp_path / "out" / "dropped.jsonl")
    assert [one["reason"] for one in dropped["reasons"]] == ["truncated", "personal", "identity"]
    assert dropped["reason"] == "truncated"


def test_a_run_that_drops_all_rows_warns(tmp_path, interrupting):
    progress = interrupting()
    summary = run(write(tmp_path / "data.jsonl", [row("")]), tmp_path / "out", progress)
    assert summary["kept"] == 0 and progress.warnings == ["all 1 rows were dropped; see the reasons in dropped.jsonl"]


def test_subsets_are_counted_among_the_rows_that_stay(tmp_path):
    rows = [row("I'm not sure."), row("Yes, it is so."), row("I don't know."), row("I'm not sure, jane.doe@gmail.com")]
    data = write(tmp_path / "data.jsonl", rows)
    summary = run(data, tmp_path / "out", keep=("hedging", "refusal"), min_words=4)
    assert summary["kept_subsets"] == {"hedging": 1, "refusal": 1}
    assert summary["kept"] == 3


def test_short_templated_questions_are_not_near_duplicates_and_held_out_ones_are_found(tmp_path):
    letters = "abcdefgh"
    asked = [f"Put in order: {a} {b} {c}" for a in letters for b in letters for c in letters]
    rows = [row(f"In order they are {' '.join(sorted(one[-5:].split()))}.", one) for one in asked]
    data = write(tmp_path / "data.jsonl", [*rows, rows[5]])
    held_out = write(tmp_path / "heldout.jsonl", [{"prompt": one, "answer": "a"} for one in asked[::100]])
    summary = run(data, tmp_path / "out", decontaminate=(held_out,))
    assert {name: n for name, n in summary["dropped"].items() if n} == {"contaminated": 6, "duplicate": 1}


def test_every_split_of_an_evaluation_set_counts(tmp_path):
    asked = [f"What is the {place} word of this question of more than thirteen words, as a test?" for place in "abc"]
    data = write(tmp_path / "data.jsonl", [row("One.", question) for question in [*asked, "Something else?"]])
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    for name, question in zip(("train", "test", "deep/part"), asked, strict=True):
        write(folder / f"{name}.jsonl", [{"question": question}])
    summary = run(data, tmp_path / "out", decontaminate=[folder], filters=["contaminated"])
    assert (summary["kept"], summary["dropped"]["contaminated"]) == (1, 3)
    digests = json.loads((tmp_path / "out" / "gemma2.json").read_text())["data"]
    assert len(digests) == 4
