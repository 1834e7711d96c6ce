"""Deliveries: one attempt at a time, the row as the truth, retried, looked at last, settled after a crash."""

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy import delete
from sqlalchemy.exc import OperationalError

from dispatcher import DONE, NEW, Chain, Dispatcher, PermanentFailure, RetryPolicy, Transition
from dispatcher.domain.records import Owed
from dispatcher.storage import database
from dispatcher.storage.models import ChainRow
from tests.integration.conftest import DispatcherFactory
from tests.integration.transitions import (
    LONG_AGO,
    START,
    Clock,
    Gate,
    Raises,
    Sink,
    actions,
    assert_consistent,
    at_once,
    attempt,
    cart,
    change_delivery,
    count_rows,
    crashed,
    delivery_of,
    dump_rows,
    new_chain,
    planned,
    row_of,
    take_messages,
    transition,
    wait_over,
)
from tests.servers import PostgresServer

pytestmark = pytest.mark.integration

Make = Callable[..., Dispatcher]

CALLBACKS = "dispatcher.callbacks"
Remind = transition("Remind", "reminded")
Never = transition("Never", "never", valid=False)
Once = transition("Once", "once", retry=RetryPolicy(max_attempts=1))


@pytest.fixture(autouse=True)
def _history_is_consistent(make_dispatcher: DispatcherFactory) -> Iterator[None]:
    """Every test here ends with the oracle."""
    yield
    assert_consistent(make_dispatcher.made[-1])


def verifying(*answers: Any) -> type[Transition]:
    """A transition whose `verify()` gives these answers in turn; an exception is raised."""
    left = list(answers)

    def verify(_: Transition) -> bool | None:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    return transition("Verifying", "verified", verify=verify)


# --- delivered -------------------------------------------------------------------------------------------------------


def test_a_callback_that_succeeds_closes_its_delivery_and_moves_the_chain(make_dispatcher: Make) -> None:
    sink, clock = Sink(), Clock()
    dispatcher = make_dispatcher(cart({NEW: [Remind], "reminded": [Never]}, callback=sink), clock=clock)
    chain = new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1}, callback_kwargs={"lang": "de"})
    delivery = planned(dispatcher, chain)
    clock.forward(minutes=5)

    result = attempt(dispatcher, delivery)

    assert (result.outcome, result.chain_id, result.attempt) == ("delivered", chain.id, 1)
    (call,) = sink.calls
    assert call.kwargs == {"lang": "de"} and call.context["a"] == 1 and call.key == delivery.idempotency_key
    row = row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.pending_delivery_id) == ("reminded", clock.now, None)
    assert (row.version, row.moves) == (2, 1)
    closed = delivery_of(dispatcher, chain)
    assert (closed.status, closed.attempt, closed.lease_until, closed.publish_after) == ("delivered", 1, None, None)
    assert closed.finished_at is not None and closed.next_attempt_at is None
    assert (closed.kwargs, closed.context) == (None, None), "blanked"
    said = chain.events[-1]
    assert (said.action, said.value, said.detail, said.created_at) == (
        "state_transition",
        "reminded",
        "Remind",
        START + timedelta(minutes=5),
    )


def test_each_kind_of_callback_is_found_again_by_the_worker_that_delivers(make_dispatcher: Make) -> None:
    own, of_type, named = Sink(), Sink(), Sink()

    def by_itself(self: Transition, **kwargs: Any) -> None:
        own(self, **kwargs)

    steps = {NEW: [transition("Own", "own", callback=by_itself)], "own": [Remind], "reminded": [Once]}
    dispatcher = make_dispatcher(cart(steps, callback=of_type, callbacks={"send": named}))
    chain = new_chain(dispatcher)

    kinds = []
    for request in ({"callback": "send"}, {}, {"callback": "send", "callback_kwargs": {"a": 1}}):
        chain.enqueue(**request)  # type: ignore[arg-type]
        delivery = planned(dispatcher, chain)
        kinds.append(delivery.callback)
        assert attempt(dispatcher, delivery).outcome == "delivered"

    assert kinds == ["own", "type", "named:send"]
    assert (own.names, of_type.names, named.names) == (["Own"], ["Remind"], ["Once"])


def test_the_chain_rests_after_the_delivery_and_terminal_ones_are_not_due(make_dispatcher: Make) -> None:
    until = START + timedelta(days=3)
    resting = transition("Resting", "rested", date_next_update=until)
    dispatcher = make_dispatcher(cart({NEW: [resting], "rested": [Remind]}, callback=Sink()), clock=(clock := Clock()))
    chain = new_chain(dispatcher)
    attempt(dispatcher, planned(dispatcher, chain))
    assert (chain.refresh().next_update_at, chain.due_at) == (until, until)

    clock.now = until
    attempt(dispatcher, planned(dispatcher, chain))

    assert (chain.refresh().state, chain.next_update_at, chain.due_at) == ("reminded", None, None)


