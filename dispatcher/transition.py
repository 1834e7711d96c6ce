"""The class that users subclass: where a chain goes, whether it may go now, and what is called on the way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any, ClassVar

from dispatcher.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class ChainSnapshot:
    """What a transition sees of its chain: read-only values as of the evaluation."""

    id: int | None
    chain_type: str
    state: str
    resources: tuple[tuple[str, str], ...]
    created_at: datetime


class TypeDefault:
    """Marks an option that a transition leaves to its chain type."""

    def __repr__(self) -> str:
        return "TYPE_DEFAULT"


TYPE_DEFAULT = TypeDefault()


class Transition:
    """One way out of a state.

    A subclass gives `final_state` and `is_valid()`, and may give:

    - `callback(self, **callback_kwargs)`, an own callback, or `callback = None` for a move without one;
    - `build_context()`, the values a callback needs (`{}` here);
    - `initial_context`, a dict on the class that wins over every other context;
    - `date_next_update`, a date or datetime until which the chain rests after the move;
    - `retry`, a `RetryPolicy`; `recheck_seconds`, how soon a rejected candidate is asked again
      (0: every sweep; None: only when the chain is enqueued);
    - `verify(self) -> True | False | None`, asked after a worker died inside the callback: whether the
      effect took place (None: it cannot be told).

    An instance lives for one evaluation or one attempt. `self.chain` is a read-only snapshot, `self.context` always
    has `"resources"`, `self.now` is an aware datetime (guards never read the clock), and `self.idempotency_key`
    is set while a callback runs.
    """

    final_state: ClassVar[str]
    initial_context: ClassVar[Mapping[str, Any]] = {}
    retry: ClassVar[RetryPolicy] = RetryPolicy()
    recheck_seconds: ClassVar[float | TypeDefault | None] = TYPE_DEFAULT
    date_next_update: date | datetime | None = None
    callback: Callable[..., Any] | None
    verify: Callable[[], bool | None]

    def __init__(
        self, chain: ChainSnapshot, initial_context: Mapping[str, Any] | None = None, *, now: datetime | None = None
    ) -> None:
        self.chain = chain
        self.errors: list[str] = []
        self.now = now if now is not None else chain.created_at
        self.idempotency_key: str | None = None
        self.context: dict[str, Any] = {
            "resources": list(chain.resources),
            **(initial_context or {}),
            **type(self).initial_context,
        }
        self._not_before: datetime | None = None

    def is_valid(self) -> bool:
        """Whether the chain may take this transition now; append to `self.errors` why not."""
        raise NotImplementedError(f"{type(self).__name__} has no is_valid()")

    def build_context(self) -> dict[str, Any]:
        """What the callback needs, built when it is needed. Empty unless overridden."""
        return {}

    def not_before(self, when: date | datetime, reason: str) -> bool:
        """False, with `reason` in `self.errors`, while `self.now` is before `when`; True from then on.

        It also tells the sweep that the chain need not be looked at before `when`. A date or a naive datetime is
        taken as UTC.
        """
        moment = as_utc(when)
        if self.now >= moment:
            return True
        self.errors.append(reason)
        if self._not_before is None or moment < self._not_before:
            self._not_before = moment
        return False

    def to_dict(self) -> dict[str, Any]:
        """`{"errors": [...], "context": {...}, "final_state": str}`."""
        return {"errors": self.errors, "context": self.context, "final_state": self.final_state}

    def __str__(self) -> str:
        return f"<{type(self).__name__}>"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.final_state}>"


def as_utc(when: date | datetime) -> datetime:
    """The aware UTC datetime of `when`: a naive one is UTC, a date is its first moment."""
    if not isinstance(when, datetime):
        return datetime.combine(when, time.min, tzinfo=UTC)
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
