"""Worker and beat on RabbitMQ: the broker is an address, and Redis is there for locks alone."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kombu import Connection, Exchange, Queue, pools

from dispatcher.messages.queues import QUEUES
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


def test_a_worker_outlives_whatever_is_in_its_queues(
    make_deployment: Callable[..., Deployment], broker: RabbitMqServer, tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
            return open, (str(tmp_path / "unpickled"), "w")

    deployment = make_deployment(broker_url=broker.url, sweep_seconds=1, relay_seconds=1, queued_seconds=2)
    execute = {"lang": "py", "task": "dispatcher.execute_chain", "id": "x", "root_id": "x", "argsrepr": "\x1b[31m"}
    with Connection(broker.url) as connection, connection.channel() as channel:
        for name in QUEUES:
            Queue(name, Exchange(name, type="direct"), routing_key=name)(channel).declare()
            for content_type, headers, body in [
                ("application/x-python-serialize", execute, pickle.dumps(Bomb())),
                ("application/x-python-serialize", execute, pickle.dumps([[], {"chain_ids": Bomb()}, {}])),
                ("application/x-yaml", execute, b"!!python/object/apply:os.system [true]"),
                ("application/json", execute, b"not JSON"),
                ("application/json", execute, b"[1, 2, 3]"),
                ("application/json", execute, b'[[], {"chain_ids": [{}, -1, 1e999], "eval": "1"}, {}]'),
                ("application/json", {**execute, "task": "os.system"}, b'[["true"], {}, {}]'),
                ("application/json", {}, b"{}"),
                ("text/plain", {"retries": "many", "eta": "never"}, b"\xff" * 1000),
            ]:
                message = channel.prepare_message(
                    body, content_type=content_type, content_encoding="utf-8", headers=headers
                )
                channel.basic_publish(message, exchange=name, routing_key=name)
    with (
        deployment.client() as client,
        deployment.running(deployment.worker()),
        deployment.running(deployment.beat()),
    ):
        chains = [client.get_or_create_resource_chain("sequence", [("test", str(number))]) for number in range(3)]
        deployment.assert_went_all_the_way_once(chains)
    assert list(tmp_path.glob("unpickled")) == []
