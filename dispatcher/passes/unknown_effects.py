"""What becomes of attempts that ended with their process: nobody knows whether their callback took effect."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

from dispatcher.domain.config import ChainType
from dispatcher.domain.decisions import due_after_move, rest_of_plan, seconds_to_retry
from dispatcher.domain.records import DeliveryRecord, Owed, is_local
from dispatcher.states import DeliveryStatus
from dispatcher.storage import deliveries, overdue
from dispatcher.storage.overdue import WaitingChain


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


@dataclass(frozen=True, slots=True)
class Definition:
    """What this process's configuration says of a delivery: its chain type, if known, and its transition.

    `retry_seconds` is given where a next attempt follows after the wait of the transition's policy.
    """

    chain_type: ChainType | None
    known: bool = False
    can_verify: bool = False
    retry_seconds: float | None = None


def define(delivery: DeliveryRecord, chain_type: ChainType | None, random: Callable[[], float]) -> Definition:
    """The definition of a delivery. Runs user code, so no connection may be in use."""
    known = None if chain_type is None else chain_type.by_name.get(delivery.transition)
    if chain_type is None or known is None or is_local(delivery):
        return Definition(chain_type, known=known is not None)
    can_verify = delivery.attempt <= delivery.max_attempts and callable(getattr(known, "verify", None))
    retries = not can_verify and chain_type.on_unknown == "retry" and delivery.attempt < delivery.max_attempts
    seconds = seconds_to_retry(delivery, known, random) if retries else None
    return Definition(chain_type, known=True, can_verify=can_verify, retry_seconds=seconds)


def settle_unknown(
    connection: Connection,
    delivery: DeliveryRecord,
    chain: WaitingChain | None,
    definition: Definition,
    *,
    now: datetime,
    grace_seconds: float,
) -> Settlement:
    """Settle an attempt whose lease has ended, and whose row the caller has locked. `chain` is None if it is missing.

    An in-process attempt is cancelled (or held). A transition with `verify()` gets one more attempt, after its last one
    too, because that attempt asks `verify()` first. Otherwise `on_unknown` and the attempts left decide. Where this
    process does not know the transition, the worker that begins the next attempt knows it and decides.
    """
    chain_type = definition.chain_type
    if chain is None:  # deleted by hand: no foreign key keeps it
        overdue.look_later(connection, delivery, seconds=grace_seconds)
        return Settlement(delivery, orphan=True)
    if chain_type is None:  # a type of another version of the code: its workers settle it
        overdue.look_later(connection, delivery, seconds=grace_seconds)
        return Settlement(delivery)
    error = f"attempt {delivery.attempt} ended with its process: its effect is unknown"
    if chain.pending_delivery_id != delivery.id:  # the relay goes on, and `dispatcher doctor` names it
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=grace_seconds, error=error)
        return Settlement(delivery, orphan=True, error=error)
    local = is_local(delivery)
    if not definition.known and not local:
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=0, error=error)
        return Settlement(delivery)
    if chain_type.on_unknown == "hold" and not definition.can_verify:
        deliveries.stop(connection, delivery, status=DeliveryStatus.HELD, unknown=True, error=error, now=now)
        return Settlement(delivery, stopped=DeliveryStatus.HELD, error=error)
    if local:
        deliveries.close_and_stay(connection, delivery, now=now, reason=error)
        return Settlement(delivery)
    if definition.can_verify:
        overdue.mark_unknown(connection, delivery, seconds=0, grace_seconds=grace_seconds, error=error)
        return Settlement(delivery, owed=None if chain.disabled else Owed(delivery.id, delivery.attempt + 1))
    if definition.retry_seconds is not None:
        overdue.mark_unknown(connection, delivery, seconds=definition.retry_seconds, grace_seconds=0, error=error)
        return Settlement(delivery)
    if chain_type.on_dead == "hold":
        deliveries.stop(connection, delivery, status=DeliveryStatus.DEAD, unknown=True, error=error, now=now)
        return Settlement(delivery, stopped=DeliveryStatus.DEAD, error=error)
    next_update_at = rest_of_plan(delivery, chain_type.by_name.get(delivery.transition))
    deliveries.skip(
        connection,
        delivery,
        next_update_at=next_update_at,
        due_at=due_after_move(chain_type, delivery.final_state, next_update_at, now),
        now=now,
        detail=f"out of attempts: {error}",
    )
    return Settlement(delivery)
