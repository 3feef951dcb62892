"""The worst forms of a private dialect stay out of code, messages and pages (CONTRIBUTING.md, "Words")."""

import re
from pathlib import Path

import pytest
from processes import ROOT

FORMS = {
    "is none": r"\b(?:is|are|was|be) none\b",
    "is no X": r"(?<![Tt]here )\b(?:is|are) no (?!(?:more|less|later|earlier|lower|higher|longer|closer)\b)[a-z]+",
    "told": r"\btold\b(?! apart)",
    "mend": r"\bmend(?:s|ed|ing)?\b",
    "beside": r"\bbeside\b",
    "of its own": r"\bof (?:its|their) own\b",
    "stands for lies": r"\blies (?:in|at|on|beside|next|there|below|above|where|between)\b",
}  # fmt: skip
FOLDERS = ("cli", "posttrain", "merging", "core", "configs", "docs")
HISTORY = {"log.md", "CHANGELOG.md"}
QUOTED = {"CONTRIBUTING.md", "real.md", "tasks.py"}  # the list of the forms; answers of models; an exercise
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".yaml", ".j2") and path.name not in HISTORY
]
FILES += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]


def found_in(path: Path) -> list[str]:
    """`file:line: the form`, except in tables and exercises that quote."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [
        f"{path.relative_to(ROOT)}:{number}: {name}: {line.strip()[:90]}"
        for number, line in lines
        for name, form in FORMS.items()
        if re.search(form, line) and not (path.name in QUOTED and line.lstrip().startswith(("| ", '"{s} lies')))
    ]


def test_the_worst_forms_do_not_come_back():
    assert [line for path in FILES for line in found_in(path)] == []


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The error of a key that is none.", "is none"),
        ("a path that is no directory", "is no X"),
        ("what it was told", "told"),
        ("what, where and how to mend", "mend"),
        ("the file beside it", "beside"),
        ("a process of its own", "of its own"),
        ("the tensor lies at the end", "stands for lies"),
        ("There is no model here", ""),
        ("it is no longer needed", ""),
    ],
)
def test_a_form_is_seen_and_plain_english_is_not(text, form):
    seen = [name for name, pattern in FORMS.items() if re.search(pattern, text)]
    assert seen == ([form] if form else [])
