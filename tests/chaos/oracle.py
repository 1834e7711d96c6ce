"""The oracle: whether a history, whatever was done to its processes, keeps DESIGN's promises I1 to I10.

It is fed with plain values (rows as they stood when all was quiet, the lines of the sink, what was observed while the
deployment healed) and knows nothing of how they came about.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Final, NamedTuple

NEW: Final = "new"
OPERATOR_MOVES: Final = frozenset({"moved", "reset", "mapped"})
MOVES: Final = OPERATOR_MOVES | {"state_transition"}
CLOSED: Final = frozenset({"delivered", "skipped", "cancelled"})
STOPPED: Final = frozenset({"dead", "held"})
MOVING: Final = frozenset({"delivered", "skipped"})
_BEGIN_SLACK: Final = timedelta(seconds=10)
_CLOCK_SLACK: Final = timedelta(milliseconds=20)


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
    resources: tuple[tuple[str, str], ...]
    state: str
    version: int
    moves: int
    disabled: bool = False
    pending_delivery_id: str | None = None


@dataclass(frozen=True)
class EventLine:
    """An event's row."""

    id: int
    chain_id: int
    chain_version: int
    action: str
    from_state: str | None = None
    to_state: str | None = None
    detail: str | None = None
    created_at: datetime | None = None


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


@dataclass(frozen=True)
class History:
    """All that the oracle judges."""

    graph: Graph
    expected: Mapping[tuple[str, tuple[tuple[str, str], ...]], int]
    """How often each (chain type, resources) was created by the driver; any positive number means one chain."""
    chains: Sequence[ChainLine]
    events: Sequence[EventLine]
    deliveries: Sequence[DeliveryLine]
    sink: Sequence[Mapping[str, Any]]
    lease_seconds: float
    healings: Sequence[Healing] = ()
    dumps: tuple[object, object] | None = None
    """Every row and key before and after a dry run of everything."""


@dataclass(frozen=True, order=True)
class Violation:
    """One broken promise."""

    promise: str
    chain_id: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.promise} chain {self.chain_id}: {self.what}"


@dataclass
class Report:
    """What the oracle found."""

    chains: int = 0
    moves: int = 0
    callbacks: int = 0
    repeated: int = 0
    """Second effects that I5 allows: each after an attempt that is known to have ended badly."""
    healing_seconds: float = 0.0
    promised_seconds: float = 0.0
    violations: list[Violation] = field(default_factory=list)

    def of(self, *promises: str) -> list[Violation]:
        """The violations of these promises."""
        return [violation for violation in self.violations if violation.promise in promises]

    @property
    def lost(self) -> int:
        """Chains, moves and callbacks that are missing, and work that did not go on."""
        return len(self.of("I3", "I7")) + len(self.of("I5-open", "progress"))

    @property
    def phantom(self) -> int:
        """Effects and moves that nobody owed."""
        return len(self.of("I1", "I2", "I4", "I6", "I8", "I9"))

    @property
    def doubled(self) -> int:
        """Effects that took place again where I5 does not allow it."""
        return len(self.of("I5-doubled"))


def judge(history: History) -> Report:
    """What is wrong with a history; an empty list of violations when nothing is."""
    report = Report(chains=len(history.chains))
    report.moves = sum(event.action == "state_transition" for event in history.events)
    report.callbacks = sum(line["phase"] == "effect" for line in history.sink)
    case = _Case(history)
    checks: Sequence[Callable[[_Case], Iterable[Violation]]] = (
        _walks, _states, _moves_of_deliveries, _effects_are_owed, _deliveries_ended, _versions,
        _population, _dry_run, _disabled, _healed, _progress,
    )  # fmt: skip
    for check in checks:
        report.violations += check(case)
    doubled, report.repeated = _doubled(case)
    report.violations = sorted(report.violations + doubled, key=lambda one: (one.promise, one.chain_id or 0))
    healed = [one for one in history.healings if one.seconds is not None]
    if healed:
        slowest = max(healed, key=lambda one: (one.seconds or 0) / one.promised_seconds)
        report.healing_seconds, report.promised_seconds = slowest.seconds or 0.0, slowest.promised_seconds
    return report


