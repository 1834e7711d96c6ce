"""Chain locks, queued markers and crash counters in Redis. They save work; the rows decide.

Every function answers when Redis is away: locks are then treated as taken, markers as set, so that evaluation goes on.
Keys: `{prefix}:lock:{chain_id}` (the owner's token, with a TTL), `{prefix}:queued:{chain_id}` (with a TTL), and
`{prefix}:crash:{chain_id}` (executions begun and not ended, with a TTL).
"""

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dispatcher.errors import ConfigurationError, ServiceUnavailable
from dispatcher.settings import require_plain, without_password

logger = logging.getLogger(__name__)

_CRASH_SECONDS: Final = 86_400
_AWAY_SECONDS: Final = 5.0

# SET NX PX for each lock; one that holds our own token counts as taken (a reply may have been lost). Counts the
# execution as begun and clears its queued marker in the same round trip.
_ACQUIRE: Final = """
local answer = {}
for i = 1, #KEYS, 3 do
  local mine = redis.call('SET', KEYS[i], ARGV[1], 'NX', 'PX', ARGV[2])
  if not mine then mine = redis.call('GET', KEYS[i]) == ARGV[1] end
  redis.call('DEL', KEYS[i + 1])
  if mine then
    answer[#answer + 1] = redis.call('INCR', KEYS[i + 2])
    redis.call('EXPIRE', KEYS[i + 2], ARGV[3])
  else
    answer[#answer + 1] = 0
  end
end
return answer
"""

# Deletes only what holds our token: a lock that expired and was taken by another stays.
_RELEASE: Final = """
local released = 0
for i = 1, #KEYS, 2 do
  if redis.call('GET', KEYS[i]) == ARGV[1] then
    released = released + redis.call('DEL', KEYS[i], KEYS[i + 1])
  end
end
return released
"""


@dataclass(frozen=True, slots=True)
class Held:
    """The locks that one execution holds.

    `crashes` counts, per chain, earlier executions that began and never ended. `token` is None when there is no
    lock server to hold anything.
    """

    token: str | None
    held: tuple[int, ...]
    locked: frozenset[int] = frozenset()
    crashes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LockFacts:
    """What a lock server says: its clock, its eviction policy (None: not told), and keys that never expire."""

    time: datetime
    eviction: str | None
    without_ttl: tuple[str, ...]


