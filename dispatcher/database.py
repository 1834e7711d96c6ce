"""Engines, transactions, and what differs between databases: clock, pragmas, retries of whole transactions."""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import ColumnElement, Engine, Float, create_engine, event, literal, select
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal

from dispatcher.errors import ConfigurationError, ServiceUnavailable
from dispatcher.models import UtcDateTime

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_RERUNS = 12
_ISOLATION = "READ COMMITTED"
_SQLITE_BUSY_MS = 30_000
_IDLE_SECONDS = 1.0
_DEADLOCK_STATES = {"40001", "40P01"}
_DEADLOCK_CODES = {1205, 1213, 1020}


class clock_plus(ColumnElement[datetime]):
    """The database's own clock, `seconds` later: an SQL expression for machine time."""

    inherit_cache = True
    type = UtcDateTime()
    _traverse_internals = [("seconds", InternalTraversal.dp_clauseelement)]  # noqa: RUF012 - the statement is cached

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = literal(round(float(seconds), 3), Float())


@compiles(clock_plus, "postgresql")
def _postgresql_clock(element: clock_plus, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.seconds, **options)
    return f"(clock_timestamp() + make_interval(secs => CAST({seconds} AS double precision)))"


@compiles(clock_plus, "sqlite")
def _sqlite_clock(element: clock_plus, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.seconds, **options)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {seconds} || ' seconds') || '000')"


@compiles(clock_plus, "mysql")
@compiles(clock_plus, "mariadb")
def _mysql_clock(element: clock_plus, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.seconds, **options)
    return f"TIMESTAMPADD(MICROSECOND, CAST({seconds} * 1000000 AS SIGNED), UTC_TIMESTAMP(6))"


@dataclass(frozen=True, slots=True)
class _Engines:
    """One process's engine, and the same with what reads and writes need. Making those costs more than a query."""

    engine: Engine
    reads: Engine
    writes: Engine


