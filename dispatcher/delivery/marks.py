"""The marks of running attempts: a row says whether the callback may have been called.

If the process dies, an attempt without the mark was certainly not called, and the next attempt looks again. One with
the mark has an unknown effect. (The mark is NULL in `uncalled`.) One statement marks all attempts whose turns come
within the next two hundredths of a second: slow callbacks get a statement each, and quick ones share one.
"""

import math
import time
from collections.abc import Collection, Sequence
from typing import Final

from dispatcher.delivery.attempt import Attempt
from dispatcher.storage.store import Store

_EXPOSED_SECONDS: Final = 0.02
"""For how long an attempt may be marked before its turn comes."""

_FIRST_GROUP: Final = 10
_LARGEST_GROUP: Final = 50


class GrewOldError(Exception):
    """The mark of an attempt took so long to write that its facts and hours are old: it begins anew."""


class Tempo:
    """How fast the attempts of this process were lately."""

    def __init__(self) -> None:
        self.group_size = _FIRST_GROUP
        self.turn_seconds = math.inf

    def note(self, turn_seconds: float) -> None:
        """Note how long the turn of an attempt took in a group."""
        self.turn_seconds = turn_seconds
        fits = int(1 / turn_seconds) if turn_seconds * _LARGEST_GROUP > 1 else _LARGEST_GROUP
        self.group_size = max(1, fits)


class Marks:
    """The marks of one begun group."""

    def __init__(self, store: Store, lease_seconds: float) -> None:
        self._store = store
        self._lease_seconds = lease_seconds
        self._marked: Collection[str] = ()
        self._at = 0.0

    def allow(self, attempt: Attempt, following: Sequence[Attempt], *, turn_seconds: float) -> bool:
        """Whether the attempt may be called: it is still ours, its row has the mark, and its lease is fresh.

        `following` are those whose turns come next, and `turn_seconds` says how long a turn takes.
        """
        now, delivery_id = time.monotonic(), attempt.delivery.id
        if delivery_id in self._marked and now - self._at < self._lease_seconds / 4:
            return True
        more = int(_EXPOSED_SECONDS / turn_seconds) if turn_seconds else len(following)
        asked = [each.delivery for each in (attempt, *following[:more])]
        self._marked = self._store.mark_called(asked, lease_seconds=self._lease_seconds)
        self._at = now
        return delivery_id in self._marked
