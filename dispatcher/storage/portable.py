"""The hot writes in a transaction of several statements, for every database.

Rows are locked in id order and compared with what was read. A row that changed meanwhile is left out. A batch of any
size needs only a few statements.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import select, tuple_, update
from sqlalchemy.engine import Connection

from dispatcher.domain.records import (
    Begun,
    ChainRecord,
    Finished,
    Move,
    Owed,
    PlannedDelivery,
    Rest,
    Timing,
    Write,
    begun_of,
    by_kind,
)
from dispatcher.domain.resources import Resource, resource_key
from dispatcher.states import NEW, DeliveryStatus, EventAction
from dispatcher.storage import deliveries, history
from dispatcher.storage.dialects import clock_plus
from dispatcher.storage.history import add_events
from dispatcher.storage.models import CHAIN, DELIVERY, RESOURCE
from dispatcher.storage.rows import begun_from, with_chain
from dispatcher.storage.statements import grouped, insert_many, insert_or_ignore, new_id


def lock_unchanged(connection: Connection, records: Sequence[ChainRecord]) -> dict[int, bool]:
    """Lock the chains that are unchanged since they were read (same version, enabled, nothing open): `{id: not woken}`.

    *Not woken* is True where no enqueue arrived since the read, so that the chain's request may be cleared.
    """
    rows = connection.execute(
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


def write_locked(
    connection: Connection, writes: Sequence[Write], not_woken: Mapping[int, bool], *, now: datetime, timing: Timing
) -> dict[int, str | None]:
    """Write what came of executions of chains that `lock_unchanged` has locked: `{chain id: id of a new delivery}`."""
    moves, rests, planned = by_kind(
        [
            change
            for change in writes
            if change.record.id in not_woken and (not_woken[change.record.id] or not isinstance(change, Rest))
        ]
    )
    done: dict[int, str | None] = dict.fromkeys(
        [change.record.id for change in moves] + [change.record.id for change in rests]
    )
    if moves:
        _move(connection, moves, not_woken, now=now)
    if rests:
        _rest(connection, rests, now=now)
    if planned:
        done.update(_plan(connection, planned, not_woken, now=now, timing=timing))
    return done


def _move(connection: Connection, moves: Sequence[Move], not_woken: Mapping[int, bool], *, now: datetime) -> None:
    groups = grouped(moves, lambda move: (move.to_state, move.next_update_at, move.due_at, not_woken[move.record.id]))
    for (to_state, next_update_at, due_at, consumed), group in groups.items():
        connection.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(move.record.id for move in group)))
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
        connection,
        [
            history.event_values(
                move.record.id,
                move.record.version + 1,
                EventAction.STATE_TRANSITION,
                now=now,
                value=move.to_state,
                from_state=move.record.state,
                to_state=move.to_state,
                requested_by=move.requested_by,
                detail=move.transition,
            )
            for move in moves
        ],
    )


def _rest(connection: Connection, rests: Sequence[Rest], *, now: datetime) -> None:
    groups = grouped(rests, lambda rest: (rest.due_at, rest.failures, rest.clear_request))
    for (due_at, failures, clear_request), group in groups.items():
        connection.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(rest.record.id for rest in group)))
            .values(due_at=due_at, failures=failures, **({"request": None} if clear_request else {}))
        )
    add_events(
        connection,
        [
            history.event_values(
                rest.record.id,
                rest.record.version,
                rest.event,
                now=now,
                value=rest.record.state,
                from_state=rest.record.state,
                to_state=rest.record.state,
                detail=rest.detail,
            )
            for rest in rests
            if rest.event is not None
        ],
    )


def _plan(
    connection: Connection,
    planned: Sequence[PlannedDelivery],
    not_woken: Mapping[int, bool],
    *,
    now: datetime,
    timing: Timing,
) -> dict[int, str]:
    ids = {plan.record.id: new_id() for plan in planned}
    insert_many(
        connection,
        DELIVERY,
        [deliveries.values_of(plan, ids[plan.record.id]) for plan in planned],
        planned_at=clock_plus(0),
        **_standing(timing),
    )
    owed = (
        select(DELIVERY.c.id)
        .where(DELIVERY.c.chain_id == CHAIN.c.id, DELIVERY.c.chain_version == CHAIN.c.version + 1)
        .scalar_subquery()
    )
    for consumed, group in grouped(planned, lambda plan: not_woken[plan.record.id]).items():
        connection.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(plan.record.id for plan in group)))
            .ordered_values(  # `owed` must be first: it reads the old version, and MySQL assigns from left to right
                (CHAIN.c.pending_delivery_id, owed),
                (CHAIN.c.version, CHAIN.c.version + 1),
                (CHAIN.c.due_at, None),
                (CHAIN.c.failures, 0),
                (CHAIN.c.updated_at, now),
                *([(CHAIN.c.request, None)] if consumed else []),
            )
        )
    add_events(
        connection,
        [
            history.event_values(
                plan.record.id,
                plan.record.version + 1,
                EventAction.PLANNED,
                now=now,
                value=plan.transition,
                from_state=plan.record.state,
                to_state=plan.final_state,
                requested_by=plan.requested_by,
                detail=plan.callback,
            )
            for plan in planned
        ],
    )
    return ids


def _standing(timing: Timing) -> dict[str, Any]:
    """The columns of a new delivery that say whether its first attempt is begun."""
    if timing.lease_seconds is None:
        return {
            "status": DeliveryStatus.PENDING,
            "attempt": 0,
            "next_attempt_at": clock_plus(0),
            "publish_after": clock_plus(timing.publish_seconds),
        }
    return {
        "status": DeliveryStatus.RUNNING,
        "attempt": 1,
        "publish_after": clock_plus(timing.lease_seconds),
        "lease_until": clock_plus(timing.lease_seconds),
    }


def begin(connection: Connection, owed: Sequence[Owed], *, lease_seconds: float) -> list[Begun]:
    rows = connection.execute(
        with_chain()
        .where(
            tuple_(DELIVERY.c.id, DELIVERY.c.attempt).in_(
                [(message.delivery_id, message.attempt - 1) for message in owed]
            ),
            DELIVERY.c.status == DeliveryStatus.PENDING,
            DELIVERY.c.next_attempt_at <= clock_plus(0),
            DELIVERY.c.publish_after.is_not(
                None
            ),  # NULL: the chain was disabled while this statement waited for the row
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
    connection.execute(
        update(DELIVERY)
        .where(DELIVERY.c.id.in_(list(of_delivery)), DELIVERY.c.status == DeliveryStatus.PENDING)
        .values(
            status=DeliveryStatus.RUNNING,
            attempt=DELIVERY.c.attempt + 1,
            lease_until=clock_plus(lease_seconds),
            publish_after=clock_plus(lease_seconds),
        )
    )
    read = [begun_from(group) for group in of_delivery.values()]
    return [replace(message, delivery=begun_of(message.delivery)) for message in read]


def finish(connection: Connection, finished: Sequence[Finished], *, now: datetime) -> set[str]:
    by_id = {end.delivery.id: end for end in finished}
    ours = set(
        connection.execute(
            select(DELIVERY.c.id)
            .where(
                tuple_(DELIVERY.c.id, DELIVERY.c.attempt).in_(
                    [(end.delivery.id, end.delivery.attempt) for end in finished]
                ),
                DELIVERY.c.status == DeliveryStatus.RUNNING,
            )
            .order_by(DELIVERY.c.id)
            .with_for_update()
        ).scalars()
    )
    rows = connection.execute(
        select(CHAIN.c.id, CHAIN.c.version, CHAIN.c.pending_delivery_id)
        .where(
            CHAIN.c.id.in_(sorted(end.delivery.chain_id for end in finished)),
            CHAIN.c.pending_delivery_id.in_(sorted(ours)),
        )
        .order_by(CHAIN.c.id)
        .with_for_update()
    ).all()
    versions = {row.pending_delivery_id: row.version for row in rows}
    done = [by_id[delivery_id] for delivery_id in sorted(versions)]
    if not done:
        return set()
    connection.execute(
        update(DELIVERY)
        .where(DELIVERY.c.id.in_([end.delivery.id for end in done]))
        .values(status=DeliveryStatus.DELIVERED, **deliveries.CLOSED_VALUES)
    )
    groups = grouped(done, lambda end: (end.delivery.final_state, end.next_update_at, end.due_at))
    for (state, next_update_at, due_at), group in groups.items():
        connection.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(end.delivery.chain_id for end in group)))
            .values(deliveries.moved_values(state, next_update_at=next_update_at, due_at=due_at, now=now))
        )
    add_events(
        connection,
        [
            history.event_values(
                end.delivery.chain_id,
                versions[end.delivery.id] + 1,
                EventAction.STATE_TRANSITION,
                now=now,
                value=end.delivery.final_state,
                from_state=end.delivery.from_state,
                to_state=end.delivery.final_state,
                requested_by=end.delivery.requested_by,
                detail=end.delivery.transition,
            )
            for end in done
        ],
    )
    return set(versions)


def create_many(
    connection: Connection,
    type_name: str,
    resources: Sequence[Sequence[Resource]],
    *,
    due_at: datetime | None,
    now: datetime,
) -> list[tuple[int, bool]]:
    """Find or create one chain for each resource set; gives `(chain id, created here)`, in the order of `resources`.

    Each chain has exactly the resources of its set.
    """
    keys = [resource_key(pairs) for pairs in resources]
    by_key = dict(zip(keys, resources, strict=True))
    found = _ids_by_key(connection, type_name, by_key)
    missing = [key for key in by_key if key not in found]
    made: dict[str, int] = {}
    if missing:
        rows = [{"resource_key": key} for key in sorted(missing)]
        statement = insert_or_ignore(connection, CHAIN).values(
            chain_type=type_name, state=NEW, due_at=due_at, created_at=now, updated_at=now
        )
        if connection.dialect.insert_returning:
            made = {
                key: chain_id
                for chain_id, key in connection.execute(statement.returning(CHAIN.c.id, CHAIN.c.resource_key), rows)
            }
        else:
            connection.execute(statement, rows)
            # Another process commits a chain together with its resources, so a chain without any was made here.
            ids = _ids_by_key(connection, type_name, missing)
            theirs = set(
                connection.execute(select(RESOURCE.c.chain_id).where(RESOURCE.c.chain_id.in_(ids.values()))).scalars()
            )
            made = {key: chain_id for key, chain_id in ids.items() if chain_id not in theirs}
        found.update(_ids_by_key(connection, type_name, [key for key in missing if key not in made]), **made)
    insert_many(
        connection,
        RESOURCE,
        [
            {"chain_id": chain_id, "resource_type": pair[0], "resource_id": pair[1]}
            for key, chain_id in made.items()
            for pair in by_key[key]
        ],
    )
    add_events(
        connection,
        [
            history.event_values(chain_id, 0, EventAction.CREATED, now=now, value=NEW, to_state=NEW)
            for chain_id in sorted(made.values())
        ],
    )
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    return [(found[key], key in made and first[key] == number) for number, key in enumerate(keys)]


def _ids_by_key(connection: Connection, type_name: str, keys: Iterable[str]) -> dict[str, int]:
    wanted = list(keys)
    if not wanted:
        return {}
    rows = connection.execute(
        select(CHAIN.c.resource_key, CHAIN.c.id).where(
            CHAIN.c.chain_type == type_name, CHAIN.c.resource_key.in_(wanted)
        )
    )
    return {key: chain_id for key, chain_id in rows}
