"""The same promises on both brokers: what is published, what is counted, and what a broker that fails cannot break."""

import logging
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
from tests.integration.transitions import (
    BOOKING,
    CHAIN_TYPE,
    Clock,
    Sink,
    attempt,
    cart,
    change_chain,
    delivery_of,
    dump_rows,
    new_chain,
    planned,
    queue_length,
    row_of,
    take_messages,
    transition,
    wait_over,
)
from tests.servers import RabbitMqServer, RedisServer, wait_until

pytestmark = pytest.mark.integration

Make = Callable[..., Dispatcher]

REQUESTS, CHAINS, CALLBACKS, _ = QUEUES
OWN_QUEUE = "the shop's own"
WITHIN_SECONDS = 10

Remind = transition("Remind", "reminded")
OnRequest = transition("OnRequest", "asked", valid=False, recheck_seconds=None)
CONFIG = cart({NEW: [Remind], "reminded": []}, callback=Sink())


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


def test_an_enqueue_publishes_one_message_of_ids(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)

    task_id = dispatcher.enqueue(CHAIN_TYPE, BOOKING, initial_context={"a": 1})

    (chain,) = dispatcher.find_chains()
    (message,) = take_messages(broker_url, REQUESTS)
    assert (message.id, message.task, message.kwargs) == (
        task_id,
        "dispatcher.execute_chain",
        {"chain_ids": [chain.id]},
    )


def test_a_sweep_publishes_each_due_chain_once_and_its_plan_is_delivered(
    make_dispatcher: Make, broker_url: str
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    ids = [new_chain(dispatcher, number).id for number in range(3)]

    assert dispatcher.sweep()["enqueued"] == 3
    assert dispatcher.sweep()["already_queued"] == 3

    messages = take_messages(broker_url, CHAINS)
    assert sorted(message.kwargs["chain_ids"][0] for message in messages) == ids
    dispatcher.execute_chains(ids[:1])
    (message,) = take_messages(broker_url, CALLBACKS)
    ((delivery_id, number),) = message.kwargs["deliveries"]
    assert message.task == "dispatcher.deliver_callback"
    assert attempt(dispatcher, delivery_id, number).outcome == "delivered"
    assert dispatcher.chain(ids[0]).state == "reminded"


def test_a_chain_type_s_own_queue_is_made_with_its_first_message(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink(), queue=OWN_QUEUE))
    chain = new_chain(dispatcher)

    assert dispatcher.sweep()["enqueued"] == 1

    (message,) = take_messages(broker_url, OWN_QUEUE)
    assert message.kwargs == {"chain_ids": [chain.id]}
    assert queue_length(broker_url, CHAINS) == 0


def test_a_queue_on_a_topic_exchange_gets_its_first_message(make_dispatcher: Make, broker_url: str) -> None:
    """Before any worker has declared it: on Redis, too, such a queue is found through its binding only."""
    app = Celery("shop", broker=broker_url, set_as_current=False)
    app.conf.task_queues = [Queue("slow", Exchange("tasks", type="topic"), routing_key="slow.#")]
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callback=Sink(), queue="slow"), celery_app=app)
    new_chain(dispatcher)

    assert dispatcher.sweep()["enqueued"] == 1
    assert len(take_messages(broker_url, "slow")) == 1


def test_batches_arrive_whole(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, chains_per_task=7, deliveries_per_task=10)
    ids = [new_chain(dispatcher, number).id for number in range(250)]

    assert dispatcher.sweep()["enqueued"] == 250
    messages = take_messages(broker_url, CHAINS)
    assert len(messages) == 36
    assert sorted(one for message in messages for one in message.kwargs["chain_ids"]) == ids

    dispatcher.execute_chains(ids)
    owed = [pair for message in take_messages(broker_url, CALLBACKS) for pair in message.kwargs["deliveries"]]
    assert len({delivery_id for delivery_id, _ in owed}) == len(owed) == 250


