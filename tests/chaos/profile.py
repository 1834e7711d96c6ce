"""What the driver and all workers of a run agree on: pools, groups, clock, hours, limits, drawn from seed and faults.

Facts, domain time and everything else that changes while a run goes on hang on CLOCK_MONOTONIC, because all processes
of a machine share it, no fault shifts it, and the oracle can compute afterwards what was true at any moment.
"""

import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Final

PROFILE_VARIABLE: Final = "CHAOS_PROFILE"
CLOCK: Final = "tests.chaos.profile:now"
"""What `DISPATCHER_CLOCK` names where the run has a clock of its own."""

GROUP: Final = 10
_START_SECONDS: Final = 8.0
"""About how long the servers and the workers take to start."""

_MINUTE: Final = timedelta(minutes=1)
_OWN_MINUTE: Final = datetime(2030, 6, 1, 12, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Profile:
    """One run's profile."""

    seed: int
    pools: tuple[str, ...]
    """The pool of each worker."""

    grouped: bool
    """Whether messages carry several chains and several deliveries."""

    own_clock: bool
    """Whether domain time comes from `now` instead of the database's clock."""

    rate: int
    """Calls per second that each of the two limits allows."""

    hours: str
    """Delivery hours that close for one minute while the run goes on."""

    began: float
    """CLOCK_MONOTONIC at the beginning of the run."""

    domain_began: str
    """Domain time at that moment."""

    machine_began: str
    """The database's clock at that moment."""

    long_seconds: float = 0.0
    """How long some first attempts take; 0: none does."""

    def domain_at(self, mono: float) -> datetime:
        """Domain time when CLOCK_MONOTONIC is `mono`."""
        return datetime.fromisoformat(self.domain_began) + timedelta(seconds=mono - self.began)

    def mono_at(self, domain: datetime) -> float:
        """CLOCK_MONOTONIC at a moment of domain time."""
        return self.began + (domain - datetime.fromisoformat(self.domain_began)).total_seconds()

    def mono_at_machine(self, at: datetime) -> float:
        """CLOCK_MONOTONIC at a moment of the database's clock."""
        return self.began + (at - datetime.fromisoformat(self.machine_began)).total_seconds()

    def to_text(self) -> str:
        """As one environment variable."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Profile":
        """The profile that `to_text` gave."""
        values = json.loads(text)
        return cls(**{**values, "pools": tuple(values["pools"])})


def draw(
    seed: int,
    faults: Sequence[str],
    *,
    chains: int,
    fault_seconds: float,
    pools: tuple[str, ...] | None = None,
    grouped: bool | None = None,
    long_seconds: float = 0.0,
) -> Profile:
    """The profile of a run that begins now. `pools` and `grouped` are drawn where the faults do not say."""
    rng = random.Random(f"profile:{seed}:{','.join(faults)}")
    drawn_pools = rng.choice((("prefork", "prefork"), ("prefork", "threads"), ("threads", "threads")))
    drawn_grouped, own_clock = rng.random() < 0.6, rng.random() < 0.6
    began, closes_after = time.monotonic(), _START_SECONDS + fault_seconds * 0.6
    machine_began = domain_began = datetime.now(UTC)
    if own_clock:  # the hours close in the middle of the storm
        closes, domain_began = _OWN_MINUTE, _OWN_MINUTE - timedelta(seconds=closes_after)
    else:
        earliest = domain_began + timedelta(seconds=closes_after / 2)
        closes = earliest.replace(second=0, microsecond=0) + _MINUTE
    return Profile(
        seed=seed,
        pools=pools if pools is not None else drawn_pools,
        grouped=grouped if grouped is not None else drawn_grouped,
        own_clock=own_clock,
        rate=max(2, chains // 100),
        hours=f"{closes + _MINUTE:%H:%M}-{closes:%H:%M}",
        began=began,
        domain_began=domain_began.isoformat(),
        machine_began=machine_began.isoformat(),
        long_seconds=long_seconds,
    )


@cache
def own() -> Profile:
    """The profile of the run that this process belongs to."""
    return Profile.from_text(os.environ[PROFILE_VARIABLE])


def now() -> datetime:
    """Domain time in a run with a clock of its own, the same in every process whatever its wall clock says."""
    return own().domain_at(time.monotonic())
