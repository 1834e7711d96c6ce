"""Databases without tables, for the tests that make them, and dispatchers on servers of the run's own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher import Dispatcher, Settings
from dispatcher.storage.database import Database
from tests.servers import DatabaseServer


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


class DispatcherFactory:
    """Makes dispatchers on the test's own servers: `make(config, clock=..., <URL or setting>=...)`."""

    def __init__(self, **urls: str) -> None:
        self.urls = urls
        self.made: list[Dispatcher] = []

    def __call__(self, config: Any, *, clock: Callable[[], Any] | None = None, **options: Any) -> Dispatcher:
        given = {name: options.pop(name, url) for name, url in self.urls.items()}
        settings = Settings(**{"connect_seconds": 2, **options})
        self.made.append(Dispatcher(config, settings=settings, clock=clock, **given))
        return self.made[-1]


@pytest.fixture
def make_dispatcher(database_url: str, redis_url: str, broker_url: str) -> Iterator[DispatcherFactory]:
    """A maker of dispatchers on the test's own servers; they are closed at the end."""
    factory = DispatcherFactory(database_url=database_url, redis_url=redis_url, broker_url=broker_url)
    yield factory
    for dispatcher in factory.made:
        dispatcher.close()
