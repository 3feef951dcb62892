"""The command `make` for every test here, and a cache of digests that is empty."""

import pytest
from stages import MAKE

from gemma2.core.outputs import digest_cache
from gemma2.posttrain.runs.commands import COMMANDS


@pytest.fixture(autouse=True)
def _make(monkeypatch, tmp_path_factory):
    monkeypatch.setitem(COMMANDS, "make", MAKE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for memory in ("_KNOWN", "_LINES", "_READ"):
        monkeypatch.setattr(digest_cache, memory, {})
