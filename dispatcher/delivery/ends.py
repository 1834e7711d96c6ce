"""What the end of an attempt means: the rows that are written, the result, the log line, and what is published next."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from dispatcher.bounds import describe
from dispatcher.delivery.attempt import (
    Attempt,
    Called,
    CannotBeRead,
    Deferred,
    End,
    Failed,
    NoneLeft,
    NotValid,
    StillUnknown,
    TakenOver,
    Verified,
)
from dispatcher.delivery.pacing import Deferral
from dispatcher.delivery.recording import MAX_PAUSE_SECONDS, RECORD_SECONDS, note_problem, patiently, recorded
from dispatcher.domain.config import ChainType
from dispatcher.domain.decisions import (
    AfterCall,
    computes_rest,
    due_after_move,
    rest_after_call,
    rest_of_plan,
    seconds_to_retry,
)
from dispatcher.domain.evaluation import Plan
from dispatcher.domain.records import Begun, DeliveryRecord, Finished, Owed
from dispatcher.domain.results import AttemptResult, reasons_text
from dispatcher.errors import PermanentFailure, ServiceUnavailable
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import CHAINS_QUEUE, MAX_COUNTDOWN
from dispatcher.retry import growing_interval
from dispatcher.settings import Settings
from dispatcher.states import AttemptOutcome, DeliveryStatus, EventAction, WaitsFor
from dispatcher.storage import deliveries, history
from dispatcher.storage.database import Database
from dispatcher.storage.deliveries import NotBegun
from dispatcher.storage.store import Store
from dispatcher.telemetry import Action, emit
from dispatcher.transition import Transition

logger = logging.getLogger(__name__)

_LOGGED_AS: Final[Mapping[AttemptOutcome, Action]] = {
    outcome: Action(f"attempt_{outcome}") for outcome in AttemptOutcome if outcome != AttemptOutcome.DRY_RUN
}


class Ends:
    """Records the ends of attempts for one deployment. `random` draws the jitter of retries from [0, 1)."""

    def __init__(
        self,
        *,
        settings: Settings,
        database: Database,
        store: Store,
        publisher: Publisher,
        random: Callable[[], float],
    ) -> None:
        self._store = store
        self._settings = settings
        self._database = database
        self._publisher = publisher
        self._random = random

    # --- attempts that did not get as far as user code ---------------------------------------------------------------

    def not_begun(self, owed: Owed, reason: NotBegun) -> AttemptResult:
        """The result of an attempt that may not begin. One whose message came a little too early is asked again."""
        detail = "" if reason.early_seconds is None else f"{reason.early_seconds:.1f} s before its time"
        result = _logged(AttemptResult(owed.delivery_id, owed.attempt, reason.outcome, detail=detail))
        return replace(result, retry_seconds=reason.early_seconds)

    def unknown_definition(self, begun: Begun, name: str, now: datetime) -> AttemptResult:
        """Take back the beginning of an attempt whose chain type, transition or callback this process does not know."""
        delivery, record = begun.delivery, begun.chain
        reason = f"unknown definition: {name!r}"
        waited = max((begun.machine_now - delivery.planned_at).total_seconds(), 0)
        seconds = growing_interval(1 + int(waited // 60), spread=self._random()).total_seconds()

        def work(connection: Connection) -> bool:
            postponed = deliveries.postpone(
                connection, delivery, what=WaitsFor.DEFINITION, reason=reason, seconds=seconds
            )
            if postponed and delivery.waits_for != WaitsFor.DEFINITION:
                history.add_event(
                    connection,
                    record.id,
                    record.version,
                    EventAction.UNKNOWN_DEFINITION,
                    value=delivery.transition,
                    from_state=record.state,
                    to_state=record.state,
                    detail=reason,
                    now=now,
                )
            return postponed

        recorded(
            self._database,
            delivery,
            partial(self._database.write, work),
            (DeliveryStatus.PENDING,),
            attempt_after=delivery.attempt - 1,
        )
        return _logged(AttemptResult(delivery.id, delivery.attempt, AttemptOutcome.UNKNOWN_DEFINITION))

    def give_back(self, attempts: Sequence[Attempt]) -> list[AttemptResult]:
        """Take back the beginning of attempts that were not called, and publish them again; their results."""
        if not attempts:
            return []
        grace = self._settings.queued_seconds

        def work(connection: Connection) -> list[bool]:
            ordered = sorted(attempts, key=lambda attempt: attempt.delivery.id)
            given = {a.delivery.id: deliveries.give_back(connection, a.delivery, grace_seconds=grace) for a in ordered}
            return [given[attempt.delivery.id] for attempt in attempts]

        given_back = patiently(partial(self._database.write, work), until=time.monotonic() + RECORD_SECONDS)
        self.publish_again(
            [
                Owed(attempt.delivery.id, attempt.delivery.attempt)
                for attempt, given in zip(attempts, given_back, strict=True)
                if given
            ]
        )
        return [
            _result(attempt, AttemptOutcome.DEFERRED, "its turn did not come in time, so it is published again")
            if given
            else _result(attempt, AttemptOutcome.STALE)
            for attempt, given in zip(attempts, given_back, strict=True)
        ]

    def publish_again(self, owed: Sequence[Owed]) -> None:
        """Publish these attempts, which have not begun. Where that fails, the relay does it."""
        try:
            if owed and self._publisher.configured:
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

    def mark_known(self, attempt: Attempt) -> bool:
        """Note that the earlier attempts had no effect; False when the delivery is no longer ours."""
        return self._write(
            attempt, lambda connection: deliveries.mark_known(connection, attempt.delivery), (DeliveryStatus.RUNNING,)
        )

    # --- ends --------------------------------------------------------------------------------------------------------

    def record(
        self,
        attempt: Attempt,
        end: End,
        *,
        finish_by: float | None = None,
        commit_may_have_succeeded: bool = False,
    ) -> AttemptResult:
        """Write what an end means, try again while the database is away, and log it; gives the attempt's result.

        It is tried until `finish_by` (monotonic seconds), by default for `RECORD_SECONDS`.
        """
        match end:
            case Called(transition, looked):
                finished = finished_of(attempt, transition, looked=looked)
                return self._delivered(
                    attempt, finished, "", finish_by=finish_by, commit_may_have_succeeded=commit_may_have_succeeded
                )
            case Verified(transition):
                finished = finished_of(attempt, transition, looked=False)
                return self._delivered(attempt, finished, "verify() found the effect of an earlier attempt")
            case NotValid(plan):
                return self._cancelled(attempt, plan)
            case Deferred(deferral):
                return self._deferred(attempt, deferral)
            case Failed(error):
                return self._failed(attempt, error)
            case CannotBeRead(error):  # waiting does not heal a row, so neither retries nor `on_dead` may decide
                return self._stopped(attempt, DeliveryStatus.HELD, str(error), error=error)
            case StillUnknown():
                return self._stopped(attempt, DeliveryStatus.HELD, "the effect of an earlier attempt is unknown")
            case NoneLeft():
                return self._out_of_attempts(attempt, attempt.delivery.last_error or "")
            case TakenOver():
                return _result(attempt, AttemptOutcome.STALE, "the delivery was taken over meanwhile")

    def record_called(self, called: Sequence[tuple[Attempt, Called]]) -> list[AttemptResult]:
        """Record callbacks that returned, in one transaction. If it fails, each is recorded alone."""
        if len(called) < 2:  # noqa: PLR2004 - a batch has several
            return [self.record(attempt, end) for attempt, end in called]
        finished = [finished_of(attempt, end.transition, looked=end.looked) for attempt, end in called]
        now = called[0][0].now
        try:
            done = self._store.finish(finished, now=now)
        except (ServiceUnavailable, DBAPIError) as error:
            emit(
                logger,
                Action.FINISH_FAILED,
                "could not record the end of %d deliveries together (%s); trying each alone",
                len(called),
                type(error).__name__,
            )
            return self._record_each(called)
        results = []
        for (attempt, _), written in zip(called, finished, strict=True):
            ours = attempt.delivery.id in done
            if ours:
                note_problem(self._database, written, now)
            results.append(_result(attempt, AttemptOutcome.DELIVERED if ours else AttemptOutcome.STALE))
            if ours and attempt.chain_type.continue_ and written.due_at is not None:
                self._publish_next(attempt)
        return results

    def _record_each(self, called: Sequence[tuple[Attempt, Called]]) -> list[AttemptResult]:
        """Record each alone, by turns: one that cannot be written must not keep the others from being recorded."""
        finish_by, pause = time.monotonic() + RECORD_SECONDS, 0.05
        waiting, results = deque(called), []
        while waiting:
            attempt, end = waiting.popleft()
            try:
                results.append(self.record(attempt, end, finish_by=0, commit_may_have_succeeded=True))
            except (ServiceUnavailable, DBAPIError):
                if time.monotonic() + pause >= finish_by:
                    raise
                waiting.append((attempt, end))
                time.sleep(pause)
                pause = min(pause * 2, MAX_PAUSE_SECONDS)
        return results

    def _delivered(
        self,
        attempt: Attempt,
        finished: Finished,
        detail: str,
        *,
        finish_by: float | None = None,
        commit_may_have_succeeded: bool = False,
    ) -> AttemptResult:
        if not recorded(
            self._database,
            attempt.delivery,
            lambda: bool(self._store.finish([finished], now=attempt.now)),
            (DeliveryStatus.DELIVERED,),
            finish_by=finish_by,
            commit_may_have_succeeded=commit_may_have_succeeded,
        ):
            return _result(attempt, AttemptOutcome.STALE, "the delivery was taken over while the callback ran")
        note_problem(self._database, finished, attempt.now)
        if attempt.chain_type.continue_ and finished.due_at is not None:
            self._publish_next(attempt)
        return _result(attempt, AttemptOutcome.DELIVERED, detail)

    def _cancelled(self, attempt: Attempt, plan: Plan) -> AttemptResult:
        won = type(plan.winner).__name__ if plan.winner is not None else "none"
        where = "" if plan.taken is None else f" and leads to {plan.taken.final_state}"
        reason = f"last look: {won} wins now{where}; {reasons_text(plan.errors)}"

        due_at: datetime | None = None

        def work(connection: Connection) -> bool:
            nonlocal due_at
            due_at = deliveries.call_off(connection, attempt.delivery, now=attempt.now, reason=reason)
            return due_at is not None

        if not self._write(attempt, work, (DeliveryStatus.CANCELLED,)):
            return _result(attempt, AttemptOutcome.STALE)
        if due_at == attempt.now:
            self._publish_next(attempt)
        return _result(attempt, AttemptOutcome.CANCELLED, reason)

    def _deferred(self, attempt: Attempt, deferral: Deferral) -> AttemptResult:
        """Take back the beginning of an attempt that may not be called now, without using it up."""
        by_celery = deferral.waits_for != WaitsFor.PAUSED and deferral.seconds <= MAX_COUNTDOWN
        grace = self._settings.queued_seconds if by_celery else 0.0

        def work(connection: Connection) -> bool:
            return deliveries.postpone(
                connection,
                attempt.delivery,
                what=deferral.waits_for,
                reason=deferral.reason,
                seconds=deferral.seconds,
                grace_seconds=grace,
                has_place=deferral.has_place,
            )

        if not self._write(attempt, work, (DeliveryStatus.PENDING,), attempt_after=attempt.delivery.attempt - 1):
            return _result(attempt, AttemptOutcome.STALE)
        result = _result(attempt, AttemptOutcome.DEFERRED, deferral.reason)
        return replace(result, retry_seconds=deferral.seconds if by_celery else None)

    def _failed(self, attempt: Attempt, error: BaseException) -> AttemptResult:
        delivery, reason = attempt.delivery, describe(error)
        if isinstance(error, PermanentFailure) or delivery.attempt >= delivery.max_attempts:
            return self._out_of_attempts(attempt, reason, error=error)
        _log_failure(attempt, error)
        seconds = seconds_to_retry(delivery, attempt.transition_class, self._random)
        by_celery = seconds <= MAX_COUNTDOWN
        grace = self._settings.queued_seconds if by_celery else 0.0

        def work(connection: Connection) -> bool:
            return deliveries.retry(connection, delivery, seconds=seconds, grace_seconds=grace, error=reason)

        if not self._write(attempt, work, (DeliveryStatus.PENDING,)):
            return _result(attempt, AttemptOutcome.STALE)
        result = _result(attempt, AttemptOutcome.RETRYING, reason)
        return replace(result, retry_seconds=seconds if by_celery else None)

    def _out_of_attempts(self, attempt: Attempt, reason: str, *, error: BaseException | None = None) -> AttemptResult:
        if attempt.chain_type.on_dead == "hold":
            return self._stopped(attempt, DeliveryStatus.DEAD, reason, error=error)
        if error is not None:
            _log_failure(attempt, error)
        delivery = attempt.delivery
        next_update_at = rest_of_plan(delivery, attempt.transition_class)
        due_at = due_after_move(attempt.chain_type, delivery.final_state, next_update_at, attempt.now)

        def work(connection: Connection) -> bool:
            return deliveries.skip(
                connection,
                delivery,
                next_update_at=next_update_at,
                due_at=due_at,
                now=attempt.now,
                detail=f"out of attempts: {reason}",
            )

        done = self._write(attempt, work, (DeliveryStatus.SKIPPED,))
        return _result(attempt, AttemptOutcome.SKIPPED if done else AttemptOutcome.STALE, reason)

    def _stopped(
        self, attempt: Attempt, status: DeliveryStatus, reason: str, *, error: BaseException | None = None
    ) -> AttemptResult:
        """The result of an attempt after which a person decides; its line is an ERROR with the traceback."""
        delivery = attempt.delivery

        def work(connection: Connection) -> bool:
            return deliveries.stop(connection, delivery, status=status, error=reason, now=attempt.now)

        done = False
        try:
            done = self._write(attempt, work, (status,))
        finally:
            if not done and error is not None:  # nowhere else would anybody see what the callback raised
                _log_failure(attempt, error)
        if not done:
            return _result(attempt, AttemptOutcome.STALE, reason)
        return _result(attempt, AttemptOutcome(status.value), reason, error=error)

    def _write(
        self,
        attempt: Attempt,
        work: Callable[[Connection], bool],
        expected_statuses: Sequence[DeliveryStatus],
        *,
        attempt_after: int | None = None,
    ) -> bool:
        """Whether the end of an attempt is committed. Tries again while the database is away."""
        return recorded(
            self._database,
            attempt.delivery,
            partial(self._database.write, work),
            expected_statuses,
            attempt_after=attempt_after,
        )

    def _publish_next(self, attempt: Attempt) -> None:
        """Publish the chain's next evaluation at once, where there is a broker."""
        if not self._publisher.configured:
            return
        chain_id = attempt.delivery.chain_id
        try:
            self._publisher.execute([chain_id], queue=attempt.chain_type.queue or CHAINS_QUEUE)
        except PublishFailed as error:
            emit(
                logger,
                Action.CHAINS_NOT_PUBLISHED,
                "chain %s: its next evaluation is not published (%s); the sweep will do it",
                chain_id,
                error,
                chain_id=chain_id,
            )


