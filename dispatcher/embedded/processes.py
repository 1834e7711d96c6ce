"""Child processes that end with their parent, and lock files that only one process can hold."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from dispatcher.errors import DispatcherError

if sys.platform != "win32":
    import fcntl


class EmbeddedServerError(DispatcherError):
    """The embedded server cannot be started; the text says why and what to do."""


_PR_SET_PDEATHSIG: Final = 1


def die_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` with which a child is killed when the thread that starts it ends; None if not on Linux.

    (PR_SET_PDEATHSIG, see prctl(2). It survives an exec, and the children of the child do not inherit it.) The function
    makes only calls into libraries that are loaded already, because a forked child of a process with threads must not
    take a lock.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded here, because little may be done between fork and exec
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the call above
            os._exit(1)

    return prepare


def terminate(process: subprocess.Popen[bytes], seconds: float) -> None:
    """End `process` with SIGTERM, and with SIGKILL if it does not end within `seconds`."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def hold_lock(path: Path) -> IO[str] | None:
    """The file at `path`, open and locked, with this process's id in it; None while another process holds the lock.

    The kernel releases the lock when the process ends, in whatever way.
    """
    if sys.platform == "win32":
        raise EmbeddedServerError("the embedded server needs unix sockets: set DISPATCHER_REDIS_URL")
    file = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def release_lock(file: IO[str]) -> None:
    """Empty and release a file of `hold_lock`. It is not deleted, because that would race with the next holder."""
    file.truncate(0)
    file.close()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`; a reader sees the old text or the new text, never a part."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
