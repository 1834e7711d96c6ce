"""The server's clock steps: no window and no line of a limit lasts longer than its own length because of that.

A clock is wrong for a while and then right again. What was written meanwhile has moments that cannot be.
"""

import random

import pytest
import redis

from dispatcher.coordination.limiter import RateLimiter
from dispatcher.coordination.locks import ChainLocks
from dispatcher.rates import Asked, RateLimit
from tests.integration.coordination.conftest import DAY, STEPS, Clock, Counting, Make, Server

pytestmark = pytest.mark.integration

LINE = 6 * 3600.0
RATES = ["10/s", "3/m", "3/h", "3/d"]
PER_HOUR = RateLimit.parse("type/cart", "3/h")


def keyed(rate: str) -> Asked:
    return Asked(RateLimit.parse("key/mail", rate, key=lambda transition: transition), "ada")


@pytest.fixture
def together(make_limiter: Make) -> Counting:
    """A limiter on a server whose clock is the test's."""
    clock = Clock()
    return Counting(make_limiter(clock=clock), clock)


# --- windows ---------------------------------------------------------------------------------------------------------


@STEPS
@pytest.mark.parametrize("rate", RATES)
def test_a_window_refuses_for_at_most_two_windows(together: Counting, rate: str, step: float) -> None:
    for asked in (keyed(rate), Asked(RateLimit.parse("type/cart", rate))):
        window = asked.limit.seconds
        assert together.allowed(asked, times=asked.limit.amount) == asked.limit.amount
        together.wait(step)  # the clock is wrong
        for number in range(20):
            together.count(asked, delivery=f"wrong {number}", has_place=True)
        together.wait(-step)  # and right again

        for number in range(20):
            refusal = together.count(asked, delivery=f"right {number}", has_place=True)
            assert refusal is None or not asked.limit.key or refusal.seconds <= 2 * window + 0.01
        together.wait(2 * window + 0.01)
        assert together.allowed(asked, times=50) == asked.limit.amount


def test_a_call_more_than_a_window_ahead_is_removed_and_one_less_far_ahead_counts(
    together: Counting, redis_url: str
) -> None:
    for asked, key in ((keyed("1/h"), "key/mail/1/h/*"), (Asked(PER_HOUR), "type/cart/3/h")):
        amount = asked.limit.amount
        together.wait(3599)
        assert together.allowed(asked, times=amount) == amount
        together.wait(-3599)
        refusal = together.count(asked, delivery="d1", has_place=True)
        assert refusal is not None and 7198 < refusal.seconds < 7200, "less than a window ahead"
        together.wait(-2)
        if asked.limit.key is None:
            assert together.peek(PER_HOUR, has_place=True) is None, "more than a window ahead"
        else:
            assert together.count(asked, delivery="d1") is None
        with redis.Redis.from_url(redis_url, decode_responses=True) as client:
            kept = sum(client.zcard(calls) for calls in client.scan_iter(f"test:rate:calls/{key}"))
            assert kept == (1 if asked.limit.key else 0), "it will not count again"
            client.flushall()


# --- lines -----------------------------------------------------------------------------------------------------------


@STEPS
@pytest.mark.parametrize("waiting", [1, 5, 30])
def test_a_line_keeps_its_length(together: Counting, step: float, waiting: int) -> None:
    together.wait(step)
    assert together.allowed(PER_HOUR, times=3) == 3
    last = [together.peek(PER_HOUR) for _ in range(waiting)][-1]
    assert last is not None

    together.wait(-step)
    late = together.peek(PER_HOUR)

    if step < 0:  # the line was written in the past: it is over, or a little shorter
        assert late is None or late.seconds <= last.seconds + 1200 / 0.95 + 2 or not late.has_place
    elif last.has_place:
        assert late is not None and late.has_place, "those who wait are not overtaken"
        assert late.seconds == pytest.approx(last.seconds + 1200 / 0.95, abs=3600)
    else:
        assert late is not None and "is full" in late.reason


@STEPS
def test_the_second_line_keeps_its_length_too(together: Counting, step: float) -> None:
    together.wait(step)
    assert together.allowed(PER_HOUR, times=3) == 3
    places = [together.peek(PER_HOUR, has_place=True) for _ in range(5)]
    assert places[-1] is not None

    together.wait(-step)

    first = together.peek(PER_HOUR)
    assert first is None or first.seconds <= places[-1].seconds + 1200 / 0.95 + 2
    assert (first is None) == (step == -2 * DAY)


