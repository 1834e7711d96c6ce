"""Before the call: loaders and guards that take longer than their task may, and how many facts are loaded in vain."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from dispatcher import NEW, RetryPolicy
from dispatcher.domain.records import Owed
from tests.integration import shop

pytestmark = pytest.mark.integration

CHAINS = 4
MAX_ATTEMPTS = 2
LOCK_SECONDS = 1


class SlowLoader:
    """A `load_context` that takes so many seconds once it is `slow`; `batches` are the sizes of what it loaded."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.slow = False
        self.batches: list[int] = []

    def __call__(self, chains: Sequence[Any]) -> dict[int, dict[str, Any]]:
        if self.slow:
            self.batches.append(len(chains))
            time.sleep(self.seconds)
        return {}


def deliver_all(dispatcher: Any, broker_url: str, owed: list[Owed]) -> list[list[str]]:
    """Deliver these in one task, and then what is published again, as workers do; the outcomes of each task."""
    tasks = []
    while owed:
        results = dispatcher.deliver(owed)
        tasks.append(sorted(str(result.outcome) for result in results))
        for result in results:
            if result.outcome == "retrying":
                (delivery,) = dispatcher.find_deliveries(chain_id=result.chain_id)
                shop.wait_over(dispatcher, delivery)
        messages = [message.kwargs["deliveries"] for message in shop.take_messages(broker_url, shop.CALLBACKS)]
        owed = [Owed(*pair) for pairs in messages for pair in pairs]
        owed += [Owed(result.delivery_id, result.next_attempt) for result in results if result.outcome == "retrying"]
    return tasks


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue({"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param])
    return url


def test_a_group_whose_facts_take_more_than_a_second_to_load_goes_on_at_each_load(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    load, sink = SlowLoader(1.1), shop.Sink(lambda _: time.sleep(0.4))
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=sink, load_context=load), deliveries_per_task=CHAINS
    )
    owed = [Owed(shop.planned(dispatcher, shop.new_chain(dispatcher, number)).id, 1) for number in range(CHAINS)]
    shop.take_messages(broker_url, shop.CALLBACKS)
    load.slow = True

    tasks = deliver_all(dispatcher, broker_url, owed)

    assert sum(task.count("delivered") for task in tasks) == len(sink) == CHAINS
    assert all("delivered" in task for task in tasks), "each task makes progress"
    assert len(load.batches) <= CHAINS, "each load is followed by a call"
    assert sum(load.batches) <= 2 * CHAINS, "few facts are loaded in vain"


def test_a_loader_that_takes_longer_than_the_time_before_a_call_uses_up_the_attempts_of_one_after_the_other(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    load, sink = SlowLoader(LOCK_SECONDS + 0.1), shop.Sink()
    remind = shop.transition("Patient", "reminded", retry=RetryPolicy(max_attempts=MAX_ATTEMPTS))
    dispatcher = make_dispatcher(
        shop.cart({NEW: [remind]}, callback=sink, load_context=load),
        deliveries_per_task=CHAINS,
        lock_seconds=LOCK_SECONDS,
        lease_seconds=2,
    )
    chains = [shop.new_chain(dispatcher, number) for number in range(CHAINS)]
    owed = [Owed(shop.planned(dispatcher, chain).id, 1) for chain in chains]
    shop.take_messages(broker_url, shop.CALLBACKS)
    load.slow = True

    tasks = deliver_all(dispatcher, broker_url, owed)

    assert len(sink) == 0
    assert all({"retrying", "dead"} & set(task) for task in tasks), "each task uses up an attempt"
    assert len(load.batches) <= CHAINS * MAX_ATTEMPTS
    for chain in chains:
        delivery = shop.delivery_of(dispatcher, chain)
        assert (delivery.status, delivery.attempt, delivery.unknown) == ("dead", MAX_ATTEMPTS, False)
        assert str(delivery.last_error).startswith("OutOfTime: ")


def test_a_guard_that_takes_longer_than_the_time_before_a_call_is_a_failed_attempt(make_dispatcher: shop.Make) -> None:
    slow: list[float] = []

    def valid(_: object) -> bool:
        time.sleep(sum(slow))
        return True

    sink = shop.Sink()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.transition("Slow", "reminded", valid)]}, callback=sink),
        lock_seconds=LOCK_SECONDS,
        lease_seconds=2,
    )
    relaying = make_dispatcher(shop.cart({NEW: [shop.Remind]}), lease_seconds=2)
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    slow.append(7.0)

    gate = shop.Gate()
    gate.reached.set()
    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        while not future.done():
            assert relaying.relay()["settled"] == 0, "its lease is renewed"
            time.sleep(0.1)

    result = future.result()
    assert (result.outcome, len(sink)) == ("retrying", 0) and result.detail.startswith("OutOfTime: ")
    assert not shop.delivery_of(dispatcher, chain).unknown
