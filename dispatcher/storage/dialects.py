"""All that differs between the databases: engines, the clock in SQL, which errors mean what."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from dispatcher.errors import ConfigurationError

_ISOLATION = "READ COMMITTED"
_SQLITE_BUSY_MS = 30_000
_MYSQL_ANSWER_SECONDS = 30
_MYSQL_IDLE_SECONDS = 10
_IDLE_SECONDS = 1.0
_DEADLOCK_STATES = {"40001", "40P01"}
_DEADLOCK_CODES = {1205, 1213, 1020}


@dataclass(frozen=True, slots=True)
class Engines:
    """One process's engine, and the same engine with the options for reads and with those for writes.

    All three are kept, because making them takes longer than a query.
    """

    engine: Engine
    reads: Engine
    writes: Engine


def make_engines(
    url: URL, *, connect_seconds: float, patient: bool = False, answer_seconds: float | None = None
) -> Engines:
    """New engines for a database; nothing is connected yet. `ConfigurationError` where its driver is not installed.

    With `patient` a statement may take any time. With `answer_seconds` each of its waits for the server (SQLite: for
    another writer) ends with an error after that time.
    """
    engine = _make_engine(url, connect_seconds, patient=patient, answer_seconds=answer_seconds)
    reading: dict[str, Any] = {"dispatcher_writes": False}
    writing: dict[str, Any] = {"dispatcher_writes": True}
    dialect = url.get_backend_name()
    if dialect == "postgresql":  # its engine is in AUTOCOMMIT already, which suits single statements
        writing["isolation_level"] = _ISOLATION
    elif dialect != "sqlite":
        reading["isolation_level"] = "AUTOCOMMIT"  # single statements need no BEGIN and no ROLLBACK
    return Engines(engine, engine.execution_options(**reading), engine.execution_options(**writing))


def _make_engine(url: URL, connect_seconds: float, *, patient: bool, answer_seconds: float | None) -> Engine:
    dialect = url.get_backend_name()
    arguments: dict[str, Any] = {}
    options: dict[str, Any] = {"hide_parameters": True}
    seconds = max(1, round(connect_seconds))
    if dialect == "sqlite":
        arguments["timeout"] = _SQLITE_BUSY_MS / 1000
        if url.database not in (None, "", ":memory:"):
            Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    elif dialect == "postgresql":
        arguments["connect_timeout"] = max(2, seconds)
        arguments["application_name"] = "chain-dispatcher"
        # Give up a server that vanished: keepalives find it while we wait, the timeout while we send.
        arguments.update(keepalives_idle=30, keepalives_interval=10, keepalives_count=3, tcp_user_timeout=60_000)
        options.update(isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
    else:
        arguments["connect_timeout"] = seconds
        if patient:  # but not for a table that a forgotten session holds
            arguments["init_command"] = f"SET SESSION lock_wait_timeout = {_MYSQL_ANSWER_SECONDS}"
        else:
            seconds = _MYSQL_ANSWER_SECONDS if answer_seconds is None else max(1, round(answer_seconds))
            arguments["read_timeout"] = arguments["write_timeout"] = seconds
            if answer_seconds is not None:
                # A connection that was given up in a transaction, and whose end the server cannot see, keeps its locks.
                arguments["init_command"] = f"SET SESSION wait_timeout = {_MYSQL_IDLE_SECONDS}"
        if url.get_driver_name() == "pymysql" and url.password:
            arguments["password"] = url.password.encode()  # as bytes, because the driver would encode text as Latin-1
        options["isolation_level"] = _ISOLATION
    if dialect != "sqlite":
        options.update(pool_timeout=connect_seconds, pool_recycle=1800)
    try:
        engine = create_engine(url, connect_args=arguments, **options)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigurationError(f"no driver for {url.drivername!r} is installed: {error}") from error
    _listen(engine, dialect, answer_seconds)
    return engine


def _listen(engine: Engine, dialect: str, answer_seconds: float | None) -> None:
    """Prepare the engine's connections when they are made and used."""
    if dialect == "sqlite":
        busy_ms = _SQLITE_BUSY_MS if answer_seconds is None else round(answer_seconds * 1000)
        event.listen(engine, "connect", partial(_prepare_sqlite, busy_ms))
        event.listen(engine, "begin", _begin_sqlite)
    else:
        if dialect == "postgresql":
            if answer_seconds is not None:
                event.listen(engine, "connect", partial(_bound_answers, answer_seconds))
            event.listen(engine, "connect", _use_utc)
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", _ping_idle)


