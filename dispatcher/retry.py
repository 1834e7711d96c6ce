"""The waits between failed attempts: exponential backoff with a cap and jitter."""

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from dispatcher.bounds import refuse_unstarted, safe_text
from dispatcher.errors import ends_process

MAX_ATTEMPTS: Final = 1_000_000
"""The most attempts that may be configured: it is stored as a 32-bit number."""

MAX_WAIT_SECONDS: Final = 100 * 365 * 86400
"""The longest wait that may be configured. It is bounded so that adding it to a date cannot overflow."""

MAX_OWN_WAIT_SECONDS: Final = 30 * 86400
"""The longest wait that a `delay()` of a user's own may give, in seconds; a longer one is cut to it."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a callback is attempted, and how long to wait between attempts.

    The delay after attempt n (1, 2, ...) is `base_seconds * factor ** (n - 1)`, at most `cap_seconds`,
    then spread by `jitter`: 0.2 draws evenly from 80 % to 120 % of it, so that callbacks that failed
    together are not tried again together. (Exponential backoff with jitter, see Brooker, "Exponential Backoff
    And Jitter", AWS Architecture Blog, 2015.)

    Raises `ValueError` for numbers out of range.
    """

    max_attempts: int = 5
    base_seconds: float = 10.0
    factor: float = 3.0
    cap_seconds: float = 3600.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if type(self.max_attempts) is not int or not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise ValueError(
                f"max_attempts must be a whole number between 1 and {MAX_ATTEMPTS}, not {self.max_attempts!r}"
            )
        for name in ("base_seconds", "cap_seconds"):
            if not 0 <= getattr(self, name) <= MAX_WAIT_SECONDS:
                raise ValueError(f"{name} must lie between 0 and {MAX_WAIT_SECONDS}, not {getattr(self, name)!r}")
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"factor must be a finite number of at least 1, not {self.factor!r}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must lie between 0 and 1, not {self.jitter!r}")

    def delay(self, attempt: int, random: Callable[[], float]) -> timedelta:
        """The wait after the failed attempt number `attempt` (from 1).

        `random` returns floats in [0, 1), as `random.random` does; it is passed in so that tests can fix it.
        """
        try:
            growth = float(self.factor) ** (attempt - 1)
        except OverflowError:
            growth = sys.float_info.max
        seconds = min(self.base_seconds * growth, self.cap_seconds)
        return timedelta(seconds=seconds * (1 - self.jitter + 2 * self.jitter * random()))


@dataclass(frozen=True, slots=True)
class RetryWait:
    """How long to wait before the next attempt. `problem` says why the policy's own answer was not taken, if so."""

    seconds: float
    problem: BaseException | None = None


def retry_wait(transition: Any, attempt: int, random: Callable[[], float]) -> RetryWait:
    """The wait that the policy of a transition class gives after attempt number `attempt` failed. Runs user code.

    A subclass of `RetryPolicy` may have a `delay()` of its own. If it raises, or gives no timedelta or a negative one,
    the default policy's wait is taken; a wait above `MAX_OWN_WAIT_SECONDS` is cut.
    """
    try:
        policy = transition.retry
        answer = policy.delay(attempt, random)
        refuse_unstarted(answer, "delay()")
        if not isinstance(answer, timedelta):
            raise TypeError(f"delay() gave {safe_text(repr(answer), 150)}, which is not a timedelta")
        seconds = timedelta.total_seconds(answer)
        if seconds < 0:
            raise ValueError(f"delay() gave {seconds:g} s, which is negative")
        if seconds > MAX_OWN_WAIT_SECONDS and type(policy).delay is not RetryPolicy.delay:
            return RetryWait(
                MAX_OWN_WAIT_SECONDS, ValueError(f"delay() gave {seconds:g} s, more than {MAX_OWN_WAIT_SECONDS} s")
            )
        return RetryWait(seconds)
    except BaseException as error:  # user code: the next attempt must be written all the same
        if ends_process(error):
            raise
        return RetryWait(RetryPolicy().delay(attempt, random).total_seconds(), error)


def back_off(chain_id: int, failures: int) -> timedelta:
    """How long a chain waits after `failures` failed evaluations in a row; always the same for the same two numbers."""
    return growing_interval(failures, spread=spread_of(chain_id, failures))


def growing_interval(
    failures: int, *, spread: float = 1.0, base_seconds: float = 60.0, cap_seconds: float = 3600.0
) -> timedelta:
    """The wait before evaluation number `failures + 1` of a chain whose guards failed `failures` times in a row.

    `spread` in [0, 1] takes from 80 % to 100 % of it, so that chains that failed together are not asked again together.
    """
    seconds = min(base_seconds * 2 ** min(failures - 1, 30), cap_seconds)
    return timedelta(seconds=seconds * (0.8 + 0.2 * spread))


def spread_of(chain_id: int, failures: int) -> float:
    """A number in [0, 1) for a chain and failure: evenly spread, and always the same, so that deciding stays pure."""
    return zlib.crc32(f"{chain_id}/{failures}".encode()) / 2**32
