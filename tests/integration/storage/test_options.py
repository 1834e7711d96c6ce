"""Options of engine and driver, drivers that are refused, and databases of other encodings and settings."""

from collections.abc import Iterator
from datetime import UTC
from typing import Any

import pytest
from psycopg import sql
from sqlalchemy import text

from dispatcher import DONE, NEW, Dispatcher
from dispatcher.domain.records import Owed
from dispatcher.errors import ConfigurationError, ServiceUnavailable
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.runner import upgrade
from tests.integration import shop
from tests.integration.conftest import DispatcherFactory
from tests.servers import PostgresServer

pytestmark = pytest.mark.integration

CONFIG = shop.cart({NEW: [shop.Remind], shop.Remind.final_state: [], DONE: []}, callback=shop.Sink())
TEXTS = ["emoji \U0001f6d2", "Zoë", "\u0416", "back\\slash 'quote'"]


def driver_of(database: Database) -> Any:
    with database.read() as connection:
        return connection.connection.dbapi_connection


# --- drivers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "use"),
    [
        ("postgresql+psycopg2://me:hunter2@db/shop", r"postgresql\+psycopg://"),
        ("postgresql+asyncpg://me:hunter2@db/shop", r"postgresql\+psycopg://"),
        ("postgresql+psycopg_async://me:hunter2@db/shop", r"postgresql\+psycopg://"),
        ("postgresql+pg8000://me:hunter2@db/shop", r"postgresql\+psycopg://"),
        ("mysql+mysqldb://me:hunter2@db/shop", r"mysql\+pymysql://"),
        ("mysql+aiomysql://me:hunter2@db/shop", r"mysql\+pymysql://"),
        ("mysql+asyncmy://me:hunter2@db/shop", r"mysql\+pymysql://"),
        ("mariadb+mariadbconnector://me:hunter2@db/shop", r"mariadb\+pymysql://"),
        ("mysql+mysqlconnector://me:hunter2@db/shop", r"mysql\+pymysql://"),
        ("sqlite+aiosqlite:///rows.db", r"sqlite:///"),
        ("oracle://me:hunter2@db/shop", "use PostgreSQL, MySQL, MariaDB or SQLite"),
        ("mssql+pyodbc://me:hunter2@db/shop", "use PostgreSQL, MySQL, MariaDB or SQLite"),
        ("nonsense://me:hunter2@db/shop", "use PostgreSQL, MySQL, MariaDB or SQLite"),
    ],
)
def test_a_driver_that_is_not_supported_is_refused_at_construction(url: str, use: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"^database URL: [^\n]*is not supported: [^\n]*{use}[^\n]*$"
    ) as caught:
        Dispatcher(CONFIG, database_url=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_urls_of_postgresql_mean_psycopg(scheme: str) -> None:
    assert Database(f"{scheme}://db/shop").url.drivername == "postgresql+psycopg"


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_of_the_engine_and_the_driver_arrive(postgres_url: str) -> None:
    database = Database(
        f"{postgres_url}?pool_size=3&max_overflow=4&pool_recycle=60&sslmode=disable&application_name=till",
        engine_options={"max_overflow": 1, "connect_args": {"keepalives_idle": 7, "options": "-c work_mem=8MB"}},
    )
    pool: Any = database.engine.pool
    info = driver_of(database).info.get_parameters()

    assert (pool.size(), pool._max_overflow, pool._recycle) == (3, 1, 60)
    assert (info["sslmode"], info["application_name"], info["keepalives_idle"]) == ("disable", "till", "7")
    with database.read() as connection:
        assert connection.execute(text("SHOW work_mem")).scalar() == "8MB"
    database.dispose()


def test_options_arrive_at_pymysql(mariadb_url: str) -> None:
    options = {"pool_size": 2, "connect_args": {"init_command": "SET SESSION wait_timeout = 77"}}
    database = Database(f"{mariadb_url}?connect_timeout=3&read_timeout=9", engine_options=options)
    connection = driver_of(database)

    assert (connection.connect_timeout, connection._read_timeout) == (3, 9)
    with database.read() as reading:
        assert reading.execute(text("SELECT @@wait_timeout, @@tx_isolation")).one() == (77, "READ-COMMITTED")
    database.dispose()


def test_a_dispatcher_takes_options(postgres_url: str, redis_url: str, broker_url: str) -> None:
    with Dispatcher(
        CONFIG, database_url=postgres_url, redis_url=redis_url, broker_url=broker_url,
        engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 1},
    ) as dispatcher:  # fmt: skip
        ids = [shop.new_chain(dispatcher, number).id for number in range(3)]
        results = dispatcher.execute_chains([chain_id for chain_id in ids if chain_id])
        owed = [Owed(result.delivery_id, 1) for result in results if result.delivery_id]
        assert {result.outcome for result in dispatcher.deliver(owed)} == {"delivered"}
        dispatcher.sweep()
        dispatcher.relay()
        dispatcher.enqueue(shop.CHAIN_TYPE, [("a", "b")])
        dispatcher.examine()
        with dispatcher.database.read(), pytest.raises(ServiceUnavailable, match="no free connection in this process"):
            dispatcher.stats()


