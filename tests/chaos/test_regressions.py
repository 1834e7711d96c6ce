"""Defects that the chaos suite found, each by the shortest way to it."""

from collections.abc import Iterator

import pytest

from dispatcher import NEW, Dispatcher, Settings, Transition
from tests.servers import wait_until

SWEEP_SECONDS = 0.05


class Ready(Transition):
    final_state = "over"
    callback = None

    def is_valid(self) -> bool:
        return True


class Asked(Transition):
    final_state = "over"
    recheck_seconds = None

    def is_valid(self) -> bool:
        return False


def dispatcher(candidates: list[type[Transition]], database_url: str, redis_url: str) -> Dispatcher:
    chain_type = {"chain_type": "cart", "transitions": {NEW: candidates, "over": []}}
    settings = Settings(database_url=database_url, redis_url=redis_url, sweep_seconds=SWEEP_SECONDS, queued_seconds=1)
    return Dispatcher({"chains": [chain_type]}, settings=settings)


@pytest.fixture
def versions(database_url: str, redis_url: str) -> Iterator[tuple[Dispatcher, Dispatcher]]:
    with (
        dispatcher([Asked], database_url, redis_url) as old,
        dispatcher([Ready, Asked], database_url, redis_url) as new,
    ):
        yield old, new


@pytest.mark.integration
def test_a_chain_that_an_old_worker_laid_to_rest_after_the_deploy_began_is_due_again(
    versions: tuple[Dispatcher, Dispatcher],
) -> None:
    old, new = versions
    chain = old.get_or_create_resource_chain("cart", [("order", "7")])
    old.sweep()
    old.execute_chains([chain.id])
    new.sweep()  # notices the new candidate, and makes the chain due
    assert chain.refresh().due_at is not None
    old.execute_chains([chain.id])  # a worker of the version before is still there
    assert chain.refresh().due_at is None

    def is_due() -> bool:
        new.sweep()
        return chain.refresh().due_at is not None

    wait_until(is_due, seconds=20, what="the chain is due, now that the old version is gone")
    new.execute_chains([chain.id])
    assert chain.refresh().state == "over"
