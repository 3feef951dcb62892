"""`gemma2 generate` killed with SIGKILL through the command line, at several points, and continued with --resume."""

from __future__ import annotations

import json
import signal

import pytest
from chat_server import KEY, Server, serving
from processes import MAIN, gemma2, start
from teachers import save_stopping
from waiting import pause, wait_for

from gemma2.posttrain.data.sources import iter_rows, to_line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    save_stopping(folder / "teacher")
    rows = [{"prompt": f"What is {i}?" + " please" * (i % 9), "id": i} for i in range(40)]
    (folder / "prompts.jsonl").write_bytes(b"".join(map(to_line, rows)))
    return folder


def kill_when(journal, records, process):
    """SIGKILL once the journal holds so many records."""

    def there():
        return journal.exists() and journal.read_bytes().count(b"\n") >= records

    wait_for(lambda: there() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended by itself: {err}"


def shards(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("data-*.jsonl"))}


@pytest.mark.parametrize(("turns", "points"), [(1, [1, 30, 79]), (2, [1, 60, 130])])
def test_a_run_that_is_killed_again_and_again_writes_the_same_bytes(place, tmp_path, turns, points):
    words = ["generate", "--teacher", place / "teacher", "--prompts", place / "prompts.jsonl", "--turns", turns]
    words += ["--n", 2, "--batch-size", 4, "--max-new-tokens", 24, "--keep-truncated", "--shard-rows", 30, "--out"]
    code, _, err = gemma2(*words, tmp_path / "whole")
    assert code == 0, err
    journal = tmp_path / ".out.partial" / "checkpoints" / "answers.jsonl"
    for point in points:
        resume = ["--resume"] if point != points[0] else []
        kill_when(journal, point, start(MAIN, *words, tmp_path / "out", *resume))
        assert not (tmp_path / "out").exists()
    code, _, err = gemma2(*words, tmp_path / "out", "--resume")
    assert code == 0, err
    assert shards(tmp_path / "out") == shards(tmp_path / "whole") and len(shards(tmp_path / "out")) == 3


def test_answers_of_a_server_survive_kills_and_are_not_paid_twice(place, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = Server(before=lambda body: pause(0.01 + body["seed"] % 5 / 100))
    journal = tmp_path / ".out.partial" / "checkpoints" / "answers.jsonl"
    with serving(fake) as address:
        words = ["generate", "--engine", "openai", "--teacher", "a/model", "--base-url", address, "--concurrency", 3]
        words += ["--prompts", place / "prompts.jsonl", "--n", 2, "--out", tmp_path / "out"]
        for kill, point in enumerate([5, 25, 60]):
            kill_when(journal, point, start(MAIN, *words, *(["--resume"] if kill else [])))
            answered, asked = len(fake.answered), len(fake.requests)
            saved = {tuple(json.loads(line)["key"]) for line in journal.read_bytes().split(b"\n")[:-1]}
            # What was answered and is not in the journal was on its way when the process died.
            assert answered - len(saved) <= asked - len(saved) <= 3 * (kill + 1)
        code, _, err = gemma2(*words, "--resume")
        assert code == 0, err
    rows = [row.columns for row in iter_rows(tmp_path / "out")]
    assert [(row["id"], row["sample"]) for row in rows] == [(i, k) for i in range(40) for k in range(2)]
    assert len(fake.requests) <= 80 + 3 * 3
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert KEY.encode() not in everything and address.encode() in everything