@pytest.mark.parametrize(
    ("query", "options", "problem"),
    [
        ("", {"isolation_level": "SERIALIZABLE"}, "engine_options: not an option that can be given: isolation_level"),
        ("", {"hide_parameters": False}, "engine_options: not an option that can be given: hide_parameters"),
        ("", {"connect_args": {"autocommit": False}}, "engine_options: the library decides this itself: autocommit"),
        ("", {"connect_args": {"client_encoding": "latin1"}}, "engine_options: client_encoding must be utf8"),
        ("?client_encoding=latin1", {}, "database URL: client_encoding must be utf8"),
        ("?pool_size=many", {}, "database URL: pool_size must be a whole number"),
        ("?prepare_threshold=often", {}, "database URL: prepare_threshold must be a whole number"),
        ("?row_factory=x", {}, "database URL: the library decides this itself: row_factory"),
    ],
)
def test_an_option_that_cannot_be_had_is_refused_at_construction(
    query: str, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Dispatcher(CONFIG, database_url=f"postgresql://me:hunter2@db/shop{query}", engine_options=options)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("kind", ["postgres_url", "mariadb_url"])
def test_an_option_that_the_driver_does_not_know_is_one_line(kind: str, request: pytest.FixtureRequest) -> None:
    database = Database(f"{request.getfixturevalue(kind)}?nonsense=1")
    with pytest.raises(ConfigurationError, match=r"^database URL or engine_options: the driver refuses [^\n]*nonsense"):
        database.check()


def test_a_migration_needs_two_connections_whatever_the_pool_has(mariadb_url: str) -> None:
    database = Database(f"{mariadb_url}?pool_size=1&max_overflow=0&pool_timeout=1")
    upgrade(database)
    database.dispose()


def test_several_hosts_are_shown(postgres_server: PostgresServer, postgres_url: str) -> None:
    name = postgres_url.rpartition("/")[2]
    hosts = f"host=127.0.0.1:1&host=127.0.0.1:{postgres_server.port}"
    database = Database(f"postgresql://postgres@/{name}?{hosts}&target_session_attrs=read-write")
    database.check()
    assert database.address == f"postgresql+psycopg://127.0.0.1:1,127.0.0.1:{postgres_server.port}/{name}"
    database.dispose()


# --- databases of other settings -------------------------------------------------------------------------------------


@pytest.fixture
def made(postgres_server: PostgresServer) -> Iterator[Any]:
    """Makes databases with an encoding of their own."""
    urls = []

    def make(encoding: str) -> str:
        url = postgres_server.create_database()
        urls.append(url)
        name = sql.Identifier(url.rpartition("/")[2])
        with postgres_server.connect() as admin:
            admin.execute(sql.SQL("DROP DATABASE {}").format(name))
            statement = "CREATE DATABASE {} ENCODING {} LOCALE 'C' TEMPLATE template0"
            admin.execute(sql.SQL(statement).format(name, sql.Literal(encoding)))
        return url

    yield make
    for url in urls:
        postgres_server.drop_database(url)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "WIN1252"])
def test_an_encoding_that_cannot_hold_every_text_is_refused_in_one_line(made: Any, encoding: str) -> None:
    dispatcher = Dispatcher(CONFIG, database_url=made(encoding))
    for call in (
        dispatcher.check,
        lambda: upgrade(dispatcher.database),
        lambda: shop.new_chain(dispatcher),
        lambda: dispatcher.enqueue(shop.CHAIN_TYPE, [("a", TEXTS[0])]),
    ):
        with pytest.raises(ConfigurationError, match=rf"^database: its encoding is {encoding}, [^\n]+ UTF8$"):
            call()
    assert dispatcher.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    dispatcher.close()


@pytest.mark.parametrize(
    "setting",
    [
        "datestyle = 'German, DMY'",
        "datestyle = 'SQL, MDY'",
        "datestyle = 'Postgres, DMY'",
        "timezone = 'America/St_Johns'",
        "client_encoding = 'LATIN1'",
        "standard_conforming_strings = off",
        "default_transaction_isolation = 'serializable'",
        "intervalstyle = 'sql_standard'",
        "extra_float_digits = -15",
        "bytea_output = 'escape'",
    ],
)
@pytest.mark.parametrize("way", ["direct", "PgBouncer"])
def test_settings_of_the_database_change_nothing(
    request: pytest.FixtureRequest,
    postgres_server: PostgresServer, postgres_url: str, redis_url: str, broker_url: str, setting: str, way: str,
) -> None:  # fmt: skip
    with postgres_server.connect() as admin:
        name = sql.Identifier(postgres_url.rpartition("/")[2])
        admin.execute(sql.SQL("ALTER DATABASE {} SET " + setting).format(name))
    url = postgres_url if way == "direct" else request.getfixturevalue("pgbouncer_server").url(postgres_url)
    make = DispatcherFactory(database_url=url, redis_url=redis_url, broker_url=broker_url)
    dispatcher = make(CONFIG)

    for number, value in enumerate(TEXTS):
        dispatcher.enqueue(shop.CHAIN_TYPE, [("a", value)], initial_context={"text": value}, requested_by=value)
        dispatcher.enqueue(shop.CHAIN_TYPE, [("a", value)], initial_context={"text": number}, requested_by=value)
        (chain,) = dispatcher.find_chains(resource=("a", value))
        assert chain.id is not None
        (result,) = dispatcher.execute_chains([chain.id])
        assert result.delivery_id is not None
        (delivery,) = dispatcher.find_deliveries(chain_id=chain.id)
        assert delivery.planned_at.tzinfo is UTC
        assert dispatcher.deliver([Owed(result.delivery_id, 1)])[0].outcome == "delivered"
        chain.refresh()
        assert chain.resources == [("a", value)] or chain.resources == (("a", value),)
        assert {event.created_at.tzinfo for event in chain.events} == {UTC}
        assert chain.events[0].requested_by == value
    dispatcher.relay(tick=True)
    dispatcher.examine()
    dispatcher.close()


def test_the_session_has_utc(postgres_url: str) -> None:
    database = Database(postgres_url)
    for _ in range(2):
        with database.read() as connection:
            assert connection.execute(text("SHOW timezone")).scalar() == "UTC"
        assert database.write(lambda one: one.execute(text("SHOW timezone")).scalar()) == "UTC"
    database.dispose()
