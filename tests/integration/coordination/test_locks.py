"""Chain locks: whose they are, how they end, and that nothing depends on them."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Self

import pytest
import redis

from dispatcher import NEW, ChainLocked, ConfigurationError, Dispatcher, ServiceUnavailable
from dispatcher.coordination.locks import ChainLocks
from tests.integration import shop
from tests.servers import RedisServer, wait_until

pytestmark = pytest.mark.integration

Locks = Callable[..., ChainLocks]


@pytest.fixture
def make_locks(redis_url: str) -> Iterator[Locks]:
    """Makers of locks, one per pretended process."""
    made = []

    def make(url: str | None = redis_url, *, lock_seconds: float = 30, connect_seconds: float = 2) -> ChainLocks:
        made.append(ChainLocks(url, prefix="test", lock_seconds=lock_seconds, connect_seconds=connect_seconds))
        return made[-1]

    yield make
    for locks in made:
        locks.close()


class Proxy:
    """A way to a server on which a reply can get lost: the server acts, its answer never arrives."""

    def __init__(self, port: int) -> None:
        self.target = ("127.0.0.1", port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}/0"
        self.lose_reply = threading.Event()
        self.lost = 0

    def __enter__(self) -> Self:
        self.pool = ThreadPoolExecutor()
        self.pool.submit(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.pool.shutdown()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.pool.submit(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server:
            while question := client.recv(65536):
                server.sendall(question)
                answer = server.recv(65536)
                if self.lose_reply.is_set():
                    self.lose_reply.clear()
                    self.lost += 1
                    return
                client.sendall(answer)


# --- owners ----------------------------------------------------------------------------------------------------------


def test_a_lock_is_taken_by_one_and_given_back(make_locks: Locks, redis_url: str) -> None:
    mine, theirs = make_locks(), make_locks()

    held = mine.acquire([1, 2])
    assert held.held == (1, 2) and not held.locked
    others = theirs.acquire([2, 3])
    assert (others.held, others.locked) == ((3,), {2})
    assert mine.locked([1, 2, 3, 4]) == {1, 2, 3}

    mine.release(held)
    theirs.release(others)
    assert shop.dump_keys(redis_url) == {}


def test_of_many_at_once_one_takes_the_lock(make_locks: Locks) -> None:
    callers = [make_locks() for _ in range(8)]

    results = shop.at_once(*(lambda one=one: one.acquire([1]) for one in callers))  # type: ignore[misc]

    assert sorted(len(held.held) for held in results) == [0] * 7 + [1]


def test_a_lock_has_an_owner_and_a_time_to_live(make_locks: Locks, redis_url: str) -> None:
    held = make_locks(lock_seconds=30).acquire([1])

    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.get("test:lock:1") == held.token
        assert 29_000 < client.pttl("test:lock:1") <= 30_000
    assert len(held.token or "") >= 32


def test_the_lock_of_a_holder_that_vanished_ends_by_its_time_to_live(make_locks: Locks) -> None:
    vanished, other = make_locks(lock_seconds=1), make_locks()
    begun = time.monotonic()
    vanished.acquire([1])
    assert other.acquire([1]).locked == {1}

    wait_until(lambda: not other.locked([1]), seconds=shop.WAIT_SECONDS, what="the lock ends")

    assert 0.9 < time.monotonic() - begun < 10
    assert other.acquire([1]).held == (1,)


def test_a_release_by_a_foreign_token_does_nothing(make_locks: Locks) -> None:
    slow, other = make_locks(lock_seconds=1), make_locks()
    expired = slow.acquire([1])
    wait_until(lambda: not other.locked([1]), seconds=shop.WAIT_SECONDS, what="the lock ends")
    held = other.acquire([1])

    slow.release(expired)

    assert other.locked([1]) == {1}
    other.release(held)
    assert other.locked([1]) == set()


def test_a_lock_whose_reply_was_lost_counts_as_acquired(make_locks: Locks, redis_server: RedisServer) -> None:
    with Proxy(redis_server.port) as proxy:
        locks = make_locks(proxy.url)
        locks.release(locks.acquire([1]))  # the connection is open and the script is known
        proxy.lose_reply.set()

        held = locks.acquire([1])

        assert proxy.lost == 1
        assert (held.held, held.locked) == ((1,), frozenset())
        locks.release(held)
        assert locks.locked([1]) == set()
        locks.close()


def test_a_marker_whose_reply_was_lost_counts_as_set(redis_server: RedisServer) -> None:
    """Otherwise nobody would publish the chain until its marker ends."""
    redis_server.clear()
    with (
        Proxy(redis_server.port) as proxy,
        closing(ChainLocks(proxy.url, prefix="test", lock_seconds=30, connect_seconds=2)) as locks,
    ):
        assert locks.mark_queued([1], seconds=60) == [1]
        proxy.lose_reply.set()

        assert locks.mark_queued([1, 2, 3], seconds=60) == [2, 3]

        assert proxy.lost == 1


def test_a_chain_whose_executions_never_ended_is_counted(make_locks: Locks, redis_url: str) -> None:
    locks = make_locks()
    for crashes in range(3):
        assert locks.acquire([1]).crashes == ({1: crashes} if crashes else {})
        with redis.Redis.from_url(redis_url) as client:
            client.delete("test:lock:1")  # the lock ended, the execution did not
    held = locks.acquire([1])
    assert held.crashes == {1: 3}
    locks.release(held)
    assert locks.acquire([1]).crashes == {}


def test_markers_are_set_once_and_cleared_when_an_execution_starts(make_locks: Locks) -> None:
    locks = make_locks()

    assert locks.mark_queued([1, 2], seconds=60) == [1, 2]
    assert locks.mark_queued([1, 2, 3], seconds=60) == [3]
    locks.acquire([1])
    locks.unmark_queued([3])
    assert locks.mark_queued([1, 2, 3], seconds=60) == [1, 3]


# --- the server is away ----------------------------------------------------------------------------------------------


def test_without_a_server_every_lock_is_had_and_no_key_is_missed(make_locks: Locks) -> None:
    for locks in (make_locks(shop.NOBODY), make_locks(None)):
        held = locks.acquire([1, 2])
        assert (held.held, held.locked, held.crashes) == ((1, 2), frozenset(), {})
        locks.release(held)
        assert locks.locked([1]) == set()
        assert locks.mark_queued([1, 2], seconds=60) == [1, 2]
        locks.unmark_queued([1])


def test_a_check_says_whether_the_server_answers(make_locks: Locks) -> None:
    make_locks().check()
    make_locks(None).check()
    with pytest.raises(ServiceUnavailable, match=r"Redis at redis://127\.0\.0\.1:1"):
        make_locks(shop.NOBODY).check()
    with pytest.raises(ConfigurationError):
        make_locks("http://127.0.0.1")


def test_no_password_is_shown(make_locks: Locks, caplog: pytest.LogCaptureFixture) -> None:
    locks = make_locks("redis://user:s3cret@127.0.0.1:1/0")

    locks.acquire([1])
    with pytest.raises(ServiceUnavailable) as caught:
        locks.check()

    assert "does not answer" in caplog.text
    assert "s3cret" not in f"{caplog.text} {locks!r} {caught.value!r}"


@contextmanager
def full_server(redis_server: RedisServer) -> Iterator[None]:
    """The server refuses every write, as one without memory does."""
    with redis.Redis(port=redis_server.port) as client:
        client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)


@pytest.mark.parametrize("server", ["is not there", "stops", "is silent", "is full"])
def test_evaluation_goes_on_when_the_lock_server_is_away(
    make_dispatcher: Callable[..., Dispatcher], redis_server: RedisServer, broker_url: str, server: str
) -> None:
    sink = shop.Sink()
    config = shop.cart({NEW: [shop.Remind]}, callback=sink)
    begun = time.monotonic()
    if server == "is not there":
        dispatcher = make_dispatcher(config, redis_url=shop.NOBODY)
        results = dispatcher.execute_chains([shop.new_chain(dispatcher).id])
    elif server == "stops":
        with RedisServer() as own:
            dispatcher = make_dispatcher(config, redis_url=own.url)
            dispatcher.execute_chains([shop.new_chain(dispatcher, 1).id])
            own.kill()
            results = dispatcher.execute_chains([shop.new_chain(dispatcher).id])
    elif server == "is silent":
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
            dispatcher = make_dispatcher(config, redis_url=url, connect_seconds=0.5)
            results = dispatcher.execute_chains([shop.new_chain(dispatcher).id])
    else:
        with full_server(redis_server):
            dispatcher = make_dispatcher(config, broker_url=shop.NOBODY)
            results = dispatcher.execute_chains([shop.new_chain(dispatcher).id])

    assert [str(result.outcome) for result in results] == ["planned"]
    assert shop.new_chain(dispatcher, 2).execute()["outcome"] == "moved"
    assert time.monotonic() - begun < 20


# --- with executions -------------------------------------------------------------------------------------------------


def test_a_chain_that_is_locked_is_not_executed_and_stays_due(
    make_dispatcher: Callable[..., Dispatcher], make_locks: Locks, redis_url: str
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain, other = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
    with redis.Redis.from_url(redis_url) as client:
        client.set(f"dispatcher:lock:{chain.id}", "another's", px=30_000)

    results = dispatcher.execute_chains([chain.id, other.id])

    assert [str(result.outcome) for result in results] == ["locked", "planned"]
    assert shop.row_of(dispatcher, chain.id).due_at is not None
    with pytest.raises(ChainLocked) as caught:
        chain.execute()
    assert isinstance(caught.value, ValueError)
    with redis.Redis.from_url(redis_url) as client:
        assert client.get(f"dispatcher:lock:{chain.id}") == b"another's"


def test_an_execution_holds_its_lock_while_it_evaluates_and_not_while_it_calls_back(
    make_dispatcher: Callable[..., Dispatcher], redis_url: str
) -> None:
    gate, seen = shop.Gate(), []
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Guarded", "guarded", gate.wait)]}))
    chain = shop.new_chain(dispatcher)
    key = f"dispatcher:lock:{chain.id}".encode()

    with gate.during(lambda: chain.execute(callback=lambda _: seen.append(key in shop.dump_keys(redis_url)))):
        assert key in shop.dump_keys(redis_url)
        with pytest.raises(ChainLocked):
            shop.new_chain(dispatcher).execute()
        assert [str(one.outcome) for one in dispatcher.execute_chains([chain.id])] == ["locked"]

    assert seen == [False]
    assert shop.dump_keys(redis_url) == {}


@pytest.mark.parametrize("ends_in", ["a guard's error", "a callback's error", "nothing", "a plan"])
def test_an_execution_leaves_no_key_behind(
    make_dispatcher: Callable[..., Dispatcher], redis_url: str, ends_in: str
) -> None:
    guard = {"a guard's error": shop.Raises(RuntimeError("no")), "nothing": lambda _: False}.get(
        ends_in, lambda _: True
    )
    config = shop.cart(
        {NEW: [shop.transition("Guarded", "guarded", guard)]}, callback=shop.Sink(shop.Raises(OSError("no")))
    )
    dispatcher = make_dispatcher(config)
    first, second = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)

    dispatcher.execute_chains([first.id])
    try:
        second.execute()
    except (RuntimeError, OSError):
        assert ends_in != "nothing"

    assert shop.dump_keys(redis_url) == {}


def test_a_guard_that_kills_its_process_backs_off(
    make_dispatcher: Callable[..., Dispatcher], redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.transition("Asked", "asked", shop.Raises(KeyboardInterrupt()))]})
    )
    chain, other = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
    with redis.Redis.from_url(redis_url) as client:
        client.set(f"dispatcher:crash:{chain.id}", 3)  # three executions began and never ended
        client.set(f"dispatcher:crash:{other.id}", 1)

    # The back-off is written before the guard runs, so that the chain is not due even if it kills the process again.
    with pytest.raises(KeyboardInterrupt):
        dispatcher.execute_chains([chain.id])

    row = shop.row_of(dispatcher, chain.id)
    assert row.failures == 1 and row.due_at > chain.created_at
    assert [event.action for event in chain.events] == ["created", "guard_failed"]
    with pytest.raises(KeyboardInterrupt):
        dispatcher.execute_chains([other.id])
    assert shop.row_of(dispatcher, other.id).failures == 0


def test_setting_aside_what_is_no_longer_held_counts_no_crash_down(make_locks: Locks, redis_url: str) -> None:
    """A counter below zero would say that the lock is another's, and nobody would release it."""
    locks = make_locks()
    locks.acquire([7])  # its process died
    with redis.Redis.from_url(redis_url) as client:
        client.delete("test:lock:7")
        held = locks.acquire([7, 8])
        assert held.crashes == {7: 1}
        client.flushall()

    locks.set_aside(held, [7])

    assert shop.dump_keys(redis_url) == {}
    assert locks.acquire([7]).held == (7,)
