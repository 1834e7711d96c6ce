"""Machine time: the database's clock, as an SQL expression that is the same everywhere.

Leases, next attempts and what the relay looks at are computed and compared with it inside the statements, so the clocks
of the workers do not matter. SQLite has no clock of its own: there it is this host's.

Tests move it with `shift`, on every database.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Float, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal

from dispatcher.storage.models import UtcDateTime

TOLERANCE: Final = timedelta(seconds=5)
"""A moment of the past that lies further ahead than this is not believed: the clock was wrong when it was written."""

_shifted_by = timedelta(0)


@contextmanager
def shift(by: timedelta) -> Iterator[None]:
    """Move machine time of this process by `by` while the block runs; for tests."""
    global _shifted_by  # noqa: PLW0603 - a clock is one per process
    before = _shifted_by
    _shifted_by = before + by
    try:
        yield
    finally:
        _shifted_by = before


def shifted_seconds() -> float:
    """By how many seconds tests have moved machine time; 0 otherwise."""
    return _shifted_by.total_seconds()


def host_now() -> datetime:
    """This host's clock, as aware UTC: machine time where the database has no clock."""
    return datetime.now(UTC) + _shifted_by


class clock_plus(ColumnElement[datetime]):
    """The database's clock, `seconds` later."""

    inherit_cache = True
    type = UtcDateTime()
    _traverse_internals = [("seconds", InternalTraversal.dp_clauseelement)]  # noqa: RUF012 - the statement is cached

    def __init__(self, seconds: float = 0) -> None:
        rounded = round(float(seconds), 3)
        # Called when the statement is executed: statements are built once, and the clock may be moved later.
        self.seconds = bindparam(None, type_=Float(), callable_=lambda: rounded + shifted_seconds(), unique=True)


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
