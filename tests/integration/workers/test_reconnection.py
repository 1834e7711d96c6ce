"""A consumer's connection to Redis that breaks while messages are unacknowledged: kombu as it is, and with our step."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace

import pytest
import redis
from celery import Celery
from kombu import Connection, Consumer, Exchange, Queue

import workers
from dispatcher import Dispatcher
from tests.conftest import running
from tests.servers import RedisServer
from workers.reconnection import CloseWhole

MESSAGES = 3


@pytest.fixture
def broker() -> Iterator[RedisServer]:
    """A server of the test's own, because the test stops it."""
    with running(RedisServer) as server:
        yield server


@pytest.fixture
def held(broker: RedisServer) -> Iterator[Connection]:
    """A connection like a worker's: it holds messages that are not acknowledged, and waits for more."""
    connection = Connection(broker.url)
    queue = Queue("held")
    with connection.Producer() as producer:
        for number in range(MESSAGES):
            producer.publish(number, routing_key="held", declare=[queue])
    Consumer(connection, [queue], callbacks=[lambda body, message: None], accept=["json"]).consume()
    commands = Queue("commands", Exchange("commands", type="fanout"), auto_delete=True)
    Consumer(connection.channel(), [commands]).consume()  # as a worker listens to `celery control`
    while len(connection.default_channel.qos._delivered) < MESSAGES:
        connection.drain_events(timeout=5)
    with suppress(TimeoutError):
        connection.drain_events(timeout=0.1)  # leaves a BRPOP without an answer, which is how a worker waits
    assert connection.default_channel._in_poll
    yield connection
    connection.release()


def close_as_celery_does(connection: Connection) -> None:
    """What a Celery consumer does with its connection after an error."""
    connection.collect(socket_timeout=1)
    connection.close()


def cut(broker: RedisServer) -> None:
    """Break all connections to a server that goes on."""
    with redis.Redis(port=broker.port) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def test_kombu_alone_fails_with_an_error_that_ends_the_worker(broker: RedisServer, held: Connection) -> None:
    """If this fails, kombu closes a channel whole by itself: `workers.reconnection` can go."""
    broker.stop()
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'hostname'"):
        close_as_celery_does(held)


@pytest.mark.parametrize("lose", [RedisServer.stop, cut])
def test_a_channel_is_closed_whole_although_its_connection_is_broken(
    broker: RedisServer, held: Connection, lose: Callable[[RedisServer], None]
) -> None:
    channel = held.default_channel
    CloseWhole(None).start(SimpleNamespace(connection=held))
    lose(broker)
    close_as_celery_does(held)
    assert channel.closed


def test_what_was_held_is_put_back_at_once_if_the_server_goes_on(broker: RedisServer, held: Connection) -> None:
    CloseWhole(None).start(SimpleNamespace(connection=held))
    cut(broker)
    close_as_celery_does(held)
    with redis.Redis(port=broker.port) as client:
        assert client.llen("held") == MESSAGES
        assert client.zcard("unacked_index") == 0


def test_a_connection_that_works_is_closed_once(broker: RedisServer, held: Connection) -> None:
    CloseWhole(None).start(SimpleNamespace(connection=held))
    close_as_celery_does(held)
    with redis.Redis(port=broker.port) as client:
        assert client.llen("held") == MESSAGES
        assert client.zcard("unacked_index") == 0


def test_every_app_with_our_tasks_has_the_step() -> None:
    with Celery("theirs", broker="memory://") as app, Dispatcher({"chains": []}, database_url="sqlite://") as ours:
        workers.install(app, ours)
        assert CloseWhole in app.steps["consumer"]
