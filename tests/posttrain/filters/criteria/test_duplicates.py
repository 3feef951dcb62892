"""Exact and near duplicates against brute force over all pairs."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from samples import row, said

from gemma2.posttrain.data.sources import Row
from gemma2.posttrain.filters.chunks import ChunkStore
from gemma2.posttrain.filters.criteria.duplicates import exact_duplicates, link_bands, near_duplicates
from gemma2.posttrain.filters.criteria.sample import Sample
from gemma2.posttrain.filters.criteria.signatures import band_keys, exact_digest, plan_bands, shingles
from gemma2.posttrain.filters.decide import decide
from gemma2.posttrain.filters.scan import STAYS, Scanner
from gemma2.posttrain.schemas import FilterConfig


def digest(sample, side="both"):
    return exact_digest(sample, side)


ONE = said("In order they are a d e.", "Put in order: a e d")


@pytest.mark.parametrize(
    ("sample", "same"),
    [
        (said("In order they are a d e.", "Put in order: a e d"), True),
        (said("in order THEY are a d e.", "put in order: A e d"), True),
        (said("In order  they\nare a d e.", " Put in order:\ta e d "), True),
        (said("In order they are a d e.\n", "Put in order:\u00a0a e d"), True),
        (said("In order they are a d e", "Put in order: a e d"), False),
        (said("In order they are a e d.", "Put in order: a e d"), False),
        (said("In order they are a d e.", "Put in order: e a d"), False),
        (said("Put in order: a e d", "In order they are a d e."), False),
        (said("", "Put in order: a e d In order they are a d e."), False),
        (Sample([(False, "Put in order: a e d"), (True, "In order they are"), (True, "a d e.")]), False),
    ],
)
def test_exact_duplicates_differ_only_in_case_and_spaces(sample, same):
    assert (digest(sample) == digest(ONE)) is same


def test_signs_count_in_sums_and_unicode_forms_do_not():
    assert digest(said("2+2")) != digest(said("2-2"))
    assert digest(said("x²")) != digest(said("x2"))
    assert digest(said("cafe\u0301")) == digest(said("caf\u00e9"))


def test_the_side_that_is_compared():
    first, other = said("Oslo.", "Capital of Norway?"), said("It is Oslo.", "Capital of Norway?")
    assert digest(first, "prompt") == digest(other, "prompt")
    assert digest(first, "completion") != digest(other, "completion")
    assert digest(first) != digest(other)


def test_the_first_of_equal_digests_stays():
    halves = np.array([[5, 1], [3, 1], [5, 1], [5, 2], [3, 1], [5, 1]], dtype=np.uint64)
    assert exact_duplicates(halves).tolist() == [-1, -1, 0, -1, 1, 0]
    assert exact_duplicates(halves[:0]).tolist() == []


def test_the_bands_find_a_pair_at_the_threshold():
    plan = plan_bands(0.8, 3)
    assert (plan.bands, plan.rows, plan.fewest) == (12, 5, 27)  # 1 - (1 - 0.8^5)^12 = 0.991; 3 * 1.8 / 0.2 = 27
    for threshold in (0.3, 0.5, 0.7, 0.9, 0.95):
        plan = plan_bands(threshold, 5)
        assert 1 - (1 - threshold**plan.rows) ** plan.bands >= 0.99
        assert 1 - (1 - threshold ** (plan.rows + 1)) ** (64 // (plan.rows + 1)) < 0.99


def test_below_the_smallest_number_of_shingles_a_changed_word_decides():
    plan = plan_bands(0.8, 3)
    words = [f"w{i}" for i in range(plan.fewest + plan.words - 1)]
    changed = [*words[:10], "other", *words[11:]]
    a, b = ({tuple(one[i : i + 3]) for i in range(plan.fewest)} for one in (words, changed))
    assert len(a & b) / len(a | b) == pytest.approx(0.8)
    assert len(shingles(said(" ".join(words), ""), "both", plan)) == plan.fewest
    assert len(shingles(said(" ".join(words[1:]), ""), "both", plan)) == 0
    assert len(shingles(said("again " * 100, ""), "both", plan)) == 0  # 98 shingles, all the same


# --- against brute force ----------------------------------------------------------------------------------------------


def corpus(rows, rng):
    """Texts of 40 to 160 words, of which half are earlier ones with some words changed, put in or left out."""
    vocabulary = [f"word{i}" for i in range(3000)]
    texts: list[list[str]] = []
    for _ in range(rows):
        if texts and rng.random() < 0.5:
            words = list(texts[rng.integers(len(texts))])
            for _ in range(rng.integers(0, 8)):
                place = int(rng.integers(len(words)))
                words[place : place + rng.integers(0, 2)] = [vocabulary[rng.integers(3000)]] * rng.integers(0, 2)
        else:
            words = [vocabulary[i] for i in rng.integers(0, 3000, size=rng.integers(40, 160))]
        texts.append(words)
    return texts


def similarities(texts):
    """Jaccard similarity of all pairs (later, earlier), from sets of word triples and nothing else."""
    sets = [frozenset(zip(words, words[1:], words[2:], strict=False)) for words in texts]
    pairs = itertools.combinations(range(len(sets)), 2)
    return {(i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for j, i in pairs}


def brute_force(count, similarity, threshold):
    """The rows that are like an earlier one that stays."""
    dropped = set()
    for i in range(count):
        if any(j not in dropped and similarity[i, j] >= threshold for j in range(i)):
            dropped.add(i)
    return dropped


def found_by_bands(texts, threshold):
    plan = plan_bands(threshold, 3)
    sets = [shingles(said(" ".join(words), ""), "both", plan) for words in texts]
    assert all(len(one) for one in sets)
    ends = np.cumsum([0, *map(len, sets)])
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    return near_duplicates(
        link_bands(band_keys(sets, plan, [0] * len(sets))), spans, np.concatenate(sets), threshold, plan.fewest
    )


@pytest.fixture(scope="module")
def texts():
    return corpus(300, np.random.default_rng(7))


@pytest.fixture(scope="module")
def similarity(texts):
    return similarities(texts)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8])
def test_near_duplicates_are_those_of_brute_force(texts, similarity, threshold):
    dropped = brute_force(len(texts), similarity, threshold)
    repeats, value = found_by_bands(texts, threshold)
    found = set(np.flatnonzero(repeats >= 0).tolist())
    assert len(dropped) > 40
    for i in found:  # precision is 1: the similarity is computed, not estimated
        assert repeats[i] not in found
        assert value[i] == pytest.approx(similarity[i, repeats[i]]) and value[i] >= threshold
    assert len(found & dropped) / len(dropped) >= 0.97
    assert len(found - dropped) <= 0.03 * len(dropped)  # only where an earlier row was missed


def test_a_long_chain_of_copies_keeps_the_first():
    base = [f"word{i}" for i in range(100)]
    texts = [[*base[:50], f"x{i}", *base[51:]] for i in range(400)]
    repeats, _ = found_by_bands(texts, 0.8)
    assert repeats[0] == -1 and (repeats[1:] == 0).all()


def test_a_copy_with_further_text_at_its_end_is_found():
    base = [f"word{i}" for i in range(100)]
    longer, longest = ([*base, *(f"x{i}" for i in range(more))] for more in (20, 30))
    repeats, value = found_by_bands([base, longest, longer], 0.8)  # 98 / 128 = 0.77, 98 / 118 = 0.83
    assert repeats.tolist() == [-1, -1, 1]  # the longest stays, and the longer one is 118 / 128 of it
    assert value[2] == pytest.approx(118 / 128)
    assert found_by_bands([base, longer], 0.8)[0].tolist() == [-1, 0]


def near(first, second, side="both"):
    """Whether the second row is a near duplicate of the first."""
    config = FilterConfig(data="d", filters=("near-duplicate",), dedup_on=side)
    found = Scanner(config, None).scan([Row("r", row(answer, asked)) for asked, answer in (first, second)])
    with tempfile.TemporaryDirectory() as directory:
        store = ChunkStore(Path(directory))
        store.append(found)
        return bool(decide(store, config).codes[1] != STAYS)


TASK = (
    "Anna picks apples in the orchard of her uncle every autumn. On the first day she picks {} apples, and later she"
    " gives {} of them to the children of her neighbour. How many apples does Anna have left at the end of the day?"
)
RULES = " ".join(f"rule{letter}{other}{last}" for letter in "abcdefgh" for other in "abcdefgh" for last in "abcdefgh")
LONG = " ".join(f"word{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh")
OTHER = " ".join(f"thing{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((TASK.format(48, 12), "She has some left."), (TASK.format(48, 13), "She has some left.")),
        ((TASK.format("two", "five"), "Some."), (TASK.format("two", "six"), "Some.")),
        ((f"{TASK} 64 + 32", "Yes."), (f"{TASK} 64 - 32", "Yes.")),
        ((RULES + " When do you open?", "At nine."), (RULES + " When do you close?", "At six.")),
        ((RULES, LONG), (RULES, OTHER)),
    ],
    ids=["number", "number word", "sign", "short answer", "long answer"],
)
def test_templates_filled_with_other_numbers_or_answers_are_not_copies(first, second):
    assert not near(first, second)
    assert near(first, (f"Please: {first[0]}", first[1]))


def test_the_opening_of_an_answer_and_its_layout_do_not_count():
    assert near(("Why?", LONG), ("Why?", f"Certainly! {LONG}"))
    assert near(("Why?", LONG), ("Why?", LONG.replace(" word", ",\n\nWord")))
    assert near((RULES, LONG), (RULES, f"Certainly! {LONG}"))
    assert not near((LONG, "Yes."), (OTHER, "Yes."))
    assert near((LONG, "Yes."), (LONG + " please", "No."), side="prompt")


def test_rows_are_compared_to_rows_that_stay():
    # b is like a, c is like b, c is not like a: c stays.
    a = [f"w{i}" for i in range(60)]
    b = [*a[6:], *(f"x{i}" for i in range(6))]
    c = [*b[6:], *(f"y{i}" for i in range(6))]
    repeats, _ = found_by_bands([a, b, c], 0.8)
    assert repeats.tolist() == [-1, 0, -1]
    assert brute_force(3, similarities([a, b, c]), 0.8) == {1}
