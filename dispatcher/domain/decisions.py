"""Decides what to write for a chain that was evaluated. Pure: the executor and the delivery carry it out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final

from dispatcher.bounds import describe
from dispatcher.domain.callbacks import NO_CALLBACK_FOUND, LocalCall, choose_for
from dispatcher.domain.config import ChainType
from dispatcher.domain.contexts import Evaluated
from dispatcher.domain.evaluation import GuardFailed, Plan, rest_of
from dispatcher.domain.records import ChainRecord, DeliveryRecord, Move, PlannedDelivery, Request, Rest
from dispatcher.domain.results import ChainResult
from dispatcher.errors import UnknownDefinition, UnreadableRow, ends_process
from dispatcher.retry import back_off, retry_wait
from dispatcher.states import EventAction, Outcome
from dispatcher.telemetry import Action, emit
from dispatcher.transition import Transition, as_utc

logger = logging.getLogger(__name__)

_REST_AFTER_PROBLEM: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to write for one chain (None: nothing), and the result of the chain once it is written."""

    result: ChainResult
    write: Move | Rest | PlannedDelivery | None = None

    @property
    def plans(self) -> bool:
        """Whether a transition is taken, which counts against the budget of the chain type."""
        return isinstance(self.write, Move | PlannedDelivery)


def decide(
    record: ChainRecord,
    chain_type: ChainType | None,
    evaluated: Evaluated,
    asked: Request,
    *,
    now: datetime,
    call: LocalCall | None,
) -> Decision:
    """What to write for one chain that was evaluated, and its result.

    `asked` is the chain's request. `call` is given in an in-process execution only.
    """
    if evaluated.plan is None or chain_type is None:
        return _failed(record, evaluated.error, now)
    plan = evaluated.plan
    winner, taken = plan.winner, plan.taken
    if winner is None or taken is None:
        return _stay(record, plan, now, takes_request=call is None)
    try:
        choice = choose_for(chain_type, winner, asked, call)
    except KeyError as error:
        return _failed(record, UnknownDefinition(record.id, f"callback {error.args[0]!r}"), now)
    if choice is NO_CALLBACK_FOUND:
        name = type(winner).__name__
        detail = f"{name}: neither the transition, nor the request, nor the chain type has a callback"
        rest = Rest(record=record, due_at=None, event=EventAction.NO_CALLBACK, detail=detail)
        return Decision(ChainResult(record.id, Outcome.NO_CALLBACK, record.state, winner, plan.errors), rest)
    if not choice.kind:
        move = _move(record, chain_type, plan, asked, now, takes_request=call is None)
        return Decision(ChainResult(record.id, Outcome.MOVED, taken.final_state, winner, plan.errors), move)
    planned = _plan(record, plan, choice.kind, asked, call)
    result = ChainResult(record.id, Outcome.PLANNED, record.state, winner, plan.errors, callback=choice.kind)
    return Decision(result, planned)


def _stay(record: ChainRecord, plan: Plan, now: datetime, *, takes_request: bool) -> Decision:
    outcome = Outcome.TERMINAL if plan.terminal else Outcome.NONE
    rest = Rest(record=record, due_at=_rest_until(record, plan, now), clear_request=plan.terminal and takes_request)
    result = ChainResult(record.id, outcome, record.state, errors=plan.errors)
    if record.request is not None and not takes_request:
        return Decision(result)  # the chain is due for that request, and must stay so
    return Decision(result, None if rest.changes_nothing else rest)


def _move(
    record: ChainRecord, chain_type: ChainType, plan: Plan, asked: Request, now: datetime, *, takes_request: bool
) -> Move:
    taken = plan.taken
    assert taken is not None  # there is a winner
    return Move(
        record=record,
        transition=taken.transition,
        to_state=taken.final_state,
        next_update_at=taken.next_update_at,
        due_at=due_after_move(chain_type, taken.final_state, taken.next_update_at, now),
        requested_by=asked.requested_by,
        takes_request=takes_request,
    )


def _plan(record: ChainRecord, plan: Plan, callback: str, asked: Request, call: LocalCall | None) -> PlannedDelivery:
    taken = plan.taken
    assert taken is not None  # there is a winner
    return PlannedDelivery(
        record=record,
        transition=taken.transition,
        final_state=taken.final_state,
        callback=callback,
        max_attempts=taken.max_attempts,
        kwargs=asked.kwargs,
        context=asked.context if call is None else None,
        requested_by=asked.requested_by,
        rest_until=taken.next_update_at,
        takes_request=call is None,
    )


