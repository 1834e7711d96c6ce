"""One batch of chains executed: lock, read, evaluate, write guarded, unlock, publish.

User code (`load_context`, guards) runs with no session open. What each chain gets is decided by pure functions from what
was read (`decide`); the decisions are written in one transaction, in id order, each guarded on its own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy.orm import Session

from dispatcher import chains, deliveries
from dispatcher.chains import ChainRecord, Move, Request, Resource, Rest
from dispatcher.config import (
    NO_CALLBACK_FOUND,
    Callback,
    CallbackChoice,
    ChainType,
    DispatcherConfig,
    choose_callback,
)
from dispatcher.database import Database
from dispatcher.deliveries import Owed, PlannedDelivery
from dispatcher.errors import UnknownDefinition
from dispatcher.evaluation import GuardFailed, Plan, evaluate
from dispatcher.locks import ChainLocks, Held
from dispatcher.publisher import CHAINS_QUEUE, Publisher, PublishFailed
from dispatcher.retry import growing_interval
from dispatcher.settings import Settings
from dispatcher.states import NEW, CallbackKind, EventAction, Outcome
from dispatcher.transition import ChainSnapshot, Transition, as_utc

logger = logging.getLogger(__name__)
plan_logger = logging.getLogger("dispatcher.plan")

_CRASHES_BEFORE_BACKOFF: Final = 3


@dataclass(frozen=True, slots=True)
class LocalCall:
    """What an in-process `execute` brings along: never serialised."""

    callback: Callback | None
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChainResult:
    """What came of executing one chain.

    `transition` is the winner, if there was one; `delivery_id` the delivery that was planned for it; `error` what a
    guard raised.
    """

    chain_id: int | None
    outcome: Outcome
    state: str = ""
    transition: Transition | None = None
    errors: Mapping[str, list[str]] = field(default_factory=dict)
    delivery_id: str | None = None
    callback: str | None = None
    error: BaseException | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be written for one chain, and its result once it is; `write` None writes nothing."""

    result: ChainResult
    write: Move | Rest | PlannedDelivery | None = None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One chain's evaluation: a plan, or the error that a guard, a loader or an unknown name raised."""

    plan: Plan | None
    error: Exception | None = None


