"""Rate limits that all workers count together in Redis, and the waiting lines of refused calls.

A limit is a moving window of the library `limits`: in every period of its length there are at most `amount` calls.
A refused call gets a place in the limit's line. The place is the moment at which to ask again. Places follow each other
at the pace of the limit, so that a hundred thousand refused calls do not all ask again and again. A call that asks for
the first time while there is a line goes to its end.

A place is not a permission: several calls may ask at the same moment, or late. A call that is refused at its place
waits in a second line, which is served before the first.

Keys: `{prefix}:rate:LIMITER/...` (the calls of a window), `{prefix}:rate:line/...` (the next free place in the first
line) and `{prefix}:rate:again/...` (the same for the second line), each with a TTL. All times are the server's, so that
the clocks of the workers do not matter.

Without a lock server each process counts for itself. If the server does not answer, limited calls wait for some
minutes, and then each process counts for itself.
"""

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import redis
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import MovingWindowRateLimiter

from dispatcher.rates import RateLimit
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_LINE_SECONDS: Final = 6 * 3600.0
_PACE: Final = 0.95
"""Hand out places 5 % slower than the limit, so that small delays do not cause another refusal."""

_AWAY_SECONDS: Final = 5.0
_AWAY_WAIT_SECONDS: Final = 30.0
_ALONE_SECONDS: Final = 300.0

# Takes the next place in the line KEYS[1], behind all places of the lines KEYS. Gives -1 if the line is full.
# ARGV in microseconds: now, not before, pace, length of the line.
_TAKE_PLACE: Final = """
local free = tonumber(ARGV[2])
for i = 1, #KEYS do
  free = math.max(free, tonumber(redis.call('GET', KEYS[i])) or 0)
end
if free > ARGV[2] + ARGV[4] then return -1 end
local next = free + ARGV[3]
redis.call('SET', KEYS[1], string.format('%.0f', next), 'PX', math.ceil((next - ARGV[1]) / 1000) + 1000)
return string.format('%.0f', free)
"""


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
    for itself uses its system clock.
    """

    def __init__(
        self,
        client: redis.Redis | None,
        *,
        prefix: str,
        random: Callable[[], float] = random.random,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._shared = _SharedCounter(client, f"{prefix}:rate", clock) if client is not None else None
        self._local: _LocalCounter | None = None
        self._random = random
        self._away_since: float | None = None
        self._away_until = 0.0

    def ask(self, limits: Sequence[RateLimit], *, has_place: bool) -> Refusal | None:
        """None if the call is allowed, and counted for each of these limits; else the refusal, and nothing is counted.

        `has_place` says that the caller has waited at a place, so it does not go to the end of the line. If several
        callers ask at once and the last limit refuses, the call may stay counted for the limits before it.
        """
        if not limits:
            return None
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                refusal = self._ask(self._shared, limits, has_place=has_place)
            except (redis.RedisError, OSError) as error:  # away, loading, read-only or out of memory
                self._note_away(error)
            else:
                self._away_since = None
                return refusal
        if self._away_since is not None and time.monotonic() < self._away_since + _ALONE_SECONDS:
            return Refusal(
                "Redis, which counts the calls for the rate limit, does not answer", self._spread(_AWAY_WAIT_SECONDS)
            )
        if self._local is None:
            emit(logger, Action.RATE_LIMIT_ALONE, "no lock server: each process counts its own calls for rate limits")
            self._local = _LocalCounter()
        return self._ask(self._local, limits, has_place=has_place)

    def _ask(self, counter: "_Counter", limits: Sequence[RateLimit], *, has_place: bool) -> Refusal | None:
        for limit in limits:
            if not has_place and counter.has_line(limit):
                return self._refusal(counter, limit, has_place=False)
            if len(limits) > 1 and not counter.windows.test(_item(limit), limit.name):
                return self._refusal(counter, limit, has_place=has_place)
        for limit in limits:
            if not counter.windows.hit(_item(limit), limit.name):
                return self._refusal(counter, limit, has_place=has_place)
        return None

    def _refusal(self, counter: "_Counter", limit: RateLimit, *, has_place: bool) -> Refusal:
        now = counter.now()
        window = counter.windows.get_window_stats(_item(limit), limit.name)
        # The window includes its end, so wait 1 ms longer.
        not_before = max(window.reset_time, now) + 0.001 if window.remaining <= 0 else now
        place = counter.place(limit, now=now, not_before=not_before, has_place=has_place)
        if place is None:
            return Refusal(f"the line of rate limit {limit} is full", not_before - now + self._spread(_LINE_SECONDS))
        return Refusal(f"rate limit {limit}", max(place - now, 0.001), has_place=True)

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


def _item(limit: RateLimit) -> RateLimitItem:
    return RateLimitItemPerSecond(limit.amount, limit.seconds)


def _keys(limit: RateLimit) -> tuple[str, str]:
    """The keys of a limit's two lines: first refusals, and calls that were refused at their place."""
    return f"line/{limit.name}/{limit}", f"again/{limit.name}/{limit}"