def finished_of(attempt: Attempt, transition: Transition, *, looked: bool) -> Finished:
    """What to record of an attempt whose delivery has succeeded."""
    return finished_delivery(attempt.delivery, transition, attempt.chain_type, attempt.now, looked=looked)


def finished_delivery(
    delivery: DeliveryRecord, transition: Transition, chain_type: ChainType, now: datetime, *, looked: bool
) -> Finished:
    """What to record of a delivery that has succeeded: also until when its chain rests, and when the chain is due.

    `looked` says that the transition's guard was asked. Where it was not, a property has no facts to compute the rest
    from, and the rest is that of the plan.
    """
    if not looked and delivery.rest_is_known and computes_rest(type(transition)):
        asked = AfterCall(delivery.rest_until)
    else:
        asked = rest_after_call(transition, delivery.chain_id, now)
    due_at = due_after_move(chain_type, delivery.final_state, asked.next_update_at, now)
    return Finished(delivery, asked.next_update_at, due_at, asked.problem)


def _result(
    attempt: Attempt, outcome: AttemptOutcome, detail: str = "", *, error: BaseException | None = None
) -> AttemptResult:
    delivery = attempt.delivery
    result = AttemptResult(delivery.id, delivery.attempt, outcome, delivery.chain_id, delivery.transition, detail[:500])
    return _logged(result, error)


