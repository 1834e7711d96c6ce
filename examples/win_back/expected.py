"""The expected steps of each order and their days, computed only from the file of purchases.

This module does not import the dispatcher or the code under test, so that the comparison is independent.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final

STEPS: Final = (("Reminder30", 30), ("Offer90", 90), ("Lapsed180", 180))
COMING_BACK: Final = "BoughtAgain"
SENT: Final = frozenset({"Reminder30", "Offer90"})
"""The steps that send something to the customer; the other steps only end the order's chain."""


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """A step of a customer's order on a day. `order` is the day of the order as yyyymmdd."""

    day: date
    customer: str
    order: str
    transition: str


def expected_steps(path: Path, customers: Container[str], until: date) -> list[Step]:
    """All steps of the orders of `customers` up to and including the day `until`, sorted by day."""
    days_of: dict[str, set[str]] = {}
    for line in path.read_text(encoding="ascii").splitlines():
        customer, _, day, *_ = line.split()
        if customer in customers:
            days_of.setdefault(customer, set()).add(day)
    return sorted(
        Step(day, customer, order, transition)
        for customer, orders in days_of.items()
        for order, following in pairwise([*sorted(orders), None])
        if order is not None
        for transition, day in steps_of(_date(order), _date(following) if following else None, until)
    )


def steps_of(bought_on: date, bought_again_on: date | None, until: date) -> Iterator[tuple[str, date]]:
    """`(transition, day)` of each step of an order up to `until`. A purchase on the day of a step precedes the step."""
    for transition, days in STEPS:
        step_on = bought_on + timedelta(days=days)
        if bought_again_on is not None and bought_again_on <= step_on:
            if bought_again_on <= until:
                yield COMING_BACK, bought_again_on
            return
        if step_on > until:
            return
        yield transition, step_on


def _date(text: str) -> date:
    return date(int(text[:4]), int(text[4:6]), int(text[6:]))