def due_after_move(
    chain_type: ChainType, state: str, next_update_at: datetime | None, now: datetime
) -> datetime | None:
    """When a chain that has just moved to `state` is due: now, or after its rest; None if the state is terminal.

    A state that this configuration does not know is not terminal: another version of the code planned the move.
    """
    if state in chain_type.states and not chain_type.candidates(state):
        return None
    return max(now, next_update_at) if next_update_at is not None else now


@dataclass(frozen=True, slots=True)
class AfterCall:
    """The rest that a transition asks for after its callback, and what is wrong with it, if anything is."""

    next_update_at: datetime | None
    problem: str = ""


def rest_after_call(transition: Transition, chain_id: int, now: datetime) -> AfterCall:
    """The rest that a transition asks for once its effect has taken place.

    The callback may have set a `date_next_update` that is not a date. The chain must move all the same; it rests for a
    day, so that the next step does not follow at once.
    """
    try:
        return AfterCall(rest_of(transition))
    except BaseException as error:  # user code; the effect has taken place, so the chain must move
        if ends_process(error):
            raise
        emit(
            logger,
            Action.REST_IGNORED,
            "chain %s: %s; it rests for a day",
            chain_id,
            problem := f"{type(transition).__name__}: {describe(error)}",
            error=error,
            chain_id=chain_id,
        )
        return AfterCall(now + _REST_AFTER_PROBLEM, problem)


def computes_rest(transition_class: type[Transition]) -> bool:
    """Whether `date_next_update` is a property of the class, which no value on an object can replace."""
    return isinstance(getattr(transition_class, "date_next_update", None), property)


def rest_of_plan(delivery: DeliveryRecord, transition_class: type[Transition] | None) -> datetime | None:
    """Until when a chain rests after its delivery is skipped: as the plan asked (aware UTC), or None.

    The row of a delivery from before revision 0002 does not say it; there it is what the class asks for.
    """
    if delivery.rest_is_known:
        return delivery.rest_until
    asked = getattr(transition_class, "date_next_update", None)
    return as_utc(asked) if isinstance(asked, date) else None


def seconds_to_retry(delivery: DeliveryRecord, transition: type[Transition], random: Callable[[], float]) -> float:
    """How long the next attempt waits after the delivery's last one failed. A policy that fails is logged."""
    wait = retry_wait(transition, delivery.attempt, random)
    if wait.problem is not None:
        emit(
            logger,
            Action.RETRY_DELAY_IGNORED,
            "chain %s: the retry policy of %s failed after attempt %s; the next one waits for %.0f s",
            delivery.chain_id,
            delivery.transition,
            delivery.attempt,
            wait.seconds,
            error=wait.problem,
            chain_id=delivery.chain_id,
            delivery_id=delivery.id,
            attempt=delivery.attempt,
            transition=delivery.transition,
        )
    return wait.seconds


def _failed(record: ChainRecord, error: Exception | None, now: datetime) -> Decision:
    failures = record.failures + 1
    is_guard = isinstance(error, GuardFailed | UnreadableRow)
    rest = Rest(
        record=record,
        due_at=now + back_off(record.id, failures),
        failures=failures,
        event=(EventAction.GUARD_FAILED if is_guard else EventAction.UNKNOWN_DEFINITION) if failures == 1 else None,
        detail=str(error),
    )
    outcome = Outcome.GUARD_FAILED if is_guard else Outcome.UNKNOWN_DEFINITION
    cause = error.__cause__ if error is not None and is_guard else None
    return Decision(ChainResult(record.id, outcome, record.state, error=cause, detail=str(error)), rest)


def _rest_until(record: ChainRecord, plan: Plan, now: datetime) -> datetime | None:
    due_at = plan.due_at(now, record.next_update_at)
    if due_at is not None and due_at <= now and record.due_at is not None and record.due_at <= now:
        return record.due_at  # the chain is due already: keep the value, so that nothing is written
    return due_at


def standing_of(record: ChainRecord, now: datetime) -> Outcome | None:
    """Why the chain may not be evaluated now, or None if it may."""
    if record.disabled:
        return Outcome.DISABLED
    if record.pending_delivery_id is not None:
        return Outcome.PENDING
    if record.next_update_at is not None and record.next_update_at > now:
        return Outcome.RESTING
    return None
