"""Whether a callback may be called at this moment: delivery hours of its chain, rate limits of its type and callback.

They hold for the moment of the call. They are peeked at before anything is loaded, counting nothing, so that a hundred
thousand waiting deliveries do not load and look for nothing. After the last look the hours are asked again, and the
call is counted.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

from dispatcher.coordination.limiter import RateLimiter, Refusal
from dispatcher.domain.callbacks import limits_of
from dispatcher.domain.config import ChainType
from dispatcher.domain.hours import zone_of
from dispatcher.domain.records import Begun, DeliveryRecord
from dispatcher.rates import Asked, asked_of
from dispatcher.states import WaitsFor
from dispatcher.telemetry import Action, emit
from dispatcher.transition import Transition

logger = logging.getLogger(__name__)

_CLOCK_SECONDS: Final = 60.0
_ZONE: Final = "time_zone"


@dataclass(frozen=True, slots=True)
class Deferral:
    """What an attempt waits for, why in words, and for how many seconds of machine time (the database's clock).

    `has_place` says that it then has a place in the line of a rate limit.
    """

    waits_for: WaitsFor
    reason: str
    seconds: float
    has_place: bool = False


class Pacing:
    """Asks the delivery hours and the rate limits.

    `own_clock` says that domain time comes from a clock of the application, which may run at another speed.
    """

    def __init__(self, *, limiter: RateLimiter, own_clock: bool) -> None:
        self._limiter = limiter
        self._own_clock = own_clock

    def peek(self, chain_type: ChainType, begun: Begun, now: datetime) -> Deferral | None:
        """Why an attempt certainly has to wait, before its facts are loaded; nothing is counted. `now` is domain time.

        Hours are left out where only the loaded facts may name the chain's time zone, and limits that have a key.
        """
        context: Mapping[str, Any] = {**(begun.chain.context or {}), **(begun.delivery.context or {})}
        zone_is_known = chain_type.load_context is None or context.get(_ZONE) is not None
        deferral = self._hours(chain_type, context, now) if zone_is_known else None
        if deferral is not None:
            _warn_of_unknown_zone(chain_type, begun.chain.id, context)  # else the call does
            return deferral
        limits = limits_of(chain_type, chain_type.by_name[begun.delivery.transition], begun.delivery.callback)
        if not limits:
            return None
        return _deferral(self._limiter.peek(limits, has_place=_has_place(begun.delivery)))

    def hours(self, chain_type: ChainType, chain_id: int, context: Mapping[str, Any], now: datetime) -> Deferral | None:
        """The wait for the chain's delivery hours, if `now` (domain time) lies outside; `context` names its zone."""
        if chain_type.hours is not None:
            _warn_of_unknown_zone(chain_type, chain_id, context)
        return self._hours(chain_type, context, now)

    def _hours(self, chain_type: ChainType, context: Mapping[str, Any], now: datetime) -> Deferral | None:
        if chain_type.hours is None:
            return None
        zone = _zone(context) or chain_type.zone
        seconds = chain_type.hours.wait(now, zone).total_seconds()
        if not seconds:
            return None
        # Round up: rows store milliseconds, and waking early would only wait again.
        seconds = min(math.ceil(seconds), _CLOCK_SECONDS if self._own_clock else math.inf)
        return Deferral(WaitsFor.HOURS, f"delivery hours {chain_type.delivery_hours} {zone.key}", seconds)

    def asked(self, chain_type: ChainType, transition: Transition, delivery: DeliveryRecord) -> tuple[Asked, ...]:
        """The limits of a call, each with its key. The key functions are user code, so this may raise anything."""
        return asked_of(limits_of(chain_type, type(transition), delivery.callback), transition)

    def count(self, asked: Sequence[Asked], delivery: DeliveryRecord) -> Deferral | None:
        """Count a call for its limits. If one refuses it, nothing is counted, and this is its wait."""
        if not asked:
            return None
        has_place = _has_place(delivery)
        return _deferral(self._limiter.count(asked, delivery=delivery.idempotency_key, has_place=has_place))


def _has_place(delivery: DeliveryRecord) -> bool:
    # A retry has already waited in line once; it keeps its priority.
    return delivery.attempt > 1 or delivery.has_place


def _deferral(refusal: Refusal | None) -> Deferral | None:
    if refusal is None:
        return None
    return Deferral(WaitsFor.RATE, refusal.reason, refusal.seconds, refusal.has_place)


def _zone(context: Mapping[str, Any]) -> ZoneInfo | None:
    """The time zone that the context names; None if it names none that is known."""
    try:
        return zone_of(context.get(_ZONE))
    except ValueError:
        return None


def _warn_of_unknown_zone(chain_type: ChainType, chain_id: int, context: Mapping[str, Any]) -> None:
    if context.get(_ZONE) is not None and _zone(context) is None:
        emit(
            logger,
            Action.TIME_ZONE_UNKNOWN,
            "chain %s: the time zone in its context is not known; the time zone of its chain type, %s, is used",
            chain_id,
            chain_type.zone.key,
            chain_id=chain_id,
        )
