"""The seeded workload: random graphs, guards and callbacks, the same for every process that knows the seed.

Guards depend on nothing but the seed, the chain, `self.now` and the context, so that any worker asks the same
question and gets the same answer. Every state that is not terminal has at least one way forward that becomes valid
at last; ways back are open to young chains only, which bounds the moves of a cycle.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from dispatcher import DONE, NEW, PermanentFailure, RetryPolicy, Transition
from tests.chaos.oracle import Edge, Graph

RETRY: Final = RetryPolicy(max_attempts=6, base_seconds=0.3, factor=1.5, cap_seconds=2, jitter=0.2)
GO: Final = "go"
"""The context key with which the driver asks chains that wait for a request to go on."""

_SLOT_SECONDS: Final = 5
_YOUNG: Final = timedelta(seconds=20)
_OLD: Final = timedelta(seconds=60)
_TYPES: Final = 6

Guard = Callable[[Transition], bool]
Provider = Callable[[Transition, float], None]


class CallbackError(Exception):
    """What a provider that is down raises."""


def chance(*parts: object) -> float:
    """A number from [0, 1) that depends on nothing but `parts`."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


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


def draw(seed: int, *, types: int = _TYPES) -> list[Drawn]:
    """The chain types of a seed."""
    return [_draw_type(random.Random(f"{seed}:{index}"), f"type{index}", index) for index in range(types)]


def _draw_type(rng: random.Random, name: str, index: int) -> Drawn:
    count = rng.choice((3, 3, 3, 4, 4, 5, 8))
    last = DONE if rng.random() < 0.5 else "over"
    names = [NEW, *(f"s{number}" for number in range(1, count - 1)), last]
    states: dict[str, tuple[Candidate, ...]] = {last: ()}
    for position, state in enumerate(names[:-1]):
        forward = names[position + 1 :]
        targets = rng.sample(forward, min(len(forward), rng.choice((1, 2, 2, 3))))
        found = [_draw_candidate(rng, f"{state.title()}To{target.title()}", target, position) for target in targets]
        if all(candidate.kind == "never" for candidate in found):
            found[-1] = Candidate(found[-1].name, found[-1].to_state, "always", silent=found[-1].to_state == DONE)
        if position and rng.random() < 0.3:
            target = names[rng.randint(1, position)]
            found.insert(0, Candidate(f"{state.title()}Back", target, "chance", rng.uniform(0.05, 0.15), back=True))
        states[state] = tuple(found)
    options = {
        "continue": index != 1,
        "on_unknown": "hold" if index == 2 else "retry",
        "on_dead": "hold" if index == 3 else "skip",
        "recheck_seconds": 0,
    }
    return Drawn(name, states, options)


def _draw_candidate(rng: random.Random, name: str, target: str, position: int) -> Candidate:
    kind = rng.choices(("always", "chance", "wait", "asked", "never"), (4, 4, 4, 1, 1))[0]
    return Candidate(
        name,
        target,
        kind,
        probability=rng.uniform(0.5, 0.95),
        wait_seconds=position * 1.5 + rng.uniform(0, 3),
        silent=target == DONE or rng.random() < 0.1,
        verified=rng.random() < 0.25,
    )


def older(drawn: Drawn) -> Drawn:
    """The version of a chain type that is being replaced: it lacks a state's last candidate, and orders another's."""
    states = dict(drawn.states)
    named = [state for state, candidates in states.items() if len(candidates) > 1]
    for number, state in enumerate(named[:2]):
        states[state] = states[state][:-1] if number == 0 else tuple(reversed(states[state]))
    return Drawn(drawn.name, states, drawn.options)


def older_types(seed: int) -> list[Drawn]:
    """All chain types as a worker of the version before knows them: one type it has never heard of."""
    return [older(drawn) for drawn in draw(seed)[:-1]]


def graph_of(types: list[Drawn]) -> Graph:
    """What the oracle must know of these chain types."""
    edges, silent, terminal = set(), set(), set()
    for drawn in types:
        for state, candidates in drawn.states.items():
            if not candidates:
                terminal.add((drawn.name, state))
            for candidate in candidates:
                edge = Edge(drawn.name, state, candidate.name, candidate.to_state)
                edges.add(edge)
                if candidate.silent:
                    silent.add(edge)
    return Graph(frozenset(edges), frozenset(silent), frozenset(terminal))


# --- as a configuration ----------------------------------------------------------------------------------------------


def configuration(seed: int, types: list[Drawn], *, send: Provider, verify: Callable[[Transition], bool | None]) -> Any:
    """The dict that `Dispatcher` takes."""

    def callback(transition: Transition, **_: Any) -> None:
        send(transition, chance(seed, "slow", transition.chain.id) * 0.02)

    return {
        "chains": [
            {
                "chain_type": drawn.name,
                "callback": callback,
                **drawn.options,
                "transitions": {
                    state: [_transition(seed, drawn.name, candidate, verify) for candidate in candidates]
                    for state, candidates in drawn.states.items()
                },
            }
            for drawn in types
        ]
    }


def _transition(
    seed: int, chain_type: str, candidate: Candidate, verify: Callable[[Transition], bool | None]
) -> type[Transition]:
    body: dict[str, Any] = {
        "final_state": candidate.to_state,
        "retry": RETRY,
        "is_valid": _guard(seed, chain_type, candidate),
    }
    if candidate.kind in ("asked", "never"):
        body["recheck_seconds"] = None
    if candidate.silent and candidate.to_state != DONE:
        body["callback"] = None
    if candidate.verified:
        body["verify"] = verify
    return type(candidate.name, (Transition,), body)


def _guard(seed: int, chain_type: str, candidate: Candidate) -> Guard:
    def is_valid(self: Transition) -> bool:
        age = self.now - self.chain.created_at
        slot = int(self.now.timestamp()) // _SLOT_SECONDS
        drawn = chance(seed, chain_type, candidate.name, self.chain.id, slot)
        if age < _OLD and chance(drawn, "raises") < 0.01:
            raise ValueError("a guard that raises sometimes")
        if candidate.back and age > _YOUNG:
            self.errors.append("too old to go back")
            return False
        if candidate.kind == "wait":
            return self.not_before(self.chain.created_at + timedelta(seconds=candidate.wait_seconds), "too early")
        valid = {
            "always": True,
            "never": False,
            "asked": GO in self.context,
            "chance": drawn < candidate.probability or (not candidate.back and age > _OLD),
        }[candidate.kind]
        if not valid:
            self.errors.append(f"{candidate.kind}: not now")
        return valid

    return is_valid


def fate(seed: int, key: str, attempt: int) -> str:
    """What becomes of an attempt's callback: `works`, `raises_before`, `raises_after`, or `gives_up`."""
    drawn = chance(seed, "fate", key, attempt)
    for name, share in (("raises_before", 0.06), ("raises_after", 0.04), ("gives_up", 0.004)):
        if drawn < share:
            return name
        drawn -= share
    return "works"


def raise_for(name: str) -> None:
    """Raise what an attempt with this fate raises."""
    if name == "gives_up":
        raise PermanentFailure("no such address")
    raise CallbackError(name)


def resources_of(number: int) -> list[tuple[str, str]]:
    """The resources of chain number `number` of the workload."""
    return [("entity", str(number))]


def type_of(seed: int, number: int) -> str:
    """The chain type of chain number `number` of the workload."""
    return f"type{int(chance(seed, 'type', number) * _TYPES)}"


def parse_time(text: str) -> datetime:
    """A datetime as the sink keeps it."""
    return datetime.fromisoformat(text)
