"""Sweeps that hand their pages to other workers: chains go their whole way once, whatever becomes of a page."""

import ast
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from kombu import pools

from dispatcher.messages.queues import FAN_OUT, QUEUES
from tests.acceptance.nodes import Deployment, results
from tests.servers import RabbitMqServer

pytestmark = pytest.mark.acceptance

CHAINS = 20
SETTINGS: dict[str, Any] = {"sweep_seconds": 1, "relay_seconds": 1, "queued_seconds": 2, "sweep_fanout": 3}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def rabbitmq_url(rabbitmq_server: RabbitMqServer) -> Iterator[str]:
    """The URL of a RabbitMQ without any of our queues."""
    pools.reset()  # kombu keeps connections, and what was declared on them, for the process
    rabbitmq_server.delete_queues(QUEUES)
    yield rabbitmq_server.url
    pools.reset()
    rabbitmq_server.delete_queues(QUEUES)


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_two_workers_publish_the_pages_of_one_sweep(
    make_deployment: Callable[..., Deployment], broker: str, request: pytest.FixtureRequest
) -> None:
    url = {} if broker == "redis" else {"broker_url": request.getfixturevalue("rabbitmq_url")}
    deployment = make_deployment(**SETTINGS, **url)
    with (
        deployment.client() as client,
        deployment.running(deployment.worker()) as one,
        deployment.running(deployment.worker()) as other,
    ):
        chains = [client.get_or_create_resource_chain("sequence", [("test", str(number))]) for number in range(CHAINS)]
        with deployment.running(deployment.beat()):
            deployment.assert_went_all_the_way_once(chains)
        logs = [one.logs(), other.logs()]
        pages = [ast.literal_eval(result) for log in logs for result in results(log, FAN_OUT)]
        sweeps = [ast.literal_eval(result) for log in logs for result in results(log, "dispatcher.sweep")]
        assert all(page["chain_type"] == "sequence" and 0 < page["enqueued"] <= 3 for page in pages)
        assert sum(sweep.get("handed_over", 0) for sweep in sweeps) >= CHAINS
        assert "Traceback" not in logs[0] + logs[1]


def test_chains_whose_pages_were_lost_are_handed_over_again(make_deployment: Callable[..., Deployment]) -> None:
    deployment = make_deployment(**SETTINGS)
    with deployment.client() as client, redis.Redis.from_url(deployment.redis_url) as broker:
        chains = [client.get_or_create_resource_chain("sequence", [("test", str(number))]) for number in range(CHAINS)]
        assert client.sweep()["handed_over"] == CHAINS
        assert broker.delete("dispatcher.sweeps") == 1
        with deployment.running(deployment.worker()), deployment.running(deployment.beat()):
            deployment.assert_went_all_the_way_once(chains)
