"""Reads of chains, and the guarded writes that change them, on the caller's connection. Nothing here commits.

A guarded write compares the row with what the caller read. When the row has changed meanwhile, nothing is written, and
the function's result says so. Every plan, move, close and operator action increments `version`; every enqueue
increments `wake`.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, bindparam, case, delete, func, insert, literal, or_, select, tuple_, update
from sqlalchemy.engine import Connection

from dispatcher.domain.records import ChainRecord, DuePosition, Request, has_mark, new_uid
from dispatcher.domain.resources import Resource, resource_key, same_json
from dispatcher.domain.unreadable import json_object, unreadable
from dispatcher.errors import AmbiguousChain, ChainMissing, DeliveryPending
from dispatcher.states import NEW, EventAction
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.history import add_event, add_event_at_version
from dispatcher.storage.models import CHAIN, DELIVERY, EVENT, RESOURCE
from dispatcher.storage.rows import MACHINE_NOW, chain_columns, found_of, joined_chains_of, json_text
from dispatcher.storage.statements import at_once, insert_or_ignore, is_due, moved_values, new_chain, one_row

_PARAMETERS: Final = 1000
_READ: Final = (  # built once, because building a statement costs more than executing it
    select(*chain_columns(), RESOURCE.c.resource_type, RESOURCE.c.resource_id, clock_plus(0).label(MACHINE_NOW))
    .select_from(CHAIN.outerjoin(RESOURCE, RESOURCE.c.chain_id == CHAIN.c.id))
    .where(CHAIN.c.id.in_(bindparam("ids", expanding=True)))
)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_many(connection: Connection, chain_ids: Sequence[int], *, lock: bool = False) -> dict[int, ChainRecord]:
    """The chains with these ids, by id; missing ones are left out. `lock=True` locks the rows, in id order."""
    if lock and chain_ids:
        connection.execute(
            select(CHAIN.c.id).where(CHAIN.c.id.in_(sorted(chain_ids))).order_by(CHAIN.c.id).with_for_update()
        )
    return read_with_clock(connection, chain_ids)[0]


def read_with_clock(connection: Connection, chain_ids: Sequence[int]) -> tuple[dict[int, ChainRecord], datetime | None]:
    """The chains with these ids, by id, and the database's clock from the same statement (None without any row)."""
    if not chain_ids:
        return {}, None
    found = found_of(connection.execute(_READ, {"ids": sorted(chain_ids)}))
    return joined_chains_of(found), found.column(MACHINE_NOW)[0] if found.rows else None


def read_one(connection: Connection, chain_id: int, *, lock: bool = False) -> ChainRecord:
    """The chain with this id; `ChainMissing` if there is none."""
    record = read_many(connection, [chain_id], lock=lock).get(chain_id)
    if record is None:
        raise ChainMissing(chain_id)
    return record


def find_exact(
    connection: Connection, type_name: str, resources: Sequence[Resource], *, lock: bool = False
) -> int | None:
    """The id of the chain whose resources are exactly these, or None; `lock=True` reads what is committed by now."""
    query = select(CHAIN.c.id).where(CHAIN.c.chain_type == type_name, CHAIN.c.resource_key == resource_key(resources))
    return connection.execute(query.with_for_update() if lock else query).scalar_one_or_none()


def ids_by_key(connection: Connection, type_name: str, keys: Iterable[str]) -> dict[str, int]:
    """The ids of the chains of a type with these resource keys, by key; missing ones are left out."""
    wanted = list(keys)
    if not wanted:
        return {}
    rows = connection.execute(
        select(CHAIN.c.resource_key, CHAIN.c.id).where(
            CHAIN.c.chain_type == type_name, CHAIN.c.resource_key.in_(wanted)
        )
    )
    return {key: chain_id for key, chain_id in rows}


def find_containing(connection: Connection, type_name: str, resources: Sequence[Resource]) -> int | None:
    """The id of the only chain that has at least these resources, or None; `AmbiguousChain` if there are several."""
    found = list(
        connection.execute(
            select(RESOURCE.c.chain_id)
            .join(CHAIN, CHAIN.c.id == RESOURCE.c.chain_id)
            .where(
                CHAIN.c.chain_type == type_name,
                tuple_(RESOURCE.c.resource_type, RESOURCE.c.resource_id).in_(list(resources)),
            )
            .group_by(RESOURCE.c.chain_id)
            .having(func.count() == len(resources))
            .order_by(RESOURCE.c.chain_id)
            .limit(5)
        ).scalars()
    )
    if len(found) > 1:
        raise AmbiguousChain(type_name, found)
    return found[0] if found else None


