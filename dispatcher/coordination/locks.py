"""Chain locks, queued markers and crash counters in Redis. They save work; the rows decide.

Every function works when Redis is away: `acquire` then succeeds for all chains, and `mark_queued` gives all chains, so
that evaluation continues. Keys, each with a TTL: `{prefix}:lock:{chain_id}` (the token of the holder),
`{prefix}:queued:{chain_id}`, and `{prefix}:crash:{chain_id}` (how many executions have begun and not ended). A key that
would stay longer than its own length, because the server's clock was wrong when it was set, counts as not set.
"""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dispatcher.coordination.scripts import Script
from dispatcher.errors import ConfigurationError, ServiceUnavailable
from dispatcher.telemetry import Action, emit
from dispatcher.urls import require_plain, without_password

logger = logging.getLogger(__name__)

_CRASH_MILLISECONDS: Final = 86_400_000
_AWAY_SECONDS: Final = 5.0


# The end of a key is a moment of the server's clock. If that clock was ahead when the key was set and is right again,
# the key would stay for too long, days perhaps. So a value says how long its key lives ("<token>.<milliseconds>"). A
# key that would live longer, and longer than a key of the caller, counts as not set. Five seconds more are allowed, so
# that a small correction of the clock ends no lock. Only keys that are in the way are looked at.
_LATE: Final = """
local function is_late(key, value, milliseconds)
  local longest = math.max(tonumber(milliseconds), tonumber(string.match(value, '%.(%d+)$')) or 0)
  return redis.call('PTTL', key) > longest + 5000
end
"""

# SET NX PX for each lock. A lock that has our token already counts as taken, because the reply to an earlier try may be
# lost. The same round trip counts the execution as begun and clears its queued marker. The answer leaves out each chain
# that was locked and has no crash. For the others it has the id, and then -1 if another process has the lock, else the
# number of earlier executions that never ended.
_ACQUIRE: Final = Script(
    _LATE
    + """
local prefix, token, milliseconds, crash_milliseconds = unpack(ARGV, 1, 4)
local answer = {}
for id in string.gmatch(ARGV[5], '%d+') do
  local lock = prefix .. ':lock:' .. id
  local mine = redis.call('SET', lock, token, 'NX', 'PX', milliseconds)
  if not mine then
    local holder = redis.call('GET', lock)
    mine = holder == token
    if not mine and is_late(lock, holder, milliseconds) then
      mine = redis.call('SET', lock, token, 'PX', milliseconds)
    end
  end
  redis.call('DEL', prefix .. ':queued:' .. id)
  local earlier = -1
  if mine then
    local crash = prefix .. ':crash:' .. id
    earlier = redis.call('INCR', crash) - 1
    if earlier > 0 and is_late(crash, '', crash_milliseconds) then
      redis.call('SET', crash, 1)
      earlier = 0
    end
    redis.call('PEXPIRE', crash, crash_milliseconds)
  end
  if earlier ~= 0 then
    answer[#answer + 1] = id
    answer[#answer + 1] = earlier
  end
end
return answer
"""
)

# Deletes only locks with our token, because a lock may have expired and now belong to another process.
_RELEASE: Final = Script("""
local prefix, token = ARGV[1], ARGV[2]
local released = 0
for id in string.gmatch(ARGV[3], '%d+') do
  local lock = prefix .. ':lock:' .. id
  if redis.call('GET', lock) == token then
    released = released + redis.call('DEL', lock, prefix .. ':crash:' .. id)
  end
end
return released
""")

# Releases the locks of chains that were not executed. `_ACQUIRE` counted each as begun; this takes the one back.
_SET_ASIDE: Final = Script("""
local prefix, token = ARGV[1], ARGV[2]
for id in string.gmatch(ARGV[3], '%d+') do
  local lock = prefix .. ':lock:' .. id
  if redis.call('GET', lock) == token then
    redis.call('DEL', lock)
    redis.call('DECR', prefix .. ':crash:' .. id)
  end
end
return 0
""")

# Gives the chains that have a key of this kind.
_PRESENT: Final = Script(
    _LATE
    + """
local prefix, kind, milliseconds = unpack(ARGV, 1, 3)
local present = {}
for id in string.gmatch(ARGV[4], '%d+') do
  local key = prefix .. ':' .. kind .. ':' .. id
  local value = redis.call('GET', key)
  if value and not is_late(key, value, milliseconds) then present[#present + 1] = id end
end
return present
"""
)

# SET NX PX for each marker; gives the chains that were not marked. A marker that has our token was not there before.
_MARK: Final = Script(
    _LATE
    + """
local prefix, token, milliseconds = unpack(ARGV, 1, 3)
local fresh = {}
for id in string.gmatch(ARGV[4], '%d+') do
  local marker = prefix .. ':queued:' .. id
  local is_fresh = redis.call('SET', marker, token, 'NX', 'PX', milliseconds)
  if not is_fresh then
    local value = redis.call('GET', marker)
    is_fresh = value == token
    if not is_fresh and is_late(marker, value, milliseconds) then
      is_fresh = redis.call('SET', marker, token, 'PX', milliseconds)
    end
  end
  if is_fresh then fresh[#fresh + 1] = id end
end
return fresh
"""
)


@dataclass(frozen=True, slots=True)
class Held:
    """The chains that one execution may work on (`held`), and those that other processes have locked (`locked`).

    `crashes` counts, per chain, earlier executions that began and never ended. `token` is what our locks contain. It is
    None if no lock server is configured, or if the server is away: then `held` has all chains, but none is locked.
    """

    token: str | None
    held: tuple[int, ...]
    locked: frozenset[int] = frozenset()
    crashes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LockFacts:
    """Facts about a lock server: its clock, its eviction policy (None: unknown), and keys that never expire."""

    time: datetime
    eviction: str | None
    without_ttl: tuple[str, ...]


