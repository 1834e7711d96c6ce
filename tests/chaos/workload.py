"""The seeded workload: random graphs, guards and callbacks, the same for every process that knows the profile.

Guards depend on nothing but the seed, the chain, `self.now` and the context, so that any worker asks the same
question and gets the same answer. Every state that is not terminal has at least one way forward that becomes valid
at last, or again and again; ways back are open to young chains only, which bounds the moves of a cycle.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from dispatcher import DONE, NEW, PermanentFailure, RetryPolicy, Transition
from dispatcher import rate_limit as limited
from dispatcher.domain.hours import DeliveryHours
from dispatcher.transition import ChainSnapshot
from tests.chaos.history import Edge, Graph, Limit
from tests.chaos.profile import Profile
from tests.chaos.truth import Candidate, Drawn, answer, chance

RETRY: Final = RetryPolicy(max_attempts=6, base_seconds=0.3, factor=1.5, cap_seconds=2, jitter=0.2)
GO: Final = "go"
"""The context key with which the driver asks chains that wait for a request to go on."""

TYPES: Final = 8
_WITH_FACTS: Final = range(4, TYPES)
_NAMES_WITH_FACTS: Final = frozenset(f"type{index}" for index in _WITH_FACTS)
_GROUPED: Final = 4
"""The type with the most chains. With the others that have facts it moves by sweeps, so that groups are large."""

_SHARES: Final = (8, 8, 8, 8, 32, 12, 12, 12)
"""How many of a hundred chains are of each type."""

_NEW_IN_THIS_VERSION: Final = 3
_RATED: Final = 5
"""The type with a `rate_limit`."""

_LIMITED: Final = 6
"""The type whose callback has one."""

_TIMED: Final = 7
"""The type with delivery hours."""

_SLOW_SHARE: Final = 0.05
_SLOW_SHARE_OF_A_GROUP: Final = 0.7
_LONG_SHARE: Final = 0.05


class CallbackError(Exception):
    """What a provider that is down raises."""


def _load_nothing(_: Sequence[ChainSnapshot]) -> dict[int, dict[str, bool]]:
    return {}


@dataclass(frozen=True)
class Surroundings:
    """What the workload's user code calls. By default nothing happens: so it is in the driver's own process."""

    send: Callable[[Transition, float], None] = lambda *_: None
    """Calls the provider, which takes so many seconds."""

    verify: Callable[[Transition], bool | None] = lambda _: None
    load: Callable[[Sequence[ChainSnapshot]], Mapping[int, Mapping[str, bool]]] = _load_nothing
    asking: Callable[[Transition], AbstractContextManager[object]] = lambda _: nullcontext()
    """Around each answer of a guard."""


# --- graphs ----------------------------------------------------------------------------------------------------------


def draw(seed: int, *, types: int = TYPES) -> list[Drawn]:
    """The chain types of a seed."""
    return [_draw_type(random.Random(f"{seed}:{index}"), f"type{index}", index) for index in range(types)]


def _draw_type(rng: random.Random, name: str, index: int) -> Drawn:
    count = rng.choice((3, 3, 3, 4, 4, 5, 8))
    last = DONE if rng.random() < 0.5 else "over"
    names = [NEW, *(f"s{number}" for number in range(1, count - 1)), last]
    kinds = ("open", "open", "always", "wait") if index in _WITH_FACTS else ("always", "chance", "wait")
    states: dict[str, tuple[Candidate, ...]] = {last: ()}
    for position, state in enumerate(names[:-1]):
        forward = names[position + 1 :]
        targets = rng.sample(forward, min(len(forward), rng.choice((1, 2, 2, 3))))
        found = [
            _draw_candidate(rng, f"{state.title()}To{target.title()}", target, position, kinds) for target in targets
        ]
        if all(candidate.kind == "never" for candidate in found):
            found[-1] = Candidate(found[-1].name, found[-1].to_state, "always", silent=found[-1].to_state == DONE)
        if position and rng.random() < 0.3:
            target = names[rng.randint(1, position)]
            found.insert(0, Candidate(f"{state.title()}Back", target, "chance", rng.uniform(0.05, 0.15), back=True))
        if index in _WITH_FACTS:
            found.insert(0, Candidate(f"{state.title()}Paid", last, "paid", silent=True))
        states[state] = tuple(found)
    options = {
        "continue": index not in (1, _GROUPED, _TIMED),
        "on_unknown": "hold" if index == 2 else "retry",
        "on_dead": "hold" if index == 3 else "skip",
        "recheck_seconds": 0,
    }
    return Drawn(name, states, options)


def _draw_candidate(rng: random.Random, name: str, target: str, position: int, kinds: Sequence[str]) -> Candidate:
    kind = rng.choices((*kinds, "asked", "never"), (*([4] * len(kinds)), 1, 1))[0]
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
    return [older(drawn) for index, drawn in enumerate(draw(seed)) if index != _NEW_IN_THIS_VERSION]


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


def limits_of(profile: Profile) -> list[Limit]:
    """The rate limits of the workload."""
    return [
        Limit("of the type", profile.rate, 1.0, frozenset({f"type{_RATED}"})),
        Limit("of the callback", profile.rate, 1.0, frozenset({f"type{_LIMITED}"})),
    ]


def hours_of(profile: Profile) -> dict[str, DeliveryHours]:
    """The delivery hours of the workload, by chain type."""
    return {f"type{_TIMED}": DeliveryHours.parse(profile.hours)}


# --- as a configuration ----------------------------------------------------------------------------------------------


def configuration(profile: Profile, types: list[Drawn], surroundings: Surroundings) -> Any:
    """The dict that `Dispatcher` takes."""

    def callback(transition: Transition, **_: Any) -> None:
        surroundings.send(transition, _seconds(profile, transition))

    @limited(f"{profile.rate}/s", name="chaos")
    def limited_callback(transition: Transition, **_: Any) -> None:
        callback(transition)

    special: dict[str, dict[str, Any]] = {
        f"type{_RATED}": {"rate_limit": f"{profile.rate}/s"},
        f"type{_LIMITED}": {"callback": limited_callback},
        f"type{_TIMED}": {"delivery_hours": profile.hours},
    }
    return {
        "chains": [
            {
                "chain_type": drawn.name,
                "callback": callback,
                **({"load_context": surroundings.load} if drawn.name in _NAMES_WITH_FACTS else {}),
                **special.get(drawn.name, {}),
                **drawn.options,
                "transitions": {
                    state: [_transition(profile, drawn.name, candidate, surroundings) for candidate in candidates]
                    for state, candidates in drawn.states.items()
                },
            }
            for drawn in types
        ]
    }


def _seconds(profile: Profile, transition: Transition) -> float:
    """How long the provider takes: mostly milliseconds, at times half as long as the facts of a group are good for."""
    drawn = chance(profile.seed, "slow", transition.chain.id, transition.chain.state)
    grouped = profile.grouped and transition.chain.chain_type == f"type{_GROUPED}"
    share = _SLOW_SHARE_OF_A_GROUP if grouped else _SLOW_SHARE
    return 0.3 + 0.3 * drawn / share if drawn < share else drawn * 0.02


def outlasts(profile: Profile, key: str, attempt: int) -> float:
    """For how many seconds an attempt takes longer than others, in a run where some do."""
    return profile.long_seconds if attempt == 1 and chance(profile.seed, "long", key) < _LONG_SHARE else 0.0


def _transition(
    profile: Profile, chain_type: str, candidate: Candidate, surroundings: Surroundings
) -> type[Transition]:
    body: dict[str, Any] = {
        "final_state": candidate.to_state,
        "retry": RETRY,
        "is_valid": _guard(profile.seed, chain_type, candidate, surroundings),
    }
    if candidate.kind in ("asked", "never"):
        body["recheck_seconds"] = None
    if candidate.silent and candidate.to_state != DONE:
        body["callback"] = None
    if candidate.verified:
        body["verify"] = surroundings.verify
    return type(candidate.name, (Transition,), body)


def _guard(
    seed: int, chain_type: str, candidate: Candidate, surroundings: Surroundings
) -> Callable[[Transition], bool]:
    def is_valid(self: Transition) -> bool:
        with surroundings.asking(self):
            valid = answer(
                seed,
                chain_type,
                candidate,
                chain_id=self.chain.id,
                created_at=self.chain.created_at,
                now=self.now,
                facts=self.context,
                asked=GO in self.context,
            )
        if candidate.kind == "wait" and not valid:
            return self.not_before(self.chain.created_at + timedelta(seconds=candidate.wait_seconds), "too early")
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
    drawn = 100 * chance(seed, "type", number)
    for index, share in enumerate(_SHARES):
        drawn -= share
        if drawn < 0:
            return f"type{index}"
    raise AssertionError("the shares of the types are not 100")