def last_id(connection: Connection) -> int:
    """The largest id of a chain; 0 if there is none."""
    return int(connection.execute(select(func.coalesce(func.max(CHAIN.c.id), 0))).scalar_one())


def list_ids(
    connection: Connection,
    *,
    type_name: str | None = None,
    state: str | None = None,
    resource: Resource | None = None,
    after_id: int = 0,
    limit: int | None,
) -> list[int]:
    """The ids above `after_id` of the chains of that type, state and resource (None: any), ascending."""
    key = CHAIN.c.id
    query = select(CHAIN.c.id)
    if resource is not None:  # in the order of the resource's index, so that its chains are all that is read
        key = RESOURCE.c.chain_id
        query = query.join(RESOURCE, RESOURCE.c.chain_id == CHAIN.c.id).where(
            RESOURCE.c.resource_type == resource[0], RESOURCE.c.resource_id == resource[1]
        )
    if type_name is not None:
        query = query.where(CHAIN.c.chain_type == type_name)
    if state is not None:
        query = query.where(CHAIN.c.state == state)
    return list(connection.execute(query.where(key > after_id).order_by(key).limit(limit)).scalars())


def due_page(
    connection: Connection, *, type_name: str, now: datetime, after: DuePosition | None, limit: int
) -> list[DuePosition]:
    """The next due chains of a type after a position, in the order (due_at, id)."""
    query = select(CHAIN.c.due_at, CHAIN.c.id).where(is_due(now)).limit(limit)
    # Each database gets a query that it answers from the index, however many chains rest or are due at the same time.
    if connection.dialect.name in ("mysql", "mariadb"):
        # With `=` MySQL may walk all entries of a type, the resting chains first. It compares row values without an
        # index. For the `or` below it may merge this index with another, and sort everything that is due.
        query = query.with_hint(CHAIN, "FORCE INDEX (ix_chain_dispatcher_chain_due)")
        query = query.where(CHAIN.c.chain_type >= type_name, CHAIN.c.chain_type <= type_name)
        query = query.order_by(CHAIN.c.chain_type, CHAIN.c.due_at, CHAIN.c.id)
        if after is not None:
            same_moment = and_(CHAIN.c.due_at == after.due_at, CHAIN.c.id > after.chain_id)
            query = query.where(or_(same_moment, CHAIN.c.due_at > after.due_at))
    else:
        query = query.where(CHAIN.c.chain_type == type_name).order_by(CHAIN.c.due_at, CHAIN.c.id)
        if after is not None:
            position = tuple_(literal(after.due_at, CHAIN.c.due_at.type), literal(after.chain_id))
            query = query.where(tuple_(CHAIN.c.due_at, CHAIN.c.id) > position)
    return [DuePosition(due_at, chain_id) for due_at, chain_id in connection.execute(query) if due_at is not None]


# --- creating --------------------------------------------------------------------------------------------------------


def create(
    connection: Connection,
    *,
    type_name: str,
    resources: Sequence[Resource],
    context: Mapping[str, Any] | None,
    due_at: datetime | None,
    requested_by: str | None,
    now: datetime,
) -> int:
    """The id of the chain with exactly these resources, created in NEW unless another caller was faster."""
    key = resource_key(resources)
    statement = insert_or_ignore(connection, CHAIN).values(
        resource_key=key,
        uid=new_uid(),
        context=dict(context) if context is not None else None,
        **new_chain(type_name, due_at=due_at, now=now),
    )
    if connection.dialect.insert_returning:
        made = connection.execute(statement.returning(CHAIN.c.id)).one_or_none() is not None
    else:
        made = one_row(connection.execute(statement))
    chain_id = find_exact(connection, type_name, resources, lock=not made)
    assert chain_id is not None  # by the unique constraint: either our chain, or the chain that existed before
    if made:
        connection.execute(
            insert(RESOURCE),
            [{"chain_id": chain_id, "resource_type": rtype, "resource_id": rid} for rtype, rid in resources],
        )
        add_event(
            connection, chain_id, 0, EventAction.CREATED, value=NEW, to_state=NEW, requested_by=requested_by, now=now
        )
    return chain_id


# --- requests --------------------------------------------------------------------------------------------------------


