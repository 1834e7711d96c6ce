"""Deliveries: one attempt at a time, the row as the truth, retried, looked at last, settled after a crash."""

import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import Mock

import pytest
from psycopg import sql
from sqlalchemy import delete
from sqlalchemy.exc import OperationalError

from dispatcher import (
    DONE,
    NEW,
    Chain,
    Dispatcher,
    PermanentFailure,
    RetryPolicy,
    ServiceUnavailable,
    Transition,
)
from dispatcher.domain.records import Owed
from dispatcher.storage import clock, database, deliveries
from dispatcher.storage.models import ChainRow
from tests.integration import shop
from tests.servers import PostgresServer

pytestmark = pytest.mark.integration

Once = shop.transition("Once", "once", retry=RetryPolicy(max_attempts=1))


def verifying(*answers: Any) -> type[Transition]:
    """A transition whose `verify()` gives these answers in turn; an exception is raised."""
    left = list(answers)

    def verify(_: Transition) -> bool | None:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    return shop.transition("Verifying", "verified", verify=verify)


# --- delivered -------------------------------------------------------------------------------------------------------


def test_a_callback_that_succeeds_closes_its_delivery_and_moves_the_chain(make_dispatcher: shop.Make) -> None:
    sink, clock = shop.Sink(), shop.Clock()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=sink), clock=clock)
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1}, callback_kwargs={"lang": "de"})
    delivery = shop.planned(dispatcher, chain)
    clock.forward(minutes=5)

    result = shop.attempt(dispatcher, delivery)

    assert (result.outcome, result.chain_id, result.attempt) == ("delivered", chain.id, 1)
    (call,) = sink.calls
    assert call.kwargs == {"lang": "de"} and call.context["a"] == 1 and call.key == delivery.idempotency_key
    row = shop.row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.pending_delivery_id) == ("reminded", clock.now, None)
    assert (row.version, row.moves) == (2, 1)
    closed = shop.delivery_of(dispatcher, chain)
    assert (closed.status, closed.attempt, closed.lease_until, closed.publish_after) == ("delivered", 1, None, None)
    assert closed.finished_at is not None and closed.next_attempt_at is None
    assert (closed.kwargs, closed.context) == (None, None), "blanked"
    said = chain.events[-1]
    assert (said.action, said.value, said.detail, said.created_at) == (
        "state_transition",
        "reminded",
        "Remind",
        shop.START + timedelta(minutes=5),
    )


def test_each_kind_of_callback_is_found_again_by_the_worker_that_delivers(make_dispatcher: shop.Make) -> None:
    own, of_type, named = shop.Sink(), shop.Sink(), shop.Sink()

    def by_itself(self: Transition, **kwargs: Any) -> None:
        own(self, **kwargs)

    steps = {NEW: [shop.transition("Own", "own", callback=by_itself)], "own": [shop.Remind], "reminded": [Once]}
    dispatcher = make_dispatcher(shop.cart(steps, callback=of_type, callbacks={"send": named}))
    chain = shop.new_chain(dispatcher)

    kinds = []
    for request in ({"callback": "send"}, {}, {"callback": "send", "callback_kwargs": {"a": 1}}):
        chain.enqueue(**request)  # type: ignore[arg-type]
        delivery = shop.planned(dispatcher, chain)
        kinds.append(delivery.callback)
        assert shop.attempt(dispatcher, delivery).outcome == "delivered"

    assert kinds == ["own", "type", "named:send"]
    assert (own.names, of_type.names, named.names) == (["Own"], ["Remind"], ["Once"])


def test_the_chain_rests_after_the_delivery_and_terminal_ones_are_not_due(make_dispatcher: shop.Make) -> None:
    until = shop.START + timedelta(days=3)
    resting = shop.transition("Resting", "rested", date_next_update=until)
    dispatcher = make_dispatcher(
        shop.cart({NEW: [resting], "rested": [shop.Remind]}, callback=shop.Sink()), clock=(clock := shop.Clock())
    )
    chain = shop.new_chain(dispatcher)
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    assert (chain.refresh().next_update_at, chain.due_at) == (until, until)

    clock.now = until
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))

    assert (chain.refresh().state, chain.next_update_at, chain.due_at) == ("reminded", None, None)


def test_several_deliveries_in_one_message_are_attempted_one_by_one(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink(lambda one: shop.Raises(OSError("no"))() if one.chain.resources[0][1] == "b1" else None)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chains = [shop.new_chain(dispatcher, number) for number in range(3)]
    owed = [Owed(shop.planned(dispatcher, chain).id, 1) for chain in chains]

    results = dispatcher.deliver(owed)

    assert [str(result.outcome) for result in results] == ["delivered", "retrying", "delivered"]


# --- twice, late, lost -----------------------------------------------------------------------------------------------


def test_a_message_that_comes_twice_calls_back_once(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))

    assert shop.attempt(dispatcher, delivery).outcome == "delivered"
    assert shop.attempt(dispatcher, delivery).outcome == "stale"
    assert len(sink) == 1


def test_a_message_that_comes_twice_at_once_calls_back_once(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatchers = [make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink)) for _ in range(8)]
    delivery = shop.planned(dispatchers[0], shop.new_chain(dispatchers[0]))

    results = shop.at_once(*(lambda one=one: shop.attempt(one, delivery) for one in dispatchers))  # type: ignore[misc]

    assert sorted(str(result.outcome) for result in results) == ["delivered", *["stale"] * 7]
    assert len(sink) == 1


