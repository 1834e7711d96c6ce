"""The Celery worker to measure: prefork, two processes, prefetch multiplier 64, no events, no results."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from benchmarks.progress import DIRECTORY_VARIABLE, Progress
from benchmarks.servers import ROOT, cpu_seconds
from tests.servers import Server, ServerError, find_program

_OPTIONS = [
    "--pool=prefork",
    "--concurrency=2",
    "--prefetch-multiplier=64",
    "--loglevel=WARNING",
    "--without-gossip",
    "--without-mingle",
    "--without-heartbeat",
]
_POLL_SECONDS = 0.005


class StalledError(Exception):
    """A fleet did not finish its work in time; the text ends with its log."""


class Fleet(Server):
    """One worker with its processes. All fleets are started in the same way, and are idle while others are measured."""

    name = "fleet"

    def __init__(self, app: str, environment: Mapping[str, Any]) -> None:
        self._app = app
        self._environment = environment
        super().__init__()

    def prepare(self) -> None:
        self.progress = Progress(self.directory / "progress")

    def command(self) -> list[str]:
        environment = {
            "PYTHONPATH": ROOT,
            DIRECTORY_VARIABLE: self.progress.directory,
            **{name: value for name, value in self._environment.items() if value is not None},
        }
        return [
            find_program("env"),
            *(f"{name}={value}" for name, value in environment.items()),
            *(sys.executable, "-m", "celery", "-A", self._app, "worker", "-n", f"{self.directory.name}@localhost"),
            *_OPTIONS,
        ]

    def is_ready(self) -> bool:
        return True  # the messages of the warm-up wait for it

    def close(self) -> None:
        with suppress(ServerError):
            self.stop()  # `kill` would leave its children behind
        self.progress.close()
        super().close()

    def wait_for(self, condition: Callable[[], bool], *, seconds: float, what: str) -> None:
        """Wait until `condition()` is true. Raises `StalledError` after `seconds`, or if the worker has ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise StalledError(f"{what}: not within {seconds:g} s\n{self.log_tail()}")
            time.sleep(_POLL_SECONDS)

    def wait_for_ticks(self, count: int, *, seconds: float) -> None:
        """Wait until the counters of the fleet have reached `count`."""
        self.wait_for(lambda: self.progress.total() >= count, seconds=seconds, what=f"{count} done")

    def cpu_seconds(self) -> float:
        """The CPU time that the worker and its processes have used so far."""
        return cpu_seconds(self.pid)
