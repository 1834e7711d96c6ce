"""The limiter: what many workers together let through, and how often those that wait have to ask."""

import heapq
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import redis

from dispatcher.coordination.limiter import RateLimiter, Refusal
from dispatcher.coordination.locks import ChainLocks
from dispatcher.rates import RateLimit
from tests.integration import shop
from tests.servers import RedisServer

pytestmark = pytest.mark.integration

PER_HOUR = RateLimit.parse("type/cart", "3/h")
RELAY_SECONDS = 10.0
COUNTDOWN = 60.0

Make = Callable[..., RateLimiter]


class Clock:
    """The server's time, as the test wants it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make_limiter(redis_url: str) -> Iterator[Make]:
    """Makers of limiters on one server, one per pretended worker."""
    made = []

    def make(url: str | None = redis_url, *, prefix: str = "test", clock: Clock | None = None) -> RateLimiter:
        made.append(ChainLocks(url, prefix=prefix, lock_seconds=30, connect_seconds=0.5))
        return RateLimiter(made[-1].client, prefix=prefix, random=random.Random(7).random, clock=clock)

    yield make
    for locks in made:
        locks.close()


def ask(limiter: RateLimiter, *limits: RateLimit, has_place: bool = False) -> Refusal | None:
    return limiter.ask(limits, has_place=has_place)


# --- counting --------------------------------------------------------------------------------------------------------


def test_workers_share_a_limit_and_the_rest_is_refused_until_the_window_is_over(make_limiter: Make) -> None:
    clock = Clock()
    limiters = [make_limiter(clock=clock) for _ in range(2)]

    answers = [ask(limiters[number % 2], PER_HOUR) for number in range(5)]

    assert answers[:3] == [None, None, None]
    assert [answer.reason for answer in answers[3:] if answer] == ["rate limit 3/h"] * 2
    first, second = (answer.seconds for answer in answers[3:] if answer)
    assert first == pytest.approx(3600) and second == pytest.approx(3600 + 1200 / 0.95)
    clock.now += 3599.9
    assert ask(limiters[0], PER_HOUR, has_place=True) is not None, "never more than three within an hour"
    clock.now += 0.2
    assert ask(limiters[0], PER_HOUR, has_place=True) is None


def test_those_who_ask_at_once_get_no_more_than_the_limit(make_limiter: Make) -> None:
    limiters = [make_limiter() for _ in range(8)]

    answers = shop.at_once(*(lambda one=one: ask(one, PER_HOUR) for one in limiters))  # type: ignore[misc]

    assert answers.count(None) == 3
    waits = sorted(answer.seconds for answer in answers if answer is not None)
    assert all(later - earlier > 600 for earlier, later in pairwise(waits)), "a place each"


def test_limits_deployments_and_rates_are_counted_apart(make_limiter: Make) -> None:
    others = [RateLimit.parse("type/trial", "3/h"), RateLimit.parse("type/cart", "4/h")]
    limiter = make_limiter()
    for _ in range(3):
        assert ask(limiter, PER_HOUR) is None

    assert ask(limiter, PER_HOUR) is not None
    assert [ask(limiter, other) for other in others] == [None, None]
    assert ask(make_limiter(prefix="other"), PER_HOUR) is None


def test_without_limits_nothing_is_asked(make_limiter: Make, redis_url: str) -> None:
    assert ask(make_limiter(shop.NOBODY)) is None
    assert ask(make_limiter()) is None
    assert shop.dump_keys(redis_url) == {}


def test_a_call_is_counted_for_all_its_limits_or_for_none(make_limiter: Make) -> None:
    wide, narrow = RateLimit.parse("type/cart", "3/h"), RateLimit.parse("callback/send", "1/h")
    limiter = make_limiter()

    assert ask(limiter, wide, narrow) is None
    for _ in range(3):
        refusal = ask(limiter, wide, narrow, has_place=True)
        assert refusal is not None and refusal.reason == "rate limit 1/h"

    assert [ask(limiter, wide, has_place=True) is None for _ in range(3)] == [True, True, False]


def test_every_key_has_the_prefix_and_ends_by_itself(make_limiter: Make, redis_url: str) -> None:
    limiter = make_limiter()
    for has_place in (False, False, False, False, True):
        ask(limiter, PER_HOUR, has_place=has_place)

    keys = shop.dump_keys(redis_url)

    assert sorted(keys) == [
        b"test:rate:LIMITER/type/cart/3/3600/second",
        b"test:rate:again/type/cart/3/h",
        b"test:rate:line/type/cart/3/h",
    ]
    assert all(expires > 0 for _, expires in keys.values())


def test_a_limit_that_was_forgotten_begins_anew(make_limiter: Make, redis_server: RedisServer) -> None:
    limiter = make_limiter()
    while ask(limiter, PER_HOUR) is None:
        pass
    redis_server.clear()
    assert [ask(limiter, PER_HOUR) is None for _ in range(4)] == [True, True, True, False]


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_who_asks_for_the_first_time_does_not_overtake_those_who_wait(make_limiter: Make) -> None:
    clock = Clock()
    limiter = make_limiter(clock=clock)
    refusals = [refusal for _ in range(5) if (refusal := ask(limiter, PER_HOUR)) is not None]
    clock.now += refusals[0].seconds

    late = ask(limiter, PER_HOUR)
    assert late is not None and clock.now + late.seconds > Clock().now + refusals[-1].seconds
    assert ask(limiter, PER_HOUR, has_place=True) is None


def test_a_full_line_gives_no_places(make_limiter: Make) -> None:
    clock = Clock()
    limiter = make_limiter(clock=clock)
    refusals = [refusal for _ in range(40) if (refusal := ask(limiter, PER_HOUR)) is not None]

    placed = [refusal for refusal in refusals if refusal.has_place]
    assert len(placed) == 18, "six hours of the line, at 95 per cent of three an hour"
    left = refusals[18:]
    assert {refusal.reason for refusal in left} == {"the line of rate limit 3/h is full"}
    assert all(3600 + 3 * 3600 <= refusal.seconds <= 3600 + 6 * 3600 for refusal in left)
    assert len({refusal.seconds for refusal in left}) == len(left), "spread"


@dataclass
class Fleet:
    """What came of deliveries that all wait for one limit."""

    begins: Counter[int]
    calls: list[float]

    def most_within(self, seconds: float) -> int:
        """The most calls in any window of this length."""
        first = most = 0
        for last, moment in enumerate(self.calls):
            while moment - self.calls[first] >= seconds:
                first += 1
            most = max(most, last - first + 1)
        return most


def run(
    limiters: Sequence[RateLimiter],
    clock: Clock,
    limit: RateLimit,
    arrivals: Sequence[float],
    away: tuple[float, float] = (0, 0),
) -> Fleet:
    """Let deliveries ask until each was called: waits to a minute by Celery's clock, longer ones by the relay's.

    Nothing asks while the workers are `away` (from, until); all that waited asks when they are back.
    """
    start, drawn = clock.now, random.Random(1)
    waiting = [(arrival, number, False) for number, arrival in enumerate(arrivals)]
    heapq.heapify(waiting)
    fleet = Fleet(Counter(), [])
    while waiting:
        moment, number, placed = heapq.heappop(waiting)
        if away[0] <= moment < away[1]:
            heapq.heappush(waiting, (away[1] + drawn.random(), number, placed))
            continue
        clock.now = start + moment
        fleet.begins[number] += 1
        refusal = ask(limiters[number % len(limiters)], limit, has_place=placed)
        if refusal is None:
            fleet.calls.append(moment)
            continue
        again = moment + refusal.seconds
        if refusal.seconds > COUNTDOWN:
            again = (again // RELAY_SECONDS + 1) * RELAY_SECONDS
        heapq.heappush(waiting, (again + drawn.random() / 5, number, refusal.has_place))
    return fleet


@pytest.mark.parametrize(
    ("rate", "arrivals", "mean", "most"),
    [
        ("100/m", [number / 200 for number in range(1500)], 2.2, 5),  # all within seconds: a begin, and one in its turn
        ("10/s", [number / 200 for number in range(1500)], 3.2, 12),  # the relay brings a hundred at once: one more
        ("100/m", [number / 2 for number in range(1500)], 2.2, 5),  # more come each minute than may be called
    ],
)
def test_many_that_wait_are_begun_a_few_times_each_and_never_more_called(
    make_limiter: Make, rate: str, arrivals: list[float], mean: float, most: int
) -> None:
    clock = Clock()
    limit = RateLimit.parse("type/cart", rate)

    fleet = run([make_limiter(clock=clock) for _ in range(3)], clock, limit, arrivals)

    assert len(fleet.calls) == len(arrivals) and fleet.most_within(limit.seconds) <= limit.amount
    assert fleet.begins.total() / len(arrivals) < mean and max(fleet.begins.values()) <= most
    at_full_rate = len(arrivals) * limit.seconds / limit.amount
    assert fleet.calls[-1] < 1.15 * at_full_rate + 2 * limit.seconds + RELAY_SECONDS, "the rate is made use of"


def test_those_whose_turn_passed_while_no_worker_ran_are_spread_anew(make_limiter: Make) -> None:
    clock = Clock()
    limit = RateLimit.parse("type/cart", "100/m")

    fleet = run([make_limiter(clock=clock)], clock, limit, [number / 200 for number in range(1000)], away=(60, 3600))

    assert len(fleet.calls) == 1000 and fleet.most_within(60) <= 100
    assert fleet.begins.total() / 1000 < 3.5 and max(fleet.begins.values()) <= 6


# --- without a server ------------------------------------------------------------------------------------------------


def test_without_a_lock_server_each_process_counts_for_itself(
    make_limiter: Make, caplog: pytest.LogCaptureFixture
) -> None:
    limiters = [make_limiter(None) for _ in range(2)]

    answers = [[ask(limiter, PER_HOUR) for _ in range(5)] for limiter in limiters]

    for answer in answers:
        assert [one is None for one in answer] == [True, True, True, False, False]
        first, second = (one.seconds for one in answer if one is not None)
        assert second - first == pytest.approx(1200 / 0.95, abs=30)
        assert ask(limiters[0], PER_HOUR, has_place=True) is not None
    assert caplog.text.count("each process counts its own calls for rate limits") == 2, "once per process"


def test_the_line_of_a_process_on_its_own_becomes_full_too(make_limiter: Make) -> None:
    limiter = make_limiter(None)
    refusals = [refusal for _ in range(40) if (refusal := ask(limiter, PER_HOUR)) is not None]
    assert sum(refusal.has_place for refusal in refusals) == 18


def test_a_server_that_is_away_is_waited_for_and_not_for_ever(
    make_limiter: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr("dispatcher.coordination.limiter.time.monotonic", lambda: now)
    limiter = make_limiter(shop.NOBODY)

    for _ in range(10):
        refusal = ask(limiter, PER_HOUR)
        assert refusal is not None and not refusal.has_place and 15 <= refusal.seconds <= 30
    assert caplog.text.count("does not count calls for rate limits") == 1, "not asked again for some seconds"
    assert "127.0.0.1" not in caplog.text

    now += 301
    assert [ask(limiter, PER_HOUR) is None for _ in range(4)] == [True, True, True, False]
    assert caplog.text.count("each process counts its own calls for rate limits") == 1


def test_a_server_that_comes_back_counts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr("dispatcher.coordination.limiter.time.monotonic", lambda: now)
    caplog.set_level(logging.WARNING)
    with RedisServer() as server:
        locks = ChainLocks(server.url, prefix="test", lock_seconds=30, connect_seconds=0.5)
        limiter = RateLimiter(locks.client, prefix="test")
        assert ask(limiter, PER_HOUR) is None
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", "changed")
            client.client_kill_filter(skipme=True)
            assert ask(limiter, PER_HOUR) is not None
            now += 6
            client.config_set("requirepass", "")
            assert [ask(limiter, PER_HOUR) is None for _ in range(3)] == [True, True, False]
        locks.close()