def test_a_message_that_comes_while_its_attempt_runs_calls_nobody(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    sink = shop.Sink(gate.wait)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        assert shop.attempt(dispatcher, delivery).outcome == "stale"
        assert shop.attempt(dispatcher, delivery, 2).outcome == "stale"

    assert future.result().outcome == "delivered" and len(sink) == 1


def test_a_lost_message_is_relayed(make_dispatcher: shop.Make, broker_url: str) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    shop.take_messages(broker_url, shop.CALLBACKS)
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}, "its message is still under way"

    shop.change_delivery(dispatcher, delivery.id, publish_after=shop.LONG_AGO)
    assert dispatcher.relay() == {"relayed": 1, "settled": 0}
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}, "not again before that message is lost, too"

    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert message.kwargs == {"deliveries": [[delivery.id, 1]]}
    assert shop.attempt(dispatcher, *message.kwargs["deliveries"][0]).outcome == "delivered"


def test_relays_at_the_same_time_publish_a_delivery_once(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatchers = [make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink())) for _ in range(4)]
    owed = [shop.planned(dispatchers[0], shop.new_chain(dispatchers[0], number)) for number in range(5)]
    shop.take_messages(broker_url, shop.CALLBACKS)
    for delivery in owed:
        shop.change_delivery(dispatchers[0], delivery.id, publish_after=shop.LONG_AGO)

    results = shop.at_once(*(one.relay for one in dispatchers))

    assert sum(result["relayed"] for result in results) == 5
    published = [message.kwargs["deliveries"][0][0] for message in shop.take_messages(broker_url, shop.CALLBACKS)]
    assert sorted(published) == sorted(delivery.id for delivery in owed)


def test_what_the_relay_cannot_publish_stays_owed(make_dispatcher: shop.Make, broker_url: str) -> None:
    config = shop.cart({NEW: [shop.Remind]}, callback=shop.Sink())
    cut_off, dispatcher = make_dispatcher(config, broker_url=shop.NOBODY), make_dispatcher(config)
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    shop.take_messages(broker_url, shop.CALLBACKS)
    shop.change_delivery(dispatcher, delivery.id, publish_after=shop.LONG_AGO)

    assert cut_off.relay()["relayed"] == 0

    assert dispatcher.relay()["relayed"] == 1


def test_an_attempt_number_that_is_not_next_is_stale(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    before = shop.dump_rows(dispatcher)

    assert [str(shop.attempt(dispatcher, delivery, number).outcome) for number in (2, 3, 2**31 - 1)] == ["stale"] * 3
    for number in (0, -1, 2**31, 2**70, True):  # no attempt has such a number
        assert shop.attempt(dispatcher, delivery, number).outcome in ("stale", "missing")
    assert shop.dump_rows(dispatcher) == before and len(sink) == 0


def test_an_unknown_delivery_is_missing(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))

    for delivery_id in ("", "x", "00000000-0000-7000-8000-000000000000", "' OR 1=1 --", "x" * 5000, "{", "\x00"):
        result = shop.attempt(dispatcher, delivery_id)
        assert result.outcome == "missing" and len(result.delivery_id) <= 40


def test_the_delivery_of_a_chain_deleted_meanwhile_is_missing(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    dispatcher.database.write(lambda connection: connection.execute(delete(ChainRow).where(ChainRow.id == chain.id)))

    assert shop.attempt(dispatcher, delivery).outcome == "missing"
    assert dispatcher.relay() == {"relayed": 0, "settled": 0} and len(sink) == 0


def test_a_chain_deleted_during_its_callback_is_a_named_outcome(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(gate.wait)))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        dispatcher.database.write(
            lambda connection: connection.execute(delete(ChainRow).where(ChainRow.id == chain.id))
        )

    assert future.result().outcome == "stale"
    assert shop.count_rows(dispatcher, ChainRow) == 0


# --- retried ---------------------------------------------------------------------------------------------------------


def test_a_callback_that_fails_is_retried_with_the_same_key_until_it_succeeds(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink(shop.Raises(OSError("mail server down"), times=2))
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    for number in (1, 2):
        assert shop.attempt(dispatcher, delivery, number).outcome == "retrying"
        failed = shop.delivery_of(dispatcher, chain)
        assert (failed.status, failed.attempt) == ("pending", number)
        assert "mail server down" in (failed.last_error or "")
        assert chain.refresh().state == NEW and chain.due_at is None
        shop.wait_over(dispatcher, delivery)

    assert shop.attempt(dispatcher, delivery, 3).outcome == "delivered"
    assert len({call.key for call in sink.calls}) == 1
    assert shop.actions(chain) == ["created", "planned", "state_transition"]


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
    make_dispatcher: shop.Make,
    broker_url: str,
    policy: RetryPolicy,
    number: int,
    least: float,
    most: float,
    by_celery: bool,
) -> None:
    fails = shop.transition("Fails", "failed", retry=policy)
    dispatcher = make_dispatcher(shop.cart({NEW: [fails]}, callback=shop.Raises(OSError("no"))), queued_seconds=50)
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.change_delivery(dispatcher, delivery.id, attempt=number - 1)
    shop.take_messages(broker_url, shop.CALLBACKS)

    result = shop.attempt(dispatcher, delivery, number)
    failed = shop.delivery_of(dispatcher, chain)

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
    assert shop.take_messages(broker_url, shop.CALLBACKS) == []


