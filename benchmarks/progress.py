"""How far a fleet has come: counters in shared memory, and a datagram socket for single answers.

A tick costs a fraction of a microsecond, so that counting does not show in what is counted.
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
    """This process's counter; a forked child gets its own."""

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
"""Count one thing done in this process."""


def answer() -> None:
    """Tell the waiting `Progress` that a callback is about to return, and when that was."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(str(time.monotonic()).encode(), str(Path(os.environ[DIRECTORY_VARIABLE]) / _ANSWERS))


class Progress:
    """What the processes with this directory in their environment have counted."""

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
        """The moment (monotonic seconds, which are the same in every process) of the next answer."""
        return float(self._socket.recv(64))

    def close(self) -> None:
        self._socket.close()
