"""Whether a begun attempt may go on now: its chain's delivery hours, and the rate limits of its callback and type."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

from dispatcher.coordination.limiter import RateLimiter
from dispatcher.domain.callbacks import limits_of
from dispatcher.domain.config import ChainType
from dispatcher.domain.hours import zone_of
from dispatcher.domain.records import Begun
from dispatcher.states import WaitsFor
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_CLOCK_SECONDS: Final = 60.0


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

    def deferral(self, chain_type: ChainType, begun: Begun, now: datetime) -> Deferral | None:
        """None if the attempt may go on; its limits have then counted a call. Otherwise why it waits.

        `now` is domain time.
        """
        delivery = begun.delivery
        hours = chain_type.hours
        if hours is not None:
            zone = _zone(chain_type, begun)
            seconds = hours.wait(now, zone).total_seconds()
            if seconds:
                # Round up: rows store milliseconds, and waking early would only wait again.
                seconds = min(math.ceil(seconds), _CLOCK_SECONDS if self._own_clock else math.inf)
                return Deferral(WaitsFor.HOURS, f"delivery hours {chain_type.delivery_hours} {zone.key}", seconds)
        limits = limits_of(chain_type, chain_type.by_name[delivery.transition], delivery.callback)
        # A retry has already waited in line once; it keeps its priority.
        refusal = self._limiter.ask(limits, has_place=delivery.attempt > 1 or delivery.has_place)
        if refusal is None:
            return None
        return Deferral(WaitsFor.RATE, refusal.reason, refusal.seconds, refusal.has_place)


def _zone(chain_type: ChainType, begun: Begun) -> ZoneInfo:
    """The time zone that the context names, in the chain's row or in its request; else that of the chain type."""
    context: Mapping[str, Any] = {**(begun.chain.context or {}), **(begun.delivery.context or {})}
    if context.get("time_zone") is None:
        return chain_type.zone
    try:
        return zone_of(context["time_zone"])
    except ValueError:
        emit(
            logger,
            Action.TIME_ZONE_UNKNOWN,
            "chain %s: the time zone in its context is not known; the time zone of its chain type is used",
            begun.chain.id,
            chain_id=begun.chain.id,
        )
        return chain_type.zone
