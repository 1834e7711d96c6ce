"""The configuration as typed values. All of it is validated when it is made."""

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, Final, Literal, TypeGuard
from zoneinfo import ZoneInfo

from dispatcher.domain.graph import StateGraph
from dispatcher.domain.hours import DeliveryHours, zone_of
from dispatcher.errors import ConfigurationError
from dispatcher.rates import RateLimit, declared_limits
from dispatcher.retry import MAX_WAIT_SECONDS, RetryPolicy
from dispatcher.states import DONE
from dispatcher.telemetry import Action, emit
from dispatcher.transition import Transition, TypeDefault

logger = logging.getLogger(__name__)

MAX_NAME: Final = 100
"""The longest chain type, state, transition or callback name, in characters."""

_SHARE: Final = re.compile(r"\d{1,3}(\.\d{1,6})?%", re.ASCII)

Callback = Callable[..., Any]
ContextLoader = Callable[[Sequence[Any]], Mapping[int, Mapping[str, Any]]]


class NoCallbackGiven:
    """Marks a chain type without the option `callback`; `callback=None` means "move without a callback"."""

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN: Final = NoCallbackGiven()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainType:
    """One named configuration: the transitions that may leave each state, in order, and options.

    - `callback(transition, **callback_kwargs)`: called for every transition that has no callback method. With `None`
      the chain moves without a callback. If it is not given, a worker waits for a request that names a callback.
    - `callbacks`: names that `enqueue(callback=...)` may use.
    - `load_context(snapshots) -> {chain_id: context}`: called once per batch of chains.
    - `queue`: the Celery queue of this type's executions. Defaults to "dispatcher.chains".
    - `recheck_seconds`: how soon a rejected candidate is asked again. 0: every sweep; None: only when the chain
      is enqueued. Defaults to 0.
    - `continue_` (in a dict: `"continue"`): publish the next evaluation at once after a move. Defaults to False.
    - `on_unknown`: "retry" or "hold" a delivery whose worker died. Defaults to "retry".
    - `on_dead`: "hold" or "skip" a delivery that is out of attempts. Defaults to "hold".
    - `max_plans_per_hour`: how many transitions may be planned in one hour before the type is paused: a number, or a
      share of its chains such as "5%" (of an estimate refreshed every hour). Defaults to None (no limit).
    - `rate_limit`: how often the callbacks of this type may be called, by all workers together: "10/s", "100/m",
      "5000/h" or "20000/d". (The decorator `rate_limit` limits one callback.) Defaults to None (no limit).
    - `delivery_hours`: when the callbacks may be called: "08:00-20:00", "22:00-06:00". Defaults to None (always).
    - `time_zone`: the IANA name of the time zone of those hours. `"time_zone"` in a chain's stored context or in its
      request wins over it. Defaults to "UTC".

    Raises `ConfigurationError`, which names chain type, state and transition.
    """

    chain_type: str
    transitions: Mapping[str, Sequence[type[Transition]]]
    callback: Callback | NoCallbackGiven | None = NOT_GIVEN
    callbacks: Mapping[str, Callback] = field(default_factory=dict)
    load_context: ContextLoader | None = None
    queue: str | None = None
    recheck_seconds: float | None = 0
    continue_: bool = False
    on_unknown: Literal["retry", "hold"] = "retry"
    on_dead: Literal["hold", "skip"] = "hold"
    max_plans_per_hour: int | str | None = None
    rate_limit: str | None = None
    delivery_hours: str | None = None
    time_zone: str = "UTC"
    by_name: Mapping[str, type[Transition]] = field(init=False, repr=False)
    states: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = f"chain type {self.chain_type!r}"
        _check_name(self.chain_type, "chain type", path)
        _check_options(self, path)
        if not isinstance(self.transitions, Mapping):
            raise ConfigurationError("`transitions` must be a dict of states to lists of transitions", path)
        by_name: dict[str, type[Transition]] = {}
        frozen: dict[str, tuple[type[Transition], ...]] = {}
        for state, candidates in self.transitions.items():
            where = f"{path}, state {state!r}"
            _check_name(state, "state", where)
            if not _is_list(candidates):
                raise ConfigurationError("the candidates must be a list of transitions", where)
            frozen[state] = tuple(candidates)
            for candidate in frozen[state]:
                _check_transition(candidate, where)
                if by_name.setdefault(candidate.__name__, candidate) is not candidate:
                    raise ConfigurationError(
                        "two transitions of one chain type have the same class name",
                        f"{where}, transition {candidate.__name__}",
                    )
            if len(set(frozen[state])) != len(frozen[state]):
                raise ConfigurationError("a transition is listed twice", where)
        if frozen.get(DONE):
            raise ConfigurationError("nothing may leave DONE", f"{path}, state {DONE!r}")
        object.__setattr__(self, "transitions", frozen)
        object.__setattr__(self, "by_name", by_name)
        object.__setattr__(self, "states", frozenset(self.graph.states))

    @property
    def graph(self) -> StateGraph:
        """The states and transitions of this type as a graph."""
        return StateGraph.build(
            {
                state: [(candidate.__name__, candidate.final_state) for candidate in candidates]
                for state, candidates in self.transitions.items()
            }
        )

    def candidates(self, state: str) -> tuple[type[Transition], ...]:
        """The transitions listed for `state`, in order; empty for a terminal or unknown state."""
        return tuple(self.transitions.get(state, ()))

    @property
    def plan_share(self) -> float | None:
        """The share of the type's chains (above 0, at most 1) that may be planned per hour; None: no share is given."""
        limit = self.max_plans_per_hour
        return float(limit.removesuffix("%")) / 100 if isinstance(limit, str) else None

    def plans_per_hour(self, chains: int) -> int | None:
        """How many transitions may be planned in one hour if the type has `chains` chains; None: no limit."""
        share = self.plan_share
        if share is not None:
            return max(1, math.floor(share * chains))
        return self.max_plans_per_hour if isinstance(self.max_plans_per_hour, int) else None

    @property
    def rate(self) -> RateLimit | None:
        """The option `rate_limit`, parsed; None if it is not set."""
        return None if self.rate_limit is None else RateLimit.parse(f"type/{self.chain_type}", self.rate_limit)

    @property
    def hours(self) -> DeliveryHours | None:
        """The option `delivery_hours`, parsed; None if it is not set."""
        return None if self.delivery_hours is None else DeliveryHours.parse(self.delivery_hours)

    @property
    def zone(self) -> ZoneInfo:
        """The option `time_zone`, parsed."""
        return zone_of(self.time_zone)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], path: str) -> "ChainType":
        """The chain type of one dict in the ancestor's `chains` list; `path` says where the dict is, for errors."""
        if not isinstance(raw, Mapping):
            raise ConfigurationError("a chain must be a dict", path)
        if "chain_type" not in raw:
            raise ConfigurationError("`chain_type` is missing", path)
        path = f"{path}, chain type {raw['chain_type']!r}"
        if "transitions" not in raw:
            raise ConfigurationError("`transitions` is missing", path)
        unknown = [key for key in raw if key not in _OPTIONS]
        if unknown:
            raise ConfigurationError(f"unknown option {unknown[0]!r}", path)
        return cls(**{_OPTIONS[key]: value for key, value in raw.items()})


