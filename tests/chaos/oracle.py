"""The oracle: whether a history, whatever was done to its processes, keeps DESIGN's promises I1 to I11.

It is fed with plain values (`history`: rows as they stood when all was quiet, the lines of the sink, what the driver
did and saw) and knows nothing of how they came about. I5's second effects are judged in `repeats`, I9 in `refusals`,
I11 in `moments`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.chaos.case import Case
from tests.chaos.history import History, Violation
from tests.chaos.moments import judge_moments
from tests.chaos.refusals import judge_refusals
from tests.chaos.repeats import judge_repeats

NEW: Final = "new"
CLOSED: Final = frozenset({"delivered", "skipped", "cancelled"})
STOPPED: Final = frozenset({"dead", "held"})
MOVING: Final = frozenset({"delivered", "skipped"})


@dataclass
class Report:
    """What the oracle found."""

    chains: int = 0
    moves: int = 0
    callbacks: int = 0
    repeated: int = 0
    """Second effects that I5 allows: each after an attempt that is known to have ended badly."""
    guards_checked: int = 0
    """Calls whose guard was asked again by the oracle, with the facts of the moment."""
    unknown: int = 0
    """Calls whose guard need not have said yes: the row says that an attempt before them may have had the effect."""
    mistaken: int = 0
    """Those of them whose guard said no although no attempt before them had called."""
    hours_checked: int = 0
    rates_checked: int = 0
    rates_skipped: str = ""
    """Why the rates of this run could not be checked; empty when they were."""
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
        return len(self.of("I5-doubled", "I5-key"))

    @property
    def untimely(self) -> int:
        """Callbacks that began although guard, hours or rate said no at that moment."""
        return len(self.of("I11"))


def judge(history: History) -> Report:
    """What is wrong with a history; an empty list of violations when nothing is."""
    report = Report(chains=len(history.chains))
    report.moves = sum(event.action == "state_transition" for event in history.events)
    report.callbacks = sum(line["phase"] == "effect" for line in history.sink)
    case = Case(history)
    checks: Sequence[Callable[[Case], Iterable[Violation]]] = (
        _walks, _states, _moves_of_deliveries, _effects_are_owed, _deliveries_ended, _versions,
        _population, _dry_run, judge_refusals, _healed, _progress,
    )  # fmt: skip
    for check in checks:
        report.violations += check(case)
    doubled, report.repeated = judge_repeats(case)
    moments = judge_moments(case)
    report.guards_checked, report.unknown, report.mistaken = moments.guards_checked, moments.unknown, moments.mistaken
    report.hours_checked, report.rates_checked = moments.hours_checked, moments.rates_checked
    report.rates_skipped = history.rules.rates_lost
    found = report.violations + doubled + moments.violations
    report.violations = sorted(found, key=lambda one: (one.promise, one.chain_id or 0))
    healed = [one for one in history.healings if one.seconds is not None]
    if healed:
        slowest = max(healed, key=lambda one: (one.seconds or 0) / one.promised_seconds)
        report.healing_seconds, report.promised_seconds = slowest.seconds or 0.0, slowest.promised_seconds
    return report


def _walks(case: Case) -> Iterable[Violation]:
    for chain in case.history.chains:
        state = NEW
        for event in case.moves(chain.id):
            if event.from_state != state:
                yield Violation("I1", chain.id, f"goes on from {event.from_state!r}, but was in {state!r}")
            if event.action == "state_transition" and case.edge(chain, event) not in case.history.graph.edges:
                yield Violation("I1", chain.id, f"{event.from_state} -> {event.to_state} is no edge ({event.detail})")
            state = event.to_state or ""


def _states(case: Case) -> Iterable[Violation]:
    for chain in case.history.chains:
        moves = case.moves(chain.id)
        last = moves[-1].to_state if moves else NEW
        if chain.state != last:
            yield Violation("I2", chain.id, f"is in {chain.state!r}, its history ends in {last!r}")
        counted = sum(event.action != "mapped" for event in moves)  # a mapping renames a state, and moves nothing
        if chain.moves != counted:
            yield Violation("I2", chain.id, f"counts {chain.moves} moves, its history has {counted}")


def _moves_of_deliveries(case: Case) -> Iterable[Violation]:
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


def _effects_are_owed(case: Case) -> Iterable[Violation]:
    for key, effects in case.effects.items():
        for effect in effects:
            delivery = case.by_id.get(effect["delivery"])
            if delivery is None or delivery.key != key or delivery.chain_id != effect["chain"]:
                yield Violation("I4", effect["chain"], f"an effect with key {key} belongs to no delivery")


def _deliveries_ended(case: Case) -> Iterable[Violation]:
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


def _versions(case: Case) -> Iterable[Violation]:
    for chain in case.history.chains:
        for version, count in Counter(event.chain_version for event in case.moves(chain.id)).items():
            if count > 1:
                yield Violation("I6", chain.id, f"{count} moves with version {version}")
        for event in case.events[chain.id]:
            if event.chain_version > chain.version:
                problem = f"version {event.chain_version} in its history, {chain.version} in its row"
                yield Violation("I6", chain.id, problem)


def _population(case: Case) -> Iterable[Violation]:
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


def _dry_run(case: Case) -> Iterable[Violation]:
    if case.history.dumps is not None and case.history.dumps[0] != case.history.dumps[1]:
        yield Violation("I8", None, "a dry run left rows or keys that differ")


def _healed(case: Case) -> Iterable[Violation]:
    for one in case.history.healings:
        if one.seconds is None:
            yield Violation("I10", one.chain_id, f"{one.what} never went on")
        elif one.seconds > one.promised_seconds:
            problem = f"{one.what} went on after {one.seconds:.1f} s, promised are {one.promised_seconds:.1f} s"
            yield Violation("I10", one.chain_id, problem)


def _progress(case: Case) -> Iterable[Violation]:
    """Every chain of this workload reaches a terminal state, unless a person must act or has acted."""
    for chain in case.history.chains:
        if chain.disabled or (chain.chain_type, chain.state) in case.history.graph.terminal:
            continue
        delivery = case.by_id.get(chain.pending_delivery_id or "")
        if delivery is None or delivery.status not in STOPPED:
            status = delivery.status if delivery else "none"
            yield Violation("progress", chain.id, f"rests in {chain.state!r} for ever (open delivery: {status})")
