"""Moments that cannot be: what has begun or was written in the future, because a clock was wrong and is right again.

On the caller's connection; nothing here commits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, RowMapping, and_, bindparam, case, literal, not_, or_, select, update
from sqlalchemy.engine import Connection

from dispatcher.states import DeliveryStatus
from dispatcher.storage.clock import TOLERANCE, clock_plus
from dispatcher.storage.models import CHAIN, DELIVERY
from dispatcher.storage.statements import at_once

# --- the waits of deliveries, by the database's clock ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WaitPosition:
    """A place in the relay's index."""

    publish_after: datetime
    delivery_id: str


def future_waits(connection: Connection, *, after: WaitPosition | None, limit: int) -> list[WaitPosition]:
    """The next deliveries whose wait or lease began in the future, in the order of the relay's index.

    They are found in the index alone, among the deliveries that the relay need not look at yet. A parked delivery (its
    chain is disabled) is not in the index. It keeps its wait as it is, and is found when it is freed.
    """
    # The subquery reads the clock once. PostgreSQL's clock moves on within a statement, so no index could be used.
    soon = select(clock_plus(TOLERANCE.total_seconds())).scalar_subquery()
    # No wait ends before it begins, so the first condition leaves out none; it is the range of the index.
    query = select(DELIVERY.c.publish_after, DELIVERY.c.id).where(
        DELIVERY.c.publish_after > soon, DELIVERY.c.waits_since > soon
    )
    if after is not None:
        same_moment = and_(DELIVERY.c.publish_after == after.publish_after, DELIVERY.c.id <= after.delivery_id)
        query = query.where(DELIVERY.c.publish_after >= after.publish_after, not_(same_moment))
    query = query.order_by(DELIVERY.c.publish_after, DELIVERY.c.id).limit(limit)
    return [WaitPosition(publish_after, delivery_id) for publish_after, delivery_id in connection.execute(query)]


_GUARDS: Final = ("id", "status", "begins", "waits_since")
_ENDS: Final = ("next_attempt_at", "publish_after", "lease_until")
_BEGIN_ANEW: Final = (
    update(DELIVERY)
    .where(
        DELIVERY.c.id == bindparam("read_id"),
        DELIVERY.c.status == bindparam("read_status"),
        DELIVERY.c.begins.is_not_distinct_from(bindparam("read_begins")),
        DELIVERY.c.waits_since == bindparam("read_waits_since"),
    )
    .values(lapse_seen_at=None, waits_since=bindparam("now"), **{name: bindparam(f"new_{name}") for name in _ENDS})
)


def begin_anew(connection: Connection, delivery_ids: Sequence[str], *, machine_now: datetime) -> int:
    """Let the waits of these deliveries that began in the future begin now, each with its own length; how many.

    No wait is ended early, because an attempt may be running. A row that somebody else has locked is left out, because
    its wait is just being ended or renewed.
    """
    columns = [DELIVERY.c[name] for name in (*_GUARDS, *_ENDS)]
    query = select(*columns).where(DELIVERY.c.id.in_(delivery_ids), DELIVERY.c.waits_since > machine_now + TOLERANCE)
    rows = connection.execute(query.order_by(DELIVERY.c.id).with_for_update(skip_locked=True)).mappings().all()
    if rows:
        connection.execute(_BEGIN_ANEW, [_begun_anew(row, machine_now) for row in rows])
    return len(rows)


def _begun_anew(row: RowMapping, now: datetime) -> dict[str, Any]:
    def moved(end: datetime | None) -> datetime | None:
        # An end before the beginning is older than this wait, as the lease of an attempt that a relay has set aside.
        return end if end is None or end < row["waits_since"] else now + (end - row["waits_since"])

    ends = {f"new_{name}": moved(row[name]) for name in _ENDS}
    if row["status"] == DeliveryStatus.RUNNING and row["next_attempt_at"] is not None:  # when the attempt began
        ends["new_next_attempt_at"] = min(row["next_attempt_at"], now)
    return {"now": now, **ends, **{f"read_{name}": row[name] for name in _GUARDS}}


# --- the moments of chains, in domain time ---------------------------------------------------------------------------


def _lies_ahead(now: datetime) -> ColumnElement[bool]:
    """Whether the last change of a chain, the beginning of its run or of its visit of a state lies in the future."""
    return or_(*(CHAIN.c[name] > now + TOLERANCE for name in ("updated_at", "entered_at", "started_at")))


def chains_ahead(connection: Connection, *, now: datetime, limit: int) -> list[int]:
    """At most `limit` chains to which something has happened in the future, ascending.

    No index holds these moments, because it would cost every write of a chain. All chains are read, once.
    """
    return sorted(connection.execute(select(CHAIN.c.id).where(_lies_ahead(now)).limit(limit)).scalars())


def set_right(connection: Connection, *, after_id: int, limit: int, now: datetime) -> int | None:
    """Set the moments that lie in the future to `now` in the next batch of chains, and make these chains due.

    Gives the last id, or None when there are no more. A rest (`next_update_at`) holds. A disabled chain and one that
    waits for a delivery are not made due; enabling it or closing the delivery makes it due.
    """
    query = select(CHAIN.c.id).where(CHAIN.c.id > after_id, _lies_ahead(now)).order_by(CHAIN.c.id).limit(limit)
    ids = connection.execute(query.with_for_update()).scalars().all()
    if not ids:
        return None
    free = and_(CHAIN.c.pending_delivery_id.is_(None), ~CHAIN.c.disabled)
    connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id.in_(ids))
        .values(
            version=CHAIN.c.version + 1,  # so that what a worker is about to write of the old row is stale
            due_at=case((free, at_once(now))),
            updated_at=now,
            entered_at=_not_after(CHAIN.c.entered_at, now),
            started_at=_not_after(CHAIN.c.started_at, now),
        )
    )
    return int(ids[-1])


def _not_after(column: Column[datetime | None], now: datetime) -> ColumnElement[Any]:
    return case((column > now, literal(now, column.type)), else_=column)
