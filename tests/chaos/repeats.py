"""I5: a second effect of one visit of a state has the same key, and an excuse."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from tests.chaos.case import Case, Line, begin_of
from tests.chaos.history import Violation

_RENEWED: Final = 0.75
"""The share of a lease that is left at least when a process stops renewing it."""

LAPSE: Final = 0.45
"""The share of a lease that an attempt is left alone after a relay saw that its lease had ended."""

_NOTICED: Final = 1.0
"""Seconds: the driver notices the end of a process, and the end of a stop, a little late."""


def judge_repeats(case: Case) -> tuple[list[Violation], int]:
    """Second effects that are not excused by how the attempt before ended, and how many are."""
    violations = list(_other_keys(case))
    excused = 0
    for effects in case.effects.values():
        # By their begins: the effect of a process that was stopped for long comes after that of its successor.
        in_order = sorted(effects, key=lambda effect: _begun_at(case, effect))
        for earlier, later in pairwise(in_order):
            problem = _excuse_missing(case, earlier, later)
            if problem is None:
                excused += 1
            else:
                violations.append(Violation("I5-doubled", later["chain"], f"key {later['key']}: {problem}"))
    return violations, excused


def _begun_at(case: Case, effect: Line) -> float:
    begun = case.attempts[begin_of(effect)].get("begun", effect)
    return float(begun["mono"])


def _other_keys(case: Case) -> Iterator[Violation]:
    """Two effects of the same transition in one visit of a state, with different keys: no provider can drop one."""
    keys: dict[tuple[int, int, str], set[str]] = defaultdict(set)
    for key, effects in case.effects.items():
        for effect in effects:
            delivery = case.by_id.get(effect["delivery"])
            if delivery is not None:
                keys[delivery.chain_id, case.visit(delivery), delivery.transition].add(key)
    for (chain_id, visit, transition), found in keys.items():
        if len(found) > 1:
            problem = f"{transition} took effect under {len(found)} keys in one visit (after {visit} moves)"
            yield Violation("I5-key", chain_id, problem)


def _excuse_missing(case: Case, earlier: Line, later: Line) -> str | None:
    """Why a second effect should not be there; None if its attempt had to be made.

    While the process of an attempt lives and reaches the database, it renews the attempt's lease, so that nobody else
    begins one, however long it takes.
    """
    before, after = begin_of(earlier), begin_of(later)
    if before == after:
        return f"two effects in begin {before[1]} of delivery {before[0]}"
    told = case.attempts[before]
    if "raised" in told:
        return None
    finished = told.get("finished", {})
    if finished.get("ok"):
        return f"begun again after begin {before[1]} was recorded as delivered"
    begun, again = told.get("begun"), case.attempts[after].get("begun")
    if begun is None or again is None:
        return "an attempt that was not begun"
    pid, since, until = earlier.get("pid", 0), begun["mono"], again["mono"]
    processes = case.history.processes
    death = processes.deaths.get(pid)
    if death is not None and death <= max(until, later["mono"]) + _NOTICED:
        return None
    lease = case.history.lease_seconds
    stopped = processes.stopped_seconds(pid, since, until)
    cut_off = sum(interval.overlap(since, until) for interval in processes.cut_off)
    if stopped + cut_off + _NOTICED >= lease * (_RENEWED + LAPSE):
        return None
    away = sum(interval.overlap(since, until) for interval in processes.outages)
    if finished.get("error") and away + _NOTICED >= lease * _RENEWED:
        return None  # it could not be recorded before its lease ended
    how = f"its end was not recorded ({finished.get('error') or 'taken over'})" if finished else "it had not ended"
    return (
        f"begun again {until - since:.3f} s after begin {before[1]}, whose process {pid} lived: {how}; "
        f"stopped for {stopped:.1f} s, cut off for {cut_off:.1f} s, the database away for {away:.1f} s"
    )
