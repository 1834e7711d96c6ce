"""The contract of what counts the calls of rate limits, and the values that it takes and gives."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

from dispatcher.rates import Asked, RateLimit

LINE_SECONDS: Final = 6 * 3600.0
"""How far the places of a line may lie behind the moment at which its limit has room again."""

ROUNDING_SECONDS: Final = 0.001
"""Wait longer by this for a window, because rows store milliseconds."""

_PACE: Final = 0.95
"""Hand out places 5 % slower than the limit, so that small delays do not cause another refusal."""


class Kind(IntEnum):
    """How a limit refuses. KEYED: no room for the key. PLACE: wait at this place. FULL: there is no place left."""

    KEYED = 0
    PLACE = 1
    FULL = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """A refusal: by which limit, and the seconds to the place, or (without a place) to when the window has room."""

    limit: RateLimit
    seconds: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class Question:
    """A call that is asked about, and counted if `counting`.

    `delivery` names the call for keyed limits, `call` for the others: each question about a call has another `call`.
    """

    asked: Sequence[Asked]
    has_place: bool
    counting: bool = False
    delivery: str = ""
    call: str = ""

    def call_for(self, limit: RateLimit) -> str:
        """What the call is counted as."""
        return self.call if limit.key is None else self.delivery


class Counter(Protocol):
    """Counts calls in windows, and gives out places in lines."""

    def ask(self, question: Question) -> Answer | None:
        """None if every limit has room; with `counting` all of them have then counted the call, else none of them.

        A limit has room if it counted fewer than `amount` calls within its last period. One that counted this call
        before has room for it, and its window then begins with this call. If keyed limits refuse, the answer is the
        longest wait. Otherwise it is the first limit that refuses: one without room, or (without `has_place`) one for
        which others wait. The caller then gets the next free place.
        """


def name_of(asked: Asked) -> str:
    """The name under which the calls are counted. A key may be personal data, so it is hashed."""
    name = f"{asked.limit.name}/{asked.limit}"
    if asked.limit.key is None:
        return name
    return f"{name}/{hashlib.sha256((asked.key or '').encode(errors='surrogatepass')).hexdigest()}"


def pace_of(limit: RateLimit) -> float:
    """The seconds between two places in a line of an unkeyed limit."""
    return limit.seconds / limit.amount / _PACE
