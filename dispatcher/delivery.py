"""Attempts at deliveries: begin, last look, callback, finish.

One attempt is two short transactions with the user's code between them and no session open meanwhile. A finish that
fails is tried again until the lease ends; it never becomes a failed attempt. What a process that dies between the two
leaves is an *unknown* effect, which the relay settles (see `settlement`).
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from dispatcher import chains, deliveries
from dispatcher.config import Callback, ChainType, DispatcherConfig, resolve_callback
from dispatcher.database import Database
from dispatcher.decisions import ChainResult, due_after_move, load_contexts, merged_context, next_update
from dispatcher.deliveries import Begun, DeliveryRecord, LostChain, Owed
from dispatcher.errors import PermanentFailure, ServiceUnavailable
from dispatcher.evaluation import GuardFailed, Plan, evaluate
from dispatcher.publisher import CHAINS_QUEUE, MAX_COUNTDOWN, Publisher, PublishFailed
from dispatcher.retry import growing_interval
from dispatcher.settings import Settings
from dispatcher.states import AttemptOutcome, DeliveryStatus, EventAction, Outcome
from dispatcher.transition import Transition

logger = logging.getLogger(__name__)

_UNKNOWN_DEFINITION: Final = "unknown definition: "
_FINISH_PAUSE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """What came of one attempt. `retry_seconds` is set where the next one is near enough for Celery's own retry."""

    delivery_id: str
    attempt: int
    outcome: AttemptOutcome
    chain_id: int | None = None
    transition: str | None = None
    detail: str = ""
    retry_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A begun attempt with its definition, and until when this process may finish it (monotonic seconds)."""

    begun: Begun
    chain_type: ChainType
    transition_class: type[Transition]
    callback: Callback
    now: datetime
    finish_by: float

    @property
    def delivery(self) -> DeliveryRecord:
        return self.begun.delivery


class Attempts:
    """Makes attempts for one deployment. `random` draws the jitter of retries from [0, 1)."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        publisher: Publisher,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._publisher = publisher
        self._random = random

    def deliver(self, owed: Sequence[Owed]) -> list[AttemptResult]:
        """Make one attempt at each of these deliveries; one result for each, in their order."""
        return [self._deliver_one(one) for one in owed]

    # --- in a worker -------------------------------------------------------------------------------------------------

    def _deliver_one(self, owed: Owed) -> AttemptResult:
        delivery_id = deliveries.valid_id(owed.delivery_id)
        if delivery_id is None or isinstance(owed.attempt, bool) or not 0 < owed.attempt < 2**31:
            return AttemptResult(str(owed.delivery_id)[:40], owed.attempt, AttemptOutcome.MISSING)
        finish_by = time.monotonic() + self._settings.lease_seconds
        begun = self._database.write(lambda session: self._begin(session, delivery_id, owed.attempt, finish_by))
        if isinstance(begun, AttemptOutcome):
            logger.log(
                logging.WARNING if begun == AttemptOutcome.UNKNOWN_DEFINITION else logging.INFO,
                "attempt %s of delivery %s: %s",
                owed.attempt,
                delivery_id,
                begun,
                extra={"action": f"attempt_{begun}", "delivery_id": delivery_id},
            )
            return AttemptResult(delivery_id, owed.attempt, begun)
        result = self._attempt(begun)
        logger.log(
            logging.ERROR if result.outcome in (AttemptOutcome.DEAD, AttemptOutcome.HELD) else logging.INFO,
            "chain %s: attempt %s of %s: %s %s",
            result.chain_id,
            result.attempt,
            result.transition,
            result.outcome,
            result.detail,
            extra={
                "action": f"attempt_{result.outcome}",
                "chain_id": result.chain_id,
                "delivery_id": delivery_id,
                "attempt": result.attempt,
            },
        )
        return result

    def _begin(self, session: Session, delivery_id: str, attempt: int, finish_by: float) -> _Attempt | AttemptOutcome:
        begun = deliveries.begin(session, delivery_id, attempt, lease_seconds=self._settings.lease_seconds)
        if isinstance(begun, AttemptOutcome):
            return begun
        delivery, record = begun.delivery, begun.chain
        now = self._database.domain_now(begun.machine_now)
        try:
            chain_type = self._config.by_type[record.chain_type]
            transition_class = chain_type.by_name[delivery.transition]
            callback = resolve_callback(chain_type, transition_class, delivery.callback)
        except KeyError as error:
            reason = f"{_UNKNOWN_DEFINITION}{error.args[0]!r}"
            waited = max((begun.machine_now - delivery.planned_at).total_seconds(), 0)
            seconds = growing_interval(1 + int(waited // 60)).total_seconds()
            deliveries.postpone(session, delivery, seconds=seconds, reason=reason)
            if not (delivery.last_error or "").startswith(_UNKNOWN_DEFINITION):
                chains.add_event(
                    session,
                    record.id,
                    record.version,
                    EventAction.UNKNOWN_DEFINITION,
                    value=delivery.transition,
                    from_state=record.state,
                    to_state=record.state,
                    detail=reason,
                    now=now,
                )
            return AttemptOutcome.UNKNOWN_DEFINITION
        return _Attempt(begun, chain_type, transition_class, callback, now, finish_by)

    def _attempt(self, attempt: _Attempt) -> AttemptResult:
        """Settle what an earlier attempt left, look once more, call; user code and finishes never share a `try`."""
        delivery = attempt.delivery
        unknown = delivery.unknown
        if unknown:
            settled = self._verify(attempt)
            if isinstance(settled, AttemptResult):
                return settled
            unknown = settled
        try:
            context = self._context(attempt)
            transition = self._bare(attempt, context)
            age = attempt.begun.machine_now - delivery.planned_at
            if not unknown and age >= timedelta(seconds=self._settings.last_look_seconds):
                plan = self._look(attempt, context)
                winner = plan.winner
            else:
                plan, winner = None, transition
            if winner is not None and type(winner) is attempt.transition_class:
                winner.idempotency_key = delivery.idempotency_key
                attempt.callback(winner, **(delivery.kwargs or {}))
                plan, transition = None, winner
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: guards, loaders, callbacks
            return self._failed(attempt, error)
        if plan is not None:
            return self._cancelled(attempt, plan)
        return self._delivered(attempt, transition, "")

    def _verify(self, attempt: _Attempt) -> AttemptResult | bool:
        """The attempt's result where an earlier one's unknown effect decides it, else whether it is still unknown."""
        delivery = attempt.delivery
        try:
            transition = self._bare(attempt, self._context(attempt))
            took_place = verified(transition)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: loaders, verify()
            return self._failed(attempt, error)
        if took_place:
            return self._delivered(attempt, transition, "verify() found the effect of an earlier attempt")
        if took_place is None and attempt.chain_type.on_unknown == "hold":
            return self._stopped(attempt, DeliveryStatus.HELD, "the effect of an earlier attempt is unknown")
        if took_place is False:
            self._finish(attempt, lambda session: deliveries.mark_known(session, delivery), ())
        if delivery.attempt > delivery.max_attempts:
            return self._out_of_attempts(attempt, transition, delivery.last_error or "")
        return took_place is None

    def _context(self, attempt: _Attempt) -> dict[str, Any]:
        record = attempt.begun.chain
        loaded = load_contexts(attempt.chain_type, [record]).get(record.id, {})
        if isinstance(loaded, BaseException):
            raise loaded
        return merged_context(loaded, record.context, attempt.delivery.context)

    def _bare(self, attempt: _Attempt, context: Mapping[str, Any]) -> Transition:
        transition = attempt.transition_class(attempt.begun.chain.snapshot(), context)
        transition.now = attempt.now
        transition.idempotency_key = attempt.delivery.idempotency_key
        return transition

    def _look(self, attempt: _Attempt, context: Mapping[str, Any]) -> Plan:
        candidates = attempt.chain_type.candidates(attempt.delivery.from_state)
        try:
            return evaluate(attempt.begun.chain.snapshot(), candidates, context, attempt.now)
        except GuardFailed as error:
            raise error.__cause__ or error from error

    # --- ends of an attempt ------------------------------------------------------------------------------------------

    def _delivered(self, attempt: _Attempt, transition: Transition, detail: str) -> AttemptResult:
        delivery = attempt.delivery
        next_update_at = next_update(transition)
        due_at = due_after_move(attempt.chain_type, delivery.final_state, next_update_at, attempt.now)

        def work(session: Session) -> bool:
            return deliveries.close_and_move(
                session,
                delivery,
                status=DeliveryStatus.DELIVERED,
                next_update_at=next_update_at,
                due_at=due_at,
                now=attempt.now,
            )

        if not self._finish(attempt, work, (DeliveryStatus.DELIVERED,)):
            return self._result(attempt, AttemptOutcome.STALE, "the delivery was taken over while the callback ran")
        if attempt.chain_type.continue_ and due_at is not None:
            self._continue(attempt)
        return self._result(attempt, AttemptOutcome.DELIVERED, detail)

    def _cancelled(self, attempt: _Attempt, plan: Plan) -> AttemptResult:
        won = type(plan.winner).__name__ if plan.winner is not None else "none"
        reason = f"last look: {won} wins now; {deliveries.reasons(plan.errors)}"

        def work(session: Session) -> bool:
            return deliveries.close_and_stay(session, attempt.delivery, now=attempt.now, reason=reason)

        if not self._finish(attempt, work, (DeliveryStatus.CANCELLED,)):
            return self._result(attempt, AttemptOutcome.STALE)
        self._continue(attempt)
        return self._result(attempt, AttemptOutcome.CANCELLED, reason)

    def _failed(self, attempt: _Attempt, error: BaseException) -> AttemptResult:
        delivery = attempt.delivery
        reason = describe(error)
        logger.warning(
            "chain %s: attempt %s of %s failed",
            delivery.chain_id,
            delivery.attempt,
            delivery.transition,
            exc_info=error,
            extra={"action": "attempt_failed", "chain_id": delivery.chain_id, "delivery_id": delivery.id},
        )
        if isinstance(error, PermanentFailure) or delivery.attempt >= delivery.max_attempts:
            return self._out_of_attempts(attempt, self._for_skipping(attempt), reason)
        policy = attempt.transition_class.retry
        seconds = policy.delay(delivery.attempt, self._random).total_seconds()
        by_celery = seconds <= MAX_COUNTDOWN
        grace = self._settings.queued_seconds if by_celery else 0.0

        def work(session: Session) -> bool:
            return deliveries.retry(session, delivery, seconds=seconds, grace_seconds=grace, error=reason)

        if not self._finish(attempt, work, (DeliveryStatus.PENDING,)):
            return self._result(attempt, AttemptOutcome.STALE)
        return replace(
            self._result(attempt, AttemptOutcome.RETRYING, reason), retry_seconds=seconds if by_celery else None
        )

    def _for_skipping(self, attempt: _Attempt) -> Transition | None:
        """The transition whose rest a skipped delivery keeps; None when it cannot even be made."""
        try:
            return self._bare(attempt, attempt.delivery.context or {})
        except Exception:  # noqa: BLE001 - user code: its constructor may be what failed
            return None

    def _out_of_attempts(self, attempt: _Attempt, transition: Transition | None, reason: str) -> AttemptResult:
        if attempt.chain_type.on_dead == "hold":
            return self._stopped(attempt, DeliveryStatus.DEAD, reason)
        delivery = attempt.delivery
        next_update_at = next_update(transition) if transition is not None else None
        due_at = due_after_move(attempt.chain_type, delivery.final_state, next_update_at, attempt.now)

        def work(session: Session) -> bool:
            return deliveries.close_and_move(
                session,
                delivery,
                status=DeliveryStatus.SKIPPED,
                next_update_at=next_update_at,
                due_at=due_at,
                now=attempt.now,
                detail=f"out of attempts: {reason}",
            )

        done = self._finish(attempt, work, (DeliveryStatus.SKIPPED,))
        return self._result(attempt, AttemptOutcome.SKIPPED if done else AttemptOutcome.STALE, reason)

    def _stopped(self, attempt: _Attempt, status: DeliveryStatus, reason: str) -> AttemptResult:
        delivery = attempt.delivery

        def work(session: Session) -> bool:
            return deliveries.stop(session, delivery, status=status, error=reason, now=attempt.now)

        done = self._finish(attempt, work, (status,))
        return self._result(attempt, AttemptOutcome(status.value) if done else AttemptOutcome.STALE, reason)

    def _result(self, attempt: _Attempt, outcome: AttemptOutcome, detail: str = "") -> AttemptResult:
        delivery = attempt.delivery
        return AttemptResult(
            delivery.id, delivery.attempt, outcome, delivery.chain_id, delivery.transition, detail[:500]
        )

    def _continue(self, attempt: _Attempt) -> None:
        if not self._publisher.configured:
            return
        try:
            self._publisher.execute([attempt.delivery.chain_id], queue=attempt.chain_type.queue or CHAINS_QUEUE)
        except PublishFailed as error:
            logger.warning(
                "chain %s: follow-up not published (%s): the sweep does it", attempt.delivery.chain_id, error
            )

    def _finish(self, attempt: _Attempt, work: Callable[[Session], bool], written: Sequence[DeliveryStatus]) -> bool:
        """Whether the end of an attempt is committed; tried again until the lease ends while the database is away.

        A commit may succeed while its caller sees an error: after one, a row that reads as `written` is ours.
        """
        return finish(self._database, attempt.delivery, work, written, finish_by=attempt.finish_by)

    # --- in this process ---------------------------------------------------------------------------------------------

    def deliver_locally(self, result: ChainResult, callback: Callback, kwargs: Mapping[str, Any]) -> ChainResult:
        """Make the only attempt at a delivery that `execute_locally` has begun here; the chain's result after it.

        If the callback raises, the delivery is closed as cancelled, the chain is due, and the exception goes on
        unchanged.
        """
        assert result.delivery_id is not None and result.transition is not None
        with self._database.read() as session:
            delivery = deliveries.read(session, result.delivery_id)
            now = self._database.now(session)
        if delivery is None:
            return replace(result, outcome=Outcome.STALE)
        transition = result.transition
        transition.idempotency_key = delivery.idempotency_key
        with self._lease(delivery):
            try:
                callback(transition, **kwargs)
            except BaseException as error:
                reason = describe(error)
                finish(
                    self._database,
                    delivery,
                    lambda session: deliveries.close_and_stay(session, delivery, now=now, reason=reason),
                    (DeliveryStatus.CANCELLED,),
                    finish_by=time.monotonic() + self._settings.lease_seconds,
                )
                raise
            chain_type = self._config.get(transition.chain.chain_type)
            next_update_at = next_update(transition)
            due_at = due_after_move(chain_type, delivery.final_state, next_update_at, now)
            done = finish(
                self._database,
                delivery,
                lambda session: deliveries.close_and_move(
                    session,
                    delivery,
                    status=DeliveryStatus.DELIVERED,
                    next_update_at=next_update_at,
                    due_at=due_at,
                    now=now,
                ),
                (DeliveryStatus.DELIVERED,),
                finish_by=time.monotonic() + self._settings.lease_seconds,
            )
        if not done:
            logger.error("chain %s: its delivery was taken over while the callback ran here", delivery.chain_id)
            return replace(result, outcome=Outcome.STALE)
        return replace(result, outcome=Outcome.MOVED, state=delivery.final_state)

    @contextmanager
    def _lease(self, delivery: DeliveryRecord) -> Iterator[None]:
        """Renew the lease from a thread while the block runs."""
        ended = threading.Event()
        seconds = self._settings.lease_seconds

        def renew() -> None:
            while not ended.wait(seconds / 3):
                try:
                    if not self._database.write(
                        lambda session: deliveries.renew_lease(session, delivery, lease_seconds=seconds)
                    ):
                        return
                except (ServiceUnavailable, DBAPIError) as error:
                    logger.warning("lease of delivery %s not renewed: %s", delivery.id, type(error).__name__)

        thread = threading.Thread(target=renew, name=f"lease-{delivery.id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def finish(
    database: Database,
    delivery: DeliveryRecord,
    work: Callable[[Session], bool],
    written: Sequence[DeliveryStatus],
    *,
    finish_by: float,
) -> bool:
    """Whether `work` is committed, tried again while the database is away until `finish_by` (monotonic seconds).

    Raises the database's error when the time is over: the relay then settles the attempt as unknown.
    """
    seen_error = False
    pause = 0.05
    while True:
        try:
            if database.write(work):
                return True
            if not seen_error:
                return False
            with database.read() as session:
                row = deliveries.read(session, delivery.id)
            return row is not None and row.attempt == delivery.attempt and row.status in written
        except LostChain:
            return False
        except (ServiceUnavailable, DBAPIError) as error:
            if time.monotonic() + pause >= finish_by:
                raise
            logger.warning(
                "delivery %s: its end is not written (%s), trying again",
                delivery.id,
                type(error).__name__,
                extra={"action": "finish_failed", "delivery_id": delivery.id},
            )
            seen_error = True
        time.sleep(pause)
        pause = min(pause * 2, _FINISH_PAUSE_SECONDS)


def verified(transition: Transition) -> bool | None:
    """What the transition's `verify()` says of an earlier attempt's effect; None without one."""
    verify = getattr(transition, "verify", None)
    if verify is None:
        return None
    answer = verify()
    return None if answer is None else bool(answer)


def describe(error: BaseException) -> str:
    """The error as it is kept in a row: its type and its text."""
    return f"{type(error).__name__}: {error}"[: deliveries.MAX_ERROR]