def test_several_deliveries_in_one_message_are_attempted_one_by_one(make_dispatcher: Make) -> None:
    sink = Sink(lambda one: Raises(OSError("no"))() if one.chain.resources[0][1] == "b1" else None)
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    chains = [new_chain(dispatcher, number) for number in range(3)]
    owed = [Owed(planned(dispatcher, chain).id, 1) for chain in chains]

    results = dispatcher.deliver(owed)

    assert [str(result.outcome) for result in results] == ["delivered", "retrying", "delivered"]


# --- twice, late, lost -----------------------------------------------------------------------------------------------


def test_a_message_that_comes_twice_calls_back_once(make_dispatcher: Make) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    delivery = planned(dispatcher, new_chain(dispatcher))

    assert attempt(dispatcher, delivery).outcome == "delivered"
    assert attempt(dispatcher, delivery).outcome == "stale"
    assert len(sink) == 1


def test_a_message_that_comes_twice_at_once_calls_back_once(make_dispatcher: Make) -> None:
    sink = Sink()
    dispatchers = [make_dispatcher(cart({NEW: [Remind]}, callback=sink)) for _ in range(8)]
    delivery = planned(dispatchers[0], new_chain(dispatchers[0]))

    results = at_once(*(lambda one=one: attempt(one, delivery) for one in dispatchers))  # type: ignore[misc]

    assert sorted(str(result.outcome) for result in results) == ["delivered", *["stale"] * 7]
    assert len(sink) == 1


def test_a_message_that_comes_while_its_attempt_runs_calls_nobody(make_dispatcher: Make) -> None:
    gate = Gate()
    sink = Sink(gate.wait)
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    delivery = planned(dispatcher, new_chain(dispatcher))

    with gate.during(lambda: attempt(dispatcher, delivery)) as future:
        assert attempt(dispatcher, delivery).outcome == "stale"
        assert attempt(dispatcher, delivery, 2).outcome == "stale"

    assert future.result().outcome == "delivered" and len(sink) == 1


def test_a_lost_message_is_relayed(make_dispatcher: Make, broker_url: str) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    delivery = planned(dispatcher, new_chain(dispatcher))
    take_messages(broker_url, CALLBACKS)
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}, "its message is still under way"

    change_delivery(dispatcher, delivery.id, publish_after=LONG_AGO)
    assert dispatcher.relay() == {"relayed": 1, "settled": 0}
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}, "not again before that message is lost, too"

    (message,) = take_messages(broker_url, CALLBACKS)
    assert message.kwargs == {"deliveries": [[delivery.id, 1]]}
    assert attempt(dispatcher, *message.kwargs["deliveries"][0]).outcome == "delivered"


def test_relays_at_the_same_time_publish_a_delivery_once(make_dispatcher: Make, broker_url: str) -> None:
    dispatchers = [make_dispatcher(cart({NEW: [Remind]}, callback=Sink())) for _ in range(4)]
    owed = [planned(dispatchers[0], new_chain(dispatchers[0], number)) for number in range(5)]
    take_messages(broker_url, CALLBACKS)
    for delivery in owed:
        change_delivery(dispatchers[0], delivery.id, publish_after=LONG_AGO)

    results = at_once(*(one.relay for one in dispatchers))

    assert sum(result["relayed"] for result in results) == 5
    published = [message.kwargs["deliveries"][0][0] for message in take_messages(broker_url, CALLBACKS)]
    assert sorted(published) == sorted(delivery.id for delivery in owed)


def test_what_the_relay_cannot_publish_stays_owed(make_dispatcher: Make, broker_url: str) -> None:
    config = cart({NEW: [Remind]}, callback=Sink())
    cut_off, dispatcher = make_dispatcher(config, broker_url="redis://127.0.0.1:1/0"), make_dispatcher(config)
    delivery = planned(dispatcher, new_chain(dispatcher))
    take_messages(broker_url, CALLBACKS)
    change_delivery(dispatcher, delivery.id, publish_after=LONG_AGO)

    assert cut_off.relay()["relayed"] == 0

    assert dispatcher.relay()["relayed"] == 1


def test_an_attempt_number_that_is_not_next_is_stale(make_dispatcher: Make) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    delivery = planned(dispatcher, new_chain(dispatcher))
    before = dump_rows(dispatcher)

    assert [str(attempt(dispatcher, delivery, number).outcome) for number in (2, 3, 2**31 - 1)] == ["stale"] * 3
    for number in (0, -1, 2**31, 2**70, True):  # no attempt has such a number
        assert attempt(dispatcher, delivery, number).outcome in ("stale", "missing")
    assert dump_rows(dispatcher) == before and len(sink) == 0


