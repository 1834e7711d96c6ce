"""The table of the results."""

import pytest

from tests.chaos.report import put, table

RESULT = {
    "faults": ["kill_child"],
    "chains": 2000,
    "moves": 4000,
    "callbacks": 3000,
    "lost": 0,
    "phantom": 0,
    "doubled": 0,
    "untimely": 0,
    "guards_checked": 2900,
    "mistaken": 0,
    "repeated": 17,
    "rates_checked": 700,
    "rates_skipped": "",
    "healing_seconds": 3.0,
    "promised_seconds": 7.0,
}


def test_runs_of_one_fault_are_one_line_and_combinations_another() -> None:
    slower = {**RESULT, "healing_seconds": 6.0}
    both = {**RESULT, "faults": ["kill_child", "suspend"]}
    lines = table([RESULT, slower, both]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| `kill_child` |")
    assert lines[2].endswith("| 2 | 4,000 | 8,000 | 6,000 | 0 | 0 | 0 | 0 | 5,800 | 0 | 34 | 1,400 | 6.0 s / 7.0 s |")
    assert lines[3].startswith("| combinations |")


def test_rates_that_were_not_checked_are_named() -> None:
    lost = {**RESULT, "rates_checked": 0, "rates_skipped": "the lock server was emptied"}
    assert "| 700; skipped in 1 of 2 |" in table([RESULT, lost])


def test_exits_have_a_column_where_they_were_counted() -> None:
    assert "exits" not in table([RESULT])
    head, _, row = table([{**RESULT, "exits": 3}]).splitlines()
    assert head.split("|")[14].strip() == "unexpected exits"
    assert row.split("|")[14].strip() == "3"


def test_every_line_has_as_many_cells_as_the_head() -> None:
    lines = table([RESULT, {**RESULT, "faults": ["kill_child", "suspend"]}]).splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_the_table_is_put_between_its_marks_and_nowhere_else() -> None:
    text = "a\n<!-- chaos table -->\nold\n<!-- end of chaos table -->\nb\n"
    assert put(text, "new") == "a\n<!-- chaos table -->\n\nnew\n\n<!-- end of chaos table -->\nb\n"
    with pytest.raises(ValueError, match="no <!-- chaos table"):
        put("a", "new")
