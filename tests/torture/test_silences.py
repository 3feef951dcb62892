"""What ran is what was asked: injected silences are stopped or named within two steps, and clean runs say nothing."""

from __future__ import annotations

import pytest
from silences import CLEAN, SILENCES, observe, write_inputs

EXPECTED = "less than rounding"  # two steps at the rate of the paper


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("silences"))


def check_silence(one, inputs, out):
    with pytest.MonkeyPatch.context() as patch:
        one.inject(patch)
        outcome = observe(one.job, inputs, out)
    assert one.words in outcome.text, (one.name, outcome)
    assert outcome.error is None or outcome.error.exit_code in (1, 3)
    assert "\n" not in str(outcome.error)


@pytest.mark.parametrize("one", SILENCES, ids=lambda one: one.name)
def test_a_silence_is_stopped_or_named_within_two_steps(one, inputs, tmp_path):
    check_silence(one, inputs, tmp_path / "out")


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_run_says_nothing(name, inputs, tmp_path):
    outcome = observe(CLEAN[name], inputs, tmp_path / "out")
    unexpected = [text for text in outcome.warnings if EXPECTED not in text]
    assert (outcome.error, unexpected) == (None, [])
