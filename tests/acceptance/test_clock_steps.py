"""Beats and workers whose host's clock steps while they run, or between two runs."""

import json
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import redis

from dispatcher import Chain
from dispatcher.messages.queues import DELIVER, RELAY, SWEEP, SWEEPS_QUEUE
from tests.acceptance.chainlib import PATIENT_SECONDS
from tests.acceptance.nodes import BeatNode, Deployment, WorkerNode
from tests.acceptance.test_install import THEIR_APP
from tests.conftest import missing
from tests.steps import NoCompilerError, SteppingClock

pytestmark = pytest.mark.acceptance

INTERVALS = {SWEEP: 3.0, RELAY: 2.0}
SLACK_SECONDS = 2.0
"""How late a busy machine may be."""

DAYS = 2 * 86_400.0


@pytest.fixture(scope="module")
def database_kind() -> str:
    """One whose clock is not the workers': SQLite has the clock of whoever asks it."""
    return "postgresql"


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


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(make_deployment: Callable[..., Deployment]) -> Deployment:
    return make_deployment(sweep_seconds=1, relay_seconds=1, queued_seconds=2)


def wait_for_calls(deployment: Deployment, chain: Chain, count: int, *, seconds: float = 45) -> float:
    """Return when the chain's callback was called so often; by the monotonic clock of this process."""
    deployment.eventually(
        lambda: len(deployment.sink.lines("called", chain_id=chain.id)) >= count, f"{count} calls", seconds=seconds
    )
    return time.monotonic()


def wait_for_messages(deployment: Deployment, worker: WorkerNode, count: int) -> None:
    """Return when the worker has received so many messages about deliveries, retries included."""
    received = re.compile(rf"Task {re.escape(DELIVER)}\[\S+\] received")
    deployment.eventually(lambda: len(received.findall(worker.logs())) >= count, f"{count} messages in the worker")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_retry_that_a_worker_holds_is_made_at_its_time_although_the_clock_steps(
    quick: Deployment, clock: SteppingClock, pool: str
) -> None:
    worker = quick.worker(f"--pool={pool}", **clock.environment)
    with quick.client() as client, quick.running(worker):
        for number, seconds in enumerate([DAYS, -DAYS, 2.0, 0]):
            chain = client.get_or_create_resource_chain(
                "patient", [("test", str(number))], initial_context={"fail_times": 1}
            )
            chain.enqueue()
            failed_at = wait_for_calls(quick, chain, 1)
            wait_for_messages(quick, worker, 2 * number + 2)
            clock.set(seconds)
            again_at = wait_for_calls(quick, chain, 2, seconds=PATIENT_SECONDS + SLACK_SECONDS + 1)
            assert PATIENT_SECONDS - SLACK_SECONDS <= again_at - failed_at <= PATIENT_SECONDS + SLACK_SECONDS
            quick.wait_for_state(chain, "first_sent")


@pytest.mark.parametrize("seconds", [DAYS, -DAYS])
def test_a_retry_whose_message_has_an_impossible_eta_is_made_when_its_row_says(
    quick: Deployment, clock: SteppingClock, seconds: float
) -> None:
    """The worker publishes the retry by one clock and receives it by another."""
    worker = quick.worker(**clock.environment)
    clock.set(seconds)
    with quick.client() as client, quick.running(worker), quick.running(quick.beat()):
        chain = client.get_or_create_resource_chain("patient", [("test", "1")], initial_context={"fail_times": 1})
        chain.enqueue()
        failed_at = wait_for_calls(quick, chain, 1)
        wait_for_messages(quick, worker, 2)
        worker.kill("SIGTERM")  # it puts the retry back
        quick.eventually(lambda: worker.status == "exited", "the worker's end")
        clock.set(0)
        worker.start()
        worker.wait_until_ready()
        quick.wait_for_state(chain, "first_sent", seconds=20)
        assert time.monotonic() - failed_at >= PATIENT_SECONDS - SLACK_SECONDS
        assert [line["what"] for line in quick.sink.lines(chain_id=chain.id)] == ["called", "called", "done"]
