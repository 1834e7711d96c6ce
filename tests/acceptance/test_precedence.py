"""On demand first: what an application asks for does not wait behind what sweeps have published."""

import uuid
from collections.abc import Callable, Iterator

import pytest
from kombu import pools

from dispatcher import Chain, Dispatcher
from dispatcher.messages.queues import QUEUES
from tests.acceptance.nodes import Deployment
from tests.integration import shop
from tests.servers import RabbitMqServer

pytestmark = pytest.mark.acceptance

BACKLOG = 4000
BEGUN = 100
REQUESTS = 5
PROCESSES = 2
PREFETCHED = 4 * PROCESSES
"""Celery's own default: messages that a worker has taken and not begun, in the order of their arrival."""
A_FEW = 6
"""Of each other queue one message may be taken first, and one or two are begun while the request is written."""


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Each kind of broker in turn, without any message; None is the deployment's own Redis."""
    if request.param == "redis":
        yield None
        return
    server: RabbitMqServer = request.getfixturevalue("rabbitmq_server")
    pools.reset()  # kombu keeps connections, and what was declared on them, for the process
    server.delete_queues(QUEUES)
    yield server.url
    pools.reset()
    server.delete_queues(QUEUES)


def new_chain(client: Dispatcher) -> Chain:
    return client.get_or_create_resource_chain("unready", [("asked", uuid.uuid4().hex)])


def test_a_request_is_evaluated_before_the_backlog_of_a_sweep(
    make_deployment: Callable[..., Deployment], broker_url: str | None
) -> None:
    deployment = make_deployment(**({} if broker_url is None else {"broker_url": broker_url}))
    with deployment.client() as client:
        for _ in client.bulk_get_or_create("unready", [[("backlog", str(number))] for number in range(BACKLOG)]):
            pass
        assert client.sweep()["enqueued"] == BACKLOG
        asked = [new_chain(client) for _ in range(REQUESTS)]
        waited = []
        with deployment.running(deployment.worker()):
            deployment.eventually(lambda: len(deployment.sink.lines("asked")) >= BEGUN, "the backlog's beginning")
            for chain in asked:
                chain.enqueue()
                before = len(deployment.sink.lines("asked"))
                deployment.eventually(
                    lambda chain=chain: deployment.sink.lines("asked", chain_id=chain.id),  # type: ignore[misc]
                    "the request's evaluation",
                )
                evaluated = [line["chain_id"] for line in deployment.sink.lines("asked")]
                waited.append(evaluated.index(chain.id) - before)
            left = shop.queue_length(broker_url or deployment.redis_url, shop.CHAINS)
        assert max(waited) <= PREFETCHED + PROCESSES + A_FEW, waited
        assert left > 0, "the backlog ended before the requests: nothing was shown"
