"""The two files between a run and a watcher: written by the one, read by the other, in no output."""

import json

import pytest

from gemma2.core.errors import GuardStop
from gemma2.posttrain.runs.live import LiveRecord, ask_to_end, clear_live, read_live, take_alert


def test_the_record_says_how_far_the_run_is(tmp_path):
    record = LiveRecord(tmp_path, "RL")
    record.begin(3, 9)
    found = read_live(tmp_path)
    assert {name: found[name] for name in ("label", "step", "steps", "error")} == {
        "label": "RL", "step": 3, "steps": 9, "error": None,
    }  # fmt: skip
    record.advance(9)
    assert (read_live(tmp_path)["step"], read_live(tmp_path)["times"][-1][1]) == (9, 9)


def test_times_are_few(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("gemma2.posttrain.runs.live.time.time", lambda: float(next(clock)))
    record = LiveRecord(tmp_path, "RL")
    record.begin(0, 500)
    for step in range(1, 501):
        record.advance(step)
    times = read_live(tmp_path)["times"]
    assert len(times) == 32 and times[-1][1] == 500 and times == sorted(times)


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [(GuardStop("NaN", "lower it"), "NaN; lower it", 3), (KeyboardInterrupt(), "keyboardinterrupt", None),
     (ValueError("x"), "ValueError('x')", None), (None, None, None)],
)  # fmt: skip
def test_the_end_is_recorded(tmp_path, error, said, code):
    record = LiveRecord(tmp_path, "RL")
    record.begin(0, 5)
    record.end(error)
    found = read_live(tmp_path)
    assert (found["error"], found["exit_code"]) == (said, code)


def test_a_disk_that_refuses_the_record_does_not_end_the_run(tmp_path):
    record = LiveRecord(tmp_path / "missing", "RL")
    record.begin(0, 5)
    record.advance(5)
    assert read_live(tmp_path / "missing") == {}


def test_an_alert_is_taken_once(tmp_path):
    assert take_alert(tmp_path) is None
    ask_to_end(tmp_path, "kl 21.3 > 20")
    assert take_alert(tmp_path) == "kl 21.3 > 20"
    assert take_alert(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"said": null}', "\x00"])
def test_an_alert_that_says_nothing_is_one(tmp_path, text):
    (tmp_path / ".alert.json").write_text(text)
    assert take_alert(tmp_path) == "no reason is given"


def test_what_an_alert_says_is_safe_to_show(tmp_path):
    ask_to_end(tmp_path, "kl \x1b[2J\n" + "x" * 10_000)
    said = take_alert(tmp_path)
    assert said.isprintable() and len(said) <= 200


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_a_record_that_cannot_be_read_is_empty(tmp_path, text):
    (tmp_path / ".live.json").write_text(text)
    assert read_live(tmp_path) == {}


def test_nothing_of_them_is_left(tmp_path):
    LiveRecord(tmp_path, "RL").begin(0, 5)
    ask_to_end(tmp_path, "x")
    (tmp_path / ".live.json.tmp").write_text(json.dumps({}))
    clear_live(tmp_path)
    assert [*tmp_path.iterdir()] == []
