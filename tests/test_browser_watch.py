"""The page of `gemma2 watch` in a real browser: it draws what it gets, follows it, runs no text of others, fits."""

import sys
from pathlib import Path

import pytest
from browser import MISSING, Chromium, find_browser
from test_browser import STICKING_OUT
from waiting import wait_for

sys.path.append(str(Path(__file__).parent / "posttrain/watch"))
from watched_folder import Folder, evaluation, line

from gemma2.posttrain.watch.following import Following
from gemma2.posttrain.watch.page_server import PageServer

pytestmark = pytest.mark.browser

NASTY = "<img src=x onerror=alert(1)><script>document.title = 'owned'</script>"
NOW = 1_795_946_460.0
SEEN = "document.getElementById('{}').textContent"


@pytest.fixture(scope="module")
def chromium():
    if find_browser() is None:
        pytest.fail(MISSING, pytrace=False)
    with Chromium() as browser:
        yield browser


class Watched:
    """A folder, its watcher and its page."""

    def __init__(self, root):
        self.folder, self.following = Folder(root), Following(root)

    def view(self):
        return self.following.look(NOW).document()

    def stage(self, name):
        found = self.following.details(name)
        return found and found.document(curves=True)


@pytest.fixture
def watched(tmp_path):
    made = Watched(tmp_path / "align")
    made.folder.pipeline(**{"sft": "complete", f"rl{NASTY}": "running", "merge": "waiting"})
    made.folder.held()
    made.run = made.folder.run(made.folder.root / f"rl{NASTY}")
    for step in range(1, 60):
        made.folder.add(made.run, line(step), *([evaluation(step)] if step % 10 == 0 else []))
    made.folder.live(made.run, 59, 100, [(NOW - 59, 0), (NOW, 59)])
    made.folder.add(
        made.run, {"step": 50, "prompt": NASTY, "completion": f"{NASTY} x" * 30, "reward": 1.5}, name="samples.jsonl"
    )
    with PageServer(made.view, made.stage) as server:
        made.url = server.url
        yield made
    made.folder.released()


def drawn(page):
    wait_for(lambda: page.evaluate("document.querySelectorAll('#charts svg path').length") >= 4)
    return page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 768, 400])
def test_the_page_is_whole_at_every_width(chromium, watched, width, dark):
    page = drawn(chromium.open(watched.url, width, dark=dark))
    assert [told for told in page.complaints() if not told.startswith(f"request for {watched.url}")
            and told != "request for data:,"] == []  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(STICKING_OUT) == []
    labels = page.evaluate("[...document.querySelectorAll('#charts svg')].map(svg => svg.getAttribute('aria-label'))")
    assert labels == ["Reward over steps", "KL, nats over steps", "Length, tokens over steps", "Loss over steps"]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(paper) < 50 if dark else min(paper) > 230


def test_text_of_others_stays_text(chromium, watched):
    page = drawn(chromium.open(watched.url))
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert "owned" not in page.evaluate("document.title")
    assert page.evaluate(SEEN.format("prompt")) == NASTY
    assert NASTY in page.evaluate(SEEN.format("stage-name"))


def test_it_follows_the_run_and_says_when_the_watcher_is_gone(chromium, watched):
    page = drawn(chromium.open(watched.url))
    assert page.evaluate(SEEN.format("status")) == "running"
    assert "41 s left" in page.evaluate(SEEN.format("stage-line"))
    watched.folder.pipeline("failed", **{"sft": "complete", f"rl{NASTY}": {"status": "failed", "error": NASTY}})
    watched.folder.released()
    wait_for(lambda: page.evaluate(SEEN.format("status")) == "failed")
    wait_for(lambda: page.evaluate(SEEN.format("stage-error")) == NASTY)
    watched.following.look = None  # the server answers no more
    wait_for(lambda: "does not answer" in page.evaluate(SEEN.format("connection")))


def test_a_click_shows_another_stage(chromium, watched):
    page = drawn(chromium.open(watched.url))
    page.evaluate("[...document.querySelectorAll('#stages button')].find(one => one.textContent === 'sft').click()")
    wait_for(lambda: page.evaluate(SEEN.format("stage-name")) == "sft")
    wait_for(lambda: page.evaluate("document.querySelectorAll('#charts svg').length") == 0)