_OPTIONS: Final = {
    name.rstrip("_"): name for name in ChainType.__dataclass_fields__ if ChainType.__dataclass_fields__[name].init
}


@dataclass(frozen=True, slots=True)
class DispatcherConfig:
    """The configuration of a deployment: all its chain types."""

    chains: Sequence[ChainType]
    by_type: Mapping[str, ChainType] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_type: dict[str, ChainType] = {}
        for chain_type in self.chains:
            if not isinstance(chain_type, ChainType):
                raise ConfigurationError("every chain must be a ChainType or a dict", "`chains`")
            if chain_type.chain_type in by_type:
                raise ConfigurationError("is configured twice", f"chain type {chain_type.chain_type!r}")
            by_type[chain_type.chain_type] = chain_type
        _check_shared_limits(by_type.values())
        object.__setattr__(self, "chains", tuple(self.chains))
        object.__setattr__(self, "by_type", by_type)

    @classmethod
    def parse(cls, config: "DispatcherConfig | Mapping[str, Any] | Sequence[Any]") -> "DispatcherConfig":
        """The typed form of a dict `{"chains": [...]}` or of a list; the list may mix dicts and `ChainType` objects."""
        if isinstance(config, DispatcherConfig):
            return config
        if isinstance(config, Mapping):
            if "chains" not in config:
                raise ConfigurationError("the configuration has no `chains`")
            unknown = [key for key in config if key != "chains"]
            if unknown:
                raise ConfigurationError(f"unknown key {unknown[0]!r} beside `chains`")
            config = config["chains"]
        if not _is_list(config):
            raise ConfigurationError("must be a list of chain types", "`chains`")
        return cls(
            [
                raw if isinstance(raw, ChainType) else ChainType.from_dict(raw, f"`chains`[{number}]")
                for number, raw in enumerate(config)
            ]
        )

    def get(self, type_name: str) -> ChainType:
        """The chain type with this name. Raises `ConfigurationError` if there is none."""
        chain_type = self.by_type.get(type_name)
        if chain_type is None:
            names = ", ".join(map(repr, self.by_type)) or "none"
            raise ConfigurationError(f"unknown chain type (configured: {names})", f"chain type {type_name!r}")
        return chain_type


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _check_name(name: object, what: str, path: str) -> None:
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        raise ConfigurationError(f"a {what} must be a non-empty string of at most {MAX_NAME} characters", path)
    if not name.isprintable():
        raise ConfigurationError(f"a {what} must not contain control characters", path)


