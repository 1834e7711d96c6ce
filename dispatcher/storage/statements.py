"""Pieces of statements that several modules here use: guards, moments, inserts of many rows."""

import os
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

from sqlalchemy import ColumnElement, Insert, Table, and_, case, false, insert, literal, null, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import Connection

from dispatcher.domain.records import DeliveryRecord
from dispatcher.states import NEW, DeliveryStatus, WaitsFor
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.models import CHAIN, DELIVERY, TYPE, Base

Key = TypeVar("Key", bound=Hashable)


Item = TypeVar("Item")


def insert_or_ignore(connection: Connection, table: Table | type[Base]) -> Insert:
    """An INSERT that leaves an existing row with the same unique key alone."""
    dialect = connection.dialect.name
    if dialect == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    if dialect == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    return mysql.insert(table).prefix_with("IGNORE")


def insert_many(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], **common: Any) -> None:
    """Insert rows in as few statements as the database allows; all rows get the values in `common`."""
    if not rows:
        return
    statement = insert(table).values(**common) if common else insert(table)
    if connection.dialect.insert_returning:  # with RETURNING, SQLAlchemy sends many rows in one statement
        statement = statement.returning(next(iter(table.primary_key.columns)))
    connection.execute(statement, list(rows))


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items grouped by `key(item)`; each group keeps their order."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def one_row(result: Any) -> bool:
    """Whether a guarded write has changed its row, so that the guard was true."""
    return bool(result.rowcount == 1)


def unless_disabled(due_at: datetime | None) -> Any:
    """`due_at`, or NULL for a disabled chain, which becomes due when it is enabled."""
    return None if due_at is None else case((~CHAIN.c.disabled, literal(due_at, CHAIN.c.due_at.type)))


def new_chain(type_name: str, *, due_at: datetime | None, now: datetime) -> dict[str, Any]:
    """The columns that all new chains of a type have in common."""
    return {
        "chain_type": type_name,
        "state": NEW,
        "due_at": due_at,
        "created_at": now,
        "updated_at": now,
        "started_at": now,
        "entered_at": now,
    }


def moved_values(
    state: str, *, next_update_at: datetime | None, due_at: datetime | None, now: datetime, request: Any
) -> dict[str, Any]:
    """The columns of a chain that moves to `state`; `request` is what becomes of its waiting request."""
    return {
        "state": state,
        "version": CHAIN.c.version + 1,
        "moves": CHAIN.c.moves + 1,
        "pending_delivery_id": None,
        "failures": 0,
        "next_update_at": next_update_at,
        "due_at": unless_disabled(due_at),
        "request": request,
        "updated_at": now,
        "entered_at": now,
    }


def wait_times(seconds: float, *, grace_seconds: float = 0) -> dict[str, Any]:
    """The columns of a pending delivery whose next attempt may begin in `seconds`, by the database's clock.

    If it has not begun `grace_seconds` later, its message counts as lost.
    """
    return {
        "next_attempt_at": clock_plus(seconds),
        "publish_after": unless_parked(clock_plus(seconds + grace_seconds)),
        "waits_since": clock_plus(0),
        "lease_until": None,
    }


NO_WAIT: Final[Mapping[str, Any]] = {"waits_for": None, "waits_reason": None, "has_place": False}
"""The columns of a delivery that waits for nothing."""

PAUSED_REASON: Final = "its chain type is paused"


def wait_reason(what: Any, *, reason: Any = None, has_place: Any = False) -> dict[str, Any]:
    """The columns that say what a pending delivery waits for: a `WaitsFor`, or None: only for a worker.

    While its chain type is paused, it waits for that, whatever else it waits for.
    """
    if what is WaitsFor.PAUSED:
        paused_reason, what, reason = reason, None, None
    else:
        paused_reason = PAUSED_REASON
    columns = DELIVERY.c
    return {
        "waits_for": case(
            (_is_paused(), literal(str(WaitsFor.PAUSED), columns.waits_for.type)), else_=_value(what, columns.waits_for)
        ),
        "waits_reason": case(
            (_is_paused(), literal(paused_reason, columns.waits_reason.type)),
            else_=_value(reason, columns.waits_reason),
        ),
        "has_place": has_place,
    }


def _value(value: Any, column: Any) -> ColumnElement[Any]:
    """A column as it is, or a literal of another's type."""
    if isinstance(value, ColumnElement):
        return value
    return null() if value is None else literal(str(value), column.type)


def leased(seconds: float) -> dict[str, Any]:
    """The columns of a running delivery whose lease ends in `seconds`, by the database's clock."""
    return {
        "lease_until": clock_plus(seconds),
        "publish_after": clock_plus(seconds),
        "waits_since": clock_plus(0),
        "lapse_seen_at": None,
    }


def at_once(now: datetime) -> ColumnElement[Any]:
    """`now`, or the end of the chain's rest if that is later."""
    return case((CHAIN.c.next_update_at > now, CHAIN.c.next_update_at), else_=literal(now, CHAIN.c.due_at.type))


def is_due(now: datetime) -> ColumnElement[bool]:
    """Whether a sweep looks at a chain at `now`."""
    return and_(CHAIN.c.due_at <= now, CHAIN.c.pending_delivery_id.is_(None), ~CHAIN.c.disabled)


def is_running(delivery: DeliveryRecord) -> Any:
    """Whether this very begin of the delivery still runs: `attempt` goes back when it is given back, `begins` never."""
    return and_(
        DELIVERY.c.id == delivery.id,
        DELIVERY.c.attempt == delivery.attempt,
        DELIVERY.c.begins.is_not_distinct_from(delivery.begins),
        DELIVERY.c.status == DeliveryStatus.RUNNING,
    )


def unless_parked(moment: Any) -> Any:
    """`moment`, or NULL while a pending delivery is parked: while its chain is disabled or its chain type is paused.

    Everybody who writes `publish_after` of a pending delivery uses this. Who changes one of these flags writes the
    column again by this expression afterwards, and so shows the delivery to the relay again or hides it.

    The chain's row is locked, because a chain that another transaction is just enabling would be read as disabled, and
    nobody would show the delivery to the relay again. It is asked last: a paused type needs no lock of a chain that an
    application may hold for long.
    """
    chain = select(CHAIN.c.disabled).where(CHAIN.c.id == DELIVERY.c.chain_id).correlate(DELIVERY)
    disabled = chain.with_for_update(read=True).scalar_subquery()
    return case((_is_paused(), null()), (~disabled, moment))


def _is_paused() -> ColumnElement[bool]:
    """Whether the chain type of a delivery is paused. (A type without a row is not.)

    A type that is not paused is read without a lock, because all writes for it would meet in its row. A pause that is
    committed at the same moment may be missed; then the delivery is parked when a worker refuses to begin it. A type
    that is paused is read again with a lock. Otherwise a delivery could be parked by what was true before the type was
    resumed, and nobody would free it.
    """
    chain = select(CHAIN.c.chain_type).where(CHAIN.c.id == DELIVERY.c.chain_id).correlate(DELIVERY)
    row = select(TYPE.c.paused).where(TYPE.c.name == chain.scalar_subquery()).correlate(DELIVERY)
    paused, surely = row.scalar_subquery(), row.with_for_update(read=True).scalar_subquery()
    return case((paused, surely), else_=false())


def new_id() -> str:
    """A UUID that grows with time, so that new rows are neighbours in the index. (RFC 9562, version 7.)"""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))