def write_request(connection: Connection, chain_id: int, request: Request, *, now: datetime) -> None:
    """Write an application's request to the chain's row and make it due.

    An open delivery or a disabled chain keeps `due_at` empty: closing or enabling makes it due. Raises
    `ChainMissing`.
    """
    # Locking statements read the newest row; the caller's own transaction may have an old snapshot.
    row = connection.execute(
        select(CHAIN.c.version, json_text(CHAIN.c.request).label("request"))
        .where(CHAIN.c.id == chain_id)
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise ChainMissing(chain_id)
    free = and_(CHAIN.c.pending_delivery_id.is_(None), ~CHAIN.c.disabled)
    connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id == chain_id)
        .values(wake=CHAIN.c.wake + 1, request=request.to_json(), due_at=case((free, at_once(now))), updated_at=now)
    )
    earlier = json_object(row.request, "request")
    if earlier is not None and (unreadable(earlier) or not same_json(earlier, request.to_json())):
        add_event(
            connection, chain_id, row.version, EventAction.REQUEST_REPLACED, requested_by=request.requested_by, now=now
        )


def request_chain(
    connection: Connection,
    type_name: str,
    resources: Sequence[Resource],
    request: Request,
    *,
    due: bool,
    now: datetime,
) -> int:
    """The id of the chain with exactly these resources (created if absent), with the request in its row."""
    chain_id = find_exact(connection, type_name, resources)
    if chain_id is not None:
        with suppress(ChainMissing):  # erased since it was found
            write_request(connection, chain_id, request, now=now)
            return chain_id
    chain_id = create(
        connection,
        type_name=type_name,
        resources=resources,
        context=None,
        due_at=now if due else None,
        requested_by=request.requested_by,
        now=now,
    )
    write_request(connection, chain_id, request, now=now)
    return chain_id


# --- operators -------------------------------------------------------------------------------------------------------


def set_disabled(
    connection: Connection,
    chain_id: int,
    *,
    disabled: bool,
    requested_by: str | None,
    reason: str | None,
    now: datetime,
) -> bool:
    """Disable or enable a chain; False when nothing had to change. Raises `ChainMissing`."""
    record = read_one(connection, chain_id, lock=True)
    if record.disabled == disabled:
        return False
    waits = disabled or record.pending_delivery_id is not None
    connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id == chain_id, CHAIN.c.version == record.version)
        .values(disabled=disabled, version=CHAIN.c.version + 1, due_at=None if waits else at_once(now), updated_at=now)
    )
    action = EventAction.DISABLED if disabled else EventAction.ENABLED
    add_event(
        connection,
        chain_id,
        record.version + 1,
        action,
        value=record.state,
        requested_by=requested_by,
        detail=reason,
        now=now,
    )
    return True


def set_resource_disabled(
    connection: Connection,
    resource: Resource,
    *,
    disabled: bool,
    requested_by: str | None,
    reason: str | None,
    now: datetime,
) -> list[int]:
    """Disable or enable every chain that has this resource; the ids of the chains that changed."""
    has_it = select(RESOURCE.c.chain_id).where(
        RESOURCE.c.resource_type == resource[0], RESOURCE.c.resource_id == resource[1]
    )
    ids = list(
        connection.execute(
            select(CHAIN.c.id)
            .where(CHAIN.c.id.in_(has_it), CHAIN.c.disabled != disabled)
            .order_by(CHAIN.c.id)
            .with_for_update()
        ).scalars()
    )
    if not ids:
        return []
    due_at = None if disabled else case((CHAIN.c.pending_delivery_id.is_(None), at_once(now)))
    for start in range(0, len(ids), _PARAMETERS):
        connection.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(ids[start : start + _PARAMETERS]), CHAIN.c.disabled != disabled)
            .values(disabled=disabled, version=CHAIN.c.version + 1, due_at=due_at, updated_at=now)
        )
    action = EventAction.DISABLED if disabled else EventAction.ENABLED
    for chain_id in ids:
        add_event_at_version(connection, chain_id, action, requested_by=requested_by, detail=reason, now=now)
    return ids


def erase(connection: Connection, chain_ids: Sequence[int]) -> None:
    """Delete these chains with their resources, events and deliveries."""
    for table in (EVENT, DELIVERY, RESOURCE):
        connection.execute(delete(table).where(table.c.chain_id.in_(chain_ids)))
    connection.execute(delete(CHAIN).where(CHAIN.c.id.in_(chain_ids)))


