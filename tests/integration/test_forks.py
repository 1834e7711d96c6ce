"""Forks never share a connection: neither with their parent nor with each other, however they were made."""

import gc
import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import pools
from sqlalchemy import func, select

from dispatcher import NEW, Dispatcher, Settings
from dispatcher.messages.queues import QUEUES, celery_settings
from tests.integration import shop
from tests.servers import RabbitMqServer

pytestmark = pytest.mark.integration

CHILDREN = 3
ROUNDS = 30
WAIT_SECONDS = 60
CONFIG = shop.cart({NEW: [shop.transition("Remind", "reminded")], "reminded": []}, callback=shop.Sink())


DEPLOYMENTS = [
    ("postgres_url", "redis", "its own app"),
    ("mariadb_url", "rabbitmq", "its own app"),
    ("postgres_url", "rabbitmq", "an application's app"),
    ("mariadb_url", "redis", "an application's app"),
]


@pytest.fixture(params=DEPLOYMENTS, ids="-".join)
def dispatcher(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Dispatcher]:
    """A dispatcher on each kind of server, publishing with either kind of Celery app."""
    database, broker, kind = request.param
    broker_url = redis_url.removesuffix("/0") + "/1"
    pools.reset()  # kombu keeps connections for the process
    if broker == "rabbitmq":
        server: RabbitMqServer = request.getfixturevalue("rabbitmq_server")
        server.delete_queues(QUEUES)
        broker_url = server.url
    settings, app = Settings(connect_seconds=4), None
    if kind != "its own app":
        app = Celery("shop", set_as_current=False)
        app.conf.update(celery_settings(settings, broker_url=broker_url))
    urls = {"database_url": request.getfixturevalue(database), "redis_url": redis_url, "broker_url": broker_url}
    with Dispatcher(CONFIG, settings=settings, celery_app=app, **urls) as made:
        yield made
    pools.reset()


def fork(work: Callable[[], Any]) -> int:
    """The process id of a child made as preloading web servers make theirs."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def fork_by_multiprocessing(work: Callable[[], Any]) -> int:
    """The process id of a child made by `multiprocessing`."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    assert process.pid is not None
    return process.pid


FORKS = [fork, fork_by_multiprocessing]


