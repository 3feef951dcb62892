"""The labelled texts: what they hold, and how many of them the filters judge rightly (bench/filter_quality.py)."""

import importlib.util
import sys

import pytest
from processes import ROOT

spec = importlib.util.spec_from_file_location("filter_quality", ROOT / "bench/filter_quality.py")
quality = sys.modules.setdefault("filter_quality", importlib.util.module_from_spec(spec))
spec.loader.exec_module(quality)

NAMES = list(quality.SETTINGS)
PRECISION = 0.95
# The smallest recall in either half; docs/filter.md states the figures.
RECALL = {"personal": 0.9, "secret": 0.85, "unsafe": 0.85, "language": 0.9, "near-duplicate": 0.9, "repetition": 0.9}


@pytest.fixture(scope="module")
def judged():
    """File -> its rows and the verdicts on them."""
    rows = {name: quality.labelled(name) for name in NAMES}
    return {name: (texts, quality.verdicts(name, texts)) for name, texts in rows.items()}


def test_the_texts_are_many_and_in_many_languages():
    rows = [row for name in (*NAMES, "none") for row in quality.labelled(name) if name == "none" or row["kind"]]
    texts = {(row["text"], row.get("other")) for row in rows}
    assert len(texts) >= 600
    assert len({row["language"] for row in rows}) >= 10
    assert {"code", "mathematics", "poetry"} <= {row["kind"] for row in quality.labelled("none")}
    for name in NAMES:
        labels = [row["label"] for row in quality.labelled(name)]
        assert min(labels.count(True), labels.count(False)) >= 12, name


def test_a_half_is_a_property_of_the_text_and_both_have_rows_of_every_kind():
    for name in NAMES:
        rows = quality.labelled(name)
        halves = [quality.half(row) for row in rows]
        assert halves == [quality.half(row) for row in rows]
        for side in quality.HALVES:
            labels = {row["label"] for row, own in zip(rows, halves, strict=True) if own == side}
            assert labels == {True, False}, (name, side)


@pytest.mark.parametrize("side", quality.HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_a_filter_drops_hardly_a_row_wrongly_and_most_rows_rightly(judged, name, side):
    rows, found = judged[name]
    chosen = [place for place, row in enumerate(rows) if quality.half(row) == side]
    score = quality.score([rows[i] for i in chosen], [found[i] for i in chosen])
    assert score.precision >= PRECISION
    assert score.recall >= RECALL.get(name, 0.95)


def test_code_mathematics_and_poetry_stay_with_the_default_filters(judged):
    for name in quality.DEFAULTS:
        rows, found = judged[name]
        lost = [
            row["text"] for row, drops in zip(rows, found, strict=True) if drops and row in quality.labelled("none")
        ]
        assert lost == [], name


def test_a_text_stays_where_its_own_language_is_kept():
    rows = [row for row in quality.labelled("language") if row["label"] and row["kind"] != "late"]
    lost = [row["language"] for row in rows if any(quality.verdicts("language", [row], language=(row["language"],)))]
    assert lost in ([], ["nb"])  # Bokmål is taken for Danish or Norwegian