class Executor:
    """Executes batches of chains for one deployment."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        locks: ChainLocks,
        publisher: Publisher,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._locks = locks
        self._publisher = publisher

    def execute(self, chain_ids: Sequence[int]) -> list[ChainResult]:
        """Execute these chains as a worker does; one result for each, in their order."""
        distinct = list(dict.fromkeys(chain_ids))
        held = self._locks.acquire(distinct)
        try:
            results = self._execute_held(held)
        finally:
            self._locks.release(held)
        self._publish(results)
        by_id = {result.chain_id: result for result in results}
        return [by_id.get(chain_id, ChainResult(chain_id, Outcome.LOCKED)) for chain_id in distinct]

    def execute_locally(
        self, chain_id: int, *, call: LocalCall, context: Mapping[str, Any] | None, requested_by: str | None
    ) -> ChainResult:
        """Execute one chain in this process; with a callback its delivery is begun, and the caller makes the attempt.

        Raises what a guard raises, unchanged.
        """
        held = self._locks.acquire([chain_id])
        if chain_id in held.locked:
            return ChainResult(chain_id, Outcome.LOCKED)
        try:
            (result,) = self._execute_held(held, call=call, context=context, requested_by=requested_by)
        finally:
            self._locks.release(held)
        return result

    def publish_follow_ups(self, results: Sequence[ChainResult], chain_type: ChainType) -> None:
        """Publish the next evaluation of moved chains, where their type says `continue`."""
        moved = [result.chain_id for result in results if result.chain_id is not None and result.outcome == Outcome.MOVED]
        if chain_type.continue_ and moved and self._publisher.configured:
            try:
                self._publisher.execute(moved, queue=chain_type.queue or CHAINS_QUEUE)
            except PublishFailed as error:
                logger.warning("follow-up of %d chains not published (%s): the sweep does it", len(moved), error)

    # --- dry run ---------------------------------------------------------------------------------------------------

    def dry_run(
        self,
        chain_id: int | None,
        *,
        chain_type: str,
        resources: Sequence[Resource] = (),
        context: Mapping[str, Any] | None = None,
        stored_context: Mapping[str, Any] | None = None,
        callback: str | None = None,
        local: LocalCall | None = None,
    ) -> ChainResult:
        """Evaluate one chain and log the planned transition; nothing is locked, written, published or called.

        With `chain_id=None` an unsaved chain in NEW with these resources is planned. Raises what a guard raises.
        """
        with self._database.read() as session:
            now = self._database.now(session)
            record = chains.read_many(session, [chain_id]).get(chain_id) if chain_id is not None else None
        if record is None:
            if chain_id is not None:
                return ChainResult(chain_id, Outcome.MISSING)
            record = unsaved_record(chain_type, tuple(resources), stored_context, now)
        standing = _standing(record, now)
        if standing is None and chain_id is not None and self._locks.locked([chain_id]):
            standing = Outcome.LOCKED
        asked = record.request or Request()
        if context is not None or callback is not None:
            asked = Request(context, callback, None, None)
        chain = self._config.by_type.get(record.chain_type)
        evaluated = self._evaluate_one(record, chain, asked.context, now)
        if isinstance(evaluated.error, GuardFailed):
            raise evaluated.error
        if evaluated.plan is None or chain is None:
            result = ChainResult(chain_id, Outcome.UNKNOWN_DEFINITION, record.state, detail=str(evaluated.error))
        else:
            result = _dry_result(record, chain, evaluated.plan, asked, local)
        _log_plan(record, result, standing)
        outcome = standing or (Outcome.DRY_RUN if result.transition else result.outcome)
        return replace(result, outcome=outcome)

    # --- the batch ---------------------------------------------------------------------------------------------------

    def _execute_held(
        self,
        held: Held,
        *,
        call: LocalCall | None = None,
        context: Mapping[str, Any] | None = None,
        requested_by: str | None = None,
    ) -> list[ChainResult]:
        with self._database.read() as session:
            records = chains.read_many(session, held.held)
            now = self._database.now(session)
        results: list[ChainResult] = []
        todo: list[ChainRecord] = []
        for chain_id in held.held:
            record = records.get(chain_id)
            standing = Outcome.MISSING if record is None else _standing(record, now)
            if record is not None and standing is None:
                todo.append(record)
            else:
                assert standing is not None
                results.append(ChainResult(chain_id, standing, record.state if record else ""))
        if call is None:
            todo = self._back_off_crashers(todo, held, now)
        evaluated = self._evaluate(todo, context, now)
        decisions = []
        for record, outcome in zip(todo, evaluated, strict=True):
            asked = record.request or Request()
            if call is not None:
                asked = Request(context, None, None, requested_by)
                if isinstance(outcome.error, GuardFailed):
                    raise outcome.error
            decisions.append(decide(record, self._config.by_type.get(record.chain_type), outcome, asked, now, call))
        written = self._write(decisions, now, lease=call is not None)
        for result in written:
            log_result(result)
        return results + written

    def _evaluate(
        self, records: Sequence[ChainRecord], context: Mapping[str, Any] | None, now: datetime
    ) -> list[Evaluated]:
        loaded: dict[int, Mapping[str, Any] | BaseException] = {}
        by_type: dict[str, list[ChainRecord]] = {}
        for record in records:
            by_type.setdefault(record.chain_type, []).append(record)
        for name, group in by_type.items():
            chain = self._config.by_type.get(name)
            if chain is not None:
                loaded.update(load_contexts(chain, group))
        results = []
        for record in records:
            asked = context if context is not None else record.request.context if record.request else None
            chain = self._config.by_type.get(record.chain_type)
            results.append(_evaluate_record(record, chain, loaded.get(record.id, {}), asked, now))
        return results

    def _evaluate_one(
        self, record: ChainRecord, chain: ChainType | None, context: Mapping[str, Any] | None, now: datetime
    ) -> Evaluated:
        loaded: Mapping[str, Any] | BaseException = {}
        if chain is not None and record.id:
            loaded = load_contexts(chain, [record]).get(record.id, {})
        return _evaluate_record(record, chain, loaded, context, now)

    def _back_off_crashers(self, records: list[ChainRecord], held: Held, now: datetime) -> list[ChainRecord]:
        """Pay the back-off of a chain that keeps killing its process before it is evaluated once more."""
        crashers = [record for record in records if held.crashes.get(record.id, 0) >= _CRASHES_BEFORE_BACKOFF]
        if not crashers:
            return records
        kept = {record.id: record for record in records}

        def work(session: Session) -> None:
            for record in crashers:
                failures = record.failures + 1
                rest = Rest(
                    record=record,
                    due_at=now + growing_interval(failures),
                    failures=failures,
                    event=EventAction.GUARD_FAILED if record.failures == 0 else None,
                    detail=f"{held.crashes[record.id]} evaluations ended with their process",
                )
                if chains.rest(session, rest, now=now):
                    kept[record.id] = replace(record, due_at=rest.due_at, failures=failures)
                else:
                    del kept[record.id]

        self._database.write(work)
        return list(kept.values())

    def _write(self, decisions: Sequence[Decision], now: datetime, *, lease: bool) -> list[ChainResult]:
        writes = [decision for decision in decisions if decision.write is not None]
        written: dict[int | None, ChainResult] = {}

        def work(session: Session) -> None:
            written.clear()
            for decision in sorted(writes, key=lambda one: one.result.chain_id or 0):
                written[decision.result.chain_id] = self._write_one(session, decision, now, lease=lease)

        if writes:
            self._database.write(work)
        return [written.get(decision.result.chain_id, decision.result) for decision in decisions]

    def _write_one(self, session: Session, decision: Decision, now: datetime, *, lease: bool) -> ChainResult:
        result, write = decision.result, decision.write
        if isinstance(write, Move):
            applied = chains.move(session, write, now=now)
        elif isinstance(write, Rest):
            applied = chains.rest(session, write, now=now)
        else:
            assert write is not None
            delivery_id = deliveries.plan(
                session,
                write,
                now=now,
                publish_seconds=self._settings.queued_seconds,
                lease_seconds=self._settings.lease_seconds if lease else None,
            )
            applied = delivery_id is not None
            result = replace(result, delivery_id=delivery_id)
        return result if applied else ChainResult(result.chain_id, Outcome.STALE, write.record.state)

    def _publish(self, results: Sequence[ChainResult]) -> None:
        owed = [Owed(result.delivery_id, 1) for result in results if result.delivery_id is not None]
        if owed:
            try:
                self._publisher.deliver(owed)
            except PublishFailed as error:
                logger.warning("%d deliveries not published (%s): the relay does it", len(owed), error)
        moved = [result for result in results if result.outcome == Outcome.MOVED and result.transition is not None]
        by_type: dict[str, list[ChainResult]] = {}
        for result in moved:
            assert result.transition is not None
            by_type.setdefault(result.transition.chain.chain_type, []).append(result)
        for name, group in by_type.items():
            chain = self._config.get(name)
            going_on = [result for result in group if chain.candidates(result.state)]
            self.publish_follow_ups(going_on, chain)


# --- pure parts --------------------------------------------------------------------------------------------------------


def decide(
    record: ChainRecord,
    chain: ChainType | None,
    evaluated: Evaluated,
    asked: Request,
    now: datetime,
    call: LocalCall | None,
) -> Decision:
    """What is to be written for one chain that was evaluated, and the result it then has."""
    if evaluated.plan is None or chain is None:
        return _failed(record, evaluated.error, now)
    plan = evaluated.plan
    winner = plan.winner
    if winner is None:
        outcome = Outcome.TERMINAL if plan.terminal else Outcome.NONE
        rest = Rest(record=record, due_at=_rest_until(record, plan, now), clear_request=plan.terminal)
        result = ChainResult(record.id, outcome, record.state, errors=plan.errors)
        return Decision(result, None if rest.learns_nothing else rest)
    name = type(winner).__name__
    try:
        choice = _choose(chain, winner, asked, call)
    except KeyError as error:
        return _failed(record, UnknownDefinition(record.id, f"callback {error.args[0]!r}"), now)
    if choice is NO_CALLBACK_FOUND:
        detail = f"{name}: no own, requested or type callback"
        rest = Rest(record=record, due_at=None, event=EventAction.NO_CALLBACK, detail=detail)
        return Decision(ChainResult(record.id, Outcome.NO_CALLBACK, record.state, winner, plan.errors), rest)
    if not choice.kind:
        next_update_at = next_update(winner)
        move = Move(
            record=record,
            transition=name,
            to_state=winner.final_state,
            next_update_at=next_update_at,
            due_at=due_after_move(chain, winner.final_state, next_update_at, now),
            requested_by=asked.requested_by,
        )
        return Decision(ChainResult(record.id, Outcome.MOVED, winner.final_state, winner, plan.errors), move)
    planned = PlannedDelivery(
        record=record,
        transition=name,
        final_state=winner.final_state,
        callback=choice.kind,
        max_attempts=winner.retry.max_attempts,
        kwargs=asked.kwargs,
        context=asked.context if call is None else None,
        requested_by=asked.requested_by,
    )
    result = ChainResult(record.id, Outcome.PLANNED, record.state, winner, plan.errors, callback=choice.kind)
    return Decision(result, planned)


def due_after_move(chain: ChainType, state: str, next_update_at: datetime | None, now: datetime) -> datetime | None:
    """When a chain that just came to `state` must be looked at: at once, after its rest, or never (terminal)."""
    if not chain.candidates(state):
        return None
    return max(now, next_update_at) if next_update_at is not None else now


def next_update(transition: Transition) -> datetime | None:
    """The rest that a transition asks for after its move."""
    asked = transition.date_next_update
    return None if asked is None else as_utc(asked)


def load_contexts(chain: ChainType, records: Sequence[ChainRecord]) -> dict[int, Mapping[str, Any] | BaseException]:
    """What the type's `load_context` gives for these chains; an exception for each chain it fails for.

    A loader that fails for the batch is asked once more per chain, so that one chain's failure is its own.
    """
    loader = chain.load_context
    if loader is None or not records:
        return {}
    try:
        loaded = loader([record.snapshot() for record in records])
        return {record.id: dict(loaded.get(record.id) or {}) for record in records}
    except (Exception, SystemExit) as error:  # user code: it must not take the batch with it
        if len(records) == 1:
            return {records[0].id: error}
    results: dict[int, Mapping[str, Any] | BaseException] = {}
    for record in records:
        results.update(load_contexts(chain, [record]))
    return results


def merged_context(
    loaded: Mapping[str, Any], stored: Mapping[str, Any] | None, asked: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The context for the guards; later ones win. (A class's own `initial_context` is added per transition.)"""
    return {**loaded, **(stored or {}), **(asked or {})}


