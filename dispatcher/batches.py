"""Guarded writes of many rows at once, on the caller's session: what `chains` and `deliveries` do one by one.

Rows are locked in id order and compared with what was read; those that changed meanwhile are left out. A batch costs a
handful of statements, whatever its size.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Table, bindparam, insert, select, tuple_, update
from sqlalchemy.orm import Session

from dispatcher import chains, deliveries
from dispatcher.chains import ChainRecord, Move, Rest, insert_or_ignore
from dispatcher.database import clock_plus
from dispatcher.deliveries import Begun, DeliveryRecord, Owed, PlannedDelivery
from dispatcher.models import CHAIN, DELIVERY, EVENT, RESOURCE
from dispatcher.resources import Resource, resource_key
from dispatcher.states import NEW, DeliveryStatus, EventAction

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Finished:
    """One delivered attempt that is to be recorded, and where its chain goes."""

    delivery: DeliveryRecord
    next_update_at: datetime | None
    due_at: datetime | None


# --- executions ------------------------------------------------------------------------------------------------------


def lock_unchanged(session: Session, records: Sequence[ChainRecord]) -> dict[int, bool]:
    """The chains that are as they were read (version, enabled, nothing open), locked: `{id: nobody enqueued it}`."""
    rows = session.execute(
        select(CHAIN.c.id, CHAIN.c.version, CHAIN.c.wake, CHAIN.c.disabled, CHAIN.c.pending_delivery_id)
        .where(CHAIN.c.id.in_(sorted(record.id for record in records)))
        .order_by(CHAIN.c.id)
        .with_for_update()
    )
    read = {record.id: record for record in records}
    return {
        row.id: row.wake == read[row.id].wake
        for row in rows
        if row.version == read[row.id].version and not row.disabled and row.pending_delivery_id is None
    }


def move_many(session: Session, moves: Sequence[Move], asleep: Mapping[int, bool], *, now: datetime) -> None:
    """Move chains that `lock_unchanged` has locked; a request that came in meanwhile stays."""
    groups = _grouped(moves, lambda one: (one.to_state, one.next_update_at, one.due_at, asleep[one.record.id]))
    for (to_state, next_update_at, due_at, consumed), group in groups.items():
        session.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(one.record.id for one in group)))
            .values(
                state=to_state,
                version=CHAIN.c.version + 1,
                moves=CHAIN.c.moves + 1,
                failures=0,
                next_update_at=next_update_at,
                due_at=due_at,
                updated_at=now,
                **({"request": None} if consumed else {}),
            )
        )
    add_events(
        session,
        [
            chains.event_values(
                one.record.id,
                one.record.version + 1,
                EventAction.STATE_TRANSITION,
                now=now,
                value=one.to_state,
                from_state=one.record.state,
                to_state=one.to_state,
                requested_by=one.requested_by,
                detail=one.transition,
            )
            for one in moves
        ],
    )


def rest_many(session: Session, rests: Sequence[Rest], *, now: datetime) -> None:
    """Let chains stay that `lock_unchanged` has locked and nobody enqueued meanwhile."""
    groups = _grouped(rests, lambda one: one.clear_request)
    for clear_request, group in groups.items():
        session.execute(
            update(CHAIN)
            .where(CHAIN.c.id == bindparam("b_id"))
            .values(
                due_at=bindparam("b_due_at"),
                failures=bindparam("b_failures"),
                **({"request": None} if clear_request else {}),
            ),
            [{"b_id": one.record.id, "b_due_at": one.due_at, "b_failures": one.failures} for one in group],
        )
    add_events(
        session,
        [
            chains.event_values(
                one.record.id,
                one.record.version,
                one.event,
                now=now,
                value=one.record.state,
                from_state=one.record.state,
                to_state=one.record.state,
                detail=one.detail,
            )
            for one in rests
            if one.event is not None
        ],
    )


def plan_many(
    session: Session,
    planned: Sequence[PlannedDelivery],
    asleep: Mapping[int, bool],
    *,
    now: datetime,
    publish_seconds: float,
) -> dict[int, str]:
    """The new deliveries' ids by chain, for chains that `lock_unchanged` has locked; the relay looks at them later."""
    ids = {one.record.id: deliveries.new_id() for one in planned}
    _insert_many(
        session,
        DELIVERY,
        [deliveries.values_of(one, ids[one.record.id]) for one in planned],
        status=DeliveryStatus.PENDING,
        attempt=0,
        next_attempt_at=clock_plus(0),
        publish_after=clock_plus(publish_seconds),
        planned_at=clock_plus(0),
    )
    owed = (
        select(DELIVERY.c.id)
        .where(DELIVERY.c.chain_id == CHAIN.c.id, DELIVERY.c.chain_version == CHAIN.c.version + 1)
        .scalar_subquery()
    )
    for consumed, group in _grouped(planned, lambda one: asleep[one.record.id]).items():
        session.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(one.record.id for one in group)))
            .ordered_values(  # MySQL evaluates from left to right: the subquery needs the version as it was
                (CHAIN.c.pending_delivery_id, owed),
                (CHAIN.c.version, CHAIN.c.version + 1),
                (CHAIN.c.due_at, None),
                (CHAIN.c.failures, 0),
                (CHAIN.c.updated_at, now),
                *([(CHAIN.c.request, None)] if consumed else []),
            )
        )
    add_events(
        session,
        [
            chains.event_values(
                one.record.id,
                one.record.version + 1,
                EventAction.PLANNED,
                now=now,
                value=one.transition,
                from_state=one.record.state,
                to_state=one.final_state,
                requested_by=one.requested_by,
                detail=one.callback,
            )
            for one in planned
        ],
    )
    return ids


