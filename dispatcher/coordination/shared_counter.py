"""Counts the calls of all workers together, in Redis.

Keys, each with a TTL: `{prefix}:rate:calls/...` (the calls in the window of a limit, a sorted set by moment; of a keyed
limit one for each key, under the key's SHA-256) and `{prefix}:rate:line/...` (the next free place in the two lines of
an unkeyed limit, and when that was written). All moments are of the server's clock, so that the clocks of the workers
do not matter.

The server's clock may step. A moment that cannot be is not believed, so that no limit refuses for days after a clock
was ahead for seconds. A call that is more than one window ahead of the clock does not count and is removed. A line that
was written more than a second ahead of the clock begins anew from now, as long as it was when it was written.
"""

from collections.abc import Callable
from typing import Final

import redis

from dispatcher.coordination.counters import LINE_SECONDS, ROUNDING_SECONDS, Answer, Kind, Question, name_of, pace_of
from dispatcher.coordination.scripts import Script

# ARGV: prefix, "1" if the caller has a place, "1" to count the call, length of a line, rounding, now or "", and then
# for each limit: name, amount, window, pace of its lines (0: it is keyed and has none), and the name of the call. All
# times are in microseconds. Answers {} or {number of the limit that refuses, time to wait, a `Kind`}.
#
# Every limit is asked before anything is written. The first write is one that a server without memory refuses, because
# a server refuses only the first write of a script.
_ASK: Final = Script("""
local prefix, has_place, counting = ARGV[1], ARGV[2] == '1', ARGV[3] == '1'
local line_length, rounding, now = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end
local limits = {}
for i = 7, #ARGV, 5 do
  limits[#limits + 1] = {
    calls = prefix .. ':rate:calls/' .. ARGV[i], line = prefix .. ':rate:line/' .. ARGV[i],
    amount = tonumber(ARGV[i + 1]), window = tonumber(ARGV[i + 2]), pace = tonumber(ARGV[i + 3]), call = ARGV[i + 4],
  }
end

local function exact(number)
  return string.format('%.0f', number)
end

-- The time until the window has room: 0 if it has. -1: it has counted this very call (a further attempt, or the answer
-- was lost), so it does not refuse it.
local function time_to_room(limit)
  local after, to = now - limit.window, now + limit.window
  if counting then
    local counted = tonumber(redis.call('ZSCORE', limit.calls, limit.call))
    if counted and counted > after and counted <= to then return -1 end
  end
  after, to = '(' .. exact(after), exact(to)
  local count = redis.call('ZCOUNT', limit.calls, after, to)
  if count < limit.amount then return 0 end
  local leaves = redis.call('ZRANGEBYSCORE', limit.calls, after, to, 'WITHSCORES', 'LIMIT', count - limit.amount, 1)
  return leaves[2] + limit.window - now + rounding
end

local function write_line(limit, first, again)
  redis.call('HSET', limit.line, 'first', exact(first), 'again', exact(again), 'written', exact(now))
  redis.call('PEXPIRE', limit.line, math.ceil(math.max(first - now, again - now, 0) / 1000) + 1000)
end

-- The next free places: in the line of first refusals, and in that of calls that were refused at their place.
local function read_line(limit)
  local stored = redis.call('HMGET', limit.line, 'first', 'again', 'written')
  local first, again, written = tonumber(stored[1]) or 0, tonumber(stored[2]) or 0, tonumber(stored[3]) or 0
  if written > now + 1000000 then  -- the clock was wrong then, or it is now
    first, again = first - written + now, again - written + now
    write_line(limit, first, again)
  end
  return first, again
end

local function ask_keyed()
  local longest, refuses = 0, nil
  for i, limit in ipairs(limits) do
    local wait = limit.pace == 0 and time_to_room(limit) or 0
    if wait > longest then longest, refuses = wait, i end
  end
  return refuses and {refuses, longest, 0}
end

local function ask_unkeyed()
  for i, limit in ipairs(limits) do
    local wait = limit.pace > 0 and time_to_room(limit) or -1
    if wait >= 0 then
      local first, again = read_line(limit)
      if wait > 0 or (not has_place and math.max(first, again) > now) then
        local place = math.max(now + wait, again)
        if not has_place then place = math.max(place, first) end
        if place > now + wait + line_length then return {i, wait, 2} end
        if has_place then again = place + limit.pace else first = place + limit.pace end
        write_line(limit, first, again)
        return {i, place - now, 1}
      end
    end
  end
end

local refusal = ask_keyed() or ask_unkeyed()
if counting and not refusal then
  for _, limit in ipairs(limits) do redis.call('ZADD', limit.calls, exact(now), limit.call) end
  for _, limit in ipairs(limits) do
    redis.call('ZREMRANGEBYSCORE', limit.calls, '-inf', exact(now - limit.window))
    local last = redis.call('ZREVRANGEBYSCORE', limit.calls, exact(now + limit.window), exact(now),
      'WITHSCORES', 'LIMIT', 0, 1)
    redis.call('PEXPIRE', limit.calls, math.ceil((last[2] + limit.window - now) / 1000) + 1000)
  end
end
for _, limit in ipairs(limits) do
  redis.call('ZREMRANGEBYSCORE', limit.calls, '(' .. exact(now + limit.window), '+inf')
end
return refusal or {}
""")


class SharedCounter:
    """Counts in the Redis of `client`. `clock` gives seconds since 1970 instead of the server's clock."""

    def __init__(self, client: redis.Redis, prefix: str, clock: Callable[[], float] | None) -> None:
        self._client = client
        self._prefix = prefix
        self._clock = clock

    def ask(self, question: Question) -> Answer | None:
        """See `Counter`."""
        now = "" if self._clock is None else _microseconds(self._clock())
        flags = (int(question.has_place), int(question.counting))
        times = (_microseconds(LINE_SECONDS), _microseconds(ROUNDING_SECONDS), now)
        arguments: list[str | int] = [self._prefix, *flags, *times]
        for asked in question.asked:
            limit = asked.limit
            pace = _microseconds(pace_of(limit)) if limit.key is None else 0
            arguments += [name_of(asked), limit.amount, _microseconds(limit.seconds), pace, question.call_for(limit)]
        answer = _ASK.run(self._client, *arguments)
        if not answer:
            return None
        number, wait, kind = map(int, answer)
        return Answer(question.asked[number - 1].limit, wait / 1e6, Kind(kind))


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
