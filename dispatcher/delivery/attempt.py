"""One attempt at a delivery: user code runs here, and the attempt's end is returned as a value.

User code and database writes are in separate `try` blocks, so that a database error is never recorded as a failed
callback. What each end means for the rows is the business of `ends`; whether the call may take place at this moment is
asked of the caller between the last look and the callback.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from dispatcher.bounds import refuse_awaitable, refuse_unstarted
from dispatcher.delivery.pacing import Deferral
from dispatcher.domain.config import Callback, ChainType
from dispatcher.domain.contexts import load_contexts, merged_context
from dispatcher.domain.evaluation import GuardFailed, Plan, evaluate
from dispatcher.domain.records import Begun, DeliveryRecord
from dispatcher.errors import UnreadableRow, ends_process
from dispatcher.transition import Transition


@dataclass(frozen=True, slots=True)
class Attempt:
    """A begun attempt with its definition. `now` is domain time as of its begin, or of its turn in its group.

    `read_at` says when the answer of the begin was here, in monotonic seconds. (A begin may wait for a lock. Reckoned
    from when it was asked for, time would seem to be later than it is.)
    """

    begun: Begun
    chain_type: ChainType
    transition_class: type[Transition]
    callback: Callback
    now: datetime
    read_at: float

    @property
    def delivery(self) -> DeliveryRecord:
        """The delivery's row as it was begun."""
        return self.begun.delivery


@dataclass(frozen=True, slots=True)
class Called:
    """The callback has returned; `transition` is the object that it was called with.

    `looked` says that a last look has asked its guard; else it is a bare one.
    """

    transition: Transition
    looked: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """`verify()` has found the effect of an earlier attempt: nothing was called."""

    transition: Transition


@dataclass(frozen=True, slots=True)
class NotValid:
    """The last look found that the transition does not win any more: nothing was called."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Failed:
    """User code has raised `error`."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class CannotBeRead:
    """The row of the chain or of its delivery cannot be read: nothing was called."""

    error: UnreadableRow


@dataclass(frozen=True, slots=True)
class StillUnknown:
    """The effect of an earlier attempt stays unknown, and the chain type says that a person decides."""


@dataclass(frozen=True, slots=True)
class NoneLeft:
    """`verify()` found no effect, and there are no further attempts."""


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Another process has settled the delivery meanwhile."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """The callback may not be called at this moment: nothing was called, and no attempt is used up."""

    deferral: Deferral


@dataclass(frozen=True, slots=True)
class Prepared:
    """An attempt before its call: the transition object, and whether a last look has asked its guard."""

    transition: Transition
    looked: bool


Loaded: TypeAlias = Mapping[str, Any] | BaseException
"""What `load_context` gave for a chain, or what it raised."""

End: TypeAlias = Called | Verified | NotValid | Failed | CannotBeRead | StillUnknown | NoneLeft | TakenOver | Deferred
"""How an attempt ended."""


def load_facts(attempts: Sequence[Attempt]) -> dict[int, Loaded]:
    """What each chain type's `load_context` gives for its chains: `{chain id: context or what it raised}`."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(attempt.chain_type.chain_type, []).append(attempt)
    loaded: dict[int, Loaded] = {}
    for group in groups.values():
        loaded.update(load_contexts(group[0].chain_type, [attempt.begun.chain for attempt in group]))
    return loaded


def make_attempt(
    attempt: Attempt,
    loaded: Loaded | None,
    *,
    last_look_seconds: float,
    mark_known: Callable[[Attempt], bool],
    before_call: Callable[[Attempt, Transition], End | None],
    watched: Callable[[], AbstractContextManager[None]],
) -> End:
    """Settle what an earlier attempt left, look once more, ask `before_call`, call the callback; how the attempt ended.

    `loaded` is what the batch's `load_context` gave for the chain. None loads the facts here: once for `verify()`, and
    again for the callback, because `verify()` may take long and may change nested values. `mark_known` notes in the
    row that the earlier attempts had no effect; False says that the delivery is no longer ours. `before_call` gives the
    end of an attempt that may not be called. The callback runs within `watched()`.
    """
    prepared = _prepare(attempt, loaded, last_look_seconds=last_look_seconds, mark_known=mark_known)
    if not isinstance(prepared, Prepared):
        return prepared
    refused = before_call(attempt, prepared.transition)
    if refused is not None:
        return refused
    try:
        with watched():
            result = attempt.callback(prepared.transition, **(attempt.delivery.kwargs or {}))
        refuse_unstarted(result, "the callback")
    except BaseException as error:
        if ends_process(error):
            raise
        return Failed(error)
    return Called(prepared.transition, prepared.looked)


