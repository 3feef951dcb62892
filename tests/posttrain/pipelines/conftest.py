"""The command `make` for every test here."""

import pytest
from stages import MAKE

from gemma2.posttrain.runs.commands import COMMANDS


@pytest.fixture(autouse=True)
def _make(monkeypatch):
    monkeypatch.setitem(COMMANDS, "make", MAKE)
