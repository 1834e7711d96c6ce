"""Deferred attempts: delivery hours and rate limits let a delivery wait in its row, without using up an attempt."""

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from dispatcher import NEW, Dispatcher, PermanentFailure, RetryPolicy, rate_limit
from dispatcher.domain.hours import DeliveryHours
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.storage import database
from tests.integration.conftest import DispatcherFactory
from tests.integration.transitions import (
    LONG_AGO,
    Clock,
    Gate,
    Raises,
    Sink,
    assert_consistent,
    attempt,
    cart,
    change_delivery,
    crashed,
    delivery_of,
    new_chain,
    planned,
    take_messages,
    transition,
    wait_over,
)
from tests.servers import RedisServer

pytestmark = pytest.mark.integration

Make = Callable[..., Dispatcher]

CALLBACKS = "dispatcher.callbacks"
NIGHT = datetime(2026, 7, 1, 3, tzinfo=UTC)
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
DAYTIME = {"delivery_hours": "08:00-20:00"}
Remind = transition("Remind", "reminded")
Never = transition("Never", "never", valid=False)


@pytest.fixture(autouse=True)
def _history_is_consistent(make_dispatcher: DispatcherFactory) -> Iterator[None]:
    """Every test here ends with the oracle."""
    yield
    assert_consistent(make_dispatcher.made[-1])


def is_the_relay_s(delivery: DeliveryRecord) -> bool:
    """Whether the relay publishes a delivery as soon as its wait is over."""
    assert delivery.next_attempt_at is not None and delivery.publish_after is not None
    return abs(delivery.publish_after - delivery.next_attempt_at) < timedelta(seconds=1)


def database_hours(moment: timedelta) -> str:
    """Two delivery hours that begin in so much time from now, in UTC."""
    start = datetime.now(UTC) + moment
    return f"{start:%H:%M}-{start + timedelta(hours=2):%H:%M}"


# --- rate limits -----------------------------------------------------------------------------------------------------


def test_what_is_over_the_limit_of_all_workers_waits_without_using_up_an_attempt(
    make_dispatcher: Make, broker_url: str, redis_server: RedisServer
) -> None:
    sink = Sink()
    workers = [make_dispatcher(cart({NEW: [Remind]}, callback=sink, rate_limit="3/h")) for _ in range(2)]
    chains = [new_chain(workers[0], number) for number in range(5)]
    owed = [planned(workers[0], chain) for chain in chains]
    take_messages(broker_url, CALLBACKS)

    results = [attempt(workers[number % 2], delivery) for number, delivery in enumerate(owed)]

    assert [str(result.outcome) for result in results] == ["delivered"] * 3 + ["deferred"] * 2
    assert (len(sink), results[3].detail, results[3].retry_seconds) == (3, "rate limit 3/h", None)
    deferred = delivery_of(workers[0], chains[3])
    assert (deferred.status, deferred.attempt, deferred.lease_until) == ("pending", 0, None)
    assert deferred.last_error == "deferred: rate limit 3/h" and is_the_relay_s(deferred)
    last = delivery_of(workers[0], chains[4])
    assert deferred.next_attempt_at is not None and last.next_attempt_at is not None
    assert last.next_attempt_at - deferred.next_attempt_at > timedelta(minutes=15), "each has its own turn"
    assert take_messages(broker_url, CALLBACKS) == [], "the row waits, not the broker"
    assert chains[3].explain()["delivery"]["last_error"] == "deferred: rate limit 3/h"

    wait_over(workers[0], deferred)
    assert attempt(workers[1], deferred).outcome == "deferred", "the hour is not over"
    wait_over(workers[0], deferred)
    redis_server.clear()
    assert workers[0].relay()["relayed"] == 1
    (message,) = take_messages(broker_url, CALLBACKS)
    assert message.kwargs == {"deliveries": [[deferred.id, 1]]}
    assert attempt(workers[1], deferred).outcome == "delivered"


