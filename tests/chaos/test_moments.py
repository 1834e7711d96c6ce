"""The oracle's checks of the moment of a call: I11 (guard, hours, rate) and I9, on histories made by hand."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dispatcher.domain.hours import DeliveryHours
from tests.chaos.case import Case
from tests.chaos.history import (
    Act,
    ChainLine,
    DeliveryLine,
    Edge,
    EventLine,
    Graph,
    History,
    Interval,
    Limit,
    Processes,
    Question,
    Rules,
)
from tests.chaos.moments import Moments, judge_moments
from tests.chaos.refusals import intervals, judge_refusals

AT = datetime(2026, 1, 1, 7, 59, 50, tzinfo=UTC)
RESOURCES = (("order", "7"),)
Line = dict[str, Any]


def at(seconds: float) -> datetime:
    return AT + timedelta(seconds=seconds)


class Worker:
    """Writes the lines of one thread of a worker into a sink."""

    def __init__(self, pid: int = 11) -> None:
        self.pid = pid
        self.lines: list[Line] = []
        self.begins = 0

    def write(self, phase: str, seconds: float, **facts: Any) -> None:
        self.lines.append({"phase": phase, "mono": seconds, "pid": self.pid, "thread": 1, **facts})

    def about(self, chain: int, **facts: Any) -> Line:
        return {
            "delivery": f"d{chain}",
            "attempt": 1,
            "begins": 1,
            "unknown": False,
            "key": f"k{chain}",
            "chain": chain,
            "type": "cart",
            "state": "new",
            "transition": "Remind",
            **facts,
        }

    def begin(self, seconds: float, *chains: int, **facts: Any) -> None:
        for chain in chains:
            self.write("begun", seconds, **self.about(chain, **facts), at=at(seconds).isoformat())

    def load(self, seconds: float, *chains: int) -> None:
        self.write("loading", seconds, chains=chains)
        self.write("loaded", seconds, chains=chains)

    def look(self, seconds: float, chain: int) -> None:
        self.write("looking", seconds, chain=chain, transition="Remind")
        self.write("looked", seconds, chain=chain, transition="Remind")

    def call(self, seconds: float, chain: int, **facts: Any) -> None:
        for phase in ("calling", "effect", "returned"):
            self.write(phase, seconds, **self.about(chain, **facts))


def history(lines: Sequence[Line], **changes: Any) -> History:
    chains = [ChainLine(number, "cart", RESOURCES, "reminded", 2, 1, created_at=AT) for number in range(1, 10)]
    values: dict[str, Any] = {
        "graph": Graph(frozenset(), silent=frozenset({Edge("cart", "new", "Paid", "done")})),
        "expected": {},
        "chains": chains,
        "events": (),
        "deliveries": [
            DeliveryLine(f"d{chain.id}", f"k{chain.id}", chain.id, 1, "Remind", "new", "reminded", "delivered")
            for chain in chains
        ],
        "sink": lines,
        "lease_seconds": 12.0,
    }
    return History(**{**values, **changes})


def moments(lines: Sequence[Line], **changes: Any) -> Moments:
    return judge_moments(Case(history(lines, **changes)))


# --- guards ----------------------------------------------------------------------------------------------------------


def no_after(seconds: float) -> Rules:
    """A customer who pays then: the guard says yes before it, and no from then on."""

    def truth(question: Question) -> bool:
        return question.facts[0] < seconds

    return Rules(truth=truth)


def one_call(*, turn: float, call: float, unknown: bool = False) -> list[Line]:
    worker = Worker()
    worker.begin(0, 1, unknown=unknown)
    worker.load(0, 1)
    worker.look(turn, 1)
    worker.call(call, 1, unknown=unknown)
    return worker.lines


def test_a_call_within_a_second_of_the_guard_s_yes_is_good() -> None:
    found = moments(one_call(turn=0.9, call=0.9), rules=no_after(0.5))
    assert (found.violations, found.guards_checked, found.unknown) == ([], 1, 0)


def test_a_call_by_facts_that_were_too_old_at_its_turn_is_caught() -> None:
    (violation,) = moments(one_call(turn=2.0, call=2.0), rules=no_after(0.5)).violations
    assert violation.promise == "I11"
    assert "2.000 s after its facts were loaded" in violation.what


def test_what_comes_between_a_look_and_its_call_alone_is_no_matter_of_the_guard() -> None:
    """The limit is counted there, and the server that counts may be slow."""
    assert moments(one_call(turn=0.2, call=4.0), rules=no_after(0.5)).violations == []


def test_a_look_before_another_delivery_s_call_is_no_last_look() -> None:
    worker = Worker()
    worker.begin(0, 1, 2)
    worker.load(0, 1, 2)
    worker.look(0.1, 1)
    worker.look(0.1, 2)
    worker.call(0.2, 1)
    worker.call(3.0, 2)
    (violation,) = moments(worker.lines, rules=no_after(0.5)).violations
    assert violation.chain_id == 2


def test_an_unknown_attempt_needs_no_guard() -> None:
    first, second = Worker(11), Worker(12)
    first.begin(0, 1)
    first.call(0.1, 1)
    second.begin(20, 1, begins=2, unknown=True)
    second.call(20, 1, begins=2, unknown=True)
    found = moments(first.lines + second.lines, rules=no_after(0.5), processes=Processes(deaths={11: 0.2}))
    assert (found.violations, found.guards_checked, found.unknown) == ([], 1, 1)


@pytest.mark.parametrize("died_in", ["a sibling's callback", "load_context", "a guard", "a guard, by a failpoint"])
def test_an_unknown_attempt_that_died_before_its_callback_began_is_counted_as_mistaken(died_in: str) -> None:
    first, second = Worker(11), Worker(12)
    first.begin(0, 1, 2)
    if died_in == "a sibling's callback":
        first.write("calling", 0.1, **first.about(2))
    elif died_in == "load_context":
        first.write("loading", 0.1, chains=[1, 2])
    elif died_in == "a guard":
        first.write("looking", 0.1, chain=1, transition="Remind")
    else:
        first.write("looking", 0.1, chain=1, transition="Remind")
        first.write("struck", 0.1, point="in_look")
    second.begin(20, 1, begins=2, unknown=True)
    second.call(20, 1, begins=2, unknown=True)
    case = {"rules": no_after(0.5), "processes": Processes(deaths={11: 0.2})}
    found = moments(first.lines + second.lines, **case)
    assert (found.violations, found.unknown, found.mistaken) == ([], 1, 1)
    first.write("evaluated", 0.2, chain=5)  # or the process died in the library's own code
    assert moments(first.lines + second.lines, **case).mistaken == 0


def test_a_process_that_was_stopped_between_look_and_call_is_not_judged() -> None:
    stopped = Processes(stops={11: [Interval(0.1, 10.0)]})
    found = moments(one_call(turn=10.1, call=10.1), rules=no_after(0.5), processes=stopped)
    assert (found.violations, found.guards_checked, found.stopped) == ([], 0, 1)


# --- hours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "good"), [(9.9, True), (10.05, True), (10.2, False), (18.0, False), (70.0, True)])
def test_hours_hold_for_the_moment_of_the_call(seconds: float, *, good: bool) -> None:
    rules = Rules(hours={"cart": DeliveryHours.parse("08:01-08:00")}, domain_at=at)  # closed from 08:00 to 08:01
    found = moments(one_call(turn=seconds, call=seconds), rules=rules)
    assert found.hours_checked == 1
    assert bool(found.violations) != good


# --- rates -----------------------------------------------------------------------------------------------------------


def rated(**changes: Any) -> Rules:
    return Rules(limits=[Limit("of the type", 2, 1.0, frozenset({"cart"}))], **changes)


@pytest.mark.parametrize(
    ("calls", "good"),
    [
        ((0.0, 0.1, 1.0, 1.1), True),
        ((0.0, 0.6, 0.95), True),  # counted at 0.0, 0.6 and 1.0, and one was called a moment later
        ((0.0, 0.1, 0.5), False),
        ((0.0, 0.9, 1.0, 1.1), False),  # in no second of a clock, but within one second
    ],
)
def test_a_rate_holds_in_every_window(calls: Sequence[float], *, good: bool) -> None:
    worker = Worker()
    for number, seconds in enumerate(calls, 1):
        worker.begin(seconds, number)
        worker.call(seconds, number)
    found = moments(worker.lines, rules=rated())
    assert found.rates_checked == len(calls)
    assert bool(found.violations) != good


def test_rates_are_not_checked_where_the_counts_were_lost() -> None:
    worker = Worker()
    for number in range(1, 5):
        worker.call(0.0, number)
    found = moments(worker.lines, rules=rated(rates_lost="the lock server was emptied"))
    assert (found.violations, found.rates_checked) == ([], 0)


# --- operators -------------------------------------------------------------------------------------------------------

MOMENT = Rules(mono_at_machine=lambda moment: (moment - AT).total_seconds())


def refused(lines: Sequence[Line], *acts: Act, **changes: Any) -> list[str]:
    case = Case(history(lines, acts=acts, **{"rules": MOMENT, **changes}))
    return [violation.what for violation in judge_refusals(case) if violation.chain_id == 1]


def disabled(before: float = 4.9, after: float = 5.0, *, certain: bool = True) -> Act:
    return Act("disable", RESOURCES, before, after, certain)


def paused(after: float = 5.0) -> Act:
    return Act("pause", "cart", after - 0.1, after)


def attempt(begin: float, turn: float) -> list[Line]:
    worker = Worker()
    worker.begin(begin, 1)
    worker.load(begin, 1)
    worker.look(turn, 1)
    worker.call(turn, 1)
    return worker.lines


def test_a_chain_that_begins_after_its_disabling_is_caught() -> None:
    assert refused(attempt(4.95, 5.5), disabled()) == []
    assert any("began 0.200 s after it was disabled" in what for what in refused(attempt(5.2, 5.2), disabled()))
    enabled = Act("enable", RESOURCES, 5.1, 5.15)
    assert refused(attempt(5.2, 5.2), disabled(), enabled) == []


def of_a_group(turn: float) -> list[Line]:
    worker = Worker()
    worker.begin(4.5, 1, 2)
    worker.load(4.5, 1, 2)
    worker.look(4.6, 2)
    worker.call(4.6, 2)
    worker.look(turn, 1)
    worker.call(turn, 1)
    return worker.lines


def test_a_call_of_a_group_may_be_one_second_late_and_no_more() -> None:
    assert refused(of_a_group(5.9), disabled()) == []
    assert any("had its turn 2.000 s after it was disabled" in what for what in refused(of_a_group(7.0), disabled()))


def test_the_second_counts_from_the_return_of_the_load() -> None:
    worker = Worker()
    worker.begin(4.5, 1)
    worker.load(7.0, 1)  # took so long
    worker.look(7.8, 1)
    worker.call(7.8, 1)
    assert refused(worker.lines, disabled()) == []


def test_a_process_that_was_stopped_meanwhile_may_call_late() -> None:
    assert refused(attempt(4.5, 15.0), disabled(), processes=Processes(stops={11: [Interval(4.6, 14.9)]})) == []


def test_a_disabling_that_may_have_failed_proves_nothing() -> None:
    assert refused(attempt(6.0, 6.0), disabled(certain=False)) == []


def test_a_pause_has_two_seconds_to_be_known_everywhere() -> None:
    assert refused(attempt(6.9, 7.5), paused()) == []
    assert any("began 0.200 s after its pause was known" in what for what in refused(attempt(7.5, 7.5), paused()))
    assert any("had its turn" in what for what in refused(of_a_group(9.0), paused()))
    assert refused(attempt(7.5, 7.5), paused(), Act("resume", "cart", 7.0, 7.1)) == []


def test_what_is_begun_of_a_paused_type_and_not_called_is_good() -> None:
    worker = Worker()
    worker.begin(8.0, 1)
    assert refused(worker.lines, paused()) == []
    assert refused(worker.lines, disabled()) != []


@pytest.mark.parametrize(
    ("action", "detail", "good"),
    [("planned", "type", False), ("state_transition", "Paid", False), ("state_transition", "Remind", True)],
)
def test_a_paused_type_plans_and_moves_nothing_but_what_was_begun(action: str, detail: str, *, good: bool) -> None:
    event = EventLine(1, 1, 1, action, "new", "done" if detail == "Paid" else "reminded", detail, mono=7.5)
    assert bool(refused([], paused(), events=[event])) != good
    early = EventLine(1, 1, 1, action, "new", "done" if detail == "Paid" else "reminded", detail, mono=6.5)
    assert refused([], paused(), events=[early]) == []


def test_a_subject_is_certainly_off_between_the_end_of_one_act_and_the_beginning_of_the_next() -> None:
    acts = [
        disabled(),
        Act("enable", RESOURCES, 8.0, 8.5, certain=False),
        Act("enable", RESOURCES, 9.0, 9.5),
        disabled(10.0, 10.5),
    ]
    found = intervals(acts)[RESOURCES]
    assert [(interval.since, interval.until) for interval in found] == [(5.0, 8.0), (10.5, float("inf"))]
