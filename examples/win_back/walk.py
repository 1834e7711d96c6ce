"""The simulated shop, and the calendar that moves through its days."""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from typing import Any, Final

from dispatcher import DONE, Chain, Dispatcher
from dispatcher.embedded.stack import Stack
from examples.win_back import clock
from examples.win_back.config import TYPE_NAME
from examples.win_back.progress import DayProgress
from examples.win_back.purchases import LAST_DAY, Order

_POLL_SECONDS: Final = 0.01
_CHECK_SECONDS: Final = 1.0
_COUNT_SECONDS: Final = 2.0


class DayNotQuiet(Exception):  # noqa: N818 - the name is clear without "Error"
    """A simulated day did not end in time."""


class Shop:
    """The application that uses the dispatcher: creates a chain for every order, and enqueues chains at a purchase."""

    def __init__(self, dispatcher: Dispatcher, orders: Iterable[Order]) -> None:
        self.chains: dict[Order, Chain] = {}
        self._dispatcher = dispatcher
        self._future = deque(sorted(orders))
        self._open: dict[str, list[Chain]] = {}

    @property
    def next_day(self) -> date | None:
        """The day of the next purchase; None if there is none."""
        return self._future[0].bought_on if self._future else None

    def sell(self, day: date) -> None:
        """Create a chain for each order of `day`, and enqueue the customer's earlier chains."""
        while self._future and self._future[0].bought_on == day:
            order = self._future.popleft()
            earlier = [chain for chain in self._open.get(order.customer, []) if chain.refresh().state != DONE]
            for chain in earlier:
                chain.enqueue(requested_by="shop")
            chain = self._dispatcher.get_or_create_resource_chain(TYPE_NAME, order.resources)
            self._open[order.customer] = [*earlier, chain]
            self.chains[order] = chain


class Calendar:
    """Sets the simulated clock to each day on which something can happen, when the day before is quiet."""

    def __init__(self, dispatcher: Dispatcher, stack: Stack, *, day_seconds: float, progress: DayProgress) -> None:
        self._dispatcher = dispatcher
        self._stack = stack
        self._day_seconds = day_seconds
        self._progress = progress
        self._ended = 0
        self._counted = time.monotonic()

    def walk(self, shop: Shop) -> None:
        """Go through all days. Raises `DayNotQuiet` if a day does not end in time."""
        day = shop.next_day
        while day is not None and day <= LAST_DAY:
            clock.set_day(day)
            shop.sell(day)
            self._dispatcher.sweep()
            next_due_at = self._wait_until_quiet(day)
            days = [day for day in (shop.next_day, _first_day_from(next_due_at)) if day is not None]
            day = min(days, default=None)

    def _wait_until_quiet(self, day: date) -> datetime | None:
        """Wait until no chain is due on this day and no delivery is open; gives the next due moment, or None."""
        began = time.monotonic()
        checked = began
        while True:
            stats = self._dispatcher.stats()
            if stats["due"] == 0 and stats["open_deliveries"] == 0:
                self._show(day, stats)
                next_due_at: datetime | None = stats["next_due_at"]
                return next_due_at
            now = time.monotonic()
            if now > began + self._day_seconds:
                raise DayNotQuiet(
                    f"{day} is not quiet after {self._day_seconds:.0f} s: {stats['due']} chains are due, "
                    f"{stats['open_deliveries']} deliveries are open"
                )
            if now > checked + _CHECK_SECONDS:
                checked = now
                self._stack.check()
            time.sleep(_POLL_SECONDS)

    def _show(self, day: date, stats: Mapping[str, Any]) -> None:
        callbacks = stats["deliveries"]["delivered"]
        if time.monotonic() > self._counted + _COUNT_SECONDS:
            self._ended = len(self._dispatcher.find_chains(chain_type=TYPE_NAME, state=DONE, limit=stats["chains"]))
            self._counted = time.monotonic()
        self._progress.show(day, chains=stats["chains"], moves=callbacks + self._ended, callbacks=callbacks)


def _first_day_from(moment: datetime | None) -> date | None:
    """The first day that begins at or after `moment`, because the clock only shows beginnings of days."""
    if moment is None:
        return None
    starts = datetime.combine(moment.date(), time_of_day.min, tzinfo=UTC)
    return starts.date() if starts == moment else starts.date() + timedelta(days=1)