def test_an_unknown_delivery_is_missing(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink()))

    for delivery_id in ("", "x", "00000000-0000-7000-8000-000000000000", "' OR 1=1 --", "x" * 5000, "{", "\x00"):
        result = attempt(dispatcher, delivery_id)
        assert result.outcome == "missing" and len(result.delivery_id) <= 40


def test_the_delivery_of_a_chain_deleted_meanwhile_is_missing(make_dispatcher: Make) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    dispatcher.database.write(lambda connection: connection.execute(delete(ChainRow).where(ChainRow.id == chain.id)))

    assert attempt(dispatcher, delivery).outcome == "missing"
    assert dispatcher.relay() == {"relayed": 0, "settled": 0} and len(sink) == 0


def test_a_chain_deleted_during_its_callback_is_a_named_outcome(make_dispatcher: Make) -> None:
    gate = Gate()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink(gate.wait)))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    with gate.during(lambda: attempt(dispatcher, delivery)) as future:
        dispatcher.database.write(
            lambda connection: connection.execute(delete(ChainRow).where(ChainRow.id == chain.id))
        )

    assert future.result().outcome == "stale"
    assert count_rows(dispatcher, ChainRow) == 0


# --- retried ---------------------------------------------------------------------------------------------------------


def test_a_callback_that_fails_is_retried_with_the_same_key_until_it_succeeds(make_dispatcher: Make) -> None:
    sink = Sink(Raises(OSError("mail server down"), times=2))
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    for number in (1, 2):
        assert attempt(dispatcher, delivery, number).outcome == "retrying"
        failed = delivery_of(dispatcher, chain)
        assert (failed.status, failed.attempt) == ("pending", number)
        assert "mail server down" in (failed.last_error or "")
        assert chain.refresh().state == NEW and chain.due_at is None
        wait_over(dispatcher, delivery)

    assert attempt(dispatcher, delivery, 3).outcome == "delivered"
    assert len({call.key for call in sink.calls}) == 1
    assert actions(chain) == ["created", "planned", "state_transition"]


@pytest.mark.parametrize(
    ("policy", "number", "least", "most", "by_celery"),
    [
        (RetryPolicy(jitter=0.2), 1, 8, 12, True),
        (RetryPolicy(jitter=0.2), 2, 24, 36, True),
        (RetryPolicy(base_seconds=60, jitter=0), 1, 60, 60, True),
        (RetryPolicy(base_seconds=61, jitter=0), 1, 61, 61, False),
        (RetryPolicy(max_attempts=20, cap_seconds=3600, jitter=0), 12, 3600, 3600, False),
    ],
)
def test_an_attempt_waits_as_its_policy_says_and_only_short_waits_are_celery_s(
    make_dispatcher: Make,
    broker_url: str,
    policy: RetryPolicy,
    number: int,
    least: float,
    most: float,
    by_celery: bool,
) -> None:
    fails = transition("Fails", "failed", retry=policy)
    dispatcher = make_dispatcher(cart({NEW: [fails]}, callback=Raises(OSError("no"))), queued_seconds=50)
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)
    change_delivery(dispatcher, delivery.id, attempt=number - 1)
    take_messages(broker_url, CALLBACKS)

    result = attempt(dispatcher, delivery, number)
    failed = delivery_of(dispatcher, chain)

    assert result.outcome == "retrying"
    assert failed.next_attempt_at is not None and failed.publish_after is not None
    wait = failed.next_attempt_at - datetime.now(UTC)
    assert timedelta(seconds=least - 5) < wait <= timedelta(seconds=most + 1)
    if by_celery:
        assert least <= result.retry_seconds <= most
        assert abs(failed.publish_after - failed.next_attempt_at - timedelta(seconds=50)) < timedelta(seconds=1)
    else:
        assert result.retry_seconds is None
        assert abs(failed.publish_after - failed.next_attempt_at) < timedelta(seconds=1), "the relay sends it"
    assert take_messages(broker_url, CALLBACKS) == []


def test_an_attempt_that_comes_too_early_is_stale_and_the_relay_sends_it_in_time(
    make_dispatcher: Make, broker_url: str
) -> None:
    slow = transition("Slow", "slow", retry=RetryPolicy(base_seconds=3600))
    sink = Sink(Raises(OSError("no"), times=1))
    dispatcher = make_dispatcher(cart({NEW: [slow]}, callback=sink))
    delivery = planned(dispatcher, new_chain(dispatcher))
    attempt(dispatcher, delivery)
    take_messages(broker_url, CALLBACKS)

    assert attempt(dispatcher, delivery, 2).outcome == "stale"
    assert dispatcher.relay()["relayed"] == 0
    assert len(sink) == 1

    wait_over(dispatcher, delivery)
    assert dispatcher.relay()["relayed"] == 1
    (message,) = take_messages(broker_url, CALLBACKS)
    assert message.kwargs == {"deliveries": [[delivery.id, 2]]}
    assert attempt(dispatcher, delivery, 2).outcome == "delivered"


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3)])
def test_whatever_a_callback_raises_is_a_failed_attempt(make_dispatcher: Make, error: BaseException) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Raises(error)))

    assert attempt(dispatcher, planned(dispatcher, new_chain(dispatcher))).outcome == "retrying"


