"""What every test gets: an environment without the developer's settings, and servers that the run starts itself."""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest
from hypothesis import settings

from dispatcher.storage.database import Database
from dispatcher.storage.migrations.revisions import current, head
from dispatcher.storage.migrations.runner import upgrade
from dispatcher.storage.models import Base
from tests.servers import (
    MariaDbServer,
    MissingBinaryError,
    PgBouncerServer,
    PostgresServer,
    RabbitMqServer,
    RedisServer,
    Server,
)

AnyServer = TypeVar("AnyServer", bound=Server)
Shape = set[tuple[str, ...]]

MEMORY = Path("/dev/shm")  # noqa: S108 - every server makes a directory of its own in it
MEMORY_BYTES = 4 * 1024**3
"""What must be free in `MEMORY` before servers live there; containers have 64 MB by default."""

# The machine that runs the tests is busy, so the time of one example says nothing.
settings.register_profile("tests", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def _no_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("DISPATCHER_"):
                patch.delenv(name)
        # PyMySQL reads the system's certificates again for each connection, which takes 25 ms; no test needs them.
        patch.setenv("SSL_CERT_FILE", os.devnull)
        yield


@pytest.fixture(scope="session", autouse=True)
def _servers_in_memory() -> Iterator[None]:
    """Servers keep their files in memory where there is room.

    A new PostgreSQL database is 300 files, which take a disk ten times as long. The benchmark's servers stay on disk.
    """
    with pytest.MonkeyPatch.context() as patch:
        if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES:
            patch.setattr(Server, "home", MEMORY)
        yield


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds the `.env` or `.dispatcher` of the directory that pytest was started in."""
    monkeypatch.chdir(tmp_path)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Reports that the workers of pytest-xdist can send: some tests log strings that are no UTF-8."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    return value


def missing(reason: str) -> NoReturn:
    """End a test for want of a service: a skip on a laptop, a failure where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def scaled(whole: int, *, least: int) -> int:
    """The share of `whole` that SLOW_SCALE asks slow tests for, at least `least`; `whole` without SLOW_SCALE."""
    return max(least, round(whole * float(os.environ.get("SLOW_SCALE") or 1)))


@contextmanager
def running(make: Callable[[], AnyServer], missing: Callable[[str], NoReturn] = missing) -> Iterator[AnyServer]:
    """The server that `make` makes, while it runs; `missing` is called where its program is not installed."""
    try:
        server = make()
    except MissingBinaryError as error:
        missing(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The run's own Redis or Valkey. A test that stops it starts one of its own instead."""
    with running(RedisServer) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The run's own PostgreSQL. A test that stops it starts one of its own instead."""
    with running(PostgresServer) as server:
        yield server


@pytest.fixture(scope="session")
def pgbouncer_server(postgres_server: PostgresServer) -> Iterator[PgBouncerServer]:
    """The run's own PgBouncer in transaction mode. A test that stops it starts one of its own instead."""
    with running(lambda: PgBouncerServer(postgres_server)) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDbServer]:
    """The run's own MariaDB. A test that stops it starts one of its own instead."""
    with running(MariaDbServer) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[RabbitMqServer]:
    """The run's own RabbitMQ. A test that stops it starts one of its own instead."""
    with running(RabbitMqServer) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of a Redis without any keys."""
    redis_server.clear()
    return redis_server.url


@pytest.fixture(scope="session")
def postgres_template(postgres_server: PostgresServer) -> str:
    """The URL of a migrated, empty database, from which each test's is copied."""
    url = postgres_server.create_database()
    _migrate(url)
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file, from which each test's is copied."""
    path = tmp_path_factory.mktemp("template") / "rows.sqlite"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def postgres_url(postgres_server: PostgresServer, postgres_template: str) -> Iterator[str]:
    """The URL of a migrated PostgreSQL database of the test's own."""
    url = postgres_server.create_database(template=postgres_template)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def mariadb_spares() -> list[tuple[str, Shape]]:
    """The URLs and shapes of migrated, empty databases that earlier tests have left."""
    return []


@pytest.fixture
def mariadb_url(mariadb_server: MariaDbServer, mariadb_spares: list[tuple[str, Shape]]) -> Iterator[str]:
    """The URL of a migrated MariaDB database that the test has to itself."""
    if mariadb_spares:
        url, shape = mariadb_spares.pop()
    else:
        url = mariadb_server.create_database()
        _migrate(url)
        shape = mariadb_server.shape(url)
    yield url
    if mariadb_server.shape(url) == shape and _revision(url) == head():
        mariadb_server.empty_database(url, tables=Base.metadata.sorted_tables)
        mariadb_spares.append((url, shape))
    else:
        mariadb_server.drop_database(url)


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a migrated SQLite file of the test's own."""
    return f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'rows.sqlite')}"


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a migrated database of the test's own, on each kind of database in turn."""
    fixtures = {"sqlite": "sqlite_url", "postgresql": "postgres_url", "mariadb": "mariadb_url"}
    url: str = request.getfixturevalue(fixtures[request.param])
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database of the test's own, on each kind of database in turn."""
    database = Database(database_url)
    yield database
    database.dispose()


def _migrate(url: str) -> None:
    database = Database(url)
    upgrade(database)
    database.dispose()


def _revision(url: str) -> str | None:
    database = Database(url)
    try:
        return current(database)
    finally:
        database.dispose()
