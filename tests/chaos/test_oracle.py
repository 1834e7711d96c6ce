"""The oracle catches the violation of each promise, on histories made by hand."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.chaos.oracle import ChainLine, DeliveryLine, Edge, EventLine, Graph, Healing, History, judge

AT = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = 17.0
REMIND, END = Edge("cart", "new", "Remind", "reminded"), Edge("cart", "reminded", "End", "done")
GRAPH = Graph(frozenset({REMIND, END}), silent=frozenset({END}), terminal=frozenset({("cart", "done")}))
CHAIN = ChainLine(1, "cart", (("order", "7"),), "done", version=3, moves=2)
DELIVERY = DeliveryLine("d1", "k1", 1, 1, "Remind", "new", "reminded", "delivered")
EVENTS = (
    EventLine(1, 1, 0, "created", None, "new"),
    EventLine(2, 1, 1, "planned", "new", "reminded", "type"),
    EventLine(3, 1, 2, "state_transition", "new", "reminded", "Remind", AT),
    EventLine(4, 1, 3, "state_transition", "reminded", "done", "End", AT),
)


def begun(attempt: int = 1, *, seconds: float = 0, delivery: str = "d1") -> dict[str, Any]:
    at = (AT + timedelta(seconds=seconds)).isoformat()
    return {"phase": "begun", "delivery": delivery, "attempt": attempt, "key": "k1", "chain": 1, "at": at}


def effect(attempt: int = 1, *, key: str = "k1", delivery: str = "d1", chain: int = 1) -> dict[str, Any]:
    return {"phase": "effect", "key": key, "chain": chain, "delivery": delivery, "attempt": attempt}


def raised(attempt: int = 1) -> dict[str, Any]:
    return {"phase": "raised", "delivery": "d1", "attempt": attempt, "after_effect": True}


def finished(attempt: int = 1, *, ok: bool = True) -> dict[str, Any]:
    return {"phase": "finished", "delivery": "d1", "attempt": attempt, "ok": ok}


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
        ("I5-doubled", {"sink": (begun(), effect(), begun(2, seconds=5), effect(2), finished(2))}),
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


def test_a_disabled_chain_that_plans_or_begins_is_caught() -> None:
    disabled = EventLine(9, 1, 0, "disabled", created_at=AT)
    assert "I9" in promises(history(events=(disabled, *EVENTS)))
    late = (begun(seconds=11), effect(), finished())
    disabled = EventLine(9, 1, 1, "disabled", created_at=AT)
    assert "I9" in promises(history(events=(*EVENTS, disabled), sink=late))
    enabled = EventLine(10, 1, 1, "enabled", created_at=AT + timedelta(seconds=10))
    assert "I9" not in promises(history(events=(*EVENTS, disabled, enabled), sink=late))


@pytest.mark.parametrize(
    "sink",
    [
        pytest.param((begun(), effect(), raised(), finished(), begun(2, seconds=1), effect(2)), id="raised after it"),
        pytest.param((begun(), effect(), begun(2, seconds=18), effect(2), finished(2)), id="killed after it"),
        pytest.param((begun(), effect(), begun(2, seconds=18), effect(2), finished(ok=False)), id="taken over"),
    ],
)
def test_a_second_effect_is_allowed_where_the_first_attempt_ended_badly(sink: tuple[dict[str, Any], ...]) -> None:
    report = judge(history(sink=sink))
    assert report.violations == []
    assert report.repeated == 1


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
