"""`dispatcher dev` in a terminal: runs the stack of the current directory and shows its logs until Ctrl-C."""

import re
import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Final, Self

import click

from dispatcher.embedded.stack import POLL_SECONDS, READY_SECONDS, Child, Stack, StackError
from dispatcher.embedded.state import embedded_directory
from dispatcher.settings import Settings

_RECORD: Final = re.compile(r"^\[[^\]]*: (DEBUG|INFO|WARNING|ERROR|CRITICAL)/")


LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class LogFollower:
    """Prints the new lines of a child's log with the child's name; leaves out records below `level`."""

    def __init__(self, child: Child, colour: str, level: str) -> None:
        self._file = child.log.open(encoding="utf-8", errors="replace")
        self._prefix = click.style(f"{child.name:<6} |", fg=colour)
        self._shown_levels = LEVELS[LEVELS.index(level) :]
        self._showing = True
        self._rest = ""

    def show(self) -> None:
        """Print the complete lines that were written since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            record = _RECORD.match(line)
            if record is not None:  # lines without a level, such as a traceback, belong to the record above
                self._showing = record[1] in self._shown_levels
            if self._showing:
                click.echo(f"{self._prefix} {line}")

    def close(self) -> None:
        """Print the remaining lines and close the file."""
        self.show()
        self._file.close()


class StopSignal:
    """A context manager that remembers whether Ctrl-C, SIGTERM or SIGHUP came. A second signal kills the processes."""

    def __init__(self, stack: Stack) -> None:
        self.came = False
        self._stack = stack
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            self._stack.grace_seconds = 0
        self.came = True


def run_dev(settings: Settings, *, concurrency: int | None = None, log_level: str = "INFO") -> None:
    """Run the stack of the current directory and show its logs, until Ctrl-C, SIGTERM or SIGHUP.

    If a part ends unexpectedly, stops everything and raises `StackError`.
    """
    stack = Stack(
        embedded_directory(),
        redis_url=settings.redis_url,
        broker_url=settings.broker_url,
        database_url=settings.database_url,
        concurrency=concurrency,
        # At least INFO, because the readiness line is an INFO record. `LogFollower` hides what is below `log_level`.
        log_level="DEBUG" if log_level == "DEBUG" else "INFO",
    )
    followers: list[LogFollower] = []
    with StopSignal(stack) as stop:
        try:
            stack.launch()
            followers += [
                LogFollower(child, colour, log_level)
                for child, colour in zip(stack.children, ("green", "cyan"), strict=True)
            ]
            _say(f"files and logs are in {stack.directory}")
            _follow(stack, followers, stop)
            _say("stopping (Ctrl-C again to kill)")
        finally:
            stack.stop()
            for follower in followers:
                follower.close()
    _say("stopped")


def _follow(stack: Stack, followers: Sequence[LogFollower], stop: StopSignal) -> None:
    ready = False
    deadline = time.monotonic() + READY_SECONDS
    while not stop.came:
        for follower in followers:
            follower.show()
        stack.check()
        if not ready and stack.is_ready():
            ready = True
            _say("ready, Ctrl-C stops everything")
        if not ready and time.monotonic() > deadline:
            raise StackError(f"the worker is not ready after {READY_SECONDS} s")
        time.sleep(POLL_SECONDS)


def _say(text: str) -> None:
    click.echo(f"{click.style('dev    |', fg='yellow')} {text}")
