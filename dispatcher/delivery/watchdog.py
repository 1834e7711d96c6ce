"""Ends a worker process whose callback has run too long, or whose parent has died.

A time limit that raises an exception in user code can be swallowed by it, so this one kills the process. The attempt is
then lost with its process, and the relay settles it. Only processes that make one attempt at a time are watched: the
children of a prefork pool. Code that holds the interpreter's lock stops this thread too; it meets the time limit of its
Celery task.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LOOK_SECONDS: Final = 0.5


class Watchdog:
    """Watches the callbacks of this process, once `start` was called in it."""

    def __init__(self, *, callback_seconds: float) -> None:
        self._seconds = callback_seconds
        self._lock = threading.Lock()
        self._until: float | None = None
        self._pid = 0

    def start(self) -> None:
        """Watch this process from now on. It must be the child of another process, and make one attempt at a time."""
        if self._pid == os.getpid():
            return
        self._pid, self._lock, self._until = os.getpid(), threading.Lock(), None
        threading.Thread(target=self._watch, args=(os.getppid(),), name="watchdog", daemon=True).start()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Kill this process if the block takes longer than a callback may."""
        if self._pid != os.getpid():
            yield
            return
        with self._lock:
            self._until = time.monotonic() + self._seconds
        try:
            yield
        finally:
            with self._lock:  # the thread decides under this lock: an end in time is never killed
                self._until = None

    def _watch(self, parent: int) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            if os.getppid() != parent:
                _kill("its parent has died")
            with self._lock:
                if self._until is not None and time.monotonic() >= self._until:
                    _kill(f"a callback has run {self._seconds:g} s")


def _kill(reason: str) -> None:
    """Kill this process at once. Logging is not used, because the stuck code may hold one of its locks."""
    line = f"dispatcher: worker process {os.getpid()} is killed: {reason}\n".encode()
    if select.select([], [2], [], 0)[1]:
        os.write(2, line)
    os.kill(os.getpid(), signal.SIGKILL)