def log_result(result: ChainResult) -> None:
    """One log line for what came of a chain."""
    if result.outcome == Outcome.MOVED:
        logger.info(
            "chain %s moved to %s", result.chain_id, result.state, extra={"action": "chain_moved", "chain_id": result.chain_id}
        )
    elif result.outcome == Outcome.PLANNED:
        logger.info(
            "chain %s planned %s",
            result.chain_id,
            type(result.transition).__name__,
            extra={"action": "delivery_planned", "chain_id": result.chain_id, "delivery_id": result.delivery_id},
        )
    elif result.outcome == Outcome.GUARD_FAILED:
        logger.error(
            "chain %s: %s",
            result.chain_id,
            result.detail,
            exc_info=result.error,
            extra={"action": "guard_failed", "chain_id": result.chain_id},
        )
    elif result.outcome in (Outcome.UNKNOWN_DEFINITION, Outcome.NO_CALLBACK):
        logger.warning(
            "chain %s: %s %s",
            result.chain_id,
            result.outcome,
            result.detail,
            extra={"action": str(result.outcome), "chain_id": result.chain_id},
        )
    else:
        logger.debug("chain %s: %s", result.chain_id, result.outcome)


def _evaluate_record(
    record: ChainRecord,
    chain: ChainType | None,
    loaded: Mapping[str, Any] | BaseException,
    asked: Mapping[str, Any] | None,
    now: datetime,
) -> Evaluated:
    if chain is None:
        return Evaluated(None, UnknownDefinition(record.id, f"chain type {record.chain_type!r}"))
    if record.state not in chain.states:
        return Evaluated(None, UnknownDefinition(record.id, f"state {record.state!r}"))
    if isinstance(loaded, BaseException):
        failure = GuardFailed("load_context", f"{type(loaded).__name__}: {loaded}")
        failure.__cause__ = loaded
        return Evaluated(None, failure)
    context = merged_context(loaded, record.context, asked)
    candidates = chain.candidates(record.state)
    try:
        plan = evaluate(record.snapshot(), candidates, context, now, recheck_seconds=chain.recheck_seconds)
    except GuardFailed as error:
        return Evaluated(None, error)
    return Evaluated(plan)