def test_an_attempt_that_comes_too_early_is_stale_and_the_relay_sends_it_in_time(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    slow = shop.transition("Slow", "slow", retry=RetryPolicy(base_seconds=3600))
    sink = shop.Sink(shop.Raises(OSError("no"), times=1))
    dispatcher = make_dispatcher(shop.cart({NEW: [slow]}, callback=sink))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    shop.attempt(dispatcher, delivery)
    shop.take_messages(broker_url, shop.CALLBACKS)

    assert shop.attempt(dispatcher, delivery, 2).outcome == "stale"
    assert dispatcher.relay()["relayed"] == 0
    assert len(sink) == 1

    shop.wait_over(dispatcher, delivery)
    assert dispatcher.relay()["relayed"] == 1
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert message.kwargs == {"deliveries": [[delivery.id, 2]]}
    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3)])
def test_whatever_a_callback_raises_is_a_failed_attempt(make_dispatcher: shop.Make, error: BaseException) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Raises(error)))

    assert shop.attempt(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher))).outcome == "retrying"


@pytest.mark.parametrize(("on_dead", "permanent"), [("hold", True), ("hold", False), ("skip", True), ("skip", False)])
def test_out_of_attempts_a_delivery_is_dead_or_skipped(
    make_dispatcher: shop.Make, on_dead: str, permanent: bool
) -> None:
    error = PermanentFailure("no such address") if permanent else OSError("no such address")
    last = shop.Remind if permanent else Once
    config = shop.cart(
        {NEW: [last], last.final_state: [shop.Never]}, callback=shop.Sink(shop.Raises(error)), on_dead=on_dead
    )
    dispatcher = make_dispatcher(config, clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    result = shop.attempt(dispatcher, delivery)

    closed = shop.delivery_of(dispatcher, chain)
    row = shop.row_of(dispatcher, chain.id)
    assert "no such address" in result.detail
    (said,) = [one for one in chain.events if one.action in ("dead", "skipped")]
    assert "no such address" in (said.detail or "")
    assert closed.publish_after is None
    if on_dead == "hold":
        assert (result.outcome, closed.status, row.state) == ("dead", "dead", NEW)
        assert (row.pending_delivery_id, row.due_at) == (delivery.id, None)
        assert shop.actions(chain) == ["created", "planned", "dead"]
        assert shop.attempt(dispatcher, delivery, 2).outcome == "stale"
    else:
        assert (result.outcome, closed.status, row.state) == ("skipped", "skipped", last.final_state)
        assert (row.pending_delivery_id, row.due_at) == (None, shop.START)
        assert shop.actions(chain) == ["created", "planned", "skipped", "state_transition"]


def test_a_failed_attempt_needs_no_more_than_its_policy_s_number(make_dispatcher: shop.Make) -> None:
    thrice = shop.transition("Thrice", "thrice", retry=RetryPolicy(max_attempts=3, base_seconds=0))
    sink = shop.Sink(shop.Raises(OSError("no")))
    dispatcher = make_dispatcher(shop.cart({NEW: [thrice]}, callback=sink))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))

    outcomes = [str(shop.attempt(dispatcher, delivery, number).outcome) for number in (1, 2, 3, 4)]

    assert outcomes == ["retrying", "retrying", "dead", "stale"] and len(sink) == 3


# --- the last look ---------------------------------------------------------------------------------------------------


def looked(dispatcher: Dispatcher, chain: Chain, before: Callable[[], Any]) -> Any:
    """The result of an attempt, with `before()` between plan and attempt."""
    delivery = shop.planned(dispatcher, chain)
    before()
    return shop.attempt(dispatcher, delivery)


@pytest.mark.parametrize("who_wins", ["another", "nobody"])
def test_a_delivery_is_cancelled_unless_its_transition_wins_again(
    make_dispatcher: shop.Make, broker_url: str, who_wins: str
) -> None:
    complete: list[bool] = []
    sink, clock = shop.Sink(), shop.Clock()

    def still_open(self: Transition) -> bool:
        if complete:
            self.errors.append("the booking is complete")
        return not complete

    finish = shop.transition("Finish", DONE, lambda _: bool(complete) and who_wins == "another")
    remind = shop.transition("Remind", "reminded", still_open)
    dispatcher = make_dispatcher(shop.cart({NEW: [finish, remind]}, callback=sink), clock=clock)
    chain = shop.new_chain(dispatcher)

    result = looked(dispatcher, chain, lambda: complete.append(True))

    assert result.outcome == "cancelled" and len(sink) == 0
    closed = shop.delivery_of(dispatcher, chain)
    row = shop.row_of(dispatcher, chain.id)
    assert (closed.status, row.state, row.pending_delivery_id, row.due_at) == ("cancelled", NEW, None, shop.START)
    said = chain.events[-1]
    assert said.action == "cancelled"
    assert ("Finish" if who_wins == "another" else "the booking is complete") in (said.detail or "")
    assert closed.context is None and closed.kwargs is None


