"""Deferred attempts: delivery hours and rate limits let a delivery wait in its row, without using up an attempt."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from dispatcher import NEW, PermanentFailure, RetryPolicy, rate_limit
from dispatcher.domain.hours import DeliveryHours
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.storage import database
from tests.integration import shop
from tests.servers import RedisServer

pytestmark = pytest.mark.integration

NIGHT = datetime(2026, 7, 1, 3, tzinfo=UTC)
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
DAYTIME = {"delivery_hours": "08:00-20:00"}


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
    make_dispatcher: shop.Make, broker_url: str, redis_server: RedisServer
) -> None:
    sink = shop.Sink()
    workers = [make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink, rate_limit="3/h")) for _ in range(2)]
    chains = [shop.new_chain(workers[0], number) for number in range(5)]
    owed = [shop.planned(workers[0], chain) for chain in chains]
    shop.take_messages(broker_url, shop.CALLBACKS)

    results = [shop.attempt(workers[number % 2], delivery) for number, delivery in enumerate(owed)]

    assert [str(result.outcome) for result in results] == ["delivered"] * 3 + ["deferred"] * 2
    assert (len(sink), results[3].detail, results[3].retry_seconds) == (3, "rate limit 3/h", None)
    deferred = shop.delivery_of(workers[0], chains[3])
    assert (deferred.status, deferred.attempt, deferred.lease_until) == ("pending", 0, None)
    assert (deferred.waits_for, deferred.waits_reason, deferred.has_place) == ("rate", "rate limit 3/h", True)
    assert deferred.last_error is None and is_the_relay_s(deferred)
    last = shop.delivery_of(workers[0], chains[4])
    assert deferred.next_attempt_at is not None and last.next_attempt_at is not None
    assert last.next_attempt_at - deferred.next_attempt_at > timedelta(minutes=15), "each has its own turn"
    assert shop.take_messages(broker_url, shop.CALLBACKS) == [], "the row waits, not the broker"
    assert chains[3].explain()["delivery"]["waits_reason"] == "rate limit 3/h"

    shop.wait_over(workers[0], deferred)
    assert shop.attempt(workers[1], deferred).outcome == "deferred", "the hour is not over"
    shop.wait_over(workers[0], deferred)
    redis_server.clear()
    assert workers[0].relay()["relayed"] == 1
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert message.kwargs == {"deliveries": [[deferred.id, 1]]}
    assert shop.attempt(workers[1], deferred).outcome == "delivered"


def test_a_wait_within_a_minute_is_celery_s_and_its_message_can_get_lost(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), rate_limit="1/m"), queued_seconds=50
    )
    first, second = (shop.new_chain(dispatcher, number) for number in range(2))
    shop.attempt(dispatcher, shop.planned(dispatcher, first))

    result = shop.attempt(dispatcher, shop.planned(dispatcher, second))

    assert result.outcome == "deferred" and 0 < result.retry_seconds <= 60.1
    assert (result.attempt, result.next_attempt) == (1, 1)
    row = shop.delivery_of(dispatcher, second)
    assert row.publish_after is not None and row.next_attempt_at is not None
    assert abs(row.publish_after - row.next_attempt_at - timedelta(seconds=50)) < timedelta(seconds=1)


def test_the_next_attempt_after_a_failure_is_another_one(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Raises(OSError("no"))))
    result = shop.attempt(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher)))
    assert (result.outcome, result.attempt, result.next_attempt) == ("retrying", 1, 2)


def test_a_callback_s_own_limit_holds_for_all_types_that_call_it(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    limited = rate_limit("1/h", name="sms")(shop.Sink())
    types = [
        {"chain_type": name, "transitions": {NEW: [shop.Remind]}, "callback": sink, "callbacks": {"sms": limited}}
        for name in ("cart", "trial")
    ]
    dispatcher = make_dispatcher({"chains": types})
    outcomes = []
    for number, (chain_type, callback) in enumerate([("cart", "sms"), ("trial", "sms"), ("trial", None)]):
        chain = shop.new_chain(dispatcher, number, chain_type)
        chain.enqueue(callback=callback)
        outcomes.append(str(shop.attempt(dispatcher, shop.planned(dispatcher, chain)).outcome))

    assert outcomes == ["delivered", "deferred", "delivered"]


def test_the_guards_are_asked_when_the_wait_is_over(make_dispatcher: shop.Make, redis_server: RedisServer) -> None:
    wanted = [True, True, True, False]
    asked = shop.transition("Asked", "asked", lambda self: wanted.pop(0))
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [asked]}, callback=sink, rate_limit="1/h"))
    first, second = (shop.new_chain(dispatcher, number) for number in range(2))
    shop.attempt(dispatcher, shop.planned(dispatcher, first))
    delivery = shop.planned(dispatcher, second)
    assert shop.attempt(dispatcher, delivery).outcome == "deferred" and wanted == [False], "not asked while it waits"

    shop.wait_over(dispatcher, delivery)
    redis_server.clear()

    assert shop.attempt(dispatcher, delivery).outcome == "cancelled"
    assert len(sink) == 1


def test_a_deferred_delivery_in_a_group_leaves_the_others_alone(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink, rate_limit="7/h"))
    chains = [shop.new_chain(dispatcher, number) for number in range(12)]
    owed = [Owed(shop.planned(dispatcher, chain).id, 1) for chain in chains]

    results = dispatcher.deliver(owed)

    assert [str(result.outcome) for result in results] == ["delivered"] * 7 + ["deferred"] * 5
    assert {chain.refresh().state for chain in chains[:7]} == {"reminded"}
    assert {
        (shop.delivery_of(dispatcher, chain).status, shop.delivery_of(dispatcher, chain).attempt)
        for chain in chains[7:]
    } == {("pending", 0)}


def test_a_failure_stays_known_while_the_next_attempt_waits(make_dispatcher: shop.Make) -> None:
    fails = shop.transition("Fails", "failed", retry=RetryPolicy(max_attempts=2))
    dispatcher = make_dispatcher(shop.cart({NEW: [fails]}, callback=shop.Raises(OSError("no")), rate_limit="1/h"))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.attempt(dispatcher, delivery)

    for _ in range(2):
        shop.wait_over(dispatcher, delivery)
        assert shop.attempt(dispatcher, delivery, 2).outcome == "deferred"

    row = shop.delivery_of(dispatcher, chain)
    assert (row.attempt, row.waits_for, row.last_error) == (1, "rate", "OSError: no")


def test_an_unknown_effect_is_not_asked_about_before_its_turn(make_dispatcher: shop.Make) -> None:
    asked: list[bool] = []
    verifying = shop.transition("Verifying", "verified", verify=lambda self: asked.append(True) or True)
    dispatcher = make_dispatcher(
        shop.cart({NEW: [verifying]}, callback=shop.Sink(), **DAYTIME), clock=(clock := shop.Clock(NIGHT))
    )
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery)
    assert dispatcher.relay()["settled"] == 1

    assert shop.attempt(dispatcher, delivery, 2).outcome == "deferred" and not asked
    waiting = shop.delivery_of(dispatcher, chain)
    assert waiting.unknown and waiting.attempt == 1
    assert (waiting.waits_for, waiting.waits_reason) == ("hours", "delivery hours 08:00-20:00 UTC")
    assert (waiting.last_error or "").startswith("attempt 1 ended")

    clock.now = NOON
    shop.wait_over(dispatcher, delivery)
    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered" and asked == [True]


def test_a_lock_server_that_is_away_defers_for_a_while(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), rate_limit="3/h"),
        redis_url="redis://:secret@127.0.0.1:1/0",
    )
    chain = shop.new_chain(dispatcher)

    result = shop.attempt(dispatcher, shop.planned(dispatcher, chain))

    assert result.outcome == "deferred" and 15 <= result.retry_seconds <= 30
    row = shop.delivery_of(dispatcher, chain)
    assert (row.waits_for, row.has_place, row.last_error) == ("rate", False, None)
    assert row.waits_reason == "Redis, which counts the calls for the rate limit, does not answer"


def test_a_chain_that_is_disabled_while_its_delivery_waits_is_left_alone(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(gate.wait), rate_limit="1/h"))
    first, second = (shop.new_chain(dispatcher, number) for number in range(2))
    with gate.during(lambda: shop.attempt(dispatcher, shop.planned(dispatcher, first))):
        delivery = shop.planned(dispatcher, second)
        assert shop.attempt(dispatcher, delivery).outcome == "deferred", "a call that runs counts"
    second.disable()
    shop.change_delivery(dispatcher, delivery.id, next_attempt_at=shop.LONG_AGO)
    assert dispatcher.relay()["relayed"] == 0
    assert shop.attempt(dispatcher, delivery).outcome == "disabled"

    assert shop.delivery_of(dispatcher, second.enable()).publish_after is not None


def test_an_execution_in_this_process_asks_neither_hours_nor_limits(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=sink, rate_limit="1/h", **DAYTIME), clock=shop.Clock(NIGHT)
    )
    outcomes = [shop.new_chain(dispatcher, number).execute()["outcome"] for number in range(3)]
    assert outcomes == ["moved"] * 3 and len(sink) == 3


# --- delivery hours --------------------------------------------------------------------------------------------------


def test_outside_its_hours_a_delivery_waits_in_its_row_until_they_begin(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    sink = shop.Sink()
    hours = database_hours(timedelta(hours=5))
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink, delivery_hours=hours))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.take_messages(broker_url, shop.CALLBACKS)

    result = shop.attempt(dispatcher, delivery)

    assert (result.outcome, result.retry_seconds, len(sink)) == ("deferred", None, 0)
    row = shop.delivery_of(dispatcher, chain)
    assert (row.status, row.attempt, row.last_error) == ("pending", 0, None)
    assert (row.waits_for, row.waits_reason, row.has_place) == ("hours", f"delivery hours {hours} UTC", False)
    assert is_the_relay_s(row) and row.next_attempt_at is not None
    assert row.next_attempt_at.time() in DeliveryHours.parse(hours), "never a moment before"
    assert shop.take_messages(broker_url, shop.CALLBACKS) == []


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
    make_dispatcher: shop.Make, options: dict[str, Any], now: datetime, outcome: str
) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), **options), clock=shop.Clock(now)
    )

    result = shop.attempt(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher)))

    assert result.outcome == outcome
    if outcome == "deferred":
        assert result.retry_seconds == 60, "another clock may be fast: it is asked again soon"


@pytest.mark.parametrize("where", ["chain", "request"])
def test_a_chain_s_own_time_zone_wins(make_dispatcher: shop.Make, where: str) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), time_zone="Europe/Berlin", **DAYTIME),
        clock=shop.Clock(NIGHT),
    )
    own = {"time_zone": "Asia/Tokyo"}
    chain = shop.new_chain(dispatcher, initial_context=own if where == "chain" else None)
    chain.enqueue(initial_context=own if where == "request" else None)
    assert shop.attempt(dispatcher, shop.planned(dispatcher, chain)).outcome == "delivered", "11:00 in Tokyo"

    assert shop.attempt(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher, 1))).outcome == "deferred", (
        "05:00 in Berlin"
    )


@pytest.mark.parametrize("bad", ["Mars/Olympus", "", 7, ["UTC"], "../../etc/passwd"])
def test_a_chain_s_time_zone_that_is_none_is_warned_about_and_the_type_s_holds(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture, bad: Any
) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), time_zone="Asia/Tokyo", **DAYTIME),
        clock=shop.Clock(NIGHT),
    )
    chain = shop.new_chain(dispatcher, initial_context={"time_zone": bad})

    with caplog.at_level(logging.WARNING, logger="dispatcher.delivery.pacing"):
        assert shop.attempt(dispatcher, shop.planned(dispatcher, chain)).outcome == "delivered"

    (record,) = [record for record in caplog.records if record.name == "dispatcher.delivery.pacing"]
    assert (record.__dict__["action"], record.__dict__["chain_id"]) == ("time_zone_unknown", chain.id)
    assert "Mars" not in record.getMessage(), "a context is not logged"


def test_a_dead_delivery_that_is_retried_waits_for_its_hours_too(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink(lambda _: shop.Raises(PermanentFailure("no address"), times=1)())
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=sink, **DAYTIME), clock=(clock := shop.Clock(NOON))
    )
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    assert shop.attempt(dispatcher, delivery).outcome == "dead"
    clock.now = NIGHT
    chain.refresh().retry_delivery()

    assert shop.attempt(dispatcher, delivery, 2).outcome == "deferred"
    row = shop.delivery_of(dispatcher, chain)
    assert (row.waits_for, row.last_error) == ("hours", "PermanentFailure: no address")


def test_a_delivery_whose_group_ran_out_of_time_keeps_its_place_and_what_failed_before(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = 0.0
    shop.set_monotonic(monkeypatch, lambda: hours)

    def take_an_hour(*_: Any, **__: Any) -> None:
        nonlocal hours
        hours += 3600

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Remind", "reminded")]}, callback=take_an_hour))
    deliveries = [shop.planned(dispatcher, shop.new_chain(dispatcher, number)) for number in range(2)]
    waited = {"waits_for": "rate", "waits_reason": "rate limit 3/h", "has_place": True, "last_error": "OSError: no"}
    for delivery in deliveries:
        shop.change_delivery(dispatcher, delivery.id, **waited)

    dispatcher.deliver([Owed(delivery.id, 1) for delivery in deliveries])

    rows = [row for delivery in deliveries for row in dispatcher.find_deliveries(chain_id=delivery.chain_id)]
    assert sorted((row.status, row.attempt) for row in rows) == [("delivered", 1), ("pending", 0)]
    assert {row.last_error for row in rows} == {"OSError: no"}
    (waiting,) = [row for row in rows if row.status == "pending"]
    assert {name: getattr(waiting, name) for name in waited} == waited


def test_a_deferral_whose_commit_reported_an_error_is_read_back(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.transition("Remind", "reminded")]}, callback=shop.Sink(), rate_limit="1/m")
    )
    first, second = (shop.new_chain(dispatcher, number) for number in range(2))
    assert shop.attempt(dispatcher, shop.planned(dispatcher, first)).outcome == "delivered"
    owed = shop.planned(dispatcher, second)
    commits: list[object] = []

    def lose_answer(step: Callable[[], Any]) -> Any:
        answer = step()
        commits.append(step)
        if len(commits) == 2:
            raise OperationalError("COMMIT", None, OSError("connection reset by peer"), connection_invalidated=True)
        return answer

    monkeypatch.setattr(database, "commit", lose_answer)
    result = shop.attempt(dispatcher, owed)

    assert (result.outcome, result.attempt) == ("deferred", 1) and result.retry_seconds
    row = shop.delivery_of(dispatcher, second)
    assert (row.status, row.attempt) == ("pending", 0)