@pytest.mark.parametrize(("on_dead", "permanent"), [("hold", True), ("hold", False), ("skip", True), ("skip", False)])
def test_out_of_attempts_a_delivery_is_dead_or_skipped(make_dispatcher: Make, on_dead: str, permanent: bool) -> None:
    error = PermanentFailure("no such address") if permanent else OSError("no such address")
    last = Remind if permanent else Once
    config = cart({NEW: [last], last.final_state: [Never]}, callback=Sink(Raises(error)), on_dead=on_dead)
    dispatcher = make_dispatcher(config, clock=Clock())
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    result = attempt(dispatcher, delivery)

    closed = delivery_of(dispatcher, chain)
    row = row_of(dispatcher, chain.id)
    assert "no such address" in result.detail
    (said,) = [one for one in chain.events if one.action in ("dead", "skipped")]
    assert "no such address" in (said.detail or "")
    assert closed.publish_after is None
    if on_dead == "hold":
        assert (result.outcome, closed.status, row.state) == ("dead", "dead", NEW)
        assert (row.pending_delivery_id, row.due_at) == (delivery.id, None)
        assert actions(chain) == ["created", "planned", "dead"]
        assert attempt(dispatcher, delivery, 2).outcome == "stale"
    else:
        assert (result.outcome, closed.status, row.state) == ("skipped", "skipped", last.final_state)
        assert (row.pending_delivery_id, row.due_at) == (None, START)
        assert actions(chain) == ["created", "planned", "skipped", "state_transition"]


def test_a_failed_attempt_needs_no_more_than_its_policy_s_number(make_dispatcher: Make) -> None:
    thrice = transition("Thrice", "thrice", retry=RetryPolicy(max_attempts=3, base_seconds=0))
    sink = Sink(Raises(OSError("no")))
    dispatcher = make_dispatcher(cart({NEW: [thrice]}, callback=sink))
    delivery = planned(dispatcher, new_chain(dispatcher))

    outcomes = [str(attempt(dispatcher, delivery, number).outcome) for number in (1, 2, 3, 4)]

    assert outcomes == ["retrying", "retrying", "dead", "stale"] and len(sink) == 3


# --- the last look ---------------------------------------------------------------------------------------------------


def looked(dispatcher: Dispatcher, chain: Chain, before: Callable[[], Any]) -> Any:
    """The result of an attempt, with `before()` between plan and attempt."""
    delivery = planned(dispatcher, chain)
    before()
    return attempt(dispatcher, delivery)


@pytest.mark.parametrize("who_wins", ["another", "nobody"])
def test_a_delivery_is_cancelled_unless_its_transition_wins_again(
    make_dispatcher: Make, broker_url: str, who_wins: str
) -> None:
    complete: list[bool] = []
    sink, clock = Sink(), Clock()

    def still_open(self: Transition) -> bool:
        if complete:
            self.errors.append("the booking is complete")
        return not complete

    finish = transition("Finish", DONE, lambda _: bool(complete) and who_wins == "another")
    remind = transition("Remind", "reminded", still_open)
    dispatcher = make_dispatcher(cart({NEW: [finish, remind]}, callback=sink), clock=clock)
    chain = new_chain(dispatcher)

    result = looked(dispatcher, chain, lambda: complete.append(True))

    assert result.outcome == "cancelled" and len(sink) == 0
    closed = delivery_of(dispatcher, chain)
    row = row_of(dispatcher, chain.id)
    assert (closed.status, row.state, row.pending_delivery_id, row.due_at) == ("cancelled", NEW, None, START)
    said = chain.events[-1]
    assert said.action == "cancelled"
    assert ("Finish" if who_wins == "another" else "the booking is complete") in (said.detail or "")
    assert closed.context is None and closed.kwargs is None


def test_a_candidate_that_wins_now_is_taken_after_the_cancellation(make_dispatcher: Make) -> None:
    complete: list[bool] = []
    finish = transition("Finish", DONE, lambda _: bool(complete))
    dispatcher = make_dispatcher(cart({NEW: [finish, Remind]}, callback=Sink()))
    chain = new_chain(dispatcher)
    looked(dispatcher, chain, lambda: complete.append(True))

    assert dispatcher.sweep()["due"] == 1
    dispatcher.execute_chains([chain.id])

    assert chain.refresh().state == DONE


