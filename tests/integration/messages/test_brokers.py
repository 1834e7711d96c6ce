"""The same promises on both brokers: what is published, what is counted, and what a broker that fails cannot break."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from celery import Celery
from kombu import Exchange, Queue, pools

from dispatcher import DONE, NEW, Dispatcher, EnqueueNotPublished, RetryPolicy, ServiceUnavailable, Settings
from dispatcher.messages.queues import QUEUES
from tests.conftest import running
from tests.integration import shop
from tests.servers import RabbitMqServer, RedisServer, wait_until

pytestmark = pytest.mark.integration

OWN_QUEUE = "the shop's own"
WITHIN_SECONDS = 10

CONFIG = shop.cart({NEW: [shop.Remind], "reminded": []}, callback=shop.Sink())


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One kind of database: what differs here is the broker."""
    return sqlite_url


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of broker in turn."""
    kind: str = request.param
    return kind


@pytest.fixture
def broker_url(broker_kind: str, redis_url: str, request: pytest.FixtureRequest) -> str:
    """The URL of a broker without any message."""
    if broker_kind == "redis":
        return redis_url.removesuffix("/0") + "/1"
    server: RabbitMqServer = request.getfixturevalue("empty_rabbitmq")
    return server.url


@pytest.fixture
def empty_rabbitmq(rabbitmq_server: RabbitMqServer) -> Iterator[RabbitMqServer]:
    """The run's RabbitMQ, without any of our queues before and after the test."""
    # kombu keeps connections, and what was declared on them, for the process.
    pools.reset()
    rabbitmq_server.delete_queues([*QUEUES, OWN_QUEUE])
    yield rabbitmq_server
    pools.reset()
    rabbitmq_server.delete_queues([*QUEUES, OWN_QUEUE])


@pytest.fixture
def own_broker(broker_kind: str) -> Iterator[RedisServer | RabbitMqServer]:
    """A broker that the test may stop."""
    make: Callable[[], RedisServer | RabbitMqServer] = {"redis": RedisServer, "rabbitmq": RabbitMqServer}[broker_kind]
    with running(make) as server:
        yield server


def url_at(broker_kind: str, port: int) -> str:
    """The URL of a broker of that kind, with credentials, on a port of this machine."""
    return {"redis": f"redis://user:s3cret@127.0.0.1:{port}/0", "rabbitmq": f"amqp://user:s3cret@127.0.0.1:{port}//"}[
        broker_kind
    ]


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for one in kept:
                one.close()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail unless the block ends in time."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


# --- published -------------------------------------------------------------------------------------------------------


def test_an_enqueue_publishes_one_message_of_ids(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)

    task_id = dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})

    (chain,) = dispatcher.find_chains()
    (message,) = shop.take_messages(broker_url, shop.REQUESTS)
    assert (message.id, message.task, message.kwargs) == (
        task_id,
        "dispatcher.execute_chain",
        {"chain_ids": [chain.id]},
    )


def test_a_sweep_publishes_each_due_chain_once_and_its_plan_is_delivered(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    ids = [shop.new_chain(dispatcher, number).id for number in range(3)]

    assert dispatcher.sweep()["enqueued"] == 3
    assert dispatcher.sweep()["already_queued"] == 3

    messages = shop.take_messages(broker_url, shop.CHAINS)
    assert sorted(message.kwargs["chain_ids"][0] for message in messages) == ids
    dispatcher.execute_chains(ids[:1])
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    ((delivery_id, number),) = message.kwargs["deliveries"]
    assert message.task == "dispatcher.deliver_callback"
    assert shop.attempt(dispatcher, delivery_id, number).outcome == "delivered"
    assert dispatcher.chain(ids[0]).state == "reminded"


def test_a_chain_type_s_own_queue_is_made_with_its_first_message(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), queue=OWN_QUEUE))
    chain = shop.new_chain(dispatcher)

    assert dispatcher.sweep()["enqueued"] == 1

    (message,) = shop.take_messages(broker_url, OWN_QUEUE)
    assert message.kwargs == {"chain_ids": [chain.id]}
    assert shop.queue_length(broker_url, shop.CHAINS) == 0


def test_a_queue_on_a_topic_exchange_gets_its_first_message(make_dispatcher: shop.Make, broker_url: str) -> None:
    """Before any worker has declared it: on Redis, too, such a queue is found through its binding only."""
    app = Celery("shop", broker=broker_url, set_as_current=False)
    app.conf.task_queues = [Queue("slow", Exchange("tasks", type="topic"), routing_key="slow.#")]
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), queue="slow"), celery_app=app)
    shop.new_chain(dispatcher)

    assert dispatcher.sweep()["enqueued"] == 1
    assert len(shop.take_messages(broker_url, "slow")) == 1