def _failed(record: ChainRecord, error: Exception | None, now: datetime) -> Decision:
    failures = record.failures + 1
    is_guard = isinstance(error, GuardFailed)
    rest = Rest(
        record=record,
        due_at=now + growing_interval(failures),
        failures=failures,
        event=(EventAction.GUARD_FAILED if is_guard else EventAction.UNKNOWN_DEFINITION) if failures == 1 else None,
        detail=str(error),
    )
    outcome = Outcome.GUARD_FAILED if is_guard else Outcome.UNKNOWN_DEFINITION
    cause = error.__cause__ if error is not None and is_guard else None
    return Decision(ChainResult(record.id, outcome, record.state, error=cause, detail=str(error)), rest)


def _choose(chain: ChainType, winner: Transition, asked: Request, call: LocalCall | None) -> CallbackChoice:
    """The callback of a winner. In this process any callback at all is `local`; nothing found moves with a warning."""
    if call is None:
        return choose_callback(chain, type(winner), asked.callback)
    return choose_local(chain, winner, call)


def choose_local(chain: ChainType, winner: Transition, call: LocalCall) -> CallbackChoice:
    """The callback of a winner in an in-process execution; `kind` is "" for a move without one."""
    choice = choose_callback(chain, type(winner), None)
    if choice.kind == CallbackKind.OWN:
        return CallbackChoice(CallbackKind.LOCAL, choice.call)
    own_says_none = getattr(winner, "callback", choice) is None
    if call.callback is not None and winner.final_state != "done" and not own_says_none:
        return CallbackChoice(CallbackKind.LOCAL, call.callback)
    if choice is NO_CALLBACK_FOUND:
        logger.warning("nothing is configured to be called for %s: moving without a callback", winner)
        return CallbackChoice("", None)
    return CallbackChoice(CallbackKind.LOCAL if choice.kind else "", choice.call)


