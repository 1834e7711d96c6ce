"""Enqueue on commit: which connections of an application write the request in their own transaction, and which not."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.orm import Session

from dispatcher import NEW
from tests.integration import shop
from tests.integration.conftest import DispatcherFactory
from tests.servers import MariaDbServer, PostgresServer

pytestmark = pytest.mark.integration

CONFIG = shop.cart({NEW: [shop.Remind]}, callback=shop.Sink())

_WRITTEN = {
    "postgresql": "SELECT txid_current_if_assigned() IS NOT NULL",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx "
    "WHERE trx_mysql_thread_id = connection_id() AND trx_rows_modified > 0",
    "sqlite": "SELECT count(*) FROM chain_dispatcher_chain",
}
_WRITTEN["mariadb"] = _WRITTEN["mysql"]


@contextmanager
def engine_at(url: str, **options: Any) -> Iterator[Engine]:
    engine = create_engine(url, **options)
    yield engine
    engine.dispose()


def enqueued_by(make: DispatcherFactory, session: Session) -> bool:
    """Whether the transaction of a session writes the request that it enqueues; after its commit the chain is there."""
    dispatcher = make(CONFIG)
    dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})
    session.connection()
    written = bool(session.execute(text(_WRITTEN[session.get_bind().dialect.name])).scalar())
    assert dispatcher.find_chains() == []
    session.commit()
    (chain,) = dispatcher.find_chains()
    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}
    return written


# --- on every database -----------------------------------------------------------------------------------------------


def test_a_connection_to_the_same_database_writes_it(make_dispatcher: DispatcherFactory, database_url: str) -> None:
    with engine_at(database_url) as engine, Session(engine) as session:
        assert enqueued_by(make_dispatcher, session)


def test_a_connection_that_renames_schemas_does_not(make_dispatcher: DispatcherFactory, database_url: str) -> None:
    options = {"schema_translate_map": {None: "tenant"}}
    with engine_at(database_url) as engine, Session(engine.execution_options(**options)) as session:
        dispatcher = make_dispatcher(CONFIG)
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
        session.commit()
        assert len(dispatcher.find_chains()) == 1


def test_a_session_with_a_database_for_each_class_does_not(
    make_dispatcher: DispatcherFactory, database_url: str
) -> None:
    with engine_at(database_url) as engine, Session(binds={dict: engine}) as session:
        dispatcher = make_dispatcher(CONFIG)
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
        assert dispatcher.find_chains() == []
        session.commit()
        assert len(dispatcher.find_chains()) == 1


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_postgresql(postgres_url: str, redis_url: str, broker_url: str) -> Iterator[DispatcherFactory]:
    factory = DispatcherFactory(database_url=postgres_url, redis_url=redis_url, broker_url=broker_url)
    yield factory
    for dispatcher in factory.made:
        dispatcher.close()


@pytest.fixture
def execute(postgres_url: str) -> Callable[..., None]:
    """Executes statements as the database's owner."""

    def run(*statements: str) -> None:
        with engine_at(postgres_url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    return run


@pytest.fixture
def tenant(execute: Callable[..., None]) -> str:
    """The name of a schema with tables of its own."""
    execute(
        "CREATE SCHEMA tenant",
        *(
            f"CREATE TABLE tenant.{name} (LIKE public.{name} INCLUDING ALL)"
            for name in ("chain_dispatcher_chain", "chain_dispatcher_resource", "chain_dispatcher_event")
        ),
    )
    return "tenant"


@pytest.mark.parametrize("way", ["url", "argument", "statement"])
def test_another_schema_is_another_database(
    on_postgresql: DispatcherFactory, postgres_url: str, tenant: str, way: str
) -> None:
    asked = f"-csearch_path={tenant}"
    url = make_url(postgres_url).set(query={"options": asked}) if way == "url" else postgres_url
    arguments = {"options": asked} if way == "argument" else {}
    with engine_at(str(url), connect_args=arguments) as engine, Session(engine) as session:
        if way == "statement":
            session.execute(text(f"SET search_path = {tenant}"))
        assert not enqueued_by(on_postgresql, session)
        assert session.execute(text("SELECT count(*) FROM tenant.chain_dispatcher_chain")).scalar() == 0


def test_the_same_schema_by_another_path_is_the_same(on_postgresql: DispatcherFactory, postgres_url: str) -> None:
    url = make_url(postgres_url).set(query={"options": "-csearch_path=nowhere,public"})
    with engine_at(str(url)) as engine, Session(engine) as session:
        assert enqueued_by(on_postgresql, session)


@pytest.fixture
def clerk(postgres_server: PostgresServer) -> Iterator[str]:
    """Another user of the server."""
    with postgres_server.connect() as admin:
        admin.execute("CREATE ROLE clerk LOGIN")
    yield "clerk"
    with postgres_server.connect() as admin:
        admin.execute("REASSIGN OWNED BY clerk TO postgres")
        admin.execute("DROP OWNED BY clerk")
        admin.execute("DROP ROLE clerk")


@pytest.mark.parametrize("has", ["the right to write", "no right to write", "a schema of its own"])
def test_another_user_may_see_the_same_tables(
    on_postgresql: DispatcherFactory, postgres_url: str, execute: Callable[..., None], clerk: str, has: str
) -> None:
    if has == "the right to write":
        execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {clerk}")
        execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {clerk}")
    if has == "a schema of its own":
        execute(f"CREATE SCHEMA {clerk}", f"CREATE TABLE {clerk}.chain_dispatcher_chain (id int)")
        execute(f"GRANT ALL ON SCHEMA {clerk} TO {clerk}", f"GRANT ALL ON ALL TABLES IN SCHEMA {clerk} TO {clerk}")
    url = make_url(postgres_url).set(username=clerk)
    with engine_at(url.render_as_string(hide_password=False)) as engine, Session(engine) as session:
        assert enqueued_by(on_postgresql, session) is (has == "the right to write")
    execute(f"DROP OWNED BY {clerk}", f"DROP SCHEMA IF EXISTS {clerk} CASCADE")


def test_a_connection_that_an_argument_leads_elsewhere_is_another_database(
    on_postgresql: DispatcherFactory, postgres_server: PostgresServer, postgres_url: str
) -> None:
    other = postgres_server.create_database(template=postgres_url)
    arguments = {"dbname": other.rpartition("/")[2]}
    with engine_at(postgres_url, connect_args=arguments) as engine, Session(engine) as session:
        assert not enqueued_by(on_postgresql, session)
        assert session.execute(text("SELECT count(*) FROM chain_dispatcher_chain")).scalar() == 0
    postgres_server.drop_database(other)


def test_a_connection_that_commits_by_itself_has_no_transaction_to_write_in(
    on_postgresql: DispatcherFactory, postgres_url: str
) -> None:
    with engine_at(postgres_url, isolation_level="AUTOCOMMIT") as engine, Session(engine) as session:
        dispatcher = on_postgresql(CONFIG)
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
        assert dispatcher.find_chains() == []
        session.rollback()
        assert dispatcher.find_chains() == []


def test_a_server_that_was_started_anew_is_the_same(redis_url: str, broker_url: str) -> None:
    from dispatcher.storage.migrations.runner import upgrade
    from tests.conftest import running

    with running(PostgresServer) as server:
        url = server.create_database()
        make = DispatcherFactory(database_url=url, redis_url=redis_url, broker_url=broker_url)
        dispatcher = make(CONFIG)
        upgrade(dispatcher.database)
        with engine_at(url, pool_pre_ping=True) as engine:
            for number in range(2):
                with Session(engine) as session:
                    dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, [("a", str(number))])
                    assert session.execute(text(_WRITTEN["postgresql"])).scalar()
                    session.commit()
                if number == 0:
                    server.stop()
                    server.start()
        dispatcher.close()