def test_the_callback_runs_on_the_very_object_of_the_last_look(make_dispatcher: Make) -> None:
    asked: list[Transition] = []

    def guard(self: Transition) -> bool:
        asked.append(self)
        self.context["seen"] = len(asked)
        return True

    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [transition("Keeps", "kept", guard)]}, callback=sink))

    attempt(dispatcher, planned(dispatcher, new_chain(dispatcher)))

    assert len(asked) == 2
    assert sink.calls[0].transition is asked[1] and sink.calls[0].context["seen"] == 2


def test_a_guard_that_raises_in_the_last_look_is_a_failed_attempt(make_dispatcher: Make) -> None:
    sink, broken = Sink(), []

    def guard(_: Transition) -> bool:
        if broken:
            raise LookupError("the shop's database is away")
        return True

    dispatcher = make_dispatcher(cart({NEW: [transition("Guarded", "guarded", guard)]}, callback=sink))
    chain = new_chain(dispatcher)

    result = looked(dispatcher, chain, lambda: broken.append(1))

    assert result.outcome == "retrying" and len(sink) == 0
    assert "the shop's database is away" in (delivery_of(dispatcher, chain).last_error or "")
    broken.clear()
    wait_over(dispatcher, delivery_of(dispatcher, chain))
    assert attempt(dispatcher, delivery_of(dispatcher, chain), 2).outcome == "delivered"


def test_a_loader_that_raises_in_the_last_look_is_a_failed_attempt(make_dispatcher: Make) -> None:
    broken: list[int] = []

    def load(snapshots: Any) -> dict[int, Any]:
        if broken:
            raise LookupError("no")
        return {}

    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink(), load_context=load))

    assert looked(dispatcher, new_chain(dispatcher), lambda: broken.append(1)).outcome == "retrying"


def test_the_last_look_is_spared_for_attempts_soon_after_the_plan(make_dispatcher: Make) -> None:
    asked: list[object] = []
    counted = transition("Counted", "counted", lambda self: not asked.append(self))
    sink = Sink(Raises(OSError("no"), times=1))
    dispatcher = make_dispatcher(cart({NEW: [counted]}, callback=sink), last_look_seconds=3600)
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    attempt(dispatcher, delivery)
    assert len(asked) == 1 and len(sink) == 1
    assert sink.calls[0].transition.context["resources"] == [("online_booking", "b0")]

    wait_over(dispatcher, delivery)
    change_delivery(dispatcher, delivery.id, planned_at=LONG_AGO)
    assert attempt(dispatcher, delivery, 2).outcome == "delivered"
    assert len(asked) == 2


def test_the_last_look_sees_the_context_of_the_plan_s_request(make_dispatcher: Make) -> None:
    wants = transition("Wants", "wanted", lambda self: self.context.get("wanted") == self.context.get("kept"))
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [wants]}, callback=sink))
    chain = new_chain(dispatcher, initial_context={"kept": 1})
    chain.enqueue(initial_context={"wanted": 1})

    # A later request is for the next evaluation.
    result = looked(dispatcher, chain, lambda: chain.enqueue(initial_context={"wanted": 2}))

    assert result.outcome == "delivered" and sink.calls[0].context["wanted"] == 1


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_delivery_planned_again_in_the_same_visit_of_a_state_has_the_same_key(make_dispatcher: Make) -> None:
    verdicts = [True, False, True, True]
    wants = transition("Wants", "wanted", lambda _: verdicts.pop(0))
    dispatcher = make_dispatcher(cart({NEW: [wants]}, callback=Sink()))
    chain = new_chain(dispatcher)

    first = planned(dispatcher, chain)
    assert attempt(dispatcher, first).outcome == "cancelled"
    second = planned(dispatcher, chain)
    assert attempt(dispatcher, second).outcome == "delivered"

    assert first.id != second.id and first.idempotency_key == second.idempotency_key


def test_keys_differ_between_chains_transitions_and_visits(make_dispatcher: Make) -> None:
    back = {NEW: [Remind], "reminded": [transition("Back", NEW)]}
    dispatcher = make_dispatcher(cart(back, callback=Sink()))
    keys = set()
    for number in range(2):
        chain = new_chain(dispatcher, number)
        for _ in range(3):
            delivery = planned(dispatcher, chain)
            keys.add(delivery.idempotency_key)
            attempt(dispatcher, delivery)
    assert len(keys) == 6


# --- after a crash ---------------------------------------------------------------------------------------------------


def settled(dispatcher: Dispatcher, broker_url: str, chain: Chain, attempts: int = 0) -> list[Any]:
    """What the relay publishes after the worker died inside attempt `attempts + 1` of a chain's new delivery."""
    delivery = planned(dispatcher, chain)
    change_delivery(dispatcher, delivery.id, attempt=attempts)
    crashed(dispatcher, delivery, attempt=attempts + 1)
    take_messages(broker_url, CALLBACKS)
    assert dispatcher.relay()["settled"] == 1
    return [message.kwargs["deliveries"] for message in take_messages(broker_url, CALLBACKS)]


