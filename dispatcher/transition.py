"""`Transition`: the class that users subclass to say where a chain goes, when, and with which callback."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any, ClassVar

from dispatcher.bounds import EARLIEST, LATEST, bounded
from dispatcher.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class ChainSnapshot:
    """The read-only values of a chain that its transitions see, as they were when the chain was read."""

    id: int | None
    chain_type: str
    state: str
    resources: tuple[tuple[str, str], ...]
    created_at: datetime


class TypeDefault:
    """Marks an option of a transition that is not set, so that the chain type's option is used."""

    def __repr__(self) -> str:
        return "TYPE_DEFAULT"


TYPE_DEFAULT = TypeDefault()


class Transition:
    """A step from one state to another, with the guard that allows it.

    A subclass gives `final_state` and `is_valid()`, and may give:

    - `callback(self, **callback_kwargs)`, the callback of this transition, or `callback = None` to move without one;
    - `build_context()`, the values that the callback needs (defaults to `{}`);
    - `initial_context`, a dict on the class that wins over every other context;
    - `date_next_update`, a date or datetime until which the chain rests after the move;
    - `retry`, a `RetryPolicy`; `recheck_seconds`, how soon a rejected candidate is asked again
      (0: every sweep; None: only when the chain is enqueued);
    - `verify(self) -> True | False | None`, called after a worker died inside the callback: whether the
      effect took place (None: unknown).

    An instance is used for one evaluation or one attempt. `self.chain` is a read-only snapshot, `self.context` always
    has `"resources"`, and `self.now` is an aware datetime (guards must not read the clock). `self.idempotency_key` is
    set while a callback runs.
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
        """Whether the chain may take this transition now. If not, append the reasons to `self.errors`."""
        raise NotImplementedError(f"{type(self).__name__} has no is_valid()")

    def build_context(self) -> dict[str, Any]:
        """The values that the callback needs; call it when they are needed. Empty unless overridden."""
        return {}

    def not_before(self, when: date | datetime, reason: str) -> bool:
        """False, with `reason` in `self.errors`, while `self.now` is before `when`; True from then on.

        Until `when` the sweep need not ask this transition again. A date or a naive datetime means UTC.
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
    """`when` as an aware UTC datetime. A naive datetime means UTC; a date means its first moment.

    A moment that some database cannot store becomes the nearest one that all can: `datetime.max` means "never".
    """
    if not isinstance(when, datetime):
        moment = datetime.combine(when, time.min, tzinfo=UTC)
    elif when.tzinfo is None:
        moment = when.replace(tzinfo=UTC)
    else:
        try:
            moment = when.astimezone(UTC)
        except OverflowError:  # within a day of the first or the last moment that Python knows
            moment = EARLIEST if when.year == 1 else LATEST
    return bounded(moment)
