"""Sessions that the server ends, and servers that refuse writes: what callers see, and that nothing of it stays."""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from dispatcher import DONE, NEW, Dispatcher
from dispatcher.domain.records import Owed
from dispatcher.errors import ServiceRefused, ServiceUnavailable
from dispatcher.storage.database import Database
from dispatcher.storage.models import CHAIN
from tests.conftest import running
from tests.integration import shop
from tests.integration.conftest import DispatcherFactory
from tests.servers import PostgresServer, wait_until

pytestmark = pytest.mark.integration

_POOL = 15
"""Connections that a process may have: SQLAlchemy's 5, and 10 more."""

Killer = Callable[[], int]

CONFIG = shop.cart({NEW: [shop.Remind], shop.Remind.final_state: [], DONE: []}, callback=shop.Sink())


@pytest.fixture(params=["postgresql", "mariadb"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a migrated database of the test's own, on each server in turn."""
    url: str = request.getfixturevalue({"postgresql": "postgres_url", "mariadb": "mariadb_url"}[request.param])
    return url


@pytest.fixture
def operator(database_url: str) -> Iterator[Engine]:
    """Another session, which ends those of the library."""
    engine = create_engine(database_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


@pytest.fixture
def kill_all(operator: Engine) -> Killer:
    """Ends every session on the test's database, and waits until they are gone; gives their number."""
    sessions, kill = (
        ("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
         "SELECT pg_terminate_backend(:id)")
        if operator.dialect.name == "postgresql"
        else ("SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()",
              "KILL :id")
    )  # fmt: skip

    def end() -> int:
        with operator.connect() as connection:
            found = list(connection.execute(text(sessions)).scalars())
            for number in found:
                with suppress(DBAPIError):  # it ended by itself
                    connection.execute(text(kill), {"id": number})
            wait_until(
                lambda: set(found).isdisjoint(connection.execute(text(sessions)).scalars()),
                seconds=10,
                what="the sessions are gone",
            )
        return len(found)

    return end


def planned(dispatcher: Dispatcher, number: int) -> Owed:
    (result,) = dispatcher.execute_chains([shop.new_chain(dispatcher, number).id])
    assert result.delivery_id is not None
    return Owed(result.delivery_id, 1)


CALLS: dict[str, Callable[[Dispatcher], Any]] = {
    "get": lambda one: shop.new_chain(one, 1),
    "create": lambda one: shop.new_chain(one, 100),
    "create many": lambda one: list(one.bulk_get_or_create(shop.CHAIN_TYPE, [[("a", str(n))] for n in range(3)])),
    "read": lambda one: one.chain(1),
    "find": lambda one: one.find_chains(chain_type=shop.CHAIN_TYPE),
    "find deliveries": lambda one: one.find_deliveries(),
    "count": lambda one: one.stats(),
    "events": lambda one: one.chain(1).events,
    "execute": lambda one: one.execute_chains([2]),
    "execute here": lambda one: shop.new_chain(one, 3).execute(),
    "deliver": lambda one: one.deliver([Owed(one.find_deliveries(limit=1)[0].id, 1)]),
    "enqueue": lambda one: one.enqueue(shop.CHAIN_TYPE, [("a", "b")], best_effort=True),
    "sweep": lambda one: one.sweep(),
    "tick": lambda one: one.sweep(tick=True),
    "relay": lambda one: one.relay(),
    "disable": lambda one: one.chain(1).disable(requested_by="me"),
    "examine": lambda one: one.examine(),
    "check": lambda one: one.check(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_after_the_sessions_were_killed_works(
    make_dispatcher: DispatcherFactory, kill_all: Killer, name: str
) -> None:
    dispatcher = make_dispatcher(CONFIG)
    for number in range(1, 5):
        shop.new_chain(dispatcher, number)
    planned(dispatcher, 0)
    assert kill_all() >= 1

    CALLS[name](dispatcher)

    assert dispatcher.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_session_that_is_killed_within_a_read_is_the_librarys_error(database_url: str, kill_all: Killer) -> None:
    database = Database(database_url)

    def read() -> None:
        with database.read() as connection:
            connection.execute(text("SELECT 1"))
            kill_all()
            connection.execute(text("SELECT 1"))

    with pytest.raises(ServiceUnavailable, match=r"^cannot reach the database at [^\n]+$"):
        read()

    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    database.check()
    database.dispose()


def test_a_session_that_is_killed_before_its_read_ends_is_no_error(database_url: str, kill_all: Killer) -> None:
    database = Database(database_url)
    for _ in range(_POOL + 1):
        with database.read() as connection:
            connection.execute(text("SELECT 1"))
            kill_all()

    database.check()
    database.dispose()


def test_a_write_whose_session_is_killed_is_done_again_on_another(database_url: str, kill_all: Killer) -> None:
    database = Database(database_url)
    kills = []

    def work(connection: Connection) -> int:
        connection.execute(text("INSERT INTO chain_dispatcher_tick (name, last_at) VALUES ('a', '2024-01-01')"))
        if not kills:
            kills.append(kill_all())
        return connection.execute(text("SELECT count(*) FROM chain_dispatcher_tick")).scalar_one()

    assert database.write(work) == 1
    assert len(kills) == 1
    database.dispose()


def test_a_write_whose_sessions_are_always_killed_is_given_up(database_url: str, kill_all: Killer) -> None:
    database = Database(database_url)
    kills = []

    def work(connection: Connection) -> None:
        connection.execute(CHAIN.select())
        kills.append(kill_all())
        connection.execute(CHAIN.select())

    with pytest.raises(ServiceUnavailable) as caught:
        database.write(work)

    assert caught.value.written is False
    assert len(kills) == 2
    database.dispose()


def test_no_slot_of_the_pool_is_lost_by_a_hundred_kills(make_dispatcher: DispatcherFactory, kill_all: Killer) -> None:
    dispatcher = make_dispatcher(CONFIG)
    database, ended, wrong = dispatcher.database, threading.Event(), []

    def work(seed: int) -> int:
        random_, done = random.Random(seed), 0
        while not ended.is_set():
            try:
                match random_.randrange(4):
                    case 0:
                        dispatcher.find_chains()
                    case 1:
                        shop.new_chain(dispatcher, random_.randrange(10**9))
                    case 2:
                        dispatcher.sweep(tick=True)
                    case _:
                        database.write(lambda connection: connection.execute(CHAIN.select().limit(1)).all())
            except ServiceUnavailable as error:
                if "no free connection" in str(error):
                    wrong.append(error)
            except Exception as error:  # noqa: BLE001 - everything else is what must not be seen
                wrong.append(error)
            else:
                done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work, seed) for seed in range(4)]
        killed = 0
        while killed < 100 and not wrong:
            killed += kill_all()
        ended.set()
        done = sum(worker.result(30) for worker in workers)

    assert not wrong, wrong
    assert done > 0
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    with ThreadPoolExecutor(_POOL) as pool:
        together = threading.Barrier(_POOL)

        def hold(_: int) -> bool:
            with database.read() as connection:
                connection.execute(text("SELECT 1"))
                together.wait(20)
            return True

        assert all(pool.map(hold, range(_POOL)))


# --- PostgreSQL's failover -------------------------------------------------------------------------------------------


@pytest.fixture
def standby(postgres_server: PostgresServer, postgres_url: str) -> Callable[[bool], None]:
    """Makes new sessions of the database read-only, as on a primary that has become a standby, or writable again."""

    def switch(on: bool) -> None:
        name = sql.Identifier(postgres_url.rpartition("/")[2])
        change = "ALTER DATABASE {} SET default_transaction_read_only = on" if on else "ALTER DATABASE {} RESET ALL"
        with postgres_server.connect() as admin:
            admin.execute(sql.SQL(change).format(name))

    return switch


@pytest.fixture
def on_postgresql(postgres_url: str, redis_url: str, broker_url: str) -> Iterator[DispatcherFactory]:
    factory = DispatcherFactory(database_url=postgres_url, redis_url=redis_url, broker_url=broker_url)
    yield factory
    for dispatcher in factory.made:
        dispatcher.close()


def fill(database: Database, connections: int) -> None:
    """Leave so many open connections in the pool."""
    together = threading.Barrier(connections)

    def hold(_: int) -> None:
        with database.read():
            together.wait(20)

    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(hold, range(connections)))


def test_read_only_connections_are_left_at_once(
    on_postgresql: DispatcherFactory, standby: Callable[[bool], None]
) -> None:
    dispatcher = on_postgresql(CONFIG)
    ids = [shop.new_chain(dispatcher, number).id for number in range(6)]
    dispatcher.database.dispose()
    standby(True)
    fill(dispatcher.database, 5)
    standby(False)

    # Each of these is the first to meet a read-only connection in its own way: one statement, and a transaction.
    (result,) = dispatcher.execute_chains(ids[:1])
    assert (result.outcome, result.delivery_id is not None) == ("planned", True)
    assert result.delivery_id is not None
    (delivered,) = dispatcher.deliver([Owed(result.delivery_id, 1)])
    assert delivered.outcome == "delivered"

    standby(True)
    dispatcher.database.dispose()
    fill(dispatcher.database, 5)
    standby(False)
    dispatcher.chain(ids[1]).disable(requested_by="me")
    shop.new_chain(dispatcher, 99)


def test_a_database_that_stays_read_only_refuses_and_nothing_is_written(
    on_postgresql: DispatcherFactory, standby: Callable[[bool], None]
) -> None:
    dispatcher = on_postgresql(CONFIG)
    chain = shop.new_chain(dispatcher)
    standby(True)
    dispatcher.database.dispose()

    for call in (
        lambda: shop.new_chain(dispatcher, 1),
        chain.enqueue,
        lambda: dispatcher.execute_chains([chain.id]),
        lambda: chain.disable(requested_by="me"),
    ):
        with pytest.raises(ServiceRefused, match=r"^the database at \S+ refuses: [^\n]*read-only[^\n]*$") as caught:
            call()
        assert caught.value.written is False
    assert dispatcher.chain(chain.id).state == NEW, "it can be read"

    standby(False)
    dispatcher.execute_chains([chain.id])


def test_connections_that_a_stopping_server_closes_are_left_at_once(redis_url: str, broker_url: str) -> None:
    from dispatcher.storage.migrations.runner import upgrade

    with running(PostgresServer) as server:
        url = server.create_database()
        dispatcher = DispatcherFactory(database_url=url, redis_url=redis_url, broker_url=broker_url)(CONFIG)
        upgrade(dispatcher.database)
        ids = [shop.new_chain(dispatcher, number).id for number in range(3)]
        fill(dispatcher.database, 5)
        server.stop()
        with pytest.raises(ServiceUnavailable, match="cannot reach"):
            dispatcher.execute_chains(ids)
        server.start()

        assert {result.outcome for result in dispatcher.execute_chains(ids)} == {"planned"}
        dispatcher.close()