def test_a_candidate_that_wins_now_is_taken_after_the_cancellation(make_dispatcher: shop.Make) -> None:
    complete: list[bool] = []
    finish = shop.transition("Finish", DONE, lambda _: bool(complete))
    dispatcher = make_dispatcher(shop.cart({NEW: [finish, shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    looked(dispatcher, chain, lambda: complete.append(True))

    assert dispatcher.sweep()["due"] == 1
    dispatcher.execute_chains([chain.id])

    assert chain.refresh().state == DONE


def test_the_callback_runs_on_the_very_object_of_the_last_look(make_dispatcher: shop.Make) -> None:
    asked: list[Transition] = []

    def guard(self: Transition) -> bool:
        asked.append(self)
        self.context["seen"] = len(asked)
        return True

    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Keeps", "kept", guard)]}, callback=sink))

    shop.attempt(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher)))

    assert len(asked) == 2
    assert sink.calls[0].transition is asked[1] and sink.calls[0].context["seen"] == 2


def test_a_guard_that_raises_in_the_last_look_is_a_failed_attempt(make_dispatcher: shop.Make) -> None:
    sink, broken = shop.Sink(), []

    def guard(_: Transition) -> bool:
        if broken:
            raise LookupError("the shop's database is away")
        return True

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Guarded", "guarded", guard)]}, callback=sink))
    chain = shop.new_chain(dispatcher)

    result = looked(dispatcher, chain, lambda: broken.append(1))

    assert result.outcome == "retrying" and len(sink) == 0
    assert "the shop's database is away" in (shop.delivery_of(dispatcher, chain).last_error or "")
    broken.clear()
    shop.wait_over(dispatcher, shop.delivery_of(dispatcher, chain))
    assert shop.attempt(dispatcher, shop.delivery_of(dispatcher, chain), 2).outcome == "delivered"


def test_a_loader_that_raises_in_the_last_look_is_a_failed_attempt(make_dispatcher: shop.Make) -> None:
    broken: list[int] = []

    def load(snapshots: Any) -> dict[int, Any]:
        if broken:
            raise LookupError("no")
        return {}

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), load_context=load))

    assert looked(dispatcher, shop.new_chain(dispatcher), lambda: broken.append(1)).outcome == "retrying"


def test_the_last_look_is_spared_for_attempts_soon_after_the_plan(make_dispatcher: shop.Make) -> None:
    asked: list[object] = []
    counted = shop.transition("Counted", "counted", lambda self: not asked.append(self))
    sink = shop.Sink(shop.Raises(OSError("no"), times=1))
    dispatcher = make_dispatcher(shop.cart({NEW: [counted]}, callback=sink), last_look_seconds=3600)
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    shop.attempt(dispatcher, delivery)
    assert len(asked) == 1 and len(sink) == 1
    assert sink.calls[0].transition.context["resources"] == [("online_booking", "b0")]

    shop.wait_over(dispatcher, delivery)
    shop.change_delivery(dispatcher, delivery.id, planned_at=shop.LONG_AGO)
    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"
    assert len(asked) == 2


def test_the_last_look_sees_the_context_of_the_plan_s_request(make_dispatcher: shop.Make) -> None:
    wants = shop.transition("Wants", "wanted", lambda self: self.context.get("wanted") == self.context.get("kept"))
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [wants]}, callback=sink))
    chain = shop.new_chain(dispatcher, initial_context={"kept": 1})
    chain.enqueue(initial_context={"wanted": 1})

    # A later request is for the next evaluation.
    result = looked(dispatcher, chain, lambda: chain.enqueue(initial_context={"wanted": 2}))

    assert result.outcome == "delivered" and sink.calls[0].context["wanted"] == 1


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_delivery_planned_again_in_the_same_visit_of_a_state_has_the_same_key(make_dispatcher: shop.Make) -> None:
    verdicts = [True, False, True, True]
    wants = shop.transition("Wants", "wanted", lambda _: verdicts.pop(0))
    dispatcher = make_dispatcher(shop.cart({NEW: [wants]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)

    first = shop.planned(dispatcher, chain)
    assert shop.attempt(dispatcher, first).outcome == "cancelled"
    second = shop.planned(dispatcher, chain)
    assert shop.attempt(dispatcher, second).outcome == "delivered"

    assert first.id != second.id and first.idempotency_key == second.idempotency_key


def test_keys_differ_between_chains_transitions_and_visits(make_dispatcher: shop.Make) -> None:
    back = {NEW: [shop.Remind], "reminded": [shop.transition("Back", NEW)]}
    dispatcher = make_dispatcher(shop.cart(back, callback=shop.Sink()))
    keys = set()
    for number in range(2):
        chain = shop.new_chain(dispatcher, number)
        for _ in range(3):
            delivery = shop.planned(dispatcher, chain)
            keys.add(delivery.idempotency_key)
            shop.attempt(dispatcher, delivery)
    assert len(keys) == 6


# --- after a crash ---------------------------------------------------------------------------------------------------


def settled(dispatcher: Dispatcher, broker_url: str, chain: Chain, attempts: int = 0) -> list[Any]:
    """What the relay publishes after the worker died inside attempt `attempts + 1` of a chain's new delivery."""
    delivery = shop.planned(dispatcher, chain)
    shop.change_delivery(dispatcher, delivery.id, attempt=attempts)
    shop.crashed(dispatcher, delivery, attempt=attempts + 1)
    shop.take_messages(broker_url, shop.CALLBACKS)
    assert dispatcher.relay()["settled"] == 1
    return [message.kwargs["deliveries"] for message in shop.take_messages(broker_url, shop.CALLBACKS)]


@pytest.mark.parametrize("on_unknown", ["retry", "hold"])
def test_a_running_attempt_within_its_lease_is_left_alone(make_dispatcher: shop.Make, on_unknown: str) -> None:
    gate, sink = shop.Gate(), shop.Sink()
    sink.effect = gate.wait
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink, on_unknown=on_unknown))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        lease_until = shop.delivery_of(dispatcher, chain).lease_until
        assert lease_until is not None
        assert timedelta(seconds=10) < lease_until - datetime.now(UTC) <= timedelta(seconds=20)
        shop.change_delivery(dispatcher, delivery.id, publish_after=shop.LONG_AGO)  # whatever made the relay look
        dispatcher.relay()
        assert shop.delivery_of(dispatcher, chain).status == "running"

    assert future.result().outcome == "delivered"


