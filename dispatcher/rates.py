"""Rate limits as values, and the keys of calls. Pure; the module `limiter` counts the calls."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from dispatcher.errors import ConfigurationError

Function = TypeVar("Function", bound=Callable[..., Any])
KeyFunction = Callable[[Any], "str | int | None"]
"""What gives the key of a call, from its transition; None: the limit does not hold for this call."""

MAX_AMOUNT: Final = 1_000_000
"""The largest number of calls in one window. It is bounded because every call of a window is stored."""

MAX_KEY: Final = 200
"""The longest key of a call, in characters."""

_TOO_LARGE: Final = 10**MAX_KEY
_RATE: Final = re.compile(r"([1-9]\d{0,6})/([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MARK: Final = "_dispatcher_rate_limits"


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `amount` calls under the name `name` within any period of `seconds`.

    With a function `key` (a *keyed* limit) that holds for the calls of each key. Two functions may use one name.
    """

    name: str
    amount: int
    seconds: int
    key: KeyFunction | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, name: str, rate: object, *, key: KeyFunction | None = None) -> "RateLimit":
        """The limit of "10/s", "100/m", "5000/h" or "20000/d". Raises `ValueError` for anything else."""
        match = _RATE.fullmatch(rate) if isinstance(rate, str) else None
        if match is None or int(match[1]) > MAX_AMOUNT:
            raise ValueError(f'must be a rate such as "10/s", "100/m", "5000/h" or "20000/d", of at most {MAX_AMOUNT}')
        return cls(name, int(match[1]), _SECONDS[match[2]], key)

    def __str__(self) -> str:
        unit = next(unit for unit, seconds in _SECONDS.items() if seconds == self.seconds)
        return f"{self.amount}/{unit}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A limit that a call is asked about, and the key of the call.

    A keyed limit with the key None does not hold for this call.
    """

    limit: RateLimit
    key: str | None = None


def rate_limit(rate: str, *, key: KeyFunction | None = None, name: str | None = None) -> Callable[[Function], Function]:
    """A decorator for callbacks: all workers together call the function at most this often, such as "100/m".

    With `key` the limit holds for each key: `rate_limit("1/d", key=lambda transition: ...)`. The function gets the
    transition and gives text of at most 200 characters, a whole number, or None: no limit for this call.

    Callbacks with the same `name` share one limit. Defaults to the function's module and qualified name. A function
    may have several limits. A call counts for the limits of its callback and of its chain type. Raises
    `ConfigurationError`, which names the function.
    """

    def decorate(function: Function) -> Function:
        label = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '<object>')}"
        if name is None and "<" in label:  # <lambda> and <locals> are not unique names
            raise ConfigurationError("this function has no unique name, so its rate limit needs `name=`", label)
        if name is not None and not (isinstance(name, str) and name and name.isprintable()):
            raise ConfigurationError("the `name` of a rate limit must be a non-empty string", label)
        if key is not None and not callable(key):
            raise ConfigurationError("the `key` of a rate limit must be a function", label)
        kind = "callback" if key is None else "key"
        try:
            limit = RateLimit.parse(f"{kind}/{name or label}", rate, key=key)
        except ValueError as error:
            raise ConfigurationError(f"a rate limit {error}", label) from None
        declared = declared_limits(function)
        others = [other for other in declared if other != limit]
        if any(other == limit and other.key != key for other in declared):
            raise ConfigurationError("two rate limits with different keys need different names (`name=`)", label)
        setattr(function, _MARK, (limit, *others))
        return function

    return decorate


def declared_limits(function: object) -> tuple[RateLimit, ...]:
    """The limits that the decorators `rate_limit` set on a function or method, the outermost first."""
    limits = getattr(function, _MARK, None)
    is_ours = isinstance(limits, tuple) and all(isinstance(limit, RateLimit) for limit in limits)
    return limits if is_ours and isinstance(limits, tuple) else ()


def key_of(limit: RateLimit, transition: object) -> str | None:
    """The key of a call of `transition`'s callback, as text; None for no limit, and where the limit has no keys.

    Calls the user's function, so it may raise anything. Raises `ValueError`, which names the limit, for a key that is
    neither text nor a whole number, or too long.
    """
    key = None if limit.key is None else limit.key(transition)
    if key is None:
        return None
    if isinstance(key, str):
        text = str.__str__(key)  # a subclass may show itself in another way
    elif isinstance(key, int) and not isinstance(key, bool):
        text = int.__repr__(max(-_TOO_LARGE, min(key, _TOO_LARGE)))  # Python refuses to write thousands of digits
    else:
        text = f"the key of the rate limit {limit.name!r} must be text or a whole number, not {type(key).__name__}"
        raise ValueError(text)  # noqa: TRY004 - one error for every bad key
    if len(text) > MAX_KEY:
        raise ValueError(f"the key of the rate limit {limit.name!r} is longer than {MAX_KEY} characters")
    return text


def asked_of(limits: Sequence[RateLimit], transition: object) -> tuple[Asked, ...]:
    """What a call of `transition`'s callback is asked about: each limit that holds for it, with the call's key.

    Raises as `key_of`.
    """
    asked = [Asked(limit, key_of(limit, transition)) for limit in limits]
    return tuple(each for each in asked if each.limit.key is None or each.key is not None)