def test_batches_arrive_whole(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, chains_per_task=7, deliveries_per_task=10)
    ids = [shop.new_chain(dispatcher, number).id for number in range(250)]

    assert dispatcher.sweep()["enqueued"] == 250
    messages = shop.take_messages(broker_url, shop.CHAINS)
    assert len(messages) == 36
    assert sorted(one for message in messages for one in message.kwargs["chain_ids"]) == ids

    dispatcher.execute_chains(ids)
    owed = [pair for message in shop.take_messages(broker_url, shop.CALLBACKS) for pair in message.kwargs["deliveries"]]
    assert len({delivery_id for delivery_id, _ in owed}) == len(owed) == 250


def test_a_lost_delivery_message_is_relayed(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    shop.take_messages(broker_url, shop.CALLBACKS)
    assert dispatcher.relay()["relayed"] == 0, "not overdue yet"

    shop.wait_over(dispatcher, delivery)

    assert dispatcher.relay()["relayed"] == 1
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert message.kwargs == {"deliveries": [[delivery.id, 1]]}


# --- counted ---------------------------------------------------------------------------------------------------------


def test_a_queue_that_does_not_exist_yet_is_empty(make_dispatcher: shop.Make, broker_url: str) -> None:
    """RabbitMQ closes the channel of whoever asks for one; the publisher goes on all the same."""
    dispatcher = make_dispatcher(CONFIG)
    shop.new_chain(dispatcher)

    assert dispatcher.sweep()["due"] == 1
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}
    assert shop.queue_length(broker_url, shop.CHAINS) == 1


def test_a_sweep_adds_nothing_to_a_full_queue(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, max_backlog=2)
    for number in range(4):
        shop.new_chain(dispatcher, number)

    first = dispatcher.sweep()
    assert (first["enqueued"], first["held_back"]) == (2, [shop.CHAIN_TYPE])
    assert dispatcher.sweep()["enqueued"] == 0
    assert len(shop.take_messages(broker_url, shop.CHAINS)) == 2

    assert dispatcher.sweep()["enqueued"] == 2


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_sweep_changes_no_row(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)
    before = shop.dump_rows(dispatcher)

    assert dispatcher.sweep(dry_run=True)["dry_run"] is True

    assert shop.dump_rows(dispatcher) == before
    (message,) = shop.take_messages(broker_url, shop.CHAINS)
    assert message.kwargs == {"chain_ids": [chain.id], "dry_run": True}


# --- away ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broker", ["refuses", "is silent"])
def test_an_enqueue_without_broker_fails_in_time_and_its_request_is_written(
    make_dispatcher: shop.Make, broker_kind: str, broker: str
) -> None:
    with silent_port() as silent:
        url = url_at(broker_kind, 1 if broker == "refuses" else silent)
        dispatcher = make_dispatcher(shop.cart({NEW: [shop.OnRequest]}), broker_url=url, connect_seconds=2)

        with within(WITHIN_SECONDS), pytest.raises(EnqueueNotPublished) as caught:
            dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})
        with within(WITHIN_SECONDS):
            assert dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 2}, best_effort=True) is None
        with within(WITHIN_SECONDS), pytest.raises(ServiceUnavailable) as unavailable:
            dispatcher.check()

    (chain,) = dispatcher.find_chains()
    assert (caught.value.chain_id, caught.value.written) == (chain.id, True)
    row = shop.row_of(dispatcher, chain.id)
    assert row.request["context"] == {"a": 2} and row.due_at is not None
    assert "s3cret" not in f"{caught.value!r} {unavailable.value!r} {unavailable.value}"