# --- attempts --------------------------------------------------------------------------------------------------------


def begin_many(session: Session, owed: Sequence[Owed], *, lease_seconds: float) -> list[Begun]:
    """Begin those of these attempts that may begin, in id order; the others are left as they are."""
    rows = session.execute(
        deliveries.with_chain()
        .where(
            tuple_(DELIVERY.c.id, DELIVERY.c.attempt).in_([(one.delivery_id, one.attempt - 1) for one in owed]),
            DELIVERY.c.status == DeliveryStatus.PENDING,
            DELIVERY.c.next_attempt_at <= clock_plus(0),
            CHAIN.c.pending_delivery_id == DELIVERY.c.id,
            ~CHAIN.c.disabled,
        )
        .order_by(DELIVERY.c.id)
        .with_for_update(of=DELIVERY)
    ).all()
    if not rows:
        return []
    of_delivery: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        of_delivery[row[0]].append(row)
    session.execute(
        update(DELIVERY)
        .where(DELIVERY.c.id.in_(list(of_delivery)), DELIVERY.c.status == DeliveryStatus.PENDING)
        .values(
            status=DeliveryStatus.RUNNING,
            attempt=DELIVERY.c.attempt + 1,
            lease_until=clock_plus(lease_seconds),
            publish_after=clock_plus(lease_seconds),
        )
    )
    still = (
        select(DELIVERY.c.id)
        .join(CHAIN, CHAIN.c.id == DELIVERY.c.chain_id)
        .where(DELIVERY.c.id.in_(list(of_delivery)), CHAIN.c.pending_delivery_id == DELIVERY.c.id, ~CHAIN.c.disabled)
    )
    enabled = set(session.execute(still).scalars())  # where the rows had to be waited for, see `take_back`
    if refused := [delivery_id for delivery_id in of_delivery if delivery_id not in enabled]:
        deliveries.take_back(session, refused)
    begun = []
    for group in of_delivery.values():
        if group[0][0] not in enabled:
            continue
        read = deliveries.begun_from(group)
        begun.append(replace(read, delivery=deliveries.begun_of(read.delivery)))
    return begun