def set_state(
    connection: Connection,
    record: ChainRecord,
    *,
    state: str,
    action: EventAction,
    due_at: datetime | None,
    requested_by: str | None,
    reason: str | None,
    now: datetime,
) -> None:
    """Put a chain, locked and without open delivery, into a state on a person's behalf."""
    done = connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id == record.id, CHAIN.c.version == record.version, CHAIN.c.pending_delivery_id.is_(None))
        .values(moved_values(state, next_update_at=None, due_at=due_at, now=now, request=None))
    )
    if not one_row(done):
        raise DeliveryPending(record.id)
    add_event(
        connection,
        record.id,
        record.version + 1,
        action,
        value=state,
        from_state=record.state,
        to_state=state,
        requested_by=requested_by,
        detail=reason,
        now=now,
    )


def _can_wake(state: str, now: datetime) -> ColumnElement[bool]:
    """Whether a chain rests in a state, so that it can be made due."""
    return and_(
        CHAIN.c.state == state,
        ~CHAIN.c.disabled,
        CHAIN.c.pending_delivery_id.is_(None),
        or_(CHAIN.c.due_at.is_(None), CHAIN.c.due_at > now),
    )


def count_resting(connection: Connection, *, type_name: str, state: str, after_id: int, now: datetime) -> int:
    """How many chains with ids above `after_id` `make_due` would make due at `now`."""
    query = select(func.count()).where(
        CHAIN.c.chain_type == type_name,
        CHAIN.c.id > after_id,
        _can_wake(state, now),
        or_(CHAIN.c.next_update_at.is_(None), CHAIN.c.next_update_at <= now),
    )
    return int(connection.execute(query).scalar_one())


def rename_state(
    connection: Connection,
    record: ChainRecord,
    state: str,
    *,
    has_candidates: bool,
    requested_by: str | None,
    reason: str | None,
    now: datetime,
) -> None:
    """Give the state of a chain, locked, another name, and count its failures from 0.

    It is due at once if the state has candidates, unless a delivery, a rest or its being disabled keeps it.
    """
    free = and_(CHAIN.c.pending_delivery_id.is_(None), ~CHAIN.c.disabled)
    connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id == record.id, CHAIN.c.version == record.version)
        .values(
            state=state,
            version=CHAIN.c.version + 1,
            failures=0,
            due_at=case((free, at_once(now))) if has_candidates else None,
            updated_at=now,
        )
    )
    add_event(
        connection,
        record.id,
        record.version + 1,
        EventAction.MAPPED,
        value=state,
        from_state=record.state,
        to_state=state,
        requested_by=requested_by,
        detail=f"from {record.state}" + (f": {reason}" if reason else ""),
        now=now,
    )


def separate(connection: Connection, chain_ids: Sequence[int], *, mark: str) -> tuple[list[int], list[int]]:
    """Give these chains new uids with a mark: `(ids of chains that have got one, ids of chains left as they are)`.

    A chain that waits for a delivery is left as it is. One that has the mark already is in neither list.
    """
    rows = connection.execute(
        select(CHAIN.c.id, CHAIN.c.uid, CHAIN.c.pending_delivery_id)
        .where(CHAIN.c.id.in_(chain_ids))
        .order_by(CHAIN.c.id)
        .with_for_update()
    )
    left = [row for row in rows if not has_mark(row.uid, mark)]
    waiting = [row.id for row in left if row.pending_delivery_id is not None]
    separated = [row.id for row in left if row.pending_delivery_id is None]
    if separated:
        change = (
            update(CHAIN)
            .where(CHAIN.c.id == bindparam("chain_id"))
            # The version makes stale what another process is about to plan with the old key.
            .values(uid=bindparam("new_uid"), version=CHAIN.c.version + 1)
        )
        connection.execute(change, [{"chain_id": one, "new_uid": new_uid(mark)} for one in separated])
    return separated, waiting


def make_due(
    connection: Connection, *, type_name: str, state: str, after_id: int, limit: int, now: datetime
) -> int | None:
    """Make the next batch of chains that rest in a state due; the last id seen, or None when there are no more."""
    ids = (
        connection.execute(
            select(CHAIN.c.id)
            .where(CHAIN.c.chain_type == type_name, CHAIN.c.state == state, CHAIN.c.id > after_id)
            .order_by(CHAIN.c.id)
            .limit(limit)
        )
        .scalars()
        .all()
    )
    if not ids:
        return None
    connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id.in_(ids), _can_wake(state, now))
        .values(
            version=CHAIN.c.version + 1,  # so that a plan or rest that the old candidates have made meanwhile is stale
            due_at=at_once(now),
            updated_at=now,
        )
    )
    return int(ids[-1])


# --- history -------------------------------------------------------------------------------------------