def _pace(limit: RateLimit) -> float:
    return limit.seconds / limit.amount / _PACE


class _Counter(ABC):
    """Counts calls and gives out places."""

    windows: MovingWindowRateLimiter

    @abstractmethod
    def now(self) -> float:
        """Seconds since 1970."""

    @abstractmethod
    def has_line(self, limit: RateLimit) -> bool:
        """Whether calls wait for the limit."""

    @abstractmethod
    def place(self, limit: RateLimit, *, now: float, not_before: float, has_place: bool) -> float | None:
        """The moment of a new place in a line of the limit, or None if the line is full."""


class _ServerTime(RedisStorage):
    """Counts with one clock for all workers, because worker clocks differ. The base class uses each worker's clock."""

    def __init__(self, client: redis.Redis, prefix: str, clock: Callable[[], float]) -> None:
        super().__init__("redis://", connection_pool=client.connection_pool, key_prefix=prefix)
        self._clock = clock

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        values: list[str | int] = [repr(self._clock()), limit, expiry, amount]
        return bool(self.lua_acquire_moving_window([self.prefixed_key(key)], values))

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        now = self._clock()
        window = self.lua_moving_window([self.prefixed_key(key)], [repr(now - expiry), limit])
        return (float(window[0]), int(window[1])) if window else (now, 0)


class _SharedCounter(_Counter):
    def __init__(self, client: redis.Redis, prefix: str, clock: Callable[[], float] | None) -> None:
        self._client = client
        self._prefix = prefix
        self._clock = clock if clock is not None else self._server_time
        self._take_place = client.register_script(_TAKE_PLACE)
        self.windows = MovingWindowRateLimiter(_ServerTime(client, prefix, self._clock))

    def _server_time(self) -> float:
        seconds, microseconds = self._client.time()
        return float(seconds) + float(microseconds) / 1e6

    def now(self) -> float:
        return self._clock()

    def has_line(self, limit: RateLimit) -> bool:
        values = [value for value in self._client.mget(self._line_keys(limit)) if value is not None]
        return bool(values) and max(map(float, values)) / 1e6 > self.now()

    def place(self, limit: RateLimit, *, now: float, not_before: float, has_place: bool) -> float | None:
        keys = self._line_keys(limit)[1:] if has_place else self._line_keys(limit)
        seconds = (now, not_before, _pace(limit), _LINE_SECONDS)
        answer = self._take_place(keys=keys, args=[round(value * 1e6) for value in seconds])
        return None if answer == -1 else float(answer) / 1e6

    def _line_keys(self, limit: RateLimit) -> list[str]:
        return [f"{self._prefix}:{key}" for key in _keys(limit)]


class _LocalCounter(_Counter):
    def __init__(self) -> None:
        self._next_free: dict[str, float] = {}
        self.windows = MovingWindowRateLimiter(MemoryStorage())

    def now(self) -> float:
        return time.time()

    def has_line(self, limit: RateLimit) -> bool:
        return max(self._next_free.get(key, 0.0) for key in _keys(limit)) > self.now()

    def place(self, limit: RateLimit, *, now: float, not_before: float, has_place: bool) -> float | None:
        keys = _keys(limit)[1:] if has_place else _keys(limit)
        free = max(not_before, *(self._next_free.get(key, not_before) for key in keys))
        if free > not_before + _LINE_SECONDS:
            return None
        self._next_free[keys[0]] = free + _pace(limit)
        return free