def _check_transition(candidate: object, where: str) -> None:
    if not (isinstance(candidate, type) and issubclass(candidate, Transition)):
        raise ConfigurationError(f"{candidate!r} is not a Transition class", where)
    path = f"{where}, transition {candidate.__name__}"
    _check_name(candidate.__name__, "transition name", path)
    final_state = getattr(candidate, "final_state", None)
    if final_state is None:
        raise ConfigurationError("has no `final_state`", path)
    _check_name(final_state, "final_state", path)
    if candidate.is_valid is Transition.is_valid or not callable(candidate.is_valid):
        raise ConfigurationError("has no `is_valid()`", path)
    _check_not_async(candidate.is_valid, "`is_valid`", path)
    for name in ("build_context", "verify"):
        _check_not_async(getattr(candidate, name, None), f"`{name}`", path)
    method = getattr(candidate, "callback", None)
    if method is not None and not callable(method):
        raise ConfigurationError("`callback` must be a method, or None for a move without one", path)
    _check_callback(method, "`callback`", path)
    if callable(method) and final_state == DONE:
        emit(logger, Action.CALLBACK_IGNORED, "%s: its callback is never called, because it leads to DONE", path)
    if not isinstance(candidate.retry, RetryPolicy):
        raise ConfigurationError("`retry` must be a RetryPolicy", path)
    if not isinstance(candidate.initial_context, Mapping):
        raise ConfigurationError("`initial_context` must be a dict", path)
    rest = candidate.date_next_update
    if not (rest is None or isinstance(rest, date | property | cached_property)):
        raise ConfigurationError("`date_next_update` must be a date or datetime", path)
    if not isinstance(candidate.recheck_seconds, TypeDefault):
        _check_recheck(candidate.recheck_seconds, path)


