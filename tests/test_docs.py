"""The documentation hangs together: docs/index.md names every page, and every relative link has a target."""

import re
import unicodedata
from pathlib import Path

import pytest
from processes import ROOT

INDEX = ROOT / "docs" / "index.md"
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^(?P=fence)[^\n]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)(?:\s+\"[^\"]*\")?\)")
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def prose(path: Path) -> str:
    """A page without its code blocks, and without the brackets in its code spans: no link is in code."""
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", lambda span: re.sub(r"[\[\]()]", "", span[0]), text)


def relative_links(path: Path) -> list[str]:
    targets = [match["target"] for match in LINK.finditer(prose(path))]
    return [target for target in targets if not SCHEME.match(target)]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page; the second of equal ones ends in -1."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", CODE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        kept = (c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LNM")
        slug = "".join(kept).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)


def broken(path: Path) -> list[str]:
    """The relative links of a page without a file, or without the heading that they name."""
    found = []
    for target in relative_links(path):
        place, _, anchor = target.partition("#")
        file = path.parent / place if place else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            found.append(target)
    return found


def test_the_index_links_every_page_of_docs():
    linked = {(INDEX.parent / target.partition("#")[0]).resolve() for target in relative_links(INDEX)}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {page.name for page in linked} == {INDEX.name}


def test_the_readme_leads_to_the_index():
    assert "docs/index.md" in relative_links(ROOT / "README.md")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    assert broken(path) == []


def test_links_without_a_file_or_a_heading_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# `gemma2 merge`: what & why?\n\n## Twice\n\n## Twice\n\n```sh\n# no heading\n```\n")
    page.write_text(
        "# Top\n\n[a](other.md) [b](other.md#twice-1) [c](#top) [d](other.md#gemma2-merge-what--why)\n"
        "[`code`](other.md) [site](https://example.org/missing.md) `[e](in-code.md)`\n\n"
        "```\n[f](in-block.md)\n```\n"
    )
    assert broken(page) == []
    page.write_text("[a](missing.md) [b](other.md#no-heading) [c](#top) [d](other.md#twice-2) ![e](none.png)\n")
    assert broken(page) == ["missing.md", "other.md#no-heading", "#top", "other.md#twice-2", "none.png"]


PATH = re.compile(r"`((?:cli|posttrain|merging|core|configs|tests|bench)/[\w./-]*)`")
HISTORY = {"CHANGELOG.md", "log.md", "benchmarks.md"}  # these name what there was


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_file_and_folder_that_a_page_names_exists(page):
    named = set(PATH.findall(page.read_text(encoding="utf-8")))
    made = {"merging/methods/norm_methods.py", "configs/NAME.yaml"}  # files that a reader writes
    assert {path for path in named - made if not (ROOT / path).exists()} == set()


def test_the_page_of_the_architecture_lists_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layers = ("cli", "posttrain", "merging", "core", "configs")
    rooms = {path.parent.relative_to(ROOT) for layer in layers for path in (ROOT / layer).rglob("*.py")}
    inner = {str(room) for room in rooms if len(room.parts) > 1}
    assert {room for room in inner if f"`{room}`" not in text} == set()
