"""All that differs between the databases: engines, and how their connections are prepared, checked and left."""

import select
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, Connection, Dialect, ExceptionContext
from sqlalchemy.exc import DisconnectionError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from dispatcher.errors import ConfigurationError
from dispatcher.storage.faults import leaves_connection
from dispatcher.storage.options import Options, read_options

_ISOLATION = "READ COMMITTED"
_SQLITE_BUSY_SECONDS = 30.0
_MYSQL_ANSWER_SECONDS = 30
_MYSQL_IDLE_SECONDS = 10
_MYSQL_IN_TRANSACTION: Final = 1  # SERVER_STATUS_IN_TRANS, which comes with each answer
_IDLE_SECONDS = 1.0
_PREPARE_THRESHOLD: Final = 5  # psycopg's default

# The process id that PgBouncer and its like tell at connect is not the server's, and a session behind them may be
# another one for every transaction: there nothing is set that moments do not need. (The statements and `rows` are right
# in every time zone; psycopg reads moments in ISO's style only, and our literals have backslashes.)
_PREPARE_POSTGRESQL: Final = """
SELECT own, current_setting('server_encoding'), CASE WHEN own THEN set_config('TimeZone', 'UTC', false) END,
  CASE WHEN current_setting('DateStyle') NOT LIKE 'ISO%%' THEN set_config('DateStyle', 'ISO', false) END,
  CASE WHEN current_setting('standard_conforming_strings') <> 'on'
    THEN set_config('standard_conforming_strings', 'on', false) END
FROM (SELECT pg_backend_pid() = %(told)s::bigint AS own) s"""


@dataclass(frozen=True, slots=True)
class Engines:
    """One process's engine, and the same engine with the options for reads and with those for writes.

    All three are kept, because making them takes longer than a query.
    """

    engine: Engine
    reads: Engine
    writes: Engine


def make_engines(
    url: URL,
    *,
    connect_seconds: float,
    patient: bool = False,
    answer_seconds: float | None = None,
    engine_options: Mapping[str, Any] | None = None,
) -> Engines:
    """New engines for a database; nothing is connected yet. `ConfigurationError` where its driver is not installed.

    With `patient` a statement may take any time. With `answer_seconds` each of its waits for the server (SQLite: for
    another writer) ends with an error after that time. These two hold one or two connections, whatever size of the
    pool the options ask for.
    """
    options = read_options(url, engine_options)
    engine = _make_engine(options, connect_seconds, patient=patient, answer_seconds=answer_seconds)
    reading: dict[str, Any] = {"dispatcher_writes": False}
    writing: dict[str, Any] = {"dispatcher_writes": True}
    if url.get_backend_name() == "postgresql":  # its engine is in AUTOCOMMIT, which suits single statements
        writing["isolation_level"] = _ISOLATION
    return Engines(engine, engine.execution_options(**reading), engine.execution_options(**writing))


def _make_engine(asked: Options, connect_seconds: float, *, patient: bool, answer_seconds: float | None) -> Engine:
    url, dialect = asked.url, asked.url.get_backend_name()
    options: dict[str, Any] = {"hide_parameters": True}
    if dialect != "sqlite":
        options.update(pool_timeout=connect_seconds, pool_recycle=1800)
    if patient or answer_seconds is not None:
        options.update({name: value for name, value in asked.engine.items() if name in ("echo", "echo_pool")})
    else:
        options.update(asked.engine)
    usual, fixed = _ARGUMENTS[dialect](url, connect_seconds, patient=patient, answer_seconds=answer_seconds)
    usual = {name: value for name, value in usual.items() if name not in url.query}
    options["connect_args"] = {**usual, **asked.connect, **fixed}
    if dialect == "postgresql":
        options.update(isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
    elif dialect == "sqlite":
        if url.database not in (None, "", ":memory:") and not str(url.database).startswith("file:"):
            Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    else:
        options["skip_autocommit_rollback"] = True
    try:
        engine = create_engine(url, **options)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigurationError(f"no driver for {url.drivername!r} is installed: {error}") from error
    except TypeError as error:
        raise ConfigurationError(str(error), "engine_options") from error
    _listen(engine, asked, patient=patient, answer_seconds=answer_seconds)
    return engine


_Arguments = tuple[dict[str, Any], dict[str, Any]]
"""Arguments of a driver: those that a user may replace, and those that stay."""


def _sqlite_arguments(_url: URL, _: float, *, patient: bool, answer_seconds: float | None) -> _Arguments:
    if answer_seconds is None:
        return {"timeout": _SQLITE_BUSY_SECONDS}, {}
    return {}, {"timeout": answer_seconds}


def _postgresql_arguments(
    _url: URL, connect_seconds: float, *, patient: bool, answer_seconds: float | None
) -> _Arguments:
    timeout = {"connect_timeout": max(2, round(connect_seconds))}
    usual = {
        "application_name": "chain-dispatcher",
        # Give up a server that vanished: keepalives find it while we wait, the timeout while we send.
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
        "prepare_threshold": None,  # until it is known that nobody stands between
    }
    fixed = {"client_encoding": "utf8"}
    return (usual | timeout, fixed) if answer_seconds is None else (usual, fixed | timeout)


def _mysql_arguments(url: URL, connect_seconds: float, *, patient: bool, answer_seconds: float | None) -> _Arguments:
    usual: dict[str, Any] = {"connect_timeout": max(1, round(connect_seconds))}
    # Without a transaction each statement commits by itself; `_begin_mysql` begins those of writes.
    fixed: dict[str, Any] = {"autocommit": True}
    if patient:
        fixed.update(read_timeout=None, write_timeout=None)
    elif answer_seconds is None:
        usual.update(read_timeout=_MYSQL_ANSWER_SECONDS, write_timeout=_MYSQL_ANSWER_SECONDS)
    else:
        seconds = max(1, round(answer_seconds))
        fixed.update(usual, read_timeout=seconds, write_timeout=seconds)
    if url.password:
        fixed["password"] = url.password.encode()  # as bytes, because the driver would encode text as Latin-1
    return usual, fixed


_ARGUMENTS: Final = {
    "sqlite": _sqlite_arguments,
    "postgresql": _postgresql_arguments,
    "mysql": _mysql_arguments,
    "mariadb": _mysql_arguments,
}


def _listen(engine: Engine, asked: Options, *, patient: bool, answer_seconds: float | None) -> None:
    """Prepare the engine's connections when they are made, used and left."""
    dialect = engine.dialect.name
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "handle_error", _leave)
    if dialect == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return
    if dialect == "postgresql":
        if answer_seconds is not None:
            event.listen(engine, "connect", partial(_bound_answers, answer_seconds))
        event.listen(engine, "connect", partial(_prepare_postgresql, "prepare_threshold" in asked.connect))
    else:
        # Before SQLAlchemy's own, which takes the isolation level that it finds for the default.
        event.listen(engine, "connect", partial(_prepare_mysql, patient, answer_seconds), insert=True)
        event.listen(engine, "begin", _begin_mysql)
        engine.dialect.detect_autocommit_setting = _needs_no_rollback  # type: ignore[method-assign, assignment]
    event.listen(engine, "checkin", _note_use)
    event.listen(engine, "checkout", _ping_doubtful)