def _check_options(chain_type: ChainType, path: str) -> None:
    if not (
        chain_type.callback is None or isinstance(chain_type.callback, NoCallbackGiven) or callable(chain_type.callback)
    ):
        raise ConfigurationError("`callback` must be callable, or None for moves without one", path)
    _check_callback(chain_type.callback, "`callback`", path)
    if not isinstance(chain_type.callbacks, Mapping):
        raise ConfigurationError("`callbacks` must be a dict of names to functions", path)
    for name, function in chain_type.callbacks.items():
        _check_name(name, "callback name", path)
        if not callable(function):
            raise ConfigurationError(f"`callbacks`[{name!r}] is not callable", path)
        _check_callback(function, f"`callbacks`[{name!r}]", path)
    if chain_type.load_context is not None and not callable(chain_type.load_context):
        raise ConfigurationError("`load_context` must be callable", path)
    _check_not_async(chain_type.load_context, "`load_context`", path)
    if chain_type.queue is not None:
        _check_name(chain_type.queue, "queue", path)
    _check_recheck(chain_type.recheck_seconds, path)
    if not isinstance(chain_type.continue_, bool):
        raise ConfigurationError("`continue` must be True or False", path)
    if chain_type.on_unknown not in ("retry", "hold"):
        raise ConfigurationError('`on_unknown` must be "retry" or "hold"', path)
    if chain_type.on_dead not in ("hold", "skip"):
        raise ConfigurationError('`on_dead` must be "hold" or "skip"', path)
    if not _is_plan_limit(chain_type.max_plans_per_hour):
        raise ConfigurationError('`max_plans_per_hour` must be a number of at least 1, or a share such as "5%"', path)
    _check_pacing(chain_type, path)


def _check_pacing(chain_type: ChainType, path: str) -> None:
    for option, value in (("rate_limit", "rate"), ("delivery_hours", "hours"), ("time_zone", "zone")):
        try:
            getattr(chain_type, value)
        except ValueError as error:
            raise ConfigurationError(f"`{option}` {error}", path) from None


def _check_shared_limits(chain_types: Iterable[ChainType]) -> None:
    """Limits with the same name must have the same rates. Otherwise calls would silently exceed the stricter one."""
    rates: dict[str, set[RateLimit]] = {}
    for chain_type in chain_types:
        methods = [getattr(transition, "callback", None) for transition in chain_type.by_name.values()]
        for limits in map(declared_limits, (chain_type.callback, *chain_type.callbacks.values(), *methods)):
            for name in dict.fromkeys(limit.name for limit in limits):
                own = {limit for limit in limits if limit.name == name}
                if rates.setdefault(name, own) != own:
                    problem = f"the limit {name!r} has two rates: {_listed(rates[name])} and {_listed(own)}"
                    raise ConfigurationError(problem, f"chain type {chain_type.chain_type!r}")


def _listed(limits: Iterable[RateLimit]) -> str:
    return " with ".join(map(str, sorted(limits, key=lambda limit: (limit.seconds, limit.amount))))


def _check_recheck(seconds: object, path: str) -> None:
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise ConfigurationError(f"`recheck_seconds` must be a number from 0 to {MAX_WAIT_SECONDS}, or None", path)


def _check_callback(function: object, what: str, path: str) -> None:
    _check_not_async(function, what, path)
    for limit in declared_limits(function):
        _check_not_async(limit.key, f"the `key` of the rate limit {limit.name!r}", path)


def _check_not_async(function: object, what: str, path: str) -> None:
    # Nothing awaits the coroutine. It is truthy, so the guard would always be valid; a callback would never run.
    # The same holds for generators. An object that is called like a function has its code in its class.
    for code in (function, vars(type(function)).get("__call__")):
        if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            raise ConfigurationError(f"{what} must not be an async function", path)
        if inspect.isgeneratorfunction(code):
            raise ConfigurationError(f"{what} must not contain `yield`, because nothing iterates it", path)


def _is_plan_limit(limit: object) -> bool:
    if limit is None:
        return True
    if isinstance(limit, str):
        return _SHARE.fullmatch(limit) is not None and 0 < float(limit[:-1]) <= 100  # noqa: PLR2004 - per cent
    return isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
