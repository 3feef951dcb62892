"""Makes a bare checkout importable as `gemma2`, keeps every test off the network, and begins with the longest files."""

import functools
import gc
import importlib.metadata
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if importlib.util.find_spec("gemma2") is None:
    namespace = types.ModuleType("gemma2")
    namespace.__path__ = [str(ROOT)]
    sys.modules["gemma2"] = namespace

# Imports and models make many objects and hardly any garbage, for which the collector searches too often by default.
gc.set_threshold(100_000, 50, 100)
# Libraries look up at every step of a training whether a package is installed: 2 ms to parse its metadata.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

# Ten thousand flushes to the disk take a minute, and no test cuts the power. Processes that tests start do flush.
os.fsync = lambda descriptor: os.fstat(descriptor) and None


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_searched_for_garbage():
    """Every training run ends with a `gc.collect()` of accelerate's, which would take 0.2 s for the libraries alone."""
    gc.collect()
    gc.freeze()
    imports = sys.modules.get("accelerate.utils.imports")
    if imports is not None and not hasattr(imports._is_package_available, "cache_info"):
        imports._is_package_available = functools.cache(imports._is_package_available)


@pytest.fixture(scope="module", autouse=True)
def _a_file_of_tests_leaves_no_module_behind(tmp_path_factory):
    """Two files that each write a `judge.py` would otherwise share whichever a worker of the suite imported first."""
    yield
    root = tmp_path_factory.getbasetemp()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(root):
            del sys.modules[name]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files marked `long` first: with a file for each process, one that begins last would be waited for alone."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: tests of signals and servers wait, and another then has the core."""
    return len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)) + 1