def test_the_second_relay_that_sees_a_lease_ended_settles_it(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery, lapse_seen_at=None)

    assert dispatcher.relay() == {"relayed": 0, "settled": 0}
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}, "its process has time to renew it"
    with clock.shift(timedelta(seconds=dispatcher.settings.lapse_seconds - 1)):
        assert dispatcher.relay() == {"relayed": 0, "settled": 0}
    with clock.shift(timedelta(seconds=dispatcher.settings.lapse_seconds + 1)):
        assert dispatcher.relay() == {"relayed": 1, "settled": 1}


def test_a_lease_that_is_renewed_after_a_relay_saw_it_ended_is_not_settled(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery, lapse_seen_at=None, begins=1)
    dispatcher.relay()
    running = shop.delivery_of(dispatcher, chain)
    assert running.lapse_seen_at is not None

    assert dispatcher.database.write(lambda connection: deliveries.renew(connection, [running], lease_seconds=20))

    renewed = shop.delivery_of(dispatcher, chain)
    assert renewed.lapse_seen_at is None
    with clock.shift(timedelta(seconds=19)):
        assert dispatcher.relay() == {"relayed": 0, "settled": 0}
    with clock.shift(timedelta(seconds=21)):
        assert dispatcher.relay() == {"relayed": 0, "settled": 0}, "that is the first relay that sees it"
    shop.crashed(dispatcher, delivery)


def test_a_note_of_a_clock_that_was_wrong_is_made_anew(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery, lapse_seen_at=datetime.now(UTC) + timedelta(days=2))

    assert dispatcher.relay() == {"relayed": 0, "settled": 0}
    with clock.shift(timedelta(seconds=dispatcher.settings.lapse_seconds + 1)):
        assert dispatcher.relay()["settled"] == 1


def test_an_attempt_that_died_before_its_callback_is_a_failed_one(make_dispatcher: shop.Make, broker_url: str) -> None:
    """Nothing is unknown of it, so that neither `verify()` nor `on_unknown` is asked, and the guards are."""
    verdicts = [True]
    sink = shop.Sink()
    wants = shop.transition(
        "Wants", "wanted", lambda _: bool(verdicts and verdicts.pop()), verify=shop.Raises(AssertionError("asked"))
    )
    dispatcher = make_dispatcher(shop.cart({NEW: [wants]}, callback=sink, on_unknown="hold"))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery, begins=1, uncalled=1)

    assert dispatcher.relay() == {"relayed": 1, "settled": 1}

    row = shop.delivery_of(dispatcher, chain)
    assert (row.status, row.attempt, row.unknown) == ("pending", 1, False)
    assert row.last_error == "attempt 1 ended with its process: its callback was not called"
    assert shop.attempt(dispatcher, delivery, 2).outcome == "cancelled" and len(sink) == 0


@pytest.mark.parametrize(("on_dead", "status"), [("hold", "dead"), ("skip", "skipped")])
def test_attempts_that_die_before_their_callback_are_used_up(
    make_dispatcher: shop.Make, on_dead: str, status: str
) -> None:
    """A guard that kills its process must not do so for ever."""
    retry = RetryPolicy(max_attempts=2)
    remind = shop.transition("Remind", "reminded", retry=retry)
    dispatcher = make_dispatcher(shop.cart({NEW: [remind], "reminded": []}, callback=shop.Sink(), on_dead=on_dead))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery, begins=1, uncalled=1)
    dispatcher.relay()
    shop.crashed(dispatcher, shop.delivery_of(dispatcher, chain), begins=2, uncalled=2)

    assert dispatcher.relay()["settled"] == 1

    row = shop.delivery_of(dispatcher, chain)
    assert (row.status, row.unknown, row.attempt) == (status, False, 2)


def test_what_an_earlier_attempt_left_unknown_stays_so_after_one_that_was_not_called(
    make_dispatcher: shop.Make,
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery, attempt=2, unknown=True, begins=2, uncalled=2)

    dispatcher.relay()

    assert shop.delivery_of(dispatcher, chain).unknown


def test_after_a_crash_the_attempt_is_retried_with_the_same_key(make_dispatcher: shop.Make, broker_url: str) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher)

    (published,) = settled(dispatcher, broker_url, chain)

    delivery = shop.delivery_of(dispatcher, chain)
    assert published == [[delivery.id, 2]], "the first unknown effect of a visit is settled at once"
    assert (delivery.status, delivery.attempt, delivery.unknown) == ("pending", 1, True)
    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"
    assert sink.calls[0].key == delivery.idempotency_key


def test_a_message_that_comes_a_little_before_its_time_is_asked_again(make_dispatcher: shop.Make) -> None:
    """The clock of its worker is ahead. Otherwise the attempt would wait until its message counts as lost."""
    soon = shop.transition("Soon", "reminded", retry=RetryPolicy(base_seconds=3, jitter=0))
    dispatcher = make_dispatcher(shop.cart({NEW: [soon]}, callback=shop.Raises(OSError("down"), times=1)))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    assert shop.attempt(dispatcher, delivery).outcome == "retrying"

    early = shop.attempt(dispatcher, delivery, 2)

    assert (early.outcome, early.next_attempt) == ("deferred", 2) and 0 < early.retry_seconds <= 3
    assert shop.attempt(dispatcher, delivery, 3).outcome == "stale", "it is not the next one"
    with clock.shift(timedelta(seconds=early.retry_seconds)):
        assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"