class ChainLocks:
    """The locks of one deployment (`prefix`); with `url=None` there is no lock server and nothing is ever locked."""

    def __init__(self, url: str | None, *, prefix: str, lock_seconds: float, connect_seconds: float) -> None:
        self.prefix = prefix
        self.lock_seconds = lock_seconds
        self._milliseconds = int(lock_seconds * 1000)
        self.address = without_password(url) if url else ""
        self._client: redis.Redis | None = None
        self._away_until = 0.0
        if url is not None:
            require_plain(url, "Redis")
            keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
            seconds = connect_seconds / 2  # because there are two tries
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

    def __repr__(self) -> str:
        return f"<ChainLocks {self.address or 'none'}>"

    @property
    def client(self) -> "redis.Redis | None":
        """The client of the lock server, for other data in it; None without a lock server."""
        return self._client

    def acquire(self, chain_ids: Sequence[int]) -> Held:
        """Take the locks of these chains without waiting. Chains locked by others are in `locked` of the result."""
        if not chain_ids:
            return Held(None, ())
        token = _token(16, self._milliseconds)
        lengths = (self._milliseconds, _CRASH_MILLISECONDS)
        answer = self._ask(_ACQUIRE, token, *lengths, _listed(chain_ids))
        if answer is None:
            return Held(None, tuple(chain_ids))
        if not answer:
            return Held(token, tuple(chain_ids))
        earlier = dict(zip(map(int, answer[::2]), answer[1::2], strict=True))
        locked = frozenset(chain_id for chain_id, count in earlier.items() if count < 0)
        crashes = {chain_id: count for chain_id, count in earlier.items() if count > 0}
        return Held(token, tuple(chain_id for chain_id in chain_ids if chain_id not in locked), locked, crashes)

    def release(self, held: Held) -> None:
        """Release the locks of `held`, and clear the crash counters of its chains."""
        if held.token is not None and held.held:
            self._ask(_RELEASE, held.token, _listed(held.held))

    def set_aside(self, held: Held, chain_ids: Sequence[int]) -> Held:
        """Release the locks of chains that were not executed, without counting a crash; gives the locks still held."""
        if held.token is not None:
            self._ask(_SET_ASIDE, held.token, _listed(chain_ids))
        left = tuple(chain_id for chain_id in held.held if chain_id not in set(chain_ids))
        return Held(held.token, left, held.locked)

    def locked(self, chain_ids: Sequence[int]) -> set[int]:
        """The chains among these that are locked now; reads only."""
        return self._present("lock", chain_ids, self._milliseconds)

    def queued(self, chain_ids: Sequence[int], *, seconds: float) -> set[int]:
        """The chains among these that are marked as queued now; reads only."""
        return self._present("queued", chain_ids, int(seconds * 1000))

    def _present(self, kind: str, chain_ids: Sequence[int], milliseconds: int) -> set[int]:
        answer = self._ask(_PRESENT, kind, milliseconds, _listed(chain_ids)) if chain_ids else ()
        return set(map(int, answer or ()))

    def mark_queued(self, chain_ids: Sequence[int], *, seconds: float) -> list[int]:
        """Mark chains as queued; gives those that were not marked before, in order (all of them when Redis is away)."""
        if not chain_ids:
            return []
        milliseconds = int(seconds * 1000)
        answer = self._ask(_MARK, _token(6, milliseconds), milliseconds, _listed(list(dict.fromkeys(chain_ids))))
        return list(chain_ids) if answer is None else list(map(int, answer))

    def unmark_queued(self, chain_ids: Sequence[int]) -> None:
        """Remove the queued markers of chains whose message could not be published."""
        client = self._client
        if client is not None and chain_ids:
            keys = [f"{self.prefix}:queued:{chain_id}" for chain_id in chain_ids]
            self._answer(lambda: client.delete(*keys))

    def examine(self) -> "LockFacts | None":
        """Facts about the lock server and its keys; None without a lock server. Raises `ServiceUnavailable`."""
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
        """Raise `ServiceUnavailable` if a lock server is configured and does not answer."""
        if self._client is not None:
            try:
                self._client.ping()
            except (redis.RedisError, OSError) as error:
                raise ServiceUnavailable("Redis", self.address, type(error).__name__) from error

    def close(self) -> None:
        """Close this process's connections."""
        if self._client is not None:
            self._client.close()

    def _ask(self, script: Script, *arguments: str | int) -> Any:
        """The answer of a script, or None if the server is away."""
        client = self._client
        return None if client is None else self._answer(lambda: script.run(client, self.prefix, *arguments))

    def _answer(self, question: Callable[[], Any]) -> Any:
        """The server's answer, or None if the server is away; it is then not asked again for some seconds."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return question()
        except (redis.RedisError, OSError) as error:  # away, loading, read-only or out of memory
            self._away_until = time.monotonic() + _AWAY_SECONDS
            emit(
                logger,
                Action.LOCK_SERVER_AWAY,
                "lock server %s does not answer (%s): work continues without locks",
                self.address,
                type(error).__name__,
            )
            return None


def _token(size: int, milliseconds: int) -> str:
    """A value that no other caller writes, and that says how long its key lives."""
    return f"{secrets.token_hex(size)}.{milliseconds}"


def _listed(chain_ids: Sequence[int]) -> str:
    return ",".join(map(str, chain_ids))
