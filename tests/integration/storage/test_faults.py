"""What each database's errors become: rerun, the library's own with a fitting advice, or raised as they are."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, create_engine, event, insert, text
from sqlalchemy.exc import DBAPIError

from dispatcher import NEW
from dispatcher.errors import ServiceRefused, ServiceUnavailable
from dispatcher.storage.database import Database
from dispatcher.storage.faults import Fault, fault_of
from dispatcher.storage.models import TickRow
from tests.conftest import running
from tests.integration import shop
from tests.integration.conftest import DispatcherFactory
from tests.servers import MariaDbServer, PostgresServer

pytestmark = pytest.mark.integration

CONFIG = shop.cart({NEW: [shop.Remind]}, callback=shop.Sink())
INSERT = insert(TickRow).values(name="a", last_at=shop.START)

REFUSALS = {
    "53100": (Fault.NO_SPACE, "disk space"),
    "53200": (Fault.NO_MEMORY, "memory"),
    "53300": (Fault.CROWDED, "pool_size"),
    "54000": (Fault.TOO_LARGE, "limit"),
    "25006": (Fault.READ_ONLY, "read-only"),
    1021: (Fault.NO_SPACE, "disk space"),
    1114: (Fault.NO_SPACE, "disk space"),
    1041: (Fault.NO_MEMORY, "memory"),
    1290: (Fault.READ_ONLY, "read-only"),
    1203: (Fault.CROWDED, "pool_size"),
}
ABSENCES = ["57P01", "57P03", "08006", 1053, 1927]
CONFLICTS = ["40001", "40P01", 1213, 1205, 1020]
OTHERS = ["22012", "57014", "42501", "58030", 1317, 1644, 1146]

Code = str | int

_FAIL = """CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
  'BEGIN RAISE EXCEPTION $$no$$ USING ERRCODE = $$<code>$$; END'"""
_BEFORE = "CREATE TRIGGER fails BEFORE INSERT ON chain_dispatcher_tick FOR EACH ROW "
_ON_POSTGRESQL = [_FAIL, f"{_BEFORE} EXECUTE FUNCTION fail()"]
_ON_MARIADB = [f"{_BEFORE} SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = <code>, MESSAGE_TEXT = 'no'"]


Failing = Callable[[Code], AbstractContextManager[Database]]


@pytest.fixture
def failing(request: pytest.FixtureRequest) -> Failing:
    """A database whose server refuses a write with that code: a trigger of the table of ticks raises it."""

    @contextmanager
    def make(code: Code) -> Iterator[Database]:
        on_postgresql = isinstance(code, str)
        url = request.getfixturevalue("postgres_url" if on_postgresql else "mariadb_url")
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        database = Database(url)
        with engine.connect() as connection:
            for statement in _ON_POSTGRESQL if on_postgresql else _ON_MARIADB:
                connection.execute(text(statement.replace("<code>", str(code))))
            try:
                yield database
            finally:
                connection.execute(text(f"DROP TRIGGER fails{' ON chain_dispatcher_tick' if on_postgresql else ''}"))
                database.dispose()

    return make


def attempts(database: Database) -> tuple[int, Exception]:
    """How often a write that fails was tried, and its error."""
    tried = 0

    def note(*_: object) -> None:
        nonlocal tried
        tried += 1

    event.listen(database.engine, "handle_error", note)
    with pytest.raises((ServiceUnavailable, DBAPIError)) as caught:
        database.write(lambda connection: connection.execute(INSERT))
    return tried, caught.value


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_is_told_with_what_helps(failing: Failing, code: Code) -> None:
    fault, advice = REFUSALS[code]
    with failing(code) as database:
        tried, error = attempts(database)
        database.check()

    assert isinstance(error, ServiceRefused)
    assert str(error).startswith(f"the database at {database.address} refuses: ") and advice in str(error)
    assert "\n" not in str(error) and error.written is False
    assert tried == (2 if fault is Fault.READ_ONLY else 1)


@pytest.mark.parametrize("code", ABSENCES)
def test_a_session_that_the_server_gives_up_is_left(failing: Failing, code: Code) -> None:
    with failing(code) as database:
        tried, error = attempts(database)

    assert type(error) is ServiceUnavailable and error.written is False
    assert str(error).startswith(f"cannot reach the database at {database.address}: ")
    assert tried == 2, "once more on another connection"


@pytest.mark.parametrize("code", CONFLICTS)
def test_a_conflict_is_rerun(failing: Failing, code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatcher.storage.database._RERUNS", 3)
    with failing(code) as database:
        tried, error = attempts(database)

    assert tried == 4 and isinstance(error, DBAPIError)


@pytest.mark.parametrize("code", OTHERS)
def test_any_other_error_is_raised_as_it_is(failing: Failing, code: Code) -> None:
    with failing(code) as database:
        tried, error = attempts(database)

    assert tried == 1 and isinstance(error, DBAPIError) and not error.connection_invalidated
    assert fault_of(error.orig) is Fault.OTHER


# --- servers that take no connection ---------------------------------------------------------------------------------


def test_too_many_clients_is_not_told_as_a_server_that_is_away(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with postgres_server.connect() as admin:
        admin.execute("CREATE ROLE crowded LOGIN CONNECTION LIMIT 1")
    try:
        first, second = (Database(postgres_url.replace("postgres@", "crowded@"), connect_seconds=2) for _ in range(2))
        first.check()
        with pytest.raises(ServiceRefused, match=r"^the database at \S+ refuses: .*too many.*\(.*pool_size\)\)$"):
            second.check()
        first.dispose()
        second.check()
        second.dispose()
    finally:
        with postgres_server.connect() as admin:
            admin.execute("DROP ROLE crowded")


def test_too_many_connections_of_mariadb(mariadb_server: MariaDbServer, mariadb_url: str) -> None:
    engine = create_engine(mariadb_server.url("mysql"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("CREATE USER crowded@'127.0.0.1' WITH MAX_USER_CONNECTIONS 1"))
        connection.execute(text("GRANT ALL ON *.* TO crowded@'127.0.0.1'"))
        try:
            first, second = (Database(mariadb_url.replace("root@", "crowded@"), connect_seconds=2) for _ in range(2))
            first.check()
            with pytest.raises(ServiceRefused, match=r"^the database at \S+ refuses: .*max_user_conn.*pool_size"):
                second.check()
            first.dispose()
            second.dispose()
        finally:
            connection.execute(text("DROP USER crowded@'127.0.0.1'"))


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_database_that_does_not_exist_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    url: str = request.getfixturevalue({"postgresql": "postgres_url", "mariadb": "mariadb_url"}[kind])
    database = Database(f"{url}_not")
    with pytest.raises(ServiceUnavailable, match=r"^cannot reach the database at \S+: [^\n]*_not[^\n]*$"):
        database.check()


# --- what is too large -----------------------------------------------------------------------------------------------


def test_too_many_parameters_are_refused_in_one_line(postgres_url: str, redis_url: str, broker_url: str) -> None:
    dispatcher = DispatcherFactory(database_url=postgres_url, redis_url=redis_url, broker_url=broker_url)(CONFIG)
    many = [("a", str(number)) for number in range(40_000)]

    with pytest.raises(ServiceRefused, match=r"^the database at \S+ refuses: [^\n]*parameters[^\n]*less at a time"):
        dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, many, can_be_subset=True)

    assert dispatcher.find_chains() == [], "the connection is usable"
    dispatcher.close()


def test_a_packet_that_is_too_large_says_how_large_it_was() -> None:
    with running(MariaDbServer) as server:
        database = Database(server.create_database())
        for _ in range(10):  # the server's reason arrives, or its end of the connection is first
            with pytest.raises(ServiceUnavailable, match=r"max_allowed_packet"):
                database.write(lambda one: one.execute(text("SELECT length(:a)"), {"a": "x" * 20_000_000}))
        database.check()
        database.dispose()


# --- SQLite ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.dispose()


def test_a_full_disk_of_sqlite(rows: Database) -> None:
    event.listen(rows.engine, "connect", lambda one, _: one.execute("PRAGMA max_page_count = 1"))

    def fill() -> None:
        for number in range(10_000):
            row = insert(TickRow).values(name=f"{number:0>40}", last_at=shop.START)
            rows.write(partial(Connection.execute, statement=row))

    with pytest.raises(ServiceRefused, match=r"refuses: .*full \(free or add disk space\)$"):
        fill()
    rows.check()


def test_a_text_that_sqlite_cannot_hold(rows: Database) -> None:
    event.listen(rows.engine, "connect", lambda one, _: one.setlimit(0, 1000))  # SQLITE_LIMIT_LENGTH
    with pytest.raises(ServiceRefused, match=r"refuses: .*too big \(ask for less"):
        rows.write(lambda one: one.execute(text("SELECT length(:a)"), {"a": "x" * 2000}).scalar())


def test_a_file_that_is_read_only(sqlite_url: str) -> None:
    path = sqlite_url.removeprefix("sqlite:///")
    database = Database(f"sqlite:///file:{path}?mode=ro&uri=true")
    database.check()
    with pytest.raises(ServiceRefused, match=r"refuses: attempt to write a readonly database \(.*writable\)$"):
        database.write(lambda connection: connection.execute(INSERT))
    database.dispose()
    assert not Path("file:").exists()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "rows.sqlite"
    path.write_bytes(b"what is this? " * 1000)
    database = Database(f"sqlite:///{path}")
    with pytest.raises(ServiceRefused, match=r"refuses: file is not a database \(.*backup"):
        database.check()


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "rows.sqlite").mkdir()
    database = Database(f"sqlite:///{tmp_path / 'rows.sqlite'}")
    with pytest.raises(ServiceUnavailable, match=r"^cannot reach the database at \S+: unable to open database file$"):
        database.check()


def test_a_locked_file_is_waited_for_and_rerun(rows: Database, sqlite_url: str) -> None:
    other = Database(sqlite_url)
    impatient = rows.hasty(0.05)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        other.write(lambda connection: (held.set(), free.wait(20)))

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    tried, error = attempts(impatient)
    assert tried == 2 and isinstance(error, DBAPIError) and fault_of(error.orig) is Fault.CONFLICT
    free.set()
    holder.join(10)
    impatient.write(lambda connection: connection.execute(INSERT))
    for database in (other, impatient):
        database.dispose()
