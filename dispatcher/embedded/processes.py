"""Child processes that end with their parent, and files that one process holds at a time."""

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
    """The embedded server cannot be started; the text says why, and what helps."""


_PR_SET_PDEATHSIG: Final = 1


def die_with_parent() -> Callable[[], None] | None:
    """What to pass as `preexec_fn` so that a child is killed when the calling thread's process ends; Linux only.

    (PR_SET_PDEATHSIG, see prctl(2). It survives an exec and is not inherited by the child's own children.) A forked
    child of a process with threads must not take a lock: what runs there is two calls into libraries loaded before.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded here: little may be done between fork and exec
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call above
            os._exit(1)

    return prepare


def terminate(process: subprocess.Popen[bytes], seconds: float) -> None:
    """End `process`: SIGTERM, and SIGKILL when that took longer than `seconds`."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def hold_lock(path: Path) -> IO[str] | None:
    """The file at `path`, open, locked, and holding this process's id; None while another process holds it.

    The kernel releases it with the process, however that ends.
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
    """Empty and release a file of `hold_lock`. It stays, because removing it would race with the next holder."""
    file.truncate(0)
    file.close()


def write_atomically(path: Path, text: str) -> None:
    """Make `path` hold `text`; a reader sees the old file or the new one, never a part."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
