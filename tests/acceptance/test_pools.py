"""The moment of the call in every pool of Celery: once while its process lives, and again soon when that was killed."""

import signal
import time

import pytest
from sqlalchemy import update

from dispatcher.domain.records import DeliveryRecord
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.models import DELIVERY
from tests.acceptance.fleet import LEASE_SECONDS, POOLS, TAKEN_UP_SECONDS, Fleet, is_gone, main_pid, owner_of, send
from tests.acceptance.nodes import eventually

pytestmark = [pytest.mark.acceptance, pytest.mark.chaos]


@pytest.fixture(scope="module")
def database_kind() -> str:
    return "postgresql"


# --- every pool -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_a_callback_of_several_leases_is_made_once_and_one_whose_worker_is_killed_is_taken_up(
    fleet: Fleet, pool: str
) -> None:
    nodes = fleet.workers(2, "--pool", pool)
    file = fleet.file()
    long, lost = fleet.chain(callback_seconds=3 * LEASE_SECONDS), fleet.chain(callback_file=str(file))
    fleet.called(long)
    fleet.called(lost)
    fleet.relaying(lambda: long.refresh().state == "first_sent", "the end of the long callback")
    fleet.assert_delivered(long)
    assert fleet.settled == 0

    call = fleet.called(lost)
    killed = owner_of(call, nodes)
    send(main_pid(killed), signal.SIGKILL)
    killed_at = time.monotonic()
    eventually(lambda: is_gone(call["pid"]), "the death of the process that made the call", seconds=2.5)
    eventually(lambda: not killed.processes(), "the death of all processes of the worker", seconds=2.5)
    file.unlink()
    fleet.relaying(lambda: lost.refresh().state == "first_sent", "the second attempt")
    assert time.monotonic() - killed_at < TAKEN_UP_SECONDS
    fleet.assert_delivered(lost, calls=2)
    assert len(fleet.sink.lines("done", chain_id=lost.id)) == 1
    (alive,) = [node for node in nodes if node is not killed]
    assert fleet.calls(lost)[-1]["pid"] in {process.pid for process in alive.processes()}


# --- prefork ----------------------------------------------------------------------------------------------------------


