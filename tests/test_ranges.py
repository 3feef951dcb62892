"""README's table of ranges is made by bench/quickstart_ranges.py from the summaries of the runs."""

import sys

import pytest
from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import quickstart_ranges as ranges


def summary(shift, chosen="SLERP 2", low=-0.1):
    def row(label, role, reward, **more):
        return {"label": label, "role": role, "reward": reward + shift, "kl": 1.0, "judge": 0.5, "accuracy": 0.25,
                "length": 9.0 + shift} | more  # fmt: skip

    rows = [row("base", "", -2.0), row("distilled", "where RL started", 0.5), row("RL 1.2", "best single run", 3.5)]
    rows.append(row("SLERP 2", "chosen" if chosen == "SLERP 2" else "", 3.75 + shift))
    rows += [] if chosen == "SLERP 2" else [row(chosen, "chosen", 3.9)]
    return {
        "rows": rows,
        "chosen": {"reward_over_single": 0.25, "reward_over_single_low": low, "reward_over_single_high": 1},
    }


def test_a_cell_is_the_smallest_and_the_largest_value_and_rewards_are_over_the_start():
    table = ranges.table([summary(0.0), summary(1.0)])
    assert "| SLERP 2 | 3.25 to 4.25 | 1.00 | 0.500 | 25.0 | 9.0 to 10.0 |" in table
    assert "| best single run | 3.00 | 1.00 |" in table  # the labels of the best runs may differ
    assert "| base | −2.50 |" in table


def test_the_chosen_model_is_a_row_under_one_name_whatever_its_label():
    table = ranges.table([summary(0.0), summary(0.0, "SLERP 2, η 0.8")])
    assert "| chosen model | 3.25 to 3.40 |" in table
    assert "η" not in table


@pytest.mark.parametrize(("lows", "count"), [((-0.1, -0.1), 0), ((0.1, -0.1), 1)])
def test_the_sentence_counts_the_runs_with_a_gain(lows, count):
    assert f"in {count} of 2 runs, a loss in 0" in ranges.sentence([summary(0.0, low=low) for low in lows])


def test_the_table_of_the_readme_has_the_columns_of_the_script():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head = ranges.table([summary(0.0)]).splitlines()[0]
    assert head in text
    assert f"({len(ranges.RUNS)} runs" in text or ("five runs" in text and len(ranges.RUNS) == 5)
