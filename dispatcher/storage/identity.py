"""Whether another connection sees the same tables as the library's own: an application's, when it enqueues on commit.

The URL says a part of it. The server says the rest, because a schema may come from the user, the role, an option or a
`SET search_path`, and because options that no URL shows may lead elsewhere. Where anything is in doubt, it is another
database.
"""

from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, literal_column, select
from sqlalchemy.engine import URL

from dispatcher.storage.clock import clock_plus, host_now
from dispatcher.storage.models import CHAIN

_FAMILIES: Final = {"mariadb": "mysql"}
_PORTS: Final = {"postgresql": 5432, "mysql": 3306}
_PLACES: Final = ("host", "hostaddr", "port", "service", "dbname", "unix_socket", "target_session_attrs")
"""What a URL's query may say about the server."""

_COLUMNS: Final = {
    "postgresql": (
        "current_database()",
        f"to_regclass('{CHAIN.name}')::oid::bigint",
        "extract(epoch FROM pg_postmaster_start_time())::text",
    ),
    "mysql": ("DATABASE()", "@@hostname", "@@port", "@@server_id"),
}
_MAY_WRITE: Final = {
    "postgresql": f"""has_table_privilege(to_regclass('{CHAIN.name}'), 'INSERT')
      AND has_table_privilege(to_regclass('{CHAIN.name}'), 'UPDATE')""",
    "mysql": "TRUE",
}


class Seen(NamedTuple):
    """What a connection sees: which table of chains (None: none, or none that it may write), and the machine's time."""

    table: tuple[Any, ...] | None
    machine_now: datetime


def may_be_same(ours: URL, theirs: URL) -> bool:
    """Whether both URLs lead to the same database by the same way."""
    return _place(ours) == _place(theirs)


def look(connection: Connection) -> Seen:
    """What a connection sees, by one statement."""
    family = _family(connection.dialect.name)
    if family == "sqlite":
        files = connection.exec_driver_sql("PRAGMA database_list").all()
        return Seen(_file(next((file for _, name, file in files if name == "main"), "")), host_now())
    columns: list[ColumnElement[Any]] = [literal_column(column) for column in (*_COLUMNS[family], _MAY_WRITE[family])]
    now, *table, writable = connection.execute(select(clock_plus(0), *columns)).one()
    return Seen(tuple(table) if writable and None not in table else None, now)


def is_plain(connection: Connection) -> bool:
    """Whether a connection has a transaction that our statements can be in, and leaves them as they are."""
    options = connection.get_execution_options()
    if None in (options.get("schema_translate_map") or {}):
        return False
    if connection.dialect.name == "sqlite":  # in its driver's words, an explicit BEGIN is autocommit
        return options.get("isolation_level") != "AUTOCOMMIT"
    try:
        return not connection.dialect.detect_autocommit_setting(connection.connection.dbapi_connection)  # type: ignore[arg-type]
    except NotImplementedError:  # a driver that cannot say it
        return False


def _family(dialect: str) -> str:
    return _FAMILIES.get(dialect, dialect)


def _place(url: URL) -> tuple[Any, ...]:
    family = _family(url.get_backend_name())
    if family == "sqlite":
        return (family, Path(str(url.database)).absolute(), url.query)
    database = url.database or (url.username if family == "postgresql" else None)
    asked = tuple(url.query.get(name) for name in _PLACES)
    return (family, url.host, url.port or _PORTS.get(family), database, *asked)


def _file(path: str) -> tuple[Any, ...] | None:
    """The identity of an SQLite file; None for a database in memory."""
    try:
        found = Path(path).stat() if path else None
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino)
