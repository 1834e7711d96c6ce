"""The limiter: what many workers together let through, and what those that are refused are told."""

import logging
from contextlib import closing
from itertools import pairwise

import pytest
import redis

from dispatcher.coordination.limiter import RateLimiter, Refusal
from dispatcher.coordination.locks import ChainLocks
from dispatcher.rates import Asked, RateLimit
from tests.integration import shop
from tests.integration.coordination.conftest import Clock, Counting, Make
from tests.integration.coordination.test_locks import Proxy, full_server
from tests.integration.test_round_trips import commands
from tests.servers import RedisServer

pytestmark = pytest.mark.integration

PER_HOUR = RateLimit.parse("type/cart", "3/h")


def count(limiter: RateLimiter, *limits: RateLimit, has_place: bool = False) -> Refusal | None:
    return limiter.count([Asked(limit) for limit in limits], delivery="d1", has_place=has_place)


# --- counting --------------------------------------------------------------------------------------------------------


def test_calls_over_the_limit_are_refused_until_the_window_is_over(counting: Counting) -> None:
    answers = [counting.count(PER_HOUR) for _ in range(5)]

    assert answers[:3] == [None, None, None]
    assert [answer.reason for answer in answers[3:] if answer] == ["rate limit 3/h"] * 2
    first, second = (answer.seconds for answer in answers[3:] if answer)
    assert first == pytest.approx(3600, abs=0.01) and second == pytest.approx(3600 + 1200 / 0.95, abs=0.01)
    counting.wait(3599.9)
    assert counting.count(PER_HOUR, has_place=True) is not None, "never more than three within an hour"
    counting.wait(0.2)
    assert counting.count(PER_HOUR, has_place=True) is None


def test_the_window_moves(counting: Counting) -> None:
    for _ in range(3):
        assert counting.count(PER_HOUR) is None
        counting.wait(600)

    refusal = counting.count(PER_HOUR)
    assert refusal is not None and refusal.seconds == pytest.approx(1800, abs=0.01)
    for seconds in (refusal.seconds, 600, 600):
        counting.wait(seconds)
        assert counting.allowed(PER_HOUR, times=2) == 1


def test_a_peek_says_whether_there_is_room_and_counts_nothing(counting: Counting) -> None:
    assert [counting.peek(PER_HOUR) for _ in range(10)] == [None] * 10
    assert counting.allowed(PER_HOUR, times=5) == 3

    refusal = counting.peek(PER_HOUR)
    assert refusal is not None and (refusal.reason, refusal.has_place) == ("rate limit 3/h", True)
    counting.wait(refusal.seconds)
    assert counting.peek(PER_HOUR, has_place=True) is None
    assert counting.allowed(PER_HOUR, times=5) == 3


def test_the_second_limit_of_a_peek_refuses_too(counting: Counting) -> None:
    narrow = RateLimit.parse("callback/send", "1/h")
    counting.count(narrow)
    refusal = counting.peek(PER_HOUR, narrow)
    assert refusal is not None and (refusal.reason, refusal.has_place) == ("rate limit 1/h", True)


def test_workers_share_a_limit(make_limiter: Make) -> None:
    clock = Clock()
    limiters = [make_limiter(clock=clock) for _ in range(2)]

    answers = [count(limiters[number % 2], PER_HOUR) for number in range(5)]

    assert [answer is None for answer in answers] == [True, True, True, False, False]


def test_those_who_ask_at_once_get_no_more_than_the_limit(make_limiter: Make) -> None:
    limiters = [make_limiter() for _ in range(8)]

    answers = shop.at_once(*(lambda one=one: count(one, PER_HOUR) for one in limiters))  # type: ignore[misc]

    assert answers.count(None) == 3
    waits = sorted(answer.seconds for answer in answers if answer is not None)
    assert all(later - earlier > 600 for earlier, later in pairwise(waits)), "a place each"


def test_threads_of_one_process_get_no_more_than_the_limit(make_limiter: Make) -> None:
    limiter = make_limiter(None)
    answers = shop.at_once(*[lambda: count(limiter, PER_HOUR)] * 8)
    assert answers.count(None) == 3


def test_limits_deployments_and_rates_are_counted_apart(make_limiter: Make) -> None:
    others = [RateLimit.parse("type/trial", "3/h"), RateLimit.parse("type/cart", "4/h")]
    limiter = make_limiter()
    for _ in range(3):
        assert count(limiter, PER_HOUR) is None

    assert count(limiter, PER_HOUR) is not None
    assert [count(limiter, other) for other in others] == [None, None]
    assert count(make_limiter(prefix="other"), PER_HOUR) is None