class Children:
    """Children, what they answered, and a gate that they begin at together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pids: list[int] = []
        self.gate = os.pipe()

    def make(self, by: Callable[[Callable[[], Any]], int], work: Callable[[int], Any]) -> None:
        """One more child; it answers `work(number)`."""
        number = len(self.pids)

        def answer() -> None:
            os.close(self.gate[1])
            os.read(self.gate[0], 1)  # until every writer has closed it
            try:
                said = {"result": work(number)}
            except BaseException:  # noqa: BLE001 - the parent shows it
                said = {"error": traceback.format_exc()}
            (self.directory / f"{number}.json").write_text(json.dumps(said))

        self.pids.append(by(answer))

    def begin(self) -> None:
        """Let the children begin."""
        os.close(self.gate[1])
        os.close(self.gate[0])

    def answers(self) -> list[Any]:
        """What the children answered, after their end."""
        for pid in self.pids:
            os.waitpid(pid, 0)
        said = [json.loads((self.directory / f"{number}.json").read_text()) for number in range(len(self.pids))]
        for one in said:
            assert "error" not in one, one["error"]
        return [one["result"] for one in said]


@pytest.fixture
def children(tmp_path: Path) -> Children:
    return Children(tmp_path)


def uses_rabbitmq(dispatcher: Dispatcher) -> bool:
    return (dispatcher.broker_url or "").startswith("amqp")


def unchanged(before: dict[str, int], now: dict[str, int], by: Callable[..., int], dispatcher: Dispatcher) -> bool:
    """Whether these are the same connections, as far as it is ours to keep them.

    In `multiprocessing`'s children kombu itself shuts down the AMQP sockets of the pools that it inherited, for both
    sides; the parent connects anew when it sends next.
    """
    if by is fork_by_multiprocessing and uses_rabbitmq(dispatcher):
        return {**before, "broker": 0} == {**now, "broker": 0}
    return before == now


# --- what a connection is known by, at the server --------------------------------------------------------------------


def ids_of(dispatcher: Dispatcher) -> dict[str, int]:
    """The connections that this process uses now, as the servers number them (RabbitMQ: by the client's port)."""
    with dispatcher.database.read() as connection:
        ask = func.pg_backend_pid if dispatcher.database.dialect == "postgresql" else func.connection_id
        database = connection.execute(select(ask())).scalar_one()
    locks = dispatcher._services.locks._client
    assert locks is not None
    with producer(dispatcher) as used:
        if uses_rabbitmq(dispatcher):
            broker = used.connection.connection.sock.getsockname()[1]
        else:
            broker = used.channel.client.client_id()
    return {"database": database, "locks": locks.client_id(), "broker": broker}


@contextmanager
def producer(dispatcher: Dispatcher) -> Iterator[Any]:
    with dispatcher._services.publisher.app.producer_pool.acquire(block=True, timeout=5) as used:
        used.connection.default_channel  # noqa: B018 - connects
        yield used


def work_of(dispatcher: Dispatcher, number: int) -> dict[str, Any]:
    """Questions whose answers only this process may get; the connections, and the tasks that it sent."""
    chain = shop.new_chain(dispatcher, number)
    tasks = []
    for turn in range(ROUNDS):
        assert dispatcher.chain(chain.id or 0).resources == (("online_booking", f"b{number}"),)
        held = dispatcher._services.locks.acquire([number * ROUNDS + turn + 1])
        assert held.token is not None and held.held == (number * ROUNDS + turn + 1,), "no answer, or another's"
        tasks.append(dispatcher.enqueue(shop.CHAIN_TYPE, chain.resources, initial_context={"turn": turn}))
    return {"ids": ids_of(dispatcher), "tasks": tasks, "chain": chain.id}


@pytest.mark.parametrize("by", FORKS)
def test_each_process_has_connections_and_answers_of_its_own(
    dispatcher: Dispatcher, children: Children, by: Callable[[Callable[[], Any]], int]
) -> None:
    work_of(dispatcher, CHILDREN)
    shop.take_messages(dispatcher.broker_url or "", QUEUES[0])
    before = ids_of(dispatcher)

    for _ in range(CHILDREN):
        children.make(by, lambda number: work_of(dispatcher, number))
    children.begin()
    results = [work_of(dispatcher, CHILDREN + 1), *children.answers()]

    assert unchanged(before, ids_of(dispatcher), by, dispatcher)
    for service in before:
        ids = [result["ids"][service] for result in results]
        assert len(set(ids)) == CHILDREN + 1, service
    sent = sorted((task, result["chain"]) for result in results for task in result["tasks"])
    messages = shop.take_messages(dispatcher.broker_url or "", QUEUES[0])
    assert sorted((message.id, message.kwargs["chain_ids"][0]) for message in messages) == sent


@pytest.mark.parametrize("by", FORKS)
@pytest.mark.parametrize("used", [False, True])
def test_a_child_that_closes_everything_closes_nothing_of_its_parent_s(
    dispatcher: Dispatcher, children: Children, by: Callable[[Callable[[], Any]], int], used: bool
) -> None:
    before = ids_of(dispatcher)

    def close(number: int) -> None:
        if used:
            work_of(dispatcher, number)
        dispatcher.close()
        gc.collect()

    children.make(by, close)
    children.begin()
    children.answers()

    assert unchanged(before, ids_of(dispatcher), by, dispatcher)
    assert len(work_of(dispatcher, CHILDREN)["tasks"]) == ROUNDS
    assert unchanged(before, ids_of(dispatcher), by, dispatcher)


def test_a_child_forked_inside_a_transaction_leaves_it_to_its_parent(
    dispatcher: Dispatcher, children: Children
) -> None:
    chain = shop.new_chain(dispatcher)

    def write(connection: Any) -> Any:
        first = connection.execute(select(func.now())).scalar_one()
        children.make(fork, lambda number: work_of(dispatcher, number + 1))
        children.begin()
        children.answers()
        assert connection.execute(select(func.now())).scalar_one() >= first
        return chain.id

    assert dispatcher.database.write(write) == chain.id
    assert len(dispatcher.find_chains()) == 2