def test_processes_of_a_prefork_pool_that_are_killed_in_a_callback_or_in_a_guard(fleet: Fleet) -> None:
    node = fleet.worker()
    callback, guard = fleet.file(), fleet.file()
    called = fleet.chain(callback_file=str(callback))
    uncalled = fleet.chain(guard_file=str(guard), guard_from=2)
    fleet.called(called)
    asked = fleet.deployment.eventually(
        lambda: fleet.sink.lines("asked", chain_id=uncalled.id)[1:], "the last look of the other"
    )
    for pid in (fleet.called(called)["pid"], asked[0]["pid"]):
        send(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    callback.unlink()
    guard.unlink()
    fleet.relaying(lambda: {called.refresh().state, uncalled.refresh().state} == {"first_sent"}, "the second attempts")
    assert time.monotonic() - killed_at < TAKEN_UP_SECONDS
    fleet.assert_delivered(called, calls=2)
    fleet.assert_delivered(uncalled, calls=1, attempt=2)
    assert (fleet.delivery(called).unknown, fleet.delivery(uncalled).unknown) == (True, False)
    assert "its callback was not called" in str(fleet.delivery(uncalled).last_error)
    assert len(fleet.sink.lines("asked", chain_id=uncalled.id)) == 3, "the second attempt looks again"
    assert node.status == "running"


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_callback_that_never_returns_is_killed_at_its_limit(fleet: Fleet, start_method: str) -> None:
    (fleet.deployment.directory / "ours.py").write_text(f"worker_pool_start_method = {start_method!r}\n")
    node = fleet.worker(DISPATCHER_CALLBACK_SECONDS="2", CELERY_CONFIG_MODULE="ours")
    waiting, deaf = fleet.file(), fleet.file()
    chains = [fleet.chain(callback_file=str(waiting)), fleet.chain(callback_deaf=str(deaf))]
    pids = [fleet.called(chain)["pid"] for chain in chains]
    for pid in pids:
        line = f"dispatcher: worker process {pid} is killed: a callback has run 2 s"
        fleet.deployment.eventually(lambda line=line: line in node.logs(), "the line that says so", seconds=8)
        eventually(lambda pid=pid: is_gone(pid), "the end of the process", seconds=5)
    waiting.unlink()
    deaf.unlink()
    fleet.relaying(lambda: {chain.refresh().state for chain in chains} == {"first_sent"}, "the next attempts")
    for chain, pid in zip(chains, pids, strict=True):
        fleet.assert_delivered(chain, calls=2)
        assert fleet.called(chain)["pid"] != pid

    send(main_pid(node), signal.SIGKILL)
    eventually(lambda: not node.processes(), "the death of idle processes of the pool", seconds=2.5)


def test_each_process_may_make_one_attempt_only(fleet: Fleet) -> None:
    fleet.worker("--max-tasks-per-child=1")
    chains = [fleet.chain() for _ in range(6)]
    fleet.relaying(lambda: {chain.refresh().state for chain in chains} == {"first_sent"}, "six callbacks")
    for chain in chains:
        fleet.assert_delivered(chain)
    assert fleet.settled == 0
    assert len({fleet.called(chain)["pid"] for chain in chains}) == 6


def test_a_process_that_is_suspended_keeps_its_attempt_for_a_while_and_loses_it_after_that(fleet: Fleet) -> None:
    node = fleet.worker()
    file = fleet.file()
    chain = fleet.chain(callback_file=str(file))
    pid = fleet.called(chain)["pid"]

    send(pid, signal.SIGSTOP)
    fleet.nobody_settles(LEASE_SECONDS / 2)
    send(pid, signal.SIGCONT)
    fleet.nobody_settles(1.5 * LEASE_SECONDS)

    send(pid, signal.SIGSTOP)
    file.unlink()
    fleet.relaying(lambda: chain.refresh().state == "first_sent", "another process makes it")
    history = [event.action for event in chain.events]
    fleet.assert_delivered(chain, calls=2)
    mark = len(node.logs())
    send(pid, signal.SIGCONT)
    fleet.deployment.eventually(lambda: len(fleet.sink.lines("done", chain_id=chain.id)) == 2, "its effect, late")
    fleet.deployment.eventually(lambda: "'outcome': 'stale'" in node.logs()[mark:], "that it says so")
    fleet.assert_delivered(chain, calls=2)
    assert [event.action for event in chain.events] == history


# --- shutdown ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_a_warm_shutdown_lets_begun_callbacks_finish(fleet: Fleet, pool: str) -> None:
    node = fleet.worker("--pool", pool)
    file = fleet.file()
    chain = fleet.chain(callback_file=str(file))
    fleet.called(chain)
    send(main_pid(node), signal.SIGTERM)
    fleet.nobody_settles(1.5 * LEASE_SECONDS)
    file.unlink()
    fleet.deployment.eventually(lambda: node.status == "exited", "the end of the worker", seconds=20)
    fleet.assert_delivered(chain)
    assert not fleet.delivery(chain).unknown
    assert not node.processes()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_a_cold_shutdown_leaves_is_taken_up_once(fleet: Fleet, pool: str) -> None:
    node = fleet.worker("--pool", pool)
    file = fleet.file()
    chain = fleet.chain(callback_file=str(file))
    fleet.called(chain)
    send(main_pid(node), signal.SIGQUIT)
    if pool == "prefork":
        fleet.deployment.eventually(lambda: node.status == "exited", "the end of the worker", seconds=20)
        file.unlink()
        fleet.worker("--pool", pool)
        fleet.relaying(lambda: chain.refresh().state == "first_sent", "the second attempt")
        fleet.assert_delivered(chain, calls=2)
        assert fleet.delivery(chain).unknown
        return
    other = fleet.worker("--pool", pool)
    fleet.nobody_settles(2 * LEASE_SECONDS)  # its threads go on, and so does the lease
    file.unlink()
    fleet.deployment.eventually(lambda: node.status == "exited", "the end of the worker", seconds=20)
    fleet.relaying(lambda: chain.refresh().state == "first_sent", "its end")
    fleet.assert_delivered(chain)
    assert other.status == "running"


def named_by_doctor(fleet: Fleet, delivery: DeliveryRecord) -> list[str]:
    return [str(finding) for finding in fleet.client.examine() if delivery.id in str(finding)]


# --- pools without time limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_an_attempt_that_never_ends_is_named_and_can_be_given_up(fleet: Fleet, pool: str) -> None:
    nodes = fleet.workers(2, "--pool", pool)
    file = fleet.file()
    chain = fleet.chain(callback_deaf=str(file))
    old = owner_of(fleet.called(chain), nodes)
    fleet.nobody_settles(2 * LEASE_SECONDS)
    delivery = fleet.delivery(chain)
    assert not named_by_doctor(fleet, delivery), "it has not run for long"
    begun_earlier = update(DELIVERY).where(DELIVERY.c.id == delivery.id).values(next_attempt_at=clock_plus(-600))
    fleet.client.database.write(lambda connection: connection.execute(begun_earlier))
    (finding,) = named_by_doctor(fleet, delivery)
    assert f"dispatcher deliveries abandon {delivery.id}" in finding

    fleet.client.abandon_delivery(fleet.delivery(chain), requested_by="ada", reason="it hangs")
    fleet.relaying(lambda: len(fleet.calls(chain)) == 2, "the second attempt begins")
    mark = len(old.logs())
    file.unlink()
    fleet.relaying(lambda: chain.refresh().state == "first_sent", "the end of the second attempt")
    fleet.deployment.eventually(lambda: "'outcome': 'stale'" in old.logs()[mark:], "that the first one is stale")
    fleet.assert_delivered(chain, calls=2)
