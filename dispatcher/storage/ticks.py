"""The periodic passes' turns, and where a pass stopped, as rows. On the caller's connection; nothing here commits."""

from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import or_, select, update
from sqlalchemy.engine import Connection

from dispatcher.storage.clock import TOLERANCE
from dispatcher.storage.models import TickRow
from dispatcher.storage.statements import insert_or_ignore, one_row

_EARLY: Final = 0.9
"""A pass may begin after this share of its interval, because beats are not exact."""


def claim_tick(connection: Connection, name: str, *, machine_now: datetime, interval: timedelta) -> bool:
    """Claim a periodic pass: True for the first caller in each interval, False for all others.

    A claim that lies more than an interval ahead is not believed: the database's clock was wrong when it was made.
    """
    connection.execute(insert_or_ignore(connection, TickRow).values(name=name))
    is_over = or_(
        TickRow.last_at.is_(None),
        TickRow.last_at <= machine_now - interval * _EARLY,
        TickRow.last_at > machine_now + interval,
    )
    done = connection.execute(update(TickRow).where(TickRow.name == name, is_over).values(last_at=machine_now))
    return one_row(done)


def ahead(last_ticks: dict[str, datetime], machine_now: datetime) -> dict[str, datetime]:
    """Those of these ticks that lie in the future, although they say when a pass last began."""
    return {name: last_at for name, last_at in last_ticks.items() if last_at > machine_now + TOLERANCE}


def forget(connection: Connection, name: str, *, machine_now: datetime) -> None:
    """Let a periodic pass begin at once if its tick lies in the future."""
    is_ahead = TickRow.last_at > machine_now + TOLERANCE
    connection.execute(update(TickRow).where(TickRow.name == name, is_ahead).values(last_at=None))


def read_ticks(connection: Connection) -> dict[str, datetime]:
    """When each periodic pass last began, by the database's clock."""
    rows = connection.execute(select(TickRow.name, TickRow.last_at))
    return {name: last_at for name, last_at in rows if last_at is not None}


def read_position(connection: Connection, name: str) -> dict[str, Any]:
    """Where a periodic pass stopped; empty when it starts from the beginning."""
    position: dict[str, Any] | None = connection.execute(
        select(TickRow.position).where(TickRow.name == name)
    ).scalar_one_or_none()
    return position or {}


def write_position(connection: Connection, name: str, position: dict[str, Any] | None) -> None:
    """Remember where a periodic pass stopped."""
    connection.execute(insert_or_ignore(connection, TickRow).values(name=name))
    connection.execute(update(TickRow).where(TickRow.name == name).values(position=position or None))
