"""Worker and beat: chains go their whole way by sweeps alone, whatever the number of beats."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from pytest_celery import CeleryTestSetup
from sqlalchemy import select

from dispatcher import Chain, Dispatcher
from dispatcher.storage.models import Base
from tests.acceptance.nodes import Deployment, results

pytestmark = pytest.mark.acceptance

SWEEP_SECONDS = 1


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def deployment_settings() -> dict[str, Any]:
    return {"sweep_seconds": SWEEP_SECONDS, "relay_seconds": 1, "queued_seconds": 2}


def test_sweeps_alone_take_chains_from_new_to_the_end(
    celery_setup: CeleryTestSetup, beat_node: object, deployment: Deployment, new_chain: Callable[..., Chain]
) -> None:
    deployment.assert_went_all_the_way_once([new_chain("sequence") for _ in range(20)])
    assert "Traceback" not in celery_setup.worker.logs()


def test_two_beats_double_nothing_and_a_tick_is_claimed_once_per_interval(
    celery_setup: CeleryTestSetup, beat_node: object, deployment: Deployment, new_chain: Callable[..., Chain]
) -> None:
    def sweeps_since(mark: int) -> tuple[int, int]:
        found = results(celery_setup.worker.logs()[mark:], "dispatcher.sweep")
        too_early = sum(result == "{'claimed': False}" for result in found)
        return len(found) - too_early, too_early

    with deployment.running(deployment.beat()):
        began, mark = time.monotonic(), len(celery_setup.worker.logs())
        deployment.assert_went_all_the_way_once([new_chain("sequence") for _ in range(10)])
        deployment.eventually(lambda: min(sweeps_since(mark)) >= 4, "ticks of two beats")
        claimed, _ = sweeps_since(mark)
        assert claimed <= (time.monotonic() - began) / (SWEEP_SECONDS * 0.9) + 1


def test_a_worker_with_its_own_beat_relays_a_delivery_whose_message_was_lost(
    make_deployment: Callable[..., Deployment], deployment_settings: dict[str, Any]
) -> None:
    deployment = make_deployment(**deployment_settings)
    with deployment.client() as client, redis.Redis.from_url(deployment.redis_url) as broker:
        chain = client.get_or_create_resource_chain("sequence", [("test", "1")])
        (planned,) = client.execute_chains([chain.id])  # as a worker does
        assert planned.outcome == "planned"
        assert broker.lpop("dispatcher.callbacks") is not None
        assert broker.llen("dispatcher.callbacks") == 0
        schedule = str(deployment.directory / "beat")
        with deployment.running(deployment.worker("-B", "--schedule", schedule)) as worker:
            deployment.assert_went_all_the_way_once([chain])
            assert "{'relayed': 1, 'settled': 0}" in results(worker.logs(), "dispatcher.relay")


# --- dry run ----------------------------------------------------------------------------------------------------------


def dump(client: Dispatcher) -> dict[str, list[Any]]:
    with client.database.read() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(select(table))), key=str)
            for table in Base.metadata.sorted_tables
        }


def test_a_deployment_in_dry_run_logs_what_it_would_do_and_changes_nothing(
    make_deployment: Callable[..., Deployment], deployment_settings: dict[str, Any]
) -> None:
    deployment = make_deployment(**deployment_settings, dry_run=True)
    with deployment.client(dry_run=False) as client, redis.Redis.from_url(deployment.redis_url) as keys:
        chains = [client.get_or_create_resource_chain("sequence", [("test", str(number))]) for number in range(3)]
        client.execute_chains([chains[0].id])  # its delivery's message waits for the worker
        before = dump(client)
        with (
            deployment.running(deployment.worker()) as worker,
            deployment.running(deployment.beat()),
            deployment.client() as dry_client,
        ):
            assert dry_client.enqueue("single", [("test", "never created")]) is None
            lines = [
                f"planned chain_id={chain.id} chain_type=sequence from=new to=first_sent transition=First callback=type"
                for chain in chains[1:]
            ]
            deployment.eventually(lambda: all(line in worker.logs() for line in lines), "the plans")
            deployment.eventually(lambda: len(results(worker.logs(), "dispatcher.sweep")) >= 3, "three sweeps")
            deployment.eventually(lambda: "'outcome': 'dry_run'" in worker.logs(), "the delivery's message")
        assert dump(client) == before
        assert keys.keys("dispatcher:*") == []
    assert deployment.sink.lines() == []