class Database:
    """One database: its engine, made on first use in each process, and its transactions.

    Raises `ConfigurationError` for a URL that names no known database.
    """

    def __init__(self, url: str, *, connect_seconds: float = 5, clock: Callable[[], datetime] | None = None) -> None:
        try:
            self.url: URL = _normal_url(url)
        except (ArgumentError, ValueError):
            # Not `from error`, which may show what it could not parse.
            problem = "the database URL cannot be parsed: quote special characters, as in %40 for an @"
            raise ConfigurationError(problem) from None
        self.connect_seconds = connect_seconds
        self.clock = _aware(clock) if clock is not None else None
        self._made: _Engines | None = None
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
        """This process's engine; a forked child gets its own and leaves its parent's connections alone."""
        return self._engines.engine

    @property
    def _engines(self) -> "_Engines":
        if self._made is None or self._pid != os.getpid():
            if self._made is not None:
                self._made.engine.dispose(close=False)
            self._made, self._pid = self._make_engines(), os.getpid()
        return self._made

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

        Raises `ServiceUnavailable` when the database cannot be reached.
        """

        def attempt() -> Result:
            with self._connected(writes=True) as connection:
                transaction = connection.begin()
                result = work(connection)
                commit(transaction.commit)
                return result

        return self._rerun(attempt)

    def write_statement(self, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
        """The rows of one data-changing statement, which commits by itself: no BEGIN, no COMMIT. Errors as `write`.

        PostgreSQL only: `statement` is in the driver's own words, `%(name)s` for a parameter.
        """

        def attempt() -> list[Any]:
            with self._connected(writes=False) as connection:
                return commit(lambda: run_statement(connection, statement, parameters))

        return self._rerun(attempt)

    def _rerun(self, attempt: Callable[[], Result]) -> Result:
        for rerun in range(_RERUNS + 1):
            try:
                return attempt()
            except DBAPIError as error:
                if rerun == _RERUNS or not is_conflict(error):
                    raise
                logger.debug("transaction rerun after %s", type(error.orig).__name__)
            time.sleep(random.uniform(0, 0.005 * 2 ** min(rerun, 8)))  # noqa: S311 - spreading, not secrecy
        raise AssertionError("unreachable")

    def now(self, connection: Connection) -> datetime:
        """Domain time: the injected clock, else the database's."""
        return self.clock() if self.clock is not None else self.machine_now(connection)

    def domain_now(self, machine_now: datetime | None) -> datetime:
        """Domain time, where the database's clock was read along with something else."""
        if self.clock is not None:
            return self.clock()
        if machine_now is None or self.dialect == "sqlite":  # which would tell this host's time in milliseconds only
            return datetime.now(UTC)
        return machine_now

    def machine_now(self, connection: Connection) -> datetime:
        """The database's clock. SQLite has none of its own, so there it is this host's."""
        if self.dialect == "sqlite":
            return datetime.now(UTC)
        return connection.execute(select(clock_plus(0))).scalar_one()

    def check(self) -> None:
        """Raise `ServiceUnavailable` unless the database answers."""
        with self.read() as connection:
            connection.execute(select(literal(1)))

    @contextmanager
    def _connected(self, *, writes: bool) -> Iterator[Connection]:
        try:
            with (self._engines.writes if writes else self._engines.reads).connect() as connection:
                yield connection
        except PoolTimeout as error:
            raise ServiceUnavailable("database", self.address, "no free connection") from error
        except DBAPIError as error:
            if error.connection_invalidated or (isinstance(error, OperationalError) and _is_unreachable(error)):
                raise ServiceUnavailable("database", self.address, _first_line(error.orig)) from error
            raise

    def _make_engines(self) -> "_Engines":
        engine = self._make_engine()
        reading: dict[str, Any] = {"dispatcher_writes": False}
        writing: dict[str, Any] = {"dispatcher_writes": True}
        if self.dialect == "postgresql":  # its engine is in AUTOCOMMIT, so that a single statement changes nothing here
            writing["isolation_level"] = _ISOLATION
        elif self.dialect != "sqlite":
            reading["isolation_level"] = "AUTOCOMMIT"  # single statements need no BEGIN and no ROLLBACK
        return _Engines(engine, engine.execution_options(**reading), engine.execution_options(**writing))

    def _make_engine(self) -> Engine:
        arguments: dict[str, Any] = {}
        options: dict[str, Any] = {"hide_parameters": True}
        seconds = max(1, round(self.connect_seconds))
        if self.dialect == "sqlite":
            arguments["timeout"] = _SQLITE_BUSY_MS / 1000
            if self.url.database not in (None, "", ":memory:"):
                Path(str(self.url.database)).parent.mkdir(parents=True, exist_ok=True)
        elif self.dialect == "postgresql":
            arguments["connect_timeout"] = max(2, seconds)
            arguments["application_name"] = "chain-dispatcher"
            # A server that vanished without a word is given up: keepalives while waiting, the timeout while sending.
            arguments.update(keepalives_idle=30, keepalives_interval=10, keepalives_count=3, tcp_user_timeout=60_000)
            options.update(isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
        else:
            arguments["connect_timeout"] = seconds
            arguments["read_timeout"] = arguments["write_timeout"] = 30
            if self.url.get_driver_name() == "pymysql" and self.url.password:
                arguments["password"] = self.url.password.encode()  # the driver would encode it as Latin-1
            options["isolation_level"] = _ISOLATION
        if self.dialect != "sqlite":
            options.update(pool_timeout=self.connect_seconds, pool_recycle=1800)
        try:
            engine = create_engine(self.url, connect_args=arguments, **options)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise ConfigurationError(f"no driver for {self.url.drivername!r} is installed: {error}") from error
        if self.dialect == "sqlite":
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        else:
            event.listen(engine, "checkin", _note_use)
            event.listen(engine, "checkout", _ping_idle)
        return engine


def commit(step: Callable[[], Result]) -> Result:
    """What `step()` returns, which commits a writing transaction. (One place for all: fault injection goes here.)"""
    return step()


def run_statement(connection: Connection, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
    """The rows of a statement in the driver's own words, past SQLAlchemy, whose part costs three times the driver's.

    A driver's error is raised as SQLAlchemy's `DBAPIError`, as everywhere.
    """
    dialect = connection.dialect
    driver_error: type[Exception] = dialect.loaded_dbapi.Error
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement, parameters)
        return cast("list[Any]", cursor.fetchall())
    except driver_error as error:
        gone = dialect.is_disconnect(error, connection.connection.driver_connection, cursor)  # type: ignore[arg-type]
        wrapped = DBAPIError.instance(
            None, None, error, driver_error, hide_parameters=True, connection_invalidated=gone, dialect=dialect
        )
        if gone:
            connection.invalidate(error)
        raise wrapped from error
    except BaseException as error:  # in the midst of an answer: nobody may use this connection again
        connection.invalidate(error)
        raise
    finally:
        cursor.close()


def is_conflict(error: DBAPIError) -> bool:
    """Whether rerunning the whole transaction can help: deadlock, serialization failure, busy or locked SQLite."""
    original = error.orig
    if getattr(original, "sqlstate", None) in _DEADLOCK_STATES:
        return True
    if type(original).__module__.startswith("sqlite3"):
        return "locked" in str(original) or "busy" in str(original)
    arguments: tuple[Any, ...] = getattr(original, "args", ())
    return bool(arguments) and arguments[0] in _DEADLOCK_CODES


def _aware(clock: Callable[[], datetime]) -> Callable[[], datetime]:
    """`clock`, which must give aware datetimes: a naive one would be taken for the server's own zone somewhere."""

    def now() -> datetime:
        moment = clock()
        if moment.tzinfo is None:
            raise ValueError("the injected clock gave a naive datetime")
        return moment

    return now


def _normal_url(url: str) -> URL:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" and url.count("@") > 1:
        raise ValueError("unquoted @")  # what follows it would be in errors and logs, as host, database or option
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("mysql", "mariadb"):
        parsed = parsed.set(drivername=f"{parsed.drivername}+pymysql")
    return parsed


def _note_use(_: Any, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = time.monotonic()


def _ping_idle(connection: Any, record: ConnectionPoolEntry, _: Any) -> None:
    """Replace a connection that died while it was idle; one in steady use is not asked each time."""
    if time.monotonic() - record.info.get("used_at", time.monotonic()) < _IDLE_SECONDS:
        return
    try:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()
        connection.rollback()
    except Exception as error:
        raise DisconnectionError from error


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred; ours is chosen in _begin_sqlite
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_SQLITE_BUSY_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("dispatcher_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _is_unreachable(error: OperationalError) -> bool:
    if getattr(error.orig, "sqlstate", None) in (None, "57P03", "57P01", "08006", "08001", "53300", "3D000", "28P01"):
        arguments: tuple[Any, ...] = getattr(error.orig, "args", ())
        code = next(iter(arguments), None)
        if type(error.orig).__module__.startswith("sqlite3"):
            return "unable to open" in str(error.orig)
        return not (isinstance(code, int) and code in _DEADLOCK_CODES | {1146, 1054})
    return False


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
