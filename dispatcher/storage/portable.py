"""The store for every database: each operation is a transaction of several statements.

A batch costs a handful of statements, whatever its size.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import bindparam, select, tuple_, update
from sqlalchemy.engine import Connection

from dispatcher.domain.records import (
    Begun,
    Budget,
    ChainRecord,
    DeliveryRecord,
    Finished,
    Move,
    Owed,
    PlannedDelivery,
    Request,
    Rest,
    Timing,
    Write,
    Written,
    by_kind,
    new_uid,
)
from dispatcher.domain.resources import Resource, resource_key
from dispatcher.states import NEW, DeliveryStatus, EventAction
from dispatcher.storage import chain_types, chains, deliveries, history
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.database import Database
from dispatcher.storage.history import add_events
from dispatcher.storage.models import CHAIN, DELIVERY, RESOURCE
from dispatcher.storage.rows import (
    MACHINE_NOW,
    chain_columns,
    deliveries_of,
    delivery_columns,
    found_of,
    joined_chains_of,
)
from dispatcher.storage.statements import (
    grouped,
    insert_many,
    insert_or_ignore,
    leased,
    moved_values,
    new_chain,
    new_id,
)
from dispatcher.storage.store import Limit


class PortableStore:
    """The store of one database of any kind."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, chain_ids: Sequence[int]) -> tuple[dict[int, ChainRecord], datetime | None]:
        with self._database.read() as connection:
            return chains.read_with_clock(connection, chain_ids)

    def write(
        self, writes: Sequence[Write], *, now: datetime, timing: Timing, limits: Mapping[str, Limit] | None = None
    ) -> Written:
        def work(connection: Connection) -> Written:
            budgets = self._lock_budgets(connection, limits or {})
            not_woken = _lock_unchanged(connection, [change.record for change in writes])
            unchanged = [change for change in writes if change.record.id in not_woken]
            allowed, spending = _within(budgets, unchanged)
            written = _write_locked(connection, allowed, not_woken, now=now, timing=timing)
            refused = {change.record.id for change in unchanged} - {change.record.id for change in allowed}
            return Written(written, frozenset(refused), spending.note(connection))

        return self._database.write(work)

    def write_request(self, chain_id: int, request: Request) -> None:
        def work(connection: Connection) -> None:
            chains.write_request(connection, chain_id, request, now=self._database.now(connection))

        self._database.write(work)

    def request_chain(self, type_name: str, resources: Sequence[Resource], request: Request, *, due: bool) -> int:
        def work(connection: Connection) -> int:
            now = self._database.now(connection)
            return chains.request_chain(connection, type_name, resources, request, due=due, now=now)

        return self._database.write(work)

    def begin(self, owed: Sequence[Owed], *, lease_seconds: float) -> list[Begun]:
        return self._database.write(lambda connection: _begin(connection, owed, lease_seconds=lease_seconds))

    def begin_anew(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> list[Begun]:
        return self._database.write(lambda connection: _begin_anew(connection, running, lease_seconds=lease_seconds))

    def mark_called(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> set[str]:
        return self._database.write(
            lambda connection: set(deliveries.renew(connection, running, lease_seconds=lease_seconds, uncalled=None))
        )

    def renew(self, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> None:
        self._database.write(
            lambda connection: deliveries.renew(connection, running, lease_seconds=lease_seconds, skip_locked=True)
        )

    def finish(self, finished: Sequence[Finished], *, now: datetime) -> set[str]:
        return self._database.write(lambda connection: _finish(connection, finished, now=now))

    def create_many(
        self, type_name: str, resource_sets: Sequence[Sequence[Resource]], *, now: datetime | None, due: bool
    ) -> list[tuple[int, bool]]:
        def work(connection: Connection) -> list[tuple[int, bool]]:
            moment = now if now is not None else self._database.now(connection)
            due_at = moment if due else None
            return _create_many(connection, type_name, resource_sets, due_at=due_at, now=moment)

        return self._database.write(work)

    def _lock_budgets(self, connection: Connection, limits: Mapping[str, Limit]) -> dict[str, Budget | None]:
        if not limits:
            return {}
        machine_now = self._database.machine_now(connection)
        return {
            type_name: chain_types.lock_budget(connection, type_name, limit, machine_now=machine_now)
            for type_name, limit in limits.items()
        }


# --- executions ------------------------------------------------------------------------------------------------------


class _Spending:
    """How many plans of each type with a budget are wanted, and how many are written."""

    def __init__(self, budgets: Mapping[str, Budget | None]) -> None:
        self._budgets = budgets
        self._spent: Counter[str] = Counter()
        self._wanted: Counter[str] = Counter()

    def allows(self, type_name: str) -> bool:
        """Count one more plan of this type that is wanted; whether its budget has room for it."""
        if type_name not in self._budgets:
            return True
        self._wanted[type_name] += 1
        budget = self._budgets[type_name]
        if budget is None or self._spent[type_name] >= budget.left:
            return False
        self._spent[type_name] += 1
        return True

    def note(self, connection: Connection) -> tuple[str, ...]:
        """Write what was spent; the types that are paused because more was wanted."""
        return tuple(
            type_name
            for type_name, budget in self._budgets.items()
            if budget is not None
            and not chain_types.spend_budget(
                connection, type_name, budget, spent=self._spent[type_name], wanted=self._wanted[type_name]
            )
        )


def _within(budgets: Mapping[str, Budget | None], writes: Sequence[Write]) -> tuple[list[Write], _Spending]:
    """Those of these writes that the budgets allow; rests need none."""
    spending = _Spending(budgets)
    allowed = [change for change in writes if isinstance(change, Rest) or spending.allows(change.record.chain_type)]
    return allowed, spending


def _lock_unchanged(connection: Connection, records: Sequence[ChainRecord]) -> dict[int, bool]:
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


def _write_locked(
    connection: Connection, writes: Sequence[Write], not_woken: Mapping[int, bool], *, now: datetime, timing: Timing
) -> dict[int, str | None]:
    """Write what came of executions of chains that `_lock_unchanged` has locked: `{chain id: id of a new delivery}`."""
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
    groups = grouped(
        moves,
        lambda move: (
            move.to_state,
            move.next_update_at,
            move.due_at,
            move.takes_request and not_woken[move.record.id],
        ),
    )
    for (to_state, next_update_at, due_at, consumed), group in groups.items():
        connection.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(move.record.id for move in group)))
            .values(
                moved_values(
                    to_state,
                    next_update_at=next_update_at,
                    due_at=due_at,
                    now=now,
                    request=None if consumed else CHAIN.c.request,
                )
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
            .values(due_at=due_at, failures=failures, updated_at=now, **({"request": None} if clear_request else {}))
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
    groups = grouped(planned, lambda plan: plan.takes_request and not_woken[plan.record.id])
    for consumed, group in groups.items():
        connection.execute(
            update(CHAIN)
            .where(CHAIN.c.id.in_(sorted(plan.record.id for plan in group)))
            .ordered_values(  # MySQL evaluates from left to right, and the subquery needs the old version
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
            "begins": 0,
            "next_attempt_at": clock_plus(0),
            "publish_after": clock_plus(timing.publish_seconds),
            "waits_since": clock_plus(0),
        }
    return {
        "status": DeliveryStatus.RUNNING,
        "attempt": 1,
        "begins": 1,
        "next_attempt_at": clock_plus(0),
        "publish_after": clock_plus(timing.lease_seconds),
        "lease_until": clock_plus(timing.lease_seconds),
        "waits_since": clock_plus(0),
    }


# --- attempts --------------------------------------------------------------------------------------------------------


def _begin(connection: Connection, owed: Sequence[Owed], *, lease_seconds: float) -> list[Begun]:
    ids = list(
        connection.execute(
            select(DELIVERY.c.id)
            .join(CHAIN, CHAIN.c.id == DELIVERY.c.chain_id)
            .where(
                tuple_(DELIVERY.c.id, DELIVERY.c.attempt).in_(
                    [(message.delivery_id, message.attempt - 1) for message in owed]
                ),
                DELIVERY.c.status == DeliveryStatus.PENDING,
                DELIVERY.c.next_attempt_at <= clock_plus(0),
                # NULL: the chain was disabled while this statement waited for the row.
                DELIVERY.c.publish_after.is_not(None),
                CHAIN.c.pending_delivery_id == DELIVERY.c.id,
                ~CHAIN.c.disabled,
            )
            .order_by(DELIVERY.c.id)
            .with_for_update(of=DELIVERY)
        ).scalars()
    )
    if not ids:
        return []
    connection.execute(
        update(DELIVERY)
        .where(DELIVERY.c.id.in_(ids))
        .ordered_values(  # MySQL evaluates from left to right, and `uncalled` needs the old `begins`
            (DELIVERY.c.uncalled, DELIVERY.c.begins + 1),
            (DELIVERY.c.begins, DELIVERY.c.begins + 1),
            (DELIVERY.c.attempt, DELIVERY.c.attempt + 1),
            (DELIVERY.c.status, DeliveryStatus.RUNNING),
            (DELIVERY.c.next_attempt_at, clock_plus(0)),
            *((DELIVERY.c[name], value) for name, value in leased(lease_seconds).items()),
        )
    )
    return _begun(connection, ids)


def _begin_anew(connection: Connection, running: Sequence[DeliveryRecord], *, lease_seconds: float) -> list[Begun]:
    waited_for = set(
        connection.execute(
            select(CHAIN.c.pending_delivery_id).where(
                CHAIN.c.pending_delivery_id.in_([delivery.id for delivery in running]),
                CHAIN.c.id.in_([delivery.chain_id for delivery in running]),
                ~CHAIN.c.disabled,
            )
        ).scalars()
    )
    waiting = [delivery for delivery in running if delivery.id in waited_for]
    return _begun(connection, deliveries.renew(connection, waiting, lease_seconds=lease_seconds))


def _begun(connection: Connection, ids: Sequence[str]) -> list[Begun]:
    """The begun attempts at these deliveries, with their chains, in the same order."""
    if not ids:
        return []
    found = found_of(connection.execute(_WITH_CHAIN, {"ids": ids}))
    records = joined_chains_of(found)
    begun = zip(deliveries_of(found), found.column(MACHINE_NOW), strict=True)  # each once per resource of its chain
    by_id = {delivery.id: Begun(delivery, records[delivery.chain_id], now) for delivery, now in begun}
    return [by_id[delivery_id] for delivery_id in ids]


_WITH_CHAIN: Final = (  # built once, because building a statement costs more than executing it
    select(
        *delivery_columns(),
        *chain_columns(),
        RESOURCE.c.resource_type,
        RESOURCE.c.resource_id,
        clock_plus(0).label(MACHINE_NOW),
    )
    .select_from(
        DELIVERY.join(CHAIN, CHAIN.c.id == DELIVERY.c.chain_id).outerjoin(RESOURCE, RESOURCE.c.chain_id == CHAIN.c.id)
    )
    .where(DELIVERY.c.id.in_(bindparam("ids", expanding=True)))
)


def _finish(connection: Connection, finished: Sequence[Finished], *, now: datetime) -> set[str]:
    by_id = {end.delivery.id: end for end in finished}
    running = connection.execute(
        select(DELIVERY.c.id, DELIVERY.c.begins)
        .where(
            tuple_(DELIVERY.c.id, DELIVERY.c.attempt).in_(
                [(end.delivery.id, end.delivery.attempt) for end in finished]
            ),
            DELIVERY.c.status == DeliveryStatus.RUNNING,
        )
        .order_by(DELIVERY.c.id)
        .with_for_update()
    )
    ours = {row.id for row in running if row.begins == by_id[row.id].delivery.begins}
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
            .values(
                moved_values(
                    state,
                    next_update_at=next_update_at,
                    due_at=due_at,
                    now=now,
                    request=None if due_at is None else CHAIN.c.request,
                )
            )
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


# --- creation --------------------------------------------------------------------------------------------------------


def _create_many(
    connection: Connection,
    type_name: str,
    resources: Sequence[Sequence[Resource]],
    *,
    due_at: datetime | None,
    now: datetime,
) -> list[tuple[int, bool]]:
    """`(chain id, created here)` of the chain with exactly each of these resource sets, in their order."""
    keys = [resource_key(pairs) for pairs in resources]
    by_key = dict(zip(keys, resources, strict=True))
    found = chains.ids_by_key(connection, type_name, by_key)
    missing = [key for key in by_key if key not in found]
    made: dict[str, int] = {}
    if missing:
        rows = [{"resource_key": key, "uid": new_uid()} for key in sorted(missing)]
        statement = insert_or_ignore(connection, CHAIN).values(new_chain(type_name, due_at=due_at, now=now))
        if connection.dialect.insert_returning:
            made = {
                key: chain_id
                for chain_id, key in connection.execute(statement.returning(CHAIN.c.id, CHAIN.c.resource_key), rows)
            }
        else:
            connection.execute(statement, rows)
            # Another process commits a chain together with its resources, so a chain without any was made here.
            ids = chains.ids_by_key(connection, type_name, missing)
            theirs = set(
                connection.execute(select(RESOURCE.c.chain_id).where(RESOURCE.c.chain_id.in_(ids.values()))).scalars()
            )
            made = {key: chain_id for key, chain_id in ids.items() if chain_id not in theirs}
        found.update(chains.ids_by_key(connection, type_name, [key for key in missing if key not in made]), **made)
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
    return in_their_order(keys, found, made)


def in_their_order(keys: Sequence[str], found: Mapping[str, int], made: Collection[str]) -> list[tuple[int, bool]]:
    """`(chain id, created here)` for each key; a key that is given twice was created for its first place."""
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    return [(found[key], key in made and first[key] == number) for number, key in enumerate(keys)]