def test_without_limits_nothing_is_asked(make_limiter: Make, redis_url: str) -> None:
    for limiter in (make_limiter(shop.NOBODY), make_limiter()):
        assert count(limiter) is None and limiter.peek([], has_place=False) is None
    assert shop.dump_keys(redis_url) == {}


def test_a_call_is_counted_for_all_its_limits_or_for_none(counting: Counting) -> None:
    wide, narrow = RateLimit.parse("type/cart", "3/h"), RateLimit.parse("callback/send", "1/h")

    assert counting.count(wide, narrow) is None
    for _ in range(3):
        refusal = counting.count(wide, narrow, has_place=True)
        assert refusal is not None and refusal.reason == "rate limit 1/h"

    assert counting.allowed(wide, times=3) == 2


def test_every_key_has_the_prefix_and_ends_by_itself(make_limiter: Make, redis_url: str) -> None:
    limiter = make_limiter()
    for has_place in (False, False, False, False, True):
        count(limiter, PER_HOUR, has_place=has_place)

    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        ends = {key: client.pttl(key) / 1000 for key in client.scan_iter()}

    assert sorted(ends) == ["test:rate:calls/type/cart/3/h", "test:rate:line/type/cart/3/h"]
    assert 3590 < ends["test:rate:calls/type/cart/3/h"] <= 3601, "no longer than its last call counts"
    assert 4800 < ends["test:rate:line/type/cart/3/h"] <= 4900, "no longer than there is a line"


def test_only_the_calls_in_the_window_are_kept(make_limiter: Make, redis_url: str) -> None:
    clock = Clock()
    limiter = make_limiter(clock=clock)
    for _ in range(20):
        count(limiter, PER_HOUR, has_place=True)
        clock.now += 1300

    with redis.Redis.from_url(redis_url) as client:
        assert client.zcard("test:rate:calls/type/cart/3/h") <= 3


@pytest.mark.parametrize("full", [False, True])
def test_a_question_is_one_command_whatever_the_number_of_limits(redis_server: RedisServer, full: bool) -> None:
    redis_server.clear()
    limits = [RateLimit.parse(f"type/{number}", "100/h") for number in range(3)]
    once = RateLimit.parse("key/mail", "1/h", key=lambda _: 1)
    asked = [*map(Asked, limits), Asked(once, "ada")]
    with closing(ChainLocks(redis_server.url, prefix="test", lock_seconds=30, connect_seconds=2)) as locks:
        limiter = RateLimiter(locks.client, prefix="test")
        for _ in range(100 if full else 1):
            limiter.count([Asked(limit) for limit in limits], delivery="d1", has_place=True)
        with commands(redis_server) as sent:
            limiter.peek(limits, has_place=False)
            limiter.count(asked, delivery="d1", has_place=False)
    assert [command.split()[0] for _, command in sent] == ["EVALSHA", "EVALSHA"]


def test_a_limit_that_was_forgotten_begins_anew(make_limiter: Make, redis_server: RedisServer) -> None:
    limiter = make_limiter()
    while count(limiter, PER_HOUR) is None:
        pass
    redis_server.clear()
    assert [count(limiter, PER_HOUR) is None for _ in range(4)] == [True, True, True, False]


def test_a_call_whose_answer_was_lost_is_counted_once(redis_server: RedisServer) -> None:
    redis_server.clear()
    once = RateLimit.parse("callback/send", "1/h")
    with (
        Proxy(redis_server.port) as proxy,
        closing(ChainLocks(proxy.url, prefix="test", lock_seconds=30, connect_seconds=2)) as locks,
    ):
        limiter = RateLimiter(locks.client, prefix="test")
        limiter.peek([PER_HOUR], has_place=False)  # the connection is open and the script is known
        for _ in range(2):
            proxy.lose_reply.set()
            assert count(limiter, PER_HOUR) is None
        proxy.lose_reply.set()
        assert count(limiter, once) is None, "not refused by its own first try"
        assert proxy.lost == 3

        assert [count(limiter, PER_HOUR) is None for _ in range(2)] == [True, False]


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_who_asks_for_the_first_time_does_not_overtake_those_who_wait(counting: Counting) -> None:
    begun = counting.clock.now
    refusals = [refusal for _ in range(5) if (refusal := counting.count(PER_HOUR)) is not None]
    counting.wait(refusals[0].seconds)

    for late in (counting.peek(PER_HOUR), counting.count(PER_HOUR)):
        assert late is not None and counting.clock.now + late.seconds > begun + refusals[-1].seconds
    assert counting.peek(PER_HOUR, has_place=True) is None
    assert counting.count(PER_HOUR, has_place=True) is None