def _rest_until(record: ChainRecord, plan: Plan, now: datetime) -> datetime | None:
    due_at = plan.due_at(now, record.next_update_at)
    if due_at is not None and due_at <= now and record.due_at is not None and record.due_at <= now:
        return record.due_at  # still due, as before: nothing to write
    return due_at


def _standing(record: ChainRecord, now: datetime) -> Outcome | None:
    """Why a chain is not evaluated now, or None."""
    if record.disabled:
        return Outcome.DISABLED
    if record.pending_delivery_id is not None:
        return Outcome.PENDING
    if record.next_update_at is not None and record.next_update_at > now:
        return Outcome.RESTING
    return None


def unsaved_record(
    chain_type: str, resources: tuple[Resource, ...], context: Mapping[str, Any] | None, now: datetime
) -> ChainRecord:
    """A chain in NEW that is not in the database: its id is 0."""
    return ChainRecord(
        id=0,
        chain_type=chain_type,
        state=NEW,
        disabled=False,
        next_update_at=None,
        due_at=now,
        version=0,
        wake=0,
        moves=0,
        pending_delivery_id=None,
        failures=0,
        created_at=now,
        updated_at=now,
        context=dict(context) if context else None,
        request=None,
        resources=resources,
    )


def _dry_result(
    record: ChainRecord, chain: ChainType, plan: Plan, asked: Request, local: LocalCall | None
) -> ChainResult:
    chain_id = record.id or None
    if plan.winner is None:
        outcome = Outcome.TERMINAL if plan.terminal else Outcome.NONE
        return ChainResult(chain_id, outcome, record.state, errors=plan.errors)
    try:
        choice = _choose(chain, plan.winner, asked, local)
    except KeyError as error:
        return ChainResult(
            chain_id, Outcome.UNKNOWN_DEFINITION, record.state, plan.winner, plan.errors, detail=f"callback {error}"
        )
    if choice is NO_CALLBACK_FOUND:
        return ChainResult(chain_id, Outcome.NO_CALLBACK, record.state, plan.winner, plan.errors, callback="missing")
    return ChainResult(chain_id, Outcome.DRY_RUN, record.state, plan.winner, plan.errors, callback=choice.kind or "none")


def _log_plan(record: ChainRecord, result: ChainResult, standing: Outcome | None) -> None:
    extra = {"action": "dry_run", "chain_id": record.id or None}
    blocked = f" blocked={standing}" if standing is not None else ""
    winner = result.transition
    if winner is not None:
        plan_logger.info(
            "planned chain_id=%s chain_type=%s from=%s to=%s transition=%s callback=%s%s",
            record.id or None,
            record.chain_type,
            record.state,
            winner.final_state,
            type(winner).__name__,
            result.callback,
            blocked,
            extra=extra,
        )
    else:
        plan_logger.info(
            "nothing planned chain_id=%s chain_type=%s from=%s outcome=%s reasons=%s%s",
            record.id or None,
            record.chain_type,
            record.state,
            result.outcome,
            deliveries.reasons(result.errors),
            blocked,
            extra=extra,
        )
