"""Mistakes in YAML files that users write: file, line, column and a fix that makes the file readable."""

import re

import pytest

from gemma2.core.errors import Gemma2Error
from gemma2.core.yaml_files import place_of, read_documents, text_at


@pytest.mark.parametrize(
    ("text", "place", "said", "fixed"),
    [
        ("a: [1\n", "2:1", "close the list", "a: [1]\n"),
        ("a: {b: 1\n", "2:1", "close the mapping", "a: {b: 1}\n"),
        ("a: 'x\n", "2:1", "close the quotes", "a: 'x'\n"),
        ("x: 1\na: b: c\n", "2:5", "in quotes", "x: 1\na: 'b: c'\n"),
        ("a:\n\tb: 1\n", "2:1", "with spaces", "a:\n  b: 1\n"),
        (" a: 1\nb: 2\n", "2:1", "in one column", " a: 1\n b: 2\n"),
        ("a: 1\nb: 2\na: 3\n", "3:1", "first in line 1; keep one", "b: 2\na: 3\n"),
        ("a: @x\n", "1:4", "in quotes", "a: '@x'\n"),
        ("a: %x\n", "1:4", "in quotes", "a: '%x'\n"),
        ("a: *x\n", "1:4", "in quotes", "a: '*x'\n"),
        ("b: 1\nd: 2024-13-45\n", "2:4", "in quotes", "b: 1\nd: '2024-13-45'\n"),
        ("a: !!python/object:os.x {}\n", "1:4", "leave out the tag", "a: {}\n"),
        ("b: 1\na: \x01\n", "2:4", "remove it", "b: 1\na: \n"),
        ("key:value\n", "1:1", "a blank after each colon", "key: value\n"),
        ("- 1\n", "1:1", "holds a list", "a: 1\n"),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_the_fix_makes_it_readable(tmp_path, text, place, said, fixed):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(Gemma2Error) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:{place} ")
    assert caught.value.where == f"{path}:{place}"
    assert said in str(caught.value)
    assert not re.search(r"\n|<unicode string>", str(caught.value))
    path.write_text(fixed)
    assert isinstance(read_documents(path)[0], dict)


FILE = """\
# a comment
base: &base {rate: 1, steps: [1,
  2]}
own:
  <<: *base
  rate: ${vars.x}
sft:
  options: {a-b: 3}
---
second: 2
"""


@pytest.mark.parametrize(
    ("keys", "document", "value", "key"),
    [
        (("base", "steps", 1), 0, "3:3", "3:3"),
        (("own", "rate"), 0, "6:9", "6:3"),
        (("own", "steps", 0), 0, "2:31", "2:31"),  # brought by <<
        (("sft/seed-1", "options", "a_b"), 0, "8:18", "8:13"),  # a copy of a stage; a key in the spelling of flags
        (("sft", "options", "missing"), 0, "8:12", "8:3"),  # the place above
        (("second",), 1, "10:9", "10:1"),
        ((), 0, "2:1", "2:1"),
    ],
)
def test_a_key_is_found_at_its_place(tmp_path, keys, document, value, key):
    path = tmp_path / "r.yaml"
    path.write_text(FILE)
    assert place_of(path, keys, document) == f"{path}:{value}"
    assert place_of(path, keys, document, of_key=True) == f"{path}:{key}"


def test_a_file_that_cannot_be_read_again_is_named_alone(tmp_path):
    assert place_of(tmp_path / "gone.yaml", ("a",)) == str(tmp_path / "gone.yaml")
    assert text_at(tmp_path / "gone.yaml", ("a",)) == ""
