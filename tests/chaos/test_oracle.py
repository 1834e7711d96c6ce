"""The oracle catches the violation of each promise, on histories made by hand."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.chaos.history import (
    ChainLine,
    DeliveryLine,
    Edge,
    EventLine,
    Graph,
    Healing,
    History,
    Interval,
    Processes,
)
from tests.chaos.oracle import judge

AT = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = 12.0
REMIND, END = Edge("cart", "new", "Remind", "reminded"), Edge("cart", "reminded", "End", "done")
GRAPH = Graph(frozenset({REMIND, END}), silent=frozenset({END}), terminal=frozenset({("cart", "done")}))
CHAIN = ChainLine(1, "cart", (("order", "7"),), "done", version=3, moves=2, created_at=AT)
DELIVERY = DeliveryLine("d1", "k1", 1, 1, "Remind", "new", "reminded", "delivered")
EVENTS = (
    EventLine(1, 1, 0, "created", None, "new"),
    EventLine(2, 1, 1, "planned", "new", "reminded", "type", mono=0.0),
    EventLine(3, 1, 2, "state_transition", "new", "reminded", "Remind", mono=0.1),
    EventLine(4, 1, 3, "state_transition", "reminded", "done", "End", mono=0.1),
)
DEAD = Processes(deaths={11: 1.0})


def line(phase: str, attempt: int, seconds: float, delivery: str, **facts: Any) -> dict[str, Any]:
    """A line of the sink: attempt `n` is made by process `10 + n`."""
    who = {"phase": phase, "mono": seconds, "pid": 10 + attempt, "thread": 1}
    return {**who, "delivery": delivery, "attempt": attempt, "begins": attempt, **facts}


def begun(attempt: int = 1, *, seconds: float = 0, delivery: str = "d1") -> dict[str, Any]:
    at = (AT + timedelta(seconds=seconds)).isoformat()
    return line("begun", attempt, seconds, delivery, key="k1", chain=1, at=at)


def effect(
    attempt: int = 1, *, key: str = "k1", delivery: str = "d1", chain: int = 1, seconds: float = 0
) -> dict[str, Any]:
    return line("effect", attempt, seconds, delivery, key=key, chain=chain)


def raised(attempt: int = 1) -> dict[str, Any]:
    return line("raised", attempt, 0, "d1", after_effect=True)


def finished(attempt: int = 1, *, ok: bool = True, **facts: Any) -> dict[str, Any]:
    return line("finished", attempt, 0, "d1", ok=ok, **facts)


def history(**changes: Any) -> History:
    values: dict[str, Any] = {
        "graph": GRAPH,
        "expected": {("cart", (("order", "7"),)): 1},
        "chains": (CHAIN,),
        "events": EVENTS,
        "deliveries": (DELIVERY,),
        "sink": (begun(), effect(), finished()),
        "lease_seconds": LEASE,
    }
    return History(**{**values, **changes})


def promises(case: History) -> set[str]:
    return {violation.promise for violation in judge(case).violations}


def test_a_good_history_has_no_violation_and_is_counted() -> None:
    report = judge(history(healings=(Healing("due", 1, 2.0, 5.0),), dumps=("same", "same")))
    assert report.violations == []
    assert (report.chains, report.moves, report.callbacks, report.repeated) == (1, 2, 1, 0)
    assert (report.healing_seconds, report.promised_seconds) == (2.0, 5.0)
    assert (report.lost, report.phantom, report.doubled) == (0, 0, 0)


def changed_event(index: int, **changes: Any) -> tuple[EventLine, ...]:
    return tuple(replace(event, **changes) if at == index else event for at, event in enumerate(EVENTS))


@pytest.mark.parametrize(
    ("promise", "changes"),
    [
        ("I1", {"events": changed_event(3, from_state="new")}),
        ("I1", {"events": changed_event(3, detail="Unknown")}),
        ("I2", {"chains": (replace(CHAIN, state="reminded"),)}),
        ("I2", {"chains": (replace(CHAIN, moves=3),)}),
        ("I3", {"deliveries": ()}),
        ("I3", {"events": EVENTS[:2]}),
        ("I3", {"deliveries": (replace(DELIVERY, chain_version=2),)}),
        ("I3", {"sink": (begun(), finished())}),
        ("I4", {"sink": (begun(), effect(), finished(), effect(key="k2"))}),
        ("I4", {"sink": (begun(), effect(chain=2), finished())}),
        ("I5-open", {"deliveries": (replace(DELIVERY, status="running"),)}),
        ("I5-open", {"chains": (replace(CHAIN, pending_delivery_id="d1"),)}),
        ("I5-open", {"chains": (replace(CHAIN, pending_delivery_id="d9"),)}),
        ("I5-doubled", {"sink": (begun(), effect(), effect(), finished())}),
        ("I5-doubled", {"sink": (begun(), effect(), finished(), begun(2, seconds=30), effect(2), finished(2))}),
        ("I5-doubled", {"sink": (begun(), effect(), begun(2, seconds=5), effect(2, seconds=5), finished(2))}),
        ("I6", {"events": changed_event(3, chain_version=2)}),
        ("I6", {"chains": (replace(CHAIN, version=2),)}),
        ("I7", {"expected": {("cart", (("order", "7"),)): 1, ("cart", (("order", "8"),)): 1}}),
        ("I7", {"expected": {}}),
        ("I7", {"chains": (CHAIN, replace(CHAIN, id=2))}),
        ("I7", {"events": EVENTS[1:]}),
        ("I8", {"dumps": ({"chain": [1]}, {"chain": [2]})}),
        ("I10", {"healings": (Healing("due", 1, 6.0, 5.0),)}),
        ("I10", {"healings": (Healing("due", 1, None, 5.0),)}),
        ("progress", {"chains": (replace(CHAIN, state="reminded", moves=1),), "events": EVENTS[:3]}),
    ],
)
def test_a_violation_is_caught(promise: str, changes: Mapping[str, Any]) -> None:
    assert promise in promises(history(**changes))


def test_a_disabled_chain_that_plans_is_caught() -> None:
    disabled = EventLine(9, 1, 0, "disabled")
    assert "I9" in promises(history(events=(disabled, *EVENTS)))
    enabled = EventLine(10, 1, 0, "enabled")
    assert "I9" not in promises(history(events=(disabled, enabled, *EVENTS)))


AGAIN = (begun(2, seconds=30), effect(2, seconds=30), finished(2))


@pytest.mark.parametrize(
    ("sink", "processes"),
    [
        pytest.param((begun(), effect(), raised(), finished(), *AGAIN), Processes(), id="raised after it"),
        pytest.param((begun(), effect(), *AGAIN), DEAD, id="killed after it"),
        pytest.param(
            (begun(), effect(), *AGAIN, finished(ok=False)), Processes(stops={11: [Interval(2, 29)]}), id="stopped"
        ),
        pytest.param(
            (begun(), *AGAIN, effect(seconds=40), finished(ok=False)),
            Processes(stops={11: [Interval(2, 39)]}),
            id="stopped before its effect, which comes last",
        ),
        pytest.param(
            (begun(), effect(), *AGAIN, finished(ok=False)), Processes(cut_off=[Interval(2, 29)]), id="cut off"
        ),
        pytest.param(
            (begun(), effect(), finished(ok=False, error="ServiceUnavailable"), *AGAIN),
            Processes(outages=[Interval(1, 25)]),
            id="not recorded, because the database was away past its lease",
        ),
    ],
)
def test_a_second_effect_is_allowed_where_the_first_attempt_ended_badly(
    sink: tuple[dict[str, Any], ...], processes: Processes
) -> None:
    report = judge(history(sink=sink, processes=processes))
    assert report.violations == []
    assert report.repeated == 1


@pytest.mark.parametrize(
    ("sink", "processes"),
    [
        pytest.param((begun(), effect(), *AGAIN), Processes(), id="it lived, and its lease ran out"),
        pytest.param((begun(), effect(), *AGAIN), Processes(deaths={11: 60.0}), id="it died long after that"),
        pytest.param((begun(), effect(), *AGAIN), Processes(deaths={12: 1.0}), id="another process died"),
        pytest.param((begun(), *AGAIN, effect(seconds=40)), Processes(), id="two at once, and the second was quicker"),
        pytest.param(
            (begun(), effect(), *AGAIN, finished(ok=False)), Processes(stops={11: [Interval(2, 12)]}), id="stopped 10 s"
        ),
        pytest.param(
            (begun(), effect(), *AGAIN, finished(ok=False)),
            Processes(outages=[Interval(1, 29)]),
            id="taken over by a relay that came back first",
        ),
        pytest.param(
            (begun(), effect(), finished(ok=False, error="ServiceUnavailable"), *AGAIN),
            Processes(outages=[Interval(1, 3)]),
            id="not recorded, although the database was away for a moment only",
        ),
    ],
)
def test_a_second_effect_while_its_process_lived_is_caught(
    sink: tuple[dict[str, Any], ...], processes: Processes
) -> None:
    assert "I5-doubled" in promises(history(sink=sink, processes=processes))


def test_a_second_effect_of_one_visit_under_another_key_is_caught() -> None:
    cancelled = replace(DELIVERY, id="d0", key="k0", chain_version=1, status="cancelled")
    first = (begun(delivery="d0"), effect(delivery="d0", key="k0"), {**raised(), "delivery": "d0"})
    events = (*EVENTS[:2], *(replace(event, chain_version=event.chain_version + 2) for event in EVENTS[1:]))
    later = {
        "chains": (replace(CHAIN, version=5),),
        "events": events,
        "deliveries": (cancelled, replace(DELIVERY, chain_version=3)),
        "sink": (*first, begun(2, seconds=1), effect(2), finished(2)),
    }
    assert promises(history(**later)) == {"I5-key"}
    same_key = (replace(cancelled, key="k1"), replace(DELIVERY, chain_version=3))
    sink = (begun(delivery="d0"), effect(delivery="d0"), {**raised(), "delivery": "d0"}, *later["sink"][3:])
    assert promises(history(**{**later, "deliveries": same_key, "sink": sink})) == set()


def test_effects_of_two_visits_may_have_two_keys() -> None:
    back = EventLine(5, 1, 4, "reset", "done", "new")
    again = [
        EventLine(6, 1, 5, "planned", "new", "reminded", "type"),
        EventLine(7, 1, 6, "state_transition", "new", "reminded", "Remind"),
        EventLine(8, 1, 7, "state_transition", "reminded", "done", "End"),
    ]
    second = replace(DELIVERY, id="d2", key="k2", chain_version=5)
    case = history(
        chains=(replace(CHAIN, version=7, moves=5),),
        events=(*EVENTS, back, *again),
        deliveries=(DELIVERY, second),
        sink=(begun(), effect(), finished(), begun(2, delivery="d2"), effect(2, key="k2", delivery="d2")),
    )
    assert promises(case) == set()


def test_an_operator_s_move_needs_no_edge_but_must_continue_the_walk() -> None:
    reset = EventLine(5, 1, 4, "reset", "done", "new")
    chain = replace(CHAIN, state="new", version=4, moves=3, disabled=True)
    assert promises(history(events=(*EVENTS, reset), chains=(chain,))) == set()
    assert "I1" in promises(history(events=(*EVENTS, replace(reset, from_state="reminded")), chains=(chain,)))


def test_a_chain_that_waits_for_a_person_need_not_progress() -> None:
    dead = replace(DELIVERY, status="dead")
    chain = replace(CHAIN, state="new", moves=0, version=2, pending_delivery_id="d1")
    assert promises(history(chains=(chain,), deliveries=(dead,), events=EVENTS[:2])) == set()
    waits = replace(DELIVERY, status="pending")
    off = replace(chain, disabled=True)
    assert promises(history(chains=(off,), deliveries=(waits,), events=EVENTS[:2])) == set()
