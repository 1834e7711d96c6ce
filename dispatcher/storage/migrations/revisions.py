"""At which revision the tables are, and at which they must be. It needs no Alembic, which takes long to load."""

from typing import Final

from sqlalchemy import Column, Connection, MetaData, String, Table, inspect, select
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from dispatcher.errors import DatabaseNotMigrated
from dispatcher.storage.database import Database
from dispatcher.storage.faults import is_conflict

REVISIONS: Final = ("0003", "0002", "0001")
"""All revisions known here, newest first."""

STOP_WORKERS: Final = frozenset({"0002"})
"""The revisions beside which programs of the version before must not run. (Beside all others they may.)"""

TABLE_PREFIX: Final = "chain_dispatcher_"

VERSION: Final = Table(
    f"{TABLE_PREFIX}alembic_version", MetaData(), Column("version_num", String(32), primary_key=True)
)
"""Alembic's table of ours: the application's own Alembic may live in the same database."""


def head() -> str:
    """The revision that this version of the library needs."""
    return REVISIONS[0]


def current(database: Database) -> str | None:
    """The revision that the database is at; None when it has no tables of ours. One query when it has.

    Raises `ServiceUnavailable` when the database cannot be reached.
    """
    try:
        with database.read() as connection:
            return _revision(connection)
    except (OperationalError, ProgrammingError):
        with database.read() as connection:
            return revision_if_any(connection)


class Migrated:
    """Remembers, for one database, that its tables are there."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known = False

    def require(self) -> None:
        """As `require_current`; after the first success without a query."""
        if not self._known:
            require_current(self._database)
            self._known = True


def require_current(database: Database) -> None:
    """Raise `DatabaseNotMigrated` unless the tables are as new as this version needs; SQLite ones are upgraded instead.

    One query when all is well. A revision that this version does not know is accepted, because it is newer. During a
    deployment old workers run on the new tables, except where `STOP_WORKERS` says otherwise. A migration therefore
    either expands (it adds what old code ignores) or, a release later, contracts (it drops what no running code uses
    any more), never both.

    An SQLite file with rows is never upgraded under running workers: where stopped workers are needed, it is upgraded
    only if no attempt runs and no periodic pass began within the last minute. Otherwise raises `WorkersNotStopped`.
    """
    try:
        found = current(database)
    except DBAPIError as error:
        # SQLite refuses, whatever the timeout, to switch a new file to WAL while another process does just that.
        if database.dialect != "sqlite" or not is_conflict(error):
            raise
        found = None
    if suffices(found):
        return
    if database.dialect != "sqlite":
        raise DatabaseNotMigrated(found, head())
    from dispatcher.storage.migrations.runner import upgrade  # noqa: PLC0415 - Alembic, which is needed only here

    upgrade(database, workers_stopped=True)  # it raises if the rows show that workers run


def needs_stopped_workers(found: str) -> bool:
    """Whether a revision that is newer than `found` and known here needs stopped workers."""
    newer = REVISIONS[: REVISIONS.index(found)] if found in REVISIONS else ()
    return not STOP_WORKERS.isdisjoint(newer)


def suffices(found: str | None) -> bool:
    """Whether this version can work on tables of that revision; a revision that it does not know is a newer one."""
    return found is not None and (found == head() or found not in REVISIONS)


def revision_if_any(connection: Connection) -> str | None:
    """The revision that the database is at, where the table that says so may be missing."""
    return _revision(connection) if inspect(connection).has_table(VERSION.name) else None


def _revision(connection: Connection) -> str | None:
    return connection.execute(select(VERSION.c.version_num)).scalars().first()
