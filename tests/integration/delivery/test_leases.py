"""The leases of running attempts are renewed for as long as their process lives, whatever happens to connections."""

import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from dispatcher import NEW, Chain, Dispatcher, Settings
from dispatcher.delivery import leases
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.storage import database
from tests.chaos.proxy import Proxy
from tests.integration import shop
from tests.servers import wait_until

pytestmark = pytest.mark.integration

LEASE_SECONDS = 2.0
CONFIG = shop.cart({NEW: [shop.Remind]}, callback=shop.Sink())


class Deaf(Proxy):
    """A proxy whose connections may go deaf: nothing that either side sends arrives, and no end is seen."""

    def __init__(self, target: int) -> None:
        self.deaf_from: re.Pattern[bytes] | None = None
        self.went_deaf = threading.Event()
        self._deaf: set[Any] = set()
        self._all: set[Any] = set()
        super().__init__(target)

    def deafen(self) -> None:
        """Let all connections of this moment go deaf for ever; later ones work."""
        self._deaf |= self._all
        self.went_deaf.set()

    async def _accept(self, reader: Any, writer: Any) -> None:
        self._all.add(writer)
        self._current = writer
        await super()._accept(reader, writer)

    async def _pump(self, reader: Any, writer: Any, cuts: Callable[[bytes], bool]) -> None:
        connection = self._current  # both directions begin before another connection is accepted
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.deaf_from is not None and self.deaf_from.search(data):
                    self.deaf_from = None
                    self._deaf.add(connection)
                    self.went_deaf.set()
                if connection not in self._deaf:
                    writer.write(data)
                    await writer.drain()
        if connection in self._deaf:
            await self._loop.create_future()  # the other side does not see the end


@pytest.fixture
def proxy(database_url: str) -> Iterator[Deaf]:
    port = make_url(database_url).port
    assert port is not None
    proxy = Deaf(port)
    yield proxy
    proxy.close()


def leases_through(dispatcher: Dispatcher, proxy: Proxy) -> None:
    """Let only the thread that renews leases connect through the proxy."""
    kept = dispatcher._services.leases._database
    kept.url = kept.url.set(port=proxy.port)


def lease_of(dispatcher: Dispatcher, delivery: DeliveryRecord) -> datetime:
    (row,) = dispatcher.find_deliveries(chain_id=delivery.chain_id)
    assert row.lease_until is not None, row.status
    return row.lease_until


def is_renewed(dispatcher: Dispatcher, delivery: DeliveryRecord, *, seconds: float = 15) -> None:
    """Return when the lease ends later than it does now."""
    before = lease_of(dispatcher, delivery)
    wait_until(lambda: lease_of(dispatcher, delivery) > before, seconds=seconds, what="a renewal")