class _Case:
    """A history with its lines sorted by chain and delivery."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.chains = {chain.id: chain for chain in history.chains}
        self.events: dict[int, list[EventLine]] = defaultdict(list)
        for event in sorted(history.events, key=lambda one: (one.chain_version, one.id)):
            self.events[event.chain_id].append(event)
        self.deliveries: dict[int, list[DeliveryLine]] = defaultdict(list)
        for delivery in sorted(history.deliveries, key=lambda one: one.chain_version):
            self.deliveries[delivery.chain_id].append(delivery)
        self.by_id = {delivery.id: delivery for delivery in history.deliveries}
        self.effects: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.attempts: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = defaultdict(dict)
        for line in history.sink:
            if line["phase"] == "effect":
                self.effects[line["key"]].append(line)
            if "attempt" in line:
                self.attempts[line["delivery"], line["attempt"]].setdefault(line["phase"], line)

    def moves(self, chain_id: int) -> list[EventLine]:
        """The moves of a chain, in their order."""
        return [event for event in self.events[chain_id] if event.action in MOVES]

    def edge(self, chain: ChainLine, event: EventLine) -> Edge:
        return Edge(chain.chain_type, event.from_state or "", event.detail or "", event.to_state or "")


def _walks(case: _Case) -> Iterable[Violation]:
    for chain in case.history.chains:
        state = NEW
        for event in case.moves(chain.id):
            if event.from_state != state:
                yield Violation("I1", chain.id, f"goes on from {event.from_state!r}, but was in {state!r}")
            if event.action == "state_transition" and case.edge(chain, event) not in case.history.graph.edges:
                yield Violation("I1", chain.id, f"{event.from_state} -> {event.to_state} is no edge ({event.detail})")
            state = event.to_state or ""


def _states(case: _Case) -> Iterable[Violation]:
    for chain in case.history.chains:
        moves = case.moves(chain.id)
        last = moves[-1].to_state if moves else NEW
        if chain.state != last:
            yield Violation("I2", chain.id, f"is in {chain.state!r}, its history ends in {last!r}")
        counted = sum(event.action != "mapped" for event in moves)  # a mapping renames a state, and moves nothing
        if chain.moves != counted:
            yield Violation("I2", chain.id, f"counts {chain.moves} moves, its history has {counted}")


def _moves_of_deliveries(case: _Case) -> Iterable[Violation]:
    for chain in case.history.chains:
        owed = [delivery for delivery in case.deliveries[chain.id] if delivery.status in MOVING]
        moved = [
            event
            for event in case.moves(chain.id)
            if event.action == "state_transition" and case.edge(chain, event) not in case.history.graph.silent
        ]
        told = [(one.transition, one.from_state, one.to_state) for one in owed]
        seen = [(one.detail, one.from_state, one.to_state) for one in moved]
        if told != seen:
            missing = Counter(told) - Counter(seen)
            extra = Counter(seen) - Counter(told)
            yield Violation("I3", chain.id, f"deliveries without a move: {missing}; moves without a delivery: {extra}")
        elif any(event.chain_version <= one.chain_version for one, event in zip(owed, moved, strict=True)):
            yield Violation("I3", chain.id, "a move is older than the delivery that it ends")
        for delivery in owed:
            if delivery.status == "delivered" and not case.effects[delivery.key]:
                yield Violation("I3", chain.id, f"delivery {delivery.id} is delivered, and nothing was sent")


def _effects_are_owed(case: _Case) -> Iterable[Violation]:
    for key, effects in case.effects.items():
        for effect in effects:
            delivery = case.by_id.get(effect["delivery"])
            if delivery is None or delivery.key != key or delivery.chain_id != effect["chain"]:
                yield Violation("I4", effect["chain"], f"an effect with key {key} belongs to no delivery")


def _deliveries_ended(case: _Case) -> Iterable[Violation]:
    for delivery in case.history.deliveries:
        chain = case.chains.get(delivery.chain_id)
        waits = delivery.status == "pending" and chain is not None and chain.disabled
        if delivery.status not in CLOSED | STOPPED and not waits:
            yield Violation("I5-open", delivery.chain_id, f"delivery {delivery.id} ends as {delivery.status}")
        tied = chain is not None and chain.pending_delivery_id == delivery.id
        if tied == (delivery.status in CLOSED):
            yield Violation("I5-open", delivery.chain_id, f"{delivery.status} delivery {delivery.id}, tied: {tied}")
    for chain in case.history.chains:
        if chain.pending_delivery_id is not None and chain.pending_delivery_id not in case.by_id:
            yield Violation("I5-open", chain.id, f"waits for delivery {chain.pending_delivery_id}, which is no row")


def _doubled(case: _Case) -> tuple[list[Violation], int]:
    """Second effects that are not excused by how the attempt before ended, and how many are."""
    violations: list[Violation] = []
    excused = 0
    for effects in case.effects.values():
        for earlier, later in pairwise(effects):
            problem = _excuse_missing(case, earlier, later)
            if problem is None:
                excused += 1
            else:
                violations.append(Violation("I5-doubled", later["chain"], f"key {later['key']}: {problem}"))
    return violations, excused


def _excuse_missing(case: _Case, earlier: Mapping[str, Any], later: Mapping[str, Any]) -> str | None:
    before = (earlier["delivery"], earlier["attempt"])
    after = (later["delivery"], later["attempt"])
    if before == after:
        return f"two effects in attempt {before[1]} of delivery {before[0]}"
    told = case.attempts[before]
    if "raised" in told:
        return None
    if told.get("finished", {}).get("ok"):
        return f"again after attempt {before[1]} was recorded as delivered"
    first, second = told.get("begun"), case.attempts[after].get("begun")
    if first is None or second is None:
        return "an attempt that was not begun"
    apart = datetime.fromisoformat(second["at"]) - datetime.fromisoformat(first["at"])
    if abs(apart) + _CLOCK_SLACK < timedelta(seconds=case.history.lease_seconds):
        return f"again {apart.total_seconds():.3f} s after attempt {before[1]} began: within its lease"
    return None


def _versions(case: _Case) -> Iterable[Violation]:
    for chain in case.history.chains:
        for version, count in Counter(event.chain_version for event in case.moves(chain.id)).items():
            if count > 1:
                yield Violation("I6", chain.id, f"{count} moves with version {version}")
        for event in case.events[chain.id]:
            if event.chain_version > chain.version:
                problem = f"version {event.chain_version} in its history, {chain.version} in its row"
                yield Violation("I6", chain.id, problem)


def _population(case: _Case) -> Iterable[Violation]:
    found = Counter((chain.chain_type, chain.resources) for chain in case.history.chains)
    for identity in case.history.expected.keys() - found.keys():
        yield Violation("I7", None, f"{identity} is lost")
    for chain in case.history.chains:
        identity = (chain.chain_type, chain.resources)
        if identity not in case.history.expected:
            yield Violation("I7", chain.id, f"{identity} was created by nobody")
        if found[identity] > 1:
            yield Violation("I7", chain.id, f"{identity} exists {found[identity]} times")
        created = sum(event.action == "created" for event in case.events[chain.id])
        if created != 1:
            yield Violation("I7", chain.id, f"was created {created} times")


def _dry_run(case: _Case) -> Iterable[Violation]:
    if case.history.dumps is not None and case.history.dumps[0] != case.history.dumps[1]:
        yield Violation("I8", None, "a dry run left rows or keys that differ")


def _disabled(case: _Case) -> Iterable[Violation]:
    for chain in case.history.chains:
        since: EventLine | None = None
        for event in case.events[chain.id]:
            if event.action == "disabled":
                since = event
            elif event.action == "enabled":
                yield from _begun_while_disabled(case, chain.id, since, event)
                since = None
            elif event.action == "planned" and since is not None:
                yield Violation("I9", chain.id, f"planned at version {event.chain_version} while disabled")
        yield from _begun_while_disabled(case, chain.id, since, None)


def _begun_while_disabled(
    case: _Case, chain_id: int, since: EventLine | None, until: EventLine | None
) -> Iterable[Violation]:
    """Attempts that began well within the time; a transaction that was under way at its edge is not counted."""
    if since is None or since.created_at is None:
        return
    for delivery in case.deliveries[chain_id]:
        for number in range(1, delivery.attempt + 1):
            begun = case.attempts.get((delivery.id, number), {}).get("begun")
            if begun is None:
                continue
            at = datetime.fromisoformat(begun["at"])
            before_end = until is None or until.created_at is None or at < until.created_at
            if at > since.created_at + _BEGIN_SLACK and before_end:
                yield Violation("I9", chain_id, f"attempt {number} of {delivery.id} began while disabled")


def _healed(case: _Case) -> Iterable[Violation]:
    for one in case.history.healings:
        if one.seconds is None:
            yield Violation("I10", one.chain_id, f"{one.what} never went on")
        elif one.seconds > one.promised_seconds:
            problem = f"{one.what} went on after {one.seconds:.1f} s, promised are {one.promised_seconds:.1f} s"
            yield Violation("I10", one.chain_id, problem)


def _progress(case: _Case) -> Iterable[Violation]:
    """Every chain of this workload reaches a terminal state, unless a person must act or has acted."""
    for chain in case.history.chains:
        if chain.disabled or (chain.chain_type, chain.state) in case.history.graph.terminal:
            continue
        delivery = case.by_id.get(chain.pending_delivery_id or "")
        if delivery is None or delivery.status not in STOPPED:
            status = delivery.status if delivery else "none"
            yield Violation("progress", chain.id, f"rests in {chain.state!r} for ever (open delivery: {status})")
