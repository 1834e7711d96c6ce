"""Rate limits that all workers count together in Redis, and the waiting lines of refused calls.

A limit is a moving window: in every period of its length there are at most `amount` calls. A call is counted for all
its limits, or for none. An unkeyed limit counts every call. A keyed limit counts deliveries: it does not refuse a
further attempt of a delivery that is in its window.

A call that an unkeyed limit refuses gets a place in the limit's line. The place is the moment at which to ask again.
Places follow each other at the pace of the limit, so that a hundred thousand refused calls do not all ask again and
again. A call that asks for the first time while there is a line goes to its end. A call that a keyed limit refuses
waits until there is room for its key.

A place is not a permission: several calls may ask at the same moment, or late. A call that is refused at its place
waits in a second line, which is served before the first.

Without a lock server each process counts for itself. If the server does not answer, limited calls wait for some
minutes, and then each process counts for itself.
"""

import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import redis

from dispatcher.coordination.counters import LINE_SECONDS, Answer, Kind, Question
from dispatcher.coordination.local_counter import LocalCounter
from dispatcher.coordination.shared_counter import SharedCounter
from dispatcher.rates import Asked, RateLimit
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_AWAY_SECONDS: Final = 5.0
_AWAY_WAIT_SECONDS: Final = 30.0
_ALONE_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a callback may not be called now, and after how many seconds to ask again.

    `has_place` says that the caller then has a place in the line.
    """

    reason: str
    seconds: float
    has_place: bool = False


class RateLimiter:
    """Counts the calls of one deployment (`prefix`) in the lock server of `client`; None: there is no lock server.

    `random` draws from [0, 1). `clock` gives seconds since 1970 instead of the server's clock. A process that counts
    for itself uses its monotonic clock.
    """

    def __init__(
        self,
        client: redis.Redis | None,
        *,
        prefix: str,
        random: Callable[[], float] = random.random,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._shared = SharedCounter(client, prefix, clock) if client is not None else None
        self._local = LocalCounter()
        self._is_alone = False
        self._random = random
        self._away_since: float | None = None
        self._away_until = 0.0

    def peek(self, limits: Sequence[RateLimit], *, has_place: bool) -> Refusal | None:
        """None if a call could be counted for the unkeyed ones among these limits; counts nothing.

        A refusal gives the caller a place. `has_place` says that the caller has waited at a place, so that it does not
        go to the end of the line.
        """
        asked = [Asked(limit) for limit in limits if limit.key is None]
        return self._ask(Question(asked, has_place)) if asked else None

    def count(self, asked: Sequence[Asked], *, delivery: str, has_place: bool) -> Refusal | None:
        """None if the call is allowed, and counted for each of these limits; else the refusal, and nothing is counted.

        To be asked directly before the call. `delivery` is the idempotency key of the delivery: its further attempts
        are one call for keyed limits. `has_place` is as for `peek`. A refusal by a keyed limit gives no place.
        """
        asked = [each for each in asked if each.limit.key is None or each.key is not None]
        if not asked:
            return None
        # Each question has its own name of the call, so that it is counted once if the server's answer gets lost.
        call = secrets.token_urlsafe(9)
        return self._ask(Question(asked, has_place, counting=True, delivery=delivery, call=call))

    def _ask(self, question: Question) -> Refusal | None:
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                answer = self._shared.ask(question)
            except (redis.RedisError, OSError) as error:  # away, loading, read-only, out of memory, without scripts
                self._note_away(error)
            else:
                self._away_since = None
                return self._refusal(answer)
        if self._away_since is not None and time.monotonic() < self._away_since + _ALONE_SECONDS:
            return Refusal(
                "Redis, which counts the calls for the rate limit, does not answer", self._spread(_AWAY_WAIT_SECONDS)
            )
        if not self._is_alone:
            self._is_alone = True
            emit(logger, Action.RATE_LIMIT_ALONE, "no lock server: each process counts its own calls for rate limits")
        return self._refusal(self._local.ask(question))

    def _refusal(self, answer: Answer | None) -> Refusal | None:
        if answer is None:
            return None
        match answer.kind:
            case Kind.KEYED:
                return Refusal(f"rate limit {answer.limit} of its key", answer.seconds)
            case Kind.PLACE:
                return Refusal(f"rate limit {answer.limit}", max(answer.seconds, 0.001), has_place=True)
            case Kind.FULL:
                seconds = answer.seconds + self._spread(LINE_SECONDS)
                return Refusal(f"the line of rate limit {answer.limit} is full", seconds)

    def _note_away(self, error: BaseException) -> None:
        now = time.monotonic()
        self._away_until = now + _AWAY_SECONDS
        self._away_since = now if self._away_since is None else self._away_since
        emit(
            logger,
            Action.RATE_LIMIT_SERVER_AWAY,
            "the lock server does not count calls for rate limits (%s); deliveries with a rate limit wait",
            type(error).__name__,
        )

    def _spread(self, seconds: float) -> float:
        return seconds * (0.5 + 0.5 * self._random())