def test_nothing_is_lost_while_the_broker_is_away(
    make_dispatcher: shop.Make, own_broker: RedisServer | RabbitMqServer
) -> None:
    """With connections that were open before it went, and are of no use any more."""
    retries = shop.transition("Retries", "there", retry=RetryPolicy(base_seconds=0))
    dispatcher = make_dispatcher(
        shop.cart({NEW: [retries], "there": []}, callback=shop.Sink()), broker_url=own_broker.url
    )
    asked, overdue, swept = (shop.new_chain(dispatcher, number) for number in range(3))
    delivery = shop.planned(dispatcher, overdue)
    dispatcher.check()

    own_broker.kill()
    with within(WITHIN_SECONDS), pytest.raises(EnqueueNotPublished):
        asked.enqueue(initial_context={"a": 1})
    with within(WITHIN_SECONDS):
        assert shop.planned(dispatcher, swept).status == "pending", "planned, and owed"
    shop.wait_over(dispatcher, delivery)
    with within(WITHIN_SECONDS):
        assert dispatcher.relay()["relayed"] == 0
    with within(WITHIN_SECONDS), pytest.raises(ServiceUnavailable):
        dispatcher.sweep()

    own_broker.start()
    shop.wait_over(dispatcher, shop.delivery_of(dispatcher, swept))
    shop.wait_over(dispatcher, delivery)
    assert dispatcher.sweep()["enqueued"] == 1
    assert dispatcher.relay()["relayed"] == 2
    assert shop.take_messages(own_broker.url, shop.CHAINS)[0].kwargs == {"chain_ids": [asked.id]}
    assert len(shop.take_messages(own_broker.url, shop.CALLBACKS)) >= 2


def test_a_broker_that_falls_silent_under_an_open_connection_is_given_up_in_time(
    make_dispatcher: shop.Make, own_broker: RedisServer | RabbitMqServer
) -> None:
    dispatcher = make_dispatcher(CONFIG, broker_url=own_broker.url, connect_seconds=2)
    chain = shop.new_chain(dispatcher)
    assert chain.enqueue() is not None
    assert own_broker.process is not None

    own_broker.process.send_signal(signal.SIGSTOP)
    try:
        with within(WITHIN_SECONDS), pytest.raises(EnqueueNotPublished):
            chain.enqueue(initial_context={"a": 1})
        with within(WITHIN_SECONDS), pytest.raises(ServiceUnavailable):
            dispatcher.sweep()
    finally:
        own_broker.process.send_signal(signal.SIGCONT)

    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}
    wait_until(own_broker.is_ready, seconds=WITHIN_SECONDS, what="the broker answers again")
    assert chain.enqueue() is not None


@pytest.mark.parametrize("lock_server", ["refuses", "is silent"])
def test_evaluation_goes_on_without_the_lock_server(
    make_dispatcher: shop.Make, broker_url: str, lock_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = shop.Sink()
    with silent_port() as silent:
        url = url_at("redis", 1 if lock_server == "refuses" else silent)
        dispatcher = make_dispatcher(
            shop.cart({NEW: [shop.Remind], "reminded": [shop.transition("Finish", DONE)], DONE: []}, callback=sink),
            redis_url=url,
            clock=shop.Clock(),
        )
        chain = shop.new_chain(dispatcher)

        with within(WITHIN_SECONDS):
            assert dispatcher.sweep()["enqueued"] == 1
            delivery = shop.planned(dispatcher, chain)
            assert shop.attempt(dispatcher, delivery).outcome == "delivered"
            shop.change_chain(dispatcher, chain.id, next_update_at=None)
            (result,) = dispatcher.execute_chains([chain.id])

    assert (result.outcome, result.state) == ("moved", DONE)
    assert len(sink) == 1
    assert "without locks" in caplog.text and "s3cret" not in caplog.text


@pytest.mark.parametrize("declared_before", [True, False])
def test_a_queue_that_refuses_messages_is_a_broker_that_is_away(
    sqlite_url: str, empty_rabbitmq: RabbitMqServer, declared_before: bool
) -> None:
    """RabbitMQ alone says no to a message, or to the queue that this version wants to declare."""
    settings = Settings(connect_seconds=2)
    dispatcher = Dispatcher(CONFIG, database_url=sqlite_url, broker_url=empty_rabbitmq.url, settings=settings)
    chain = shop.new_chain(dispatcher)
    if declared_before:  # once for each connection
        assert chain.enqueue() is not None
        assert dispatcher.sweep()["enqueued"] == 1
        empty_rabbitmq.delete_queues([shop.REQUESTS, shop.CHAINS])
    for queue in (shop.REQUESTS, shop.CHAINS):
        empty_rabbitmq.declare_full_queue(queue)

    with within(WITHIN_SECONDS), pytest.raises(EnqueueNotPublished):
        chain.enqueue(initial_context={"a": 1})
    shop.new_chain(dispatcher, 2)
    with within(WITHIN_SECONDS), pytest.raises(ServiceUnavailable):
        dispatcher.sweep()

    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}