def test_a_wait_within_a_minute_is_celery_s_and_its_message_can_get_lost(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink(), rate_limit="1/m"), queued_seconds=50)
    first, second = (new_chain(dispatcher, number) for number in range(2))
    attempt(dispatcher, planned(dispatcher, first))

    result = attempt(dispatcher, planned(dispatcher, second))

    assert result.outcome == "deferred" and 0 < result.retry_seconds <= 60.1
    assert (result.attempt, result.next_attempt) == (1, 1)
    row = delivery_of(dispatcher, second)
    assert row.publish_after is not None and row.next_attempt_at is not None
    assert abs(row.publish_after - row.next_attempt_at - timedelta(seconds=50)) < timedelta(seconds=1)


def test_the_next_attempt_after_a_failure_is_another_one(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Raises(OSError("no"))))
    result = attempt(dispatcher, planned(dispatcher, new_chain(dispatcher)))
    assert (result.outcome, result.attempt, result.next_attempt) == ("retrying", 1, 2)


def test_a_callback_s_own_limit_holds_for_all_types_that_call_it(make_dispatcher: Make) -> None:
    sink = Sink()
    limited = rate_limit("1/h", name="sms")(Sink())
    types = [
        {"chain_type": name, "transitions": {NEW: [Remind]}, "callback": sink, "callbacks": {"sms": limited}}
        for name in ("cart", "trial")
    ]
    dispatcher = make_dispatcher({"chains": types})
    outcomes = []
    for number, (chain_type, callback) in enumerate([("cart", "sms"), ("trial", "sms"), ("trial", None)]):
        chain = new_chain(dispatcher, number, chain_type)
        chain.enqueue(callback=callback)
        outcomes.append(str(attempt(dispatcher, planned(dispatcher, chain)).outcome))

    assert outcomes == ["delivered", "deferred", "delivered"]


def test_the_guards_are_asked_when_the_wait_is_over(make_dispatcher: Make, redis_server: RedisServer) -> None:
    wanted = [True, True, True, False]
    asked = transition("Asked", "asked", lambda self: wanted.pop(0))
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [asked]}, callback=sink, rate_limit="1/h"))
    first, second = (new_chain(dispatcher, number) for number in range(2))
    attempt(dispatcher, planned(dispatcher, first))
    delivery = planned(dispatcher, second)
    assert attempt(dispatcher, delivery).outcome == "deferred" and wanted == [False], "not asked while it waits"

    wait_over(dispatcher, delivery)
    redis_server.clear()

    assert attempt(dispatcher, delivery).outcome == "cancelled"
    assert len(sink) == 1


def test_a_deferred_delivery_in_a_group_leaves_the_others_alone(make_dispatcher: Make) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink, rate_limit="7/h"))
    chains = [new_chain(dispatcher, number) for number in range(12)]
    owed = [Owed(planned(dispatcher, chain).id, 1) for chain in chains]

    results = dispatcher.deliver(owed)

    assert [str(result.outcome) for result in results] == ["delivered"] * 7 + ["deferred"] * 5
    assert {chain.refresh().state for chain in chains[:7]} == {"reminded"}
    assert {
        (delivery_of(dispatcher, chain).status, delivery_of(dispatcher, chain).attempt) for chain in chains[7:]
    } == {("pending", 0)}


def test_a_failure_stays_known_while_the_next_attempt_waits(make_dispatcher: Make) -> None:
    fails = transition("Fails", "failed", retry=RetryPolicy(max_attempts=2))
    dispatcher = make_dispatcher(cart({NEW: [fails]}, callback=Raises(OSError("no")), rate_limit="1/h"))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)
    attempt(dispatcher, delivery)

    for _ in range(2):
        wait_over(dispatcher, delivery)
        assert attempt(dispatcher, delivery, 2).outcome == "deferred"

    row = delivery_of(dispatcher, chain)
    assert (row.attempt, row.last_error) == (1, "deferred: rate limit 1/h; before: OSError: no")


def test_an_unknown_effect_is_not_asked_about_before_its_turn(make_dispatcher: Make) -> None:
    asked: list[bool] = []
    verifying = transition("Verifying", "verified", verify=lambda self: asked.append(True) or True)
    dispatcher = make_dispatcher(cart({NEW: [verifying]}, callback=Sink(), **DAYTIME), clock=(clock := Clock(NIGHT)))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)
    crashed(dispatcher, delivery)
    assert dispatcher.relay()["settled"] == 1

    assert attempt(dispatcher, delivery, 2).outcome == "deferred" and not asked
    waiting = delivery_of(dispatcher, chain)
    assert waiting.unknown and waiting.attempt == 1
    assert (waiting.last_error or "").startswith("deferred: delivery hours 08:00-20:00 UTC; before: attempt 1 ended")

    clock.now = NOON
    wait_over(dispatcher, delivery)
    assert attempt(dispatcher, delivery, 2).outcome == "delivered" and asked == [True]


