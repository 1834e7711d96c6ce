"""Chain locks, queued markers and crash counters in Redis. They save work; the rows decide.

Every function works when Redis is away: `acquire` then succeeds for all chains, and `mark_queued` gives all chains, so
that evaluation continues. Keys, each with a TTL: `{prefix}:lock:{chain_id}` (the token of the holder),
`{prefix}:queued:{chain_id}`, and `{prefix}:crash:{chain_id}` (how many executions have begun and not ended).
"""

import hashlib
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
from redis.exceptions import NoScriptError
from redis.retry import Retry

from dispatcher.errors import ConfigurationError, ServiceUnavailable
from dispatcher.telemetry import Action, emit
from dispatcher.urls import require_plain, without_password

logger = logging.getLogger(__name__)

_CRASH_SECONDS: Final = 86_400
_AWAY_SECONDS: Final = 5.0


class _Script:
    """A Lua script, and the hash under which the server caches it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# The scripts build the keys from the prefix and from the ids, which are one argument. Three keys per chain as KEYS
# would cost a batch more than the rest of the script. (This does not work on a Redis cluster, but Celery cannot use a
# cluster as its broker either.)

# SET NX PX for each lock. A lock that has our token already counts as taken, because the reply to an earlier try may be
# lost. The same round trip counts the execution as begun and clears its queued marker. The answer leaves out each chain
# that was locked and has no crash. For the others it has the id, and then -1 if another process has the lock, else the
# number of earlier executions that never ended.
_ACQUIRE: Final = _Script("""
local prefix, token, milliseconds, crash_seconds = unpack(ARGV, 1, 4)
local answer = {}
for id in string.gmatch(ARGV[5], '%d+') do
  local lock = prefix .. ':lock:' .. id
  local mine = redis.call('SET', lock, token, 'NX', 'PX', milliseconds)
  if not mine then mine = redis.call('GET', lock) == token end
  redis.call('DEL', prefix .. ':queued:' .. id)
  local earlier = -1
  if mine then
    local crash = prefix .. ':crash:' .. id
    earlier = redis.call('INCR', crash) - 1
    redis.call('EXPIRE', crash, crash_seconds)
  end
  if earlier ~= 0 then
    answer[#answer + 1] = id
    answer[#answer + 1] = earlier
  end
end
return answer
""")

# Deletes only locks with our token, because a lock may have expired and now belong to another process.
_RELEASE: Final = _Script("""
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
_SET_ASIDE: Final = _Script("""
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
        token = secrets.token_hex(16)
        milliseconds = str(int(self.lock_seconds * 1000))
        answer = self._ask(partial(self._run, _ACQUIRE, token, milliseconds, str(_CRASH_SECONDS), _listed(chain_ids)))
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
            self._ask(partial(self._run, _RELEASE, held.token, _listed(held.held)))

    def set_aside(self, held: Held, chain_ids: Sequence[int]) -> Held:
        """Release the locks of chains that were not executed, without counting a crash; gives the locks still held."""
        if held.token is not None:
            self._ask(partial(self._run, _SET_ASIDE, held.token, _listed(chain_ids)))
        left = tuple(chain_id for chain_id in held.held if chain_id not in set(chain_ids))
        return Held(held.token, left, held.locked)

    def locked(self, chain_ids: Sequence[int]) -> set[int]:
        """The chains among these that are locked now; reads only."""
        client = self._client
        if client is None or not chain_ids:
            return set()
        values = self._ask(lambda: client.mget([self._key("lock", chain_id) for chain_id in chain_ids]))
        return {chain_id for chain_id, value in zip(chain_ids, values or (), strict=False) if value is not None}

    def mark_queued(self, chain_ids: Sequence[int], *, seconds: float) -> list[int]:
        """Mark chains as queued; gives those that were not marked before, in order (all of them when Redis is away)."""
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
        """Remove the queued markers of chains whose message could not be published."""
        client = self._client
        if client is not None and chain_ids:
            self._ask(lambda: client.delete(*(self._key("queued", chain_id) for chain_id in chain_ids)))

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

    def _run(self, script: "_Script", *arguments: str) -> Any:
        """The answer of a script. Bypasses `register_script` of the client, which takes three times as long."""
        assert self._client is not None
        pool = self._client.connection_pool
        connection: Any = pool.get_connection()

        def exchange() -> Any:
            connection.send_command("EVALSHA", script.sha, 0, self.prefix, *arguments)
            try:
                return connection.read_response()
            except NoScriptError:  # the server was restarted, or its scripts were flushed
                connection.send_command("EVAL", script.text, 0, self.prefix, *arguments)
                return connection.read_response()

        try:
            return connection.retry.call_with_retry(exchange, lambda _: connection.disconnect())
        finally:
            pool.release(connection)

    def _key(self, kind: str, chain_id: int) -> str:
        return f"{self.prefix}:{kind}:{chain_id}"

    def _ask(self, question: Any) -> Any:
        """The server's answer, or None if the server is away; it is then not asked again for some seconds."""
        if self._client is None or time.monotonic() < self._away_until:
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


def _listed(chain_ids: Sequence[int]) -> str:
    return ",".join(map(str, chain_ids))