def _prepare(
    attempt: Attempt, loaded: Loaded | None, *, last_look_seconds: float, mark_known: Callable[[Attempt], bool]
) -> Prepared | End:
    delivery = attempt.delivery
    unknown = delivery.unknown
    if unknown:
        settled = _settle_unknown(attempt, mark_known)
        if not isinstance(settled, bool):
            return settled
        unknown = settled
    try:
        context = _context(attempt, loaded)
        age = attempt.begun.machine_now - delivery.planned_at
        # A plan of the future was made while the database's clock was wrong: nobody knows how old it is.
        if unknown or timedelta(0) <= age < timedelta(seconds=last_look_seconds):
            return Prepared(bare_transition(attempt, context), looked=False)
        plan = _look_again(attempt, context)
        if not _wins_again(plan, attempt):
            return NotValid(plan)
    except BaseException as error:
        if ends_process(error):
            raise
        return Failed(error)
    assert plan.winner is not None  # it wins again
    plan.winner.idempotency_key = delivery.idempotency_key
    return Prepared(plan.winner, looked=True)


def _settle_unknown(attempt: Attempt, mark_known: Callable[[Attempt], bool]) -> End | bool:
    """The attempt's end where an earlier attempt's unknown effect decides it; else whether it is still unknown."""
    try:
        transition = bare_transition(attempt, _context(attempt, None))
        took_place = verified(transition)
    except BaseException as error:
        if ends_process(error):
            raise
        return Failed(error)
    if took_place:
        return Verified(transition)
    if took_place is None and attempt.chain_type.on_unknown == "hold":
        return StillUnknown()
    if took_place is False and not mark_known(attempt):
        return TakenOver()
    if attempt.delivery.attempt > attempt.delivery.max_attempts:
        return NoneLeft()
    return took_place is None


def bare_transition(attempt: Attempt, context: Mapping[str, Any]) -> Transition:
    """The attempt's transition object, made without asking its guard.

    It leads where the delivery's row says, and asks for the rest that the plan asked for.
    """
    transition = attempt.transition_class(attempt.begun.chain.snapshot(), context)
    if transition.final_state != attempt.delivery.final_state:  # a guard's choice, or the class has changed since
        vars(transition)["final_state"] = attempt.delivery.final_state
    if attempt.delivery.rest_is_known:
        vars(transition)["date_next_update"] = attempt.delivery.rest_until
    transition.now = attempt.now
    transition.idempotency_key = attempt.delivery.idempotency_key
    return transition


def _wins_again(plan: Plan, attempt: Attempt) -> bool:
    """Whether the delivery's transition wins once more, and leads to the same state."""
    taken = plan.taken
    same_class = type(plan.winner) is attempt.transition_class
    return same_class and taken is not None and taken.final_state == attempt.delivery.final_state


def verified(transition: Transition) -> bool | None:
    """What the transition's `verify()` says of an earlier attempt's effect; None without one."""
    verify = getattr(transition, "verify", None)
    if verify is None:
        return None
    answer = verify()
    refuse_awaitable(answer, "verify()")
    return None if answer is None else bool(answer)


def _context(attempt: Attempt, loaded: Loaded | None) -> dict[str, Any]:
    if loaded is None:
        record = attempt.begun.chain
        loaded = load_contexts(attempt.chain_type, [record]).get(record.id, {})
    if isinstance(loaded, BaseException):
        raise loaded
    return merged_context(loaded, attempt.begun.chain.context, attempt.delivery.context)


def _look_again(attempt: Attempt, context: Mapping[str, Any]) -> Plan:
    candidates = attempt.chain_type.candidates(attempt.delivery.from_state)
    try:
        return evaluate(
            attempt.begun.chain.snapshot(), candidates, context, attempt.now, states=attempt.chain_type.states
        )
    except GuardFailed as error:
        raise error.__cause__ or error from error
