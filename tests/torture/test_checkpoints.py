"""Random valid checkpoints are merged as float64 merges them, whatever their names, shapes, dtypes and shards."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, configuration, given, settings
from ledger import recorded, times
from model_files import from_bytes, read_raw
from random_checkpoints import HALF_STEP, Checkpoint, checkpoints, reference, request, write

from gemma2.core.errors import InputError
from gemma2.merging import merge

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of small folders
OPTIONS = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": [*HealthCheck],
}


@pytest.fixture(scope="module", autouse=True)
def own_folders(tmp_path_factory):
    """hypothesis keeps its tables, and merges their sums, outside of the checkout and of the user's cache."""
    configuration.set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def merged_as_in_float64(one: Checkpoint, counts: Counter[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="gemma2-merges-", dir=MEMORY) as folder:
        root = Path(folder)
        expected = reference(one, write(one, root))
        undefined = any(np.isnan(value).any() for value, _ in expected.values())
        try:
            merge(request(one, root), out=root / "out")
        except InputError as error:
            assert undefined and one.method == "slerp", error
            assert [*root.glob("*out*"), *root.glob(".*")] == []
            counts["slerp of opposite vectors, refused"] += 1
            return
        found = read_raw(root / "out")
        assert found.keys() == expected.keys()
        for name, kind in zip(one.shapes, one.dtypes[1], strict=True):
            dtype, shape, data = found[name]
            assert (dtype, tuple(shape)) == (kind, one.shapes[name]), name
            value, size = expected[name]
            relative, absolute = HALF_STEP[kind]
            allowed = 1.001 * relative * abs(value) + absolute + 2.0**-21 * size
            assert (abs(from_bytes(data, dtype, shape) - value) <= allowed).all(), name
        counts[one.method] += 1


def test_random_checkpoints_are_merged_as_in_float64():
    """A few dozen; `make torture` tries thousands."""
    counts: Counter[str] = Counter()

    @settings(max_examples=50, **OPTIONS)
    @given(checkpoints())
    def check(one):
        merged_as_in_float64(one, counts)

    check()
    assert sum(counts.values()) >= 50
    assert len(counts) >= 4


@pytest.mark.torture
def test_thousands_of_random_checkpoints_are_merged_as_in_float64():
    counts: Counter[str] = Counter()

    @settings(max_examples=times(2000), **OPTIONS)
    @given(checkpoints())
    def check(one):
        merged_as_in_float64(one, counts)

    with recorded("random valid checkpoints merged, against float64") as figures:
        check()
        figures |= dict(sorted(counts.items()))
