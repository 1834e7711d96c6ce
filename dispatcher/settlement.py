"""What becomes of attempts that ended with their process: their effect is unknown."""

from collections.abc import Callable
from datetime import datetime

from sqlalchemy.orm import Session

from dispatcher import deliveries
from dispatcher.config import ChainType
from dispatcher.decisions import due_after_move
from dispatcher.deliveries import DeliveryRecord, Owed
from dispatcher.retry import RetryPolicy
from dispatcher.states import DeliveryStatus


def settle_crashed(
    session: Session,
    delivery: DeliveryRecord,
    chain_type: ChainType,
    *,
    now: datetime,
    grace_seconds: float,
    random: Callable[[], float],
) -> Owed | None:
    """Settle an attempt whose lease has ended; the message to publish at once, if any.

    In-process ones are cancelled (or held); with `verify()` the next attempt asks it first; else `on_unknown` and the
    attempts left decide.
    """
    if not deliveries.lease_expired(session, delivery):
        return None
    error = f"attempt {delivery.attempt} ended with its process: its effect is unknown"
    if chain_type.on_unknown == "hold" and not _can_verify(chain_type, delivery):
        deliveries.stop(session, delivery, status=DeliveryStatus.HELD, unknown=True, error=error, now=now)
        return None
    if deliveries.is_local(delivery):
        deliveries.close_and_stay(session, delivery, now=now, reason=error)
        return None
    if _can_verify(chain_type, delivery):
        deliveries.mark_unknown(session, delivery, seconds=0, grace_seconds=grace_seconds, error=error)
        return Owed(delivery.id, delivery.attempt + 1)
    if delivery.attempt >= delivery.max_attempts:
        if chain_type.on_dead == "hold":
            deliveries.stop(session, delivery, status=DeliveryStatus.DEAD, unknown=True, error=error, now=now)
        else:
            deliveries.close_and_move(
                session,
                delivery,
                status=DeliveryStatus.SKIPPED,
                next_update_at=None,
                due_at=due_after_move(chain_type, delivery.final_state, None, now),
                now=now,
                detail=f"out of attempts: {error}",
            )
        return None
    known = chain_type.by_name.get(delivery.transition)
    policy = known.retry if known is not None else RetryPolicy()
    seconds = policy.delay(delivery.attempt, random).total_seconds()
    deliveries.mark_unknown(session, delivery, seconds=seconds, grace_seconds=0, error=error)
    return None


def _can_verify(chain_type: ChainType, delivery: DeliveryRecord) -> bool:
    known = chain_type.by_name.get(delivery.transition)
    return known is not None and callable(getattr(known, "verify", None)) and not deliveries.is_local(delivery)
