"""How long a chain rests after its delivery, however the delivery ended and whoever settled it."""

from datetime import timedelta
from typing import Any

import pytest

from dispatcher import NEW, RetryPolicy, Transition
from dispatcher.errors import PermanentFailure
from tests.integration import shop

pytestmark = pytest.mark.integration

REST = timedelta(days=14)


def resting(**members: Any) -> type[Transition]:
    """A transition whose guard asks for a rest of 14 days."""

    def is_valid(self: Transition) -> bool:
        self.date_next_update = self.now + REST
        return True

    return shop.transition("Resting", "rested", is_valid, **members)


def rest_of(dispatcher: Any, chain: Any) -> timedelta | None:
    """How long the chain rests, on a domain clock that stands still."""
    row = shop.row_of(dispatcher, chain.id)
    assert row.state == "rested"
    chain.refresh()
    assert (chain.next_update_at is None) == (row.due_at <= shop.START)
    return None if chain.next_update_at is None else chain.next_update_at - shop.START


@pytest.mark.parametrize("last_look_seconds", [0, 3600])
def test_with_and_without_a_last_look(make_dispatcher: shop.Make, last_look_seconds: float) -> None:
    config = shop.cart({NEW: [resting()], "rested": [shop.Never]}, callback=shop.Sink())
    dispatcher = make_dispatcher(config, clock=shop.Clock(), last_look_seconds=last_look_seconds)
    chain = shop.new_chain(dispatcher)

    assert shop.attempt(dispatcher, shop.planned(dispatcher, chain)).outcome == "delivered"

    assert rest_of(dispatcher, chain) == REST


@pytest.mark.parametrize("verify", [True, False, None])
def test_after_an_attempt_whose_worker_died(make_dispatcher: shop.Make, verify: bool | None) -> None:
    members = {} if verify is None else {"verify": lambda self: verify}
    config = shop.cart({NEW: [resting(**members)], "rested": [shop.Never]}, callback=shop.Sink())
    dispatcher = make_dispatcher(config, clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery)
    dispatcher.relay()
    shop.wait_over(dispatcher, delivery)

    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"

    assert rest_of(dispatcher, chain) == REST


def test_after_a_retry(make_dispatcher: shop.Make) -> None:
    config = shop.cart(
        {NEW: [resting()], "rested": [shop.Never]}, callback=shop.Sink(shop.Raises(OSError("no"), times=1))
    )
    dispatcher = make_dispatcher(config, clock=shop.Clock(), last_look_seconds=3600)
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    assert shop.attempt(dispatcher, delivery).outcome == "retrying"
    shop.wait_over(dispatcher, delivery)

    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"

    assert rest_of(dispatcher, chain) == REST


@pytest.mark.parametrize("skipped_by", ["a person", "on_dead", "the relay"])
def test_after_a_delivery_that_is_skipped(make_dispatcher: shop.Make, skipped_by: str) -> None:
    fails = shop.Sink(shop.Raises(PermanentFailure("no such address")))
    on_dead = "hold" if skipped_by == "a person" else "skip"
    once = resting(retry=RetryPolicy(max_attempts=1))
    config = shop.cart({NEW: [once], "rested": [shop.Never]}, callback=fails, on_dead=on_dead)
    dispatcher = make_dispatcher(config, clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    if skipped_by == "the relay":
        shop.crashed(dispatcher, delivery)
        dispatcher.relay()
    else:
        shop.attempt(dispatcher, delivery)
        if skipped_by == "a person":
            chain.refresh().skip_delivery("me")

    assert shop.delivery_of(dispatcher, chain).status == "skipped"
    assert rest_of(dispatcher, chain) == REST


def test_a_last_look_that_runs_says_how_long(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    config = shop.cart({NEW: [resting()], "rested": [shop.Never]}, callback=shop.Sink())
    dispatcher = make_dispatcher(config, clock=clock)
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    clock.forward(hours=3)

    assert shop.attempt(dispatcher, delivery).outcome == "delivered"

    assert chain.refresh().next_update_at == shop.START + timedelta(hours=3) + REST


def test_a_property_has_no_facts_where_no_guard_was_asked(make_dispatcher: shop.Make) -> None:
    def is_valid(self: Transition) -> bool:
        self.asked = self.now + REST
        return True

    computed = shop.transition("Computed", "rested", is_valid, date_next_update=property(lambda self: self.asked))
    config = shop.cart({NEW: [computed], "rested": [shop.Never]}, callback=shop.Sink())
    dispatcher = make_dispatcher(config, clock=shop.Clock(), last_look_seconds=3600)
    chain = shop.new_chain(dispatcher)

    assert shop.attempt(dispatcher, shop.planned(dispatcher, chain)).outcome == "delivered"

    assert rest_of(dispatcher, chain) == REST and "guard_failed" not in shop.actions(chain)


def test_a_guard_can_ask_for_none_although_its_class_asks_for_one(make_dispatcher: shop.Make) -> None:
    def is_valid(self: Transition) -> bool:
        self.date_next_update = None
        return True

    soon = shop.transition("Soon", "rested", is_valid, date_next_update=shop.START + REST)
    config = shop.cart({NEW: [soon], "rested": [shop.Never]}, callback=shop.Sink())
    dispatcher = make_dispatcher(config, clock=shop.Clock(), last_look_seconds=3600)
    chain = shop.new_chain(dispatcher)

    shop.attempt(dispatcher, shop.planned(dispatcher, chain))

    assert rest_of(dispatcher, chain) is None


@pytest.mark.parametrize("skips", [True, False])
def test_a_delivery_from_before_its_row_had_the_rest_keeps_that_of_its_class(
    make_dispatcher: shop.Make, skips: bool
) -> None:
    later = shop.transition("Later", "rested", date_next_update=shop.START + REST)
    config = shop.cart({NEW: [later], "rested": [shop.Never]}, callback=shop.Sink())
    dispatcher = make_dispatcher(config, clock=shop.Clock(), last_look_seconds=3600)
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.change_delivery(dispatcher, delivery.id, begins=None, rest_until=None, waits_since=None)

    if skips:
        chain.refresh().skip_delivery("me")
    else:
        assert shop.attempt(dispatcher, delivery).outcome == "delivered"

    assert rest_of(dispatcher, chain) == REST