def _logged(result: AttemptResult, error: BaseException | None = None) -> AttemptResult:
    action = _LOGGED_AS[result.outcome]
    outcome = f"{result.outcome} {result.detail}".rstrip()
    if result.chain_id is None:  # it was not begun, so nothing of it was read
        emit(
            logger,
            action,
            "attempt %s of delivery %s: %s",
            result.attempt,
            result.delivery_id,
            outcome,
            delivery_id=result.delivery_id,
            attempt=result.attempt,
        )
    else:
        emit(
            logger,
            action,
            "chain %s: attempt %s of %s: %s",
            result.chain_id,
            result.attempt,
            result.transition,
            outcome,
            error=error,
            chain_id=result.chain_id,
            delivery_id=result.delivery_id,
            attempt=result.attempt,
            transition=result.transition,
        )
    return result


def _log_failure(attempt: Attempt, error: BaseException) -> None:
    delivery = attempt.delivery
    emit(
        logger,
        Action.ATTEMPT_FAILED,
        "chain %s: attempt %s of %s failed",
        delivery.chain_id,
        delivery.attempt,
        delivery.transition,
        error=error,
        chain_id=delivery.chain_id,
        delivery_id=delivery.id,
        attempt=delivery.attempt,
        transition=delivery.transition,
    )