def test_a_message_that_comes_long_before_its_time_is_not(make_dispatcher: shop.Make) -> None:
    later = shop.transition("Later", "reminded", retry=RetryPolicy(base_seconds=30, jitter=0))
    dispatcher = make_dispatcher(shop.cart({NEW: [later]}, callback=shop.Raises(OSError("down"))))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    assert shop.attempt(dispatcher, delivery).outcome == "retrying"

    early = shop.attempt(dispatcher, delivery, 2)

    assert (early.outcome, early.retry_seconds) == ("stale", None)


def test_a_further_crash_waits_for_the_back_off(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    settled(dispatcher, broker_url, chain)
    delivery = shop.delivery_of(dispatcher, chain)
    shop.crashed(dispatcher, delivery)

    assert dispatcher.relay() == {"relayed": 0, "settled": 1}

    assert shop.attempt(dispatcher, delivery, 3).outcome == "stale"
    shop.wait_over(dispatcher, delivery)
    assert dispatcher.relay()["relayed"] == 1


def test_a_delivery_with_an_unknown_attempt_is_not_cancelled_by_the_last_look(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    verdicts = [True]
    sink = shop.Sink()
    wants = shop.transition("Wants", "wanted", lambda _: bool(verdicts and verdicts.pop()))
    dispatcher = make_dispatcher(shop.cart({NEW: [wants]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    settled(dispatcher, broker_url, chain)
    delivery = shop.delivery_of(dispatcher, chain)
    shop.wait_over(dispatcher, delivery)

    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"
    assert len(sink) == 1


def test_after_a_crash_the_delivery_is_held_where_the_type_says_so(make_dispatcher: shop.Make, broker_url: str) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink, on_unknown="hold"))
    chain = shop.new_chain(dispatcher)

    assert settled(dispatcher, broker_url, chain) == []

    delivery = shop.delivery_of(dispatcher, chain)
    assert (delivery.status, delivery.unknown) == ("held", True)
    assert shop.actions(chain)[-1] == "held"
    assert shop.row_of(dispatcher, chain.id).pending_delivery_id == delivery.id
    assert shop.attempt(dispatcher, delivery, 2).outcome == "stale" and len(sink) == 0
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}


@pytest.mark.parametrize("on_unknown", ["retry", "hold"])
@pytest.mark.parametrize(
    ("answer", "outcome", "calls"),
    [(True, "delivered", 0), (False, "delivered", 1), (OSError("cannot ask"), "retrying", 0)],
)
def test_verify_decides_after_a_crash(
    make_dispatcher: shop.Make, broker_url: str, on_unknown: str, answer: Any, outcome: str, calls: int
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [verifying(answer)]}, callback=sink, on_unknown=on_unknown))
    chain = shop.new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)
    result = shop.attempt(dispatcher, *owed)

    assert owed[1] == 2
    assert (result.outcome, len(sink)) == (outcome, calls)
    assert chain.refresh().state == ("verified" if outcome == "delivered" else NEW)


@pytest.mark.parametrize(("on_unknown", "outcome", "calls"), [("retry", "delivered", 1), ("hold", "held", 0)])
def test_where_verify_cannot_tell_the_type_decides(
    make_dispatcher: shop.Make, broker_url: str, on_unknown: str, outcome: str, calls: int
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [verifying(None)]}, callback=sink, on_unknown=on_unknown))
    chain = shop.new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)

    assert shop.attempt(dispatcher, *owed).outcome == outcome
    assert len(sink) == calls


def test_an_effect_that_did_not_take_place_lets_the_last_look_cancel_again(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    verdicts = [True]
    sink = shop.Sink()
    wants = shop.transition("Wants", "wanted", lambda _: bool(verdicts and verdicts.pop()), verify=lambda _: False)
    dispatcher = make_dispatcher(shop.cart({NEW: [wants]}, callback=sink))
    chain = shop.new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)

    assert shop.attempt(dispatcher, *owed).outcome == "cancelled" and len(sink) == 0


def test_a_failure_after_verify_said_no_leaves_nothing_unknown(make_dispatcher: shop.Make, broker_url: str) -> None:
    sink = shop.Sink(shop.Raises(PermanentFailure("no")))
    dispatcher = make_dispatcher(shop.cart({NEW: [verifying(False)]}, callback=sink))
    chain = shop.new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)

    assert shop.attempt(dispatcher, *owed).outcome == "dead"
    assert shop.delivery_of(dispatcher, chain).unknown is False


def test_verify_knows_the_idempotency_key(make_dispatcher: shop.Make, broker_url: str) -> None:
    keys: list[str | None] = []
    knows = shop.transition("Knows", "known", verify=lambda self: not keys.append(self.idempotency_key))
    dispatcher = make_dispatcher(shop.cart({NEW: [knows]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain)
    shop.attempt(dispatcher, *owed)

    assert keys == [shop.delivery_of(dispatcher, chain).idempotency_key]


@pytest.mark.parametrize(("on_dead", "status"), [("hold", "dead"), ("skip", "skipped")])
def test_a_crash_in_the_last_attempt_ends_the_delivery(
    make_dispatcher: shop.Make, broker_url: str, on_dead: str, status: str
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [Once], "once": [shop.Never]}, callback=shop.Sink(), on_dead=on_dead))
    chain = shop.new_chain(dispatcher)

    assert settled(dispatcher, broker_url, chain) == []

    assert shop.delivery_of(dispatcher, chain).status == status
    assert chain.refresh().state == (NEW if status == "dead" else "once")
    assert (chain.due_at is None) == (status == "dead")


