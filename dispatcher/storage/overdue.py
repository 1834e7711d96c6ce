"""What the relay looks at: deliveries whose message was lost or whose lease has ended. Nothing here commits."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, select, tuple_, update
from sqlalchemy.engine import Connection

from dispatcher.bounds import MAX_ERROR
from dispatcher.domain.records import DeliveryRecord
from dispatcher.states import DeliveryStatus, WaitsFor
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.models import CHAIN, DELIVERY
from dispatcher.storage.rows import found_of, light_deliveries_of, light_delivery_columns
from dispatcher.storage.statements import is_running, one_row, wait_reason, wait_times


@dataclass(frozen=True, slots=True)
class WaitingChain:
    """What the relay must know of the chain of a delivery. No JSON is read, because it may be unreadable."""

    chain_type: str
    pending_delivery_id: str | None
    disabled: bool


@dataclass(frozen=True, slots=True)
class Overdue:
    """A page of deliveries that the relay has to look at, without their JSON, which it does not need.

    `lost` are pending and have lost their message. `noted` run beyond their lease, which no relay had seen before.
    `lapsed` run beyond their lease, and a relay saw that some time ago: nobody makes these attempts any more.
    """

    lost: list[DeliveryRecord]
    noted: list[DeliveryRecord]
    lapsed: list[DeliveryRecord]


def claim_overdue(
    connection: Connection, *, limit: int, grace_seconds: float, lapse_seconds: float, pending: bool = True
) -> Overdue:
    """The deliveries that the relay must look at, the oldest first, at most `limit`.

    Those that have lost their message (left out with `pending=False`) are hidden from other relays for `grace_seconds`.
    Those that outlived their lease are noted by the first relay that sees it, and hidden for `lapse_seconds`. In that
    time a process that lives can renew the lease, also after an outage of the database.
    """
    query = select(*light_delivery_columns()).where(_overdue())
    if not pending:
        query = query.where(DELIVERY.c.status == DeliveryStatus.RUNNING, DELIVERY.c.finished_at.is_(None))
    query = query.order_by(DELIVERY.c.publish_after, DELIVERY.c.id).limit(limit).with_for_update(skip_locked=True)
    found = light_deliveries_of(found_of(connection.execute(query)))
    lost = [delivery for delivery in found if delivery.status == DeliveryStatus.PENDING]
    running = [delivery for delivery in found if delivery.status == DeliveryStatus.RUNNING]
    noted, lapsed = _noted_and_lapsed(connection, running)
    for deliveries, values in (
        (lost, {"publish_after": clock_plus(grace_seconds), "waits_since": clock_plus(0)}),
        (
            noted,
            {
                "publish_after": clock_plus(lapse_seconds),
                "waits_since": clock_plus(0),
                "lapse_seen_at": clock_plus(0),
            },
        ),
    ):
        ids = [delivery.id for delivery in deliveries]
        if ids:
            connection.execute(update(DELIVERY).where(DELIVERY.c.id.in_(ids)).values(values))
    return Overdue(lost, noted, lapsed)


def _noted_and_lapsed(
    connection: Connection, running: Sequence[DeliveryRecord]
) -> tuple[list[DeliveryRecord], list[DeliveryRecord]]:
    """Those whose ended lease no relay has seen before, and the others. A note from the future does not count."""
    if not running:
        return [], []
    now = connection.execute(select(clock_plus(0))).scalar_one()
    seen = [delivery.lapse_seen_at is not None and delivery.lapse_seen_at <= now for delivery in running]
    noted = [delivery for delivery, is_seen in zip(running, seen, strict=True) if not is_seen]
    return noted, [delivery for delivery, is_seen in zip(running, seen, strict=True) if is_seen]


def _overdue(seconds: float = 0) -> ColumnElement[bool]:
    # The subquery reads the clock once. PostgreSQL's clock moves on within a statement, so no index could be used.
    return DELIVERY.c.publish_after <= select(clock_plus(-seconds)).scalar_subquery()


def late(connection: Connection, *, seconds: float, limit: int) -> list[str]:
    """Deliveries that the relay should have looked at `seconds` ago and has not."""
    query = select(DELIVERY.c.id).where(_overdue(seconds))
    return list(connection.execute(query.order_by(DELIVERY.c.publish_after).limit(limit)).scalars())


def lock_chains(connection: Connection, chain_ids: Sequence[int]) -> set[int]:
    """Lock these chains, in the order of their ids; those that somebody else has locked are left out.

    An application may hold a chain for long, in a transaction of its own. The relay must not wait for it.
    """
    query = select(CHAIN.c.id).where(CHAIN.c.id.in_(sorted(chain_ids))).order_by(CHAIN.c.id)
    return set(connection.execute(query.with_for_update(skip_locked=True)).scalars())


def waiting_chains(connection: Connection, chain_ids: Sequence[int]) -> dict[int, WaitingChain]:
    """The chains with these ids, by id; missing ones are left out."""
    rows = connection.execute(
        select(CHAIN.c.id, CHAIN.c.chain_type, CHAIN.c.pending_delivery_id, CHAIN.c.disabled).where(
            CHAIN.c.id.in_(chain_ids)
        )
    )
    return {row.id: WaitingChain(row.chain_type, row.pending_delivery_id, row.disabled) for row in rows}


def look_later(connection: Connection, delivery: DeliveryRecord, *, seconds: float) -> None:
    """Hide a running delivery that could not be settled from the relay for `seconds`."""
    connection.execute(
        update(DELIVERY)
        .where(is_running(delivery))
        .values(publish_after=clock_plus(seconds), waits_since=clock_plus(0))
    )


def beyond_limit(connection: Connection, *, seconds: float, limit: int) -> list[DeliveryRecord]:
    """Attempts that began more than `seconds` ago and still run, the oldest first, without their JSON."""
    query = select(*light_delivery_columns()).where(
        DELIVERY.c.status == DeliveryStatus.RUNNING,
        DELIVERY.c.finished_at.is_(None),
        DELIVERY.c.next_attempt_at <= clock_plus(-seconds),
    )
    return light_deliveries_of(found_of(connection.execute(query.order_by(DELIVERY.c.next_attempt_at).limit(limit))))


def lock_expired(connection: Connection, running: Sequence[DeliveryRecord]) -> set[str]:
    """Which of these attempts still run although their lease has ended: the deliveries' ids. Their rows are locked.

    They are locked in the order of their ids. A row that somebody else has locked is left out, because its attempt is
    just being recorded. So is one that has changed since it was read: its lease was renewed meanwhile, perhaps because
    its callback was called, and the relays have to see that it ends again.
    """
    query = select(DELIVERY.c.id, DELIVERY.c.begins, DELIVERY.c.uncalled, DELIVERY.c.lapse_seen_at).where(
        tuple_(DELIVERY.c.id, DELIVERY.c.attempt).in_([(delivery.id, delivery.attempt) for delivery in running]),
        DELIVERY.c.status == DeliveryStatus.RUNNING,
        DELIVERY.c.lease_until <= clock_plus(0),
    )
    rows = connection.execute(query.order_by(DELIVERY.c.id).with_for_update(skip_locked=True)).all()
    read = {delivery.id: (delivery.begins, delivery.uncalled, delivery.lapse_seen_at) for delivery in running}
    return {row.id for row in rows if (row.begins, row.uncalled, row.lapse_seen_at) == read[row.id]}


def open_next(
    connection: Connection, delivery: DeliveryRecord, *, unknown: bool, seconds: float, grace_seconds: float, error: str
) -> bool:
    """Open the next attempt of a delivery whose running attempt is lost, and whose row the caller has locked.

    `unknown` says that the callback may have been called. What earlier attempts left unknown stays so.
    """
    done = connection.execute(
        update(DELIVERY)
        .where(is_running(delivery))
        .values(
            status=DeliveryStatus.PENDING,
            unknown=True if unknown else DELIVERY.c.unknown,
            last_error=error[:MAX_ERROR],
            **wait_reason(WaitsFor.RETRY),
            **wait_times(seconds, grace_seconds=grace_seconds),
        )
    )
    return one_row(done)
