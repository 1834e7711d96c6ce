"""Deciding what comes next: pure, without I/O and without a clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from dispatcher.errors import DispatcherError, ends_process
from dispatcher.transition import ChainSnapshot, Transition, TypeDefault


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one candidate said: valid, or rejected with reasons and perhaps the time before which it stays so."""

    transition: str
    label: str
    valid: bool
    errors: tuple[str, ...]
    not_before: datetime | None = None
    recheck_seconds: float | None = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of one evaluation: the winner or none, and every verdict up to it.

    `winner` is the very object whose `is_valid()` said yes; `terminal` says that the state has no candidates.
    """

    state: str
    winner: Transition | None
    verdicts: tuple[Verdict, ...]

    @property
    def terminal(self) -> bool:
        """Whether nothing can leave this state."""
        return not self.verdicts

    @property
    def errors(self) -> dict[str, list[str]]:
        """`{str(transition): [reasons]}` of the rejected candidates."""
        return {verdict.label: list(verdict.errors) for verdict in self.verdicts if not verdict.valid}

    def due_at(self, now: datetime, next_update_at: datetime | None = None) -> datetime | None:
        """The earliest moment at which another evaluation could say something new; None: not by itself.

        For each rejected candidate that is its `not_before`, else `now` plus its `recheck_seconds`; never before
        `next_update_at`.
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
    """A candidate's guard (or constructor) raised; `problem` says what, `__cause__` is it."""

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
) -> Plan:
    """Ask the candidates in their order; the first valid one wins and later ones are not asked.

    `context` is the merged context without the classes' own `initial_context` (that one wins, and is added per
    candidate); `recheck_seconds` is the chain type's. Raises `GuardFailed` from what a guard raised.
    """
    verdicts: list[Verdict] = []
    for candidate in candidates:
        name, recheck = candidate.__name__, candidate.recheck_seconds
        try:
            transition = candidate(snapshot, context)
            transition.now = now
            valid = bool(transition.is_valid())
            verdict = Verdict(
                transition=name,
                label=str(transition),
                valid=valid,
                errors=tuple(map(str, transition.errors)),
                not_before=None if valid else transition._not_before,
                recheck_seconds=recheck_seconds if isinstance(recheck, TypeDefault) else recheck,
            )
        except BaseException as error:  # user code: whatever it raises concerns this chain alone
            if ends_process(error):
                raise
            raise GuardFailed(name, f"{type(error).__name__}: {error}") from error
        verdicts.append(verdict)
        if valid:
            return Plan(snapshot.state, transition, tuple(verdicts))
    return Plan(snapshot.state, None, tuple(verdicts))
