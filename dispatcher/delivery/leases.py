"""The leases of the attempts that this process makes: one thread renews all of them, every quarter of a lease.

A lease is short, so that work of a process that was killed is taken up soon. It is renewed for as long as the process
lives, from the begin of an attempt until its end is recorded, so that nobody else makes the attempt meanwhile.

The thread has a database connection of its own, on which every wait ends after a few seconds: a connection that
swallows everything must not cost more than one renewal. It is started in the process that makes attempts, after a fork.
A process that forks while the thread works waits until the thread does not use its connection; the child then begins
without thread and without attempts. A thread that has had nothing to do for a minute closes its connection and ends.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from dispatcher.domain.records import DeliveryRecord
from dispatcher.storage.database import Database
from dispatcher.storage.store import Store
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_ANSWER_SECONDS: Final = 3.0
_FORK_SECONDS: Final = 10.0
_IDLE_SECONDS: Final = 60.0


class Leases:
    """Keeps the leases of one deployment's attempts in this process. `store_of` gives the store of a database."""

    def __init__(self, database: Database, store_of: Callable[[Database], Store], *, lease_seconds: float) -> None:
        self.seconds = lease_seconds
        self._database = database.hasty(min(_ANSWER_SECONDS, lease_seconds * 0.15))
        self._store = store_of(self._database)
        self._begin()
        _all.add(self)
        weakref.finalize(self, self._database.dispose).atexit = False

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._connection_in_use = threading.Lock()
        self._kept: dict[object, tuple[DeliveryRecord, ...]] = {}
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._is_away = False

    @contextmanager
    def kept(self, running: Iterable[DeliveryRecord]) -> Iterator[None]:
        """Renew the leases of these begun attempts while the block runs."""
        attempts = tuple(running)
        if not attempts:
            yield
            return
        token = object()
        try:
            with self._lock:
                self._kept[token] = attempts
                if self._thread is None or not self._thread.is_alive():
                    self._start()
            yield
        finally:
            with self._lock:
                self._kept.pop(token, None)  # a child that was forked in the block has none

    def close(self) -> None:
        """End the thread and close its connection. While attempts run here, the thread goes on until it is idle."""
        with self._lock:
            if self._kept:  # a callback may close what it uses, and others may run in other threads
                return
            thread, self._thread = self._thread, None
            self._ended.set()
        if thread is not None:
            thread.join(_FORK_SECONDS)
        self._disconnect()

    def _start(self) -> None:
        self._ended = threading.Event()  # one for each thread, because the one before may not have seen its end yet
        thread = threading.Thread(target=self._renew_until_idle, args=(self._ended,), name="leases", daemon=True)
        thread.start()
        self._thread = thread

    def _renew_until_idle(self, ended: threading.Event) -> None:
        """Renew every quarter of a lease, until `close`, or until there was nothing to do for some time."""
        quarter = min(self.seconds / 4, _IDLE_SECONDS)
        wait, used_at = quarter, time.monotonic()
        while not ended.wait(wait):
            with self._lock:
                running = [delivery for attempts in self._kept.values() for delivery in attempts]
                now = time.monotonic()
                used_at = now if running else used_at
                if now - used_at >= _IDLE_SECONDS:
                    if self._ended is ended:
                        self._thread = None
                    break
            wait = quarter if self._renew(running) else self.seconds / 20
        self._disconnect()

    def _renew(self, running: list[DeliveryRecord]) -> bool:
        """Renew these leases; False if the database does not answer."""
        if not running:
            return True
        with self._connection_in_use:
            try:
                self._store.renew(running, lease_seconds=self.seconds)
            except Exception as error:  # noqa: BLE001 - whatever it is, the attempts live, so it is tried again
                self._database.dispose()  # the connection may be in the middle of an answer
                emit(
                    logger,
                    Action.LEASES_NOT_RENEWED,
                    "the leases of %d attempts are not renewed (%s); trying again",
                    len(running),
                    type(error).__name__,
                    level=logging.DEBUG if self._is_away else None,  # one line for each time that it is away
                    deliveries=len(running),
                )
                self._is_away = True
                return False
        self._is_away = False
        return True

    def _disconnect(self) -> None:
        with self._connection_in_use:  # of another thread of ours, if there is one by now: it connects again
            self._database.dispose()


_all: "weakref.WeakSet[Leases]" = weakref.WeakSet()


class _Held(threading.local):
    """What this thread holds while it forks. Several threads may fork at once."""

    def __init__(self) -> None:
        self.locks: list[threading.Lock] = []


_held = _Held()


def _before_fork() -> None:
    locks = [leases._connection_in_use for leases in list(_all)]
    _held.locks = [lock for lock in locks if lock.acquire(timeout=_FORK_SECONDS)]


def _after_fork_in_parent() -> None:
    while _held.locks:
        _held.locks.pop().release()


def _after_fork_in_child() -> None:
    _held.locks = []
    for leases in list(_all):
        leases._begin()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
