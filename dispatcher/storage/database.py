"""One database of a deployment: its connections, its transactions and its clock."""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Engine, literal, select
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from dispatcher.errors import ConfigurationError, ServiceUnavailable
from dispatcher.storage.clock import clock_plus, host_now, shifted_seconds
from dispatcher.storage.dialects import (
    Engines,
    first_line,
    is_conflict,
    is_unreachable,
    make_engines,
    normal_url,
)
from dispatcher.storage.rows import Found

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_RERUNS = 12
_HASTY_RERUNS = 1


class Database:
    """One database: its engine, made on first use in each process, and its transactions.

    Raises `ConfigurationError` for a URL that names no known database.
    """

    def __init__(self, url: str, *, connect_seconds: float = 5, clock: Callable[[], datetime] | None = None) -> None:
        try:
            self.url: URL = normal_url(url)
        except (ArgumentError, ValueError):
            # Not `from error`, because its text may contain the URL with the password.
            problem = "the database URL cannot be parsed: quote special characters, as in %40 for an @"
            raise ConfigurationError(problem) from None
        self.connect_seconds = connect_seconds
        self.clock = _aware(clock) if clock is not None else None
        self._patient = False
        self._answer_seconds: float | None = None
        self._made: Engines | None = None
        self._pid = 0

    def __repr__(self) -> str:
        return f"<Database {self.address}>"

    @property
    def address(self) -> str:
        """The URL as it may be shown: no user, no password, no query."""
        url = self.url
        return URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()

    @property
    def dialect(self) -> str:
        """`sqlite`, `postgresql`, `mysql` or `mariadb`."""
        return self.url.get_backend_name()

    @property
    def engine(self) -> Engine:
        """This process's engine. A forked child makes a new engine and does not use its parent's connections."""
        return self._engines.engine

    @property
    def _engines(self) -> Engines:
        if self._made is None or self._pid != os.getpid():
            if self._made is not None:
                self._made.engine.dispose(close=False)
            self._made, self._pid = self._make_engines(), os.getpid()
        return self._made

    def _make_engines(self) -> Engines:
        return make_engines(
            self.url,
            connect_seconds=self.connect_seconds,
            patient=self._patient,
            answer_seconds=self._answer_seconds,
        )

    @contextmanager
    def patient(self) -> Iterator["Database"]:
        """The same database while the block runs, with connections of its own, whose statements may take any time."""
        other = copy(self)
        other._patient, other._made = True, None
        try:
            yield other
        finally:
            other.dispose()

    def hasty(self, seconds: float) -> "Database":
        """The same database, with connections of its own, whose every wait ends with an error after `seconds`.

        After an error the caller must `dispose` of it, because the connection may be in the middle of an answer.
        """
        other = copy(self)
        other.connect_seconds, other._answer_seconds, other._made = min(seconds, self.connect_seconds), seconds, None
        return other

    def dispose(self, *, close: bool = True) -> None:
        """Drop this process's connections; with `close=False`, or if a parent made them, without closing them."""
        if self._made is not None:
            self._made.engine.dispose(close=close and self._pid == os.getpid())
        self._made = None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for reading, without a transaction where the database can (SQLite: rolled back at the end)."""
        with self._connected(writes=False) as connection:
            yield connection

    def write(self, work: Callable[[Connection], Result]) -> Result:
        """What `work(connection)` returns, committed. The whole of it is rerun after a deadlock or a busy database.

        Raises `ServiceUnavailable` when the database cannot be reached; it says whether the commit may have succeeded.
        """

        def attempt() -> Result:
            with self._connected(writes=True) as connection:
                transaction = connection.begin()
                result = work(connection)
                with self._reaching(written=None):
                    commit(transaction.commit)
                return result

        return self._rerun(attempt)

    def write_statement(self, statement: str, parameters: Mapping[str, Any]) -> Found:
        """The rows of one data-changing statement, which commits by itself: no BEGIN, no COMMIT. Errors as `write`.

        PostgreSQL only: `statement` is written for the driver, with `%(name)s` for a parameter.
        """

        def attempt() -> Found:
            with self._connected(writes=False) as connection, self._reaching(written=None):
                return commit(lambda: run_statement(connection, statement, parameters))

        return self._rerun(attempt)

    def _rerun(self, attempt: Callable[[], Result]) -> Result:
        reruns = _RERUNS if self._answer_seconds is None else _HASTY_RERUNS
        for rerun in range(reruns + 1):
            try:
                return attempt()
            except DBAPIError as error:
                if rerun == reruns or not is_conflict(error):
                    raise
                logger.debug("transaction rerun after %s", type(error.orig).__name__)
            time.sleep(random.uniform(0, 0.005 * 2 ** min(rerun, 8)))  # noqa: S311 - spreading, not secrecy
        raise AssertionError("unreachable")

    def now(self, connection: Connection) -> datetime:
        """Domain time: the injected clock, else the database's."""
        return self.clock() if self.clock is not None else self.machine_now(connection)

    def domain_now(self, machine_now: datetime | None) -> datetime:
        """Domain time, if a read has already given the time of the database's clock (`machine_now`)."""
        if self.clock is not None:
            return self.clock()
        if machine_now is None or self.dialect == "sqlite":  # SQLite's clock is this host's, and has milliseconds only
            return host_now()
        return machine_now

    def machine_now(self, connection: Connection) -> datetime:
        """The database's clock. SQLite has none of its own, so there it is this host's."""
        if self.dialect == "sqlite":
            return host_now()
        return connection.execute(select(clock_plus(0))).scalar_one()

    def check(self) -> None:
        """Raise `ServiceUnavailable` unless the database answers."""
        with self.read() as connection:
            connection.execute(select(literal(1)))

    @contextmanager
    def _connected(self, *, writes: bool) -> Iterator[Connection]:
        engine = self._engines.writes if writes else self._engines.reads
        with self._reaching(written=False), engine.connect() as connection:
            yield connection

    @contextmanager
    def _reaching(self, *, written: bool | None) -> Iterator[None]:
        """Raise `ServiceUnavailable` for an error that says that the database cannot be reached.

        `written` is what is then known of a write: None while something that commits is on its way.
        """
        try:
            yield
        except PoolTimeout as error:
            raise ServiceUnavailable("database", self.address, "no free connection", written) from error
        except DBAPIError as error:
            if error.connection_invalidated or (isinstance(error, OperationalError) and is_unreachable(error)):
                raise ServiceUnavailable("database", self.address, first_line(error.orig), written) from error
            raise


