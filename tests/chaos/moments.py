"""I11: what must hold at the moment of a call: its guard, its delivery hours, its rate."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.chaos.case import Call, Case, begin_of, thread_of
from tests.chaos.history import Limit, Question, Violation

FACTS_SECONDS: Final = 1.0
"""Facts may be this old when an attempt has its turn."""

SLACK_SECONDS: Final = 0.3
"""Between the lines that the sink has for a load, a look and a call, on a machine where others work, too."""

CLOCK_SECONDS: Final = 0.1
"""Between what the library saw of a clock and the call, on such a machine."""

_IN_USER_CODE: Final = frozenset({"loading", "looking", "calling", "effect"})
_STRUCK_IN_USER_CODE: Final = frozenset({"in_load", "in_look", "before_call", "after_call"})


@dataclass
class Moments:
    """What is wrong with the moments of a history's calls, and how much was looked at."""

    violations: list[Violation] = field(default_factory=list)
    guards_checked: int = 0
    unknown: int = 0
    """Calls whose guard need not have said yes, because the row says that an attempt may have had the effect."""

    mistaken: int = 0
    """Those of them whose guard said no although no attempt before them had called, so that nothing was unknown."""

    stopped: int = 0
    """Calls that are not judged, because their process was stopped between its look and its call."""

    hours_checked: int = 0
    rates_checked: int = 0


def judge_moments(case: Case) -> Moments:
    """What is wrong with the moments of the calls."""
    found = Moments()
    for call in case.calls:
        _judge_guard(case, call, found)
        _judge_hours(case, call, found)
    rules = case.history.rules
    if not rules.rates_lost:
        for limit in rules.limits:
            calls = [call for call in case.calls if call.line["type"] in limit.chain_types]
            found.rates_checked += len(calls)
            found.violations += _too_many(case, limit, calls)
    return found


# --- guards ----------------------------------------------------------------------------------------------------------


def _judge_guard(case: Case, call: Call, found: Moments) -> None:
    chain = case.chains.get(call.line["chain"])
    if chain is None:  # I4 says so
        return
    oldest = call.turn - FACTS_SECONDS - SLACK_SECONDS
    begun = call.begun["mono"] if call.begun is not None else call.turn
    # `now` is that of the begin: what changes for the worse in the time that a loader takes is a matter of facts.
    now = (min(oldest, begun - SLACK_SECONDS), call.at)
    question = Question(chain, call.line["state"], call.line["transition"], (oldest, call.at), now)
    if call.line["unknown"]:
        found.unknown += 1
        found.mistaken += never_called_before(case, call) and not case.history.rules.truth(question)
    elif case.was_stopped(call.pid, min(oldest, begun), call.at):
        found.stopped += 1
    else:
        found.guards_checked += 1
        if not case.history.rules.truth(question):
            problem = (
                f"{call.line['transition']} was called {call.at - call.turn:.3f} s after its turn, "
                f"{_since_load(call)}, although its guard had said no for a second: {_named(call)}"
            )
            found.violations.append(Violation("I11", chain.id, problem))


def never_called_before(case: Case, call: Call) -> bool:
    """Whether no attempt at the delivery before this one can have begun its callback.

    Each was ended before its turn came, or died while its thread was in other user code: in a loader, in a guard, or
    in the callback of another delivery of its group.
    """
    delivery_id, own = begin_of(call.line)
    before = [number for number in case.begins[delivery_id] if number < own]
    return bool(before) and all(_not_called(case, (delivery_id, number)) for number in before)


def _not_called(case: Case, begin: tuple[str, int]) -> bool:
    told = case.attempts[begin]
    if "calling" in told:
        return False
    begun = told["begun"]
    last = case.threads[thread_of(begun)].last
    if last is None or begun["pid"] not in case.history.processes.deaths:
        return False
    if last["phase"] == "struck":
        return last["point"] in _STRUCK_IN_USER_CODE
    return last["phase"] in _IN_USER_CODE


# --- hours -----------------------------------------------------------------------------------------------------------


def _judge_hours(case: Case, call: Call, found: Moments) -> None:
    rules = case.history.rules
    hours = rules.hours.get(call.line["type"])
    if hours is None or rules.domain_at is None:
        return
    allowed = CLOCK_SECONDS + rules.late_seconds
    if case.was_stopped(call.pid, call.turn - allowed, call.at):
        return
    found.hours_checked += 1
    clocks = [rules.domain_at(at).time() for at in (call.at, call.at - allowed)]
    if not any(clock in hours for clock in clocks):
        problem = f"called at {clocks[0]:%H:%M:%S.%f}, outside {hours.start:%H:%M}-{hours.end:%H:%M}: {_named(call)}"
        found.violations.append(Violation("I11", call.line["chain"], problem))


# --- rates -----------------------------------------------------------------------------------------------------------


def _too_many(case: Case, limit: Limit, calls: list[Call]) -> Iterator[Violation]:
    """A limit counts a call a moment before it takes place, so a window that is that much shorter must hold."""
    allowed = CLOCK_SECONDS + case.history.rules.late_seconds
    counted = sorted(
        (call for call in calls if not case.was_stopped(call.pid, call.turn - allowed, call.at)),
        key=lambda call: call.at,
    )
    number = 0
    while number + limit.amount < len(counted):
        first, last = counted[number], counted[number + limit.amount]
        if last.at - first.at >= limit.seconds - allowed:
            number += 1
            continue
        problem = (
            f"limit {limit.name}: {limit.amount + 1} calls within {last.at - first.at:.3f} s, at most {limit.amount} "
            f"may be within {limit.seconds:g} s; the last: {_named(last)}"
        )
        yield Violation("I11", last.line["chain"], problem)
        number += limit.amount + 1


def _since_load(call: Call) -> str:
    if call.loaded is None:
        return "no facts loaded"
    return f"{call.turn - call.loaded:.3f} s after its facts were loaded"


def _named(call: Call) -> str:
    line = call.line
    return f"attempt {line['attempt']} of delivery {line['delivery']} at {call.at:.3f} in process {call.pid}"
