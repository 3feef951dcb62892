"""What ran is what was asked: injected silences are stopped or named within two steps, and clean runs say nothing."""

from __future__ import annotations

import pytest
import rl_silences  # noqa: F401  # adds its own
from ledger import recorded, times
from silences import SILENCES
from training_jobs import CLEAN, observe, write_inputs

# True of two steps on random models, and said before these checks: no silence.
EXPECTED = ("less than rounding", "the held-out loss rose", "of the completions were cut")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("silences"))


def check_silence(one, inputs, out):
    with pytest.MonkeyPatch.context() as patch:
        one.inject(patch)
        outcome = observe(one.job, inputs, out)
    assert any(words in outcome.text for words in one.words.split("|")), (one.name, outcome)
    assert outcome.error is None or outcome.error.exit_code in (1, 3)
    assert "\n" not in str(outcome.error)


def check_clean(job, inputs, out):
    outcome = observe(job, inputs, out)
    unexpected = [text for text in outcome.warnings if not any(words in text for words in EXPECTED)]
    assert (outcome.error, unexpected) == (None, [])


@pytest.mark.parametrize("one", SILENCES, ids=lambda one: one.name)
def test_a_silence_is_stopped_or_named_within_two_steps(one, inputs, tmp_path):
    check_silence(one, inputs, tmp_path / "out")


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_run_says_nothing(name, inputs, tmp_path):
    check_clean(CLEAN[name], inputs, tmp_path / "out")


@pytest.mark.torture
def test_every_silence_on_other_models_and_data(tmp_path):
    """The same with other weights, rows and random numbers: no check holds for one model by chance."""
    with recorded("silences injected into trainings") as figures:
        figures |= {"found within two steps": 0, "clean runs without a word": 0}
        for seed in range(1, 1 + times(4)):
            inputs = tmp_path / str(seed)
            inputs.mkdir()
            write_inputs(inputs, seed)
            for number, one in enumerate(SILENCES):
                check_silence(one, inputs, inputs / f"out-{number}")
                figures["found within two steps"] += 1
            for number, job in enumerate(CLEAN.values()):
                check_clean(job, inputs, inputs / f"clean-{number}")
                figures["clean runs without a word"] += 1
