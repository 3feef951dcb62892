"""Flipped bits in headers, indexes, configurations, manifests, journals, states and marks: no crash, no hang, and
nothing accepted whose tensors changed meaning."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from corpus import write_world
from flips import FILES, REFUSED, try_flips, write_others
from ledger import recorded, times


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """In memory where there is such a place: a hundred thousand writes to a disk take minutes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path_factory.mktemp("flips")
    with tempfile.TemporaryDirectory(prefix="gemma2-flips-", dir=memory) as folder:
        root = write_world(Path(folder) / "world")
        write_others(root)
        yield root


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_or_changes_nothing_that_counts(root, name):
    """Some dozens of each file; `make torture` flips every bit."""
    counts, broken = try_flips(root, FILES[name], 35, 10, seed=len(name))
    assert broken == []
    assert counts[REFUSED] > 0


@pytest.mark.torture
def test_every_flipped_bit_is_refused_or_changes_nothing_that_counts(root):
    found, everything = Counter(), []
    with recorded(
        "bits flipped and bytes replaced in header, index, configuration, manifest, journal, state, mark"
    ) as figures:
        for target in FILES.values():
            counts, broken = try_flips(root, target, times(100_000), times(2000))
            found += counts
            everything += broken
        figures["tried"] = found.total()
        figures |= dict(sorted(found.items()))
    assert everything == []
