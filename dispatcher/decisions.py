"""What becomes of a chain that was evaluated: pure decisions from what was read, for `executor` and `delivery`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dispatcher.chains import ChainRecord, Move, Request, Rest
from dispatcher.config import NO_CALLBACK_FOUND, Callback, CallbackChoice, ChainType, choose_callback
from dispatcher.deliveries import PlannedDelivery
from dispatcher.errors import UnknownDefinition, ends_process
from dispatcher.evaluation import GuardFailed, Plan, evaluate
from dispatcher.resources import Resource
from dispatcher.retry import growing_interval
from dispatcher.states import DONE, NEW, CallbackKind, EventAction, Outcome
from dispatcher.transition import Transition, as_utc

logger = logging.getLogger(__name__)


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

    @property
    def plans(self) -> bool:
        """Whether a transition is taken: what a type's budget is about."""
        return isinstance(self.write, Move | PlannedDelivery)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One chain's evaluation: a plan, or the error that a guard, a loader or an unknown name raised."""

    plan: Plan | None
    error: Exception | None = None


def decide(
    record: ChainRecord,
    chain: ChainType | None,
    evaluated: Evaluated,
    asked: Request,
    *,
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
    """The rest that a transition asks for after its move; none, with a line in the log, when it is no date."""
    try:
        asked = transition.date_next_update
        return None if asked is None else as_utc(asked)
    except Exception:  # user code: the effect has taken place, and the move must not fail for this
        logger.exception("%s: its date_next_update is no date: the chain does not rest", transition)
        return None


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
    except BaseException as error:
        if ends_process(error):
            raise
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


def evaluate_record(
    record: ChainRecord,
    chain: ChainType | None,
    loaded: Mapping[str, Any] | BaseException,
    asked: Mapping[str, Any] | None,
    now: datetime,
) -> Evaluated:
    """The plan for one chain, or what kept it from being made; user code runs here, with no connection in use."""
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
    if call.callback is not None and winner.final_state != DONE and not own_says_none:
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


def standing_of(record: ChainRecord, now: datetime) -> Outcome | None:
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


def dry_result(
    record: ChainRecord, chain: ChainType, plan: Plan, asked: Request, local: LocalCall | None
) -> ChainResult:
    """What a dry run says of a plan."""
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
    return ChainResult(
        chain_id, Outcome.DRY_RUN, record.state, plan.winner, plan.errors, callback=choice.kind or "none"
    )
