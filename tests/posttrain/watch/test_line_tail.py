"""Lines come once, in order, whatever happens to the file between two looks."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2.posttrain.watch.line_tail import LineTail


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


def look(tail):
    restarted = tail.restarted()
    return restarted, [row["step"] for row in tail.rows()]


def text(*steps):
    return "".join(json.dumps({"step": step}) + "\n" for step in steps)


def add(file, what):
    with file.open("a") as opened:
        opened.write(what)


def replace(file, what):
    aside = file.with_suffix(".tmp")
    aside.write_text(what)
    aside.replace(file)


def test_each_line_comes_once(file):
    tail = LineTail(file)
    assert look(tail) == (False, [])  # it does not exist yet
    add(file, text(1, 2))
    assert look(tail) == (False, [1, 2])
    assert look(tail) == (False, [])
    add(file, text(3))
    assert look(tail) == (False, [3])


def test_a_torn_line_waits_for_its_end(file):
    tail = LineTail(file)
    add(file, text(1) + '{"st')
    assert look(tail) == (False, [1])
    add(file, 'ep": 2}')
    assert look(tail) == (False, [])
    add(file, "\n" + text(3))
    assert look(tail) == (False, [2, 3])


@pytest.mark.parametrize("again", [(1,), (1, 2), (1, 2, 3, 4)])
def test_after_a_resume_the_lines_come_again(file, again):
    tail = LineTail(file)
    add(file, text(1, 2, 3))
    look(tail)
    replace(file, text(*again))
    assert look(tail) == (True, [*again])
    add(file, text(9))
    assert look(tail) == (False, [9])


def test_a_file_that_was_cut_or_written_anew_in_place_begins_again(file):
    tail = LineTail(file)
    add(file, text(1, 2, 3))
    look(tail)
    os.truncate(file, len(text(1)))
    assert look(tail) == (True, [1])
    file.write_text(text(5, 6, 7))  # the same inode, as long as before or longer
    assert look(tail) == (True, [5, 6, 7])


def test_a_file_that_vanishes_comes_again(file):
    tail = LineTail(file)
    add(file, text(1, 2))
    look(tail)
    file.unlink()
    assert look(tail) == (False, [])
    file.write_text(text(7))
    assert look(tail) == (True, [7])


def test_a_file_that_is_moved_goes_on(file, tmp_path):
    tail = LineTail(file)
    add(file, text(1))
    look(tail)
    tail.path = file.rename(tmp_path / "moved.jsonl")
    add(tail.path, text(2))
    assert look(tail) == (False, [2])


def test_lines_that_are_not_objects_are_counted(file):
    file.write_bytes(b'nonsense\n[1]\n\n\xff\xfe\n{"step": 1}\n' + b"[" * 100_000 + b"\n")
    tail = LineTail(file)
    assert look(tail) == (False, [1])
    assert tail.unreadable == 4


def test_only_what_is_new_is_read(file, monkeypatch):
    add(file, text(*range(5000)))
    tail = LineTail(file)
    look(tail)
    add(file, text(5000))
    parsed = []
    monkeypatch.setattr("gemma2.posttrain.watch.line_tail.json.loads", lambda one: parsed.append(one) or {"step": 0})
    look(tail)
    assert parsed == [b'{"step": 5000}']


@given(st.lists(st.integers(1, 40), max_size=30), st.data())
def test_any_cut_of_the_writing_gives_the_same_lines(tmp_path_factory, sizes, data):
    file = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    whole = text(*range(20)).encode()
    tail, found = LineTail(file), []
    for size in [*sizes, len(whole)]:
        with file.open("ab") as opened:
            opened.write(whole[:size])
        whole = whole[size:]
        if data.draw(st.booleans()) or not whole:
            restarted, steps = look(tail)
            assert not restarted
            found += steps
    assert found == [*range(20)]
