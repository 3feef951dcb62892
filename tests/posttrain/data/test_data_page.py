"""docs/data.md: every shape on the page is read, and becomes what the page says."""

from __future__ import annotations

import json
import re

import pytest
from processes import ROOT
from row_reading import plain_reading

from gemma2.posttrain.data.own_form import kind_of_rows, own_form, rows_of_kind

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(jsonl|csv)\n([^`]*)```\n\n```becomes\n([^`]*)```", PAGE)
OWN = re.findall(r"```jsonl\n([^`]*)```", PAGE[: PAGE.index("## Shapes that become conversations")])


def converted(path):
    reading = plain_reading()
    return [own_form(row) for row in rows_of_kind(path, kind_of_rows(path, reading), reading)]


@pytest.mark.parametrize(("form", "text", "becomes"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_a_shape_becomes_what_the_page_says(tmp_path, form, text, becomes):
    path = tmp_path / f"rows.{form}"
    path.write_text(text, encoding="utf-8")
    assert converted(path) == [json.loads(line) for line in becomes.splitlines()]


@pytest.mark.parametrize("text", OWN, ids=range(len(OWN)))
def test_the_own_form_stays_as_it_is(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    assert converted(path) == [json.loads(line) for line in text.splitlines()]


def test_the_page_has_its_examples():
    assert len(EXAMPLES) >= 10 and len(OWN) == 3
