"""Counts the calls of this process alone, where there is no lock server."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from dispatcher.coordination.counters import LINE_SECONDS, ROUNDING_SECONDS, Answer, Kind, Question, name_of, pace_of
from dispatcher.rates import Asked


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

    _SOME: Final = 1000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}
        self._lines: dict[str, _Line] = {}
        self._tidy_at = self._SOME

    def ask(self, question: Question) -> Answer | None:
        """See `Counter`."""
        with self._lock:
            now = time.monotonic()
            answer = self._ask_keyed(question, now) or self._ask_unkeyed(question, now)
            if answer is None and question.counting:
                self._count(question, now)
            return answer

    def _ask_keyed(self, question: Question, now: float) -> Answer | None:
        waits = [
            (self._time_to_room(one, question, now), one.limit) for one in question.asked if one.limit.key is not None
        ]
        wait, limit = max(waits, key=lambda pair: pair[0], default=(0.0, None))
        return None if limit is None or wait <= 0 else Answer(limit, wait, Kind.KEYED)

    def _ask_unkeyed(self, question: Question, now: float) -> Answer | None:
        for one in question.asked:
            if one.limit.key is not None:
                continue
            wait = self._time_to_room(one, question, now)
            line = self._lines.setdefault(name_of(one), _Line())
            if wait <= 0 and (question.has_place or max(line.first, line.again) <= now):
                continue
            place = max(now + wait, line.again) if question.has_place else max(now + wait, line.again, line.first)
            if place > now + wait + LINE_SECONDS:
                return Answer(one.limit, wait, Kind.FULL)
            if question.has_place:
                line.again = place + pace_of(one.limit)
            else:
                line.first = place + pace_of(one.limit)
            return Answer(one.limit, place - now, Kind.PLACE)
        return None

    def _time_to_room(self, one: Asked, question: Question, now: float) -> float:
        window = self._windows.get(name_of(one))
        if window is None:
            return 0.0
        window.leave(now)
        if len(window.calls) < one.limit.amount or question.call_for(one.limit) in window.calls:
            return 0.0
        return next(iter(window.calls.values())) + one.limit.seconds - now + ROUNDING_SECONDS

    def _count(self, question: Question, now: float) -> None:
        for one in question.asked:
            calls = self._windows.setdefault(name_of(one), _Window(one.limit.seconds)).calls
            calls[question.call_for(one.limit)] = now
            calls.move_to_end(question.call_for(one.limit))
        if len(self._windows) > self._tidy_at:  # each customer of a keyed limit has a window
            for window in self._windows.values():
                window.leave(now)
            self._windows = {name: window for name, window in self._windows.items() if window.calls}
            self._tidy_at = 2 * len(self._windows) + self._SOME
