"""Brings a database's tables to this version of the library.

A new revision is written with `alembic.command.revision(configuration(connection), "...", autogenerate=True)`.
"""

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib.resources import files
from typing import Any, Final

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from dispatcher.errors import ServiceUnavailable, WorkersNotStopped
from dispatcher.states import DeliveryStatus
from dispatcher.storage import ticks
from dispatcher.storage.database import Database
from dispatcher.storage.faults import is_lock_timeout
from dispatcher.storage.migrations.revisions import (
    TABLE_PREFIX,
    VERSION,
    head,
    needs_stopped_workers,
    revision_if_any,
    suffices,
)
from dispatcher.storage.models import DELIVERY

_FRESH: Final = timedelta(minutes=1)
"""A periodic pass that began within this time shows that workers run."""

_LOCK_NAME: Final = "chain_dispatcher_migration"
_MYSQL_LOCK_SECONDS: Final = 25
_LOCK_SECONDS: Final = 30

_alembic_proxies = threading.Lock()  # `alembic.context` and `alembic.op` are one per process


def _is_ours(name: str | None, kind: str, _parents: Any) -> bool:
    return kind != "table" or (name is not None and name.startswith(TABLE_PREFIX))


OPTIONS: Final[dict[str, Any]] = {
    "version_table": VERSION.name,  # the application's own Alembic may live in the same database
    "include_name": _is_ours,  # so that the application's tables are not even read
}
"""The options of every Alembic context here."""


def configuration(connection: Connection | None = None) -> Config:
    """The Alembic configuration of this package, for commands on `connection`; it leaves logging alone."""
    config = Config()
    config.set_main_option("script_location", str(files("dispatcher.storage.migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(database: Database, *, workers_stopped: bool = False) -> str:
    """Create or upgrade the tables; gives the revision of the database afterwards.

    Some revisions need stopped workers (`revisions.STOP_WORKERS`), because programs of the version before must not run
    beside them. If such a revision lies ahead, raises `WorkersNotStopped` unless the caller says `workers_stopped`, and
    also then while an attempt runs (its lease has not ended) or a periodic pass began less than a minute ago, by the
    database's clock. A database without tables needs nothing of this.

    Any number of processes may call this at once: they take turns, and the later ones find nothing to do. A database at
    a newer revision than this version knows is left as it is, without an error. On SQLite and PostgreSQL an upgrade
    that fails changes nothing. Raises `ServiceUnavailable` when the database cannot be reached, when another session
    holds a lock on a table for 30 seconds, or (MySQL) when another process is still upgrading it after 25 seconds.
    """
    with _alembic_proxies, database.patient() as patient, _one_mysql_migrator(patient):
        return patient.write(partial(_upgrade_in_transaction, patient, workers_stopped=workers_stopped))


def _upgrade_in_transaction(database: Database, connection: Connection, *, workers_stopped: bool) -> str:
    """One process at a time upgrades. On SQLite `Database.write` begins IMMEDIATE; PostgreSQL needs this lock."""
    if database.dialect == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(zlib.crc32(_LOCK_NAME.encode()))))
        # While it waits for a table, everybody else waits behind it.
        connection.execute(select(func.set_config("lock_timeout", f"{_LOCK_SECONDS}s", True)))  # noqa: FBT003 - SQL
    found = revision_if_any(connection)
    if found is not None:
        if suffices(found):
            return found
        if needs_stopped_workers(found):
            if not workers_stopped:
                raise WorkersNotStopped(found, head())
            _require_stopped_workers(database, connection, found)
    try:
        command.upgrade(configuration(connection), "head")
    except DBAPIError as error:
        if not is_lock_timeout(error):
            raise
        problem = "another session holds a lock on a table: end it, and upgrade again"
        raise ServiceUnavailable("database", database.address, problem) from error
    return head()


def _require_stopped_workers(database: Database, connection: Connection, found: str) -> None:
    """Raise `WorkersNotStopped` if the rows show that workers run."""
    now = database.machine_now(connection)
    running = select(DELIVERY.c.id, DELIVERY.c.lease_until).where(
        DELIVERY.c.status == DeliveryStatus.RUNNING, DELIVERY.c.finished_at.is_(None), DELIVERY.c.lease_until > now
    )
    attempt = connection.execute(running.order_by(DELIVERY.c.lease_until.desc()).limit(1)).one_or_none()
    if attempt is not None:
        until = f"{attempt.lease_until:%Y-%m-%d %H:%M:%S} UTC"
        raise WorkersNotStopped(found, head(), f"an attempt at delivery {attempt.id} runs, at most until {until}")
    for name, last_at in ticks.read_ticks(connection).items():
        if abs(now - last_at) < _FRESH:  # one further ahead comes of a clock that was wrong
            raise WorkersNotStopped(found, head(), f"the pass {name!r} began at {last_at:%H:%M:%S} UTC")


@contextmanager
def _one_mysql_migrator(database: Database) -> Iterator[None]:
    """One migration at a time on MySQL. A second connection holds the lock, because each DDL statement commits."""
    if database.dialect not in ("mysql", "mariadb"):
        yield
        return
    name = func.concat(f"{_LOCK_NAME}.", func.md5(func.database()))  # a lock is valid for the whole server
    with database.read() as connection:
        if not connection.execute(select(func.get_lock(name, _MYSQL_LOCK_SECONDS))).scalar_one():
            raise ServiceUnavailable("database", database.address, "another process is migrating it")
        try:
            yield
        finally:
            with suppress(DBAPIError):  # a session that is gone has released it
                connection.execute(select(func.release_lock(name)))