def test_a_lost_delivery_message_is_relayed(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)
    delivery = planned(dispatcher, new_chain(dispatcher))
    take_messages(broker_url, CALLBACKS)
    assert dispatcher.relay()["relayed"] == 0, "not overdue yet"

    wait_over(dispatcher, delivery)

    assert dispatcher.relay()["relayed"] == 1
    (message,) = take_messages(broker_url, CALLBACKS)
    assert message.kwargs == {"deliveries": [[delivery.id, 1]]}


# --- counted ---------------------------------------------------------------------------------------------------------


def test_a_queue_that_does_not_exist_yet_is_empty(make_dispatcher: Make, broker_url: str) -> None:
    """RabbitMQ closes the channel of whoever asks for one; the publisher goes on all the same."""
    dispatcher = make_dispatcher(CONFIG)
    new_chain(dispatcher)

    assert dispatcher.sweep()["due"] == 1
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}
    assert queue_length(broker_url, CHAINS) == 1


def test_a_sweep_adds_nothing_to_a_full_queue(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, max_backlog=2)
    for number in range(4):
        new_chain(dispatcher, number)

    first = dispatcher.sweep()
    assert (first["enqueued"], first["held_back"]) == (2, [CHAIN_TYPE])
    assert dispatcher.sweep()["enqueued"] == 0
    assert len(take_messages(broker_url, CHAINS)) == 2

    assert dispatcher.sweep()["enqueued"] == 2


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_publishes_what_is_to_be_planned_and_writes_nothing(
    make_dispatcher: Make, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    before = dump_rows(dispatcher)

    dispatcher.enqueue(CHAIN_TYPE, BOOKING, initial_context={"a": 1}, dry_run=True)

    (message,) = take_messages(broker_url, REQUESTS)
    assert message.kwargs["dry_run"] is True and message.kwargs["chain_ids"] == []
    plan = message.kwargs["plan"]
    assert (plan["chain_type"], plan["resources"]) == (CHAIN_TYPE, [list(pair) for pair in BOOKING])
    with caplog.at_level(logging.INFO, "dispatcher.plan"):
        result = dispatcher.plan_chain(
            None, chain_type=plan["chain_type"], resources=plan["resources"], context=plan["context"]
        )
    assert result.outcome == "dry_run" and "planned" in caplog.text
    assert dump_rows(dispatcher) == before


def test_a_dry_run_sweep_changes_no_row(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = new_chain(dispatcher)
    before = dump_rows(dispatcher)

    assert dispatcher.sweep(dry_run=True)["dry_run"] is True

    assert dump_rows(dispatcher) == before
    (message,) = take_messages(broker_url, CHAINS)
    assert message.kwargs == {"chain_ids": [chain.id], "dry_run": True}


# --- away ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broker", ["refuses", "is silent"])
def test_an_enqueue_without_broker_fails_in_time_and_its_request_is_written(
    make_dispatcher: Make, broker_kind: str, broker: str
) -> None:
    with silent_port() as silent:
        url = url_at(broker_kind, 1 if broker == "refuses" else silent)
        dispatcher = make_dispatcher(cart({NEW: [OnRequest]}), broker_url=url, connect_seconds=2)

        with within(WITHIN_SECONDS), pytest.raises(EnqueueNotPublished) as caught:
            dispatcher.enqueue(CHAIN_TYPE, BOOKING, initial_context={"a": 1})
        with within(WITHIN_SECONDS):
            assert dispatcher.enqueue(CHAIN_TYPE, BOOKING, initial_context={"a": 2}, best_effort=True) is None
        with within(WITHIN_SECONDS), pytest.raises(ServiceUnavailable) as unavailable:
            dispatcher.check()

    (chain,) = dispatcher.find_chains()
    assert (caught.value.chain_id, caught.value.written) == (chain.id, True)
    row = row_of(dispatcher, chain.id)
    assert row.request["context"] == {"a": 2} and row.due_at is not None
    assert "s3cret" not in f"{caught.value!r} {unavailable.value!r} {unavailable.value}"


def test_nothing_is_lost_while_the_broker_is_away(
    make_dispatcher: Make, own_broker: RedisServer | RabbitMqServer
) -> None:
    """With connections that were open before it went, and are of no use any more."""
    retries = transition("Retries", "there", retry=RetryPolicy(base_seconds=0))
    dispatcher = make_dispatcher(cart({NEW: [retries], "there": []}, callback=Sink()), broker_url=own_broker.url)
    asked, overdue, swept = (new_chain(dispatcher, number) for number in range(3))
    delivery = planned(dispatcher, overdue)
    dispatcher.check()

    own_broker.kill()
    with within(WITHIN_SECONDS), pytest.raises(EnqueueNotPublished):
        asked.enqueue(initial_context={"a": 1})
    with within(WITHIN_SECONDS):
        assert planned(dispatcher, swept).status == "pending", "planned, and owed"
    wait_over(dispatcher, delivery)
    with within(WITHIN_SECONDS):
        assert dispatcher.relay()["relayed"] == 0
    with within(WITHIN_SECONDS), pytest.raises(ServiceUnavailable):
        dispatcher.sweep()

    own_broker.start()
    wait_over(dispatcher, delivery_of(dispatcher, swept))
    wait_over(dispatcher, delivery)
    assert dispatcher.sweep()["enqueued"] == 1
    assert dispatcher.relay()["relayed"] == 2
    assert take_messages(own_broker.url, CHAINS)[0].kwargs == {"chain_ids": [asked.id]}
    assert len(take_messages(own_broker.url, CALLBACKS)) >= 2


def test_a_broker_that_falls_silent_under_an_open_connection_is_given_up_in_time(
    make_dispatcher: Make, own_broker: RedisServer | RabbitMqServer
) -> None:
    dispatcher = make_dispatcher(CONFIG, broker_url=own_broker.url, connect_seconds=2)
    chain = new_chain(dispatcher)
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

    assert row_of(dispatcher, chain.id).request["context"] == {"a": 1}
    wait_until(own_broker.is_ready, seconds=WITHIN_SECONDS, what="the broker answers again")
    assert chain.enqueue() is not None


@pytest.mark.parametrize("lock_server", ["refuses", "is silent"])
def test_evaluation_goes_on_without_the_lock_server(
    make_dispatcher: Make, broker_url: str, lock_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Sink()
    with silent_port() as silent:
        url = url_at("redis", 1 if lock_server == "refuses" else silent)
        dispatcher = make_dispatcher(
            cart({NEW: [Remind], "reminded": [transition("Finish", DONE)], DONE: []}, callback=sink),
            redis_url=url,
            clock=Clock(),
        )
        chain = new_chain(dispatcher)

        with within(WITHIN_SECONDS):
            assert dispatcher.sweep()["enqueued"] == 1
            delivery = planned(dispatcher, chain)
            assert attempt(dispatcher, delivery).outcome == "delivered"
            change_chain(dispatcher, chain.id, next_update_at=None)
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
    chain = new_chain(dispatcher)
    if declared_before:  # once for each connection
        assert chain.enqueue() is not None
        assert dispatcher.sweep()["enqueued"] == 1
        empty_rabbitmq.delete_queues([REQUESTS, CHAINS])
    for queue in (REQUESTS, CHAINS):
        empty_rabbitmq.declare_full_queue(queue)

    with within(WITHIN_SECONDS), pytest.raises(EnqueueNotPublished):
        chain.enqueue(initial_context={"a": 1})
    new_chain(dispatcher, 2)
    with within(WITHIN_SECONDS), pytest.raises(ServiceUnavailable):
        dispatcher.sweep()

    assert row_of(dispatcher, chain.id).request["context"] == {"a": 1}
