"""A history, sorted for the oracle: by chain, by delivery, by attempt, and each call with what came before it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from tests.chaos.history import ChainLine, DeliveryLine, Edge, EventLine, History

OPERATOR_MOVES: Final = frozenset({"moved", "reset", "mapped"})
MOVES: Final = OPERATOR_MOVES | {"state_transition"}

Line: TypeAlias = Mapping[str, Any]
Begin: TypeAlias = tuple[str, int]
"""A delivery's id, and which of its begins: an attempt's number comes again after a deferral, this one never does."""


def begin_of(line: Line) -> Begin:
    """Which begin of which delivery a line of the sink is about."""
    return line["delivery"], line.get("begins", line["attempt"])


@dataclass(frozen=True)
class Call:
    """A callback that began."""

    line: Line
    turn: float
    """When its last look began; the call itself where no look came directly before it."""

    begun: Line | None
    """The begin of its attempt that the sink saw last."""

    loaded: float | None
    """When `load_context` returned the chain's facts to this thread last."""

    first: float
    """The first turn in its group: the first look or call after the begin, or after the load, that came last."""

    @property
    def at(self) -> float:
        """When the callback began."""
        return float(self.line["mono"])

    @property
    def pid(self) -> int:
        """The process that called."""
        return int(self.line["pid"])


@dataclass
class _Thread:
    """What a thread of a worker did last, while the sink is read from its beginning."""

    looks: dict[int, float] = field(default_factory=dict)
    loads: dict[int, float] = field(default_factory=dict)
    first: float | None = None
    last: Line | None = None


class Case:
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
        self.effects: dict[str, list[Line]] = defaultdict(list)
        self.attempts: dict[Begin, dict[str, Line]] = defaultdict(dict)
        self.begins: dict[str, list[int]] = defaultdict(list)
        self.calls: list[Call] = []
        self.threads: dict[tuple[int, int], _Thread] = defaultdict(_Thread)
        for line in history.sink:
            self._read(line)

    def _read(self, line: Line) -> None:
        phase, thread = line["phase"], self.threads[thread_of(line)]
        if phase == "effect":
            self.effects[line["key"]].append(line)
        if "attempt" in line:
            begin = begin_of(line)
            self.attempts[begin].setdefault(phase, line)
            if phase == "begun":
                self.begins[begin[0]].append(begin[1])
        if phase in ("begun", "loaded"):
            thread.first = None
        elif phase in ("looking", "calling") and thread.first is None:
            thread.first = line["mono"]
        if phase == "loaded":
            thread.loads.update(dict.fromkeys(line["chains"], line["mono"]))
        elif phase == "looking":
            thread.looks.setdefault(line["chain"], line["mono"])
        elif phase == "calling":
            begun = self.attempts[begin_of(line)].get("begun")
            turn = thread.looks.get(line["chain"], line["mono"])
            first = min(turn, turn if thread.first is None else thread.first)
            self.calls.append(Call(line, turn, begun, thread.loads.get(line["chain"]), first))
        if phase in ("begun", "calling", "returned", "raised"):
            # A look counts for the call that comes next. With another callback between them it is no last look.
            thread.looks.clear()
        thread.last = line

    def moves(self, chain_id: int) -> list[EventLine]:
        """The moves of a chain, in their order."""
        return [event for event in self.events[chain_id] if event.action in MOVES]

    def visit(self, delivery: DeliveryLine) -> int:
        """Which visit of a state a delivery was planned in: the number of the chain's moves before it."""
        moves: Sequence[EventLine] = self.moves(delivery.chain_id)
        return sum(event.chain_version <= delivery.chain_version and event.action != "mapped" for event in moves)

    def edge(self, chain: ChainLine, event: EventLine) -> Edge:
        """The transition that an event says a chain has taken."""
        return Edge(chain.chain_type, event.from_state or "", event.detail or "", event.to_state or "")

    def was_stopped(self, pid: int, since: float, until: float) -> bool:
        """Whether a process was stopped for a noticeable time between two moments."""
        return self.history.processes.stopped_seconds(pid, since, until) > 0.0


def thread_of(line: Line) -> tuple[int, int]:
    """The process and the thread that wrote a line."""
    return line.get("pid", 0), line.get("thread", 0)
