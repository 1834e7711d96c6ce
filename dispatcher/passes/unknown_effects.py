"""What becomes of attempts that ended with their process, or that an operator has given up.

Where their callback may have been called, nobody knows whether it took effect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from sqlalchemy.engine import Connection

from dispatcher.domain.config import ChainType
from dispatcher.domain.decisions import due_after_move, rest_of_plan, seconds_to_retry
from dispatcher.domain.records import DeliveryRecord, is_local
from dispatcher.states import DeliveryStatus
from dispatcher.storage import deliveries, overdue
from dispatcher.storage.overdue import WaitingChain


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of one attempt, and what a person must know.

    `again` says that the next attempt is to be published at once. `stopped` is the status in which a person decides.
    `orphan` says that the chain does not wait for the delivery.
    """

    delivery: DeliveryRecord
    again: bool = False
    stopped: DeliveryStatus | None = None
    orphan: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Definition:
    """What this process's configuration says of a delivery: its chain type, if known, and its transition.

    `retry_seconds` is the wait until the next attempt; None where no attempt follows. It is 0 after the first attempt
    that is lost, and the wait of the transition's policy after later ones.
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
    uncalled = delivery.was_not_called
    can_verify = not uncalled and delivery.attempt <= delivery.max_attempts and callable(getattr(known, "verify", None))
    may_retry = uncalled or chain_type.on_unknown == "retry"
    if can_verify or not may_retry or delivery.attempt >= delivery.max_attempts:
        return Definition(chain_type, known=True, can_verify=can_verify)
    first = delivery.attempt == 1 if uncalled else not delivery.unknown
    seconds = 0.0 if first else seconds_to_retry(delivery, known, random)
    return Definition(chain_type, known=True, retry_seconds=seconds)


def settle_lost(
    connection: Connection,
    delivery: DeliveryRecord,
    chain: WaitingChain | None,
    definition: Definition,
    *,
    now: datetime,
    grace_seconds: float,
    cause: str = "ended with its process",
) -> Settlement:
    """Settle an attempt that nobody makes any more, and whose row the caller has locked.

    `chain` is None if it is missing. `cause` says in the row why the attempt is lost.

    If its callback was certainly not called, it is a failed attempt. Otherwise its effect is unknown: an in-process
    attempt is cancelled (or held); a transition with `verify()` gets one more attempt, after its last one too, because
    that attempt asks `verify()` first; otherwise `on_unknown` and the attempts left decide. Where this process does not
    know the transition, the worker that begins the next attempt knows it and decides.
    """
    chain_type = definition.chain_type
    if chain is None:  # deleted by hand: no foreign key keeps it
        overdue.look_later(connection, delivery, seconds=grace_seconds)
        return Settlement(delivery, orphan=True)
    if chain_type is None:  # a type of another version of the code: its workers settle it
        overdue.look_later(connection, delivery, seconds=grace_seconds)
        return Settlement(delivery)
    uncalled = delivery.was_not_called
    effect = "its callback was not called" if uncalled else "its effect is unknown"
    error = f"attempt {delivery.attempt} {cause}: {effect}"
    again = partial(overdue.open_next, connection, delivery, unknown=not uncalled, error=error)
    if chain.pending_delivery_id != delivery.id:  # the relay goes on, and `dispatcher doctor` names it
        again(seconds=0, grace_seconds=grace_seconds)
        return Settlement(delivery, orphan=True, error=error)
    local = is_local(delivery)
    if not definition.known and not local:
        again(seconds=0, grace_seconds=0)
        return Settlement(delivery)
    if chain_type.on_unknown == "hold" and not uncalled and not definition.can_verify:
        deliveries.stop(connection, delivery, status=DeliveryStatus.HELD, unknown=True, error=error, now=now)
        return Settlement(delivery, stopped=DeliveryStatus.HELD, error=error)
    if local:
        deliveries.close_and_stay(connection, delivery, now=now, reason=error)
        return Settlement(delivery)
    if definition.can_verify or definition.retry_seconds == 0:
        again(seconds=0, grace_seconds=grace_seconds)
        return Settlement(delivery, again=not chain.disabled)
    if definition.retry_seconds is not None:
        again(seconds=definition.retry_seconds, grace_seconds=0)
        return Settlement(delivery)
    return _out_of_attempts(connection, delivery, chain_type, unknown=not uncalled, error=error, now=now)


def _out_of_attempts(
    connection: Connection, delivery: DeliveryRecord, chain_type: ChainType, *, unknown: bool, error: str, now: datetime
) -> Settlement:
    if chain_type.on_dead == "hold":
        unknown = unknown or delivery.unknown
        deliveries.stop(connection, delivery, status=DeliveryStatus.DEAD, unknown=unknown, error=error, now=now)
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