def _connect(dialect: Dialect, _: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A new connection of the driver. `ConfigurationError` where it knows no such option."""
    try:
        return dialect.connect(*arguments, **options)
    except TypeError as error:
        raise ConfigurationError(f"the driver refuses an option: {error}", "database URL or engine_options") from error
    except dialect.loaded_dbapi.ProgrammingError as error:
        if dialect.name != "postgresql":
            raise
        problem = f"the driver refuses an option: {str(error).strip()}"
        raise ConfigurationError(problem, "database URL or engine_options") from error


def _leave(context: ExceptionContext) -> None:
    """Have SQLAlchemy drop the connection and its pool after an error that makes them useless."""
    if context.connection is not None and leaves_connection(context.original_exception):
        context.is_disconnect = True


def _note_use(_: Any, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = time.monotonic()


def _ping_doubtful(connection: Any, record: ConnectionPoolEntry, _: Any) -> None:
    """Replace a connection that died in the pool. One in steady use, to which nobody has said anything, costs nothing.

    The server says something to a connection that waits only when it ends it, or to tell of a changed setting.
    """
    try:
        if time.monotonic() - record.info.get("used_at", time.monotonic()) < _IDLE_SECONDS and not _is_told(connection):
            return
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()
    except Exception as error:
        raise DisconnectionError from error


def _is_told(connection: Any) -> bool:
    """Whether there is something to read from the server. PyMySQL keeps its socket to itself."""
    place = connection.fileno() if hasattr(connection, "fileno") else connection._sock
    poll = select.poll()
    poll.register(place, select.POLLIN)
    return bool(poll.poll(0))


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


def _prepare_postgresql(threshold_is_given: bool, connection: Any, _: Any) -> None:  # noqa: FBT001 - in a partial
    """Have moments given in UTC and statements prepared, where the session is the connection's own."""
    autocommit = connection.autocommit
    connection.autocommit = True  # a transaction that is rolled back would take the settings back
    own, encoding, *_settings = connection.execute(
        _PREPARE_POSTGRESQL, {"told": connection.info.backend_pid}
    ).fetchone()
    connection.autocommit = autocommit
    if encoding != "UTF8":
        connection.close()
        raise ConfigurationError(
            f"its encoding is {encoding}, which cannot hold every text: create it as UTF8", "database"
        )
    if own and not threshold_is_given:
        connection.prepare_threshold = _PREPARE_THRESHOLD


def _bound_answers(seconds: float, connection: Any, _: Any) -> None:
    """End each wait of a psycopg connection for its server after `seconds`. The connection cannot be used after that.

    A timeout of the server does not end a wait for a connection that swallows everything.
    """
    connection.wait = partial(connection.wait, timeout=seconds)


# --- MySQL and MariaDB -----------------------------------------------------------------------------------------------


def _prepare_mysql(patient: bool, answer_seconds: float | None, connection: Any, _: Any) -> None:  # noqa: FBT001
    cursor = connection.cursor()
    cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
    if patient:  # but not for a table that a forgotten session holds
        cursor.execute("SET SESSION lock_wait_timeout = %s", [_MYSQL_ANSWER_SECONDS])
    if answer_seconds is not None:
        # A connection that was given up in a transaction, and whose end the server cannot see, keeps its locks.
        cursor.execute("SET SESSION wait_timeout = %s", [_MYSQL_IDLE_SECONDS])
    cursor.close()


def _begin_mysql(connection: Connection) -> None:
    if connection.get_execution_options().get("dispatcher_writes", True):
        connection.exec_driver_sql("START TRANSACTION")


def _needs_no_rollback(connection: Any) -> bool:
    """Whether a PyMySQL connection is in no transaction. SQLAlchemy asks before it sends ROLLBACK."""
    return bool(connection.get_autocommit()) and not connection.server_status & _MYSQL_IN_TRANSACTION


# --- SQLite ----------------------------------------------------------------------------------------------------------


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's BEGIN is deferred; _begin_sqlite chooses ours
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("dispatcher_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