@pytest.mark.parametrize(("answer", "status"), [(True, "delivered"), (False, "dead"), (None, "dead")])
def test_verify_is_asked_after_a_crash_in_the_last_attempt_as_well(
    make_dispatcher: shop.Make, broker_url: str, answer: bool | None, status: str
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [verifying(answer)]}, callback=sink))
    chain = shop.new_chain(dispatcher)

    ((owed,),) = settled(dispatcher, broker_url, chain, attempts=4)
    shop.attempt(dispatcher, *owed)

    assert shop.delivery_of(dispatcher, chain).status == status and len(sink) == 0


@pytest.mark.parametrize(("on_unknown", "status"), [("retry", "cancelled"), ("hold", "held")])
def test_an_in_process_call_whose_process_died_is_cancelled_or_held(
    make_dispatcher: shop.Make, broker_url: str, on_unknown: str, status: str
) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, on_unknown=on_unknown), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    with gate.during(lambda: chain.execute(callback=shop.Sink(gate.wait))) as future:
        delivery = shop.delivery_of(dispatcher, chain)
        assert (delivery.callback, delivery.status, delivery.attempt) == ("local", "running", 1)
        shop.change_delivery(dispatcher, delivery.id, **shop.LAPSED)
        assert dispatcher.relay() == {"relayed": 0, "settled": 1}

        assert shop.delivery_of(dispatcher, chain).status == status
        row = shop.row_of(dispatcher, chain.id)
        assert (row.state, row.due_at) == (NEW, shop.START if status == "cancelled" else None)

    assert future.result()["outcome"] == "stale"
    assert shop.take_messages(broker_url, shop.CALLBACKS) == []


def test_an_attempt_that_was_settled_meanwhile_does_not_move_the_chain(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    sink = shop.Sink(gate.wait)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        shop.change_delivery(dispatcher, delivery.id, **shop.LAPSED)
        dispatcher.relay()
        shop.wait_over(dispatcher, delivery)
        gate.reached.clear()
        sink.effect = None
        assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"

    assert future.result().outcome == "stale"
    assert chain.refresh().state == "reminded" and shop.actions(chain).count("state_transition") == 1
    assert len({call.key for call in sink.calls}) == 1


def test_a_late_failure_of_an_attempt_that_was_settled_changes_nothing(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()

    def fails(_: object) -> None:
        gate.wait()
        raise PermanentFailure("too late")

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(fails)))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        shop.change_delivery(dispatcher, delivery.id, **shop.LAPSED)
        dispatcher.relay()
        before = shop.dump_rows(dispatcher)

    assert future.result().outcome == "stale"
    assert shop.dump_rows(dispatcher) == before


def test_relays_at_the_same_time_settle_a_crash_once(make_dispatcher: shop.Make) -> None:
    dispatchers = [
        make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), on_unknown="hold")) for _ in range(4)
    ]
    chain = shop.new_chain(dispatchers[0])
    shop.crashed(dispatchers[0], shop.planned(dispatchers[0], chain))

    shop.at_once(*(one.relay for one in dispatchers))

    assert shop.actions(chain) == ["created", "planned", "held"]


def test_a_crash_in_a_type_that_this_worker_does_not_know_is_left_to_another(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    other = {"chains": [{"chain_type": "basket", "transitions": {NEW: [shop.Remind]}}]}
    ours, theirs = (
        make_dispatcher(other),
        make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), on_unknown="hold")),
    )
    chain = shop.new_chain(theirs)
    delivery = shop.planned(theirs, chain)
    shop.crashed(theirs, delivery)

    ours.relay()
    assert shop.delivery_of(theirs, chain).status == "running"

    shop.change_delivery(theirs, delivery.id, publish_after=shop.LONG_AGO)
    theirs.relay()
    assert shop.delivery_of(theirs, chain).status == "held"


# --- definitions that this worker does not know ----------------------------------------------------------------------


@pytest.mark.parametrize("unknown", ["transition", "callback", "type callback", "chain type"])
def test_what_this_worker_does_not_know_uses_no_attempt(
    make_dispatcher: shop.Make, broker_url: str, unknown: str
) -> None:
    sink = shop.Sink()
    knows = shop.cart({NEW: [shop.Remind], "reminded": []}, callback=sink, callbacks={"send": sink})
    other = {
        "transition": shop.cart({NEW: [shop.Never], "reminded": []}, callback=sink, callbacks={"send": sink}),
        "callback": shop.cart({NEW: [shop.Remind], "reminded": []}, callback=sink),
        "type callback": shop.cart({NEW: [shop.Remind], "reminded": []}, callbacks={"send": sink}),
        "chain type": {"chains": [{"chain_type": "basket", "transitions": {NEW: [shop.Remind]}}]},
    }[unknown]
    old, new = make_dispatcher(other), make_dispatcher(knows)
    chain = shop.new_chain(new)
    chain.enqueue(callback="send" if unknown == "callback" else None)
    delivery = shop.planned(new, chain)

    for _ in range(3):
        assert shop.attempt(old, delivery).outcome == "unknown_definition"
        waiting = shop.delivery_of(new, chain)
        assert (waiting.status, waiting.attempt) == ("pending", 0)
        assert waiting.next_attempt_at is not None and waiting.next_attempt_at > datetime.now(UTC)
        assert shop.attempt(old, delivery).outcome == "stale"
        shop.wait_over(new, delivery)

    assert shop.actions(chain).count("unknown_definition") == 1
    assert len(sink) == 0
    assert shop.attempt(new, delivery).outcome == "delivered"
    assert len(sink) == 1


