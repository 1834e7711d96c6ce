"""Counts and listings for operators, on the caller's connection. Nothing here writes."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import and_, case, func, or_, select
from sqlalchemy.engine import Connection

from dispatcher.domain.records import DeliveryRecord
from dispatcher.states import CLOSED_STATUSES, OPEN_STATUSES, DeliveryStatus
from dispatcher.storage.models import CHAIN, DELIVERY, ChainRow
from dispatcher.storage.rows import deliveries_of, delivery_columns, found_of
from dispatcher.storage.statements import is_due


def statistics(connection: Connection, *, now: datetime) -> dict[str, Any]:
    """Counts over the whole deployment: chains, due chains, open deliveries, and the next `due_at`."""
    chains_count, due, next_due_at = connection.execute(
        select(
            func.count(),
            func.coalesce(func.sum(case((is_due(now), 1), else_=0)), 0),
            func.min(case((and_(CHAIN.c.pending_delivery_id.is_(None), ~CHAIN.c.disabled), CHAIN.c.due_at))),
        ).select_from(CHAIN)
    ).one()
    by_status = {
        status: count
        for status, count in connection.execute(select(DELIVERY.c.status, func.count()).group_by(DELIVERY.c.status))
    }
    return {
        "chains": chains_count,
        "due": int(due),
        "next_due_at": next_due_at,
        "open_deliveries": sum(by_status.get(status, 0) for status in OPEN_STATUSES),
        "deliveries": {str(status): by_status.get(status, 0) for status in DeliveryStatus},
    }


def count_by_state(connection: Connection) -> dict[tuple[str, str], int]:
    """`{(chain type, state): chains}`."""
    rows = connection.execute(
        select(ChainRow.chain_type, ChainRow.state, func.count()).group_by(ChainRow.chain_type, ChainRow.state)
    )
    return {(chain_type, state): count for chain_type, state, count in rows}


def listing(
    connection: Connection,
    *,
    delivery_ids: Sequence[str] | None = None,
    chain_id: int | None = None,
    statuses: Sequence[DeliveryStatus] = (),
    type_name: str | None = None,
    limit: int = 100,
) -> list[DeliveryRecord]:
    """Deliveries by id, chain, status and chain type, newest first, at most `limit`."""
    query = select(*delivery_columns())
    if delivery_ids is not None:
        query = query.where(DELIVERY.c.id.in_(delivery_ids))
    if chain_id is not None:
        query = query.where(DELIVERY.c.chain_id == chain_id)
    if statuses:
        query = query.where(DELIVERY.c.status.in_([str(status) for status in statuses]))
        if not set(statuses) & set(CLOSED_STATUSES):
            query = query.where(DELIVERY.c.finished_at.is_(None))  # which the index of their statuses is limited to
    if type_name is not None:
        query = query.join(CHAIN, CHAIN.c.id == DELIVERY.c.chain_id).where(CHAIN.c.chain_type == type_name)
    query = query.order_by(DELIVERY.c.id.desc()).limit(limit)
    return deliveries_of(found_of(connection.execute(query)))


def count_stopped(connection: Connection) -> dict[str, int]:
    """How many deliveries are dead and held."""
    query = select(DELIVERY.c.status, func.count()).where(
        DELIVERY.c.finished_at.is_(None),
        DELIVERY.c.status.in_([str(DeliveryStatus.DEAD), str(DeliveryStatus.HELD)]),
    )
    return {status: count for status, count in connection.execute(query.group_by(DELIVERY.c.status))}


def chains_astray(connection: Connection, *, limit: int) -> list[int]:
    """Chains that wait for a delivery which is closed or missing, ascending."""
    owed = select(DELIVERY.c.id).where(
        DELIVERY.c.id == CHAIN.c.pending_delivery_id, DELIVERY.c.status.in_([str(status) for status in OPEN_STATUSES])
    )
    query = select(CHAIN.c.id).where(CHAIN.c.pending_delivery_id.is_not(None), ~owed.exists())
    return list(connection.execute(query.order_by(CHAIN.c.id).limit(limit)).scalars())


def orphans(connection: Connection, *, limit: int) -> list[str]:
    """Open deliveries whose chain is missing, or does not wait for them."""
    query = (
        select(DELIVERY.c.id)
        .outerjoin(CHAIN, CHAIN.c.id == DELIVERY.c.chain_id)
        .where(
            DELIVERY.c.finished_at.is_(None),
            DELIVERY.c.status.in_([str(status) for status in OPEN_STATUSES]),
            or_(CHAIN.c.pending_delivery_id.is_(None), CHAIN.c.pending_delivery_id != DELIVERY.c.id),
        )
    )
    return list(connection.execute(query.order_by(DELIVERY.c.id).limit(limit)).scalars())
