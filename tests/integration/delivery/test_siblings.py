"""Groups in which something is wrong with one row or one statement: the others end as if they were alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from dispatcher import NEW, Dispatcher, ServiceUnavailable
from dispatcher.delivery import ends, recording
from dispatcher.domain.records import DeliveryRecord, Owed
from tests.integration import shop

pytestmark = pytest.mark.integration

SECONDS = 1.0


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ends, recording):
        monkeypatch.setattr(module, "RECORD_SECONDS", SECONDS)


def owed(dispatcher: Dispatcher, count: int) -> list[DeliveryRecord]:
    chains = [shop.new_chain(dispatcher, number) for number in range(count)]
    return sorted((shop.planned(dispatcher, chain) for chain in chains), key=lambda delivery: delivery.id)


def deliver(dispatcher: Dispatcher, deliveries: list[DeliveryRecord]) -> Any:
    return dispatcher.deliver([Owed(delivery.id, 1) for delivery in deliveries])


def statuses(dispatcher: Dispatcher, deliveries: list[DeliveryRecord]) -> list[str]:
    rows = {row.id: row.status for row in dispatcher.find_deliveries()}
    return [rows[delivery.id] for delivery in deliveries]


@contextmanager
def refusing(dispatcher: Dispatcher, delivery: DeliveryRecord, status: str) -> Iterator[None]:
    """Meanwhile the database refuses to write this status as the end of the delivery's first attempt."""
    table, chain_id = "chain_dispatcher_delivery", delivery.chain_id
    condition = f"chain_id <> {chain_id} OR status <> '{status}' OR attempt <> 1"
    refuse = f"ALTER TABLE {table} ADD CONSTRAINT refused CHECK ({condition})"
    allow = f"ALTER TABLE {table} DROP CONSTRAINT refused"
    if dispatcher.database.dialect == "sqlite":
        ours = f"NEW.chain_id = {chain_id} AND NEW.status = '{status}' AND NEW.attempt = 1"
        refuse = (
            f"CREATE TRIGGER refused BEFORE UPDATE ON {table} WHEN {ours} BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
        allow = "DROP TRIGGER refused"
    dispatcher.database.write(lambda connection: connection.execute(text(refuse)))
    try:
        with pytest.raises(DBAPIError, match="refused"):
            yield
    finally:
        dispatcher.database.write(lambda connection: connection.execute(text(allow)))


def test_a_row_that_cannot_be_written_does_not_keep_the_others_from_being_recorded(
    make_dispatcher: shop.Make,
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    deliveries = owed(dispatcher, 3)

    with refusing(dispatcher, deliveries[0], "delivered"):
        deliver(dispatcher, deliveries)

    assert statuses(dispatcher, deliveries) == ["running", "delivered", "delivered"]


def test_an_end_that_cannot_be_written_does_not_keep_the_others_from_their_turns(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink(shop.Raises(OSError("down"), times=1))
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    deliveries = owed(dispatcher, 3)

    with refusing(dispatcher, deliveries[0], "pending"):
        deliver(dispatcher, deliveries)

    broken, *others = statuses(dispatcher, deliveries)
    assert broken == "running"
    assert set(others) <= {"delivered", "pending"}, "called, or given back"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_database_that_fails_once_between_two_turns_costs_no_attempt(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    sink = shop.Sink(lambda _: time.sleep(0.6))
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    deliveries = owed(dispatcher, 5)
    store, errors = dispatcher._services.store, 0

    def fail_once(method: str) -> None:
        real = getattr(type(store), method)

        def once(*arguments: Any, **named: Any) -> Any:
            nonlocal errors
            errors += 1
            result = real(*arguments, **named)
            if errors == 1:
                raise ServiceUnavailable("database", "", "gone", None)
            return result

        monkeypatch.setattr(type(store), method, once)

    if failing == 1:
        fail_once("begin_anew")
    else:
        real = dispatcher.database.write

        def write(work: Any) -> Any:
            nonlocal errors
            errors += "give_back" in getattr(work, "__qualname__", "")
            if errors == 1:
                errors += 1
                raise ServiceUnavailable("database", "", "gone", written=False)
            return real(work)

        monkeypatch.setattr(dispatcher.database, "write", write)

    outcomes = [str(one.outcome) for one in deliver(dispatcher, deliveries)]

    assert errors >= 2
    assert outcomes == ["delivered", "delivered", "delivered", "delivered", "deferred"]


def test_an_attempt_that_cannot_be_marked_before_its_call_does_not_lose_the_others(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink), lock_seconds=1)
    deliveries = owed(dispatcher, 3)

    with pytest.raises(ServiceUnavailable), away(dispatcher):
        deliver(dispatcher, deliveries)

    assert statuses(dispatcher, deliveries) == ["running", "pending", "pending"]
    assert len(sink) == 0


@contextmanager
def away(dispatcher: Dispatcher) -> Iterator[None]:
    """Meanwhile no attempt can be marked as called."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ServiceUnavailable("database", "", "gone", None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(dispatcher._services.store), "mark_called", fail)
        yield
