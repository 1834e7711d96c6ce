"""Evaluates a chain: asks its candidates and gives the plan. Pure, without I/O and without a clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from dispatcher.errors import DispatcherError, ends_process
from dispatcher.transition import ChainSnapshot, Transition, TypeDefault


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
class Plan:
    """The result of one evaluation: the winner or None, and the verdicts of all candidates that were asked.

    `winner` is the same object whose `is_valid()` returned True.
    """

    state: str
    winner: Transition | None
    verdicts: tuple[Verdict, ...]

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
) -> Plan:
    """The plan for a chain: the candidates are asked in order, and the first valid candidate wins.

    Later candidates are not asked. `context` is the merged context. Each candidate adds the `initial_context` of its
    class, which wins. `recheck_seconds` is the chain type's. Raises `GuardFailed` from the error of a guard.
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
        except BaseException as error:  # user code: its error must fail this chain only
            if ends_process(error):
                raise
            raise GuardFailed(name, f"{type(error).__name__}: {error}") from error
        verdicts.append(verdict)
        if valid:
            return Plan(snapshot.state, transition, tuple(verdicts))
    return Plan(snapshot.state, None, tuple(verdicts))
