"""I9: a disabled chain and a paused type begin nothing, measured by the moments at which that was committed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final

from tests.chaos.case import Call, Case
from tests.chaos.history import Act, ChainLine, Interval, Violation
from tests.chaos.moments import CLOCK_SECONDS, FACTS_SECONDS, SLACK_SECONDS

PAUSE_SECONDS: Final = 2.0
"""A pause is known to every worker after this."""

_BEGINS: Final = frozenset({"disable", "pause"})


def judge_refusals(case: Case) -> Iterator[Violation]:
    """What was planned, begun or called of chains that were disabled, or whose type was paused."""
    off = intervals(case.history.acts)
    calls: dict[int, list[Call]] = defaultdict(list)
    for call in case.calls:
        calls[call.line["chain"]].append(call)
    begins: dict[int, list[Any]] = defaultdict(list)
    for told in case.attempts.values():
        if "begun" in told:
            begins[told["begun"]["chain"]].append(told["begun"])
    for chain in case.history.chains:
        yield from _planned_while_disabled(case, chain)
        for interval in off.get(chain.resources, ()):
            yield from _begun(case, chain, "it was disabled", interval, begins[chain.id])
            yield from _called(case, chain, "it was disabled", interval, calls[chain.id])
        for interval in off.get(chain.chain_type, ()):
            late = case.history.rules.late_seconds
            known = Interval(interval.since + PAUSE_SECONDS + SLACK_SECONDS + late, interval.until)
            # A begin does not ask it. What is begun of a paused type must go back without a call.
            called = [call.begun for call in calls[chain.id] if call.begun is not None]
            yield from _begun(case, chain, "its pause was known", known, called)
            yield from _called(case, chain, "its pause was known", known, calls[chain.id])
            yield from _planned_while_paused(case, chain, known)


def intervals(acts: Sequence[Act]) -> dict[object, list[Interval]]:
    """When each subject certainly was disabled or paused: from the end of that call to the beginning of the next."""
    found: dict[object, list[Interval]] = defaultdict(list)
    since: dict[object, float] = {}
    for act in sorted(acts, key=lambda one: one.before):
        if act.kind in _BEGINS:
            if act.certain:
                since.setdefault(act.subject, act.after)
        elif act.subject in since:
            found[act.subject].append(Interval(since.pop(act.subject), act.before))
    for subject, moment in since.items():
        found[subject].append(Interval(moment))
    return found


def _planned_while_disabled(case: Case, chain: ChainLine) -> Iterator[Violation]:
    """By versions, which order a chain's history whatever the clocks say."""
    disabled = False
    for event in case.events[chain.id]:
        if event.action in ("disabled", "enabled"):
            disabled = event.action == "disabled"
        elif event.action == "planned" and disabled:
            yield Violation("I9", chain.id, f"planned at version {event.chain_version} while disabled")


def _planned_while_paused(case: Case, chain: ChainLine, paused: Interval) -> Iterator[Violation]:
    for event in case.events[chain.id]:
        silent = event.action == "state_transition" and case.edge(chain, event) in case.history.graph.silent
        if event.mono is None or not (event.action == "planned" or silent):
            continue
        if paused.since < event.mono < paused.until:
            yield Violation(
                "I9", chain.id, f"{event.action} {event.mono - paused.since:.3f} s after its pause was known"
            )


def _begun(case: Case, chain: ChainLine, what: str, off: Interval, begins: Iterable[Any]) -> Iterator[Violation]:
    """A begin asks in its own statement, so it may not be later at all."""
    mono_at = case.history.rules.mono_at_machine
    if mono_at is None:
        return
    for line in begins:
        at = mono_at(datetime.fromisoformat(line["at"]))
        stopped = case.was_stopped(line["pid"], off.since - PAUSE_SECONDS, line["mono"])
        if off.since + CLOCK_SECONDS < at < off.until - CLOCK_SECONDS and not stopped:
            problem = f"attempt {line['attempt']} of {line['delivery']} began {at - off.since:.3f} s after {what}"
            yield Violation("I9", chain.id, problem)


def _called(case: Case, chain: ChainLine, what: str, off: Interval, calls: Iterable[Call]) -> Iterator[Violation]:
    """Within a group a call may be a second late, counted from the return of the group's load, or its first turn."""
    for call in calls:
        latest = max(off.since, call.first, call.loaded or call.first) + FACTS_SECONDS + SLACK_SECONDS
        if not (latest < call.turn and call.at < off.until):
            continue
        begun = call.begun["mono"] if call.begun is not None else off.since
        if not case.was_stopped(call.pid, min(begun, off.since), call.at):
            problem = (
                f"attempt {call.line['attempt']} of {call.line['delivery']} had its turn "
                f"{call.turn - off.since:.3f} s after {what}"
            )
            yield Violation("I9", chain.id, problem)
