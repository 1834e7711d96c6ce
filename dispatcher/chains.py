"""Reads of chains, and the guarded writes that change them, on the caller's session. Nothing here commits.

A guarded write names in its WHERE clause what the caller read; a row that changed meanwhile is not written, and the
function says so. Every plan, move, close and operator action increments `version`; every enqueue increments `wake`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Insert,
    and_,
    case,
    delete,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session

from dispatcher.errors import AmbiguousChain, ChainMissing, DeliveryPending
from dispatcher.models import (
    Base,
    ChainRow,
    DeliveryRow,
    EventRow,
    ResourceRow,
)
from dispatcher.resources import Resource, resource_key
from dispatcher.states import NEW, DeliveryStatus, EventAction
from dispatcher.transition import ChainSnapshot

MAX_DETAIL: Final = 4000


@dataclass(frozen=True, slots=True)
class Request:
    """What an application asked with `enqueue`."""

    context: Mapping[str, Any] | None = None
    callback: str | None = None
    kwargs: Mapping[str, Any] | None = None
    requested_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The form in which the chain's row keeps it."""
        return {
            "context": self.context,
            "callback": self.callback,
            "kwargs": self.kwargs,
            "requested_by": self.requested_by,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None) -> "Request | None":
        """The request in a chain's row, or None."""
        if raw is None:
            return None
        return cls(raw.get("context"), raw.get("callback"), raw.get("kwargs"), raw.get("requested_by"))


