"""The tables of a front, opened as a spreadsheet: text of others is no formula."""

import csv

from gemma2.posttrain.evaluation.front_files import _write_csv


def test_no_cell_of_a_table_begins_a_formula(tmp_path):
    names = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(1)", "\tx", "\rx", "plain"]
    _write_csv(tmp_path / "front.csv", [{"name": name, f"{name}_column": -1.5} for name in names])
    with (tmp_path / "front.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert not [cell for row in rows for cell in row if cell[:1] in "=+@\t\r" and cell]
    assert [row[0] for row in rows[1:]] == [*(f"'{name}" for name in names[:-1]), "plain"]
    assert rows[1][1] == "-1.5"  # a number stays one
