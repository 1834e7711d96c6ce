"""The periodic passes' turns, and where a pass stopped, as rows. On the caller's connection; nothing here commits."""

from datetime import datetime
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.engine import Connection

from dispatcher.storage.models import TickRow
from dispatcher.storage.statements import insert_or_ignore, one_row


def claim_tick(connection: Connection, name: str, *, machine_now: datetime, not_after: datetime) -> bool:
    """Claim a periodic pass: True for the first caller, False when another caller has claimed it after `not_after`."""
    connection.execute(insert_or_ignore(connection, TickRow).values(name=name))
    done = connection.execute(
        update(TickRow)
        .where(TickRow.name == name, or_(TickRow.last_at.is_(None), TickRow.last_at <= not_after))
        .values(last_at=machine_now)
    )
    return one_row(done)


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
