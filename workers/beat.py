"""What a beat needs to go on ticking after the clock of its host was wrong.

Celery's beat remembers by the wall clock when it sent each entry, and reckons from that when the entry is due next. If
the clock was two days ahead for some seconds, and is right again, what was sent meanwhile would not be due for two
days. The schedule file carries such a moment over a restart, too.
"""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from dispatcher.messages.queues import PRUNE, RELAY, SWEEP

_ENTRIES: Final = (SWEEP, RELAY, PRUNE)
_TOLERANCE: Final = timedelta(seconds=0.5)
_LONG_AGO: Final = timedelta(days=366)


def follow_the_clock(sender: Any, **_: Any) -> None:
    """Receive Celery's signal `beat_init`: from now on our entries are due at once whenever the clock was set back.

    So each step back costs one tick of each kind at most; a tick that is too early does nothing, because it is claimed
    in a row. After a step forward Celery itself sends what seems to be due. The application's own entries, and
    schedulers with a heap of their own (redbeat), are left as they are.
    """
    scheduler, clock = sender.scheduler, _WallClock()
    schedules_equal = scheduler.schedules_equal

    def equal_and_possible(old: Any, new: Any) -> bool:
        # Celery asks this before every tick. If it is not so, it makes its heap anew, from when the entries were sent.
        return not _make_due(new, all_of_them=clock.went_back()) and schedules_equal(old, new)

    scheduler.schedules_equal = equal_and_possible
    _make_due(scheduler.schedule)  # what the schedule file says; the first tick does not compare


class _WallClock:
    def __init__(self) -> None:
        self._ahead = self._ahead_of_monotonic()

    def went_back(self) -> bool:
        """Whether the clock was set back since the last time that this was asked."""
        before, self._ahead = self._ahead, self._ahead_of_monotonic()
        return before - self._ahead > _TOLERANCE

    @staticmethod
    def _ahead_of_monotonic() -> timedelta:
        return timedelta(seconds=time.time() - time.monotonic())


def _make_due(entries: Mapping[str, Any], *, all_of_them: bool = False) -> bool:
    """Make due those of our entries that seem to be sent in the future, or all; whether there were any."""
    found = False
    for name in _ENTRIES:
        entry = entries.get(name)
        if entry is None or entry.last_run_at is None:
            continue
        now = entry.schedule.maybe_make_aware(entry.schedule.now())
        if all_of_them or entry.schedule.maybe_make_aware(entry.last_run_at) - now > _TOLERANCE:
            entry.last_run_at = now - _LONG_AGO
            found = True
    return found
