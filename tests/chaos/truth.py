"""What is true when: the facts of a chain at any moment, and what each guard says of them.

Loaders and guards ask here while the run goes on, and the oracle asks again afterwards, for the moments of the calls.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from tests.chaos.history import ChainLine, Question
from tests.chaos.profile import Profile

YOUNG: Final = timedelta(seconds=20)
OLD: Final = timedelta(seconds=60)
_SLOT_SECONDS: Final = 5
_FACTS_STEP: Final = 0.05
_NOW_STEP: Final = 0.25
_PAYING: Final = 0.35
_FIRST_PAYMENT: Final = 8.0
_LAST_PAYMENT: Final = 60.0


@dataclass(frozen=True)
class Candidate:
    """One way out of a state, as it was drawn."""

    name: str
    to_state: str
    kind: str
    probability: float = 1.0
    wait_seconds: float = 0.0
    back: bool = False
    silent: bool = False
    verified: bool = False


@dataclass(frozen=True)
class Drawn:
    """One chain type, as it was drawn."""

    name: str
    states: Mapping[str, tuple[Candidate, ...]]
    options: Mapping[str, Any]


def chance(*parts: object) -> float:
    """A number from [0, 1) that depends on nothing but `parts`."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def facts_at(profile: Profile, chain_id: int, mono: float) -> dict[str, bool]:
    """The facts of a chain at a moment: `open` comes and goes within seconds, `paid` comes once and stays.

    A chain is open in every fourth of its slots at least, so that its guards say yes again and again.
    """
    seed, passed = profile.seed, mono - profile.began
    slot_seconds = 1.5 + 1.5 * chance(seed, "slot", chain_id)
    slot = int(passed / slot_seconds + chance(seed, "phase", chain_id))
    pays_at = _FIRST_PAYMENT + (_LAST_PAYMENT - _FIRST_PAYMENT) * chance(seed, "pays at", chain_id)
    return {
        "open": slot % 4 == 3 or chance(seed, "open", chain_id, slot) < 0.5,
        "paid": chance(seed, "pays", chain_id) < _PAYING and passed >= pays_at,
    }


def answer(
    seed: int,
    chain_type: str,
    candidate: Candidate,
    *,
    chain_id: int | None,
    created_at: datetime,
    now: datetime,
    facts: Mapping[str, Any],
    asked: bool,
) -> bool:
    """What a candidate's guard says. Now and then it raises `ValueError`."""
    age = now - created_at
    slot = int(now.timestamp()) // _SLOT_SECONDS
    drawn = chance(seed, chain_type, candidate.name, chain_id, slot)
    if age < OLD and chance(drawn, "raises") < 0.01:
        raise ValueError("a guard that raises sometimes")
    if candidate.back and age > YOUNG:
        return False
    return {
        "always": True,
        "never": False,
        "asked": asked,
        "wait": age >= timedelta(seconds=candidate.wait_seconds),
        "chance": drawn < candidate.probability or (not candidate.back and age > OLD),
        "open": bool(facts.get("open")),
        "paid": bool(facts.get("paid")),
    }[candidate.kind]


class GuardTruth:
    """Whether a transition won at a moment of a window, by the facts and the domain time of the run.

    `ordered` is False where workers of two versions order the candidates differently: then only the transition's own
    guard is asked.
    """

    def __init__(self, profile: Profile, types: list[Drawn], *, ordered: bool = True) -> None:
        self._profile = profile
        self._types = {drawn.name: drawn for drawn in types}
        self._ordered = ordered

    def __call__(self, question: Question) -> bool:
        facts = {
            tuple(sorted(facts_at(self._profile, question.chain.id, moment).items()))
            for moment in _samples(*question.facts, _FACTS_STEP)
        }
        moments = [self._profile.domain_at(moment) for moment in _samples(*question.now, _NOW_STEP)]
        return any(self._wins(question, dict(found), now) for found in facts for now in moments)

    def _wins(self, question: Question, facts: Mapping[str, bool], now: datetime) -> bool:
        drawn = self._types[question.chain.chain_type]
        for candidate in drawn.states[question.from_state]:
            said = self._said(question.chain, candidate, facts, now)
            if candidate.name == question.transition:
                return said is not False
            if said and self._ordered:
                return False
        return True

    def _said(self, chain: ChainLine, candidate: Candidate, facts: Mapping[str, bool], now: datetime) -> bool | None:
        """What a guard said; None where that is not known, because it hangs on a request, or because it raised."""
        if candidate.kind == "asked" or chain.created_at is None:
            return None
        try:
            return answer(
                self._profile.seed,
                chain.chain_type,
                candidate,
                chain_id=chain.id,
                created_at=chain.created_at,
                now=now,
                facts=facts,
                asked=False,
            )
        except ValueError:
            return None


def _samples(first: float, last: float, step: float) -> Iterator[float]:
    count = int((last - first) / step)
    yield from (first + step * number for number in range(count + 1))
    yield last