def test_a_lock_server_that_is_away_defers_for_a_while(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(
        cart({NEW: [Remind]}, callback=Sink(), rate_limit="3/h"), redis_url="redis://:secret@127.0.0.1:1/0"
    )
    chain = new_chain(dispatcher)

    result = attempt(dispatcher, planned(dispatcher, chain))

    assert result.outcome == "deferred" and 15 <= result.retry_seconds <= 30
    assert (
        delivery_of(dispatcher, chain).last_error
        == "deferred: Redis, which counts the calls for the rate limit, does not answer"
    )


def test_a_chain_that_is_disabled_while_its_delivery_waits_is_left_alone(make_dispatcher: Make) -> None:
    gate = Gate()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink(gate.wait), rate_limit="1/h"))
    first, second = (new_chain(dispatcher, number) for number in range(2))
    with gate.during(lambda: attempt(dispatcher, planned(dispatcher, first))):
        delivery = planned(dispatcher, second)
        assert attempt(dispatcher, delivery).outcome == "deferred", "a call that runs counts"
    second.disable()
    change_delivery(dispatcher, delivery.id, next_attempt_at=LONG_AGO)
    assert dispatcher.relay()["relayed"] == 0
    assert attempt(dispatcher, delivery).outcome == "disabled"

    assert delivery_of(dispatcher, second.enable()).publish_after is not None


def test_an_execution_in_this_process_asks_neither_hours_nor_limits(make_dispatcher: Make) -> None:
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink, rate_limit="1/h", **DAYTIME), clock=Clock(NIGHT))
    outcomes = [new_chain(dispatcher, number).execute()["outcome"] for number in range(3)]
    assert outcomes == ["moved"] * 3 and len(sink) == 3


# --- delivery hours --------------------------------------------------------------------------------------------------


def test_outside_its_hours_a_delivery_waits_in_its_row_until_they_begin(make_dispatcher: Make, broker_url: str) -> None:
    sink = Sink()
    hours = database_hours(timedelta(hours=5))
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink, delivery_hours=hours))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)
    take_messages(broker_url, CALLBACKS)

    result = attempt(dispatcher, delivery)

    assert (result.outcome, result.retry_seconds, len(sink)) == ("deferred", None, 0)
    row = delivery_of(dispatcher, chain)
    assert (row.status, row.attempt, row.last_error) == ("pending", 0, f"deferred: delivery hours {hours} UTC")
    assert is_the_relay_s(row) and row.next_attempt_at is not None
    assert row.next_attempt_at.time() in DeliveryHours.parse(hours), "never a moment before"
    assert take_messages(broker_url, CALLBACKS) == []


@pytest.mark.parametrize(
    ("options", "now", "outcome"),
    [
        (DAYTIME, NIGHT, "deferred"),
        (DAYTIME, NOON, "delivered"),
        ({"delivery_hours": "22:00-06:00"}, NIGHT, "delivered"),
        ({**DAYTIME, "time_zone": "Asia/Tokyo"}, NIGHT, "delivered"),
        ({**DAYTIME, "time_zone": "Asia/Tokyo"}, NOON, "deferred"),
    ],
)
def test_hours_are_those_of_domain_time_in_the_type_s_zone(
    make_dispatcher: Make, options: dict[str, Any], now: datetime, outcome: str
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink(), **options), clock=Clock(now))

    result = attempt(dispatcher, planned(dispatcher, new_chain(dispatcher)))

    assert result.outcome == outcome
    if outcome == "deferred":
        assert result.retry_seconds == 60, "another clock may be fast: it is asked again soon"


