"""Attempts at deliveries: begin, ask the gate, look once more, call, finish.

One attempt is two short transactions with the user's code between them and no connection in use meanwhile. A finish
that fails is tried again until the lease ends; it never becomes a failed attempt. What a process that dies between the
two leaves is an *unknown* effect, which the relay settles (see `settlement`).
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from dispatcher.delivery.pacing import Gate
from dispatcher.domain.callbacks import resolve_callback
from dispatcher.domain.config import Callback, ChainType, DispatcherConfig
from dispatcher.domain.contexts import load_contexts, merged_context
from dispatcher.domain.decisions import due_after_move, next_update
from dispatcher.domain.evaluation import GuardFailed, Plan, evaluate
from dispatcher.domain.records import Begun, DeliveryRecord, Finished, Owed, valid_id
from dispatcher.domain.results import AttemptResult, ChainResult, describe, reasons_text
from dispatcher.errors import PermanentFailure, ServiceUnavailable, ends_process
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import CHAINS_QUEUE, MAX_COUNTDOWN
from dispatcher.retry import growing_interval
from dispatcher.settings import Settings
from dispatcher.states import AttemptOutcome, DeliveryStatus, EventAction, Outcome
from dispatcher.storage import deliveries, history, store
from dispatcher.storage.database import Database
from dispatcher.storage.deliveries import LostChain
from dispatcher.transition import Transition

logger = logging.getLogger(__name__)

_UNKNOWN_DEFINITION: Final = "unknown definition: "
_FINISH_PAUSE_SECONDS: Final = 2.0
_GROUP: Final = 10
_GROUP_SECONDS: Final = 1.0


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
        gate: Gate,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._publisher = publisher
        self._gate = gate
        self._random = random

    def deliver(self, owed: Sequence[Owed]) -> list[AttemptResult]:
        """Make one attempt at each of these deliveries; one result for each, in their order."""
        if len(owed) == 1:
            return [self._deliver_one(owed[0])]
        return self._deliver_many(owed)

    # --- in a worker -------------------------------------------------------------------------------------------------

    def _deliver_one(self, owed: Owed) -> AttemptResult:
        delivery_id = valid_id(owed.delivery_id)
        if delivery_id is None or isinstance(owed.attempt, bool) or not 0 < owed.attempt < 2**31:
            return AttemptResult(str(owed.delivery_id)[:40], owed.attempt, AttemptOutcome.MISSING)
        finish_by = time.monotonic() + self._settings.lease_seconds
        begun = store.begin(
            self._database, [Owed(delivery_id, owed.attempt)], lease_seconds=self._settings.lease_seconds
        )
        if not begun:
            with self._database.read() as connection:
                outcome = deliveries.why_not_begun(connection, delivery_id)
            return self._not_begun(delivery_id, owed.attempt, outcome)
        attempt = self._defined(begun[0], finish_by)
        if attempt is None:
            return self._not_begun(delivery_id, owed.attempt, AttemptOutcome.UNKNOWN_DEFINITION)
        ended = self._deferral(attempt) or self._attempt(attempt)
        result = ended if isinstance(ended, AttemptResult) else self._delivered(attempt, ended, "")
        self._log(result)
        return result

    def _not_begun(self, delivery_id: str, attempt: int, outcome: AttemptOutcome) -> AttemptResult:
        logger.log(
            logging.WARNING if outcome == AttemptOutcome.UNKNOWN_DEFINITION else logging.INFO,
            "attempt %s of delivery %s: %s",
            attempt,
            delivery_id,
            outcome,
            extra={"action": f"attempt_{outcome}", "delivery_id": delivery_id},
        )
        return AttemptResult(delivery_id, attempt, outcome)

    def _log(self, result: AttemptResult) -> None:
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
                "delivery_id": result.delivery_id,
                "attempt": result.attempt,
            },
        )

    # --- several in one message --------------------------------------------------------------------------------------

    def _deliver_many(self, owed: Sequence[Owed]) -> list[AttemptResult]:
        """Begin and record in groups; each callback, failure and last look stays the delivery's own.

        When half of the task's time is used up, what is not begun is published again.
        """
        results: dict[str, AttemptResult] = {}
        todo = []
        for one in owed:
            delivery_id = valid_id(one.delivery_id)
            if delivery_id is None or not 0 < one.attempt < 2**31:
                results[one.delivery_id] = AttemptResult(one.delivery_id[:40], one.attempt, AttemptOutcome.MISSING)
            else:
                todo.append(Owed(delivery_id, one.attempt))
        stop_at = time.monotonic() + self._settings.callback_seconds / 2
        for start in range(0, len(todo), _GROUP):
            if time.monotonic() >= stop_at:
                self._publish_again(todo[start:])
                break
            for result in self._deliver_group(todo[start : start + _GROUP], stop_at):
                results[result.delivery_id] = result
        stale = AttemptOutcome.STALE
        return [results.get(one.delivery_id, AttemptResult(one.delivery_id, one.attempt, stale)) for one in owed]

    def _publish_again(self, owed: Sequence[Owed]) -> None:
        try:
            self._publisher.deliver(owed)
        except PublishFailed as error:
            logger.warning("%d deliveries not published again (%s): the relay does it", len(owed), error)

    def _deliver_group(self, owed: Sequence[Owed], stop_at: float) -> list[AttemptResult]:
        finish_by = time.monotonic() + self._settings.lease_seconds
        rows = store.begin(self._database, owed, lease_seconds=self._settings.lease_seconds)
        defined = (self._defined(one, finish_by) for one in rows)
        results: list[AttemptResult] = []
        begun = []
        for attempt in (one for one in defined if one is not None):
            deferred = self._deferral(attempt)
            if deferred is None:
                begun.append(attempt)
            else:
                self._log(deferred)
                results.append(deferred)
        loaded: dict[int, Mapping[str, Any] | BaseException] = {}
        by_type: dict[str, list[_Attempt]] = {}
        for attempt in begun:
            by_type.setdefault(attempt.chain_type.chain_type, []).append(attempt)
        for group in by_type.values():
            loaded.update(load_contexts(group[0].chain_type, [attempt.begun.chain for attempt in group]))
        called: list[tuple[_Attempt, Transition]] = []
        since = time.monotonic()
        for number, attempt in enumerate(begun):
            if number and time.monotonic() >= stop_at:  # what is not called goes back, before the time limit strikes
                results += self._delivered_many(called)
                left = [one.delivery for one in begun[number:]]
                self._database.write(partial(self._give_back, left=left))
                return results
            ended = self._attempt(attempt, loaded.get(attempt.begun.chain.id, {}))
            if isinstance(ended, AttemptResult):
                self._log(ended)
                results.append(ended)
                continue
            called.append((attempt, ended))
            if time.monotonic() - since > _GROUP_SECONDS:  # a kill leaves few unknown effects
                results += self._delivered_many(called)
                called, since = [], time.monotonic()
        return results + self._delivered_many(called)

    def _give_back(self, connection: Connection, left: Sequence[DeliveryRecord]) -> None:
        for delivery in left:
            deliveries.postpone(connection, delivery, seconds=0, reason=None)

    def _delivered_many(self, called: Sequence[tuple[_Attempt, Transition]]) -> list[AttemptResult]:
        """Record callbacks that returned, in one transaction; one by one, with all their retries, if that fails."""
        if len(called) < 2:  # noqa: PLR2004 - a batch has several
            return [self._delivered(attempt, transition, "") for attempt, transition in called]
        finished = [
            _finished(attempt.delivery, transition, attempt.chain_type, attempt.now) for attempt, transition in called
        ]
        now = called[0][0].now
        try:
            done = store.finish(self._database, finished, now=now)
        except (ServiceUnavailable, DBAPIError, LostChain) as error:
            logger.warning("the end of %d deliveries is not written (%r), trying again", len(called), error)
            return [self._delivered(attempt, transition, "", seen_error=True) for attempt, transition in called]
        results = []
        for (attempt, _), one in zip(called, finished, strict=True):
            ours = attempt.delivery.id in done
            result = self._result(attempt, AttemptOutcome.DELIVERED if ours else AttemptOutcome.STALE)
            self._log(result)
            results.append(result)
            if ours and attempt.chain_type.continue_ and one.due_at is not None:
                self._continue(attempt)
        return results

    # --- one attempt -------------------------------------------------------------------------------------------------

    def _defined(self, begun: Begun, finish_by: float) -> _Attempt | None:
        """The attempt with its definition; None when this configuration has none: then its beginning is taken back."""
        delivery, record = begun.delivery, begun.chain
        now = self._database.domain_now(begun.machine_now)
        try:
            chain_type = self._config.by_type[record.chain_type]
            transition_class = chain_type.by_name[delivery.transition]
            callback = resolve_callback(chain_type, transition_class, delivery.callback)
        except KeyError as error:
            reason = f"{_UNKNOWN_DEFINITION}{error.args[0]!r}"
            self._database.write(partial(self._wait_for_definition, begun=begun, reason=reason, now=now))
            return None
        return _Attempt(begun, chain_type, transition_class, callback, now, finish_by)

    def _wait_for_definition(self, connection: Connection, *, begun: Begun, reason: str, now: datetime) -> None:
        delivery, record = begun.delivery, begun.chain
        waited = max((begun.machine_now - delivery.planned_at).total_seconds(), 0)
        seconds = growing_interval(1 + int(waited // 60)).total_seconds()
        postponed = deliveries.postpone(connection, delivery, seconds=seconds, reason=reason)
        if postponed and not (delivery.last_error or "").startswith(_UNKNOWN_DEFINITION):
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

    def _attempt(
        self, attempt: _Attempt, loaded: Mapping[str, Any] | BaseException | None = None
    ) -> AttemptResult | Transition:
        """Settle what an earlier attempt left, look once more, call; user code and finishes never share a `try`.

        The transition whose callback has returned, which is still to be recorded, or the result of another end.
        `loaded` is what the batch's `load_context` gave; None loads it here.
        """
        delivery = attempt.delivery
        unknown = delivery.unknown
        if unknown:
            settled = self._verify(attempt)
            if isinstance(settled, AttemptResult):
                return settled
            unknown = settled
        try:
            context = self._context(attempt, loaded)
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
        except BaseException as error:
            if ends_process(error):
                raise
            return self._failed(attempt, error)
        if plan is not None:
            return self._cancelled(attempt, plan)
        return transition

    def _verify(self, attempt: _Attempt) -> AttemptResult | bool:
        """The attempt's result where an earlier one's unknown effect decides it, else whether it is still unknown."""
        delivery = attempt.delivery
        try:
            transition = self._bare(attempt, self._context(attempt, None))
            took_place = verified(transition)
        except BaseException as error:
            if ends_process(error):
                raise
            return self._failed(attempt, error)
        if took_place:
            return self._delivered(attempt, transition, "verify() found the effect of an earlier attempt")
        if took_place is None and attempt.chain_type.on_unknown == "hold":
            return self._stopped(attempt, DeliveryStatus.HELD, "the effect of an earlier attempt is unknown")
        if took_place is False and not self._finish(
            attempt, lambda connection: deliveries.mark_known(connection, delivery), (DeliveryStatus.RUNNING,)
        ):
            return self._result(attempt, AttemptOutcome.STALE, "the delivery was taken over meanwhile")
        if delivery.attempt > delivery.max_attempts:
            return self._out_of_attempts(attempt, transition, delivery.last_error or "")
        return took_place is None

    def _context(self, attempt: _Attempt, loaded: Mapping[str, Any] | BaseException | None) -> dict[str, Any]:
        record = attempt.begun.chain
        if loaded is None:
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

    def _deferral(self, attempt: _Attempt) -> AttemptResult | None:
        """The result of an attempt that hours or rate limits keep waiting; None: it goes on."""
        try:
            deferral = self._gate.ask(attempt.chain_type, attempt.begun, attempt.now)
        except Exception as error:  # noqa: BLE001 - whatever it is, the attempt must not stay begun
            return self._failed(attempt, error)
        if deferral is None:
            return None
        by_celery = deferral.seconds <= MAX_COUNTDOWN
        grace = self._settings.queued_seconds if by_celery else 0.0

        def work(connection: Connection) -> bool:
            return deliveries.postpone(
                connection, attempt.delivery, seconds=deferral.seconds, reason=deferral.reason, grace_seconds=grace
            )

        if not self._finish(attempt, work, (DeliveryStatus.PENDING,), attempt_then=attempt.delivery.attempt - 1):
            return self._result(attempt, AttemptOutcome.STALE)
        result = self._result(attempt, AttemptOutcome.DEFERRED, deferral.why)
        return replace(result, retry_seconds=deferral.seconds if by_celery else None)

    def _delivered(
        self, attempt: _Attempt, transition: Transition, detail: str, *, seen_error: bool = False
    ) -> AttemptResult:
        delivery = attempt.delivery
        finished = _finished(delivery, transition, attempt.chain_type, attempt.now)
        if not finish(
            self._database,
            delivery,
            lambda: bool(store.finish(self._database, [finished], now=attempt.now)),
            (DeliveryStatus.DELIVERED,),
            finish_by=attempt.finish_by,
            seen_error=seen_error,
        ):
            return self._result(attempt, AttemptOutcome.STALE, "the delivery was taken over while the callback ran")
        if attempt.chain_type.continue_ and finished.due_at is not None:
            self._continue(attempt)
        return self._result(attempt, AttemptOutcome.DELIVERED, detail)

    def _cancelled(self, attempt: _Attempt, plan: Plan) -> AttemptResult:
        won = type(plan.winner).__name__ if plan.winner is not None else "none"
        reason = f"last look: {won} wins now; {reasons_text(plan.errors)}"

        def work(connection: Connection) -> bool:
            return deliveries.close_and_stay(connection, attempt.delivery, now=attempt.now, reason=reason)

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

        def work(connection: Connection) -> bool:
            return deliveries.retry(connection, delivery, seconds=seconds, grace_seconds=grace, error=reason)

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

        def work(connection: Connection) -> bool:
            return deliveries.skip(
                connection,
                delivery,
                next_update_at=next_update_at,
                due_at=due_at,
                now=attempt.now,
                detail=f"out of attempts: {reason}",
            )

        done = self._finish(attempt, work, (DeliveryStatus.SKIPPED,))
        return self._result(attempt, AttemptOutcome.SKIPPED if done else AttemptOutcome.STALE, reason)

    def _stopped(self, attempt: _Attempt, status: DeliveryStatus, reason: str) -> AttemptResult:
        delivery = attempt.delivery

        def work(connection: Connection) -> bool:
            return deliveries.stop(connection, delivery, status=status, error=reason, now=attempt.now)

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

    def _finish(
        self,
        attempt: _Attempt,
        work: Callable[[Connection], bool],
        written: Sequence[DeliveryStatus],
        *,
        attempt_then: int | None = None,
    ) -> bool:
        """Whether the end of an attempt is committed; tried again until the lease ends while the database is away."""
        write = partial(self._database.write, work)
        return finish(
            self._database,
            attempt.delivery,
            write,
            written,
            finish_by=attempt.finish_by,
            attempt_then=attempt_then,
        )

    # --- in this process ---------------------------------------------------------------------------------------------

    def deliver_locally(self, result: ChainResult, callback: Callback, kwargs: Mapping[str, Any]) -> ChainResult:
        """Make the only attempt at a delivery that `execute_locally` has begun here; the chain's result after it.

        If the callback raises, the delivery is closed as cancelled, the chain is due, and the exception goes on
        unchanged.
        """
        assert result.delivery_id is not None and result.transition is not None
        with self._database.read() as connection:
            delivery = deliveries.read(connection, result.delivery_id)
            now = self._database.now(connection)
        if delivery is None:
            return replace(result, outcome=Outcome.STALE)
        transition = result.transition
        transition.idempotency_key = delivery.idempotency_key
        with self._lease(delivery):
            try:
                callback(transition, **kwargs)
            except BaseException as error:
                if isinstance(error, SystemExit) and ends_process(error):
                    raise  # a time limit: the effect is unknown, the lease ends, the relay settles it
                reason = describe(error)
                try:
                    finish(
                        self._database,
                        delivery,
                        partial(
                            self._database.write,
                            lambda connection: deliveries.close_and_stay(connection, delivery, now=now, reason=reason),
                        ),
                        (DeliveryStatus.CANCELLED,),
                        finish_by=time.monotonic() + self._settings.lease_seconds,
                    )
                except (ServiceUnavailable, DBAPIError):  # the caller is to see what the callback raised
                    logger.exception("delivery %s: that it is cancelled is not written", delivery.id)
                raise
            finished = _finished(delivery, transition, self._config.get(transition.chain.chain_type), now)
            done = finish(
                self._database,
                delivery,
                lambda: bool(store.finish(self._database, [finished], now=now)),
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
                        lambda connection: deliveries.renew_lease(connection, delivery, lease_seconds=seconds)
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


def _finished(delivery: DeliveryRecord, transition: Transition, chain_type: ChainType, now: datetime) -> Finished:
    """A delivered attempt as it is to be recorded: with the rest that its transition asks for, and when it is due."""
    next_update_at = next_update(transition)
    due_at = due_after_move(chain_type, delivery.final_state, next_update_at, now)
    return Finished(delivery, next_update_at, due_at)


def finish(
    database: Database,
    delivery: DeliveryRecord,
    write: Callable[[], bool],
    written: Sequence[DeliveryStatus],
    *,
    finish_by: float,
    seen_error: bool = False,
    attempt_then: int | None = None,
) -> bool:
    """Whether `write()` has committed, tried again while the database is away until `finish_by` (monotonic seconds).

    A commit may succeed while its caller sees an error: after one, a row whose status is among `written`, with the
    attempt `attempt_then` (None: this one), is ours; `seen_error` says that there was one before. Raises the
    database's error when the time is over: the relay then settles the attempt as unknown.
    """
    pause = 0.05
    while True:
        try:
            if write():
                return True
            if not seen_error:
                return False
            with database.read() as connection:
                row = deliveries.read(connection, delivery.id)
            expected = delivery.attempt if attempt_then is None else attempt_then
            return row is not None and row.attempt == expected and row.status in written
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
