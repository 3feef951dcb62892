"""The soak of soak.py for three minutes."""

import pytest
from ledger import times
from soak import soak

pytestmark = pytest.mark.torture


def test_every_round_of_a_disturbed_pipeline_ends_with_the_bytes_of_a_quiet_run():
    soak(times(180))
