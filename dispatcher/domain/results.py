"""The results of executing a chain and of an attempt at a delivery, as values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dispatcher.domain.records import MAX_DETAIL
from dispatcher.states import AttemptOutcome, Outcome
from dispatcher.transition import Transition


@dataclass(frozen=True, slots=True)
class ChainResult:
    """The result of executing one chain.

    `transition` is the winner, or None. `delivery_id` is the delivery that was planned for the winner. `error` is the
    error that a guard raised.
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
class AttemptResult:
    """The result of one attempt. `retry_seconds` is set if the next attempt is near enough for a Celery retry."""

    delivery_id: str
    attempt: int
    outcome: AttemptOutcome
    chain_id: int | None = None
    transition: str | None = None
    detail: str = ""
    retry_seconds: float | None = None

    @property
    def next_attempt(self) -> int:
        """The number of the next attempt. It is the same again after a deferral, which uses up no attempt."""
        return self.attempt if self.outcome == AttemptOutcome.DEFERRED else self.attempt + 1


def reasons_text(errors: Mapping[str, Sequence[str]]) -> str:
    """The rejections `{str(transition): [reasons]}` as one line of text."""
    return json.dumps(errors, ensure_ascii=False)[:MAX_DETAIL]