def alone(connection: Connection, work: Callable[[], Result]) -> Result:
    """What `work()` returns, in a savepoint of the open transaction. If it raises, only what it has written is undone.

    After a conflict or a lost connection the whole transaction is undone: see `ends_transaction`.
    """
    savepoint = connection.begin_nested()
    try:
        result = work()
        savepoint.commit()
    except Exception as error:
        if not ends_transaction(error):
            savepoint.rollback()
        raise
    return result


def ends_transaction(error: Exception) -> bool:
    """Whether an error concerns the whole transaction: it has to be rerun, or its connection is lost."""
    return isinstance(error, DBAPIError) and (error.connection_invalidated or is_conflict(error))


def commit(step: Callable[[], Result]) -> Result:
    """Call `step`, which commits, and return its result. All commits pass here, so that tests can make them fail."""
    return step()


def run_statement(connection: Connection, statement: str, parameters: Mapping[str, Any]) -> Found:
    """The rows of a statement. It goes directly to the driver, because SQLAlchemy would take three times as long.

    An error of the driver is raised as SQLAlchemy's `DBAPIError`, as everywhere.
    """
    shifted = shifted_seconds()
    if shifted:  # by a test
        statement = statement.replace("clock_timestamp()", "(clock_timestamp() + make_interval(secs => %(shifted)s))")
        parameters = {**parameters, "shifted": shifted}
    dialect = connection.dialect
    driver_error: type[Exception] = dialect.loaded_dbapi.Error
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement, parameters)
        return Found(tuple([column[0] for column in cursor.description]), cursor.fetchall())
    except driver_error as error:
        gone = dialect.is_disconnect(error, connection.connection.driver_connection, cursor)  # type: ignore[arg-type]
        wrapped = DBAPIError.instance(
            None, None, error, driver_error, hide_parameters=True, connection_invalidated=gone, dialect=dialect
        )
        if gone:
            connection.invalidate(error)
            connection.engine.dispose()  # the idle connections are probably gone too, as after a restart
        raise wrapped from error
    except BaseException as error:  # the answer was not read to its end: nobody may use this connection again
        connection.invalidate(error)
        raise
    finally:
        cursor.close()


def _aware(clock: Callable[[], datetime]) -> Callable[[], datetime]:
    """`clock`, checked: it must give aware datetimes. Some databases read a naive one in the server's time zone."""

    def now() -> datetime:
        moment = clock()
        if moment.tzinfo is None:
            raise ValueError("the injected clock gave a naive datetime")
        return moment

    return now