def test_who_is_refused_at_its_place_stands_before_those_who_ask_for_the_first_time(counting: Counting) -> None:
    places = [refusal for _ in range(8) if (refusal := counting.count(PER_HOUR)) is not None]
    counting.wait(places[0].seconds)
    assert counting.allowed(PER_HOUR, times=3) == 3, "others were faster"

    again = counting.count(PER_HOUR, has_place=True)

    late = counting.peek(PER_HOUR)
    assert again is not None and again.has_place and late is not None and again.seconds < late.seconds


def test_a_full_line_gives_no_places(counting: Counting) -> None:
    refusals = [refusal for _ in range(40) if (refusal := counting.count(PER_HOUR)) is not None]

    placed = [refusal for refusal in refusals if refusal.has_place]
    assert len(placed) == 18, "six hours of the line, at 95 per cent of three an hour"
    left = refusals[18:]
    assert {refusal.reason for refusal in left} == {"the line of rate limit 3/h is full"}
    assert all(3600 + 3 * 3600 <= refusal.seconds <= 3600.01 + 6 * 3600 for refusal in left)
    assert len({refusal.seconds for refusal in left}) == len(left), "spread"


# --- without a server ------------------------------------------------------------------------------------------------


def test_without_a_lock_server_each_process_counts_for_itself(
    make_limiter: Make, caplog: pytest.LogCaptureFixture
) -> None:
    for limiter in (make_limiter(None), make_limiter(None)):
        assert [count(limiter, PER_HOUR) is None for _ in range(5)] == [True, True, True, False, False]
    assert caplog.text.count("each process counts its own calls for rate limits") == 2, "once per process"


@pytest.mark.parametrize("ask", ["peek", "count"])
def test_a_server_that_is_away_is_waited_for_and_not_for_ever(
    make_limiter: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ask: str
) -> None:
    now = 1000.0
    monkeypatch.setattr("dispatcher.coordination.limiter.time.monotonic", lambda: now)
    limiter = make_limiter(shop.NOBODY)

    for _ in range(10):
        refusal = count(limiter, PER_HOUR) if ask == "count" else limiter.peek([PER_HOUR], has_place=False)
        assert refusal is not None and not refusal.has_place and 15 <= refusal.seconds <= 30
        assert refusal.reason == "Redis, which counts the calls for the rate limit, does not answer"
    assert caplog.text.count("does not count calls for rate limits") == 1, "not asked again for some seconds"
    assert "127.0.0.1" not in caplog.text

    now += 301
    assert [count(limiter, PER_HOUR) is None for _ in range(4)] == [True, True, True, False]
    assert caplog.text.count("each process counts its own calls for rate limits") == 1


def test_a_server_without_memory_is_away(
    make_limiter: Make, redis_server: RedisServer, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing may be allowed that was not counted, and a place that was not kept is none."""
    once = RateLimit.parse("callback/send", "1/h")
    assert count(make_limiter(), once) is None
    before = shop.dump_keys(redis_url)
    with full_server(redis_server):
        for refusal in (count(make_limiter(), PER_HOUR), make_limiter().peek([once], has_place=False)):
            assert refusal is not None and not refusal.has_place and "does not answer" in refusal.reason
    assert "(OutOfMemoryError)" in caplog.text
    assert shop.dump_keys(redis_url).keys() == before.keys()
    assert count(make_limiter(), PER_HOUR) is None


def test_a_server_that_refuses_scripts_is_away(make_limiter: Make, redis_server: RedisServer, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.execute_command("ACL", "SETUSER", "limited", "on", ">s3cret", "~*", "+@all", "-@scripting")
        limiter = make_limiter(f"redis://limited:s3cret@127.0.0.1:{redis_server.port}/0")
        for refusal in (count(limiter, PER_HOUR), limiter.peek([PER_HOUR], has_place=False)):
            assert refusal is not None and not refusal.has_place and "does not answer" in refusal.reason
        client.execute_command("ACL", "DELUSER", "limited")


def test_a_server_that_comes_back_counts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr("dispatcher.coordination.limiter.time.monotonic", lambda: now)
    caplog.set_level(logging.WARNING)
    with RedisServer() as server:
        locks = ChainLocks(server.url, prefix="test", lock_seconds=30, connect_seconds=0.5)
        limiter = RateLimiter(locks.client, prefix="test")
        assert count(limiter, PER_HOUR) is None
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", "changed")
            client.client_kill_filter(skipme=True)
            assert count(limiter, PER_HOUR) is not None
            now += 6
            client.config_set("requirepass", "")
            assert [count(limiter, PER_HOUR) is None for _ in range(3)] == [True, True, False]
        locks.close()