@pytest.mark.parametrize("on_unknown", ["retry", "hold"])
def test_a_running_attempt_within_its_lease_is_left_alone(make_dispatcher: Make, on_unknown: str) -> None:
    gate, sink = Gate(), Sink()
    sink.effect = gate.wait
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink, on_unknown=on_unknown))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    with gate.during(lambda: attempt(dispatcher, delivery)) as future:
        lease_until = delivery_of(dispatcher, chain).lease_until
        assert lease_until is not None
        assert timedelta(seconds=60) < lease_until - datetime.now(UTC) <= timedelta(seconds=75)
        change_delivery(dispatcher, delivery.id, publish_after=LONG_AGO)  # whatever made the relay look
        dispatcher.relay()
        assert delivery_of(dispatcher, chain).status == "running"

    assert future.result().outcome == "delivered"


def test_after_a_crash_the_attempt_is_retried_with_the_same_key(make_dispatcher: Make, broker_url: str) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    chain = new_chain(dispatcher)

    assert settled(dispatcher, broker_url, chain) == [], "after its back-off"

    delivery = delivery_of(dispatcher, chain)
    assert (delivery.status, delivery.attempt, delivery.unknown) == ("pending", 1, True)
    assert attempt(dispatcher, delivery, 2).outcome == "stale"
    wait_over(dispatcher, delivery)
    assert dispatcher.relay()["relayed"] == 1
    assert attempt(dispatcher, delivery, 2).outcome == "delivered"
    assert sink.calls[0].key == delivery.idempotency_key


def test_a_delivery_with_an_unknown_attempt_is_not_cancelled_by_the_last_look(
    make_dispatcher: Make, broker_url: str
) -> None:
    verdicts = [True]
    sink = Sink()
    wants = transition("Wants", "wanted", lambda _: bool(verdicts and verdicts.pop()))
    dispatcher = make_dispatcher(cart({NEW: [wants]}, callback=sink))
    chain = new_chain(dispatcher)
    settled(dispatcher, broker_url, chain)
    delivery = delivery_of(dispatcher, chain)
    wait_over(dispatcher, delivery)

    assert attempt(dispatcher, delivery, 2).outcome == "delivered"
    assert len(sink) == 1


def test_after_a_crash_the_delivery_is_held_where_the_type_says_so(make_dispatcher: Make, broker_url: str) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink, on_unknown="hold"))
    chain = new_chain(dispatcher)

    assert settled(dispatcher, broker_url, chain) == []

    delivery = delivery_of(dispatcher, chain)
    assert (delivery.status, delivery.unknown) == ("held", True)
    assert actions(chain)[-1] == "held"
    assert row_of(dispatcher, chain.id).pending_delivery_id == delivery.id
    assert attempt(dispatcher, delivery, 2).outcome == "stale" and len(sink) == 0
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}


@pytest.mark.parametrize("on_unknown", ["retry", "hold"])
@pytest.mark.parametrize(
    ("answer", "outcome", "calls"),
    [(True, "delivered", 0), (False, "delivered", 1), (OSError("cannot ask"), "retrying", 0)],
)
def test_verify_decides_after_a_crash(
    make_dispatcher: Make, broker_url: str, on_unknown: str, answer: Any, outcome: str, calls: int
) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [verifying(answer)]}, callback=sink, on_unknown=on_unknown))
    chain = new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)
    result = attempt(dispatcher, *owed)

    assert owed[1] == 2
    assert (result.outcome, len(sink)) == (outcome, calls)
    assert chain.refresh().state == ("verified" if outcome == "delivered" else NEW)


@pytest.mark.parametrize(("on_unknown", "outcome", "calls"), [("retry", "delivered", 1), ("hold", "held", 0)])
def test_where_verify_cannot_tell_the_type_decides(
    make_dispatcher: Make, broker_url: str, on_unknown: str, outcome: str, calls: int
) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [verifying(None)]}, callback=sink, on_unknown=on_unknown))
    chain = new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)

    assert attempt(dispatcher, *owed).outcome == outcome
    assert len(sink) == calls


def test_an_effect_that_did_not_take_place_lets_the_last_look_cancel_again(
    make_dispatcher: Make, broker_url: str
) -> None:
    verdicts = [True]
    sink = Sink()
    wants = transition("Wants", "wanted", lambda _: bool(verdicts and verdicts.pop()), verify=lambda _: False)
    dispatcher = make_dispatcher(cart({NEW: [wants]}, callback=sink))
    chain = new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)

    assert attempt(dispatcher, *owed).outcome == "cancelled" and len(sink) == 0


def test_a_failure_after_verify_said_no_leaves_nothing_unknown(make_dispatcher: Make, broker_url: str) -> None:
    sink = Sink(Raises(PermanentFailure("no")))
    dispatcher = make_dispatcher(cart({NEW: [verifying(False)]}, callback=sink))
    chain = new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)

    assert attempt(dispatcher, *owed).outcome == "dead"
    assert delivery_of(dispatcher, chain).unknown is False


