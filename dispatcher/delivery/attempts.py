"""Attempts at the deliveries of one message, in groups.

An attempt is two short transactions, its begin and its end, with the user's code between them and no connection in use
meanwhile. A process that dies between the two leaves an attempt that the relay settles.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Final

from dispatcher.delivery.ends import Ends
from dispatcher.delivery.groups import Groups
from dispatcher.domain.records import Owed, valid_id
from dispatcher.domain.results import AttemptResult
from dispatcher.settings import Settings
from dispatcher.states import AttemptOutcome

_MAX_ATTEMPT: Final = 2**31


class Attempts:
    """Makes attempts for one deployment."""

    def __init__(self, *, settings: Settings, groups: Groups, ends: Ends) -> None:
        self._settings = settings
        self._groups = groups
        self._ends = ends

    def deliver(self, owed: Sequence[Owed]) -> list[AttemptResult]:
        """Make one attempt at each of these deliveries; one result for each, in their order.

        They are begun and recorded in groups; each callback, failure and last look concerns its own delivery only. No
        callback begins later than `lock_seconds` after the beginning: what is not begun by then is published again.
        """
        messages = [_checked(message) for message in owed]
        waiting = [message for message in messages if message is not None]
        results: dict[Owed, AttemptResult] = {}
        call_by = time.monotonic() + self._settings.lock_seconds
        start = 0
        while start < len(waiting):
            if start and time.monotonic() >= call_by:
                self._ends.publish_again(waiting[start:])
                break
            group = waiting[start : start + self._groups.size]
            start += len(group)
            for result in self._groups.deliver(group, call_by=call_by):
                # The first result counts: a message may name the same attempt twice, and the second is stale.
                results.setdefault(Owed(result.delivery_id, result.attempt), result)
        return [_result_of(asked, checked, results) for asked, checked in zip(owed, messages, strict=True)]


def _checked(message: Owed) -> Owed | None:
    """A message with its delivery's id in canonical form; None when it cannot name an attempt."""
    delivery_id = valid_id(message.delivery_id)
    if delivery_id is None or isinstance(message.attempt, bool) or not 0 < message.attempt < _MAX_ATTEMPT:
        return None
    return Owed(delivery_id, message.attempt)


def _result_of(asked: Owed, checked: Owed | None, results: Mapping[Owed, AttemptResult]) -> AttemptResult:
    if checked is None:
        return AttemptResult(str(asked.delivery_id)[:40], asked.attempt, AttemptOutcome.MISSING)
    return results.get(checked, AttemptResult(checked.delivery_id, checked.attempt, AttemptOutcome.STALE))
