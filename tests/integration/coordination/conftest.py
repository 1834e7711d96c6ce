"""Limiters of pretended workers, the clock that they count by, and a server whose clock steps."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import redis

from dispatcher.coordination.limiter import RateLimiter, Refusal
from dispatcher.coordination.locks import ChainLocks
from dispatcher.rates import Asked, RateLimit
from tests.conftest import missing, running
from tests.servers import RedisServer, wait_until
from tests.steps import NoCompilerError, SteppingClock

Make = Callable[..., RateLimiter]

DAY = 86400.0
STEPS = pytest.mark.parametrize("step", [2 * DAY, -2 * DAY, 2.0, -2.0], ids=["+2d", "-2d", "+2s", "-2s"])
"""How far a clock is ahead while it is wrong."""


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


@dataclass
class Counting:
    """A limiter, and the clock that it counts by."""

    limiter: RateLimiter
    clock: Clock

    def wait(self, seconds: float) -> None:
        """Let this time pass."""
        self.clock.now += seconds

    def peek(self, *limits: RateLimit, has_place: bool = False) -> Refusal | None:
        return self.limiter.peek(limits, has_place=has_place)

    def count(self, *asked: RateLimit | Asked, delivery: str = "d1", has_place: bool = False) -> Refusal | None:
        values = [Asked(one) if isinstance(one, RateLimit) else one for one in asked]
        return self.limiter.count(values, delivery=delivery, has_place=has_place)

    def allowed(self, *asked: RateLimit | Asked, times: int, has_place: bool = True) -> int:
        """How many of so many calls of different deliveries are allowed."""
        return [self.count(*asked, delivery=f"n{n}", has_place=has_place) for n in range(times)].count(None)


@pytest.fixture(params=["together", "alone"])
def counting(request: pytest.FixtureRequest, make_limiter: Make, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """A limiter on a server, and one that counts for its own process: both have to keep the same rules."""
    clock = Clock()
    if request.param == "together":
        return Counting(make_limiter(clock=clock), clock)
    monkeypatch.setattr("dispatcher.coordination.local_counter.time.monotonic", clock)
    return Counting(make_limiter(None), clock)


# --- a real server whose clock steps ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved_clock() -> Iterator[SteppingClock]:
    """The clock of `moved_server`."""
    try:
        clock = SteppingClock()
    except NoCompilerError as error:
        missing(str(error))
    with clock:
        yield clock


@pytest.fixture(scope="module")
def moved_server(moved_clock: SteppingClock) -> Iterator[RedisServer]:
    """A server whose clock can be moved."""

    def make() -> RedisServer:
        server = RedisServer()
        server.environment = moved_clock.environment
        return server

    with running(make) as server:
        yield server


class Server:
    """A server without keys, and its clock."""

    def __init__(self, server: RedisServer, clock: SteppingClock) -> None:
        self.url = server.url
        self.clock = clock
        self.client = redis.Redis.from_url(server.url, decode_responses=True)
        self.move(0)
        self.client.flushall()

    def time(self) -> float:
        """The server's time, in seconds."""
        seconds, microseconds = self.client.time()
        return float(seconds) + microseconds / 1e6

    def move(self, seconds: float) -> None:
        """Let the server's clock be ahead by so many seconds, and wait until it has seen that."""
        before, by = self.time(), seconds - self.clock.offset.total_seconds()
        self.clock.set(seconds)
        if by:
            wait_until(lambda: abs(self.time() - before - by) < 0.5 * abs(by), seconds=10, what="the clock moves")


@pytest.fixture
def server(moved_server: RedisServer, moved_clock: SteppingClock) -> Iterator[Server]:
    found = Server(moved_server, moved_clock)
    yield found
    found.move(0)
    found.client.close()


@pytest.fixture
def locks(server: Server) -> Iterator[ChainLocks]:
    with_server = ChainLocks(server.url, prefix="test", lock_seconds=30, connect_seconds=2)
    yield with_server
    with_server.close()
