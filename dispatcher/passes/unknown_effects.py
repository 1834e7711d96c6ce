"""What becomes of attempts that ended with their process: their effect is unknown."""

import logging
from collections.abc import Callable
from datetime import datetime

from sqlalchemy.engine import Connection

from dispatcher.domain.config import ChainType
from dispatcher.domain.decisions import due_after_move
from dispatcher.domain.records import DeliveryRecord, Owed, is_local
from dispatcher.states import DeliveryStatus
from dispatcher.storage import chains, deliveries, overdue

logger = logging.getLogger(__name__)


def settle_crashed(
    connection: Connection,
    delivery: DeliveryRecord,
    chain_type: ChainType,
    *,
    now: datetime,
    grace_seconds: float,
    random: Callable[[], float],
) -> Owed | None:
    """Settle an attempt whose lease has ended; the message to publish at once, if any.

    In-process ones are cancelled (or held); with `verify()` the next attempt asks it first, after the last one too,
    but once; else `on_unknown` and the attempts left decide. A transition that this process does not know is left to
    the worker that begins the next attempt and knows it.
    """
    if not overdue.lease_expired(connection, delivery):
        return None
    error = f"attempt {delivery.attempt} ended with its process: its effect is unknown"
    record = chains.read_one(connection, delivery.chain_id)
    if record.pending_delivery_id != delivery.id:  # the relay goes on, and `dispatcher doctor` names it
        logger.error(
            "delivery %s: its chain %s does not wait for it",
            delivery.id,
            delivery.chain_id,
            extra={"action": "orphan_delivery", "chain_id": delivery.chain_id, "delivery_id": delivery.id},
        )
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=grace_seconds, error=error)
        return None
    known = chain_type.by_name.get(delivery.transition)
    local = is_local(delivery)
    can_verify = not local and delivery.attempt <= delivery.max_attempts and callable(getattr(known, "verify", None))
    if known is None and not local:
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=0, error=error)
        return None
    if chain_type.on_unknown == "hold" and not can_verify:
        deliveries.stop(connection, delivery, status=DeliveryStatus.HELD, unknown=True, error=error, now=now)
        return None
    if known is None or local:
        deliveries.close_and_stay(connection, delivery, now=now, reason=error)
        return None
    if can_verify:
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=grace_seconds, error=error)
        return None if record.disabled else Owed(delivery.id, delivery.attempt + 1)
    if delivery.attempt >= delivery.max_attempts:
        if chain_type.on_dead == "hold":
            deliveries.stop(connection, delivery, status=DeliveryStatus.DEAD, unknown=True, error=error, now=now)
        else:
            deliveries.skip(
                connection,
                delivery,
                next_update_at=None,
                due_at=due_after_move(chain_type, delivery.final_state, None, now),
                now=now,
                detail=f"out of attempts: {error}",
            )
        return None
    seconds = known.retry.delay(delivery.attempt, random).total_seconds()
    overdue.mark_unknown(connection, delivery, seconds=seconds, grace_seconds=0, error=error)
    return None
