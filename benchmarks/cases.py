"""The cases: which lanes are compared, and the required ratio."""

from dataclasses import dataclass
from typing import Final

from benchmarks import lanes
from benchmarks.lanes import Lane

MEGABYTES: Final = "growth_mb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the table: the ratio of two lanes' values in the same round, or the value or fact of one lane."""

    key: str
    title: str
    lane: type[Lane]
    peer: type[Lane] | None = None
    fact: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def required(self) -> str:
        """The requirement, as the table shows it."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "report" if self.at_most is None else f"<= {self.at_most:g}"

    def score(self, value: float) -> float | None:
        """How well `value` meets the requirement: 1 is just enough, more is better; None without a requirement."""
        if self.at_least is not None:
            return value / self.at_least
        return None if self.at_most is None else self.at_most / max(value, 1e-9)


CASES: Final = (
    Case(
        key="no-move",
        title="no move, 1 chain per task / raw no-op",
        lane=lanes.Evaluations1,
        peer=lanes.RawNothing,
        at_least=0.6,
    ),
    Case(
        key="move",
        title="move + callback, 1 chain per task / raw two hops",
        lane=lanes.Moves1,
        peer=lanes.RawTwoHops,
        at_least=0.4,
    ),
    Case(
        key="no-move-200",
        title="no move, 200 chains per task / raw no-op",
        lane=lanes.Evaluations200,
        peer=lanes.RawNothing,
        at_least=20,
    ),
    Case(
        key="move-200",
        title="move + callback, 200 chains, 1 delivery per task / raw no-op",
        lane=lanes.Moves200,
        peer=lanes.RawNothing,
        at_least=0.35,
    ),
    Case(
        key="move-200-50",
        title="move + callback, 200 chains, 50 deliveries per task / raw no-op",
        lane=lanes.Moves200By50,
        peer=lanes.RawNothing,
        at_least=4,
    ),
    Case(
        key="durable-step",
        title="durable step: 200 chains, 50 deliveries per task / DBOS",
        lane=lanes.Moves200By50,
        peer=lanes.Dbos,
        at_least=10,
    ),
    Case(
        key="sweep",
        title="sweep: 1,000 due of 1,000,000 / of 10,000",
        lane=lanes.SweepOfMany,
        peer=lanes.SweepOfFew,
        at_most=1.5,
    ),
    Case(
        key="fan-out",
        title="fan-out of 100,000 due / apply_async loop",
        lane=lanes.FanOut,
        peer=lanes.ApplyAsyncLoop,
        at_least=2,
    ),
    Case(
        key="fan-out",
        title="fan-out of 100,000 due: growth of resident memory, MB",
        lane=lanes.FanOut,
        fact=MEGABYTES,
        at_most=50,
    ),
    Case(
        key="on-demand",
        title="enqueue to returned callback, idle fleet / raw two hops",
        lane=lanes.OnDemand,
        peer=lanes.RawOnDemand,
        at_most=3,
    ),
    Case(
        key="bulk",
        title="bulk creation of 100,000 chains / get_or_create loop",
        lane=lanes.BulkCreation,
        peer=lanes.CreationLoop,
        at_least=10,
    ),
    Case(key="execute", title="chain.execute() without callback, SQLite", lane=lanes.InProcessSqlite),
    Case(key="execute", title="chain.execute() without callback, PostgreSQL", lane=lanes.InProcessPostgres),
)

KEYS: Final = tuple(dict.fromkeys(case.key for case in CASES))

# Items per round, chosen so that each lane takes a few seconds.
COUNTS: Final[dict[type[Lane], int]] = {
    lanes.RawNothing: 4_000,
    lanes.RawTwoHops: 2_000,
    lanes.Evaluations1: 2_000,
    lanes.Evaluations200: 40_000,
    lanes.Moves1: 800,
    lanes.Moves200: 1_600,
    lanes.Moves200By50: 10_000,
    lanes.Dbos: 1_200,
    lanes.SweepOfMany: 1_000,
    lanes.SweepOfFew: 1_000,
    lanes.FanOut: 100_000,
    lanes.ApplyAsyncLoop: 10_000,
    lanes.OnDemand: 100,
    lanes.RawOnDemand: 100,
    lanes.BulkCreation: 100_000,
    lanes.CreationLoop: 1_000,
    lanes.InProcessSqlite: 500,
    lanes.InProcessPostgres: 500,
}
_QUICK_DIVISOR: Final = 10
_LEAST: Final = 20


def count_of(lane: type[Lane], *, quick: bool) -> int:
    """How many items a lane processes in one round."""
    return max(COUNTS[lane] // _QUICK_DIVISOR, _LEAST) if quick else COUNTS[lane]