def test_the_answer_costs_one_statement_with_the_clock(on_postgresql: DispatcherFactory, postgres_url: str) -> None:
    dispatcher = on_postgresql(CONFIG)
    found: list[str] = []
    with engine_at(postgres_url) as engine:
        event.listen(engine, "before_cursor_execute", lambda *about: found.append(about[2]))
        for number in range(2):
            with Session(engine) as session:
                found.clear()
                dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, [("a", str(number))])
                session.commit()

    assert sum("clock_timestamp" in statement for statement in found) == 1
    assert sum("to_regclass" in statement for statement in found) == 1


# --- MariaDB and SQLite ----------------------------------------------------------------------------------------------


def test_another_database_of_the_server_is_another(
    mariadb_server: MariaDbServer, mariadb_url: str, redis_url: str, broker_url: str
) -> None:
    make = DispatcherFactory(database_url=mariadb_url, redis_url=redis_url, broker_url=broker_url)
    other = mariadb_server.create_database()
    with engine_at(mariadb_url) as engine, Session(engine) as session:
        session.execute(text(f"USE {other.rpartition('/')[2]}"))
        assert not enqueued_by(make, session)
        session.connection().invalidate()
    mariadb_server.drop_database(other)
    make.made[0].close()


def test_a_url_of_mysql_leads_to_the_same_mariadb(mariadb_url: str, redis_url: str, broker_url: str) -> None:
    make = DispatcherFactory(database_url=mariadb_url, redis_url=redis_url, broker_url=broker_url)
    with engine_at(mariadb_url.replace("mariadb", "mysql", 1)) as engine, Session(engine) as session:
        assert enqueued_by(make, session)
    make.made[0].close()


def test_a_copy_of_the_file_is_another_database(
    sqlite_url: str, redis_url: str, broker_url: str, tmp_path: Path
) -> None:
    import sqlite3

    make = DispatcherFactory(database_url=sqlite_url, redis_url=redis_url, broker_url=broker_url)
    copy = shutil.copy(sqlite_url.removeprefix("sqlite:///"), tmp_path / "copy.sqlite")
    creator = lambda: sqlite3.connect(copy)  # noqa: E731 - the URL says one thing, and the connection is another
    with engine_at(sqlite_url, creator=creator) as engine, Session(engine) as session:
        assert not enqueued_by(make, session)
    make.made[0].close()