def finish_many(session: Session, finished: Sequence[Finished], *, now: datetime) -> set[str]:
    """Record delivered attempts and move their chains; the ids of those that were still this process's to finish."""
    by_id = {one.delivery.id: one for one in finished}
    ours = set(
        session.execute(
            select(DELIVERY.c.id)
            .where(
                tuple_(DELIVERY.c.id, DELIVERY.c.attempt).in_(
                    [(one.delivery.id, one.delivery.attempt) for one in finished]
                ),
                DELIVERY.c.status == DeliveryStatus.RUNNING,
            )
            .order_by(DELIVERY.c.id)
            .with_for_update()
        ).scalars()
    )
    rows = session.execute(
        select(CHAIN.c.id, CHAIN.c.version, CHAIN.c.pending_delivery_id)
        .where(
            CHAIN.c.id.in_(sorted(one.delivery.chain_id for one in finished)),
            CHAIN.c.pending_delivery_id.in_(sorted(ours)),
        )
        .order_by(CHAIN.c.id)
        .with_for_update()
    ).all()
    versions = {row.pending_delivery_id: row.version for row in rows}
    done = [by_id[delivery_id] for delivery_id in sorted(versions)]
    if not done:
        return set()
    session.execute(
        update(DELIVERY)
        .where(DELIVERY.c.id.in_([one.delivery.id for one in done]))
        .values(status=DeliveryStatus.DELIVERED, **deliveries.CLOSED_VALUES)
    )
    groups = _grouped(done, lambda one: (one.delivery.final_state, one.next_update_at, one.due_at))
    for (state, next_update_at, due_at), group in groups.items():
        session.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(one.delivery.chain_id for one in group)))
            .values(deliveries.moved_values(state, next_update_at=next_update_at, due_at=due_at, now=now))
        )
    add_events(
        session,
        [
            chains.event_values(
                one.delivery.chain_id,
                versions[one.delivery.id] + 1,
                EventAction.STATE_TRANSITION,
                now=now,
                value=one.delivery.final_state,
                from_state=one.delivery.from_state,
                to_state=one.delivery.final_state,
                requested_by=one.delivery.requested_by,
                detail=one.delivery.transition,
            )
            for one in done
        ],
    )
    return set(versions)


# --- creation --------------------------------------------------------------------------------------------------------


def create_many(
    session: Session,
    chain_type: str,
    resources: Sequence[Sequence[Resource]],
    *,
    due_at: datetime | None,
    now: datetime,
) -> list[tuple[int, bool]]:
    """`(chain id, created here)` of the chain with exactly each of these resource sets, in their order."""
    keys = [resource_key(pairs) for pairs in resources]
    by_key = dict(zip(keys, resources, strict=True))
    found = _ids_by_key(session, chain_type, by_key)
    missing = [key for key in by_key if key not in found]
    made: dict[str, int] = {}
    if missing:
        rows = [{"resource_key": key} for key in sorted(missing)]
        statement = insert_or_ignore(session, CHAIN).values(
            chain_type=chain_type, state=NEW, due_at=due_at, created_at=now, updated_at=now
        )
        if session.get_bind().dialect.insert_returning:
            made = {
                key: chain_id
                for chain_id, key in session.execute(statement.returning(CHAIN.c.id, CHAIN.c.resource_key), rows)
            }
        else:
            session.execute(statement, rows)
            # Whoever else creates a chain commits it with its resources: one without any was made here.
            ids = _ids_by_key(session, chain_type, missing)
            theirs = set(
                session.execute(select(RESOURCE.c.chain_id).where(RESOURCE.c.chain_id.in_(ids.values()))).scalars()
            )
            made = {key: chain_id for key, chain_id in ids.items() if chain_id not in theirs}
        found.update(_ids_by_key(session, chain_type, [key for key in missing if key not in made]), **made)
    _insert_many(
        session,
        RESOURCE,
        [
            {"chain_id": chain_id, "resource_type": pair[0], "resource_id": pair[1]}
            for key, chain_id in made.items()
            for pair in by_key[key]
        ],
    )
    add_events(
        session,
        [
            chains.event_values(chain_id, 0, EventAction.CREATED, now=now, value=NEW, to_state=NEW)
            for chain_id in sorted(made.values())
        ],
    )
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    return [(found[key], key in made and first[key] == number) for number, key in enumerate(keys)]


def _ids_by_key(session: Session, chain_type: str, keys: Iterable[str]) -> dict[str, int]:
    wanted = list(keys)
    if not wanted:
        return {}
    rows = session.execute(
        select(CHAIN.c.resource_key, CHAIN.c.id).where(
            CHAIN.c.chain_type == chain_type, CHAIN.c.resource_key.in_(wanted)
        )
    )
    return {key: chain_id for key, chain_id in rows}


# --- shared ----------------------------------------------------------------------------------------------------------


def add_events(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append these lines to their chains' histories."""
    _insert_many(session, EVENT, rows)


def _insert_many(session: Session, table: Table, rows: Sequence[Mapping[str, Any]], **common: Any) -> None:
    """Insert rows in as few statements as the database allows; `common` values are the same for all."""
    if not rows:
        return
    statement = insert(table).values(**common) if common else insert(table)
    if session.get_bind().dialect.insert_returning:  # what makes SQLAlchemy send many rows in one statement
        statement = statement.returning(next(iter(table.primary_key.columns)))
    session.execute(statement, list(rows))


def _grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