class ChainLocks:
    """The locks of one deployment (`prefix`); with `url=None` there is no lock server and nothing is ever locked."""

    def __init__(self, url: str | None, *, prefix: str, lock_seconds: float, connect_seconds: float) -> None:
        self.prefix = prefix
        self.lock_seconds = lock_seconds
        self.address = without_password(url) if url else ""
        self._client: redis.Redis | None = None
        self._away_until = 0.0
        if url is not None:
            require_plain(url, "Redis")
            keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
            seconds = connect_seconds / 2  # there are two tries
            try:
                self._client = redis.Redis.from_url(
                    url,
                    socket_timeout=seconds,
                    socket_connect_timeout=seconds,
                    health_check_interval=30,
                    retry=Retry(NoBackoff(), 1),
                    decode_responses=True,
                    **keepalive,
                )
            except ValueError:
                raise ConfigurationError("the Redis URL cannot be parsed") from None
            self._acquire = self._client.register_script(_ACQUIRE)
            self._release = self._client.register_script(_RELEASE)

    def __repr__(self) -> str:
        return f"<ChainLocks {self.address or 'none'}>"

    def acquire(self, chain_ids: Sequence[int]) -> Held:
        """Take the locks of these chains, without waiting; those of others are listed in `locked`."""
        token = secrets.token_hex(16)
        keys = [key for chain_id in chain_ids for key in self._keys(chain_id, "lock", "queued", "crash")]
        arguments = [token, str(int(self.lock_seconds * 1000)), str(_CRASH_SECONDS)]
        counts = self._ask(lambda: self._acquire(keys=keys, args=arguments)) if chain_ids else []
        if counts is None:
            return Held(None, tuple(chain_ids))
        taken = dict(zip(chain_ids, map(int, counts), strict=True))
        return Held(
            token,
            tuple(chain_id for chain_id, count in taken.items() if count),
            frozenset(chain_id for chain_id, count in taken.items() if not count),
            {chain_id: count - 1 for chain_id, count in taken.items() if count > 1},
        )

    def release(self, held: Held) -> None:
        """Give back what `held` still holds, and clear the crash counters of its chains."""
        if held.token is None or not held.held:
            return
        keys = [key for chain_id in held.held for key in self._keys(chain_id, "lock", "crash")]
        self._ask(lambda: self._release(keys=keys, args=[held.token]))

    def set_aside(self, held: Held, chain_ids: Sequence[int]) -> Held:
        """Give some locks back without an execution: their crash counters stay as they were. What is still held."""
        client = self._client
        if client is not None and held.token is not None:
            self._ask(
                lambda: self._release(
                    keys=[self._key("lock", one) for one in chain_ids for _ in (0, 1)], args=[held.token]
                )
            )
            for chain_id in chain_ids:
                self._ask(partial(client.decr, self._key("crash", chain_id)))
        left = tuple(chain_id for chain_id in held.held if chain_id not in set(chain_ids))
        return Held(held.token, left, held.locked)

    def locked(self, chain_ids: Sequence[int]) -> set[int]:
        """Which of these chains are locked now; reads only."""
        client = self._client
        if client is None or not chain_ids:
            return set()
        values = self._ask(lambda: client.mget([self._key("lock", chain_id) for chain_id in chain_ids]))
        return {chain_id for chain_id, value in zip(chain_ids, values or (), strict=False) if value is not None}

    def mark_queued(self, chain_ids: Sequence[int], *, seconds: float) -> list[int]:
        """Mark chains as under way; those that were not marked yet, in order (all of them when Redis is away)."""
        client = self._client
        if client is None or not chain_ids:
            return list(chain_ids)

        def mark() -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for chain_id in chain_ids:
                pipeline.set(self._key("queued", chain_id), "1", nx=True, px=int(seconds * 1000))
            return pipeline.execute()

        answers = self._ask(mark)
        if answers is None:
            return list(chain_ids)
        return [chain_id for chain_id, fresh in zip(chain_ids, answers, strict=True) if fresh]

    def unmark_queued(self, chain_ids: Sequence[int]) -> None:
        """Take back the markers of chains whose message could not be published."""
        client = self._client
        if client is not None and chain_ids:
            self._ask(lambda: client.delete(*(self._key("queued", chain_id) for chain_id in chain_ids)))

    def examine(self) -> "LockFacts | None":
        """What a lock server says of itself and of its keys; None without one. Raises `ServiceUnavailable`."""
        client = self._client
        if client is None:
            return None
        self.check()
        seconds, microseconds = client.time()
        try:
            eviction = client.config_get("maxmemory-policy").get("maxmemory-policy")
        except redis.RedisError:  # managed servers forbid CONFIG
            eviction = None
        kinds = tuple(f"{self.prefix}:{kind}:" for kind in ("lock", "queued", "crash"))
        keys = client.scan_iter(match=f"{self.prefix}:*", count=1000)
        forever = sorted(key for key in keys if key.startswith(kinds) and client.ttl(key) == -1)
        return LockFacts(datetime.fromtimestamp(seconds + microseconds / 1e6, UTC), eviction, tuple(forever))

    def drop_without_ttl(self, key: str) -> None:
        """Delete a key of this prefix that never expires."""
        if self._client is not None and key.startswith(f"{self.prefix}:") and self._client.ttl(key) == -1:
            self._client.delete(key)

    def check(self) -> None:
        """Raise `ServiceUnavailable` when there is a lock server and it does not answer."""
        if self._client is not None:
            try:
                self._client.ping()
            except (redis.RedisError, OSError) as error:
                raise ServiceUnavailable("Redis", self.address, type(error).__name__) from error

    def close(self) -> None:
        """Close this process's connections."""
        if self._client is not None:
            self._client.close()

    def _key(self, kind: str, chain_id: int) -> str:
        return f"{self.prefix}:{kind}:{chain_id}"

    def _keys(self, chain_id: int, *kinds: str) -> list[str]:
        return [self._key(kind, chain_id) for kind in kinds]

    def _ask(self, question: Any) -> Any:
        """The server's answer, or None when it is away: then it is not asked again for some seconds."""
        if self._client is None or time.monotonic() < self._away_until:
            return None
        try:
            return question()
        except (redis.RedisError, OSError) as error:  # away, loading, read-only or out of memory: all the same here
            self._away_until = time.monotonic() + _AWAY_SECONDS
            logger.warning(
                "lock server %s is away (%s): going on without locks",
                self.address,
                type(error).__name__,
                extra={"action": "lock_server_away"},
            )
            return None