class Running:
    """An attempt that waits in its callback while the block runs."""

    def __init__(self, make_dispatcher: shop.Make, **settings: Any) -> None:
        self.gate = shop.Gate()
        self.sink = shop.Sink(self.gate.wait)
        config = shop.cart({NEW: [shop.Remind]}, callback=self.sink)
        self.dispatcher = make_dispatcher(config, **{"lease_seconds": LEASE_SECONDS, **settings})
        self.relaying = make_dispatcher(config, **{"lease_seconds": LEASE_SECONDS, **settings})
        self.chain = shop.new_chain(self.dispatcher)
        self.delivery = shop.planned(self.dispatcher, self.chain)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        with self.gate.during(lambda: shop.attempt(self.dispatcher, self.delivery)) as future:
            yield
        assert future.result().outcome == "delivered"
        assert len(self.sink) == 1

    def wait_with_relays(self, seconds: float) -> None:
        """Let this time pass; relays that see every lease run meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.relaying.relay()["settled"] == 0
            time.sleep(0.2)


# --- as long as the process lives -------------------------------------------------------------------------------------


def test_a_callback_of_several_leases_is_made_once(make_dispatcher: shop.Make) -> None:
    running = Running(make_dispatcher)
    with running.attempt():
        running.wait_with_relays(3 * LEASE_SECONDS)


def test_renewals_go_on_after_an_error_that_nobody_has_foreseen(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(make_dispatcher)
    errors = [RuntimeError("a driver's own"), OperationalError("UPDATE", None, OSError("reset"))]
    commit = database.commit

    def fail(step: Callable[[], Any]) -> Any:
        if threading.current_thread().name == "leases" and errors:
            raise errors.pop()
        return commit(step)

    monkeypatch.setattr(database, "commit", fail)
    with running.attempt():
        is_renewed(running.dispatcher, running.delivery)
        assert not errors
        running.wait_with_relays(2 * LEASE_SECONDS)
    lines = [record for record in caplog.records if vars(record).get("action") == "leases_not_renewed"]
    assert [line.levelname for line in lines if line.levelname != "DEBUG"] == ["WARNING"], "one line for both"


def test_a_callback_that_closes_its_dispatcher_keeps_its_lease(make_dispatcher: shop.Make) -> None:
    running = Running(make_dispatcher)
    with running.attempt():
        running.dispatcher.close()
        running.wait_with_relays(2 * LEASE_SECONDS)


def test_a_thread_that_has_died_is_replaced_at_the_next_begin(make_dispatcher: shop.Make) -> None:
    running = Running(make_dispatcher)
    dead = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    running.dispatcher._services.leases._thread = dead
    with running.attempt():
        running.wait_with_relays(2 * LEASE_SECONDS)


def test_an_attempt_without_a_thread_is_not_called(make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives no more threads. The attempt is left to the relay, and the next one can be made."""
    running = Running(make_dispatcher)

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(leases.threading, "Thread", NoThread)
        with pytest.raises(RuntimeError):
            running.dispatcher.deliver([Owed(running.delivery.id, 1)])
    assert len(running.sink) == 0
    shop.change_delivery(running.dispatcher, running.delivery.id, **shop.LAPSED)
    assert running.dispatcher.relay()["settled"] == 1
    assert not shop.delivery_of(running.dispatcher, running.chain).unknown
    running.gate.opened.set()
    assert shop.attempt(running.dispatcher, running.delivery, 2).outcome == "delivered"


# --- its connection ---------------------------------------------------------------------------------------------------


def connections(dispatcher: Dispatcher) -> int:
    """How many connections this database has, beside the one that asks."""
    question = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        "mariadb": "SELECT count(*) FROM information_schema.processlist "
        "WHERE db = DATABASE() AND id <> CONNECTION_ID()",
    }[dispatcher.database.dialect]
    with dispatcher.database.read() as connection:
        return int(connection.execute(text(question)).scalar_one())


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_a_thread_that_is_idle_closes_its_connection_and_ends(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_IDLE_SECONDS", 1.5)
    running = Running(make_dispatcher)
    kept = running.dispatcher._services.leases
    running.dispatcher.database.dispose()
    running.relaying.database.dispose()
    with running.attempt():
        is_renewed(running.relaying, running.delivery)
        assert kept._thread is not None
    running.dispatcher.database.dispose()
    wait_until(lambda: connections(running.relaying) == 1, seconds=10, what="only that of the leases is left")
    wait_until(lambda: kept._thread is None, seconds=10, what="the end of the thread")
    wait_until(lambda: connections(running.relaying) == 0, seconds=10, what="the end of its connection")


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_close_ends_the_thread_and_its_connection(make_dispatcher: shop.Make) -> None:
    running = Running(make_dispatcher)
    with running.attempt():
        is_renewed(running.relaying, running.delivery)
    kept = running.dispatcher._services.leases
    thread = kept._thread
    assert thread is not None
    running.dispatcher.close()
    assert not thread.is_alive()
    wait_until(lambda: connections(running.relaying) == 0, seconds=10, what="the end of its connection")


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_a_connection_that_swallows_everything_costs_one_renewal(make_dispatcher: shop.Make, proxy: Deaf) -> None:
    lease_seconds = 8.0
    running = Running(make_dispatcher, lease_seconds=lease_seconds)
    leases_through(running.dispatcher, proxy)
    with running.attempt():
        is_renewed(running.relaying, running.delivery)
        proxy.deafen()
        began = time.monotonic()
        is_renewed(running.relaying, running.delivery)
        assert time.monotonic() - began < lease_seconds * 0.75, "within the lease, with room"


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_a_renewal_that_is_cut_off_in_its_midst_does_not_keep_the_end_from_being_recorded(
    make_dispatcher: shop.Make, proxy: Deaf
) -> None:
    """The server does not see that the connection is gone, so it would hold the locks of an open transaction."""
    running = Running(make_dispatcher, lease_seconds=4.0)
    leases_through(running.dispatcher, proxy)
    with running.attempt():
        is_renewed(running.relaying, running.delivery)
        proxy.deaf_from = re.compile(rb"UPDATE chain_dispatcher_delivery")
        assert proxy.went_deaf.wait(20)
        began = time.monotonic()
    assert time.monotonic() - began < 15


# --- forks ------------------------------------------------------------------------------------------------------------


def attempt_in_child(dispatcher: Dispatcher, path: Path, delivery_id: str) -> None:
    """Make an attempt whose callback takes more than a lease, in a child; write down how it went."""
    kept = dispatcher._services.leases
    said = {"kept": len(kept._kept), "thread": kept._thread is not None}
    (result,) = dispatcher.deliver([Owed(delivery_id, 1)])
    path.write_text(json.dumps({**said, "outcome": result.outcome}))


def slow(_: object) -> None:
    time.sleep(LEASE_SECONDS * 1.2)


def spawned(url: str, path: Path, delivery_id: str) -> None:
    config = shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(slow))
    settings = Settings(lease_seconds=LEASE_SECONDS)
    with Dispatcher(config, database_url=url, redis_url=shop.NOBODY, settings=settings) as one:
        attempt_in_child(one, path, delivery_id)