def test_verify_knows_the_idempotency_key(make_dispatcher: Make, broker_url: str) -> None:
    keys: list[str | None] = []
    knows = transition("Knows", "known", verify=lambda self: not keys.append(self.idempotency_key))
    dispatcher = make_dispatcher(cart({NEW: [knows]}, callback=Sink()))
    chain = new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)
    attempt(dispatcher, *owed)

    assert keys == [delivery_of(dispatcher, chain).idempotency_key]


@pytest.mark.parametrize(("on_dead", "status"), [("hold", "dead"), ("skip", "skipped")])
def test_a_crash_in_the_last_attempt_ends_the_delivery(
    make_dispatcher: Make, broker_url: str, on_dead: str, status: str
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Once], "once": [Never]}, callback=Sink(), on_dead=on_dead))
    chain = new_chain(dispatcher)

    assert settled(dispatcher, broker_url, chain) == []

    assert delivery_of(dispatcher, chain).status == status
    assert chain.refresh().state == (NEW if status == "dead" else "once")
    assert (chain.due_at is None) == (status == "dead")


@pytest.mark.parametrize(("answer", "status"), [(True, "delivered"), (False, "dead"), (None, "dead")])
def test_verify_is_asked_after_a_crash_in_the_last_attempt_as_well(
    make_dispatcher: Make, broker_url: str, answer: bool | None, status: str
) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [verifying(answer)]}, callback=sink))
    chain = new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain, attempts=4)
    attempt(dispatcher, *owed)

    assert delivery_of(dispatcher, chain).status == status and len(sink) == 0


@pytest.mark.parametrize(("on_unknown", "status"), [("retry", "cancelled"), ("hold", "held")])
def test_an_in_process_call_whose_process_died_is_cancelled_or_held(
    make_dispatcher: Make, broker_url: str, on_unknown: str, status: str
) -> None:
    gate = Gate()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, on_unknown=on_unknown), clock=Clock())
    chain = new_chain(dispatcher)
    with gate.during(lambda: chain.execute(callback=Sink(gate.wait))) as future:
        delivery = delivery_of(dispatcher, chain)
        assert (delivery.callback, delivery.status, delivery.attempt) == ("local", "running", 1)
        change_delivery(dispatcher, delivery.id, lease_until=LONG_AGO, publish_after=LONG_AGO)
        assert dispatcher.relay() == {"relayed": 0, "settled": 1}

        assert delivery_of(dispatcher, chain).status == status
        row = row_of(dispatcher, chain.id)
        assert (row.state, row.due_at) == (NEW, START if status == "cancelled" else None)

    assert future.result()["outcome"] == "stale"
    assert take_messages(broker_url, CALLBACKS) == []


def test_an_attempt_that_was_settled_meanwhile_does_not_move_the_chain(make_dispatcher: Make) -> None:
    gate = Gate()
    sink = Sink(gate.wait)
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    with gate.during(lambda: attempt(dispatcher, delivery)) as future:
        change_delivery(dispatcher, delivery.id, lease_until=LONG_AGO, publish_after=LONG_AGO)
        dispatcher.relay()
        wait_over(dispatcher, delivery)
        gate.reached.clear()
        sink.effect = None
        assert attempt(dispatcher, delivery, 2).outcome == "delivered"

    assert future.result().outcome == "stale"
    assert chain.refresh().state == "reminded" and actions(chain).count("state_transition") == 1
    assert len({call.key for call in sink.calls}) == 1


def test_a_late_failure_of_an_attempt_that_was_settled_changes_nothing(make_dispatcher: Make) -> None:
    gate = Gate()

    def fails(_: object) -> None:
        gate.wait()
        raise PermanentFailure("too late")

    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink(fails)))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    with gate.during(lambda: attempt(dispatcher, delivery)) as future:
        change_delivery(dispatcher, delivery.id, lease_until=LONG_AGO, publish_after=LONG_AGO)
        dispatcher.relay()
        before = dump_rows(dispatcher)

    assert future.result().outcome == "stale"
    assert dump_rows(dispatcher) == before


def test_relays_at_the_same_time_settle_a_crash_once(make_dispatcher: Make) -> None:
    dispatchers = [make_dispatcher(cart({NEW: [Remind]}, callback=Sink(), on_unknown="hold")) for _ in range(4)]
    chain = new_chain(dispatchers[0])
    crashed(dispatchers[0], planned(dispatchers[0], chain))

    at_once(*(one.relay for one in dispatchers))

    assert actions(chain) == ["created", "planned", "held"]


