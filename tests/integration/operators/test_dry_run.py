"""Under `DISPATCHER_DRY_RUN` operators' writes are refused, and nothing is written."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import redis

from dispatcher import NEW, Dispatcher, DispatcherError, DryRunRefused, RetryPolicy
from dispatcher.operators.operations import MapCounts
from tests.integration import shop

pytestmark = pytest.mark.integration

CUSTOMER = ("customer", "57844")
Remind = shop.transition("Remind", "reminded", retry=RetryPolicy(max_attempts=1))
TRANSITIONS = {NEW: [Remind], "reminded": [shop.Never]}

ACTS: dict[str, Callable[[Dispatcher], Any]] = {
    "disable": lambda dispatcher: dispatcher.chain(1).disable(),
    "enable": lambda dispatcher: dispatcher.chain(1).enable(),
    "reset": lambda dispatcher: dispatcher.chain(1).reset(),
    "move_to": lambda dispatcher: dispatcher.chain(1).move_to("reminded", "by letter"),
    "map": lambda dispatcher: dispatcher.map_states(shop.CHAIN_TYPE, NEW, "reminded"),
    "map of nothing": lambda dispatcher: dispatcher.map_states(shop.CHAIN_TYPE, "lost", "reminded"),
    "retry": lambda dispatcher: dispatcher.chain(1).retry_delivery(),
    "cancel": lambda dispatcher: dispatcher.chain(1).cancel_delivery(),
    "skip": lambda dispatcher: dispatcher.chain(1).skip_delivery(),
    "retry as listed": lambda dispatcher: dispatcher.retry_delivery(*dispatcher.find_deliveries()),
    "cancel as listed": lambda dispatcher: dispatcher.cancel_delivery(*dispatcher.find_deliveries()),
    "skip as listed": lambda dispatcher: dispatcher.skip_delivery(*dispatcher.find_deliveries()),
    "retry of nothing": lambda dispatcher: dispatcher.chain(2).retry_delivery(),
    "pause": lambda dispatcher: dispatcher.pause(shop.CHAIN_TYPE, "mail is down"),
    "resume": lambda dispatcher: dispatcher.resume(shop.CHAIN_TYPE),
    "resume slowly": lambda dispatcher: dispatcher.resume(shop.CHAIN_TYPE, spread=3600),
    "disable a resource": lambda dispatcher: dispatcher.disable_resource(CUSTOMER),
    "enable a resource": lambda dispatcher: dispatcher.enable_resource(CUSTOMER),
    "erase a resource": lambda dispatcher: dispatcher.erase_resource(CUSTOMER),
    "prune": lambda dispatcher: dispatcher.prune(days=1e-9),
    "prune without an age": lambda dispatcher: dispatcher.prune(),
    "separate": lambda dispatcher: dispatcher.separate("staging"),
    "repair": lambda dispatcher: dispatcher.repair(),
}


@pytest.fixture
def dry(make_dispatcher: shop.Make, redis_url: str) -> Dispatcher:
    """A dispatcher that only tries, on rows of another that there is something to do for."""
    config = shop.cart(TRANSITIONS, callback=shop.Sink(shop.Raises(OSError("down"))))
    real = make_dispatcher(config)
    first = real.get_or_create_resource_chain(shop.CHAIN_TYPE, [CUSTOMER])
    shop.attempt(real, shop.planned(real, first))
    second = shop.new_chain(real)
    closed = shop.new_chain(real, 2)
    shop.attempt(real, shop.planned(real, closed))
    closed.refresh().cancel_delivery()
    shop.change_chain(real, closed.id, pending_delivery_id=shop.delivery_of(real, closed).id)
    assert (first.id, second.id) == (1, 2)
    with redis.Redis.from_url(redis_url) as client:
        client.set("dispatcher:lock:77", "for ever")
    return make_dispatcher(config, dry_run=True)


@pytest.mark.parametrize("name", ACTS)
def test_an_act_of_an_operator_is_refused_and_writes_nothing(dry: Dispatcher, redis_url: str, name: str) -> None:
    if name.endswith("as listed"):
        dead = dry.find_deliveries(statuses=["dead"])
        dry.find_deliveries = lambda: dead  # type: ignore[method-assign]
    rows, keys = shop.dump_rows(dry), shop.dump_keys(redis_url)

    with pytest.raises(DryRunRefused, match="DISPATCHER_DRY_RUN is set; nothing was written") as caught:
        ACTS[name](dry)

    assert isinstance(caught.value, DispatcherError) and str(pickle.loads(pickle.dumps(caught.value))) == str(  # noqa: S301 - our own bytes
        caught.value
    )
    assert (shop.dump_rows(dry), shop.dump_keys(redis_url)) == (rows, keys)


def test_what_only_looks_and_what_beat_does_stays_quiet(dry: Dispatcher, redis_url: str) -> None:
    rows, keys = shop.dump_rows(dry), shop.dump_keys(redis_url)

    assert dry.map_states(shop.CHAIN_TYPE, NEW, "reminded", dry_run=True) == MapCounts(3, 0)
    assert dry.prune(tick=True) == {"events": 0, "deliveries": 0, "actions": 0, "dry_run": True}
    assert dry.relay(tick=True) == dry.relay() == {"relayed": 0, "settled": 0, "dry_run": True}
    assert dry.sweep(tick=True)["dry_run"] and dry.sweep()["dry_run"]
    assert len(dry.examine()) > 1

    assert (shop.dump_rows(dry), shop.dump_keys(redis_url)) == (rows, keys)


def test_a_refusal_says_what_was_refused(dry: Dispatcher) -> None:
    with pytest.raises(DryRunRefused) as caught:
        dry.chain(1).disable("ada")

    assert caught.value.act == "disable chain 1"
    assert str(caught.value) == (
        "refused to disable chain 1, because DISPATCHER_DRY_RUN is set; nothing was written: unset it to do this"
    )
