"""What becomes of attempts that ended with their process: nobody knows whether their callback took effect."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

from dispatcher.domain.config import ChainType
from dispatcher.domain.decisions import due_after_move, rest_of_plan
from dispatcher.domain.records import DeliveryRecord, Owed, is_local
from dispatcher.states import DeliveryStatus
from dispatcher.storage import chains, deliveries, overdue


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of one attempt: the message to publish at once, if any, and what a person must know.

    `stopped` is the status in which a person decides. `orphan` says that the chain does not wait for the delivery.
    """

    delivery: DeliveryRecord
    owed: Owed | None = None
    stopped: DeliveryStatus | None = None
    orphan: bool = False
    error: str = ""


def settle_unknown(
    connection: Connection,
    delivery: DeliveryRecord,
    chain_type: ChainType,
    *,
    now: datetime,
    grace_seconds: float,
    random: Callable[[], float],
) -> Settlement:
    """Settle an attempt whose lease has ended.

    An in-process attempt is cancelled (or held). A transition with `verify()` gets one more attempt, after its last one
    too, because that attempt asks `verify()` first. Otherwise `on_unknown` and the attempts left decide. Where this
    process does not know the transition, the worker that begins the next attempt knows it and decides.
    """
    if not overdue.lease_expired(connection, delivery):
        return Settlement(delivery)
    error = f"attempt {delivery.attempt} ended with its process: its effect is unknown"
    record = chains.read_one(connection, delivery.chain_id)
    if record.pending_delivery_id != delivery.id:  # the relay goes on, and `dispatcher doctor` names it
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=grace_seconds, error=error)
        return Settlement(delivery, orphan=True, error=error)
    known = chain_type.by_name.get(delivery.transition)
    local = is_local(delivery)
    can_verify = not local and delivery.attempt <= delivery.max_attempts and callable(getattr(known, "verify", None))
    if known is None and not local:
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=0, error=error)
        return Settlement(delivery)
    if chain_type.on_unknown == "hold" and not can_verify:
        deliveries.stop(connection, delivery, status=DeliveryStatus.HELD, unknown=True, error=error, now=now)
        return Settlement(delivery, stopped=DeliveryStatus.HELD, error=error)
    if known is None or local:
        deliveries.close_and_stay(connection, delivery, now=now, reason=error)
        return Settlement(delivery)
    if can_verify:
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=grace_seconds, error=error)
        return Settlement(delivery, owed=None if record.disabled else Owed(delivery.id, delivery.attempt + 1))
    if delivery.attempt < delivery.max_attempts:
        seconds = known.retry.delay(delivery.attempt, random).total_seconds()
        overdue.mark_unknown(connection, delivery, seconds=seconds, grace_seconds=0, error=error)
        return Settlement(delivery)
    if chain_type.on_dead == "hold":
        deliveries.stop(connection, delivery, status=DeliveryStatus.DEAD, unknown=True, error=error, now=now)
        return Settlement(delivery, stopped=DeliveryStatus.DEAD, error=error)
    next_update_at = rest_of_plan(delivery, known)
    deliveries.skip(
        connection,
        delivery,
        next_update_at=next_update_at,
        due_at=due_after_move(chain_type, delivery.final_state, next_update_at, now),
        now=now,
        detail=f"out of attempts: {error}",
    )
    return Settlement(delivery)
