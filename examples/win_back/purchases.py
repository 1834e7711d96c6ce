"""The shop's purchases, read from the CDNOW sample (see README.md for its source)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Final

DATA: Final = Path(__file__).with_name("cdnow_sample.txt")
FIRST_DAY: Final = date(1997, 1, 1)
LAST_DAY: Final = date(1998, 6, 30)
_COLUMNS: Final = 5


@dataclass(frozen=True, slots=True)
class Purchase:
    """One line of the file. `customer` is the id in the full data set, `sample_id` the id in the sample."""

    customer: str
    sample_id: str
    bought_on: date
    cds: int
    dollars: float


@dataclass(frozen=True, slots=True, order=True)
class Order:
    """All purchases of a customer on one day. Each order has a chain."""

    bought_on: date
    customer: str

    @property
    def resources(self) -> list[tuple[str, str]]:
        """The chain's resources."""
        return [("customer", self.customer), ("order", f"{self.bought_on:%Y%m%d}")]

    @classmethod
    def of(cls, resources: Iterable[tuple[str, str]]) -> "Order":
        """The order of the chain with these resources."""
        ids = dict(resources)
        return cls(bought_on=_day(ids["order"]), customer=ids["customer"])


def parse_purchase(line: str) -> Purchase:
    """The purchase on one line of the file. Raises `ValueError` for a bad line."""
    fields = line.split()
    if len(fields) != _COLUMNS:
        raise ValueError(f"expected {_COLUMNS} columns, found {len(fields)}: {line.strip()!r}")
    customer, sample_id, day, cds, dollars = fields
    return Purchase(customer, sample_id, _day(day), int(cds), float(dollars))


def read_purchases(path: Path = DATA) -> list[Purchase]:
    """All purchases in the order of the file. Raises `ValueError`, which names the first bad line."""
    purchases = []
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        try:
            purchases.append(parse_purchase(line))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
    return purchases


def orders_of(purchases: Iterable[Purchase]) -> list[Order]:
    """The distinct orders, by day and customer."""
    return sorted({Order(purchase.bought_on, purchase.customer) for purchase in purchases})


def choose_customers(purchases: Iterable[Purchase], count: int) -> frozenset[str]:
    """`count` customers, spread evenly over the file, which is sorted by first purchase; always the same customers."""
    customers = list(dict.fromkeys(purchase.customer for purchase in purchases))
    count = min(count, len(customers))
    return frozenset(customers[number * len(customers) // count] for number in range(count))


@cache
def histories() -> Mapping[str, Sequence[date]]:
    """Each customer's days of purchase, ascending. This is the shop's database; it is loaded once per process."""
    days: dict[str, list[date]] = {}
    for order in orders_of(read_purchases()):
        days.setdefault(order.customer, []).append(order.bought_on)
    return days


def _day(text: str) -> date:
    return datetime.strptime(text, "%Y%m%d").date()  # noqa: DTZ007 - a calendar day has no time zone