def normal_url(url: str) -> URL:
    """`url` with the name of its driver. Raises `ArgumentError` or `ValueError` if it cannot be parsed safely."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" and url.count("@") > 1:
        # The rest of the password would be read as host or database, and be logged.
        raise ValueError("unquoted @")
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("mysql", "mariadb"):
        parsed = parsed.set(drivername=f"{parsed.drivername}+pymysql")
    return parsed


def is_conflict(error: DBAPIError) -> bool:
    """Whether rerunning the whole transaction can help: deadlock, serialization failure, busy or locked SQLite."""
    original = error.orig
    if getattr(original, "sqlstate", None) in _DEADLOCK_STATES:
        return True
    if type(original).__module__.startswith("sqlite3"):
        return "locked" in str(original) or "busy" in str(original)
    arguments: tuple[Any, ...] = getattr(original, "args", ())
    return bool(arguments) and arguments[0] in _DEADLOCK_CODES


def is_lock_timeout(error: DBAPIError) -> bool:
    """Whether a statement has waited too long for a lock of another session."""
    arguments: tuple[Any, ...] = getattr(error.orig, "args", ())
    return getattr(error.orig, "sqlstate", None) == "55P03" or (bool(arguments) and arguments[0] == 1205)  # noqa: PLR2004


def is_unreachable(error: OperationalError) -> bool:
    """Whether the error says that the database cannot be reached."""
    if getattr(error.orig, "sqlstate", None) in (None, "57P03", "57P01", "08006", "08001", "53300", "3D000", "28P01"):
        arguments: tuple[Any, ...] = getattr(error.orig, "args", ())
        code = next(iter(arguments), None)
        if type(error.orig).__module__.startswith("sqlite3"):
            return "unable to open" in str(error.orig)
        return not (isinstance(code, int) and code in _DEADLOCK_CODES | {1146, 1054})
    return False


def first_line(error: BaseException | None) -> str:
    """The first line of an error's text, at most 200 characters; the name of the error's type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _note_use(_: Any, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = time.monotonic()


def _ping_idle(connection: Any, record: ConnectionPoolEntry, _: Any) -> None:
    """Replace a connection that died while it was idle; a connection in steady use is not checked each time."""
    if time.monotonic() - record.info.get("used_at", time.monotonic()) < _IDLE_SECONDS:
        return
    try:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()
        connection.rollback()
    except Exception as error:
        raise DisconnectionError from error


def _use_utc(connection: Any, _: Any) -> None:
    """Have moments given in UTC, whatever the time zone of the server, the database and the role."""
    autocommit = connection.autocommit
    connection.autocommit = True  # a transaction that is rolled back would take the setting back
    cursor = connection.cursor()
    cursor.execute("SET TIME ZONE 'UTC'")
    cursor.close()
    connection.autocommit = autocommit


def _bound_answers(seconds: float, connection: Any, _: Any) -> None:
    """End each wait of a psycopg connection for its server after `seconds`. The connection cannot be used after that.

    A timeout of the server does not end a wait for a connection that swallows everything.
    """
    connection.wait = partial(connection.wait, timeout=seconds)


def _prepare_sqlite(busy_ms: int, connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's BEGIN is deferred; _begin_sqlite chooses ours
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {busy_ms}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("dispatcher_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
