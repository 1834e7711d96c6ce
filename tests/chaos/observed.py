"""What the driver notes of a run's processes and servers while it goes on: the oracle takes excuses from it."""

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from tests.chaos.history import Interval, Processes

_RAISED: Final = re.compile(r"raised unexpected: (\w+)")


class Spell:
    """Something that lasts: intervals, of which the last may be open."""

    def __init__(self) -> None:
        self._ended: list[Interval] = []
        self._since: float | None = None

    @property
    def lasts(self) -> bool:
        """Whether it has begun and not ended."""
        return self._since is not None

    def begin(self) -> None:
        """It begins now, unless it has."""
        if self._since is None:
            self._since = time.monotonic()

    def end(self) -> None:
        """It ends now, if it had begun."""
        if self._since is not None:
            self._ended.append(Interval(self._since, time.monotonic()))
            self._since = None

    def intervals(self) -> list[Interval]:
        """All of them; one that has not ended is endless."""
        return [*self._ended, *([] if self._since is None else [Interval(self._since, math.inf)])]


class Observed:
    """Stops, deaths and outages of one run."""

    def __init__(self) -> None:
        self.outage = Spell()
        """No worker reaches the database."""

        self.cut_off = Spell()
        """No worker reaches the database, while the driver's own relay does."""

        self.rates_lost: set[str] = set()
        """What was done to the server that counts calls."""

        self._stops: dict[int, Spell] = defaultdict(Spell)
        self._living: dict[int, psutil.Process] = {}
        self._deaths: dict[int, float] = {}

    def stopped(self, pids: Iterable[int]) -> None:
        """These processes get SIGSTOP now."""
        for pid in pids:
            self._stops[pid].begin()

    def resumed(self, pids: Iterable[int]) -> None:
        """These processes have got SIGCONT."""
        for pid in pids:
            self._stops[pid].end()

    def look_for(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Watch the processes that wrote these lines of the sink, and note which of all are gone."""
        for pid in {line["pid"] for line in lines} - self._living.keys() - self._deaths.keys():
            try:
                self._living[pid] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                self._deaths[pid] = time.monotonic()
        for pid, process in list(self._living.items()):
            if not _lives(process):
                del self._living[pid]
                self._deaths[pid] = time.monotonic()

    def processes(self) -> Processes:
        """What the oracle is told."""
        return Processes(
            deaths=dict(self._deaths),
            stops={pid: spell.intervals() for pid, spell in self._stops.items()},
            cut_off=self.cut_off.intervals(),
            outages=self.outage.intervals(),
        )


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


Later = Callable[[float, Callable[[], None]], None]
"""Does something after so many seconds, or when the faults end."""


def errors_of_tasks(logs: Iterable[Path]) -> Counter[str]:
    """How many tasks ended with an error that the library does not name, by its class, as the workers' logs say."""
    texts = (log.read_text(errors="replace") for log in logs if log.exists())
    return Counter(name for text in texts for name in _RAISED.findall(text))
