"""Attempts that are called while somebody is about to settle them: what was read before does not say "not called"."""

from collections.abc import Callable
from typing import Any

import pytest

from dispatcher import NEW, Dispatcher
from dispatcher.domain.records import DeliveryRecord
from dispatcher.operators import operations
from dispatcher.passes import relay
from tests.integration import shop

pytestmark = pytest.mark.integration


def not_yet_called(make_dispatcher: shop.Make) -> tuple[Dispatcher, DeliveryRecord]:
    """A running attempt whose lease has ended, and whose callback has not been called."""
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    shop.crashed(dispatcher, delivery, begins=1, uncalled=1)
    return dispatcher, row(dispatcher)


def row(dispatcher: Dispatcher) -> DeliveryRecord:
    (delivery,) = dispatcher.find_deliveries()
    return delivery


def before(monkeypatch: pytest.MonkeyPatch, module: Any, act: Callable[[], Any]) -> None:
    """Let `act` happen once, after `module` has read the delivery and before it locks it."""
    define, acts = module.define, [act]

    def with_act(*arguments: Any) -> Any:
        found = define(*arguments)
        if acts:
            acts.pop()()
        return found

    monkeypatch.setattr(module, "define", with_act)


def called(dispatcher: Dispatcher, delivery: DeliveryRecord, **values: Any) -> None:
    """The attempt's process marks it as called; then its row gets these values."""
    dispatcher._services.store.mark_called([delivery], lease_seconds=20)
    if values:
        shop.change_delivery(dispatcher, delivery.id, **values)


def test_an_attempt_that_is_called_while_it_is_abandoned_is_unknown(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher, delivery = not_yet_called(make_dispatcher)
    before(monkeypatch, operations, lambda: called(dispatcher, delivery))

    dispatcher.abandon_delivery(delivery)

    abandoned = row(dispatcher)
    assert (abandoned.status, abandoned.unknown) == ("pending", True)
    assert abandoned.last_error == "attempt 1 was abandoned: its effect is unknown"


def test_an_attempt_that_was_called_while_the_relay_stood_still_is_not_settled_as_not_called(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher, delivery = not_yet_called(make_dispatcher)
    over = {"lease_until": shop.LONG_AGO, "publish_after": shop.LONG_AGO}  # it died in its call
    before(monkeypatch, relay, lambda: called(dispatcher, delivery, **over))

    assert dispatcher.relay()["settled"] == 0
    assert row(dispatcher).status == "running", "its lease was renewed since: the next relays have to see it end again"

    shop.change_delivery(dispatcher, delivery.id, **shop.LAPSED)
    assert dispatcher.relay()["settled"] == 1
    assert row(dispatcher).unknown


def test_a_call_of_an_application_that_was_settled_before_it_began_is_not_made(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)
    local = type(dispatcher._services.local_attempts)
    deliver = local.deliver

    def after_a_long_pause(*arguments: Any) -> Any:
        shop.change_delivery(dispatcher, row(dispatcher).id, **shop.LAPSED)
        assert dispatcher.relay()["settled"] == 1
        return deliver(*arguments)

    monkeypatch.setattr(local, "deliver", after_a_long_pause)

    assert chain.execute(callback=sink)["outcome"] == "stale"
    assert len(sink) == 0