def test_a_crash_in_a_type_that_this_worker_does_not_know_is_left_to_another(
    make_dispatcher: Make, broker_url: str
) -> None:
    other = {"chains": [{"chain_type": "basket", "transitions": {NEW: [Remind]}}]}
    ours, theirs = make_dispatcher(other), make_dispatcher(cart({NEW: [Remind]}, callback=Sink(), on_unknown="hold"))
    chain = new_chain(theirs)
    delivery = planned(theirs, chain)
    crashed(theirs, delivery)

    ours.relay()
    assert delivery_of(theirs, chain).status == "running"

    change_delivery(theirs, delivery.id, publish_after=LONG_AGO)
    theirs.relay()
    assert delivery_of(theirs, chain).status == "held"


# --- definitions that this worker does not know ----------------------------------------------------------------------


@pytest.mark.parametrize("unknown", ["transition", "callback", "type callback", "chain type"])
def test_what_this_worker_does_not_know_uses_no_attempt(make_dispatcher: Make, broker_url: str, unknown: str) -> None:
    sink = Sink()
    knows = cart({NEW: [Remind], "reminded": []}, callback=sink, callbacks={"send": sink})
    other = {
        "transition": cart({NEW: [Never], "reminded": []}, callback=sink, callbacks={"send": sink}),
        "callback": cart({NEW: [Remind], "reminded": []}, callback=sink),
        "type callback": cart({NEW: [Remind], "reminded": []}, callbacks={"send": sink}),
        "chain type": {"chains": [{"chain_type": "basket", "transitions": {NEW: [Remind]}}]},
    }[unknown]
    old, new = make_dispatcher(other), make_dispatcher(knows)
    chain = new_chain(new)
    chain.enqueue(callback="send" if unknown == "callback" else None)
    delivery = planned(new, chain)

    for _ in range(3):
        assert attempt(old, delivery).outcome == "unknown_definition"
        waiting = delivery_of(new, chain)
        assert (waiting.status, waiting.attempt) == ("pending", 0)
        assert waiting.next_attempt_at is not None and waiting.next_attempt_at > datetime.now(UTC)
        assert attempt(old, delivery).outcome == "stale"
        wait_over(new, delivery)

    assert actions(chain).count("unknown_definition") == 1
    assert len(sink) == 0
    assert attempt(new, delivery).outcome == "delivered"
    assert len(sink) == 1


# --- ends that cannot be written at once -----------------------------------------------------------------------------


def test_an_end_whose_commit_reported_an_error_is_read_back(
    make_dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit took place and its answer was lost: the attempt is neither failed nor made again."""
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind], "reminded": [Never]}, callback=sink))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)
    lost: list[object] = []

    def lose_answer(step: Callable[[], Any]) -> Any:
        answer = step()
        if sink.calls and not lost:
            lost.append(step)
            raise OperationalError("COMMIT", None, OSError("connection reset by peer"), connection_invalidated=True)
        return answer

    monkeypatch.setattr(database, "commit", lose_answer)
    result = attempt(dispatcher, delivery)

    assert len(lost) == 1
    assert result.outcome == "delivered" and len(sink) == 1
    assert chain.refresh().state == "reminded" and delivery_of(dispatcher, chain).attempt == 1
    assert actions(chain) == ["created", "planned", "state_transition"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # a file is never away
def test_an_end_is_written_again_and_again_while_the_database_is_away(
    make_dispatcher: Make, postgres_server: PostgresServer, database_url: str
) -> None:
    name = database_url.rpartition("/")[2]
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    def admin(statement: sql.Composed) -> None:
        with postgres_server.connect() as connection:
            connection.execute(statement)

    def close_database(_: object) -> None:
        admin(sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
        connections = sql.SQL("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = {}")
        admin(connections.format(sql.Literal(name)))

    class Reopen(logging.Handler):
        seen = 0

        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "action", "") == "finish_failed":
                self.seen += 1
                if self.seen == 2:
                    admin(sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS true").format(sql.Identifier(name)))

    handler = Reopen()
    sink.effect = close_database
    logger = logging.getLogger("dispatcher.delivery.recording")
    logger.addHandler(handler)
    try:
        result = attempt(dispatcher, delivery)
    finally:
        logger.removeHandler(handler)

    assert handler.seen >= 2
    assert result.outcome == "delivered" and len(sink) == 1
    assert delivery_of(dispatcher, chain).attempt == 1


# --- what is kept of them --------------------------------------------------------------------------------------------


def test_deliveries_are_found_by_chain_type_and_status(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink()))
    first, second = new_chain(dispatcher, 1), new_chain(dispatcher, 2)
    attempt(dispatcher, planned(dispatcher, first))
    waiting = planned(dispatcher, second)

    assert [one.id for one in dispatcher.find_deliveries(statuses=["pending"])] == [waiting.id]
    assert len(dispatcher.find_deliveries(chain_type="cart")) == 2
    assert dispatcher.find_deliveries(chain_type="basket") == []
    assert [one.chain_id for one in dispatcher.find_deliveries(limit=1)] == [second.id]
