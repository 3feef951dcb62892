"""The report in a real browser: nothing complains, every figure is seen, nothing sticks out, on a desk and on a phone.

Runs under `make test-browser`, which says so where there is no browser.
"""

import sys
from pathlib import Path

import pytest
from browser import MISSING, Chromium, find_browser

sys.path.append(str(Path(__file__).parent / "posttrain/reports"))
from finished_run import broken, quickstart

from gemma2.posttrain.reports.page import write_report

pytestmark = pytest.mark.browser

# Every drawing with its size in CSS pixels, and whether it can be seen: neither it nor an ancestor is hidden.
FIGURES = """
[...document.querySelectorAll("svg.figure")].map(svg => {
  const box = svg.getBoundingClientRect();
  return {label: svg.getAttribute("aria-label"), width: box.width, height: box.height, seen: svg.checkVisibility()};
})
"""
# What is wider than the window and not inside something that scrolls.
STICKING_OUT = """
[...document.querySelectorAll("body *")].filter(node =>
  !node.closest(".scroll") && !node.closest("svg") &&
  node.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
).map(node => `${node.tagName}.${node.className}`)
"""
# Tables of figures with columns outside the window.
HIDDEN = """
[...document.querySelectorAll("table.stack")].filter(table => table.checkVisibility() &&
  table.getBoundingClientRect().right > table.closest(".scroll").getBoundingClientRect().right + 0.5
).map(table => table.className)
"""
# Text of a drawing that is drawn outside it.
CUT_OFF = """
[...document.querySelectorAll("svg.figure")].filter(svg => svg.checkVisibility()).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 2 || box.right > frame.right + 2
  }).map(text => `${svg.getAttribute("aria-label")}: ${text.textContent}`);
})
"""
# Text of a box in a graph that is wider than its box.
TOO_LONG = """
[...document.querySelectorAll("svg.dag")].filter(svg => svg.checkVisibility()).flatMap(svg =>
  [...svg.querySelectorAll("g")].filter(group => group.querySelector(":scope > rect.box")).flatMap(group => {
    const box = group.querySelector(":scope > rect.box").getBoundingClientRect();
    return [...group.querySelectorAll("text")].filter(text => text.getBoundingClientRect().right > box.right)
      .map(text => text.textContent);
  }))
"""
# The smallest letters of a drawing, in CSS pixels on the screen.
SMALLEST = """
Math.min(...[...document.querySelectorAll("svg.figure")].filter(svg => svg.checkVisibility()).flatMap(svg =>
  [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect().height)))
"""
BAD = """<!DOCTYPE html><meta name="viewport" content="width=device-width"><div style="width: 900px">wide</div>
<svg class="figure dag" width="50" height="20"><g><rect class="box" width="9" height="9"/>
<text x="0">too long</text><text x="49">cut</text></g></svg>
<script>console.warn("x"); nothing();</script><img src="missing.png">"""
WANTED = {"Reward over KL": 1, "Angle between": 1, "Length kept": 1, "Reward, KL and length": 1, "Graph of": 1}
RUNS = {"quickstart": quickstart, "broken": broken}


@pytest.fixture(scope="module")
def chromium():
    if find_browser() is None:
        pytest.fail(MISSING, pytrace=False)
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module", params=RUNS)
def report(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return write_report(RUNS[request.param](folder / "run"), folder / "report.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390, 360])
def test_the_page_is_whole_at_every_width(chromium, report, width, dark):
    page = chromium.open(report, width, dark=dark)
    assert page.complaints() == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(STICKING_OUT) == []
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    if width < 600:
        assert page.evaluate(HIDDEN) == []  # rows are stacked, so that no column hides
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = false)")
    figures = [figure for figure in page.evaluate(FIGURES) if figure["seen"]]
    for label, count in WANTED.items():
        found = [figure for figure in figures if figure["label"].startswith(label)]
        assert len(found) == count, label
        assert all(figure["width"] >= 0.8 * min(width, 360) and figure["height"] > 60 for figure in found), found
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(TOO_LONG) == []
    assert page.evaluate(SMALLEST) >= 7.5


def test_dark_is_dark(chromium, report):
    def paper(dark):
        page = chromium.open(report, 1280, dark=dark)
        return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")

    assert min(paper(False)) > 230 and max(paper(True)) < 50


def test_a_box_of_the_lineage_leads_to_its_stage(chromium, report):
    page = chromium.open(report)
    targets = page.evaluate(
        "[...document.querySelectorAll('svg.dag a')].map(a => document.querySelector(a.getAttribute('href')) !== null)"
    )
    assert targets and all(targets)
    page.evaluate("location.hash = document.querySelector('svg.dag a').getAttribute('href')")
    assert page.evaluate("document.querySelector(':target') !== null")


def test_it_prints(chromium, report, tmp_path):
    chromium.open(report).pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")
    assert (tmp_path / "report.pdf").stat().st_size > 50_000


def test_the_checks_see_what_is_wrong(chromium, tmp_path):
    (tmp_path / "bad.html").write_text(BAD)
    page = chromium.open(tmp_path / "bad.html", 360)
    told = " ".join(page.complaints())
    assert "console.warning" in told and "Uncaught" in told and "missing.png" in told
    assert page.evaluate(STICKING_OUT) == ["DIV."]
    assert page.evaluate("document.documentElement.scrollWidth") > 360
    assert page.evaluate(TOO_LONG) == ["too long", "cut"]
    assert page.evaluate(CUT_OFF) == ["null: too long", "null: cut"]
    assert page.evaluate(SMALLEST) > 10
