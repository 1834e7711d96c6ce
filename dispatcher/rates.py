"""Rate limits as values. Pure; the module `limiter` counts the calls."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from dispatcher.errors import ConfigurationError

Function = TypeVar("Function", bound=Callable[..., Any])

MAX_AMOUNT: Final = 1_000_000
"""The largest number of calls in one window. It is bounded because every call of a window is stored."""

_RATE: Final = re.compile(r"([1-9]\d{0,6})/([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MARK: Final = "_dispatcher_rate_limit"


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `amount` calls under the name `name` within any period of `seconds`."""

    name: str
    amount: int
    seconds: int

    @classmethod
    def parse(cls, name: str, rate: object) -> "RateLimit":
        """The limit of "10/s", "100/m", "5000/h" or "20000/d". Raises `ValueError` for anything else."""
        match = _RATE.fullmatch(rate) if isinstance(rate, str) else None
        if match is None or int(match[1]) > MAX_AMOUNT:
            raise ValueError(f'must be a rate such as "10/s", "100/m", "5000/h" or "20000/d", of at most {MAX_AMOUNT}')
        return cls(name, int(match[1]), _SECONDS[match[2]])

    def __str__(self) -> str:
        unit = next(unit for unit, seconds in _SECONDS.items() if seconds == self.seconds)
        return f"{self.amount}/{unit}"


def rate_limit(rate: str, *, name: str | None = None) -> Callable[[Function], Function]:
    """A decorator for callbacks: all workers together call the function at most this often, such as "100/m".

    Callbacks with the same `name` share one limit. Defaults to the function's module and qualified name. A call counts
    for the limits of its callback and of its chain type. Raises `ConfigurationError`, which names the function.
    """

    def decorate(function: Function) -> Function:
        label = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '<object>')}"
        if name is None and "<" in label:  # <lambda> and <locals> are not unique names
            raise ConfigurationError("this function has no unique name, so its rate limit needs `name=`", label)
        if name is not None and not (isinstance(name, str) and name and name.isprintable()):
            raise ConfigurationError("the `name` of a rate limit must be a non-empty string", label)
        try:
            limit = RateLimit.parse(f"callback/{name or label}", rate)
        except ValueError as error:
            raise ConfigurationError(f"a rate limit {error}", label) from None
        setattr(function, _MARK, limit)
        return function

    return decorate


def limit_of(function: object) -> RateLimit | None:
    """The limit that the decorator `rate_limit` set on a function or method, or None."""
    limit = getattr(function, _MARK, None)
    return limit if isinstance(limit, RateLimit) else None
