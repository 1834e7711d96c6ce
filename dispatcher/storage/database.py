"""One database of a deployment: its connections, its transactions and its clock."""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Engine, literal, select
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from dispatcher.errors import ConfigurationError, ServiceUnavailable
from dispatcher.storage.clock import clock_plus, host_now, shifted_seconds
from dispatcher.storage.dialects import Engines, make_engines
from dispatcher.storage.faults import is_conflict, leaves_connection, unavailable
from dispatcher.storage.identity import is_plain, look
from dispatcher.storage.options import normal_url, read_options
from dispatcher.storage.rows import Found

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_RERUNS = 12
_HASTY_RERUNS = 1


class Database:
    """One database: its engine, made on first use in each process, and its transactions.

    `engine_options` are SQLAlchemy's, as `read_options` checks them. Raises `ConfigurationError` for a URL that names
    no known database, for a driver that is not supported, and for options that cannot be had.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_seconds: float = 5,
        clock: Callable[[], datetime] | None = None,
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            self.url: URL = normal_url(url)
        except (ArgumentError, ValueError):
            # Not `from error`, because its text may contain the URL with the password.
            problem = "the database URL cannot be parsed: quote special characters, as in %40 for an @"
            raise ConfigurationError(problem) from None
        self.engine_options = dict(engine_options or {})
        read_options(self.url, self.engine_options)
        self.connect_seconds = connect_seconds
        self.clock = _aware(clock) if clock is not None else None
        self._patient = False
        self._answer_seconds: float | None = None
        self._made: Engines | None = None
        self._pid = 0
        self._table: tuple[Any, ...] | None = None

    def __repr__(self) -> str:
        return f"<Database {self.address}>"

    @property
    def address(self) -> str:
        """The URL as it may be shown: no user, no password, no query."""
        url = self.url
        shown = URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()
        hosts = url.query.get("host")  # of several servers, or the directory of a socket
        if hosts is None or url.host is not None:
            return shown
        return shown.replace("://", f"://{hosts if isinstance(hosts, str) else ','.join(hosts)}", 1)

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
            engine_options=self.engine_options,
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

        It is also rerun, once, if its connection was lost before the commit, or leads to a server that is read-only.

        Raises `ServiceUnavailable` when the database cannot be used; it says whether the commit may have succeeded.
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
        reconnects = not self._patient and self._answer_seconds is None
        for rerun in range(reruns + 1):
            began = time.monotonic()
            try:
                return attempt()
            except DBAPIError as error:
                if rerun == reruns or not is_conflict(error):
                    raise
                logger.debug("transaction rerun after %s", type(error.orig).__name__)
            except ServiceUnavailable as error:
                # Not after a long wait: the next one might be as long.
                at_once = time.monotonic() - began < self.connect_seconds
                if rerun == reruns or not (reconnects and at_once and _nothing_written(error)):
                    raise
                reconnects = False
                logger.debug("transaction rerun on another connection")
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

    def now_if_shared(self, theirs: Connection) -> datetime | None:
        """Domain time, if a caller's connection, whose URL `may_be_same`, sees our tables in a transaction; else None.

        One statement on that connection.
        """
        if not is_plain(theirs):
            return None
        seen = look(theirs)
        if seen.table is None:
            return None
        if seen.table != self._table:  # not asked yet, or the server was started anew
            with self.read() as connection:
                self._table = look(connection).table
        if seen.table != self._table:
            return None
        return self.clock() if self.clock is not None else seen.machine_now

    def check(self) -> None:
        """Raise `ServiceUnavailable` unless the database answers."""
        with self.read() as connection:
            connection.execute(select(literal(1)))

    @contextmanager
    def _connected(self, *, writes: bool) -> Iterator[Connection]:
        connection = self._connect(self._engines.writes if writes else self._engines.reads)
        with self._reaching(written=False):
            try:
                yield connection
            except BaseException:
                with suppress(DBAPIError):  # of the rollback: the first error says why
                    _close(connection)
                raise
            _close(connection)

    def _connect(self, engine: Engine) -> Connection:
        try:
            return engine.connect()
        except PoolTimeout as error:
            problem = "no free connection in this process's pool: see pool_size, max_overflow"
            raise ServiceUnavailable("database", self.address, problem) from error
        except InvalidRequestError as error:
            raise ServiceUnavailable("database", self.address, "it closes connections as they are opened") from error
        except DBAPIError as error:
            if is_conflict(error):  # SQLite, busy at the first statement
                raise
            away = unavailable(error, self.address, written=False, connecting=True)
            raise (error if away is None else away) from error

    @contextmanager
    def _reaching(self, *, written: bool | None) -> Iterator[None]:
        """Raise `ServiceUnavailable` for an error that says that the database cannot be used.

        `written` is what is then known of a write: None while something that commits is on its way.
        """
        try:
            yield
        except DBAPIError as error:
            away = unavailable(error, self.address, written=written)
            if away is None:
                raise
            raise away from error


def _close(connection: Connection) -> None:
    """Give a connection back to its pool. If its rollback fails, it is dropped, and its place in the pool is free."""
    try:
        connection.close()
    except DBAPIError as error:
        if not (connection.closed or connection.invalidated):
            connection.invalidate(error)
        raise


def _nothing_written(error: ServiceUnavailable) -> bool:
    """Whether the connection was lost with a transaction that was certainly not committed."""
    cause = error.__cause__
    return error.written is False and isinstance(cause, DBAPIError) and cause.connection_invalidated


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
        driver_connection = connection.connection.driver_connection
        gone = dialect.is_disconnect(error, driver_connection, cursor) or leaves_connection(error)  # type: ignore[arg-type]
        wrapped = DBAPIError.instance(
            None, None, error, driver_error, hide_parameters=True, connection_invalidated=gone, dialect=dialect
        )
        if gone:
            # As SQLAlchemy does it: the idle connections are probably gone too, and are replaced when they are wanted.
            connection.engine.pool._invalidate(connection.connection, error)
            connection.invalidate(error)
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
