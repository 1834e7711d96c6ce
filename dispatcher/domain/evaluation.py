"""Evaluates a chain: asks its candidates and gives the plan. Pure, without I/O and without a clock."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Final

from dispatcher.bounds import bounded_text, describe, refuse_awaitable, safe_reasons, safe_text
from dispatcher.errors import DispatcherError, ends_process
from dispatcher.retry import MAX_ATTEMPTS, RetryPolicy
from dispatcher.transition import ChainSnapshot, Transition, TypeDefault, as_utc

MAX_LABEL: Final = 200


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one candidate said: valid, or rejected with reasons and perhaps the moment until which it stays rejected."""

    transition: str
    label: str
    valid: bool
    errors: tuple[str, ...]
    not_before: datetime | None = None
    recheck_seconds: float | None = 0


@dataclass(frozen=True, slots=True)
class Taken:
    """What the winner asks for, read once and checked: where the chain goes, how often to try, until when to rest."""

    transition: str
    final_state: str
    max_attempts: int
    next_update_at: datetime | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of one evaluation: the winner or None, and the verdicts of all candidates that were asked.

    `winner` is the same object whose `is_valid()` returned True. `taken` is given where there is a winner.
    """

    state: str
    winner: Transition | None
    verdicts: tuple[Verdict, ...]
    taken: Taken | None = None

    @property
    def terminal(self) -> bool:
        """Whether the state has no candidates."""
        return not self.verdicts

    @property
    def errors(self) -> dict[str, list[str]]:
        """`{str(transition): [reasons]}` of the rejected candidates."""
        return {verdict.label: list(verdict.errors) for verdict in self.verdicts if not verdict.valid}

    def due_at(self, now: datetime, next_update_at: datetime | None = None) -> datetime | None:
        """The earliest moment at which another evaluation could give another result; None: time alone changes nothing.

        A rejected candidate can change at its `not_before`, else at `now` plus its `recheck_seconds`. The result is
        the earliest of these moments, but not before `next_update_at`.
        """
        moments = [
            verdict.not_before
            if verdict.not_before is not None
            else now + timedelta(seconds=verdict.recheck_seconds or 0)
            for verdict in self.verdicts
            if verdict.not_before is not None or verdict.recheck_seconds is not None
        ]
        if not moments:
            return None
        return max(min(moments), next_update_at) if next_update_at else min(moments)


class GuardFailed(DispatcherError):
    """A candidate's guard or constructor raised an error: `problem` is its text, `__cause__` the error itself."""

    def __init__(self, transition: str, problem: str) -> None:
        super().__init__(transition, problem)
        self.transition = transition
        self.problem = problem

    def __str__(self) -> str:
        return f"the guard of {self.transition} raised {self.problem}"


def evaluate(
    snapshot: ChainSnapshot,
    candidates: Sequence[type[Transition]],
    context: Mapping[str, Any],
    now: datetime,
    *,
    recheck_seconds: float | None = 0,
    states: Collection[str] | None = None,
) -> Plan:
    """The plan for a chain: the candidates are asked in order, and the first valid candidate wins.

    Later candidates are not asked. `context` is the merged context. Each candidate adds the `initial_context` of its
    class, which wins. `recheck_seconds` is the chain type's. A winner must lead to one of `states` (None: to any).
    Raises `GuardFailed` from the error of a guard, and for a winner that asks for what cannot be.
    """
    verdicts: list[Verdict] = []
    for candidate in candidates:
        name, recheck = candidate.__name__, candidate.recheck_seconds
        try:
            transition = candidate(snapshot, context)
            transition.now = now
            answer = transition.is_valid()
            if type(answer) is not bool:
                refuse_awaitable(answer, "is_valid()")
            valid = bool(answer)
            taken = taken_by(transition, snapshot, states) if valid else None
            verdict = Verdict(
                transition=name,
                label=bounded_text(str(transition), MAX_LABEL),
                valid=valid,
                errors=safe_reasons(transition.errors),
                not_before=None if valid else transition._not_before,
                recheck_seconds=recheck_seconds if isinstance(recheck, TypeDefault) else recheck,
            )
        except BaseException as error:  # user code: its error must fail this chain only
            if ends_process(error):
                raise
            raise GuardFailed(name, describe(error)) from error
        verdicts.append(verdict)
        if valid:
            return Plan(snapshot.state, transition, tuple(verdicts), taken)
    return Plan(snapshot.state, None, tuple(verdicts))


def taken_by(transition: Transition, snapshot: ChainSnapshot, states: Collection[str] | None) -> Taken:
    """What a winner asks for. Raises `TypeError` or `ValueError` where that cannot be: guards may set attributes."""
    if transition.chain is not snapshot:
        raise TypeError("it replaced `self.chain`, which must stay the snapshot that it was given")
    final_state, retry = transition.final_state, transition.retry
    if not isinstance(final_state, str) or (states is not None and final_state not in states):
        raise ValueError(
            f"its final_state is {safe_text(repr(final_state), 150)}, which is not a state of its chain type"
        )
    if not isinstance(retry, RetryPolicy):
        raise TypeError(f"its retry is {safe_text(repr(retry), 150)}, which is not a RetryPolicy")
    max_attempts = retry.max_attempts
    if type(max_attempts) is not int or not 1 <= max_attempts <= MAX_ATTEMPTS:
        raise ValueError(f"its retry has {safe_text(repr(max_attempts), 150)} attempts")
    return Taken(type(transition).__name__, final_state, max_attempts, rest_of(transition))


def rest_of(transition: Transition) -> datetime | None:
    """Until when a chain rests after this transition (aware UTC), or None. `TypeError` for what is not a date."""
    asked = transition.date_next_update
    if asked is None:
        return None
    if not isinstance(asked, date):
        raise TypeError(f"its date_next_update is {safe_text(repr(asked), 150)}, which is not a date")
    return as_utc(asked)
