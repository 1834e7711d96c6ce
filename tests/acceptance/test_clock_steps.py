"""Beats and workers whose host's clock steps while they run, or between two runs."""

import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import redis

from dispatcher.messages.queues import RELAY, SWEEP, SWEEPS_QUEUE
from tests.acceptance.nodes import BeatNode, Deployment
from tests.acceptance.test_install import THEIR_APP
from tests.conftest import missing
from tests.steps import NoCompilerError, SteppingClock

pytestmark = pytest.mark.acceptance

INTERVALS = {SWEEP: 3.0, RELAY: 2.0}
SLACK_SECONDS = 2.0
"""How late a busy machine may be."""

DAYS = 2 * 86_400.0


@pytest.fixture(scope="module")
def clock() -> Iterator[SteppingClock]:
    try:
        clock = SteppingClock()
    except NoCompilerError as error:
        missing(str(error))
    with clock:
        yield clock


@pytest.fixture(autouse=True)
def _right_at_first(clock: SteppingClock) -> None:
    clock.set(0)


@pytest.fixture
def deployment(make_deployment: Callable[..., Deployment]) -> Deployment:
    return make_deployment(sweep_seconds=INTERVALS[SWEEP], relay_seconds=INTERVALS[RELAY])


class Ticks:
    """The ticks that beats have sent. No worker takes them."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._client = redis.Redis.from_url(deployment.redis_url)

    def take(self) -> Counter[str]:
        """How many of each kind have come since the last time."""
        raw = self._client.lpop(SWEEPS_QUEUE, 10_000) or []
        return Counter(json.loads(message)["headers"]["task"] for message in raw)

    def assert_both_go_on(self) -> None:
        """Each kind of tick comes within its interval, and again after another, but not again and again."""
        self.take()
        began = time.monotonic()
        seen: Counter[str] = Counter()
        firsts: dict[str, float] = {}

        def have_come_twice() -> bool:
            new = self.take()
            seen.update(new)
            for name in new:
                firsts.setdefault(name, time.monotonic() - began)
            return all(seen[name] >= 2 for name in INTERVALS)

        self._deployment.eventually(
            have_come_twice, "two ticks of each kind", seconds=2 * max(INTERVALS.values()) + 2 * SLACK_SECONDS
        )
        elapsed = time.monotonic() - began
        for name, interval in INTERVALS.items():
            assert firsts[name] <= interval + SLACK_SECONDS, f"the first {name}"
            assert seen[name] <= elapsed / interval + 2, f"one more {name} may follow a step at once"


@pytest.mark.parametrize("seconds", [DAYS, -DAYS, 2.0, -2.0])
def test_a_beat_goes_on_while_its_clock_is_wrong_and_when_it_is_right_again(
    deployment: Deployment, clock: SteppingClock, seconds: float
) -> None:
    ticks = Ticks(deployment)
    with deployment.running(deployment.beat(**clock.environment)):
        ticks.assert_both_go_on()
        clock.set(seconds)
        ticks.assert_both_go_on()
        clock.set(0)
        ticks.assert_both_go_on()


@pytest.mark.parametrize("seconds", [DAYS, -DAYS])
def test_a_beat_that_starts_anew_does_not_believe_its_schedule_file(
    deployment: Deployment, clock: SteppingClock, seconds: float
) -> None:
    ticks = Ticks(deployment)
    beat = deployment.beat(**clock.environment)
    clock.set(seconds)
    with deployment.running(beat):
        ticks.assert_both_go_on()
        beat.kill("SIGTERM")  # it writes its schedule file
        deployment.eventually(lambda: beat.status == "exited", "the beat's end")
        clock.set(0)
        beat.start()
        beat.wait_until_ready()
        ticks.assert_both_go_on()


@pytest.mark.parametrize("embedded", [False, True])
def test_the_beat_of_an_application_goes_on_with_our_entries(
    deployment: Deployment, clock: SteppingClock, embedded: bool
) -> None:
    (deployment.directory / "theirapp.py").write_text(textwrap.dedent(THEIR_APP))
    env = {**deployment.env, **clock.environment, "THEIR_BROKER": deployment.redis_url}
    del env["DISPATCHER_CONFIG"]
    celery = [sys.executable, "-m", "celery", "-A", "theirapp"]
    # A worker that takes nothing but an application's own queue, with its beat.
    arguments = ["worker", "-B", "-Q", "celery", "--concurrency=1"] if embedded else ["beat"]
    node = BeatNode([*celery, *arguments, "--loglevel=INFO"], deployment.directory, env)
    ticks = Ticks(deployment)
    with deployment.running(node):
        ticks.assert_both_go_on()
        clock.set(DAYS)
        ticks.assert_both_go_on()
        clock.set(0)
        ticks.assert_both_go_on()
