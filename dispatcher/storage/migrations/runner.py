"""Brings a database's tables to this version of the library, and says whether they are there.

A new revision is written with `alembic.command.revision(configuration(connection), "...", autogenerate=True)`.
"""

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.resources import files
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Connection, MetaData, String, Table, func, inspect, select
from sqlalchemy.exc import OperationalError, ProgrammingError

from dispatcher.errors import DatabaseNotMigrated, ServiceUnavailable
from dispatcher.storage.database import Database
from dispatcher.storage.dialects import is_conflict

_TABLE_PREFIX: Final = "chain_dispatcher_"
_LOCK_NAME: Final = "chain_dispatcher_migration"
_MYSQL_LOCK_SECONDS: Final = 25  # below the read timeout of a MySQL connection

_VERSION = Table(f"{_TABLE_PREFIX}alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))

_alembic_proxies = threading.Lock()  # `alembic.context` and `alembic.op` are one per process


def _is_ours(name: str | None, kind: str, _parents: Any) -> bool:
    return kind != "table" or (name is not None and name.startswith(_TABLE_PREFIX))


OPTIONS: Final[dict[str, Any]] = {
    "version_table": _VERSION.name,  # the application's own Alembic may live in the same database
    "include_name": _is_ours,  # filters what is read from the database, so no foreign table is even looked at
}
"""What every Alembic context here is configured with."""


def configuration(connection: Connection | None = None) -> Config:
    """The Alembic configuration of this package, for commands on `connection`; it leaves logging alone."""
    config = Config()
    config.set_main_option("script_location", str(files("dispatcher.storage.migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def head() -> str:
    """The revision that this version of the library needs."""
    return _revisions()[0]


def current(database: Database) -> str | None:
    """The revision that the database is at; None when it has no tables of ours. One query when it has.

    Raises `ServiceUnavailable` when the database cannot be reached.
    """
    try:
        with database.read() as connection:
            return _revision(connection)
    except (OperationalError, ProgrammingError):
        with database.read() as connection:
            return _revision_if_any(connection)


def upgrade(database: Database) -> str:
    """Create or upgrade the tables; the revision that the database is at afterwards.

    Safe to run from any number of processes at once: they take turns, and the later ones find nothing to do. A
    database at a newer revision than this version knows is left as it is. On SQLite and PostgreSQL it happens as a
    whole or not at all. Raises `ServiceUnavailable` when the database cannot be reached.
    """
    with _alembic_proxies, _one_mysql_migrator(database):
        return database.write(partial(_upgrade_in_transaction, database.dialect))


def require_current(database: Database) -> None:
    """Raise `DatabaseNotMigrated` unless the tables are as new as this version needs; SQLite ones are upgraded instead.

    One query when all is well. A revision that this version does not know is accepted as a newer one: during a
    deployment old workers run on the new tables, and a migration therefore either expands (adds what old code does
    not mind) or, a release later, contracts (drops what no running code uses any more), never both.
    """
    try:
        found = current(database)
    except OperationalError as error:
        # SQLite refuses, whatever the timeout, to switch a new file to WAL while another process does just that.
        if database.dialect != "sqlite" or not is_conflict(error):
            raise
        found = None
    if _suffices(found):
        return
    if database.dialect != "sqlite":
        raise DatabaseNotMigrated(found, head())
    upgrade(database)


@cache
def _revisions() -> tuple[str, ...]:
    """All revisions known here, newest first."""
    return tuple(script.revision for script in ScriptDirectory.from_config(configuration()).walk_revisions())


def _suffices(found: str | None) -> bool:
    return found is not None and (found == head() or found not in _revisions())


def _revision(connection: Connection) -> str | None:
    return connection.execute(select(_VERSION.c.version_num)).scalars().first()


def _revision_if_any(connection: Connection) -> str | None:
    return _revision(connection) if inspect(connection).has_table(_VERSION.name) else None


def _upgrade_in_transaction(dialect: str, connection: Connection) -> str:
    """`Database.write` begins IMMEDIATE on SQLite, so one process is in here at a time; PostgreSQL needs a lock."""
    if dialect == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(zlib.crc32(_LOCK_NAME.encode()))))
    found = _revision_if_any(connection)
    if found is not None and _suffices(found):
        return found
    command.upgrade(configuration(connection), "head")
    return head()


@contextmanager
def _one_mysql_migrator(database: Database) -> Iterator[None]:
    """On MySQL DDL commits, so the lock is held by a second connection, until the last commit is through."""
    if database.dialect not in ("mysql", "mariadb"):
        yield
        return
    name = func.concat(f"{_LOCK_NAME}.", func.md5(func.database()))  # such locks belong to the server
    with database.read() as connection:
        if not connection.execute(select(func.get_lock(name, _MYSQL_LOCK_SECONDS))).scalar_one():
            raise ServiceUnavailable("database", database.address, "another process is migrating it")
        try:
            yield
        finally:
            connection.execute(select(func.release_lock(name)))
