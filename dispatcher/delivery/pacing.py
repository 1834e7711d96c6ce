"""Whether a begun attempt may go on now: its chain's delivery hours, the rate limits of its callback and type."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

from dispatcher.coordination.limiter import RateLimiter, had_place
from dispatcher.domain.callbacks import limits_of
from dispatcher.domain.config import ChainType
from dispatcher.domain.hours import zone_of
from dispatcher.domain.records import Begun

logger = logging.getLogger(__name__)

_DEFERRED: Final = "deferred: "
_BEFORE: Final = "; before: "
_CLOCK_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Deferral:
    """Why an attempt waits, in its own words and as its row keeps it, and for how many seconds of machine time."""

    why: str
    reason: str
    seconds: float


class Gate:
    """Asks hours and limits. With `own_clock` domain time is not the database's, and may go at another speed."""

    def __init__(self, *, limiter: RateLimiter, own_clock: bool) -> None:
        self._limiter = limiter
        self._own_clock = own_clock

    def ask(self, chain_type: ChainType, begun: Begun, now: datetime) -> Deferral | None:
        """None: go on, and the limits have counted a call. Else why the attempt waits, by the hours of domain time."""
        delivery = begun.delivery
        error = delivery.last_error or ""
        deferred, before = error.startswith(_DEFERRED), error
        if deferred:
            before = error.partition(_BEFORE)[2]
        hours = chain_type.hours
        if hours is not None:
            zone = _zone(chain_type, begun)
            seconds = hours.wait(now, zone).total_seconds()
            if seconds:
                # To the whole second, and never before it: the rows' clock has milliseconds.
                seconds = min(math.ceil(seconds), _CLOCK_SECONDS if self._own_clock else math.inf)
                return _deferral(f"delivery hours {chain_type.delivery_hours} {zone.key}", seconds, before)
        limits = limits_of(chain_type, chain_type.by_name[delivery.transition], delivery.callback)
        # Whoever was called before had its turn, too.
        has_place = delivery.attempt > 1 or (deferred and had_place(error.removeprefix(_DEFERRED)))
        refusal = self._limiter.ask(limits, has_place=has_place)
        return None if refusal is None else _deferral(refusal.reason, refusal.seconds, before)


def _deferral(why: str, seconds: float, before: str) -> Deferral:
    """The error of an attempt that failed stays beside the reason: it may be the last that is known."""
    return Deferral(why, f"{_DEFERRED}{why}" + (f"{_BEFORE}{before}" if before else ""), seconds)


def _zone(chain_type: ChainType, begun: Begun) -> ZoneInfo:
    """The chain's own time zone, from the context in its row or its request; the type's if it has none or no such."""
    context: Mapping[str, Any] = {**(begun.chain.context or {}), **(begun.delivery.context or {})}
    if context.get("time_zone") is None:
        return chain_type.zone
    try:
        return zone_of(context["time_zone"])
    except ValueError:
        logger.warning(
            "chain %s: the time zone in its context is not known: its chain type's is used",
            begun.chain.id,
            extra={"action": "time_zone_unknown", "chain_id": begun.chain.id},
        )
        return chain_type.zone
