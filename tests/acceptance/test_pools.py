"""The moment of the call in every pool of Celery: once while its process lives, and again soon when that was killed."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import update

from dispatcher import DONE, Chain, Dispatcher
from dispatcher.domain.records import DeliveryRecord
from dispatcher.settings import Settings
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.models import DELIVERY
from tests.acceptance.nodes import Deployment, WorkerNode, eventually

pytestmark = [pytest.mark.acceptance, pytest.mark.chaos]

POOLS = ["prefork", "threads", "solo", "gevent"]
LEASE_SECONDS = 2.0
RELAY_SECONDS = 0.25
SLACK_SECONDS = 4.0
SETTINGS = {"lease_seconds": LEASE_SECONDS, "lock_seconds": 2, "callback_seconds": 30, "queued_seconds": 2}
TAKEN_UP_SECONDS = LEASE_SECONDS + Settings(**SETTINGS).lapse_seconds + 2 * RELAY_SECONDS + SLACK_SECONDS
"""A killed process's work goes on within a lease, what a relay waits after it has seen its end, and two relays."""


@pytest.fixture(scope="module")
def database_kind() -> str:
    return "postgresql"


class Fleet:
    """Workers of one deployment, and a relay that the test itself runs."""

    def __init__(self, deployment: Deployment, client: Dispatcher, stack: ExitStack, directory: Path) -> None:
        self.deployment = deployment
        self.client = client
        self.sink = deployment.sink
        self.settled = 0
        self._stack = stack
        self._files = (directory / f"file-{number}" for number in range(1000))

    def worker(self, *args: str, app: str = "workers", **env: str) -> WorkerNode:
        """A worker that runs until the test ends."""
        (node,) = self.workers(1, *args, app=app, **env)
        return node

    def workers(self, count: int, *args: str, app: str = "workers", **env: str) -> list[WorkerNode]:
        """Workers that run until the test ends. They start at the same time."""
        command = WorkerNode.command(*args, app=app)
        nodes = [WorkerNode(command, self.deployment.directory, {**self.deployment.env, **env}) for _ in range(count)]
        for node in nodes:  # from this thread: they are killed when the thread that has started them ends
            self._stack.callback(self._end, node)
            self.deployment.nodes.append(node)
            node.start()
        for node in nodes:
            node.wait_until_ready()
        return nodes

    def _end(self, node: WorkerNode) -> None:
        self.deployment.nodes.remove(node)
        node.kill()
        eventually(lambda: not node.processes(), f"the end of {node.name}")

    def file(self) -> Path:
        """A file for the context of a chain: guard or callback waits until it is unlinked."""
        path = next(self._files)
        path.touch()
        return path

    def chain(self, chain_type: str = "single", **context: Any) -> Chain:
        """A new chain that is enqueued."""
        resource = ("test", f"{id(self)}-{time.monotonic_ns()}")
        chain = self.client.get_or_create_resource_chain(chain_type, [resource], initial_context=context)
        chain.enqueue()
        return chain

    def calls(self, chain: Chain) -> list[dict[str, Any]]:
        return self.sink.lines("called", chain_id=chain.id)

    def called(self, chain: Chain, times: int = 1) -> dict[str, Any]:
        """The last call of a chain, once there are so many."""
        self.deployment.eventually(lambda: len(self.calls(chain)) >= times, f"call {times} of {chain!r}")
        return self.calls(chain)[-1]

    def delivery(self, chain: Chain) -> DeliveryRecord:
        (delivery,) = chain.refresh().deliveries
        return delivery

    def relay(self) -> None:
        self.settled += self.client.relay()["settled"]

    def relaying(self, condition: Callable[[], Any], what: str, *, seconds: float = 45) -> None:
        """As `eventually`, with relays meanwhile."""
        last = 0.0

        def look() -> Any:
            nonlocal last
            if time.monotonic() - last >= RELAY_SECONDS:
                self.relay()
                last = time.monotonic()
            return condition()

        self.deployment.eventually(look, what, seconds=seconds)

    def nobody_settles(self, seconds: float) -> None:
        """Let this time pass, with relays; no attempt may be settled."""
        until = time.monotonic() + seconds
        self.relaying(lambda: time.monotonic() >= until, "the time", seconds=seconds + 30)
        assert self.settled == 0

    def assert_delivered(self, chain: Chain, *, calls: int = 1, attempt: int | None = None) -> None:
        """The chain has moved once; it was called so often, always with the same key."""
        made = self.calls(chain)
        assert len(made) == calls
        assert {call["key"] for call in made} == {self.delivery(chain).idempotency_key}
        delivery = self.delivery(chain)
        assert (delivery.status, delivery.attempt) == ("delivered", calls if attempt is None else attempt)
        assert [event.action for event in chain.events if event.action == "state_transition"] == ["state_transition"]


@pytest.fixture
def make_fleet(make_deployment: Callable[..., Deployment], tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    with ExitStack() as stack:

        def make(**settings: Any) -> Fleet:
            deployment = make_deployment(**{**SETTINGS, **settings})
            return Fleet(deployment, stack.enter_context(deployment.client()), stack, tmp_path)

        yield make


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    return make_fleet()


def main_pid(node: WorkerNode) -> int:
    assert node.process is not None
    return node.process.pid


def owner_of(call: dict[str, Any], nodes: list[WorkerNode]) -> WorkerNode:
    """The worker whose process has made a call."""
    (owner,) = [node for node in nodes if call["pid"] in {process.pid for process in node.processes()}]
    return owner


def is_gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def send(pid: int, number: signal.Signals) -> None:
    psutil.Process(pid).send_signal(number)


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
    chains = [fleet.chain("sequence") for _ in range(4)]
    for chain in chains:
        fleet.relaying(lambda chain=chain: chain.refresh().state == DONE or (chain.enqueue() and False), f"{chain!r}")
    fleet.deployment.assert_went_all_the_way_once(chains)
    assert fleet.settled == 0
    assert len({line["pid"] for line in fleet.sink.lines("called")}) == 8


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
    before = chain.version
    fleet.assert_delivered(chain, calls=2)
    mark = len(node.logs())
    send(pid, signal.SIGCONT)
    fleet.deployment.eventually(lambda: len(fleet.sink.lines("done", chain_id=chain.id)) == 2, "its effect, late")
    fleet.deployment.eventually(lambda: "'outcome': 'stale'" in node.logs()[mark:], "that it says so")
    fleet.assert_delivered(chain, calls=2)
    assert chain.refresh().version == before


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
    fleet.called(chain, 2)
    mark = len(old.logs())
    file.unlink()
    fleet.relaying(lambda: chain.refresh().state == "first_sent", "the second attempt")
    fleet.deployment.eventually(lambda: "'outcome': 'stale'" in old.logs()[mark:], "that the first one is stale")
    fleet.assert_delivered(chain, calls=2)
