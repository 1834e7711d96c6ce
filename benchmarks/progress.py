"""The progress of a fleet: counters in shared memory, and a datagram socket for single answers.

A tick costs a fraction of a microsecond, so that counting does not change the measurement.
"""

import mmap
import os
import socket
import time
from pathlib import Path
from typing import Final

DIRECTORY_VARIABLE: Final = "BENCHMARK_PROGRESS"
_ANSWERS: Final = "answers"


class _Counter:
    """The counter of this process; a forked child gets a new counter."""

    def __init__(self) -> None:
        self._pid = 0
        self._cells = memoryview(bytearray(8)).cast("Q")

    def tick(self) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            path = Path(os.environ[DIRECTORY_VARIABLE]) / str(self._pid)
            path.write_bytes(bytes(8))
            with path.open("r+b") as file:
                self._cells = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
        self._cells[0] += 1


_counter = _Counter()
tick = _counter.tick
"""Count one item that this process has done."""


def answer() -> None:
    """Send the current time to the waiting `Progress`, because a callback is about to return."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(str(time.monotonic()).encode(), str(Path(os.environ[DIRECTORY_VARIABLE]) / _ANSWERS))


class Progress:
    """The counters of all processes that have this directory in their environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory / _ANSWERS))
        self._socket.settimeout(30)

    def total(self) -> int:
        """The sum of all counters."""
        return sum(int.from_bytes(path.read_bytes(), "little") for path in self.directory.glob("[0-9]*"))

    def wait_for_answer(self) -> float:
        """Wait for the next answer; gives its time (monotonic seconds, which are the same in every process)."""
        return float(self._socket.recv(64))

    def close(self) -> None:
        self._socket.close()
