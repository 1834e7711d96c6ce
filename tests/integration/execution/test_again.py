"""Chains that an execution leaves to another one: where their messages go, and what the results say."""

from types import SimpleNamespace
from typing import Any

import pytest
import redis

from dispatcher import NEW, Dispatcher
from dispatcher.execution import executor
from tests.integration import shop

pytestmark = pytest.mark.integration

SLOW = "dispatcher.slow"


class Hands:
    """A monotonic clock that a guard moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def forward(self, *_: Any) -> bool:
        """Half a minute passes; True, so that it can be a guard."""
        self.seconds += 30
        return True


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(executor, "time", SimpleNamespace(monotonic=lambda: hands.seconds))
    return hands


def two_types(make_dispatcher: shop.Make, guard: Any = True) -> Dispatcher:
    """A type with a queue of its own, and one without."""
    transitions = {NEW: [shop.transition("Slow", "slow", guard)]}
    config = shop.cart(transitions, callback=shop.Sink(), queue=SLOW)
    config["chains"].append({"chain_type": "other", "callback": shop.Sink(), "transitions": transitions})
    return make_dispatcher(config)


def test_chains_for_which_the_time_was_too_short_go_to_the_queues_of_their_types(
    make_dispatcher: shop.Make, broker_url: str, hands: Hands
) -> None:
    dispatcher = two_types(make_dispatcher, hands.forward)
    ids = [shop.new_chain(dispatcher, number).id for number in range(3)]
    ids += [shop.new_chain(dispatcher, number, "other").id for number in range(2)]

    results = dispatcher.execute_chains(ids)

    assert [result.outcome for result in results] == ["planned", *["out_of_time"] * 4]
    assert {result.detail for result in results} == {""}
    (slow,) = shop.take_messages(broker_url, SLOW)
    (other,) = shop.take_messages(broker_url, shop.CHAINS)
    assert (slow.kwargs["chain_ids"], other.kwargs["chain_ids"]) == (ids[1:3], ids[3:])
    assert all(shop.row_of(dispatcher, chain_id).due_at is not None for chain_id in ids[1:])


def test_siblings_that_may_kill_the_process_go_alone_to_the_queues_of_their_types(
    make_dispatcher: shop.Make, broker_url: str, redis_url: str
) -> None:
    dispatcher = two_types(make_dispatcher)
    first, second, other = (
        shop.new_chain(dispatcher, number, name).id for number, name in enumerate((*[shop.CHAIN_TYPE] * 2, "other"))
    )
    gone = 4711
    with redis.Redis.from_url(redis_url) as client:
        for chain_id in (first, second, other, gone):
            client.set(f"dispatcher:crash:{chain_id}", 1)

    results = dispatcher.execute_chains([first, second, other, gone])

    assert {result.outcome for result in results} == {"locked"}
    assert [message.kwargs["chain_ids"] for message in shop.take_messages(broker_url, SLOW)] == [[first], [second]]
    assert [message.kwargs["chain_ids"] for message in shop.take_messages(broker_url, shop.CHAINS)] == [[other]]


def test_chains_of_a_type_that_this_worker_does_not_know_go_to_the_default_queue(
    make_dispatcher: shop.Make, broker_url: str, hands: Hands
) -> None:
    dispatcher = two_types(make_dispatcher, hands.forward)
    first, renamed = (shop.new_chain(dispatcher, number).id for number in range(2))
    shop.change_chain(dispatcher, renamed, chain_type="renamed")

    assert [str(one.outcome) for one in dispatcher.execute_chains([first, renamed])] == ["planned", "out_of_time"]

    (message,) = shop.take_messages(broker_url, shop.CHAINS)
    assert message.kwargs["chain_ids"] == [renamed] and shop.take_messages(broker_url, SLOW) == []
