"""A journal keeps every whole record, whatever happened to its end."""

from __future__ import annotations

import os

import pytest

from gemma2.core.errors import InputError
from gemma2.posttrain.generation.journal import Journal

RECORDS = [{"key": [i, 0, 0], "text": "ä\u2028\n" * i} for i in range(5)]


@pytest.fixture
def path(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        for record in RECORDS:
            journal.append([record])
    return tmp_path / "j.jsonl"


def test_records_come_back_in_order(path):
    with Journal(path) as journal:
        assert list(journal.records()) == RECORDS


def test_a_file_cut_at_any_byte_keeps_the_records_before_and_goes_on(path):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        with Journal(path) as journal:
            assert list(journal.records()) == RECORDS[:kept]
            journal.append(RECORDS[kept:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"\0" * 30, b"\0" * 30 + b"\n", b"7\n", b"\xff\xfe{}\n", b'{"key": 1\n{"a": 2}\n'])
def test_what_a_power_cut_leaves_at_the_end_is_dropped(path, damage):
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    with Journal(path) as journal:
        assert list(journal.records()) == RECORDS
    assert path.read_bytes() == whole


@pytest.mark.parametrize("old, new", [(b"\xc3\xa4", b"\xc3\xa5"), (b'"text"', b'"tixt"'), (b"}", b"]"), (b"\n", b" ")])
def test_a_record_that_rotted_in_front_of_others_is_an_error(path, old, new):
    whole = path.read_bytes()
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(InputError, match=r"j\.jsonl:[12] is damaged, and records follow it; start over with --force"):
        Journal(path)
    assert path.read_bytes() == whole.replace(old, new, 1)


def test_a_last_record_that_rotted_is_written_again(path):
    whole = path.read_bytes()
    last = whole.rindex(b'{"key"')
    path.write_bytes(whole[:last] + whole[last:].replace(b"text", b"tixt"))
    with Journal(path) as journal:
        assert list(journal.records()) == RECORDS[:-1]


def test_a_journal_without_check_sums_is_refused(path):
    path.write_bytes(b'{"key": [0, 0, 0], "text": ""}\n')
    with pytest.raises(InputError, match="no record with its check sum"):
        Journal(path)


def test_records_that_are_appended_meanwhile_do_not_appear(path):
    with Journal(path) as journal:
        reading = journal.records()
        next(reading)
        journal.append([{"late": True}])
        assert list(reading) == RECORDS[1:]
        assert list(journal.records())[-1] == {"late": True}


def test_a_record_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_size))
    with Journal(tmp_path / "j.jsonl") as journal:
        assert not (tmp_path / "j.jsonl").exists()
        journal.append([{"a": 1}, {"b": 2}])
        assert seen[-1] == journal.size == (tmp_path / "j.jsonl").stat().st_size
        before = len(seen)
        journal.append([])
        assert len(seen) == before
