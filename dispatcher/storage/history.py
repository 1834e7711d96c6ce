"""The chains' histories: lines appended, read and pruned, on the caller's connection. Nothing here commits."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, literal, or_, select
from sqlalchemy.engine import Connection

from dispatcher.domain.records import MAX_DETAIL, ChainEvent
from dispatcher.states import EventAction
from dispatcher.storage.models import CHAIN, EVENT
from dispatcher.storage.rows import event_columns, events_of, found_of
from dispatcher.storage.statements import insert_many


def events(connection: Connection, chain_id: int) -> list[ChainEvent]:
    """The chain's history, oldest first."""
    query = select(*event_columns()).where(EVENT.c.chain_id == chain_id).order_by(EVENT.c.id)
    return events_of(found_of(connection.execute(query)))


def event_values(
    chain_id: int,
    chain_version: int,
    action: EventAction,
    *,
    now: datetime,
    value: str | None = None,
    from_state: str | None = None,
    to_state: str | None = None,
    requested_by: str | None = None,
    detail: str | None = None,
) -> dict[str, Any]:
    """The columns of one line of a chain's history."""
    return {
        "chain_id": chain_id,
        "chain_version": chain_version,
        "move_version": chain_version if action == EventAction.STATE_TRANSITION else None,
        "action": action,
        "value": value,
        "from_state": from_state,
        "to_state": to_state,
        "requested_by": requested_by,
        "detail": detail[:MAX_DETAIL] if detail else None,
        "created_at": now,
    }


def add_event(connection: Connection, chain_id: int, chain_version: int, action: EventAction, **facts: Any) -> None:
    """Append one line to a chain's history; `facts` as in `event_values`."""
    connection.execute(insert(EVENT).values(event_values(chain_id, chain_version, action, **facts)))


def add_events(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append these events to the histories of their chains; `rows` are as `event_values` gives them."""
    insert_many(connection, EVENT, rows)


def add_event_at_version(connection: Connection, chain_id: int, action: EventAction, **facts: Any) -> None:
    """Append one event with the version that the chain's row has in this transaction; `facts` as in `event_values`."""
    values = event_values(chain_id, 0, action, **facts)
    sources: dict[str, ColumnElement[Any]] = {
        name: literal(value, EVENT.c[name].type) for name, value in values.items()
    }
    sources["chain_version"] = CHAIN.c.version
    if action == EventAction.STATE_TRANSITION:
        sources["move_version"] = CHAIN.c.version
    source = select(*sources.values()).where(CHAIN.c.id == chain_id)
    connection.execute(insert(EVENT).from_select(list(sources), source, include_defaults=False))


def prune_events(connection: Connection, *, before: datetime, limit: int) -> int:
    """Delete a batch of events older than `before`; how many. The latest line of a chain's history is kept."""
    newest = select(func.max(EVENT.c.id)).where(EVENT.c.chain_id == CHAIN.c.id).correlate(CHAIN).scalar_subquery()
    ids = (
        connection.execute(
            select(EVENT.c.id)
            .outerjoin(CHAIN, CHAIN.c.id == EVENT.c.chain_id)
            .where(EVENT.c.created_at < before, or_(CHAIN.c.id.is_(None), EVENT.c.id < newest))
            .order_by(EVENT.c.created_at, EVENT.c.id)
            .limit(limit)
        )
        .scalars()
        .all()
    )
    if ids:
        connection.execute(delete(EVENT).where(EVENT.c.id.in_(sorted(ids))))
    return len(ids)
