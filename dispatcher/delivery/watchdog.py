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
from contextlib import contextmanager, suppress
from typing import Final

_LOOK_SECONDS: Final = 0.5


class Watchdog:
    """Watches the callbacks of this process, once `start` was called in it."""

    def __init__(self, *, callback_seconds: float) -> None:
        self._seconds = callback_seconds
        self._lock = threading.Lock()
        self._until: float | None = None
        self._pid = 0

    def start(self, *, parent: int | None = None) -> None:
        """Watch this process from now on. It must be the child of another process, and make one attempt at a time.

        `parent` is the process that made it. Without it, the parent that it has now is taken.
        """
        if self._pid == os.getpid():
            return
        self._pid, self._lock, self._until = os.getpid(), threading.Lock(), None
        arguments = (os.getppid() if parent is None else parent, _log_of_its_own())
        threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True).start()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Kill this process if the block takes longer than a callback may. A block within it does not get more time."""
        pid = os.getpid()
        if self._pid != pid:
            yield
            return
        with self._lock:
            before = self._until
            self._until = time.monotonic() + self._seconds if before is None else before
        try:
            yield
        finally:
            if pid == os.getpid():  # else a child that was forked in the block leaves it; nobody frees its lock
                with self._lock:  # the thread decides under this lock: an end in time is never killed
                    self._until = before

    def _watch(self, parent: int, log: int | None) -> None:
        while True:
            if os.getppid() != parent:
                _kill("its parent has died", log)
            with self._lock:
                if self._until is not None and time.monotonic() >= self._until:
                    _kill(f"a callback has run {self._seconds:g} s", log)
            time.sleep(_LOOK_SECONDS)


def _log_of_its_own() -> int | None:
    """Standard error under another number, because a callback may close it, and a new file then gets its number."""
    try:
        return os.dup(2)
    except OSError:  # it is closed already
        return None


def _kill(reason: str, log: int | None) -> None:
    """Kill this process at once. Logging is not used, because the stuck code may hold one of its locks."""
    line = f"dispatcher: worker process {os.getpid()} is killed: {reason}\n".encode()
    with suppress(OSError, ValueError):  # nothing about the log may keep it alive
        if log is not None and select.select([], [log], [], 0)[1]:
            os.write(log, line)
    os.kill(os.getpid(), signal.SIGKILL)
