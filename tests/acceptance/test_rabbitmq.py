"""Worker and beat on RabbitMQ: the broker is an address, and Redis is there for locks alone."""

from collections.abc import Callable, Iterator

import pytest
from kombu import pools

from dispatcher.publisher import QUEUES
from tests.acceptance.nodes import Deployment
from tests.conftest import running
from tests.servers import RabbitMqServer

pytestmark = pytest.mark.acceptance


@pytest.fixture
def broker(rabbitmq_server: RabbitMqServer) -> Iterator[RabbitMqServer]:
    """The run's RabbitMQ, without any of our queues before and after the test."""
    pools.reset()  # kombu keeps connections, and what was declared on them, for the process
    rabbitmq_server.delete_queues(QUEUES)
    yield rabbitmq_server
    pools.reset()
    rabbitmq_server.delete_queues(QUEUES)


def test_sweeps_and_requests_take_chains_their_way_once(
    make_deployment: Callable[..., Deployment], broker: RabbitMqServer
) -> None:
    deployment = make_deployment(broker_url=broker.url, sweep_seconds=1, relay_seconds=1, queued_seconds=2)
    with (
        deployment.client() as client,
        deployment.running(deployment.worker()),
        deployment.running(deployment.beat()),
    ):
        swept = [client.get_or_create_resource_chain("sequence", [("test", str(number))]) for number in range(10)]
        failing = client.get_or_create_resource_chain(
            "sequence", [("test", "fails once")], initial_context={"fail_times": 1}
        )
        asked = client.get_or_create_resource_chain("question", [("test", "asked")])
        asked.enqueue(initial_context={"question": "what?"}, callback="answer", requested_by="the shop")

        deployment.assert_went_all_the_way_once(swept)
        deployment.wait_for_state(failing, "done")
        deployment.wait_for_state(asked, "answered")

        assert len(deployment.sink.lines("called", chain_id=failing.id)) == 3, "one retry"
        assert [line["transition"] for line in deployment.sink.lines("done", chain_id=asked.id)] == ["Asked"]
        assert client.find_deliveries(chain_id=asked.id)[0].requested_by == "the shop"


def test_a_broker_that_was_killed_and_comes_back_is_found_again(make_deployment: Callable[..., Deployment]) -> None:
    with running(RabbitMqServer) as broker:
        deployment = make_deployment(broker_url=broker.url, sweep_seconds=1, relay_seconds=1, queued_seconds=2)
        with (
            deployment.client() as client,
            deployment.running(deployment.worker()),
            deployment.running(deployment.beat()),
        ):
            chains = [client.get_or_create_resource_chain("sequence", [("test", str(number))]) for number in range(10)]
            deployment.eventually(lambda: deployment.sink.lines("done"), "the first callback")
            broker.kill()
            chains.append(client.get_or_create_resource_chain("sequence", [("test", "made meanwhile")]))
            broker.start()

            deployment.assert_went_all_the_way_once(chains)
