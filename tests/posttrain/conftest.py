"""What the tests of the training steps share."""

from __future__ import annotations

import pytest

from gemma2.core.progress import SILENT


class Interrupting:
    """A progress that keeps warnings and raises KeyboardInterrupt once its bar has advanced by more than `after`."""

    def __init__(self, after=10**9):
        self.left = after
        self.warnings = []
        self.note = SILENT.note
        self.warn = self.warnings.append

    def task(self, label, total, unit):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def advance(self, amount=1, **fields):
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture
def interrupting():
    """The class `Interrupting`, to be made with the number of steps that pass before the interrupt."""
    return Interrupting
