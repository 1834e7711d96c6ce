"""What a pause of a chain type parks, and what its end frees, in pages.

On the caller's connection; nothing here commits. All pending deliveries are walked in the order of their ids, because
no index knows the chain type of a delivery.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, TypeAlias

from sqlalchemy import ColumnElement, Row, and_, case, func, select, update
from sqlalchemy.engine import Connection

from dispatcher.domain.records import DuePosition
from dispatcher.states import DeliveryStatus, WaitsFor
from dispatcher.storage import chains, overdue, ticks
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.models import CHAIN, DELIVERY, TickRow
from dispatcher.storage.statements import at_once, insert_or_ignore, is_due, unless_parked, wait_reason

FIRST_ID: Final = "00000000-0000-0000-0000-000000000000"
"""Below the id of every delivery."""

_TOLERANCE: Final = 5.0

Note: TypeAlias = list[Any]
"""What is noted of the end of a pause, as JSON: the moment at which its time ends, and its length in seconds."""


class Notes(StrEnum):
    """What is noted, each in a row of the ticks: `{chain type: note}`."""

    RESUMES = "dispatcher.resume"
    """Parked deliveries are to be freed; until they are. Machine time."""

    SPREADS = "dispatcher.spread"
    """Due chains are being made due again over a time; until it is over. Domain time."""


# --- deliveries ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PendingPage:
    """One page of the pending deliveries of all types: those that were asked for, and where the next page begins."""

    ids: list[str]
    next_after: str | None


def to_park(connection: Connection, type_name: str, *, after: str, limit: int) -> PendingPage:
    """Of the next `limit` pending deliveries those of a type that do not wait for the end of its pause yet."""
    return _page(connection, type_name, after=after, limit=limit, parked=False)


def parked(connection: Connection, type_name: str, *, after: str, limit: int) -> PendingPage:
    """Of the next `limit` pending deliveries those of a type that wait for the end of its pause."""
    return _page(connection, type_name, after=after, limit=limit, parked=True)


def _page(connection: Connection, type_name: str, *, after: str, limit: int, parked: bool) -> PendingPage:
    rows = connection.execute(
        select(DELIVERY.c.id, DELIVERY.c.waits_for, CHAIN.c.chain_type)
        .outerjoin(CHAIN, CHAIN.c.id == DELIVERY.c.chain_id)
        .where(DELIVERY.c.status == DeliveryStatus.PENDING, DELIVERY.c.finished_at.is_(None), DELIVERY.c.id > after)
        .order_by(DELIVERY.c.id)
        .limit(limit)
    ).all()
    ids = [row.id for row in rows if row.chain_type == type_name and (row.waits_for == WaitsFor.PAUSED) == parked]
    return PendingPage(ids, rows[-1].id if len(rows) == limit else None)


def park(connection: Connection, delivery_ids: Sequence[str]) -> None:
    """Park those of these deliveries that are pending, while their chain type is paused."""
    pending = DELIVERY.c.status == DeliveryStatus.PENDING
    ids = [row.id for row in _lock(connection, delivery_ids, pending)]
    if ids:
        connection.execute(
            update(DELIVERY)
            .where(DELIVERY.c.id.in_(ids))
            .values(
                publish_after=unless_parked(DELIVERY.c.publish_after),
                waits_since=clock_plus(0),
                **wait_reason(DELIVERY.c.waits_for, reason=DELIVERY.c.waits_reason),
            )
        )


def free(connection: Connection, delivery_ids: Sequence[str], *, seconds: float) -> int:
    """Show those of these deliveries that wait for the end of a pause to the relay again, in `seconds`.

    The rest of a longer wait is kept, such as the time between two attempts. The delivery of a disabled chain stays
    parked, and so does that of a type that is paused again. Those whose chain somebody else has locked are left out,
    because an application may hold it for long; gives how many.
    """
    waits = and_(DELIVERY.c.status == DeliveryStatus.PENDING, DELIVERY.c.waits_for == WaitsFor.PAUSED)
    rows = _lock(connection, delivery_ids, waits)
    locked = overdue.lock_chains(connection, [row.chain_id for row in rows]) if rows else set()
    ids = [row.id for row in rows if row.chain_id in locked]
    if ids:
        moment = clock_plus(seconds)
        later = case((DELIVERY.c.next_attempt_at > moment, DELIVERY.c.next_attempt_at), else_=moment)
        connection.execute(
            update(DELIVERY)
            .where(DELIVERY.c.id.in_(ids))
            .values(
                next_attempt_at=later,
                publish_after=unless_parked(later),
                waits_since=clock_plus(0),
                **wait_reason(None),
            )
        )
    return len(rows) - len(ids)


def _lock(connection: Connection, delivery_ids: Sequence[str], guard: ColumnElement[bool]) -> Sequence[Row[Any, Any]]:
    """Id and chain of those of these deliveries for which the guard is true, locked in the order of their ids."""
    query = select(DELIVERY.c.id, DELIVERY.c.chain_id).where(DELIVERY.c.id.in_(delivery_ids), guard)
    return connection.execute(query.order_by(DELIVERY.c.id).with_for_update()).all()


# --- due chains ------------------------------------------------------------------------------------------------------


def count_due(connection: Connection, type_name: str, *, now: datetime) -> int:
    """How many chains of a type are due."""
    query = select(func.count()).select_from(CHAIN).where(CHAIN.c.chain_type == type_name, is_due(now))
    return int(connection.execute(query).scalar_one())


def spread_due(
    connection: Connection, type_name: str, *, now: datetime, after: DuePosition | None, limit: int, due_at: datetime
) -> DuePosition | None:
    """Make the next `limit` chains of a type that are due at `now` due at `due_at` instead; where the next page begins.

    Chains that have changed meanwhile stay due: those that were enqueued, or that somebody else has locked, because an
    application may hold a chain for long. Those that have got a delivery or are disabled are left, too.
    """
    page = chains.due_page(connection, type_name=type_name, now=now, after=after, limit=limit)
    if not page:
        return None
    query = select(CHAIN.c.id).where(CHAIN.c.id.in_([position.chain_id for position in page]), is_due(now))
    ids = connection.execute(query.order_by(CHAIN.c.id).with_for_update(skip_locked=True)).scalars().all()
    if ids:
        connection.execute(update(CHAIN).where(CHAIN.c.id.in_(ids)).values(due_at=at_once(due_at), updated_at=now))
    return page[-1]


# --- notes -----------------------------------------------------------------------------------------------------------


def write_note(connection: Connection, notes: Notes, type_name: str, *, until: datetime, seconds: float) -> Note:
    """Note the end of a pause. A newer note of a type takes the place of its older one."""
    note: Note = [until.isoformat(), seconds]
    _change(connection, notes, lambda found: {**found, type_name: note})
    return note


def remove_notes(connection: Connection, notes: Notes, old: Mapping[str, Note]) -> None:
    """Remove these notes of chain types, unless newer ones have taken their place."""
    _change(connection, notes, lambda found: {name: note for name, note in found.items() if old.get(name) != note})


def read_notes(connection: Connection, notes: Notes) -> dict[str, Note]:
    """`{chain type: note}`."""
    return ticks.read_position(connection, notes)


def spreading_types(connection: Connection, *, now: datetime) -> set[str]:
    """The chain types whose due chains are being made due over a time that is not over yet."""
    return {name for name, note in read_notes(connection, Notes.SPREADS).items() if seconds_left(note, now) > 0}


def seconds_left(note: Note, now: datetime) -> float:
    """How many seconds of a note's time are left.

    If more are left than it had, a clock was wrong when it was written or is wrong now: then none are left.
    """
    left = (datetime.fromisoformat(note[0]) - now).total_seconds()
    return max(left, 0.0) if left <= note[1] + _TOLERANCE else 0.0


def _change(connection: Connection, notes: Notes, change: Callable[[dict[str, Note]], dict[str, Note]]) -> None:
    query = select(TickRow.position).where(TickRow.name == notes).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        connection.execute(insert_or_ignore(connection, TickRow).values(name=notes))
        row = connection.execute(query).one()
    before = row.position or {}
    after = change(before)
    if after != before:
        ticks.write_position(connection, notes, after)
