"""What the relay looks at: deliveries whose message was lost or whose lease has ended. Nothing here commits."""

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.engine import Connection

from dispatcher.bounds import MAX_ERROR
from dispatcher.domain.records import DeliveryRecord
from dispatcher.states import DeliveryStatus, WaitsFor
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.models import DELIVERY
from dispatcher.storage.rows import delivery_columns, delivery_of
from dispatcher.storage.statements import is_running, one_row, waits, waits_for


def claim_overdue(
    connection: Connection, *, limit: int, grace_seconds: float, pending: bool = True
) -> list[DeliveryRecord]:
    """The deliveries that the relay must look at, oldest first; another relay gets them only after `grace_seconds`.

    A pending delivery has lost its message (left out with `pending=False`); a running delivery has outlived its lease.
    """
    query = select(*delivery_columns()).where(_overdue())
    if not pending:
        query = query.where(DELIVERY.c.status == DeliveryStatus.RUNNING, DELIVERY.c.finished_at.is_(None))
    query = query.order_by(DELIVERY.c.publish_after, DELIVERY.c.id).limit(limit).with_for_update(skip_locked=True)
    found = [delivery_of(row) for row in connection.execute(query).mappings()]
    lost = [delivery.id for delivery in found if delivery.status == DeliveryStatus.PENDING]
    if lost:
        connection.execute(
            update(DELIVERY)
            .where(DELIVERY.c.id.in_(lost))
            .values(publish_after=clock_plus(grace_seconds), waits_since=clock_plus(0))
        )
    return found


def _overdue(seconds: float = 0) -> ColumnElement[bool]:
    # The subquery reads the clock once. PostgreSQL's clock moves on within a statement, so no index could be used.
    return DELIVERY.c.publish_after <= select(clock_plus(-seconds)).scalar_subquery()


def late(connection: Connection, *, seconds: float, limit: int) -> list[str]:
    """Deliveries that the relay should have looked at `seconds` ago and has not."""
    query = select(DELIVERY.c.id).where(_overdue(seconds))
    return list(connection.execute(query.order_by(DELIVERY.c.publish_after).limit(limit)).scalars())


def look_later(connection: Connection, delivery: DeliveryRecord, *, seconds: float) -> None:
    """Hide a running delivery that this process cannot settle from the relay for `seconds`."""
    connection.execute(
        update(DELIVERY)
        .where(is_running(delivery))
        .values(publish_after=clock_plus(seconds), waits_since=clock_plus(0))
    )


def lease_expired(connection: Connection, delivery: DeliveryRecord) -> bool:
    """Whether this attempt still runs and its lease has ended; locks the row."""
    row = connection.execute(
        select(DELIVERY.c.id).where(is_running(delivery), DELIVERY.c.lease_until <= clock_plus(0)).with_for_update()
    ).one_or_none()
    return row is not None


def mark_unknown(
    connection: Connection, delivery: DeliveryRecord, *, seconds: float, grace_seconds: float, error: str
) -> bool:
    """Open the next attempt of a delivery whose worker died during an attempt, so that its effect is unknown."""
    done = connection.execute(
        update(DELIVERY)
        .where(is_running(delivery), DELIVERY.c.lease_until <= clock_plus(0))
        .values(
            status=DeliveryStatus.PENDING,
            unknown=True,
            last_error=error[:MAX_ERROR],
            **waits_for(WaitsFor.RETRY),
            **waits(seconds, grace_seconds=grace_seconds),
        )
    )
    return one_row(done)