@dataclass(frozen=True, slots=True)
class ChainRecord:
    """A chain's row as it was read, with its resources."""

    id: int
    chain_type: str
    state: str
    disabled: bool
    next_update_at: datetime | None
    due_at: datetime | None
    version: int
    wake: int
    moves: int
    pending_delivery_id: str | None
    failures: int
    created_at: datetime
    updated_at: datetime
    context: dict[str, Any] | None
    request: Request | None
    resources: tuple[Resource, ...]

    def snapshot(self) -> ChainSnapshot:
        """What a transition may see of this chain."""
        return ChainSnapshot(self.id, self.chain_type, self.state, self.resources, self.created_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A chain goes to `to_state` without a callback."""

    record: ChainRecord
    transition: str
    to_state: str
    next_update_at: datetime | None
    due_at: datetime | None
    requested_by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """A chain stays; it is due again at `due_at` (None: not by itself)."""

    record: ChainRecord
    due_at: datetime | None
    failures: int = 0
    clear_request: bool = False
    event: EventAction | None = None
    detail: str | None = None

    @property
    def learns_nothing(self) -> bool:
        """Whether writing it would change nothing that matters: then nothing is written."""
        return (
            self.event is None
            and self.failures == self.record.failures
            and not (self.clear_request and self.record.request is not None)
            and self.due_at == self.record.due_at
        )


@dataclass(frozen=True, slots=True)
class DuePosition:
    """The keyset position after which the next page of due chains begins."""

    due_at: datetime
    chain_id: int


_CHAIN_COLUMNS = tuple(getattr(ChainRow, name) for name in ChainRecord.__dataclass_fields__ if name != "resources")


# --- reading ---------------------------------------------------------------------------------------------------------


def read_many(session: Session, chain_ids: Sequence[int], *, lock: bool = False) -> dict[int, ChainRecord]:
    """The chains with these ids, by id; missing ones are left out. `lock=True` locks the rows, in id order."""
    if not chain_ids:
        return {}
    query = select(*_CHAIN_COLUMNS).where(ChainRow.id.in_(sorted(chain_ids)))
    if lock:
        query = query.order_by(ChainRow.id).with_for_update()
    rows = session.execute(query).all()
    resources: dict[int, list[Resource]] = {row.id: [] for row in rows}
    pairs = select(ResourceRow.chain_id, ResourceRow.resource_type, ResourceRow.resource_id).where(
        ResourceRow.chain_id.in_(sorted(resources))
    )
    for chain_id, resource_type, resource_id in session.execute(pairs) if rows else ():
        resources[chain_id].append((resource_type, resource_id))
    return {
        row.id: ChainRecord(
            **{**row._mapping, "request": Request.from_json(row.request)}, resources=tuple(sorted(resources[row.id]))
        )
        for row in rows
    }


def read_one(session: Session, chain_id: int, *, lock: bool = False) -> ChainRecord:
    """The chain with this id; `ChainMissing` if there is none."""
    record = read_many(session, [chain_id], lock=lock).get(chain_id)
    if record is None:
        raise ChainMissing(chain_id)
    return record


def find_exact(session: Session, chain_type: str, resources: Sequence[Resource]) -> int | None:
    """The id of the chain whose resources are exactly these, or None."""
    return session.execute(
        select(ChainRow.id).where(ChainRow.chain_type == chain_type, ChainRow.resource_key == resource_key(resources))
    ).scalar_one_or_none()


def find_containing(session: Session, chain_type: str, resources: Sequence[Resource]) -> int | None:
    """The id of the one chain that has at least these resources, or None; several: `AmbiguousChain`."""
    found = list(
        session.execute(
            select(ResourceRow.chain_id)
            .join(ChainRow, ChainRow.id == ResourceRow.chain_id)
            .where(
                ChainRow.chain_type == chain_type,
                tuple_(ResourceRow.resource_type, ResourceRow.resource_id).in_(list(resources)),
            )
            .group_by(ResourceRow.chain_id)
            .having(func.count() == len(resources))
            .order_by(ResourceRow.chain_id)
            .limit(5)
        ).scalars()
    )
    if len(found) > 1:
        raise AmbiguousChain(chain_type, found)
    return found[0] if found else None


def list_ids(session: Session, *, chain_type: str | None, state: str | None, after_id: int, limit: int) -> list[int]:
    """The ids above `after_id` of the chains of that type and state (None: any), ascending, at most `limit`."""
    query = select(ChainRow.id).where(ChainRow.id > after_id)
    if chain_type is not None:
        query = query.where(ChainRow.chain_type == chain_type)
    if state is not None:
        query = query.where(ChainRow.state == state)
    return list(session.execute(query.order_by(ChainRow.id).limit(limit)).scalars())


def list_by_resource(session: Session, resource: Resource, *, after_id: int, limit: int | None) -> list[int]:
    """The ids above `after_id` of the chains that have this resource, ascending, at most `limit`."""
    query = (
        select(ResourceRow.chain_id)
        .where(ResourceRow.resource_type == resource[0], ResourceRow.resource_id == resource[1])
        .where(ResourceRow.chain_id > after_id)
    )
    return list(session.execute(query.order_by(ResourceRow.chain_id).limit(limit)).scalars())


def events(session: Session, chain_id: int) -> list[EventRow]:
    """The chain's history, oldest first."""
    return list(session.execute(select(EventRow).where(EventRow.chain_id == chain_id).order_by(EventRow.id)).scalars())


def due_page(
    session: Session, *, chain_type: str, now: datetime, after: DuePosition | None, limit: int
) -> list[DuePosition]:
    """The next due chains of a type after a position, in the order (due_at, id)."""
    query = select(ChainRow.due_at, ChainRow.id).where(ChainRow.chain_type == chain_type, _is_due(now))
    if after is not None:
        query = query.where(
            ChainRow.due_at >= after.due_at, or_(ChainRow.due_at > after.due_at, ChainRow.id > after.chain_id)
        )
    rows = session.execute(query.order_by(ChainRow.due_at, ChainRow.id).limit(limit)).all()
    return [DuePosition(due_at, chain_id) for due_at, chain_id in rows if due_at is not None]


def _is_due(now: datetime) -> ColumnElement[bool]:
    return and_(ChainRow.due_at <= now, ChainRow.pending_delivery_id.is_(None), ~ChainRow.disabled)


def statistics(session: Session, *, now: datetime) -> dict[str, Any]:
    """Counts over the whole deployment: chains, due chains, open deliveries, and the next `due_at`."""
    chains_count, due, next_due_at = session.execute(
        select(
            func.count(),
            func.coalesce(func.sum(case((_is_due(now), 1), else_=0)), 0),
            func.min(case((and_(ChainRow.pending_delivery_id.is_(None), ~ChainRow.disabled), ChainRow.due_at))),
        ).select_from(ChainRow)
    ).one()
    by_status = {
        status: count
        for status, count in session.execute(select(DeliveryRow.status, func.count()).group_by(DeliveryRow.status))
    }
    return {
        "chains": chains_count,
        "due": int(due),
        "next_due_at": next_due_at,
        "open_deliveries": by_status.get(DeliveryStatus.PENDING, 0) + by_status.get(DeliveryStatus.RUNNING, 0),
        "deliveries": {str(status): by_status.get(status, 0) for status in DeliveryStatus},
    }


def oldest_due(session: Session, *, now: datetime) -> datetime | None:
    """The `due_at` of the chain that is due longest, or None."""
    return session.execute(select(func.min(ChainRow.due_at)).where(_is_due(now))).scalar_one()


# --- creating --------------------------------------------------------------------------------------------------------


def create(
    session: Session,
    *,
    chain_type: str,
    resources: Sequence[Resource],
    context: Mapping[str, Any] | None,
    due_at: datetime | None,
    now: datetime,
) -> int:
    """The id of the chain with exactly these resources, made in NEW unless another caller was first."""
    key = resource_key(resources)
    statement = insert_or_ignore(session, ChainRow).values(
        chain_type=chain_type,
        resource_key=key,
        state=NEW,
        due_at=due_at,
        created_at=now,
        updated_at=now,
        context=dict(context) if context is not None else None,
    )
    if session.get_bind().dialect.insert_returning:
        made = session.execute(statement.returning(ChainRow.id)).one_or_none() is not None
    else:
        made = one_row(session.execute(statement))
    chain_id = find_exact(session, chain_type, resources)
    assert chain_id is not None  # the unique constraint: either ours or the one that was there
    if made:
        session.execute(
            insert(ResourceRow),
            [{"chain_id": chain_id, "resource_type": rtype, "resource_id": rid} for rtype, rid in resources],
        )
        add_event(session, chain_id, 0, EventAction.CREATED, value=NEW, to_state=NEW, now=now)
    return chain_id


def insert_or_ignore(session: Session, table: type[Base]) -> Insert:
    """An INSERT that leaves an existing row with the same unique key alone."""
    dialect = session.get_bind().dialect.name
    if dialect == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    if dialect == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    return mysql.insert(table).prefix_with("IGNORE")


# --- guarded writes of an execution ----------------------------------------------------------------------------------


def _unchanged(record: ChainRecord) -> ColumnElement[bool]:
    return and_(
        ChainRow.id == record.id,
        ChainRow.version == record.version,
        ~ChainRow.disabled,
        ChainRow.pending_delivery_id.is_(None),
    )


def unless_disabled(due_at: datetime | None) -> Any:
    """`due_at`, or NULL for a disabled chain: enabling makes it due."""
    return None if due_at is None else case((~ChainRow.disabled, literal(due_at, ChainRow.due_at.type)))


def at_once(now: datetime) -> ColumnElement[Any]:
    """`now`, or the end of the chain's rest if that is later."""
    return case((ChainRow.next_update_at > now, ChainRow.next_update_at), else_=literal(now, ChainRow.due_at.type))


def consumed_request(record: ChainRecord) -> Any:
    """The request column after it was used: a request that came in after the read stays."""
    return case((ChainRow.wake != record.wake, ChainRow.request))


def move(session: Session, change: Move, *, now: datetime) -> bool:
    """Move a chain without a callback; False when it changed since it was read."""
    record = change.record
    done = session.execute(
        update(ChainRow)
        .where(_unchanged(record))
        .values(
            state=change.to_state,
            version=ChainRow.version + 1,
            moves=ChainRow.moves + 1,
            failures=0,
            next_update_at=change.next_update_at,
            due_at=change.due_at,
            request=consumed_request(record),
            updated_at=now,
        )
    )
    if not one_row(done):
        return False
    add_event(
        session,
        record.id,
        record.version + 1,
        EventAction.STATE_TRANSITION,
        value=change.to_state,
        from_state=record.state,
        to_state=change.to_state,
        requested_by=change.requested_by,
        detail=change.transition,
        now=now,
    )
    return True


def plan(session: Session, record: ChainRecord, delivery_id: str, *, now: datetime) -> bool:
    """Tie a chain to the delivery that is about to be inserted; False when it changed since it was read."""
    done = session.execute(
        update(ChainRow)
        .where(_unchanged(record))
        .values(
            version=ChainRow.version + 1,
            pending_delivery_id=delivery_id,
            due_at=None,
            failures=0,
            request=consumed_request(record),
            updated_at=now,
        )
    )
    return one_row(done)


def rest(session: Session, change: Rest, *, now: datetime) -> bool:
    """Let a chain stay until it is due again; False when it changed, or was enqueued, since it was read."""
    record = change.record
    values: dict[str, Any] = {"due_at": change.due_at, "failures": change.failures}
    if change.clear_request:
        values["request"] = None
    done = session.execute(update(ChainRow).where(_unchanged(record), ChainRow.wake == record.wake).values(**values))
    if not one_row(done):
        return False
    if change.event is not None:
        add_event(
            session,
            record.id,
            record.version,
            change.event,
            value=record.state,
            from_state=record.state,
            to_state=record.state,
            detail=change.detail,
            now=now,
        )
    return True


# --- requests --------------------------------------------------------------------------------------------------------


def write_request(session: Session, chain_id: int, request: Request, *, now: datetime) -> ChainRecord:
    """Write an application's request to the chain's row and make it due; the record as it was before.

    An open delivery or a disabled chain keeps `due_at` empty: closing or enabling makes it due. Raises
    `ChainMissing`.
    """
    record = read_one(session, chain_id, lock=True)
    waits = record.pending_delivery_id is not None or record.disabled
    due_at = max(now, record.next_update_at) if record.next_update_at else now
    session.execute(
        update(ChainRow)
        .where(ChainRow.id == chain_id)
        .values(wake=ChainRow.wake + 1, request=request.to_json(), due_at=None if waits else due_at)
    )
    if record.request is not None and record.request != request:
        add_event(
            session,
            chain_id,
            record.version,
            EventAction.REQUEST_REPLACED,
            requested_by=request.requested_by,
            now=now,
        )
    return record


# --- operators -------------------------------------------------------------------------------------------------------


def set_disabled(session: Session, chain_id: int, *, disabled: bool, requested_by: str | None, now: datetime) -> bool:
    """Disable or enable a chain; False when it was so already. Raises `ChainMissing`."""
    record = read_one(session, chain_id, lock=True)
    if record.disabled == disabled:
        return False
    waits = disabled or record.pending_delivery_id is not None
    session.execute(
        update(ChainRow)
        .where(ChainRow.id == chain_id, ChainRow.version == record.version)
        .values(disabled=disabled, version=ChainRow.version + 1, due_at=None if waits else at_once(now), updated_at=now)
    )
    action = EventAction.DISABLED if disabled else EventAction.ENABLED
    add_event(session, chain_id, record.version + 1, action, value=record.state, requested_by=requested_by, now=now)
    return True


def set_resource_disabled(
    session: Session, resource: Resource, *, disabled: bool, requested_by: str | None, now: datetime
) -> list[int]:
    """Disable or enable every chain that has this resource, in one guarded statement; the ids of those that changed."""
    has_it = select(ResourceRow.chain_id).where(
        ResourceRow.resource_type == resource[0], ResourceRow.resource_id == resource[1]
    )
    ids = list(
        session.execute(
            select(ChainRow.id)
            .where(ChainRow.id.in_(has_it), ChainRow.disabled != disabled)
            .order_by(ChainRow.id)
            .with_for_update()
        ).scalars()
    )
    if not ids:
        return []
    due_at = None if disabled else case((ChainRow.pending_delivery_id.is_(None), at_once(now)))
    session.execute(
        update(ChainRow)
        .where(ChainRow.id.in_(ids), ChainRow.disabled != disabled)
        .values(disabled=disabled, version=ChainRow.version + 1, due_at=due_at, updated_at=now)
    )
    action = EventAction.DISABLED if disabled else EventAction.ENABLED
    for chain_id in ids:
        add_event_at_version(session, chain_id, action, requested_by=requested_by, now=now)
    return ids


def erase(session: Session, chain_ids: Sequence[int]) -> None:
    """Delete these chains with their resources, events and deliveries."""
    for table in (EventRow, DeliveryRow, ResourceRow):
        session.execute(delete(table).where(table.chain_id.in_(chain_ids)))
    session.execute(delete(ChainRow).where(ChainRow.id.in_(chain_ids)))


def set_state(
    session: Session,
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
    done = session.execute(
        update(ChainRow)
        .where(ChainRow.id == record.id, ChainRow.version == record.version, ChainRow.pending_delivery_id.is_(None))
        .values(
            state=state,
            version=ChainRow.version + 1,
            moves=ChainRow.moves + 1,
            failures=0,
            next_update_at=None,
            due_at=None if record.disabled else due_at,
            request=None,
            updated_at=now,
        )
    )
    if not one_row(done):
        raise DeliveryPending(record.id)
    add_event(
        session,
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


def make_due(session: Session, *, chain_type: str, state: str, after_id: int, limit: int, now: datetime) -> int | None:
    """Make the next batch of chains resting in a state due; the last id seen, or None when there are no more."""
    ids = (
        session.execute(
            select(ChainRow.id)
            .where(ChainRow.chain_type == chain_type, ChainRow.state == state, ChainRow.id > after_id)
            .order_by(ChainRow.id)
            .limit(limit)
        )
        .scalars()
        .all()
    )
    if not ids:
        return None
    session.execute(
        update(ChainRow)
        .where(
            ChainRow.id.in_(ids),
            ChainRow.state == state,
            ~ChainRow.disabled,
            ChainRow.pending_delivery_id.is_(None),
            or_(ChainRow.due_at.is_(None), ChainRow.due_at > now),
        )
        .values(
            wake=ChainRow.wake + 1,
            due_at=at_once(now),
        )
    )
    return ids[-1]


# --- history -------------------------------------------------------------------------------------------


def add_event(
    session: Session,
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
) -> None:
    """Append one line to a chain's history."""
    session.execute(
        insert(EventRow).values(
            chain_id=chain_id,
            chain_version=chain_version,
            move_version=chain_version if action == EventAction.STATE_TRANSITION else None,
            action=action,
            value=value,
            from_state=from_state,
            to_state=to_state,
            requested_by=requested_by,
            detail=detail[:MAX_DETAIL] if detail else None,
            created_at=now,
        )
    )


def add_event_at_version(
    session: Session,
    chain_id: int,
    action: EventAction,
    *,
    now: datetime,
    value: str | None = None,
    from_state: str | None = None,
    to_state: str | None = None,
    requested_by: str | None = None,
    detail: str | None = None,
) -> None:
    """Append one line to a chain's history that carries the version its row has in this transaction."""
    is_move = action == EventAction.STATE_TRANSITION
    source = select(
        ChainRow.id,
        ChainRow.version,
        ChainRow.version if is_move else null(),
        literal(str(action)),
        literal(value, EventRow.value.type),
        literal(from_state, EventRow.from_state.type),
        literal(to_state, EventRow.to_state.type),
        literal(requested_by, EventRow.requested_by.type),
        literal(detail[:MAX_DETAIL] if detail else None, EventRow.detail.type),
        literal(now, EventRow.created_at.type),
    ).where(ChainRow.id == chain_id)
    columns = [
        "chain_id",
        "chain_version",
        "move_version",
        "action",
        "value",
        "from_state",
        "to_state",
        "requested_by",
        "detail",
        "created_at",
    ]
    session.execute(insert(EventRow).from_select(columns, source, include_defaults=False))


def prune_events(session: Session, *, before: datetime, limit: int) -> int:
    """Delete a batch of events older than `before`; how many. The latest line of a chain's history is kept."""
    newest = select(func.max(EventRow.id)).where(EventRow.chain_id == ChainRow.id).correlate(ChainRow).scalar_subquery()
    ids = (
        session.execute(
            select(EventRow.id)
            .join(ChainRow, ChainRow.id == EventRow.chain_id)
            .where(EventRow.created_at < before, EventRow.id < newest)
            .order_by(EventRow.created_at, EventRow.id)
            .limit(limit)
        )
        .scalars()
        .all()
    )
    if ids:
        session.execute(delete(EventRow).where(EventRow.id.in_(sorted(ids))))
    return len(ids)


def one_row(result: Any) -> bool:
    """Whether a guarded write met its row."""
    return bool(result.rowcount == 1)
