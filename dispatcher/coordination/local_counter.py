"""Counts the calls of this process alone, where there is no lock server."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from dispatcher.coordination.counters import LINE_SECONDS, ROUNDING_SECONDS, Answer, Kind, Question, name_of, pace_of
from dispatcher.rates import Asked

_KEPT_WINDOWS: Final = 1000
"""How many windows may be kept before those without calls are looked for."""


@dataclass(slots=True)
class _Window:
    seconds: int
    calls: "OrderedDict[str, float]" = field(default_factory=OrderedDict)

    def leave(self, now: float) -> None:
        """Forget the calls that are no longer in the window."""
        while self.calls and next(iter(self.calls.values())) <= now - self.seconds:
            self.calls.popitem(last=False)


@dataclass(slots=True)
class _Line:
    first: float = 0.0
    again: float = 0.0


class LocalCounter:
    """Counts the calls of this process by its monotonic clock. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}
        self._lines: dict[str, _Line] = {}
        self._tidy_at = _KEPT_WINDOWS

    def ask(self, question: Question) -> Answer | None:
        """See `Counter`."""
        with self._lock:
            now = time.monotonic()
            answer = self._ask_keyed(question, now) or self._ask_unkeyed(question, now)
            if answer is None and question.counting:
                self._count(question, now)
            return answer

    def _ask_keyed(self, question: Question, now: float) -> Answer | None:
        keyed = [asked for asked in question.asked if asked.limit.key is not None]
        waits = [(self._time_to_room(asked, question, now), asked.limit) for asked in keyed]
        wait, limit = max(waits, key=lambda pair: pair[0], default=(0.0, None))
        return None if limit is None or wait <= 0 else Answer(limit, wait, Kind.KEYED)

    def _ask_unkeyed(self, question: Question, now: float) -> Answer | None:
        for asked in question.asked:
            if asked.limit.key is not None:
                continue
            wait = self._time_to_room(asked, question, now)
            line = self._lines.setdefault(name_of(asked), _Line())
            if wait <= 0 and (question.has_place or max(line.first, line.again) <= now):
                continue
            place = max(now + wait, line.again) if question.has_place else max(now + wait, line.again, line.first)
            if place > now + wait + LINE_SECONDS:
                return Answer(asked.limit, wait, Kind.FULL)
            if question.has_place:
                line.again = place + pace_of(asked.limit)
            else:
                line.first = place + pace_of(asked.limit)
            return Answer(asked.limit, place - now, Kind.PLACE)
        return None

    def _time_to_room(self, asked: Asked, question: Question, now: float) -> float:
        window = self._windows.get(name_of(asked))
        if window is None:
            return 0.0
        window.leave(now)
        if len(window.calls) < asked.limit.amount or question.call_for(asked.limit) in window.calls:
            return 0.0
        return next(iter(window.calls.values())) + asked.limit.seconds - now + ROUNDING_SECONDS

    def _count(self, question: Question, now: float) -> None:
        for asked in question.asked:
            calls = self._windows.setdefault(name_of(asked), _Window(asked.limit.seconds)).calls
            calls[question.call_for(asked.limit)] = now
            calls.move_to_end(question.call_for(asked.limit))
        if len(self._windows) > self._tidy_at:  # each customer of a keyed limit has a window
            for window in self._windows.values():
                window.leave(now)
            self._windows = {name: window for name, window in self._windows.items() if window.calls}
            self._tidy_at = 2 * len(self._windows) + _KEPT_WINDOWS