def fork(work: Callable[..., None], *args: Any) -> Callable[[], None]:
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
        finally:
            os._exit(0)
    return lambda: ended(pid)


def ended(pid: int) -> None:
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, seconds=30, what=f"the end of child {pid}")


def by_multiprocessing(method: str) -> Callable[..., Callable[[], None]]:
    def start(work: Callable[..., None], *args: Any) -> Callable[[], None]:
        process = multiprocessing.get_context(method).Process(target=work, args=args)
        process.start()

        def join() -> None:
            process.join(30)
            assert not process.is_alive()

        return join

    return start


@pytest.mark.parametrize("by", [fork, by_multiprocessing("fork")], ids=["os.fork", "multiprocessing"])
def test_children_begin_without_the_thread_and_make_attempts_of_their_own(
    make_dispatcher: shop.Make, tmp_path: Path, by: Callable[..., Callable[[], None]]
) -> None:
    running = Running(make_dispatcher)
    parent = os.getpid()
    running.sink.effect = lambda transition: running.gate.wait() if os.getpid() == parent else slow(transition)
    chains = [shop.new_chain(running.dispatcher, number) for number in range(1, 4)]
    owed = [shop.planned(running.dispatcher, chain) for chain in chains]
    with running.attempt():
        joins = [by(attempt_in_child, running.dispatcher, tmp_path / one.id, one.id) for one in owed]
        running.wait_with_relays(1.5 * LEASE_SECONDS)
        for join in joins:
            join()
        is_renewed(running.relaying, running.delivery)
    for one in owed:
        assert json.loads((tmp_path / one.id).read_text()) == {"kept": 0, "thread": False, "outcome": "delivered"}


