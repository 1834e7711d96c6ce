"""Deliveries: owed callbacks as rows, and the guarded writes of their attempts, on the caller's connection.

Nothing here commits. Machine time (leases, next attempts, what the relay looks at) is computed and compared by the
database's clock inside the statements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, delete, func, or_, select, update
from sqlalchemy.engine import Connection

from dispatcher.bounds import MAX_ERROR
from dispatcher.domain.records import DeliveryRecord, Owed, PlannedDelivery, idempotency_key
from dispatcher.retry import back_off
from dispatcher.states import (
    CLOSED_STATUSES,
    OPEN_STATUSES,
    AttemptOutcome,
    DeliveryStatus,
    EventAction,
    WaitsFor,
)
from dispatcher.storage import chains, history
from dispatcher.storage.clock import TOLERANCE, clock_plus
from dispatcher.storage.models import CHAIN, DELIVERY, EVENT
from dispatcher.storage.rows import deliveries_of, delivery_columns, found_of
from dispatcher.storage.statements import (
    NO_WAIT,
    is_running,
    leased,
    moved_values,
    one_row,
    unless_disabled,
    unless_parked,
    wait_reason,
    wait_times,
)

# --- reading ---------------------------------------------------------------------------------------------------------


def read(connection: Connection, delivery_id: str, *, lock: bool = False) -> DeliveryRecord | None:
    """The delivery with this id, or None."""
    query = select(*delivery_columns()).where(DELIVERY.c.id == delivery_id)
    found = deliveries_of(found_of(connection.execute(query.with_for_update() if lock else query)))
    return found[0] if found else None


# --- planning --------------------------------------------------------------------------------------------------------


def values_of(planned: PlannedDelivery, delivery_id: str) -> dict[str, Any]:
    """The columns of a new delivery that come from its plan."""
    record = planned.record
    return {
        "id": delivery_id,
        "idempotency_key": idempotency_key(record, planned.transition),
        "chain_id": record.id,
        "chain_version": record.version + 1,
        "transition": planned.transition,
        "from_state": record.state,
        "final_state": planned.final_state,
        "callback": planned.callback,
        "max_attempts": planned.max_attempts,
        "requested_by": planned.requested_by,
        "kwargs": dict(planned.kwargs) if planned.kwargs else None,
        "context": dict(planned.context) if planned.context else None,
        "rest_until": planned.rest_until,
        "request": planned.stored_request,
    }


# --- attempts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NotBegun:
    """Why an attempt did not begin. `early_seconds`: its message came so much before its time, by a wrong clock."""

    outcome: AttemptOutcome
    early_seconds: float | None = None


def why_not_begun(connection: Connection, owed: Sequence[Owed]) -> dict[str, NotBegun]:
    """Why these attempts did not begin, by delivery id."""
    attempts = {message.delivery_id: message.attempt for message in owed}
    columns = ("id", "status", "attempt", "waits_for", "next_attempt_at", "publish_after")
    rows = connection.execute(
        select(*(DELIVERY.c[name] for name in columns), CHAIN.c.disabled, clock_plus(0).label("now"))
        .join(CHAIN, CHAIN.c.id == DELIVERY.c.chain_id)
        .where(DELIVERY.c.id.in_(list(attempts)))
    )
    found = dict.fromkeys(attempts, NotBegun(AttemptOutcome.MISSING))
    for row in rows:
        found[row.id] = NotBegun(AttemptOutcome.STALE)
        if row.status != DeliveryStatus.PENDING:
            continue
        if row.disabled:
            found[row.id] = NotBegun(AttemptOutcome.DISABLED)
        elif row.publish_after is None and row.waits_for == WaitsFor.PAUSED:
            found[row.id] = NotBegun(AttemptOutcome.DEFERRED)
        elif row.publish_after is not None and row.attempt == attempts[row.id] - 1 and row.next_attempt_at is not None:
            early = row.next_attempt_at - row.now
            if timedelta(0) < early <= TOLERANCE:
                found[row.id] = NotBegun(AttemptOutcome.DEFERRED, early.total_seconds())
    return found


def renew(
    connection: Connection,
    running: Sequence[DeliveryRecord],
    *,
    lease_seconds: float,
    skip_locked: bool = False,
    **values: Any,
) -> list[str]:
    """Give running attempts a new lease; the ids of those that are still ours, sorted.

    With `skip_locked`, one whose row somebody else has locked is left out: its end is just being recorded.
    """
    ours = {delivery.id: (delivery.attempt, delivery.begins) for delivery in running}
    if not ours:
        return []
    rows = connection.execute(
        select(DELIVERY.c.id, DELIVERY.c.attempt, DELIVERY.c.begins)
        .where(DELIVERY.c.id.in_(sorted(ours)), DELIVERY.c.status == DeliveryStatus.RUNNING)
        .order_by(DELIVERY.c.id)
        .with_for_update(skip_locked=skip_locked)
    )
    ids = [row.id for row in rows if (row.attempt, row.begins) == ours[row.id]]
    if ids:
        began = DELIVERY.c.next_attempt_at
        # The clock may have been wrong at the begin; no attempt has begun in the future.
        possible = case((began > clock_plus(0), clock_plus(0)), else_=began)
        values = {**leased(lease_seconds), "next_attempt_at": possible, **values}
        connection.execute(update(DELIVERY).where(DELIVERY.c.id.in_(ids)).values(values))
    return ids


def give_back(connection: Connection, delivery: DeliveryRecord, *, grace_seconds: float) -> bool:
    """Take back the beginning of an attempt that was not called, without using it up; False when it is not ours.

    It may begin again at once. Its message counts as lost after `grace_seconds`. What it waited for before stands in
    its row as it was.
    """
    done = connection.execute(
        update(DELIVERY)
        .where(is_running(delivery))
        .values(
            status=DeliveryStatus.PENDING,
            attempt=delivery.attempt - 1,
            **_WAITS_AS_BEFORE,
            **wait_times(0, grace_seconds=grace_seconds),
        )
    )
    return one_row(done)


_WAITS_NO_MORE: Final = or_(DELIVERY.c.waits_for.is_(None), DELIVERY.c.waits_for == WaitsFor.PAUSED)
# Except for the end of a pause: if the type is paused, that is written anew.
_WAITS_AS_BEFORE: Final = wait_reason(
    case((~_WAITS_NO_MORE, DELIVERY.c.waits_for)),
    reason=case((~_WAITS_NO_MORE, DELIVERY.c.waits_reason)),  # MySQL has written `waits_for` before
    has_place=DELIVERY.c.has_place,
)


def postpone(
    connection: Connection,
    delivery: DeliveryRecord,
    *,
    what: WaitsFor,
    reason: str,
    seconds: float,
    grace_seconds: float = 0,
    has_place: bool = False,
) -> bool:
    """Take back the beginning of an attempt, without using it up: it has to wait for `what`.

    `reason` is for people. The attempt's message counts as lost `grace_seconds` after the wait. `has_place` says that
    the moment is its place in the line of a rate limit.
    """
    done = connection.execute(
        update(DELIVERY)
        .where(is_running(delivery))
        .values(
            status=DeliveryStatus.PENDING,
            attempt=delivery.attempt - 1,
            **wait_reason(what, reason=reason[:MAX_ERROR], has_place=has_place),
            **wait_times(seconds, grace_seconds=grace_seconds),
        )
    )
    return one_row(done)


def retry(
    connection: Connection, delivery: DeliveryRecord, *, seconds: float, grace_seconds: float, error: str
) -> bool:
    """Close a failed attempt; the next may begin in `seconds`, and its message counts as lost `grace_seconds` later."""
    done = connection.execute(
        update(DELIVERY)
        .where(is_running(delivery))
        .values(
            status=DeliveryStatus.PENDING,
            last_error=error[:MAX_ERROR],
            **wait_reason(WaitsFor.RETRY),
            **wait_times(seconds, grace_seconds=grace_seconds),
        )
    )
    return one_row(done)


def skip(
    connection: Connection,
    delivery: DeliveryRecord,
    *,
    next_update_at: datetime | None,
    due_at: datetime | None,
    now: datetime,
    requested_by: str | None = None,
    detail: str | None = None,
) -> bool:
    """Close a delivery as skipped and move its chain, in this transaction; False when it changed since it was read."""
    if not _close(connection, delivery, status=DeliveryStatus.SKIPPED, error=None):
        return False
    done = connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id == delivery.chain_id, CHAIN.c.pending_delivery_id == delivery.id)
        .values(
            moved_values(
                delivery.final_state,
                next_update_at=next_update_at,
                due_at=due_at,
                now=now,
                request=None if due_at is None else CHAIN.c.request,
            )
        )
    )
    if not one_row(done):
        raise LostChain(delivery.chain_id)
    requested_by = requested_by if requested_by is not None else delivery.requested_by
    for action, value, said in (
        (EventAction.SKIPPED, delivery.transition, detail),
        (EventAction.STATE_TRANSITION, delivery.final_state, delivery.transition),
    ):
        history.add_event_at_version(
            connection,
            delivery.chain_id,
            action,
            value=value,
            from_state=delivery.from_state,
            to_state=delivery.final_state,
            requested_by=requested_by,
            detail=said,
            now=now,
        )
    return True


def close_and_stay(
    connection: Connection,
    delivery: DeliveryRecord,
    *,
    now: datetime,
    reason: str,
    requested_by: str | None = None,
) -> bool:
    """Close a delivery as cancelled; False when it changed since it was read.

    The chain stays in its state. It is due at once, or when it is enabled.
    """
    if not _close(connection, delivery, status=DeliveryStatus.CANCELLED, error=reason):
        return False
    _stay(connection, delivery, now=now, due_at=now, reason=reason, requested_by=requested_by)
    return True


_ENTERING: Final = [str(action) for action in (EventAction.STATE_TRANSITION, EventAction.RESET, EventAction.MOVED)]
"""With these a chain begins a visit of a state."""


def call_off(connection: Connection, delivery: DeliveryRecord, *, now: datetime, reason: str) -> datetime | None:
    """Close a delivery that its last look has cancelled. Gives when its chain is due, or None if it changed meanwhile.

    The request that the plan took is put back, unless a newer one is there. The first time the chain is due at once.
    Where other deliveries were called off in the same visit of the state, their number becomes the chain's `failures`,
    and the chain is due after a growing interval, or at once if a newer request waits. Otherwise old and new workers
    that disagree during a deploy would plan and cancel as fast as messages travel.
    """
    entered = select(func.max(EVENT.c.chain_version)).where(
        EVENT.c.chain_id == delivery.chain_id, EVENT.c.action.in_(_ENTERING)
    )
    before = connection.execute(
        select(func.count()).where(
            DELIVERY.c.chain_id == delivery.chain_id,
            DELIVERY.c.chain_version > func.coalesce(entered.scalar_subquery(), 0),
            DELIVERY.c.called_off,
        )
    ).scalar_one()
    if not _close(connection, delivery, status=DeliveryStatus.CANCELLED, error=reason, called_off=True):
        return None
    chain = select(CHAIN.c.request.is_not(None)).where(CHAIN.c.id == delivery.chain_id).with_for_update()
    has_newer = connection.execute(chain).scalar_one_or_none()
    due_at = now
    if before and not has_newer:
        due_at += back_off(delivery.chain_id, before)
    taken = delivery.taken_request
    request = CHAIN.c.request if has_newer or taken is None else taken
    _stay(connection, delivery, now=now, due_at=due_at, reason=reason, failures=before, request=request)
    return due_at


def _stay(
    connection: Connection,
    delivery: DeliveryRecord,
    *,
    now: datetime,
    due_at: datetime,
    reason: str,
    requested_by: str | None = None,
    **values: Any,
) -> None:
    """Let the chain of a delivery that was just cancelled stay in its state. Raises `LostChain`."""
    done = connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id == delivery.chain_id, CHAIN.c.pending_delivery_id == delivery.id)
        .values(
            version=CHAIN.c.version + 1,
            pending_delivery_id=None,
            due_at=unless_disabled(due_at),
            updated_at=now,
            **values,
        )
    )
    if not one_row(done):
        raise LostChain(delivery.chain_id)
    _event(connection, delivery, EventAction.CANCELLED, now=now, requested_by=requested_by, detail=reason)


def stop(
    connection: Connection,
    delivery: DeliveryRecord,
    *,
    status: DeliveryStatus,
    error: str,
    now: datetime,
    unknown: bool | None = None,
) -> bool:
    """Leave a running delivery dead or held for a person to decide; False when it is not ours."""
    done = connection.execute(
        update(DELIVERY)
        .where(is_running(delivery))
        .values(
            status=status,
            unknown=DELIVERY.c.unknown if unknown is None else unknown,
            last_error=error[:MAX_ERROR],
            **_STOPPED_VALUES,
        )
    )
    if not one_row(done):
        return False
    connection.execute(update(CHAIN).where(CHAIN.c.id == delivery.chain_id).values(version=CHAIN.c.version + 1))
    _event(connection, delivery, EventAction(status.value), now=now, detail=error)
    return True


def mark_known(connection: Connection, delivery: DeliveryRecord) -> bool:
    """Note that the earlier attempts of a running delivery had no effect."""
    return one_row(connection.execute(update(DELIVERY).where(is_running(delivery)).values(unknown=False)))


class LostChain(Exception):  # noqa: N818 - not an error for callers: it undoes the transaction
    """Raised inside a transaction to roll it back, because the chain does not wait for the delivery any more.

    `recording.recorded` catches it, and the attempt's outcome is `stale`. Relay and operators check the chain before.
    """


_STOPPED_VALUES: Final[Mapping[str, Any]] = {
    **NO_WAIT,
    "lease_until": None,
    "next_attempt_at": None,
    "publish_after": None,
    "waits_since": None,
}
"""The columns of a delivery that neither a worker nor the relay has to look at."""

CLOSED_VALUES: Final[Mapping[str, Any]] = {
    **_STOPPED_VALUES,
    "finished_at": clock_plus(0),
    "kwargs": None,
    "context": None,
    "request": None,
}
"""The columns of a delivery that is closed."""


def _close(
    connection: Connection, delivery: DeliveryRecord, *, status: DeliveryStatus, error: str | None, **values: Any
) -> bool:
    values.update(status=status, **CLOSED_VALUES)
    if error is not None:
        values["last_error"] = error[:MAX_ERROR]
    return one_row(connection.execute(update(DELIVERY).where(_is_unchanged(delivery)).values(**values)))


def _is_unchanged(delivery: DeliveryRecord) -> ColumnElement[bool]:
    return and_(
        DELIVERY.c.id == delivery.id,
        DELIVERY.c.attempt == delivery.attempt,
        DELIVERY.c.begins.is_not_distinct_from(delivery.begins),
        DELIVERY.c.status == delivery.status,
    )


def _event(
    connection: Connection,
    delivery: DeliveryRecord,
    action: EventAction,
    *,
    now: datetime,
    requested_by: str | None = None,
    detail: str | None = None,
) -> None:
    history.add_event_at_version(
        connection,
        delivery.chain_id,
        action,
        value=delivery.transition,
        from_state=delivery.from_state,
        to_state=delivery.final_state,
        requested_by=requested_by,
        detail=detail,
        now=now,
    )


# --- operators -------------------------------------------------------------------------------------------------------


def follow_disabling(connection: Connection, chain_ids: Sequence[int]) -> None:
    """Park the pending deliveries of chains that were disabled just now, or free those of chains that were enabled.

    The delivery of a chain whose type is paused stays parked.

    This ends no wait and begins none, so `waits_since` stays. Once shown, a wait that began in the future is found.
    """
    for start in range(0, len(chain_ids), 1000):
        connection.execute(
            update(DELIVERY)
            .where(
                DELIVERY.c.chain_id.in_(chain_ids[start : start + 1000]), DELIVERY.c.status == DeliveryStatus.PENDING
            )
            .values(publish_after=unless_parked(DELIVERY.c.next_attempt_at), **_WAITS_AS_BEFORE)
        )


def rename_from_state(connection: Connection, delivery: DeliveryRecord, state: str) -> None:
    """Give the state from which a delivery, locked and not running, leads another name."""
    connection.execute(update(DELIVERY).where(DELIVERY.c.id == delivery.id).values(from_state=state))


def note_abandoned(
    connection: Connection, delivery: DeliveryRecord, *, now: datetime, requested_by: str | None, reason: str | None
) -> None:
    """Add the event of an operator who gives up the running attempt at a delivery."""
    _event(connection, delivery, EventAction.ABANDONED, now=now, requested_by=requested_by, detail=reason)


def reopen(
    connection: Connection,
    delivery: DeliveryRecord,
    *,
    max_attempts: int,
    now: datetime,
    requested_by: str | None,
    reason: str | None,
) -> None:
    """Open the next attempt of a delivery that does not run, at once; the relay publishes it.

    A person who retries a held delivery has decided what its unknown effect was, so it is not held for that again.
    """
    connection.execute(
        update(DELIVERY)
        .where(_is_unchanged(delivery))
        .values(
            status=DeliveryStatus.PENDING,
            max_attempts=max_attempts,
            unknown=delivery.unknown and delivery.status != DeliveryStatus.HELD,
            **wait_reason(None),
            **wait_times(0),
        )
    )
    connection.execute(update(CHAIN).where(CHAIN.c.id == delivery.chain_id).values(version=CHAIN.c.version + 1))
    detail = reason or delivery.last_error
    _event(connection, delivery, EventAction.RETRIED, now=now, requested_by=requested_by, detail=detail)


# --- disagreements ---------------------------------------------------------------------------------------------------


def free_chain(connection: Connection, chain_id: int, *, now: datetime) -> None:
    """Make a chain due if it waits for a delivery that is closed or missing; else do nothing."""
    # Lock the chain first. Otherwise a delivery that is planned while this statement waits for the row seems missing.
    chains.read_many(connection, [chain_id], lock=True)
    owed = select(DELIVERY.c.id).where(
        DELIVERY.c.id == CHAIN.c.pending_delivery_id, DELIVERY.c.status.in_([str(status) for status in OPEN_STATUSES])
    )
    connection.execute(
        update(CHAIN)
        .where(CHAIN.c.id == chain_id, CHAIN.c.pending_delivery_id.is_not(None), ~owed.exists())
        .values(pending_delivery_id=None, version=CHAIN.c.version + 1, due_at=unless_disabled(now), updated_at=now)
    )


def close_orphan(connection: Connection, delivery_id: str, *, now: datetime) -> None:
    """Close an open delivery as cancelled if its chain is missing or does not wait for it.

    If the chain exists, a running delivery is left alone.
    """
    delivery = read(connection, delivery_id, lock=True)
    if delivery is None or delivery.status in CLOSED_STATUSES:
        return
    record = chains.read_many(connection, [delivery.chain_id], lock=True).get(delivery.chain_id)
    if record is not None and (delivery.status == DeliveryStatus.RUNNING or record.pending_delivery_id == delivery_id):
        return
    if _close(connection, delivery, status=DeliveryStatus.CANCELLED, error="its chain does not wait for it"):
        _event(connection, delivery, EventAction.CANCELLED, now=now, detail="its chain does not wait for it")


# --- upkeep ----------------------------------------------------------------------------------------------------------


def prune(connection: Connection, *, before: datetime, limit: int) -> int:
    """Delete a batch of closed deliveries that ended before `before`; how many."""
    ids = (
        connection.execute(
            select(DELIVERY.c.id)
            .where(DELIVERY.c.finished_at < before, DELIVERY.c.status.in_([str(status) for status in CLOSED_STATUSES]))
            .order_by(DELIVERY.c.finished_at, DELIVERY.c.id)
            .limit(limit)
        )
        .scalars()
        .all()
    )
    if ids:
        connection.execute(delete(DELIVERY).where(DELIVERY.c.id.in_(sorted(ids))))
    return len(ids)