@pytest.mark.parametrize("where", ["chain", "request"])
def test_a_chain_s_own_time_zone_wins(make_dispatcher: Make, where: str) -> None:
    dispatcher = make_dispatcher(
        cart({NEW: [Remind]}, callback=Sink(), time_zone="Europe/Berlin", **DAYTIME), clock=Clock(NIGHT)
    )
    own = {"time_zone": "Asia/Tokyo"}
    chain = new_chain(dispatcher, initial_context=own if where == "chain" else None)
    chain.enqueue(initial_context=own if where == "request" else None)
    assert attempt(dispatcher, planned(dispatcher, chain)).outcome == "delivered", "11:00 in Tokyo"

    assert attempt(dispatcher, planned(dispatcher, new_chain(dispatcher, 1))).outcome == "deferred", "05:00 in Berlin"


@pytest.mark.parametrize("bad", ["Mars/Olympus", "", 7, ["UTC"], "../../etc/passwd"])
def test_a_chain_s_time_zone_that_is_none_is_warned_about_and_the_type_s_holds(
    make_dispatcher: Make, caplog: pytest.LogCaptureFixture, bad: Any
) -> None:
    dispatcher = make_dispatcher(
        cart({NEW: [Remind]}, callback=Sink(), time_zone="Asia/Tokyo", **DAYTIME), clock=Clock(NIGHT)
    )
    chain = new_chain(dispatcher, initial_context={"time_zone": bad})

    with caplog.at_level(logging.WARNING, logger="dispatcher.delivery.pacing"):
        assert attempt(dispatcher, planned(dispatcher, chain)).outcome == "delivered"

    (record,) = [record for record in caplog.records if record.name == "dispatcher.delivery.pacing"]
    assert (record.__dict__["action"], record.__dict__["chain_id"]) == ("time_zone_unknown", chain.id)
    assert "Mars" not in record.getMessage(), "a context is not logged"


def test_a_dead_delivery_that_is_retried_waits_for_its_hours_too(make_dispatcher: Make) -> None:
    sink = Sink(lambda _: Raises(PermanentFailure("no address"), times=1)())
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=sink, **DAYTIME), clock=(clock := Clock(NOON)))
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)
    assert attempt(dispatcher, delivery).outcome == "dead"
    clock.now = NIGHT
    chain.retry_delivery()

    assert attempt(dispatcher, delivery, 2).outcome == "deferred"
    reason = "deferred: delivery hours 08:00-20:00 UTC; before: PermanentFailure: no address"
    assert delivery_of(dispatcher, chain).last_error == reason


def test_a_delivery_whose_group_ran_out_of_time_keeps_its_place_and_what_failed_before(
    make_dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = 0.0
    monkeypatch.setattr("dispatcher.delivery.attempts.time.monotonic", lambda: hours)

    def take_an_hour(*_: Any, **__: Any) -> None:
        nonlocal hours
        hours += 3600

    dispatcher = make_dispatcher(cart({NEW: [transition("Remind", "reminded")]}, callback=take_an_hour))
    deliveries = [planned(dispatcher, new_chain(dispatcher, number)) for number in range(2)]
    reason = "deferred: rate limit 3/h; before: OSError: no"
    for delivery in deliveries:
        change_delivery(dispatcher, delivery.id, last_error=reason)

    dispatcher.deliver([Owed(delivery.id, 1) for delivery in deliveries])

    rows = [row for delivery in deliveries for row in dispatcher.find_deliveries(chain_id=delivery.chain_id)]
    assert sorted((row.status, row.attempt) for row in rows) == [("delivered", 1), ("pending", 0)]
    assert {row.last_error for row in rows} == {reason}


def test_a_deferral_whose_commit_reported_an_error_is_read_back(
    make_dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [transition("Remind", "reminded")]}, callback=Sink(), rate_limit="1/m"))
    first, second = (new_chain(dispatcher, number) for number in range(2))
    assert attempt(dispatcher, planned(dispatcher, first)).outcome == "delivered"
    owed = planned(dispatcher, second)
    commits: list[object] = []

    def lose_answer(step: Callable[[], Any]) -> Any:
        answer = step()
        commits.append(step)
        if len(commits) == 2:
            raise OperationalError("COMMIT", None, OSError("connection reset by peer"), connection_invalidated=True)
        return answer

    monkeypatch.setattr(database, "commit", lose_answer)
    result = attempt(dispatcher, owed)

    assert (result.outcome, result.attempt) == ("deferred", 1) and result.retry_seconds
    row = delivery_of(dispatcher, second)
    assert (row.status, row.attempt) == ("pending", 0)
