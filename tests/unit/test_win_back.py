"""The example's pure parts: reading the file, the oracle, and the comparison that decides about success."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import pytest

from dispatcher.domain.evaluation import evaluate
from dispatcher.states import DONE, NEW
from dispatcher.transition import ChainSnapshot
from examples.win_back import clock, sink
from examples.win_back.expected import Step, expected_steps, steps_of
from examples.win_back.purchases import (
    DATA,
    FIRST_DAY,
    LAST_DAY,
    Order,
    Purchase,
    choose_customers,
    orders_of,
    parse_purchase,
    read_purchases,
)
from examples.win_back.report import Outcome
from examples.win_back.sink import Effect
from examples.win_back.transitions import BoughtAgain, DaysAfterPurchase, Lapsed180, Offer90, Reminder30

BOUGHT = date(1997, 1, 1)


def test_a_line_of_the_file_is_a_purchase() -> None:
    assert parse_purchase(" 00004 0001 19970118  2   29.73\r\n") == Purchase(
        "00004", "0001", date(1997, 1, 18), 2, 29.73
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "expected 5 columns, found 0"),
        ("00004 0001 19970118 2", "expected 5 columns, found 4"),
        ("00004 0001 19970230 2 29.73", "day is out of range"),
        ("00004 0001 1997 2 29.73", "does not match format"),
        ("00004 0001 19970118 two 29.73", "invalid literal"),
    ],
)
def test_a_bad_line_is_refused(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_purchase(line)


def test_a_bad_file_is_refused_with_the_number_of_the_line(tmp_path: Path) -> None:
    path = tmp_path / "purchases.txt"
    path.write_text(" 00004 0001 19970101  2   29.33\n nonsense\n")
    with pytest.raises(ValueError, match=r"purchases\.txt, line 2: expected 5 columns"):
        read_purchases(path)


def test_the_shipped_file_is_whole() -> None:
    purchases = read_purchases()
    assert len(purchases) == 6919
    assert len(orders_of(purchases)) == 6696
    assert len({purchase.customer for purchase in purchases}) == 2357
    assert len({purchase.sample_id for purchase in purchases}) == 2357
    days = [purchase.bought_on for purchase in purchases]
    assert (min(days), max(days)) == (FIRST_DAY, LAST_DAY)


def test_an_order_comes_back_from_its_resources() -> None:
    order = Order(date(1997, 1, 18), "00004")
    assert order.resources == [("customer", "00004"), ("order", "19970118")]
    assert Order.of(order.resources) == order


def test_customers_are_spread_over_the_file_and_always_the_same() -> None:
    purchases = read_purchases()
    chosen = choose_customers(purchases, 10)
    assert len(chosen) == 10
    assert chosen == choose_customers(purchases, 10)
    assert len({min(p.bought_on for p in purchases if p.customer == customer) for customer in chosen}) > 5
    assert len(choose_customers(purchases, 99_999)) == 2357


@pytest.mark.parametrize(
    ("again_after", "until_after", "expected"),
    [
        (None, 500, [("Reminder30", 30), ("Offer90", 90), ("Lapsed180", 180)]),
        (None, 90, [("Reminder30", 30), ("Offer90", 90)]),
        (None, 89, [("Reminder30", 30)]),
        (None, 29, []),
        (1, 500, [("BoughtAgain", 1)]),
        (30, 500, [("BoughtAgain", 30)]),
        (31, 500, [("Reminder30", 30), ("BoughtAgain", 31)]),
        (90, 500, [("Reminder30", 30), ("BoughtAgain", 90)]),
        (180, 500, [("Reminder30", 30), ("Offer90", 90), ("BoughtAgain", 180)]),
        (181, 500, [("Reminder30", 30), ("Offer90", 90), ("Lapsed180", 180)]),
        (20, 10, []),
        (40, 35, [("Reminder30", 30)]),
    ],
)
def test_the_steps_of_one_order(again_after: int | None, until_after: int, expected: list[tuple[str, int]]) -> None:
    again = None if again_after is None else BOUGHT + timedelta(days=again_after)
    assert list(steps_of(BOUGHT, again, BOUGHT + timedelta(days=until_after))) == [
        (transition, BOUGHT + timedelta(days=days)) for transition, days in expected
    ]


def test_the_steps_of_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "purchases.txt"
    path.write_text(
        " 00007 0001 19970101  2   29.33\n"
        " 00007 0001 19970101  1    9.99\n"  # the same order
        " 00007 0001 19970302  1   14.96\n"  # 60 days later: after the reminder, before the offer
        " 00008 0002 19970101  1   14.96\n"  # not asked for
    )
    assert expected_steps(path, {"00007"}, date(1997, 6, 1)) == [
        Step(date(1997, 1, 31), "00007", "19970101", "Reminder30"),
        Step(date(1997, 3, 2), "00007", "19970101", "BoughtAgain"),
        Step(date(1997, 4, 1), "00007", "19970302", "Reminder30"),
        Step(date(1997, 5, 31), "00007", "19970302", "Offer90"),
    ]


def test_the_oracle_imports_nothing_of_the_dispatcher() -> None:
    program = "import sys, examples.win_back.expected; print([m for m in sys.modules if 'dispatcher' in m])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CANDIDATES: dict[str, list[type[BoughtAgain | DaysAfterPurchase]]] = {
    NEW: [BoughtAgain, Reminder30],
    Reminder30.final_state: [BoughtAgain, Offer90],
    Offer90.final_state: [BoughtAgain, Lapsed180],
    DONE: [],
}


def test_the_guards_agree_with_the_oracle_day_by_day() -> None:
    chosen = choose_customers(read_purchases(), 40)
    walked = []
    for order in orders_of(purchase for purchase in read_purchases() if purchase.customer in chosen):
        state, day = NEW, order.bought_on
        while day <= LAST_DAY and state != DONE:
            now = datetime.combine(day, time.min, tzinfo=UTC)
            snapshot = ChainSnapshot(1, "win_back", state, tuple(order.resources), now)
            plan = evaluate(snapshot, CANDIDATES[state], {}, now)
            if plan.winner is None:
                due_at = plan.due_at(now)
                assert due_at is not None and due_at > now  # never due for nothing
                day += timedelta(days=1)
                continue
            state = plan.winner.final_state
            walked.append(Step(day, order.customer, f"{order.bought_on:%Y%m%d}", type(plan.winner).__name__))
    assert sorted(walked) == expected_steps(DATA, chosen, LAST_DAY)


def test_the_clock_gives_the_first_moment_of_the_day_that_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(clock.VARIABLE, str(tmp_path / "clock"))
    clock.set_day(date(1997, 5, 4))
    clock.set_day(date(1997, 5, 5))
    assert clock.now() == datetime(1997, 5, 5, tzinfo=UTC)


def test_the_sink_gives_back_what_several_processes_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sink"
    monkeypatch.setenv(sink.VARIABLE, str(path))
    assert sink.read_effects(path) == []
    program = (
        "import sys; from datetime import date; from examples.win_back import sink\n"
        "for n in range(200): sink.append(sink.Effect(sys.argv[1], str(n), 'T', date(1997, 1, 1), 'k' * 36))"
    )
    root = Path(__file__).parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", program, name], cwd=root) for name in ("a", "b", "c")]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    effects = sink.read_effects(path)
    assert sorted((effect.customer, int(effect.order)) for effect in effects) == [
        (name, number) for name in ("a", "b", "c") for number in range(200)
    ]


STEPS = [
    Step(date(1997, 1, 31), "00007", "19970101", "Reminder30"),
    Step(date(1997, 3, 2), "00007", "19970101", "BoughtAgain"),
]
EFFECT = Effect("00007", "19970101", "Reminder30", date(1997, 1, 31), "key")


def compare(moves: list[Step], effects: list[Effect], *, chains: int = 1) -> Outcome:
    return Outcome(orders=1, chains=chains, expected=STEPS, moves=moves, effects=effects)


def test_what_went_as_expected_has_no_mismatch_and_no_duplicate() -> None:
    outcome = compare(STEPS, [EFFECT])
    assert outcome.mismatches() == []
    assert outcome.duplicates() == []
    assert outcome.good


def test_a_missing_move_and_a_missing_callback_are_mismatches() -> None:
    assert compare(STEPS[:1], []).mismatches() == [
        "move missing: 1997-03-02 customer 00007 order 19970101 BoughtAgain",
        "callback missing: 1997-01-31 customer 00007 order 19970101 Reminder30",
    ]


def test_a_callback_on_another_day_is_missing_and_not_expected() -> None:
    late = replace(EFFECT, day=date(1997, 2, 1))
    assert compare(STEPS, [late]).mismatches() == [
        "callback missing: 1997-01-31 customer 00007 order 19970101 Reminder30",
        "callback not expected: 1997-02-01 customer 00007 order 19970101 Reminder30",
    ]


def test_a_second_callback_is_a_duplicate_whatever_its_key() -> None:
    assert compare(STEPS, [EFFECT, replace(EFFECT, idempotency_key="other")]).duplicates() == [
        "callback 00007 19970101 Reminder30: 2 times"
    ]


def test_a_key_of_two_callbacks_is_a_duplicate() -> None:
    other = replace(EFFECT, order="19970302")
    assert compare(STEPS, [EFFECT, other]).duplicates() == ["idempotency key key: 2 callbacks"]


def test_a_second_move_is_a_duplicate() -> None:
    assert compare([*STEPS, STEPS[0]], [EFFECT]).duplicates() == ["move 00007 19970101 Reminder30: 2 times"]


def test_a_chain_too_many_is_a_mismatch() -> None:
    outcome = compare(STEPS, [EFFECT], chains=2)
    assert outcome.mismatches() == ["1 orders, but 2 chains"]
    assert not outcome.good


def test_the_table_counts_per_transition_and_quarter() -> None:
    table = compare(STEPS, [EFFECT]).table()
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns] == ["transition", "", "1997Q1", "total"]
    assert cells[1][:3] == ["expected", "moves", "callbacks"]
    assert cells[2][:3] == ["1", "1", "1"]
    assert cells[3][-2:] == ["1", "1"]
