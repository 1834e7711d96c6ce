"""Workers that hold retries (messages with an ETA) while their broker goes away, comes back or forgets everything."""

import uuid
from collections.abc import Callable, Iterator

import pytest
import redis
from celery import Celery

from dispatcher import Chain, Dispatcher
from dispatcher.messages.queues import CALLBACKS_QUEUE, DELIVER, MAX_COUNTDOWN
from tests.acceptance.chainlib import PATIENT_SECONDS
from tests.acceptance.nodes import Deployment
from tests.conftest import running
from tests.servers import RabbitMqServer, RedisServer

pytestmark = [pytest.mark.acceptance, pytest.mark.chaos]

CHAINS = 40
MANY = 300
HELD = 10
"""So many retries at least are in the worker when its broker goes away. Not all: a slow machine takes its time."""

QUICK = {"sweep_seconds": 1, "relay_seconds": 1, "queued_seconds": 2}


@pytest.fixture
def broker() -> Iterator[RedisServer]:
    """A broker of the test's own, because the test stops it."""
    with running(RedisServer) as server:
        yield server


def fail(client: Dispatcher, count: int, *, times: int) -> list[Chain]:
    """So many chains whose callback fails so often before it succeeds."""
    return [
        client.get_or_create_resource_chain(
            "patient", [("test", uuid.uuid4().hex)], initial_context={"fail_times": times}
        )
        for _ in range(count)
    ]


def wait_until_held(deployment: Deployment, broker: RedisServer, count: int) -> None:
    with redis.Redis(port=broker.port) as client:
        deployment.eventually(lambda: int(client.zcard("unacked_index")) >= count, f"{count} messages in the worker")


def assert_took_effect_once(deployment: Deployment, chains: list[Chain], *, calls: int) -> None:
    done = deployment.sink.lines
    deployment.eventually(lambda: len(done("done")) >= len(chains), f"{len(chains)} effects", seconds=90)
    for chain in chains:
        deployment.wait_for_state(chain, "first_sent")
        assert [event.action for event in chain.events] == ["created", "planned", "state_transition"]
    lines: dict[int, list[tuple[str, str]]] = {chain.id: [] for chain in chains}
    for line in deployment.sink.lines():
        lines[line["chain_id"]].append((line["what"], line["key"]))
    for of_chain in lines.values():
        assert [what for what, _ in of_chain] == ["called"] * calls + ["done"]
        assert len({key for _, key in of_chain}) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_that_holds_retries_outlives_restarts_of_its_redis(
    make_deployment: Callable[..., Deployment], broker: RedisServer, pool: str
) -> None:
    deployment = make_deployment(broker_url=broker.url, **QUICK)
    worker = deployment.worker(f"--pool={pool}")
    with deployment.client() as client, deployment.running(worker), deployment.running(deployment.beat()):
        started = worker.process
        chains = fail(client, CHAINS, times=2)
        wait_until_held(deployment, broker, HELD)
        broker.stop()  # without its messages
        broker.start()
        wait_until_held(deployment, broker, HELD)  # the second attempts have failed, too
        with redis.Redis(port=broker.port) as keys:
            keys.config_set("save", "3600 1")  # with its messages, which it believes to be in the worker
        broker.stop()
        broker.start()
        assert_took_effect_once(deployment, chains, calls=3)
        assert worker.process is started
        assert worker.status == "running", worker.tail()
        assert f"retry: Retry in {PATIENT_SECONDS}s: AttemptAgain" in worker.logs()


def test_a_worker_that_holds_hundreds_of_messages_outlives_a_redis_that_comes_and_goes(
    make_deployment: Callable[..., Deployment], broker: RedisServer
) -> None:
    deployment = make_deployment(broker_url=broker.url, **QUICK)
    worker = deployment.worker()
    with (
        deployment.client() as client,
        Celery("client", broker=broker.url) as app,
        deployment.running(worker),
        deployment.running(deployment.beat()),
    ):
        chains = fail(client, CHAINS, times=1)
        for _ in range(4):
            for _ in range(MANY):
                others = {"deliveries": [[str(uuid.uuid4()), 2]]}
                app.send_task(DELIVER, kwargs=others, countdown=MAX_COUNTDOWN, queue=CALLBACKS_QUEUE)
            wait_until_held(deployment, broker, MANY)
            mark = len(worker.logs())
            broker.kill()
            broker.start()
            deployment.eventually(lambda mark=mark: "Connected to redis" in worker.logs()[mark:], "the worker's return")
        assert_took_effect_once(deployment, chains, calls=2)
        assert worker.status == "running", worker.tail()


def test_a_redis_that_forgets_everything_loses_no_retry(
    make_deployment: Callable[..., Deployment], broker: RedisServer
) -> None:
    deployment = make_deployment(broker_url=broker.url, **QUICK)
    worker = deployment.worker()
    with deployment.client() as client, deployment.running(worker), deployment.running(deployment.beat()):
        chains = fail(client, CHAINS, times=2)
        wait_until_held(deployment, broker, HELD)
        broker.clear()
        wait_until_held(deployment, broker, HELD)
        broker.clear()
        broker.stop()
        broker.start()
        assert_took_effect_once(deployment, chains, calls=3)
        assert worker.status == "running", worker.tail()


def test_a_worker_that_holds_retries_outlives_the_end_of_its_rabbitmq(
    make_deployment: Callable[..., Deployment],
) -> None:
    with running(RabbitMqServer) as broker:
        deployment = make_deployment(broker_url=broker.url, **QUICK)
        worker = deployment.worker()
        with deployment.client() as client, deployment.running(worker), deployment.running(deployment.beat()):
            chains = fail(client, CHAINS, times=1)
            deployment.eventually(lambda: worker.logs().count("retry: Retry in") >= HELD, f"{HELD} retries")
            broker.kill()
            broker.start()
            assert_took_effect_once(deployment, chains, calls=2)
            assert worker.status == "running", worker.tail()