# --- ends that cannot be written at once -----------------------------------------------------------------------------


def test_an_end_whose_commit_reported_an_error_is_read_back(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit took place and its answer was lost: the attempt is neither failed nor made again."""
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    lost: list[object] = []

    def lose_answer(step: Callable[[], Any]) -> Any:
        answer = step()
        if sink.calls and not lost:
            lost.append(step)
            raise OperationalError("COMMIT", None, OSError("connection reset by peer"), connection_invalidated=True)
        return answer

    monkeypatch.setattr(database, "commit", lose_answer)
    result = shop.attempt(dispatcher, delivery)

    assert len(lost) == 1
    assert result.outcome == "delivered" and len(sink) == 1
    assert chain.refresh().state == "reminded" and shop.delivery_of(dispatcher, chain).attempt == 1
    assert shop.actions(chain) == ["created", "planned", "state_transition"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # a file is never away
def test_an_end_is_written_again_and_again_while_the_database_is_away(
    make_dispatcher: shop.Make, postgres_server: PostgresServer, database_url: str
) -> None:
    name = database_url.rpartition("/")[2]
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

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
        result = shop.attempt(dispatcher, delivery)
    finally:
        logger.removeHandler(handler)

    assert handler.seen >= 2
    assert result.outcome == "delivered" and len(sink) == 1
    assert shop.delivery_of(dispatcher, chain).attempt == 1


# --- what is kept of them --------------------------------------------------------------------------------------------


def test_deliveries_are_found_by_chain_type_and_status(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    first, second = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
    shop.attempt(dispatcher, shop.planned(dispatcher, first))
    waiting = shop.planned(dispatcher, second)

    assert [one.id for one in dispatcher.find_deliveries(statuses=["pending"])] == [waiting.id]
    assert len(dispatcher.find_deliveries(chain_type="cart")) == 2
    assert dispatcher.find_deliveries(chain_type="basket") == []
    assert [one.chain_id for one in dispatcher.find_deliveries(limit=1)] == [second.id]


# --- what goes wrong around a group ----------------------------------------------------------------------------------


def owed_of_new_chains(dispatcher: Dispatcher, count: int) -> tuple[list[Chain], list[Owed]]:
    chains = [
        dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("cart", str(number))]) for number in range(count)
    ]
    return chains, [Owed(shop.planned(dispatcher, chain).id, 1) for chain in chains]


def away(*_: Any, **__: Any) -> Any:
    raise ServiceUnavailable("database", "nowhere", "connection lost")


def test_a_question_that_fails_keeps_nobody_who_has_begun_from_being_called(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink, on_unknown="hold"))
    chains, owed = owed_of_new_chains(dispatcher, 3)
    lost = Owed("0190d4b0-0000-7000-8000-000000000000", 1)
    monkeypatch.setattr(deliveries, "why_not_begun", away)

    results = dispatcher.deliver([*owed, lost])

    assert [result.outcome for result in results] == ["delivered", "delivered", "delivered", "stale"]
    assert len(sink) == 3 and {chain.refresh().state for chain in chains} == {"reminded"}
    with pytest.raises(ServiceUnavailable):
        dispatcher.deliver([lost])


def test_an_attempt_that_a_message_names_twice_keeps_its_first_result(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Raises(ValueError("down"))))
    _, owed = owed_of_new_chains(dispatcher, 11)

    results = dispatcher.deliver([*owed, owed[0]])

    assert [result.outcome for result in results] == ["retrying"] * 12
    assert results[0].retry_seconds is not None


@pytest.mark.parametrize("taken_over", [False, True])
def test_the_last_error_is_logged_even_where_its_end_cannot_be_written(
    make_dispatcher: shop.Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    taken_over: bool,
) -> None:
    once = shop.transition("Once", "once", retry=RetryPolicy(max_attempts=1))
    dispatcher = make_dispatcher(shop.cart({NEW: [once]}, callback=shop.Raises(ValueError("no such address"))))
    _, owed = owed_of_new_chains(dispatcher, 1)
    monkeypatch.setattr(deliveries, "stop", (lambda *_, **__: False) if taken_over else away)
    monkeypatch.setattr("dispatcher.delivery.recording.time", Mock(monotonic=lambda: math.inf))

    if taken_over:
        (result,) = dispatcher.deliver(owed)
        assert result.outcome == "stale"
    else:
        with pytest.raises(ServiceUnavailable):
            dispatcher.deliver(owed)
    (failed,) = [record for record in caplog.records if getattr(record, "action", "") == "attempt_failed"]
    assert failed.levelno == logging.WARNING and "no such address" in caplog.text


def test_verify_and_the_callback_get_facts_of_their_own(make_dispatcher: shop.Make) -> None:
    def verify(transition: Any) -> bool:
        transition.context["seen"].append("verify")
        return False

    seen = []
    verified = shop.transition("Verified", "verified", verify=verify)
    dispatcher = make_dispatcher(
        shop.cart(
            {NEW: [verified]},
            callback=lambda transition: seen.append(list(transition.context["seen"])),
            load_context=lambda snapshots: {snapshot.id: {"seen": []} for snapshot in snapshots},
        )
    )
    _, owed = owed_of_new_chains(dispatcher, 2)
    shop.change_delivery(dispatcher, owed[0].delivery_id, unknown=True)

    assert [result.outcome for result in dispatcher.deliver(owed)] == ["delivered", "delivered"]
    assert seen == [[], []]
