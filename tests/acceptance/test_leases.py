"""Leases while the database is away, and in the pool `gevent`, whose time limits are exceptions."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dispatcher import ServiceUnavailable
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.runner import upgrade
from tests.acceptance.fleet import LEASE_SECONDS, RELAY_SECONDS, Fleet, main_pid, owner_of, send
from tests.conftest import running
from tests.servers import PostgresServer

pytestmark = [pytest.mark.acceptance, pytest.mark.chaos]

AFTER_SECONDS = 10.0
"""How long the database is away after a callback: longer than a lease and two relays, below 30 s."""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL that the tests here may stop."""
    with running(PostgresServer) as server:
        yield server


@pytest.fixture(scope="module")
def make_database_url(server: PostgresServer) -> Callable[[Path], str]:
    def make(_: Path) -> str:
        url = server.create_database()
        upgrade(Database(url))
        return url

    return make


@contextmanager
def stopped(server: PostgresServer) -> Iterator[None]:
    """The server ends, and is started again."""
    server.stop()
    yield
    server.start()


@contextmanager
def frozen(server: PostgresServer) -> Iterator[None]:
    """The server takes connections and says nothing; then it does what it was asked meanwhile."""
    process = psutil.Process(server.pid)
    processes = [process, *process.children(recursive=True)]
    for one in processes:
        one.suspend()
    yield
    for one in reversed(processes):
        one.resume()


def relay_at_once(fleet: Fleet) -> None:
    """Run a relay as soon as the database is back."""
    while True:
        try:
            fleet.relay()
        except ServiceUnavailable:
            continue
        return


@pytest.mark.parametrize(("pool", "away"), [("prefork", stopped), ("threads", frozen), ("gevent", stopped)])
def test_a_database_that_was_away_for_long_leaves_attempts_to_the_processes_that_make_them(
    fleet: Fleet, server: PostgresServer, pool: str, away: Callable[[PostgresServer], Any]
) -> None:
    fleet.worker("--pool", pool)
    file = fleet.file()
    chains = [fleet.chain(callback_file=str(file)) for _ in range(2)]
    for chain in chains:
        fleet.called(chain)
    with away(server):
        time.sleep(LEASE_SECONDS + fleet.client.settings.lapse_seconds + 2 * RELAY_SECONDS)  # nobody renews meanwhile
    relay_at_once(fleet)
    fleet.nobody_settles(fleet.client.settings.lapse_seconds + 2 * LEASE_SECONDS)
    file.unlink()
    fleet.relaying(lambda: {chain.refresh().state for chain in chains} == {"first_sent"}, "the end of the callbacks")
    for chain in chains:
        fleet.assert_delivered(chain)
    assert fleet.settled == 0


def test_a_callback_that_returned_just_in_time_is_recorded_although_the_database_was_away(
    fleet: Fleet, server: PostgresServer
) -> None:
    fleet.worker(DISPATCHER_CALLBACK_SECONDS="3")
    chain = fleet.chain(callback_seconds=2.7)
    fleet.called(chain)
    with stopped(server):
        fleet.deployment.eventually(lambda: fleet.sink.lines("done", chain_id=chain.id), "the end of the callback")
        time.sleep(AFTER_SECONDS)
    relay_at_once(fleet)
    fleet.relaying(lambda: chain.refresh().state == "first_sent", "that it is recorded")
    fleet.assert_delivered(chain)
    assert fleet.settled == 0


# --- gevent -----------------------------------------------------------------------------------------------------------


def hurried(fleet: Fleet, seconds: float) -> Any:
    """A gevent worker whose attempts have a short time limit."""
    return fleet.worker("--pool", "gevent", app="tests.acceptance.hurried", HURRIED_SECONDS=str(seconds))


def test_celery_s_time_limit_in_a_callback_in_gevent_is_a_failed_attempt(fleet: Fleet) -> None:
    hurried(fleet, 2)
    file = fleet.file()
    chain = fleet.chain(callback_file=str(file))
    fleet.called(chain)
    fleet.deployment.eventually(lambda: fleet.delivery(chain).waits_for == "retry", "the end of the first attempt")
    delivery = fleet.delivery(chain)
    assert str(delivery.last_error).startswith("Timeout: 2") and not delivery.unknown
    file.unlink()
    fleet.relaying(lambda: chain.refresh().state == "first_sent", "the next attempt")
    assert fleet.settled == 0
    fleet.assert_delivered(chain, calls=len(fleet.calls(chain)))


def test_celery_s_time_limit_in_our_own_statements_leaves_the_attempt_to_the_relay(
    fleet: Fleet, server: PostgresServer
) -> None:
    node = hurried(fleet, 3)
    chain = fleet.chain(callback_seconds=0.5)
    fleet.called(chain)
    with frozen(server):
        fleet.deployment.eventually(lambda: fleet.sink.lines("done", chain_id=chain.id), "the end of the callback")
        fleet.deployment.eventually(lambda: "Hard time limit (3.0s) exceeded" in node.logs(), "the time limit")
    fleet.relaying(lambda: chain.refresh().state == "first_sent", "the second attempt, or the first one's end")
    calls = len(fleet.calls(chain))
    fleet.assert_delivered(chain, calls=calls)
    assert fleet.delivery(chain).unknown == (calls == 2)


@pytest.mark.parametrize("kind", ["sqlite", "mariadb"])
def test_gevent_renews_on_other_databases_and_beside_a_callback_that_computes_for_half_a_lease(
    make_fleet: Callable[..., Fleet], request: pytest.FixtureRequest, kind: str
) -> None:
    fleet = make_fleet(database_url=request.getfixturevalue(f"{kind}_url"))
    fleet.workers(2, "--pool", "gevent")
    chains = [fleet.chain(callback_seconds=2 * LEASE_SECONDS) for _ in range(3)]
    for chain in chains:
        fleet.called(chain)
    chains.append(fleet.chain(callback_spins=LEASE_SECONDS / 2))
    fleet.relaying(lambda: {chain.refresh().state for chain in chains} == {"first_sent"}, "the end of the callbacks")
    assert fleet.settled == 0
    for chain in chains:
        fleet.assert_delivered(chain)


# --- with the default settings ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_with_the_default_settings_work_is_taken_up_within_40_seconds(
    make_fleet: Callable[..., Fleet], pool: str, record_property: Callable[[str, object], None]
) -> None:
    defaults = {"lease_seconds": 20, "lock_seconds": 30, "callback_seconds": 60, "queued_seconds": 60}
    fleet = make_fleet(**defaults)
    nodes = fleet.workers(2, "--pool", pool)
    with fleet.deployment.running(fleet.deployment.beat()):
        file = fleet.file()
        chain = fleet.chain(callback_file=str(file))
        send(main_pid(owner_of(fleet.called(chain), nodes)), signal.SIGKILL)
        killed_at = time.time()
        file.unlink()
        fleet.deployment.wait_for_state(chain, "first_sent", seconds=60)
    seconds = fleet.called(chain, 2)["at"] - killed_at
    record_property("seconds", seconds)
    print(f"{pool}: taken up after {seconds:.1f} s")  # noqa: T201 - the measurement
    assert seconds < 41
    fleet.assert_delivered(chain, calls=2)
