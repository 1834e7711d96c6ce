"""The leases of the attempts that this process makes: one thread renews all of them, every quarter of a lease.

A lease is short, so that work of a process that was killed is taken up soon. It is renewed for as long as the process
lives, from the begin of an attempt until its end is recorded, so that nobody else makes the attempt meanwhile.

The thread has a database connection of its own, on which every wait ends after a few seconds: a connection that
swallows everything must not cost more than one renewal. It is started in the process that makes attempts, after a fork.
A process that forks while the thread works waits until the thread does not use its connection; the child then begins
without thread and without attempts.
"""

import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DBAPIError

from dispatcher.domain.records import DeliveryRecord
from dispatcher.errors import ServiceUnavailable
from dispatcher.storage import deliveries
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_ANSWER_SECONDS: Final = 3.0
_FORK_SECONDS: Final = 10.0
_IDLE_ROUNDS: Final = 12


class Leases:
    """Keeps the leases of one deployment's attempts in this process."""

    def __init__(self, database: Database, *, lease_seconds: float) -> None:
        self.seconds = lease_seconds
        self._database = database.hasty(min(_ANSWER_SECONDS, lease_seconds * 0.15))
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._connection_in_use = threading.Lock()
        self._ended = threading.Event()
        self._kept: dict[object, tuple[DeliveryRecord, ...]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def kept(self, running: Iterable[DeliveryRecord]) -> Iterator[None]:
        """Renew the leases of these begun attempts while the block runs."""
        attempts = tuple(running)
        if not attempts:
            yield
            return
        token = object()
        with self._lock:
            self._kept[token] = attempts
            if self._thread is None:
                self._ended.clear()
                self._thread = threading.Thread(target=self._renew_until_idle, name="leases", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._kept.pop(token, None)  # a child that was forked in the block has none

    def close(self) -> None:
        """End the thread and close its connection."""
        with self._lock:
            thread, self._thread = self._thread, None
        self._ended.set()
        if thread is not None:
            thread.join(_FORK_SECONDS)
        self._database.dispose()

    def _renew_until_idle(self) -> None:
        """Renew every quarter of a lease. A thread that has had nothing to do for some time ends."""
        me, wait, idle = threading.current_thread(), self.seconds / 4, 0
        while not self._ended.wait(wait):
            with self._lock:
                running = [delivery for attempts in self._kept.values() for delivery in attempts]
                idle = 0 if running else idle + 1
                if self._thread is not me or idle > _IDLE_ROUNDS:
                    if self._thread is me:
                        self._thread = None
                    return
            wait = self.seconds / 4 if self._renew(running) else self.seconds / 20

    def _renew(self, running: list[DeliveryRecord]) -> bool:
        """Renew these leases; False if the database does not answer."""
        if not running:
            return True
        with self._connection_in_use:
            try:
                self._database.write(
                    lambda connection: deliveries.renew(
                        connection, running, lease_seconds=self.seconds, skip_locked=True
                    )
                )
            except (ServiceUnavailable, DBAPIError) as error:
                self._database.dispose()  # the connection may be in the middle of an answer
                emit(
                    logger,
                    Action.LEASES_NOT_RENEWED,
                    "the leases of %d attempts are not renewed (%s); trying again",
                    len(running),
                    type(error).__name__,
                    deliveries=len(running),
                )
                return False
        return True


_all: "weakref.WeakSet[Leases]" = weakref.WeakSet()
_waited_for: list[threading.Lock] = []


def _before_fork() -> None:
    locks = [leases._connection_in_use for leases in list(_all)]
    _waited_for.extend(lock for lock in locks if lock.acquire(timeout=_FORK_SECONDS))


def _after_fork_in_parent() -> None:
    while _waited_for:
        _waited_for.pop().release()


def _after_fork_in_child() -> None:
    _waited_for.clear()
    for leases in list(_all):
        leases._begin()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