def test_a_line_that_was_full_empties_although_its_clock_was_ahead(together: Counting) -> None:
    """Nobody writes to a line that is full, so the first look has to set it right."""
    together.wait(2 * DAY)
    assert together.allowed(PER_HOUR, times=3) == 3
    while (refusal := together.peek(PER_HOUR)) is not None and refusal.has_place:
        pass
    together.wait(-2 * DAY)

    first = together.peek(PER_HOUR)
    together.wait(2 * 3600)
    later = together.peek(PER_HOUR)

    assert first is not None and "is full" in first.reason
    assert later is not None and later.has_place
    together.wait(later.seconds + 1200 / 0.95)
    assert together.peek(PER_HOUR) is None


def test_less_than_a_second_is_no_step(together: Counting) -> None:
    together.allowed(PER_HOUR, times=3)
    first = together.peek(PER_HOUR)
    together.wait(-0.9)
    second = together.peek(PER_HOUR)
    assert first is not None and second is not None
    assert second.seconds - first.seconds == pytest.approx(1200 / 0.95 + 0.9, abs=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_clock_did_nothing_lasts_longer_than_its_length(together: Counting, seed: int) -> None:
    drawn = random.Random(seed)
    limits = [RateLimit.parse("type/cart", rate) for rate in RATES]
    keys = [keyed(rate) for rate in RATES]
    for number in range(300):
        step = drawn.choice([0, 0, 2 * DAY, -2 * DAY, 2, -2])
        together.wait(step)
        for _ in range(drawn.randrange(1, 8)):
            asked = [Asked(drawn.choice(limits)), drawn.choice(keys)][drawn.randrange(2) :]
            together.count(*asked, delivery=f"d{number}", has_place=drawn.random() < 0.5)
            together.peek(drawn.choice(limits), has_place=drawn.random() < 0.5)
        together.wait(drawn.random() * drawn.choice([1, 60, 3600, DAY / 2]))
        together.wait(-step)  # right again

        for asked_key in keys:
            refusal = together.count(asked_key, delivery="another")
            assert refusal is None or refusal.seconds <= 2 * asked_key.limit.seconds + 0.01
        for limit in limits:
            refusal = together.peek(limit)
            longest = 2 * limit.seconds + LINE + limit.seconds / limit.amount
            assert refusal is None or refusal.seconds <= longest

    together.wait(2 * DAY + LINE + DAY / 0.95)
    assert [together.peek(limit) for limit in limits] == [None] * len(limits)
    assert [together.count(asked_key, delivery="the end") for asked_key in keys] == [None] * len(keys)


# --- a real server ---------------------------------------------------------------------------------------------------


@STEPS
def test_limits_and_lines_of_a_real_server(server: Server, locks: ChainLocks, step: float) -> None:
    limiter = RateLimiter(locks.client, prefix="test")
    hourly = keyed("1/h")
    server.move(step)
    assert [limiter.count([Asked(PER_HOUR)], delivery="d", has_place=True) for _ in range(3)] == [None] * 3
    assert limiter.count([hourly], delivery="d1", has_place=False) is None
    places = [limiter.peek([PER_HOUR], has_place=False) for _ in range(3)]
    server.move(0)

    calls, line = limiter.count([hourly], delivery="d2", has_place=False), limiter.peek([PER_HOUR], has_place=False)
    if step == -2 * DAY:  # the server has forgotten the keys
        assert (calls, line) == (None, None)
    elif step == 2 * DAY:
        assert calls is None, "a call two days ahead does not count"
        assert line is not None and places[-1] is not None
        assert line.seconds == pytest.approx(places[-1].seconds + 1200 / 0.95, abs=5)
        assert server.client.pttl("test:rate:line/type/cart/3/h") < 3 * 3600 * 1000
    else:
        assert calls is not None and calls.seconds == pytest.approx(3600 + step, abs=5)
        assert line is not None and places[-1] is not None
        assert line.seconds == pytest.approx(places[-1].seconds + 1200 / 0.95, abs=5)
