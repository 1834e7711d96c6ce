"""Attempts at the deliveries of one message: begun and recorded in groups, each called for itself.

An attempt is two short transactions, its begin and its end, with the user's code between them and no connection in use
meanwhile. A process that dies between the two leaves an *unknown* effect, which the relay settles.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from dispatcher.delivery.attempt import Attempt, Called, CannotBeRead, Failed, make_attempt
from dispatcher.delivery.ends import Ends
from dispatcher.delivery.pacing import Pacing
from dispatcher.domain.callbacks import resolve_callback
from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.contexts import load_contexts
from dispatcher.domain.records import Begun, Owed, valid_id
from dispatcher.domain.results import AttemptResult
from dispatcher.domain.unreadable import unreadable
from dispatcher.errors import ServiceUnavailable
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.settings import Settings
from dispatcher.states import AttemptOutcome
from dispatcher.storage import deliveries
from dispatcher.storage.database import Database
from dispatcher.storage.store import Store
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_GROUP: Final = 10
_GROUP_SECONDS: Final = 1.0
_MAX_ATTEMPT: Final = 2**31


class Attempts:
    """Makes attempts for one deployment."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        store: Store,
        publisher: Publisher,
        pacing: Pacing,
        ends: Ends,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._store = store
        self._publisher = publisher
        self._pacing = pacing
        self._ends = ends

    def deliver(self, owed: Sequence[Owed]) -> list[AttemptResult]:
        """Make one attempt at each of these deliveries; one result for each, in their order.

        They are begun and recorded in groups; each callback, failure and last look concerns its own delivery only. When
        half of the task's time is used up, those that are not begun are published again.
        """
        messages = [_checked(message) for message in owed]
        waiting = [message for message in messages if message is not None]
        results: dict[Owed, AttemptResult] = {}
        stop_at = time.monotonic() + self._settings.callback_seconds / 2
        for start in range(0, len(waiting), _GROUP):
            if start and time.monotonic() >= stop_at:
                self._publish_again(waiting[start:])
                break
            for result in self._deliver_group(waiting[start : start + _GROUP], stop_at):
                # The first result counts: a message may name the same attempt twice, and the second is stale.
                results.setdefault(Owed(result.delivery_id, result.attempt), result)
        return [_result_of(asked, checked, results) for asked, checked in zip(owed, messages, strict=True)]

    def _deliver_group(self, owed: Sequence[Owed], stop_at: float) -> list[AttemptResult]:
        finish_by = time.monotonic() + self._settings.lease_seconds
        begun = self._store.begin(owed, lease_seconds=self._settings.lease_seconds)
        results: list[AttemptResult] = []
        attempts: list[Attempt] = []
        for row in begun:
            attempt = self._ready_to_call(row, finish_by)
            if isinstance(attempt, Attempt):
                attempts.append(attempt)
            else:
                results.append(attempt)
        results += self._call(attempts, stop_at)
        return results + self._not_begun(owed, begun)

    def _not_begun(self, owed: Sequence[Owed], begun: Sequence[Begun]) -> list[AttemptResult]:
        """The results of attempts that did not begin. It is asked last, because an error here must not keep others."""
        begun_ids = {row.delivery.id for row in begun}
        refused = [message for message in owed if message.delivery_id not in begun_ids]
        if not refused:
            return []
        try:
            with self._database.read() as connection:
                outcomes = deliveries.why_not_begun(connection, [message.delivery_id for message in refused])
        except (ServiceUnavailable, DBAPIError):
            if not begun:
                raise
            outcomes = {message.delivery_id: AttemptOutcome.STALE for message in refused}
        return [
            self._ends.not_begun(message.delivery_id, message.attempt, outcomes[message.delivery_id])
            for message in refused
        ]

    def _ready_to_call(self, begun: Begun, finish_by: float) -> Attempt | AttemptResult:
        """The attempt with its definition; a result where that is unknown here, or where the attempt has to wait."""
        now = self._database.domain_now(begun.machine_now)
        delivery = begun.delivery
        try:
            chain_type = self._config.by_type[begun.chain.chain_type]
            transition_class = chain_type.by_name[delivery.transition]
            callback = resolve_callback(chain_type, transition_class, delivery.callback)
        except KeyError as error:
            return self._ends.unknown_definition(begun, error.args[0], now, finish_by)
        attempt = Attempt(begun, chain_type, transition_class, callback, now, finish_by)
        problem = unreadable(begun.chain.context, delivery.context, delivery.kwargs, delivery.request)
        if problem is not None:
            return self._ends.record(attempt, CannotBeRead(problem))
        try:
            deferral = self._pacing.deferral(chain_type, begun, now)
        except Exception as error:  # noqa: BLE001 - whatever it is, the attempt must not stay begun
            return self._ends.record(attempt, Failed(error))
        return attempt if deferral is None else self._ends.deferred(attempt, deferral)

    def _call(self, attempts: Sequence[Attempt], stop_at: float) -> Iterator[AttemptResult]:
        """Call each of these attempts; callbacks that returned are recorded together, at least every second.

        A process that is killed leaves few unknown effects that way.
        """
        loaded = _load([attempt for attempt in attempts if not attempt.delivery.unknown])
        called: list[tuple[Attempt, Called]] = []
        since = time.monotonic()
        for number, attempt in enumerate(attempts):
            if number and time.monotonic() >= stop_at:  # those not called go back, before the time limit strikes
                yield from self._ends.record_called(called)
                self._ends.give_back(attempts[number:])
                return
            end = make_attempt(
                attempt,
                None if attempt.delivery.unknown else loaded.get(attempt.begun.chain.id, {}),
                last_look_seconds=self._settings.last_look_seconds,
                mark_known=self._ends.mark_known,
            )
            if not isinstance(end, Called):
                yield self._ends.record(attempt, end)
                continue
            called.append((attempt, end))
            if time.monotonic() - since > _GROUP_SECONDS:
                yield from self._ends.record_called(called)
                called, since = [], time.monotonic()
        yield from self._ends.record_called(called)

    def _publish_again(self, owed: Sequence[Owed]) -> None:
        try:
            self._publisher.deliver(owed)
        except PublishFailed as error:
            emit(
                logger,
                Action.DELIVERIES_NOT_PUBLISHED,
                "%d deliveries are not published again (%s); the relay will do it",
                len(owed),
                error,
                deliveries=len(owed),
            )


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


def _load(attempts: Sequence[Attempt]) -> dict[int, Mapping[str, Any] | BaseException]:
    """What each chain type's `load_context` gives for its chains: `{chain id: context or what it raised}`."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(attempt.chain_type.chain_type, []).append(attempt)
    loaded: dict[int, Mapping[str, Any] | BaseException] = {}
    for group in groups.values():
        loaded.update(load_contexts(group[0].chain_type, [attempt.begun.chain for attempt in group]))
    return loaded