def test_no_child_hangs_that_is_forked_at_any_moment_of_a_renewal(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The thread renews without a pause, and children use the database at once."""
    running = Running(make_dispatcher)
    running.dispatcher._services.leases.seconds = 0.004  # a renewal every millisecond; the row's lease is not looked at

    def read(number: int) -> None:
        assert len(running.dispatcher.find_chains()) == 1
        running.dispatcher.disable_resource(("nothing", "here"))
        (tmp_path / f"{number}").touch()

    with running.attempt():
        joins = [fork(read, number) for number in range(40)]
        for join in joins:
            join()
    assert len(list(tmp_path.iterdir())) >= 40


def test_a_spawned_child_makes_an_attempt_of_its_own(
    make_dispatcher: shop.Make, tmp_path: Path, database_url: str
) -> None:
    running = Running(make_dispatcher)
    chain = shop.new_chain(running.dispatcher, 1)
    owed = shop.planned(running.dispatcher, chain)
    with running.attempt():
        join = by_multiprocessing("spawn")(spawned, database_url, tmp_path / "said", owed.id)
        is_renewed(running.relaying, running.delivery)
        join()
    assert json.loads((tmp_path / "said").read_text())["outcome"] == "delivered"


def test_threads_that_fork_at_once_let_go_of_their_own_locks_only(make_dispatcher: shop.Make) -> None:
    running = Running(make_dispatcher)
    with running.attempt():

        def fork_one() -> None:
            fork(lambda: None)()

        threads = [threading.Thread(target=fork_one) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        in_use = running.dispatcher._services.leases._connection_in_use
        assert in_use.acquire(timeout=10), "no fork has kept it"
        in_use.release()
        is_renewed(running.relaying, running.delivery)


# --- an earlier begin of the same attempt -----------------------------------------------------------------------------


@pytest.fixture
def lost_deferral(make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch) -> "LostDeferral":
    return LostDeferral(make_dispatcher, monkeypatch)


class LostDeferral:
    """A deferral whose commit gets no answer; before it is tried again, another worker begins the same attempt."""

    def __init__(self, make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = shop.Gate()
        self.sink = shop.Sink(self.gate.wait)
        limited = shop.cart({NEW: [shop.Remind]}, callback=self.sink, rate_limit="1/h")
        self.old = make_dispatcher(limited, lease_seconds=LEASE_SECONDS)
        self.new = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=self.sink), lease_seconds=LEASE_SECONDS)
        first = shop.new_chain(self.old, 0)
        self.gate.opened.set()
        assert shop.attempt(self.old, shop.planned(self.old, first)).outcome == "delivered"
        self.gate.opened.clear()
        self.gate.reached.clear()
        self.chain: Chain = shop.new_chain(self.old, 1)
        self.delivery = shop.planned(self.old, self.chain)
        self.lost, self.go_on = threading.Event(), threading.Event()
        self.commits = 0
        self.thread = threading.Thread(target=self._attempt)
        commit = database.commit

        def lose_answer(step: Callable[[], Any]) -> Any:
            answer = commit(step)
            if threading.current_thread() is self.thread and not self.lost.is_set():
                with self.old.database.read() as connection:
                    status = connection.execute(
                        text("SELECT status FROM chain_dispatcher_delivery WHERE chain_id = :id"), {"id": self.chain.id}
                    ).scalar_one()
                if status == "pending":  # the deferral is committed
                    self.lost.set()
                    assert self.go_on.wait(30)
                    raise OperationalError("COMMIT", None, OSError("reset by peer"), connection_invalidated=True)
            return answer

        monkeypatch.setattr(database, "commit", lose_answer)

    def _attempt(self) -> None:
        self.result = shop.attempt(self.old, self.delivery)


def test_a_deferral_whose_answer_is_lost_does_not_touch_a_later_begin_of_the_same_attempt(
    lost_deferral: LostDeferral,
) -> None:
    lost_deferral.thread.start()
    assert lost_deferral.lost.wait(30)
    shop.wait_over(lost_deferral.new, lost_deferral.delivery)
    with lost_deferral.gate.during(lambda: shop.attempt(lost_deferral.new, lost_deferral.delivery)) as future:
        before = shop.delivery_of(lost_deferral.new, lost_deferral.chain)
        assert (before.status, before.attempt, before.begins) == ("running", 1, 2)
        lost_deferral.go_on.set()
        lost_deferral.thread.join(30)
        after = shop.delivery_of(lost_deferral.new, lost_deferral.chain)
        assert (after.status, after.attempt, after.begins, after.waits_for) == ("running", 1, 2, before.waits_for)
        assert not lost_deferral.old._services.leases._kept
        store = lost_deferral.old._services.store
        mine = replace(before, begins=1)
        lease = lease_of(lost_deferral.new, lost_deferral.delivery)
        store.renew([mine], lease_seconds=3600)
        assert store.mark_called([mine], lease_seconds=3600) == set()
        assert store.begin_anew([mine], lease_seconds=3600) == []
        assert lease_of(lost_deferral.new, lost_deferral.delivery) - lease < timedelta(seconds=60)
    assert lost_deferral.result.outcome == "stale"
    assert future.result().outcome == "delivered"
    assert shop.actions(lost_deferral.chain) == ["created", "planned", "state_transition"]
