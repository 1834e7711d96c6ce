"""Databases without tables, for the tests that make them, and dispatchers on servers of the run's own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher import Dispatcher, Settings
from dispatcher.database import Database
from tests.conftest import running
from tests.servers import DatabaseServer, MariaDbServer


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDbServer]:
    """The run's own MariaDB; always a skip where it is missing, because no deployment here is promised to run on it."""
    with running(MariaDbServer, missing=pytest.skip) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database of the test's own without any tables, on each kind of database in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.sqlite'}"
        return
    fixture = {"postgresql": "postgres_server", "mariadb": "mariadb_server"}[request.param]
    server: DatabaseServer = request.getfixturevalue(fixture)
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture
def empty_database(empty_url: str) -> Iterator[Database]:
    """A database of the test's own without any tables, on each kind of database in turn."""
    database = Database(empty_url)
    yield database
    database.dispose()


@pytest.fixture
def broker_url(redis_url: str) -> str:
    """The URL of an empty broker: a database of its own, so that the locks' keys can be compared."""
    return redis_url.removesuffix("/0") + "/1"


@pytest.fixture
def make_dispatcher(database_url: str, redis_url: str, broker_url: str) -> Iterator[Callable[..., Dispatcher]]:
    """Dispatchers on the test's own servers: `make_dispatcher(config, clock=..., <URL or setting>=...)`."""
    made = []

    def make(config: Any, *, clock: Callable[[], Any] | None = None, **options: Any) -> Dispatcher:
        urls = {"database_url": database_url, "redis_url": redis_url, "broker_url": broker_url}
        given = {name: options.pop(name, url) for name, url in urls.items()}
        settings = Settings(**{"connect_seconds": 2, **options})
        made.append(Dispatcher(config, settings=settings, clock=clock, **given))
        return made[-1]

    yield make
    for dispatcher in made:
        dispatcher.close()
