"""Who did what, and why: every act of an operator takes `requested_by` and `reason`."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from dispatcher import NEW, Chain, ConfigurationError, Dispatcher, RetryPolicy
from tests.integration import shop

pytestmark = pytest.mark.integration

CUSTOMER = ("customer", "57844")
WHO: dict[str, Any] = {"requested_by": "ada", "reason": "as agreed"}
Remind = shop.transition("Remind", "reminded", retry=RetryPolicy(max_attempts=1))
TRANSITIONS = {NEW: [Remind], "reminded": [shop.Never]}

ACTS: dict[str, tuple[str, Callable[[Dispatcher, Chain], Any]]] = {
    "disable": ("disabled", lambda _, chain: chain.disable(**WHO)),
    "enable": ("enabled", lambda _, chain: chain.disable().enable(**WHO)),
    "reset": ("reset", lambda _, chain: chain.reset(**WHO)),
    "move_to": ("moved", lambda _, chain: chain.move_to("reminded", **WHO)),
    "retry": ("retried", lambda _, chain: chain.retry_delivery(**WHO)),
    "cancel": ("cancelled", lambda _, chain: chain.cancel_delivery(**WHO)),
    "skip": ("skipped", lambda _, chain: chain.skip_delivery(**WHO)),
    "disable a resource": ("disabled", lambda dispatcher, _: dispatcher.disable_resource(CUSTOMER, **WHO)),
    "enable a resource": (
        "enabled",
        lambda dispatcher, chain: dispatcher.enable_resource(CUSTOMER, **WHO) if chain.disable() else None,
    ),
}


@pytest.fixture
def dispatcher(make_dispatcher: shop.Make) -> Dispatcher:
    return make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(shop.Raises(OSError("down")))))


@pytest.fixture
def chain(dispatcher: Dispatcher) -> Chain:
    """A chain with a dead delivery."""
    chain = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [CUSTOMER])
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    return chain.refresh()


@pytest.mark.parametrize("name", ACTS)
def test_the_history_says_who_did_it_and_why(dispatcher: Dispatcher, chain: Chain, name: str) -> None:
    action, act = ACTS[name]

    act(dispatcher, chain)

    event = [event for event in chain.events if event.action == action][-1]
    assert (event.requested_by, event.detail) == ("ada", "as agreed")


def test_without_a_reason_the_history_says_what_it_said_before(dispatcher: Dispatcher, chain: Chain) -> None:
    chain.retry_delivery("ada")
    retried = chain.events[-1]
    chain.disable("ada").enable("ada").reset("ada")

    assert (retried.action, retried.detail) == ("retried", "OSError: down")
    told = {event.action: event.detail for event in chain.events[-4:]}
    assert told == {"disabled": None, "enabled": None, "cancelled": "reset to new", "reset": None}


def test_a_mapping_says_from_which_state_and_why(dispatcher: Dispatcher, chain: Chain) -> None:
    assert dispatcher.map_states(shop.CHAIN_TYPE, NEW, "reminded", **WHO).mapped == 1

    mapped = chain.events[-1]
    assert (mapped.action, mapped.requested_by, mapped.detail) == ("mapped", "ada", "from new: as agreed")


@pytest.mark.parametrize(
    "act",
    [
        lambda dispatcher, name: dispatcher.pause(shop.CHAIN_TYPE, "why", requested_by=name),
        lambda dispatcher, name: dispatcher.resume(shop.CHAIN_TYPE, requested_by=name),
        lambda dispatcher, name: dispatcher.erase_resource(CUSTOMER, requested_by=name),
        lambda dispatcher, name: dispatcher.retry_delivery(*dispatcher.find_deliveries(), requested_by=name),
    ],
)
def test_a_name_that_is_too_long_is_refused(
    dispatcher: Dispatcher, chain: Chain, act: Callable[[Dispatcher, str], Any]
) -> None:
    before = shop.dump_rows(dispatcher)

    with pytest.raises(ConfigurationError, match="requested_by"):
        act(dispatcher, "x" * 1000)

    assert shop.dump_rows(dispatcher) == before and chain.id


def test_every_act_of_an_operator_takes_a_name_and_a_reason() -> None:
    acts: list[Any] = [Chain.disable, Chain.enable, Chain.reset, Chain.move_to]
    acts += [
        getattr(owner, f"{verb}_delivery") for owner in (Chain, Dispatcher) for verb in ("retry", "cancel", "skip")
    ]
    acts += [Dispatcher.pause, Dispatcher.resume, Dispatcher.map_states]
    acts += [Dispatcher.disable_resource, Dispatcher.enable_resource, Dispatcher.erase_resource]
    for act in acts:
        assert {"requested_by", "reason"} <= set(inspect.signature(act).parameters), act
