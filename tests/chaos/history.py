"""What the oracle is fed with: plain values, from which it judges a run whatever was done to its processes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

from dispatcher.domain.hours import DeliveryHours

Resources: TypeAlias = tuple[tuple[str, str], ...]


class Edge(NamedTuple):
    """One transition of a chain type."""

    chain_type: str
    from_state: str
    transition: str
    to_state: str


@dataclass(frozen=True)
class Graph:
    """The graphs of all chain types: their edges, those without a callback, and `(chain type, terminal state)`."""

    edges: frozenset[Edge]
    silent: frozenset[Edge] = frozenset()
    terminal: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class ChainLine:
    """A chain's row."""

    id: int
    chain_type: str
    resources: Resources
    state: str
    version: int
    moves: int
    disabled: bool = False
    pending_delivery_id: str | None = None
    created_at: datetime | None = None


@dataclass(frozen=True)
class EventLine:
    """An event's row. `mono` is CLOCK_MONOTONIC at its `created_at`, where that is known."""

    id: int
    chain_id: int
    chain_version: int
    action: str
    from_state: str | None = None
    to_state: str | None = None
    detail: str | None = None
    mono: float | None = None


@dataclass(frozen=True)
class DeliveryLine:
    """A delivery's row."""

    id: str
    key: str
    chain_id: int
    chain_version: int
    transition: str
    from_state: str
    to_state: str
    status: str
    attempt: int = 1


@dataclass(frozen=True)
class Healing:
    """How long something that was due when the faults ended took to go on, against what was promised for it."""

    what: str
    chain_id: int
    seconds: float | None
    """None: it did not until the end of the run."""
    promised_seconds: float


# --- the moment of a call --------------------------------------------------------------------------------------------

# All moments below are CLOCK_MONOTONIC seconds, as in the sink.


@dataclass(frozen=True)
class Act:
    """What an operator did to the chains of a resource, or to a chain type, committed between two moments.

    `certain` is False where the call ended in an error: it may or may not have been committed.
    """

    kind: str
    """`disable`, `enable`, `pause` or `resume`."""
    subject: Resources | str
    before: float
    after: float
    certain: bool = True


@dataclass(frozen=True)
class Interval:
    """From one moment to another."""

    since: float
    until: float = math.inf

    def overlap(self, since: float, until: float) -> float:
        """How many of the seconds between these moments are within."""
        return max(0.0, min(self.until, until) - max(self.since, since))


@dataclass(frozen=True)
class Limit:
    """At most `amount` calls of these chain types within any period of `seconds`."""

    name: str
    amount: int
    seconds: float
    chain_types: frozenset[str]


@dataclass(frozen=True)
class Question:
    """A guard, and two windows of time: whether it said yes for facts and a `now` of any moments within them.

    `facts` and `now` are `(first, last)` moments; the caller allows for slow processes in them.
    """

    chain: ChainLine
    from_state: str
    transition: str
    facts: tuple[float, float]
    now: tuple[float, float]


Truth: TypeAlias = Callable[[Question], bool]


def always_true(_: Question) -> bool:
    """The truth of guards that never say no."""
    return True


@dataclass(frozen=True)
class Rules:
    """What must hold at the moment of a call, and what is known of the run that excuses exceptions."""

    truth: Truth = always_true
    hours: Mapping[str, DeliveryHours] = field(default_factory=dict)
    """The delivery hours, by chain type, in UTC."""

    domain_at: Callable[[float], datetime] | None = None
    """Domain time at a moment; None: hours are not checked."""

    mono_at_machine: Callable[[datetime], float] | None = None
    """The moment when the database's clock showed this; None: begins are not checked."""

    limits: Sequence[Limit] = ()
    rates_lost: str = ""
    """Why rates cannot be checked in this run: what happened to the server that counts. Empty: they are checked."""

    late_seconds: float = 0.0
    """How late an answer of Redis or of the database may come in this run, beside what a busy machine adds."""


@dataclass(frozen=True)
class Processes:
    """What was seen of the run's processes from outside."""

    deaths: Mapping[int, float] = field(default_factory=dict)
    """When the driver first noticed that a process was gone, by pid."""

    stops: Mapping[int, Sequence[Interval]] = field(default_factory=dict)
    """When a process was stopped by SIGSTOP, by pid."""

    cut_off: Sequence[Interval] = ()
    """When no worker reached the database, while something else did that takes over attempts."""

    outages: Sequence[Interval] = ()
    """When nobody reached the database, or no worker did."""

    def stopped_seconds(self, pid: int, since: float, until: float) -> float:
        """For how many seconds between these moments a process was stopped."""
        return sum(interval.overlap(since, until) for interval in self.stops.get(pid, ()))


@dataclass(frozen=True)
class History:
    """All that the oracle judges."""

    graph: Graph
    expected: Mapping[tuple[str, Resources], int]
    """How often each (chain type, resources) was created by the driver; any positive number means one chain."""
    chains: Sequence[ChainLine]
    events: Sequence[EventLine]
    deliveries: Sequence[DeliveryLine]
    sink: Sequence[Mapping[str, Any]]
    lease_seconds: float
    healings: Sequence[Healing] = ()
    dumps: tuple[object, object] | None = None
    """Every row and key before and after a dry run of everything."""
    acts: Sequence[Act] = ()
    rules: Rules = field(default_factory=Rules)
    processes: Processes = field(default_factory=Processes)


@dataclass(frozen=True, order=True)
class Violation:
    """One broken promise."""

    promise: str
    chain_id: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.promise} chain {self.chain_id}: {self.what}"
