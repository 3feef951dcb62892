"""What the plan says is what the run does, and what the run skips is byte for byte what a fresh run makes."""

import pytest
from random_pipelines import check_case

CASES, ALL_CASES = 12, 1000


@pytest.mark.parametrize("seed", range(CASES))
def test_plan_status_run_and_a_fresh_run_agree(tmp_path, seed):
    assert check_case(tmp_path, seed) == []


@pytest.mark.slow
def test_a_thousand_random_changes_pass_no_difference_in_silence(tmp_path):
    found = [line for seed in range(CASES, ALL_CASES) for line in check_case(tmp_path / str(seed), seed)]
    assert found == []
