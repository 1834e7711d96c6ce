"""The library behind PgBouncer in transaction mode, where each transaction may have another session of the server."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import text

from dispatcher import DONE, NEW
from dispatcher.domain.records import Owed
from dispatcher.errors import ServiceUnavailable
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.revisions import current, head
from dispatcher.storage.migrations.runner import upgrade
from tests.conftest import running
from tests.integration import shop
from tests.integration.conftest import DispatcherFactory
from tests.servers import PgBouncerServer, PostgresServer, wait_until

pytestmark = pytest.mark.integration

_THREADS = 8
_ROUNDS = 6


Finish = shop.transition("Finish", DONE, callback=None)
CONFIG = shop.cart({NEW: [shop.Remind], shop.Remind.final_state: [Finish], DONE: []}, callback=shop.Sink())


@pytest.fixture
def pooled_url(pgbouncer_server: PgBouncerServer, postgres_url: str) -> str:
    """The URL through PgBouncer of a migrated database of the test's own."""
    return pgbouncer_server.url(postgres_url)


@pytest.fixture
def make(pooled_url: str, redis_url: str, broker_url: str) -> Iterator[DispatcherFactory]:
    factory = DispatcherFactory(database_url=pooled_url, redis_url=redis_url, broker_url=broker_url)
    yield factory
    for dispatcher in factory.made:
        dispatcher.close()


def test_many_threads_do_everything_through_two_sessions(make: DispatcherFactory) -> None:
    dispatcher = make(CONFIG)

    def live(thread: int) -> list[str]:
        ends = []
        for number in range(_ROUNDS):
            pairs = [("booking", f"{thread}-{number}"), ("thread", str(thread)), ("round", str(number))]
            ((made, _),) = dispatcher.bulk_get_or_create(shop.CHAIN_TYPE, [pairs])
            chain = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, pairs)
            assert chain.id == made
            chain.enqueue(initial_context={"thread": thread}, best_effort=True)
            (planned,) = dispatcher.execute_chains([chain.id])
            assert planned.delivery_id is not None
            (delivered,) = dispatcher.deliver([Owed(planned.delivery_id, 1)])
            (moved,) = dispatcher.execute_chains([chain.id])
            assert dispatcher.find_chains(resource=("booking", f"{thread}-{number}"))[0].id == chain.id
            ends.append(f"{planned.outcome} {delivered.outcome} {moved.outcome} {dispatcher.chain(chain.id).state}")
        return ends

    with ThreadPoolExecutor(_THREADS) as pool:
        ends = [end for found in pool.map(live, range(_THREADS)) for end in found]

    assert ends == [f"planned delivered moved {DONE}"] * _THREADS * _ROUNDS
    assert dispatcher.stats()["chains"] == _THREADS * _ROUNDS


def test_nothing_of_a_session_is_left_to_others(make: DispatcherFactory, pooled_url: str) -> None:
    dispatcher = make(CONFIG)
    for number in range(20):
        dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("booking", str(number))]).enqueue(best_effort=True)

    plain = pooled_url.replace("+psycopg", "")
    seen, both_open = set(), threading.Barrier(2)

    def look() -> None:
        with psycopg.connect(plain, prepare_threshold=None) as stranger:
            zone = stranger.execute("SELECT current_setting('TimeZone'), count(*) FROM pg_prepared_statements")
            seen.add(zone.fetchone())
            both_open.wait(10)  # so that each of the two sees another session

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: look(), range(2)))

    assert seen == {("Asia/Kolkata", 0)}


def test_moments_are_utc_whatever_the_zone_of_the_session(make: DispatcherFactory) -> None:
    chain = shop.new_chain(make(CONFIG))

    assert chain.events[0].created_at.utcoffset() is not None
    assert str(chain.events[0].created_at.tzinfo) == "UTC"


@pytest.mark.parametrize(
    ("option", "threshold"), [("", None), ("?prepare_threshold=3", 3), ("?prepare_threshold=none", None)]
)
def test_statements_are_prepared_only_where_the_url_says_so(
    pooled_url: str, option: str, threshold: int | None
) -> None:
    database = Database(pooled_url + option)
    with database.read() as connection:
        assert connection.connection.dbapi_connection.prepare_threshold == threshold  # type: ignore[union-attr]
    database.dispose()


@pytest.mark.parametrize(
    ("option", "threshold"), [("", 5), ("?prepare_threshold=none", None), ("?prepare_threshold=0", 0)]
)
def test_statements_are_prepared_without_a_pooler(postgres_url: str, option: str, threshold: int | None) -> None:
    database = Database(postgres_url + option)
    with database.read() as connection:
        assert connection.connection.dbapi_connection.prepare_threshold == threshold  # type: ignore[union-attr]
    database.dispose()


def test_the_tables_are_made_through_it_by_one_at_a_time(
    pgbouncer_server: PgBouncerServer, postgres_server: PostgresServer
) -> None:
    empty = postgres_server.create_database()
    databases = [Database(pgbouncer_server.url(empty)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        revisions = list(pool.map(upgrade, databases))

    assert revisions == [head()] * 3 and current(databases[0]) == head()
    for database in databases:
        database.dispose()
    postgres_server.drop_database(empty)


def test_work_goes_on_after_a_restart(
    postgres_server: PostgresServer, postgres_url: str, redis_url: str, broker_url: str
) -> None:
    with running(lambda: PgBouncerServer(postgres_server)) as bouncer:
        make = DispatcherFactory(database_url=bouncer.url(postgres_url), redis_url=redis_url, broker_url=broker_url)
        dispatcher = make(CONFIG)
        chain = shop.new_chain(dispatcher)
        bouncer.stop()
        with pytest.raises(ServiceUnavailable, match=r"^cannot reach the database at \S+: [^\n]+$"):
            dispatcher.chain(chain.id)
        bouncer.start()

        assert dispatcher.chain(chain.id).state == NEW
        assert dispatcher.database.write(lambda connection: connection.execute(text("SELECT 1")).scalar_one()) == 1
        dispatcher.close()


def test_a_session_that_ends_behind_it_is_an_error_of_the_library(
    make: DispatcherFactory, postgres_server: PostgresServer, postgres_url: str
) -> None:
    dispatcher = make(CONFIG)
    chain = shop.new_chain(dispatcher)
    name = postgres_url.rpartition("/")[2]
    sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"

    def ends() -> int:
        with postgres_server.connect() as admin:
            return len(admin.execute(sessions, [name]).fetchall())

    wait_until(lambda: ends() == 0, seconds=10, what="no session is left")
    for _ in range(3):
        try:
            assert dispatcher.chain(chain.id).state == NEW
        except ServiceUnavailable:
            continue
        break
    else:
        raise AssertionError("three calls failed after one loss")
