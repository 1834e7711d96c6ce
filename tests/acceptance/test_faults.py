"""Processes killed at the worst moment, and a broker that forgets everything: what was owed is done, once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from pytest_celery import CeleryTestSetup

from dispatcher import DONE, Chain
from tests.acceptance.nodes import Deployment, make_fifo

pytestmark = [pytest.mark.acceptance, pytest.mark.chaos]

CALLBACK_SECONDS = 1
LEASE_SECONDS = CALLBACK_SECONDS + 15


@pytest.fixture(scope="module")
def deployment_settings() -> dict[str, Any]:
    return {
        "sweep_seconds": 1,
        "relay_seconds": 1,
        "queued_seconds": 2,
        "lock_seconds": 3,
        "callback_seconds": CALLBACK_SECONDS,
    }


@pytest.fixture(autouse=True)
def _beat(beat_node: object) -> None:
    """Sweeps and relays go on in all tests here."""


def test_a_callback_whose_process_dies_is_made_again_under_the_same_key_after_its_lease(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain], tmp_path: Path
) -> None:
    mark, fifo = tmp_path / "mark", make_fifo(tmp_path)
    mark.touch()

    def called() -> list[dict[str, Any]]:
        return deployment.sink.lines("called")

    child = new_chain("single", callback_exit=str(mark))  # its pool process ends
    careful = new_chain("careful", callback_exit=str(mark))
    worker = new_chain("single", callback_fifo=str(fifo))  # the worker ends, with its pool
    for chain in (child, careful, worker):
        chain.enqueue()
    deployment.eventually(
        lambda: {chain.id for chain in (child, careful, worker)} <= {line["chain_id"] for line in called()}, "the calls"
    )
    celery_setup.worker.kill()
    mark.unlink()
    fifo.unlink()
    celery_setup.worker.restart()

    for chain in (child, worker):
        deployment.wait_for_state(chain, "first_sent", seconds=60)
        first, second = deployment.sink.lines("called", chain_id=chain.id)
        assert first["key"] == second["key"]
        assert second["at"] - first["at"] >= LEASE_SECONDS - 0.5, "nobody else may begin while the lease lasts"
        (done,) = deployment.sink.lines("done", chain_id=chain.id)
        assert done["key"] == first["key"]
        (delivery,) = chain.deliveries
        assert (delivery.status, delivery.attempt) == ("delivered", 2)
        assert [event.action for event in chain.events] == ["created", "planned", "state_transition"]
    deployment.eventually(lambda: careful.deliveries[0].status == "held", "the second relay", seconds=60)
    (delivery,) = careful.deliveries
    assert (delivery.attempt, delivery.unknown) == (1, True)
    assert len(deployment.sink.lines("called", chain_id=careful.id)) == 1


def test_a_callback_that_hangs_is_ended_by_its_time_limit_and_made_again_under_the_same_key(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain], tmp_path: Path
) -> None:
    fifo = make_fifo(tmp_path)
    chain = new_chain("single", callback_fifo=str(fifo))
    deployment.eventually(lambda: deployment.sink.lines("called", chain_id=chain.id), "the callback")
    fifo.unlink()  # for the attempts to come: nobody will ever open it for this one
    deployment.eventually(lambda: "killed: a callback has run 1 s" in celery_setup.worker.logs(), "the time limit")
    deployment.wait_for_state(chain, "first_sent", seconds=60)
    first, second = deployment.sink.lines("called", chain_id=chain.id)
    (done,) = deployment.sink.lines("done", chain_id=chain.id)
    assert first["key"] == second["key"] == done["key"]
    assert first["pid"] != second["pid"]


def test_a_callback_ended_by_its_time_limit_is_held_where_its_type_says_so(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain], tmp_path: Path
) -> None:
    fifo = make_fifo(tmp_path)
    chain = new_chain("careful", callback_fifo=str(fifo))
    deployment.eventually(lambda: deployment.sink.lines("called", chain_id=chain.id), "the callback")
    fifo.unlink()
    deployment.eventually(lambda: chain.deliveries[0].status in ("held", "delivered", "dead"), "the end", seconds=60)
    assert chain.deliveries[0].status == "held", "nobody knows how far the callback came"
    assert len(deployment.sink.lines("called", chain_id=chain.id)) == 1


def test_a_worker_killed_inside_a_guard_leaves_a_lock_that_expires(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain], tmp_path: Path
) -> None:
    fifo = make_fifo(tmp_path)
    with redis.Redis.from_url(deployment.redis_url) as keys:
        chain = new_chain("single", guard_fifo=str(fifo))
        lock = f"dispatcher:lock:{chain.id}"
        deployment.eventually(lambda: deployment.sink.lines("asked", chain_id=chain.id), "the guard")
        celery_setup.worker.kill()
        assert 0 < keys.pttl(lock) <= 3000
        fifo.unlink()
        celery_setup.worker.restart()
        deployment.wait_for_state(chain, "first_sent")
        assert keys.get(lock) is None
    assert len(deployment.sink.lines("called", chain_id=chain.id)) == 1


def test_a_guard_that_ends_its_process_again_and_again_stops_no_other_chain(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    crasher = new_chain("single", guard_exit=str(mark))
    deployment.eventually(lambda: deployment.sink.lines("asked", chain_id=crasher.id), "the guard")
    deployment.assert_went_all_the_way_once([new_chain("sequence") for _ in range(10)])
    deployment.eventually(
        lambda: "guard_failed" in [event.action for event in crasher.events], "the crasher to back off", seconds=60
    )
    deployment.assert_went_all_the_way_once([new_chain("sequence")])
    assert crasher.refresh().state == "new"
    mark.unlink()
    crasher.enqueue()
    deployment.wait_for_state(crasher, "first_sent")


def test_a_broker_that_restarts_without_its_messages_stops_nothing(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain]
) -> None:
    chains = [new_chain("sequence") for _ in range(30)]
    ids = {chain.id for chain in chains}
    deployment.eventually(
        lambda: ids & {line["chain_id"] for line in deployment.sink.lines("done")}, "the first of the callbacks"
    )
    celery_setup.broker.restart()
    deployment.eventually(lambda: all(chain.refresh().state == DONE for chain in chains), "30 chains DONE")
    deployment.assert_went_all_the_way_once(chains)
    assert celery_setup.worker.container.status == "running"
