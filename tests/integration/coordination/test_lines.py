"""How often those that wait for a limit have to ask, and that its rate is kept and made use of.

The fleet is simulated: deliveries peek, look once more, and count; the clock is the test's, the limiter is real.
"""

import heapq
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from dispatcher.coordination.limiter import RateLimiter
from dispatcher.rates import Asked, RateLimit
from tests.conftest import scaled
from tests.integration.coordination.conftest import Clock, Make

pytestmark = pytest.mark.integration

RELAY_SECONDS = 10.0
COUNTDOWN = 60.0


@dataclass
class Fleet:
    """What came of deliveries that all wait for one limit."""

    begins: Counter[int]
    looks: Counter[int]
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
    *,
    look: float = 0.1,
    away: tuple[float, float] = (0, 0),
) -> Fleet:
    """Let deliveries ask until each was called: waits to a minute by Celery's clock, longer ones by the relay's.

    Each begin is a peek and, up to `look` seconds later, a count. Nothing asks while the workers are `away` (from,
    until); all that waited asks when they are back.
    """
    start, drawn = clock.now, random.Random(1)
    waiting = [(arrival, number, False, False) for number, arrival in enumerate(arrivals)]
    heapq.heapify(waiting)
    fleet = Fleet(Counter(), Counter(), [])
    while waiting:
        moment, number, placed, peeked = heapq.heappop(waiting)
        if away[0] <= moment < away[1]:
            heapq.heappush(waiting, (away[1] + drawn.random(), number, placed, False))
            continue
        clock.now = start + moment
        limiter = limiters[number % len(limiters)]
        if not peeked:
            fleet.begins[number] += 1
            refusal = limiter.peek([limit], has_place=placed)
            if refusal is None:
                heapq.heappush(waiting, (moment + drawn.random() * look, number, placed, True))
                continue
        else:
            fleet.looks[number] += 1
            refusal = limiter.count([Asked(limit)], delivery=str(number), has_place=placed)
            if refusal is None:
                fleet.calls.append(moment)
                continue
        again = moment + refusal.seconds
        if refusal.seconds > COUNTDOWN:
            again = (again // RELAY_SECONDS + 1) * RELAY_SECONDS
        heapq.heappush(waiting, (again + drawn.random() / 5, number, refusal.has_place, False))
    return fleet


@pytest.mark.parametrize(
    ("rate", "arrivals", "look", "mean", "most"),
    [
        ("100/m", [number / 200 for number in range(1500)], 0.1, 2.2, 5),  # all within seconds: a begin, and its turn
        ("100/m", [number / 200 for number in range(1500)], 1.0, 2.2, 5),  # many look at once
        ("10/s", [number / 200 for number in range(1500)], 0.1, 3.2, 12),  # the relay brings a hundred: one more
        ("100/m", [number / 2 for number in range(1500)], 0.1, 2.2, 5),  # more come each minute than may be called
    ],
)
def test_many_that_wait_are_begun_a_few_times_each_and_never_more_called(
    make_limiter: Make, rate: str, arrivals: list[float], look: float, mean: float, most: int
) -> None:
    clock = Clock()
    limit = RateLimit.parse("type/cart", rate)

    fleet = run([make_limiter(clock=clock) for _ in range(3)], clock, limit, arrivals, look=look)

    assert len(fleet.calls) == len(arrivals) and fleet.most_within(limit.seconds) <= limit.amount
    assert fleet.begins.total() / len(arrivals) < mean and max(fleet.begins.values()) <= most
    at_full_rate = len(arrivals) * limit.seconds / limit.amount
    assert fleet.calls[-1] < 1.15 * at_full_rate + 2 * limit.seconds + RELAY_SECONDS, "the rate is made use of"


@pytest.mark.slow
def test_a_line_that_overflows_is_begun_a_few_times_each_too(make_limiter: Make) -> None:
    """60,000 at 100 a minute are ten hours; the line has places for six."""
    clock, count = Clock(), scaled(60_000, least=40_000)
    limit = RateLimit.parse("type/cart", "100/m")

    fleet = run([make_limiter(clock=clock) for _ in range(3)], clock, limit, [number / 200 for number in range(count)])

    print(f"begins {fleet.begins.total() / count:.2f}, at most {max(fleet.begins.values())}")  # noqa: T201
    print(f"looks {fleet.looks.total() / count:.2f}, last call after {fleet.calls[-1] / 3600:.2f} h")  # noqa: T201
    assert len(fleet.calls) == count and fleet.most_within(60) <= 100
    assert fleet.begins.total() / count < 2.6 and fleet.looks.total() / count < 1.1


def test_a_look_is_seldom_for_nothing(make_limiter: Make) -> None:
    """What is refused is mostly refused by a peek, before it loads and looks."""
    clock = Clock()
    limit = RateLimit.parse("type/cart", "100/m")
    fleet = run([make_limiter(clock=clock)], clock, limit, [number / 50 for number in range(1500)])
    assert fleet.looks.total() / 1500 < 1.1


def test_those_whose_turn_passed_while_no_worker_ran_are_spread_anew(make_limiter: Make) -> None:
    clock = Clock()
    limit = RateLimit.parse("type/cart", "100/m")

    fleet = run([make_limiter(clock=clock)], clock, limit, [number / 200 for number in range(1000)], away=(60, 3600))

    assert len(fleet.calls) == 1000 and fleet.most_within(60) <= 100
    assert fleet.begins.total() / 1000 < 3.5 and max(fleet.begins.values()) <= 6
